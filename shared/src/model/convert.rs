//! From the wire to [`Workload`] and [`Service`]. A resource that is not understood in
//! full is refused as a whole, by name and field; the caller reports it to the control
//! plane and keeps the last good version.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::store::Update;
use super::types::{
    ApplicationTunnel, GatewayAddress, GatewayDestination, Health, IpFamilies, LoadBalancing,
    LoadBalancingMode, Locality, LocalityScope, Membership, NetworkAddress, Port, Service,
    ServiceAddress, ServiceName, TunnelProtocol, WeightedWaypoint, Workload,
};
use crate::identity::{SpiffeId, TrustDomain};
use crate::proto::workload as proto;

/// Why a workload or a service is refused. Not retryable: the configuration is at
/// fault. The text is fit for an xDS NACK.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name:?}: {field}: {reason}")]
pub struct ResourceError {
    /// `workload`, `service` or `address`.
    pub kind: &'static str,
    /// The workload's uid or the service's `namespace/hostname`.
    pub name: String,
    /// Path of the field in the wire message.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The update that the xDS resource `name` of type `Address` carries.
///
/// # Errors
/// [`ResourceError`] when it is empty, when a field cannot be understood, or when it
/// holds another object than its name says.
pub fn address_from_resource(
    name: &str,
    address: &proto::Address,
) -> Result<Update, ResourceError> {
    let misnamed = |kind, own: &str| ResourceError {
        kind,
        name: name.into(),
        field: "name".into(),
        reason: format!("the resource holds {own:?}"),
    };
    match &address.r#type {
        Some(proto::address::Type::Workload(wire)) => {
            let workload = Workload::try_from(wire)?;
            if *workload.uid != *name {
                return Err(misnamed("workload", &workload.uid));
            }
            Ok(Update::UpsertWorkload(workload))
        }
        Some(proto::address::Type::Service(wire)) => {
            let service = Service::try_from(wire)?;
            let own = service.key.to_string();
            if own != name {
                return Err(misnamed("service", &own));
            }
            Ok(Update::UpsertService(service))
        }
        None => Err(ResourceError {
            kind: "address",
            name: name.into(),
            field: "type".into(),
            reason: "neither a workload nor a service".into(),
        }),
    }
}

impl TryFrom<&proto::Workload> for Workload {
    type Error = ResourceError;

    fn try_from(wire: &proto::Workload) -> Result<Self, ResourceError> {
        workload(wire).map_err(|Invalid { field, reason }| ResourceError {
            kind: "workload",
            name: wire.uid.clone(),
            field,
            reason,
        })
    }
}

impl TryFrom<&proto::Service> for Service {
    type Error = ResourceError;

    fn try_from(wire: &proto::Service) -> Result<Self, ResourceError> {
        service(wire).map_err(|Invalid { field, reason }| ResourceError {
            kind: "service",
            name: format!("{}/{}", wire.namespace, wire.hostname),
            field,
            reason,
        })
    }
}

struct Invalid {
    field: String,
    reason: String,
}

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Invalid {
    Invalid {
        field: field.into(),
        reason: reason.into(),
    }
}

fn workload(wire: &proto::Workload) -> Result<Workload, Invalid> {
    required("uid", &wire.uid)?;
    required("namespace", &wire.namespace)?;
    let or =
        |text: &str, default: &str| Arc::<str>::from(if text.is_empty() { default } else { text });
    let trust_domain = TrustDomain::new(&or(&wire.trust_domain, TrustDomain::DEFAULT))
        .map_err(|error| invalid("trust_domain", error.to_string()))?;
    let service_account = or(&wire.service_account, "default");
    let identity = SpiffeId::new(trust_domain, &wire.namespace, &service_account)
        .map_err(|error| invalid("service_account", error.to_string()))?;
    let mut addresses = Vec::with_capacity(wire.addresses.len());
    for (i, bytes) in wire.addresses.iter().enumerate() {
        addresses.push(ip(&format!("addresses[{i}]"), bytes)?);
    }
    let mut services = Vec::with_capacity(wire.services.len());
    for (name, list) in &wire.services {
        let field = format!("services[{name:?}]");
        let service = service_name(&field, name)?;
        let ports = ports(&field, &list.ports)?.into();
        services.push(Membership { service, ports });
    }
    services.sort_unstable_by(|a, b| a.service.cmp(&b.service));
    Ok(Workload {
        uid: wire.uid.as_str().into(),
        name: wire.name.as_str().into(),
        namespace: wire.namespace.as_str().into(),
        addresses,
        hostname: wire.hostname.as_str().into(),
        network: wire.network.as_str().into(),
        tunnel_protocol: match proto::TunnelProtocol::try_from(wire.tunnel_protocol) {
            Ok(proto::TunnelProtocol::None) => TunnelProtocol::None,
            Ok(proto::TunnelProtocol::Hbone) => TunnelProtocol::Hbone,
            Ok(proto::TunnelProtocol::LegacyIstioMtls) => {
                return Err(invalid(
                    "tunnel_protocol",
                    "LEGACY_ISTIO_MTLS is not supported; send NONE or HBONE",
                ));
            }
            Err(_) => return Err(unknown("tunnel_protocol", wire.tunnel_protocol)),
        },
        identity,
        native_tunnel: wire.native_tunnel,
        application_tunnel: match &wire.application_tunnel {
            Some(tunnel) => Some(application_tunnel(tunnel)?),
            None => None,
        },
        waypoint: gateway_option("waypoint", wire.waypoint.as_ref())?,
        network_gateway: gateway_option("network_gateway", wire.network_gateway.as_ref())?,
        node: wire.node.as_str().into(),
        canonical_name: wire.canonical_name.as_str().into(),
        canonical_revision: wire.canonical_revision.as_str().into(),
        workload_type: match proto::WorkloadType::try_from(wire.workload_type) {
            Ok(proto::WorkloadType::Deployment) => "deployment",
            Ok(proto::WorkloadType::Cronjob) => "cronjob",
            Ok(proto::WorkloadType::Pod) => "pod",
            Ok(proto::WorkloadType::Job) => "job",
            Err(_) => return Err(unknown("workload_type", wire.workload_type)),
        },
        workload_name: wire.workload_name.as_str().into(),
        cluster_id: or(&wire.cluster_id, "Kubernetes"),
        locality: match &wire.locality {
            Some(locality) => Locality {
                region: locality.region.as_str().into(),
                zone: locality.zone.as_str().into(),
                subzone: locality.subzone.as_str().into(),
            },
            None => Locality::default(),
        },
        host_network: match proto::NetworkMode::try_from(wire.network_mode) {
            Ok(proto::NetworkMode::Standard) => false,
            Ok(proto::NetworkMode::HostNetwork) => true,
            Err(_) => return Err(unknown("network_mode", wire.network_mode)),
        },
        health: match proto::WorkloadStatus::try_from(wire.status) {
            Ok(proto::WorkloadStatus::Healthy) => Health::Healthy,
            Ok(proto::WorkloadStatus::Unhealthy) => Health::Unhealthy,
            Err(_) => return Err(unknown("status", wire.status)),
        },
        capacity: wire.capacity.unwrap_or(1),
        authorization_policies: wire
            .authorization_policies
            .iter()
            .map(|key| key.as_str().into())
            .collect(),
        served_by: served_by(&wire.served_by)?,
        require_waypoint: wire.require_waypoint,
        callers_matter: wire.callers_matter,
        services,
    })
}

fn served_by(wire: &[String]) -> Result<Arc<[SpiffeId]>, Invalid> {
    let each = wire.iter().enumerate();
    each.map(|(i, text)| {
        let id = text.parse::<SpiffeId>();
        id.map_err(|error| invalid(format!("served_by[{i}]"), error.to_string()))
    })
    .collect()
}

fn application_tunnel(wire: &proto::ApplicationTunnel) -> Result<ApplicationTunnel, Invalid> {
    use proto::application_tunnel::Protocol;
    let proxy_protocol = match Protocol::try_from(wire.protocol) {
        Ok(Protocol::None) => false,
        Ok(Protocol::Proxy) => true,
        Err(_) => return Err(unknown("application_tunnel.protocol", wire.protocol)),
    };
    let port = match wire.port {
        0 => None,
        other => Some(port("application_tunnel.port", other)?),
    };
    Ok(ApplicationTunnel {
        proxy_protocol,
        port,
    })
}

fn service(wire: &proto::Service) -> Result<Service, Invalid> {
    required("namespace", &wire.namespace)?;
    required("hostname", &wire.hostname)?;
    let mut addresses = Vec::with_capacity(wire.addresses.len());
    for (i, address) in wire.addresses.iter().enumerate() {
        addresses.push(service_address(&format!("addresses[{i}]"), address)?);
    }
    let mut weighted_waypoints = Vec::with_capacity(wire.weighted_waypoints.len());
    for (i, weighted) in wire.weighted_waypoints.iter().enumerate() {
        let field = format!("weighted_waypoints[{i}].destination");
        weighted_waypoints.push(WeightedWaypoint {
            destination: gateway_option(&field, weighted.destination.as_ref())?
                .ok_or_else(|| invalid(field, "is missing"))?,
            weight: weighted.weight,
        });
    }
    Ok(Service {
        key: ServiceName {
            namespace: wire.namespace.as_str().into(),
            hostname: wire.hostname.as_str().into(),
        },
        name: wire.name.as_str().into(),
        addresses,
        ports: ports("", &wire.ports)?,
        subject_alt_names: wire
            .subject_alt_names
            .iter()
            .map(|name| name.as_str().into())
            .collect(),
        waypoint: gateway_option("waypoint", wire.waypoint.as_ref())?,
        weighted_waypoints,
        load_balancing: load_balancing(wire.load_balancing.as_ref())?,
        ip_families: match proto::IpFamilies::try_from(wire.ip_families) {
            Ok(proto::IpFamilies::Automatic) => IpFamilies::Automatic,
            Ok(proto::IpFamilies::Ipv4Only) => IpFamilies::V4,
            Ok(proto::IpFamilies::Ipv6Only) => IpFamilies::V6,
            Ok(proto::IpFamilies::Dual) => IpFamilies::Dual,
            Err(_) => return Err(unknown("ip_families", wire.ip_families)),
        },
        canonical: wire.canonical,
        // Istio: an unknown visibility is PUBLIC.
        namespace_private: wire.visibility == proto::Visibility::Namespace as i32,
    })
}

fn load_balancing(wire: Option<&proto::LoadBalancing>) -> Result<LoadBalancing, Invalid> {
    use proto::load_balancing::{HealthPolicy, Mode, Scope};
    let Some(wire) = wire else {
        return Ok(LoadBalancing::default());
    };
    let mut scopes = Vec::with_capacity(wire.routing_preference.len());
    for (i, &scope) in wire.routing_preference.iter().enumerate() {
        scopes.push(match Scope::try_from(scope) {
            Ok(Scope::Region) => LocalityScope::Region,
            Ok(Scope::Zone) => LocalityScope::Zone,
            Ok(Scope::Subzone) => LocalityScope::Subzone,
            Ok(Scope::Node) => LocalityScope::Node,
            Ok(Scope::Cluster) => LocalityScope::Cluster,
            Ok(Scope::Network) => LocalityScope::Network,
            Ok(Scope::UnspecifiedScope) | Err(_) => {
                let field = format!("load_balancing.routing_preference[{i}]");
                return Err(unknown(&field, scope));
            }
        });
    }
    Ok(LoadBalancing {
        scopes,
        mode: match Mode::try_from(wire.mode) {
            Ok(Mode::UnspecifiedMode) => LoadBalancingMode::Standard,
            Ok(Mode::Strict) => LoadBalancingMode::Strict,
            Ok(Mode::Failover) => LoadBalancingMode::Failover,
            Ok(Mode::Passthrough) => LoadBalancingMode::Passthrough,
            Err(_) => return Err(unknown("load_balancing.mode", wire.mode)),
        },
        allow_unhealthy: match HealthPolicy::try_from(wire.health_policy) {
            Ok(HealthPolicy::OnlyHealthy) => false,
            Ok(HealthPolicy::AllowAll) => true,
            Err(_) => return Err(unknown("load_balancing.health_policy", wire.health_policy)),
        },
    })
}

fn service_address(field: &str, wire: &proto::NetworkAddress) -> Result<ServiceAddress, Invalid> {
    let address = ip(&format!("{field}.address"), &wire.address)?;
    let bits: u32 = if address.is_ipv4() { 32 } else { 128 };
    // A length beside an IPv4-mapped address counts from the IPv6 address's first bit.
    let mapped = address.is_ipv4() && wire.address.len() == 16;
    let length = match wire.length {
        None => Some(bits),
        Some(length) if mapped => length.checked_sub(96),
        Some(length) => Some(length),
    };
    let block = length
        .and_then(|length| u8::try_from(length).ok())
        .and_then(|length| IpNet::new(address, length).ok())
        .ok_or_else(|| {
            let length = wire.length.unwrap_or_default();
            invalid(
                format!("{field}.length"),
                format!("{length} is no prefix length of {address}"),
            )
        })?;
    Ok(ServiceAddress {
        network: wire.network.as_str().into(),
        block: block.trunc(),
    })
}

fn gateway_option(
    field: &str,
    wire: Option<&proto::GatewayAddress>,
) -> Result<Option<Arc<GatewayAddress>>, Invalid> {
    use proto::gateway_address::Destination;
    let Some(wire) = wire else {
        return Ok(None);
    };
    let destination = match &wire.destination {
        Some(Destination::Hostname(name)) => {
            required(&format!("{field}.hostname.namespace"), &name.namespace)?;
            required(&format!("{field}.hostname.hostname"), &name.hostname)?;
            GatewayDestination::Hostname(ServiceName {
                namespace: name.namespace.as_str().into(),
                hostname: name.hostname.as_str().into(),
            })
        }
        Some(Destination::Address(address)) => GatewayDestination::Address(NetworkAddress {
            network: address.network.as_str().into(),
            address: ip(&format!("{field}.address.address"), &address.address)?,
        }),
        None => return Err(invalid(field, "has no destination")),
    };
    Ok(Some(Arc::new(GatewayAddress {
        destination,
        hbone_port: port(&format!("{field}.hbone_mtls_port"), wire.hbone_mtls_port)?,
    })))
}

fn ports(field: &str, wire: &[proto::Port]) -> Result<Vec<Port>, Invalid> {
    let field = |i: usize, name: &str| match field {
        "" => format!("ports[{i}].{name}"),
        field => format!("{field}.ports[{i}].{name}"),
    };
    wire.iter()
        .enumerate()
        .map(|(i, wire)| {
            Ok(Port {
                service_port: port(&field(i, "service_port"), wire.service_port)?,
                target_port: match wire.target_port {
                    0 => None,
                    other => Some(port(&field(i, "target_port"), other)?),
                },
            })
        })
        .collect()
}

fn service_name(field: &str, name: &str) -> Result<ServiceName, Invalid> {
    match name.split_once('/') {
        Some((namespace, hostname)) if !namespace.is_empty() && !hostname.is_empty() => {
            Ok(ServiceName {
                namespace: namespace.into(),
                hostname: hostname.into(),
            })
        }
        _ => Err(invalid(field, "the key is not namespace/hostname")),
    }
}

/// An address; an IPv4-mapped one as IPv4, because that is how sockets are compared.
fn ip(field: &str, bytes: &[u8]) -> Result<IpAddr, Invalid> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ok(bytes.into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(bytes) => Ok(IpAddr::from(bytes).to_canonical()),
        Err(_) => Err(invalid(
            field,
            format!("an address has 4 or 16 bytes, this one {}", bytes.len()),
        )),
    }
}

fn port(field: &str, wire: u32) -> Result<u16, Invalid> {
    match u16::try_from(wire) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(invalid(field, format!("{wire} is not a port: 1 to 65535"))),
    }
}

fn required(field: &str, text: &str) -> Result<(), Invalid> {
    if text.is_empty() {
        return Err(invalid(field, "is empty"));
    }
    Ok(())
}

fn unknown(field: &str, value: i32) -> Invalid {
    invalid(field, format!("unknown value {value}"))
}
