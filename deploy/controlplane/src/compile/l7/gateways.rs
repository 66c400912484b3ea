//! The waypoints' own resources, and what is told about Gateways and their classes.

use std::collections::BTreeMap;
use std::sync::Arc;

use adit_shared::proto::waypoint as wire;

use super::backend_tls::client_certificate;
use super::resource::Resource;
use super::view::View;
use super::waypoints::{
    CONTROLLER, GATEWAY_NAME, NotReady, Waypoint, WaypointName, generated_service, listener_fault,
};
use super::{Part, WAYPOINT_CLASS};
use crate::model::{
    ClassParameters, Gateway, GatewayAddress, Kind, NamespaceObjects, ObjectRef, Objects,
};
use crate::status::{AddressStatus, Condition, ListenerStatus, ObjectStatus};

/// The secret that seals the tokens of sessions.
const SESSION_KEY: &str = "session-key";

pub(super) fn compile(objects: &NamespaceObjects, view: &View<'_>, part: &mut Part) {
    for gateway in objects.gateways.values() {
        let name = WaypointName {
            namespace: view.namespace.clone(),
            name: gateway.meta.name.clone(),
        };
        let Some(waypoint) = view.waypoints.get(&name) else {
            continue;
        };
        let own = Resource::Waypoint(wire::Waypoint {
            namespace: name.namespace.to_string(),
            name: name.name.to_string(),
            waypoint_for: waypoint.traffic.into(),
        });
        part.give(&name, &Arc::new(own));
        if let Some(secret) = &view.mesh.shared_secret {
            let key = secret.derive(&format!("session key of {name}"));
            let secret = Resource::Secret(wire::Secret {
                name: SESSION_KEY.into(),
                session_key: key.expose().to_vec(),
                ..wire::Secret::default()
            });
            part.give(&name, &Arc::new(secret));
        }
        let status = status(gateway, waypoint, objects, view);
        *part.status(gateway.meta.reference(Kind::Gateway)) = status;
    }
}

/// Status of the classes that are waypoints'.
pub fn class_statuses(objects: &Objects) -> BTreeMap<ObjectRef, ObjectStatus> {
    let ours = objects
        .gateway_classes
        .values()
        .filter(|class| *class.controller == *CONTROLLER);
    let status = |class: &crate::model::GatewayClass| {
        // Whether the ConfigMap is there and of use, who makes waypoints of it tells.
        let parameters = class.parameters.as_ref().map(ClassParameters::config_map);
        let condition = match (class.errors.first(), parameters) {
            (Some(error), _) => Condition::new("Accepted", false, "InvalidParameters", error),
            (None, Some(Err(why))) => Condition::new("Accepted", false, "InvalidParameters", why),
            _ => Condition::new("Accepted", true, "Accepted", "served by Adit"),
        };
        ObjectStatus {
            conditions: vec![condition],
            ..ObjectStatus::default()
        }
    };
    ours.map(|class| (class.meta.reference(Kind::GatewayClass), status(class)))
        .collect()
}

fn status(
    gateway: &Gateway,
    waypoint: &Waypoint,
    objects: &NamespaceObjects,
    view: &View<'_>,
) -> ObjectStatus {
    let (accepted, programmed) = match &waypoint.address {
        Err(NotReady::NotAccepted(why)) => {
            let fault = gateway.listeners.iter().any(|listener| {
                listener_fault(&listener.name, listener.port, &listener.protocol).is_some()
            });
            let reason = if fault || gateway.listeners.len() != 1 {
                "ListenersNotValid"
            } else {
                "Invalid"
            };
            (
                Condition::new("Accepted", false, reason, why),
                Condition::new(
                    "Programmed",
                    false,
                    "Invalid",
                    "the Gateway is not accepted",
                ),
            )
        }
        Err(reason @ NotReady::NoAddress(_)) => (
            is_accepted(),
            Condition::new("Programmed", false, "AddressNotAssigned", reason),
        ),
        Ok(_) if !gateway.addresses.is_empty() || has_ready_pod(gateway, objects) => (
            is_accepted(),
            Condition::new("Programmed", true, "Programmed", "clients are told of it"),
        ),
        Ok(_) => (
            is_accepted(),
            Condition::new(
                "Programmed",
                false,
                "Pending",
                "no pod of the waypoint is ready",
            ),
        ),
    };
    let is_programmed = programmed.status;
    let listeners = gateway.listeners.iter().map(|listener| {
        let fault = listener_fault(&listener.name, listener.port, &listener.protocol);
        let accepted = match &fault {
            None => Condition::new("Accepted", true, "Accepted", "is a waypoint's"),
            Some(fault) if &*listener.protocol != "HBONE" => {
                Condition::new("Accepted", false, "UnsupportedProtocol", fault)
            }
            Some(fault) => Condition::new("Accepted", false, "PortUnavailable", fault),
        };
        let resolved = if listener.kinds.is_empty() {
            Condition::new("ResolvedRefs", true, "ResolvedRefs", "there are none")
        } else {
            Condition::new(
                "ResolvedRefs",
                false,
                "InvalidRouteKinds",
                "routes attach to Services, not to a waypoint's listener",
            )
        };
        let programmed = if is_programmed && fault.is_none() {
            Condition::new("Programmed", true, "Programmed", "is served")
        } else if fault.is_some() {
            Condition::new("Programmed", false, "Invalid", "is not accepted")
        } else {
            Condition::new(
                "Programmed",
                false,
                "Pending",
                "the Gateway is not programmed",
            )
        };
        ListenerStatus {
            name: listener.name.to_string(),
            conditions: vec![accepted, programmed, resolved],
        }
    });
    let name = WaypointName {
        namespace: view.namespace.clone(),
        name: gateway.meta.name.clone(),
    };
    let resolved = client_certificate(&name, view).map(|found| match found {
        Ok(_) => Condition::new(
            "ResolvedRefs",
            true,
            "ResolvedRefs",
            "the client certificate is there",
        ),
        Err((reason, message)) => Condition::new("ResolvedRefs", false, reason, message),
    });
    ObjectStatus {
        listeners: listeners.collect(),
        addresses: addresses(gateway, waypoint, objects, view),
        conditions: [accepted, programmed].into_iter().chain(resolved).collect(),
        ..ObjectStatus::default()
    }
}

fn is_accepted() -> Condition {
    Condition::new(
        "Accepted",
        true,
        "Accepted",
        format!("is a waypoint ({WAYPOINT_CLASS})"),
    )
}

fn has_ready_pod(gateway: &Gateway, objects: &NamespaceObjects) -> bool {
    objects.pods.values().any(|pod| {
        pod.meta.label(GATEWAY_NAME) == Some(&*gateway.meta.name)
            && pod.ready
            && !pod.meta.deleting
            && !pod.phase.is_terminal()
    })
}

/// The host name and the addresses of what was generated, or what was asked for.
fn addresses(
    gateway: &Gateway,
    waypoint: &Waypoint,
    objects: &NamespaceObjects,
    view: &View<'_>,
) -> Vec<AddressStatus> {
    if waypoint.address.is_err() {
        return Vec::new();
    }
    if !gateway.addresses.is_empty() {
        let fixed = gateway.addresses.iter().map(|address| match address {
            GatewayAddress::Ip(ip) => AddressStatus::ip(ip),
            GatewayAddress::Hostname(name) => AddressStatus::hostname(name.to_string()),
        });
        return fixed.collect();
    }
    let meta = &gateway.meta;
    let mut found = vec![AddressStatus::hostname(
        view.mesh.hostname(&meta.namespace, &meta.name),
    )];
    let service = generated_service(meta, objects);
    let ips = service.into_iter().flat_map(|service| &service.addresses);
    found.extend(ips.map(AddressStatus::ip));
    found
}
