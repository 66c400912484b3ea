//! The waypoints of the mesh: which Gateways are, what they take, where they are.
//!
//! A waypoint is a Gateway of the class `istio-waypoint` (or of another class with the
//! same controller) with one listener: `mesh`, port 15008, `HBONE`. Its address is that
//! of the Service which was generated for it, or what `spec.addresses` says.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use adit_shared::proto::waypoint::waypoint::TrafficType;
use adit_shared::proto::workload::{
    GatewayAddress as WireAddress, NamespacedHostname, NetworkAddress, gateway_address,
};

use crate::compile::mesh::MeshConfig;
use crate::compile::wire::ip_bytes;
use crate::model::{
    AllowedNamespaces, Gateway, GatewayAddress, Labels, Meta, NamespaceObjects, Objects, Pod,
    Service,
};

/// The class that needs no GatewayClass object.
pub const WAYPOINT_CLASS: &str = "istio-waypoint";
/// The controller of waypoints (`GatewayClass.spec.controllerName`).
pub const CONTROLLER: &str = "istio.io/mesh-controller";
/// Which traffic a waypoint takes; on Gateways and their classes.
pub const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
/// Names the Gateway on everything that is generated for it.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Who manages a generated object.
pub const MANAGED: &str = "gateway.istio.io/managed";
/// Where waypoints listen.
const HBONE_PORT: u16 = 15008;

/// Namespace and name of a waypoint's Gateway.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaypointName {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl fmt::Display for WaypointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A waypoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Waypoint {
    /// Which traffic it takes.
    pub traffic: TrafficType,
    /// Which namespaces may bind to it.
    pub admits: AllowedNamespaces,
    /// Where it is, or why nothing can be sent there.
    pub address: Result<WireAddress, NotReady>,
}

impl Waypoint {
    /// Whether it takes traffic to services.
    pub fn takes_services(&self) -> bool {
        matches!(self.traffic, TrafficType::Service | TrafficType::All)
    }

    /// Whether it takes traffic to workloads.
    pub fn takes_workloads(&self) -> bool {
        matches!(self.traffic, TrafficType::Workload | TrafficType::All)
    }

    /// Whether objects of a namespace with these labels may bind to it.
    pub fn admits(&self, own: &str, namespace: &str, labels: Option<&Labels>) -> bool {
        match &self.admits {
            AllowedNamespaces::All => true,
            AllowedNamespaces::Same => own == namespace,
            AllowedNamespaces::Selector(selector) => {
                selector.selects(labels.unwrap_or(&Labels::new()))
            }
        }
    }
}

/// Why nothing can be sent to a waypoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// The Gateway is not as a waypoint has to be.
    #[error("{0}")]
    NotAccepted(String),
    /// Nobody has provided it yet.
    #[error("it has no address yet: there is no Service {0:?} with its label")]
    NoAddress(Arc<str>),
}

/// All waypoints.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Waypoints {
    by_name: BTreeMap<WaypointName, Waypoint>,
}

impl Waypoints {
    /// Collects them.
    pub fn of(objects: &Objects, network: &str, mesh: &MeshConfig) -> Self {
        let classes = Classes::of(objects);
        let mut by_name = BTreeMap::new();
        for (namespace, of) in &objects.namespaces {
            for gateway in of.gateways.values() {
                if classes.has(gateway) && mesh.owns(&gateway.meta) {
                    let name = WaypointName {
                        namespace: namespace.clone(),
                        name: gateway.meta.name.clone(),
                    };
                    by_name.insert(name, waypoint(gateway, of, &classes, network, mesh));
                }
            }
        }
        Self { by_name }
    }

    /// The waypoint of that name.
    pub fn get(&self, name: &WaypointName) -> Option<&Waypoint> {
        self.by_name.get(name)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// All of them by name.
    pub fn iter(&self) -> impl Iterator<Item = (&WaypointName, &Waypoint)> {
        self.by_name.iter()
    }
}

/// The classes whose Gateways are waypoints.
#[derive(Debug)]
pub(super) struct Classes<'a> {
    objects: &'a Objects,
    names: BTreeSet<&'a str>,
}

impl<'a> Classes<'a> {
    pub(super) fn of(objects: &'a Objects) -> Self {
        let known = objects.gateway_classes.values();
        let mut names: BTreeSet<&str> = known
            .filter(|class| *class.controller == *CONTROLLER)
            .map(|class| &*class.meta.name)
            .collect();
        if !objects.gateway_classes.contains_key(WAYPOINT_CLASS) {
            names.insert(WAYPOINT_CLASS);
        }
        Self { objects, names }
    }

    pub(super) fn has(&self, gateway: &Gateway) -> bool {
        self.names.contains(&*gateway.class)
    }

    fn label(&self, gateway: &Gateway, key: &str) -> Option<&'a str> {
        self.objects
            .gateway_classes
            .get(&gateway.class)?
            .meta
            .label(key)
    }
}

fn waypoint(
    gateway: &Gateway,
    of: &NamespaceObjects,
    classes: &Classes<'_>,
    network: &str,
    mesh: &MeshConfig,
) -> Waypoint {
    let traffic = gateway
        .meta
        .label(WAYPOINT_FOR)
        .or_else(|| classes.label(gateway, WAYPOINT_FOR));
    let traffic = traffic_type(traffic);
    let admits = gateway
        .listeners
        .first()
        .map_or(AllowedNamespaces::Same, |listener| {
            listener.namespaces.clone()
        });
    let address = accept(gateway)
        .and(traffic.clone().map(|_| ()))
        .map_err(NotReady::NotAccepted)
        .and_then(|()| address(gateway, of, network, mesh));
    Waypoint {
        // What cannot be read might be either, and is refused.
        traffic: traffic.unwrap_or(TrafficType::All),
        admits,
        address,
    }
}

/// The value of `istio.io/waypoint-for`.
fn traffic_type(label: Option<&str>) -> Result<TrafficType, String> {
    match label {
        None | Some("" | "service") => Ok(TrafficType::Service),
        Some("workload") => Ok(TrafficType::Workload),
        Some("all") => Ok(TrafficType::All),
        Some("none") => Ok(TrafficType::None),
        Some(other) => Err(format!(
            "the label {WAYPOINT_FOR} is {other:?}, not service, workload, all or none"
        )),
    }
}

/// Whether a Gateway is as a waypoint has to be.
fn accept(gateway: &Gateway) -> Result<(), String> {
    if let Some(error) = gateway.errors.first() {
        return Err(error.to_string());
    }
    if &*gateway.meta.name == "none" {
        return Err("\"none\" is the label's word for no waypoint, and no name of one".into());
    }
    match gateway.listeners.as_slice() {
        [listener] => match listener_fault(&listener.name, listener.port, &listener.protocol) {
            None => Ok(()),
            Some(fault) => Err(fault),
        },
        listeners => Err(format!(
            "a waypoint has one listener, mesh on port {HBONE_PORT} with protocol HBONE; there are {}",
            listeners.len()
        )),
    }
}

/// What is wrong with a listener of a waypoint.
pub(super) fn listener_fault(name: &str, port: u16, protocol: &str) -> Option<String> {
    (name != "mesh" || port != HBONE_PORT || protocol != "HBONE").then(|| {
        format!(
            "the listener of a waypoint is mesh on port {HBONE_PORT} with protocol HBONE, not {name} on port {port} with protocol {protocol}"
        )
    })
}

/// Where to send. A host name is preferred to an address (Istio).
fn address(
    gateway: &Gateway,
    of: &NamespaceObjects,
    network: &str,
    mesh: &MeshConfig,
) -> Result<WireAddress, NotReady> {
    use gateway_address::Destination;
    let meta = &gateway.meta;
    let hostname = |hostname: String| {
        Destination::Hostname(NamespacedHostname {
            namespace: meta.namespace.to_string(),
            hostname,
        })
    };
    let fixed = gateway.addresses.iter().find_map(|address| match address {
        GatewayAddress::Hostname(name) => Some(hostname(name.to_string())),
        GatewayAddress::Ip(_) => None,
    });
    let fixed = fixed.or_else(|| {
        gateway.addresses.iter().find_map(|address| match address {
            GatewayAddress::Ip(ip) => Some(Destination::Address(NetworkAddress {
                network: network.into(),
                address: ip_bytes(ip),
                length: None,
            })),
            GatewayAddress::Hostname(_) => None,
        })
    });
    let destination = match fixed {
        Some(destination) => destination,
        None => match generated_service(meta, of) {
            Some(_) => hostname(mesh.hostname(&meta.namespace, &meta.name)),
            None => return Err(NotReady::NoAddress(meta.name.clone())),
        },
    };
    Ok(WireAddress {
        destination: Some(destination),
        hbone_mtls_port: HBONE_PORT.into(),
    })
}

/// The Service that was generated for a Gateway. One of the same name that does not say
/// whose it is, is somebody else's.
pub(super) fn generated_service<'a>(
    gateway: &Meta,
    of: &'a NamespaceObjects,
) -> Option<&'a Service> {
    let service = of.services.get(&gateway.name)?;
    let says =
        |labels: &Labels| labels.get(GATEWAY_NAME).map(String::as_str) == Some(&*gateway.name);
    let is_its = says(&service.meta.labels) || says(&service.selector);
    (is_its && !service.external_name).then_some(service)
}

/// An address that leads nowhere: whoever sends there fails.
pub(super) fn nowhere(name: &WaypointName) -> WireAddress {
    WireAddress {
        destination: Some(gateway_address::Destination::Hostname(NamespacedHostname {
            namespace: name.namespace.to_string(),
            // RFC 6761: no name under it ever exists.
            hostname: format!("{}.{}.waypoint.invalid", name.name, name.namespace),
        })),
        hbone_mtls_port: HBONE_PORT.into(),
    }
}

/// Whether an object was generated for a waypoint or an east-west gateway: such a one
/// has no waypoint itself.
pub(super) fn is_generated(meta: &Meta) -> bool {
    matches!(
        meta.label(MANAGED),
        Some("istio.io-mesh-controller" | "istio.io-eastwest-controller")
    )
}

/// The Gateway that a pod belongs to, by its label.
pub fn gateway_of_pod(pod: &Pod) -> Option<&str> {
    pod.meta.label(GATEWAY_NAME)
}
