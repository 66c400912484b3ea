//! What the `targetRefs` of a policy lead to, waypoint by waypoint.
//!
//! As Istio has it: a Gateway that is a waypoint and a Service, both of the policy's own
//! namespace, and from the root namespace the class of waypoints.

use std::collections::BTreeMap;

use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::target::Kind as Wire;

use super::services::{reference, serving};
use super::view::View;
use super::waypoints::{WAYPOINT_CLASS, WaypointName};
use crate::model::{Meta, TargetRef};
use crate::status::{Condition, ObjectStatus, ParentStatus, RefStatus};

/// The condition of what waypoints enforce.
pub(in crate::compile) const WAYPOINT_ACCEPTED: &str = "WaypointAccepted";

/// Where a policy goes.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    /// The waypoints that get it, with what it is for there; nothing: everything that
    /// passes.
    pub(super) waypoints: BTreeMap<WaypointName, Vec<wire::Target>>,
    /// What came of each reference.
    outcomes: Vec<(RefStatus, Result<(), Fault>)>,
}

/// Reason and message.
type Fault = (&'static str, String);

impl Resolved {
    /// Adds a target at a waypoint; `None`: everything there.
    pub(super) fn add(&mut self, waypoint: &WaypointName, target: Option<Wire>) {
        match target {
            None => {
                self.waypoints.insert(waypoint.clone(), Vec::new());
            }
            Some(kind) => {
                let fresh = !self.waypoints.contains_key(waypoint);
                let targets = self.waypoints.entry(waypoint.clone()).or_default();
                let target = wire::Target { kind: Some(kind) };
                if (fresh || !targets.is_empty()) && !targets.contains(&target) {
                    targets.push(target);
                }
            }
        }
    }

    /// What the policy's owner is told. `invalid`: why it denies.
    pub(super) fn status(self, invalid: Option<&str>) -> ObjectStatus {
        let bad: Vec<_> = self
            .outcomes
            .iter()
            .filter_map(|(_, outcome)| outcome.as_ref().err())
            .collect();
        let overall = match (invalid, bad.first()) {
            (Some(invalid), _) => Condition::new(
                WAYPOINT_ACCEPTED,
                false,
                "Invalid",
                format!("the policy is invalid and fails closed: {invalid}"),
            ),
            (None, None) if self.waypoints.is_empty() && self.outcomes.is_empty() => {
                Condition::new(
                    WAYPOINT_ACCEPTED,
                    false,
                    "AncestorNotBound",
                    "no waypoint serves what it covers",
                )
            }
            (None, None) => Condition::new(
                WAYPOINT_ACCEPTED,
                true,
                "Accepted",
                "bound to what it covers",
            ),
            (None, Some(_)) if bad.len() < self.outcomes.len() => {
                let messages: Vec<_> = bad.iter().map(|(_, message)| message.as_str()).collect();
                Condition::new(
                    WAYPOINT_ACCEPTED,
                    true,
                    "PartiallyInvalid",
                    messages.join("; "),
                )
            }
            (None, Some((reason, _))) => {
                let messages: Vec<_> = bad.iter().map(|(_, message)| message.as_str()).collect();
                Condition::new(WAYPOINT_ACCEPTED, false, reason, messages.join("; "))
            }
        };
        let ancestors = self.outcomes.into_iter().map(|(reference, outcome)| {
            let condition = match outcome {
                Ok(()) => Condition::new(WAYPOINT_ACCEPTED, true, "Accepted", "is in force"),
                Err((reason, message)) => Condition::new(WAYPOINT_ACCEPTED, false, reason, message),
            };
            ParentStatus {
                reference,
                conditions: vec![condition],
            }
        });
        ObjectStatus {
            conditions: vec![overall],
            ancestors: ancestors.collect(),
            ..ObjectStatus::default()
        }
    }
}

/// Resolves the targets of the object `meta`, which is of the namespace that `view` is of.
/// Targets that could not be read are none: then it is for all services of its namespace.
pub(super) fn resolve(meta: &Meta, targets: &[TargetRef], view: &View<'_>) -> Resolved {
    let mut resolved = Resolved::default();
    if targets.is_empty() {
        every_service(view, &mut resolved);
    }
    for target in targets {
        let outcome = resolve_one(meta, target, view, &mut resolved);
        let status = RefStatus {
            group: target.group.clone(),
            kind: target.kind.clone(),
            namespace: target.namespace.clone(),
            name: target.name.clone(),
            ..RefStatus::default()
        };
        resolved.outcomes.push((status, outcome));
    }
    resolved
}

/// For every service of the namespace that a waypoint serves.
pub(super) fn every_service(view: &View<'_>, resolved: &mut Resolved) {
    let of = view.namespace(view.namespace);
    let services = of.into_iter().flat_map(|of| of.services.values());
    for service in services.filter(|service| !service.external_name) {
        for waypoint in serving(service, view) {
            let meta = &service.meta;
            let target = Wire::Service(reference(&meta.namespace, &meta.name, view.mesh));
            resolved.add(&waypoint, Some(target));
        }
    }
}

fn resolve_one(
    meta: &Meta,
    target: &TargetRef,
    view: &View<'_>,
    resolved: &mut Resolved,
) -> Result<(), Fault> {
    let name = &*target.name;
    let foreign = target
        .namespace
        .as_deref()
        .is_some_and(|of| !of.is_empty() && of != &*meta.namespace);
    if foreign {
        let message = format!("{} {name:?} is not of this namespace", target.kind);
        return Err(("TargetNotFound", message));
    }
    match (target.group.as_str(), target.kind.as_str()) {
        ("gateway.networking.k8s.io", "Gateway") => gateway(name, view, resolved),
        ("gateway.networking.k8s.io", "GatewayClass") => class(meta, name, view, resolved),
        ("" | "core", "Service") => {
            let found = view.service(&meta.namespace, name);
            let found = found.ok_or_else(|| {
                let message = format!("there is no Service {name:?}");
                ("TargetNotFound", message)
            })?;
            let waypoints = serving(found, view);
            if waypoints.is_empty() {
                let message = format!("no waypoint serves Service {name:?}");
                return Err(("AncestorNotBound", message));
            }
            for waypoint in waypoints {
                let target = reference(&meta.namespace, name, view.mesh);
                resolved.add(&waypoint, Some(Wire::Service(target)));
            }
            Ok(())
        }
        (group, kind) => Err((
            "TargetNotFound",
            format!("{group}/{kind} is not Gateway, GatewayClass or Service"),
        )),
    }
}

fn gateway(name: &str, view: &View<'_>, resolved: &mut Resolved) -> Result<(), Fault> {
    let waypoint = WaypointName {
        namespace: view.namespace.clone(),
        name: name.into(),
    };
    if view.waypoints.get(&waypoint).is_some() {
        resolved.add(&waypoint, Some(Wire::Gateway(waypoint.to_string())));
        return Ok(());
    }
    let of = view.namespace(view.namespace);
    Err(match of.is_some_and(|of| of.gateways.contains_key(name)) {
        true => (
            "AncestorNotBound",
            format!("Gateway {name:?} is not a waypoint"),
        ),
        false => ("TargetNotFound", format!("there is no Gateway {name:?}")),
    })
}

fn class(meta: &Meta, name: &str, view: &View<'_>, resolved: &mut Resolved) -> Result<(), Fault> {
    if meta.namespace != view.mesh.root_namespace {
        let root = &view.mesh.root_namespace;
        let message = format!("a GatewayClass can be targeted from the namespace {root:?} only");
        return Err(("Invalid", message));
    }
    let mut found = name == WAYPOINT_CLASS;
    for (waypoint, _) in view.waypoints.iter() {
        let gateways = view.namespace(&waypoint.namespace).map(|of| &of.gateways);
        let gateway = gateways.and_then(|gateways| gateways.get(&waypoint.name));
        if gateway.is_some_and(|gateway| *gateway.class == *name) {
            found = true;
            resolved.add(waypoint, None);
        }
    }
    found.then_some(()).ok_or_else(|| {
        let message = format!("no waypoint is of the GatewayClass {name:?}");
        ("TargetNotFound", message)
    })
}
