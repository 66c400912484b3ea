//! Pods, and endpoints without a pod, on the wire.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use adit_shared::model::Locality as NodeLocality;
use adit_shared::proto::workload::{
    Locality, NetworkMode, Port, PortList, TunnelProtocol, Workload, WorkloadStatus, WorkloadType,
};

use super::admission::requires_waypoint;
use super::l7::{Bindable, Waypoints, bind};
use super::mesh::MeshConfig;
use super::peer_authentication::effective;
use super::selectors::SelectorIndex;
use super::services;
use super::wire::ip_bytes;
use crate::model::{
    EndpointSlice, MutualTls, Namespace, NamespaceObjects, PeerAuthentication, Pod, Service,
    TargetPort,
};

/// Everything besides a pod that its workload depends on.
pub(super) struct Surroundings<'a> {
    pub(super) mesh: &'a MeshConfig,
    pub(super) network: &'a str,
    pub(super) namespace: Option<&'a Namespace>,
    pub(super) waypoints: &'a Waypoints,
    pub(super) localities: &'a BTreeMap<Arc<str>, NodeLocality>,
    /// Services of the namespace by their selectors.
    pub(super) services: SelectorIndex<'a, &'a Service>,
    /// Services without a selector that a slice gives to a pod, with the slice.
    pub(super) assigned: HashMap<&'a str, Vec<(&'a Service, &'a EndpointSlice)>>,
    /// `namespace/name` of selector policies, own and root namespace.
    pub(super) policies: SelectorIndex<'a, String>,
    /// PeerAuthentications with selectors, oldest first.
    pub(super) peers: SelectorIndex<'a, &'a PeerAuthentication>,
    /// What PeerAuthentications without selectors say.
    pub(super) inherited: MutualTls,
}

/// `<cluster>//Pod/<namespace>/<name>`.
pub(super) fn pod_uid(pod: &Pod, mesh: &MeshConfig) -> String {
    let meta = &pod.meta;
    format!("{}//Pod/{}/{}", mesh.cluster_id, meta.namespace, meta.name)
}

/// The uid of an endpoint without a pod.
pub(super) fn endpoint_uid(slice: &EndpointSlice, ip: &IpAddr, mesh: &MeshConfig) -> String {
    let meta = &slice.meta;
    format!(
        "{}/discovery.k8s.io/EndpointSlice/{}/{}/{ip}",
        mesh.cluster_id, meta.namespace, meta.name
    )
}

/// Converts a pod. `None`: it has ended, or has no address.
pub(super) fn pod(pod: &Pod, captured: bool, around: &Surroundings<'_>) -> Option<Workload> {
    if pod.phase.is_terminal() || pod.addresses.is_empty() {
        return None;
    }
    let mesh = around.mesh;
    let meta = &pod.meta;
    let native_tunnel = !captured && meta.label("networking.istio.io/tunnel") == Some("http");
    let mut policies: Vec<String> = around.policies.matching(&meta.labels).cloned().collect();
    policies.sort_unstable();
    let peer = around.peers.matching(&meta.labels).next().copied();
    policies.extend(effective(peer, around.inherited).policies(peer, mesh));
    let label = |keys: [&str; 3], otherwise: &str| {
        let found = keys
            .iter()
            .find_map(|key| meta.label(key).filter(|v| !v.is_empty()));
        found.unwrap_or(otherwise).to_owned()
    };
    let binding = bind(Bindable::Workload, meta, around.namespace, around.waypoints);
    let healthy = pod.ready && !meta.deleting;
    let selected = around.services.matching(&meta.labels);
    let assigned = around.assigned.get(&*meta.name).into_iter().flatten();
    let services = selected
        .copied()
        .chain(assigned.map(|(service, _)| *service));
    let services = services.map(|service| &service.meta);
    Some(Workload {
        uid: pod_uid(pod, mesh),
        name: meta.name.to_string(),
        namespace: meta.namespace.to_string(),
        addresses: pod.addresses.iter().map(ip_bytes).collect(),
        network: around.network.into(),
        tunnel_protocol: if captured || native_tunnel {
            TunnelProtocol::Hbone.into()
        } else {
            TunnelProtocol::None.into()
        },
        native_tunnel,
        trust_domain: mesh.wire_trust_domain(),
        service_account: pod.service_account.to_string(),
        node: pod.node.to_string(),
        canonical_name: label(
            [
                "service.istio.io/canonical-name",
                "app.kubernetes.io/name",
                "app",
            ],
            &pod.workload_name,
        ),
        canonical_revision: label(
            [
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ],
            "latest",
        ),
        workload_type: WorkloadType::Pod.into(),
        workload_name: pod.workload_name.to_string(),
        waypoint: binding.and_then(|binding| binding.address(around.waypoints, mesh)),
        services: memberships(pod, around),
        authorization_policies: policies,
        status: if healthy {
            WorkloadStatus::Healthy.into()
        } else {
            WorkloadStatus::Unhealthy.into()
        },
        cluster_id: mesh.cluster_id.to_string(),
        locality: around.localities.get(&pod.node).and_then(locality),
        network_mode: if pod.host_network {
            NetworkMode::HostNetwork.into()
        } else {
            NetworkMode::Standard.into()
        },
        require_waypoint: requires_waypoint(meta, services, around.namespace),
        ..Workload::default()
    })
}

fn locality(of: &NodeLocality) -> Option<Locality> {
    let known = !(of.region.is_empty() && of.zone.is_empty() && of.subzone.is_empty());
    known.then(|| Locality {
        region: of.region.to_string(),
        zone: of.zone.to_string(),
        subzone: of.subzone.to_string(),
    })
}

fn memberships(pod: &Pod, around: &Surroundings<'_>) -> BTreeMap<String, PortList> {
    let selected = around.services.matching(&pod.meta.labels);
    let mut found: BTreeMap<String, PortList> = selected
        .map(|service| {
            let ports = service.ports.iter().filter_map(|port| {
                let number = match &port.target {
                    TargetPort::Number(number) => Some(*number),
                    TargetPort::Name(name) => named_port(pod, name),
                };
                wire_port(port, number)
            });
            let ports = ports.collect();
            (services::key(service, around.mesh), PortList { ports })
        })
        .collect();
    let assigned = around.assigned.get(&*pod.meta.name);
    for (service, slice) in assigned.into_iter().flatten() {
        let ports = &mut found
            .entry(services::key(service, around.mesh))
            .or_default()
            .ports;
        for port in slice_ports(service, slice) {
            if !ports
                .iter()
                .any(|known| known.service_port == port.service_port)
            {
                ports.push(port);
            }
        }
    }
    found
}

fn named_port(pod: &Pod, name: &str) -> Option<u16> {
    let port = pod.named_ports.iter().find(|port| &*port.name == name)?;
    Some(port.number)
}

fn wire_port(port: &crate::model::ServicePort, target: Option<u16>) -> Option<Port> {
    Some(Port {
        service_port: port.number.into(),
        target_port: target?.into(),
        app_protocol: port.protocol.into(),
    })
}

/// The ports of a service at a slice's endpoints: those of the same name.
fn slice_ports<'a>(
    service: &'a Service,
    slice: &'a EndpointSlice,
) -> impl Iterator<Item = Port> + 'a {
    service.ports.iter().filter_map(|port| {
        let at_endpoint = slice.ports.iter().find(|found| found.name == port.name);
        wire_port(port, at_endpoint.map(|found| found.number))
    })
}

/// Slices of a namespace with their services, as far as there is one to belong to.
pub(super) fn slices_with_services(
    of: &NamespaceObjects,
) -> impl Iterator<Item = (&EndpointSlice, &Service)> {
    of.endpoint_slices.values().filter_map(|slice| {
        let service = of.services.get(slice.service.as_ref()?)?;
        (!service.external_name).then_some((&**slice, &**service))
    })
}

/// Which pods a slice gives to services that select none themselves.
pub(super) fn assigned(of: &NamespaceObjects) -> HashMap<&str, Vec<(&Service, &EndpointSlice)>> {
    let mut found: HashMap<&str, Vec<_>> = HashMap::new();
    for (slice, service) in slices_with_services(of) {
        if service.selector.is_empty() {
            for pod in slice
                .endpoints
                .iter()
                .filter_map(|endpoint| endpoint.pod.as_ref())
            {
                found.entry(pod).or_default().push((service, slice));
            }
        }
    }
    found
}

/// Converts the endpoints of `slice` that no pod stands behind. They use a network that
/// is not the mesh's, and are never looked up by address.
pub(super) fn endpoints(
    slice: &EndpointSlice,
    service: &Service,
    around: &Surroundings<'_>,
) -> BTreeMap<String, Workload> {
    let mesh = around.mesh;
    let meta = &slice.meta;
    let ports: Vec<Port> = slice_ports(service, slice).collect();
    let key = services::key(service, mesh);
    let mut found = BTreeMap::new();
    for endpoint in slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.pod.is_none())
    {
        let locality = match around.localities.get(&endpoint.node).and_then(locality) {
            Some(locality) => Some(locality),
            None if endpoint.zone.is_empty() => None,
            None => Some(Locality {
                zone: endpoint.zone.to_string(),
                ..Locality::default()
            }),
        };
        for ip in &endpoint.addresses {
            let uid = endpoint_uid(slice, ip, mesh);
            let workload = Workload {
                uid: uid.clone(),
                name: meta.name.to_string(),
                namespace: meta.namespace.to_string(),
                addresses: vec![ip_bytes(ip)],
                network: around.network.into(),
                tunnel_protocol: TunnelProtocol::None.into(),
                trust_domain: mesh.wire_trust_domain(),
                services: [(
                    key.clone(),
                    PortList {
                        ports: ports.clone(),
                    },
                )]
                .into(),
                status: if endpoint.ready {
                    WorkloadStatus::Healthy.into()
                } else {
                    WorkloadStatus::Unhealthy.into()
                },
                workload_type: WorkloadType::Pod.into(),
                cluster_id: mesh.cluster_id.to_string(),
                locality: locality.clone(),
                network_mode: NetworkMode::HostNetwork.into(),
                ..Workload::default()
            };
            found.entry(uid).or_insert(workload);
        }
    }
    found
}
