//! Services on the wire.

use adit_shared::proto::workload::load_balancing::{HealthPolicy, Mode, Scope};
use adit_shared::proto::workload::{LoadBalancing, NetworkAddress, Port, Service as WireService};

use super::l7::{Bindable, Waypoints, bind, ingress_uses};
use super::mesh::MeshConfig;
use super::wire::ip_bytes;
use crate::model::{Namespace, Service, TargetPort, TrafficDistribution};

/// The annotation behind `spec.trafficDistribution`, on services and namespaces.
pub const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// `namespace/hostname`, the name of the resource.
pub(super) fn key(service: &Service, mesh: &MeshConfig) -> String {
    let meta = &service.meta;
    format!(
        "{}/{}",
        meta.namespace,
        mesh.hostname(&meta.namespace, &meta.name)
    )
}

/// Converts a service that is no ExternalName.
pub(super) fn convert(
    service: &Service,
    namespace: Option<&Namespace>,
    network: &str,
    waypoints: &Waypoints,
    mesh: &MeshConfig,
) -> WireService {
    let meta = &service.meta;
    let binding = bind(Bindable::Service, meta, namespace, waypoints);
    WireService {
        name: meta.name.to_string(),
        namespace: meta.namespace.to_string(),
        hostname: mesh.hostname(&meta.namespace, &meta.name),
        addresses: service
            .addresses
            .iter()
            .map(|ip| NetworkAddress {
                network: network.into(),
                address: ip_bytes(ip),
                length: None,
            })
            .collect(),
        ports: service
            .ports
            .iter()
            .map(|port| Port {
                service_port: port.number.into(),
                // A named port is looked up at each endpoint.
                target_port: match port.target {
                    TargetPort::Number(number) => number.into(),
                    TargetPort::Name(_) => 0,
                },
                app_protocol: port.protocol.into(),
            })
            .collect(),
        load_balancing: load_balancing(service, namespace),
        ip_families: service.families.into(),
        canonical: true,
        weighted_waypoints: binding
            .as_ref()
            .map_or_else(Vec::new, |binding| binding.weighted(waypoints)),
        waypoint: binding.and_then(|binding| binding.address(waypoints, mesh)),
        ingress_use_waypoint: ingress_uses(meta, namespace),
        ..WireService::default()
    }
}

/// `internalTrafficPolicy: Local` has precedence; then the field, the service's
/// annotation, the namespace's.
fn load_balancing(service: &Service, namespace: Option<&Namespace>) -> Option<LoadBalancing> {
    let annotated = || {
        let own = service.meta.annotation(TRAFFIC_DISTRIBUTION);
        own.or_else(|| namespace.and_then(|of| of.meta.annotation(TRAFFIC_DISTRIBUTION)))
            .map(TrafficDistribution::parse)
    };
    let distribution = service
        .distribution
        .or_else(annotated)
        .unwrap_or(TrafficDistribution::None);
    let zones = [Scope::Network, Scope::Region, Scope::Zone];
    let (mode, scopes) = match distribution {
        _ if service.local_only => (Mode::Strict, vec![Scope::Node]),
        TrafficDistribution::PreferSameZone => (Mode::Failover, zones.to_vec()),
        TrafficDistribution::PreferSameNode => (
            Mode::Failover,
            zones
                .into_iter()
                .chain([Scope::Subzone, Scope::Node])
                .collect(),
        ),
        TrafficDistribution::None => (Mode::UnspecifiedMode, Vec::new()),
    };
    if mode == Mode::UnspecifiedMode && !service.publish_not_ready {
        return None;
    }
    let health = if service.publish_not_ready {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    Some(LoadBalancing {
        routing_preference: scopes.into_iter().map(i32::from).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}
