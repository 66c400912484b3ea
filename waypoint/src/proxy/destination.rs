//! Where a CONNECT leads: a service that this waypoint stands before, or a workload. Pure.
//!
//! A waypoint that forwarded to whatever it is asked for would lend its own identity to every
//! caller. So a service or workload must name this waypoint as its own; anything else is
//! refused, as is what is not known.

use std::net::SocketAddr;
use std::sync::Arc;

use adit_shared::hbone::Authority;
use adit_shared::model::{ServiceName, WorkloadUid};
use adit_shared::policy::http::HttpPolicySet;
use http::StatusCode;

use crate::authentication::AuthenticationSet;
use crate::state::{Mesh, PortView, Protocol, Reach, View};
use crate::telemetry::TelemetrySettings;

/// Where a tunnel leads. It is looked up anew for each request, as configuration changes
/// under open tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A port of a service.
    Service {
        /// Which service.
        service: ServiceName,
        /// Which port.
        port: u16,
        /// Its virtual address, if that was dialled.
        dialled: Option<SocketAddr>,
    },
    /// A workload's own address.
    Workload {
        /// Which workload.
        uid: WorkloadUid,
        /// Its address and port.
        address: SocketAddr,
    },
}

/// What a destination is in one view.
#[derive(Clone)]
pub enum Target {
    /// A port of a service.
    Service(Arc<PortView>),
    /// A workload.
    Workload {
        /// Which, and where.
        reach: Box<Reach>,
        /// What is spoken there.
        protocol: Protocol,
        /// Policies of the waypoint.
        policies: Arc<HttpPolicySet>,
        /// Whose tokens are looked for.
        authentication: AuthenticationSet,
        /// What holds for the whole mesh.
        mesh: Arc<Mesh>,
    },
}

/// Why a CONNECT is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// Nothing is known of it.
    #[error("{0} is not known")]
    Unknown(Authority),
    /// The service has no such port.
    #[error("service {service} has no port {port}")]
    NoPort {
        /// `namespace/hostname`.
        service: ServiceName,
        /// The port that was asked for.
        port: u16,
    },
    /// It has another waypoint, or none.
    #[error("{0} does not use this waypoint")]
    NotOurs(Authority),
}

impl DestinationError {
    /// What a CONNECT is answered with. All of them may be gone in a moment: the caller's
    /// node and this waypoint do not hear of a change at the same time.
    pub fn status(&self) -> StatusCode {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

/// Where a CONNECT for `authority` leads that a caller of `namespace` sends.
///
/// # Errors
/// [`DestinationError`].
pub fn resolve(
    view: &View,
    authority: &Authority,
    namespace: &str,
) -> Result<Destination, DestinationError> {
    let model = view.model();
    let network = &view.gateway().network;
    let port = authority.port();
    let (entry, dialled) = match authority {
        Authority::Address(address) => {
            let ip = address.ip();
            let at = model.service_at(network, ip, namespace);
            let workload = || model.workload_at(network, ip);
            let entry = match (at, workload()) {
                (Some(entry), _) => Some(entry),
                (None, Some(workload)) => {
                    let waypoint = workload.waypoint.as_deref();
                    if !waypoint.is_some_and(|waypoint| view.is_self(waypoint)) {
                        return Err(DestinationError::NotOurs(authority.clone()));
                    }
                    return Ok(Destination::Workload {
                        uid: workload.uid.clone(),
                        address: *address,
                    });
                }
                (None, None) => model.service_around(network, ip, namespace),
            };
            (entry, Some(*address))
        }
        Authority::Host { name, .. } => (model.service_by_hostname(name.as_str(), namespace), None),
    };
    let entry = entry.ok_or_else(|| DestinationError::Unknown(authority.clone()))?;
    let service = entry.service();
    let weighted = service.weighted_waypoints.iter().map(|w| &w.destination);
    let mut waypoints = service.waypoint.iter().chain(weighted);
    if !waypoints.any(|waypoint| view.is_self(waypoint)) {
        return Err(DestinationError::NotOurs(authority.clone()));
    }
    if service.port(port).is_none() {
        return Err(DestinationError::NoPort {
            service: service.key.clone(),
            port,
        });
    }
    Ok(Destination::Service {
        service: service.key.clone(),
        port,
        dialled,
    })
}

impl Destination {
    /// What a `host` header says of it; without a port where that is HTTP's own.
    pub fn host(&self) -> String {
        match self {
            Self::Service { service, port, .. } => match port {
                80 => service.hostname.to_string(),
                port => format!("{}:{port}", service.hostname),
            },
            Self::Workload { address, .. } => address.to_string(),
        }
    }

    /// What it is in `view`; `None`: it is gone.
    pub fn target(&self, view: &View) -> Option<Target> {
        match self {
            Self::Service { service, port, .. } => {
                let port = view.service(service)?.port(*port)?;
                Some(Target::Service(port.clone()))
            }
            Self::Workload { uid, address } => {
                let workload = view.model().workload(uid)?;
                let protocol = view.protocol_of(workload, *address);
                let gateway = view.gateway();
                let policies = view.policies();
                let set = policies.for_address(&gateway.key, &workload.namespace);
                Some(Target::Workload {
                    reach: Box::new(Reach::direct(workload, *address, policies)),
                    protocol,
                    policies: Arc::new(set),
                    authentication: view.authentications().for_destination(
                        &gateway.key,
                        &workload.namespace,
                        None,
                        [&**uid],
                    ),
                    mesh: view.mesh().clone(),
                })
            }
        }
    }

    /// What was dialled, as far as it was an address.
    pub fn dialled(&self) -> Option<SocketAddr> {
        match self {
            Self::Service { dialled, .. } => *dialled,
            Self::Workload { address, .. } => Some(*address),
        }
    }

    /// The port that was dialled.
    pub fn port(&self) -> u16 {
        match self {
            Self::Service { port, .. } => *port,
            Self::Workload { address, .. } => address.port(),
        }
    }
}

impl Target {
    /// What is spoken there.
    pub fn protocol(&self) -> Protocol {
        match self {
            Self::Service(port) => port.protocol,
            Self::Workload { protocol, .. } => *protocol,
        }
    }

    /// Policies for what is sent there.
    pub fn policies(&self) -> &HttpPolicySet {
        match self {
            Self::Service(port) => &port.policies,
            Self::Workload { policies, .. } => policies,
        }
    }

    /// Whose tokens are looked for.
    pub fn authentication(&self) -> &AuthenticationSet {
        match self {
            Self::Service(port) => &port.authentication,
            Self::Workload { authentication, .. } => authentication,
        }
    }

    /// What is measured and logged.
    pub fn telemetry(&self) -> &Arc<TelemetrySettings> {
        match self {
            Self::Service(port) => &port.telemetry,
            Self::Workload { mesh, .. } => &mesh.telemetry,
        }
    }
}
