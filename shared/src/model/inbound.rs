//! What a CONNECT that arrives at a workload asks for.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::balance::target_port;
use super::snapshot::Snapshot;
use super::types::{GatewayAddress, GatewayDestination, Service, Workload};

/// Where an accepted CONNECT leads, at the workload's own address.
#[derive(Debug, Clone)]
pub struct Target {
    /// The workload's port that was meant, which policies are about.
    pub port: u16,
    /// The port to connect to: another one where the app sits behind a tunnel.
    pub upstream_port: u16,
    /// The app wants a PROXY protocol header.
    pub proxy_protocol: bool,
    /// The service that was named.
    pub service: Option<Arc<Service>>,
}

/// Why a CONNECT is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// Neither `address:port` nor `host:port`.
    #[error("authority {0:?} is neither address:port nor host:port")]
    Malformed(String),
    /// The address of somebody else.
    #[error("authority {requested} is not an address of this workload ({local})")]
    NotLocal {
        /// What was asked for.
        requested: SocketAddr,
        /// Whom it was asked of.
        local: IpAddr,
    },
    /// No service has that host name.
    #[error("authority names the unknown service {0:?}")]
    UnknownService(String),
    /// The service has no such port, or the workload does not know what stands behind
    /// it.
    #[error("service {service} has no port {port} here")]
    NoPort {
        /// `namespace/hostname`.
        service: String,
        /// The service's port that was asked for.
        port: u16,
    },
}

impl AuthorityError {
    /// The HTTP status that Istio's ztunnel answers with.
    pub fn status(&self) -> u16 {
        match self {
            Self::Malformed(_) | Self::NotLocal { .. } => 400,
            Self::UnknownService(_) | Self::NoPort { .. } => 503,
        }
    }
}

/// What a CONNECT for `authority` means that arrived for `workload` at its address
/// `local`.
///
/// An address must be the workload's own, unless the workload has an application
/// tunnel or is the waypoint of whoever has that address. A host name must be that of a
/// service.
///
/// # Errors
/// [`AuthorityError`] says what to answer.
pub fn target(
    snapshot: &Snapshot,
    workload: &Workload,
    local: IpAddr,
    authority: &str,
) -> Result<Target, AuthorityError> {
    let local = local.to_canonical();
    let (port, service) = match authority.parse::<SocketAddr>() {
        Ok(requested) => {
            let ip = requested.ip().to_canonical();
            let tunnelled = workload.application_tunnel.is_some();
            if ip != local && !tunnelled && !is_waypoint_of(snapshot, workload, ip) {
                return Err(AuthorityError::NotLocal { requested, local });
            }
            (requested.port(), None)
        }
        Err(_) => {
            let (port, service) = service_port_to_target(snapshot, workload, authority)?;
            (port, Some(service))
        }
    };
    if port == 0 {
        return Err(AuthorityError::Malformed(authority.into()));
    }
    let tunnel = workload.application_tunnel;
    Ok(Target {
        port,
        upstream_port: tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port),
        proxy_protocol: tunnel.is_some_and(|tunnel| tunnel.proxy_protocol),
        service,
    })
}

/// The port of `workload` that `authority`, a service's `host:port`, stands for.
///
/// # Errors
/// [`AuthorityError`] when it is malformed, or the service or its port is unknown.
pub fn service_port_to_target(
    snapshot: &Snapshot,
    workload: &Workload,
    authority: &str,
) -> Result<(u16, Arc<Service>), AuthorityError> {
    let malformed = || AuthorityError::Malformed(authority.into());
    let (host, port) = authority.rsplit_once(':').ok_or_else(malformed)?;
    if host.is_empty() || host.contains([':', '/', '@', '[', ']']) {
        return Err(malformed());
    }
    // `u16::from_str` takes a leading plus.
    if !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(malformed());
    }
    let port: u16 = port.parse().map_err(|_| malformed())?;
    let entry = snapshot
        .service_by_hostname(host, &workload.namespace)
        .ok_or_else(|| AuthorityError::UnknownService(host.into()))?;
    let service = entry.service();
    match target_port(service, workload, port) {
        Some(target) => Ok((target, service.clone())),
        None => Err(AuthorityError::NoPort {
            service: service.key.to_string(),
            port,
        }),
    }
}

/// Whether `workload` is an instance of the waypoint of the service or workload at
/// `ip`.
fn is_waypoint_of(snapshot: &Snapshot, workload: &Workload, ip: IpAddr) -> bool {
    let network = &workload.network;
    let is_this = |waypoint: &GatewayAddress| match &waypoint.destination {
        GatewayDestination::Hostname(name) => {
            let entry = snapshot.service(name);
            entry.is_some_and(|entry| entry.has_endpoint(&workload.uid))
        }
        GatewayDestination::Address(at) => {
            let holder = snapshot.workload_at(&at.network, at.address);
            let service = snapshot.service_at(&at.network, at.address, &workload.namespace);
            holder.is_some_and(|holder| holder.uid == workload.uid)
                || service.is_some_and(|entry| entry.has_endpoint(&workload.uid))
        }
    };
    let service = snapshot
        .service_at(network, ip, &workload.namespace)
        .or_else(|| snapshot.service_around(network, ip, &workload.namespace));
    let of_service = service.is_some_and(|entry| {
        let service = entry.service();
        let weighted = service.weighted_waypoints.iter();
        service.waypoint.as_deref().is_some_and(is_this)
            || weighted.map(|w| &*w.destination).any(is_this)
    });
    let holder = snapshot.workload_at(network, ip);
    of_service || holder.is_some_and(|holder| holder.waypoint.as_deref().is_some_and(is_this))
}
