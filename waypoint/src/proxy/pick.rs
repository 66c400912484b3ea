//! Which endpoint a request or a connection goes to: what the balancer says, for a service;
//! the workload itself, where that was dialled.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::StatusCode;

use super::destination::Target;
use super::reply::Reply;
use crate::balance::{self, PickError, PickRequest};
use crate::state::{Backend, Reach};
use crate::telemetry::ResponseFlags;

/// Where requests may go.
#[derive(Clone)]
pub enum Choice {
    /// To one of a service's endpoints.
    Backend(Arc<Backend>),
    /// To a workload.
    Workload(Box<Reach>),
}

/// An endpoint for one request.
pub struct Picked {
    /// The endpoint.
    pub reach: Reach,
    /// The request counts as active at it while this is held, and is told of.
    pub held: Option<balance::Picked>,
}

impl Choice {
    /// What a destination without routes leads to.
    pub fn of(target: &Target) -> Self {
        match target {
            Target::Service(port) => Self::Backend(port.backend.clone()),
            Target::Workload { reach, .. } => Self::Workload(reach.clone()),
        }
    }

    /// The cluster's name in telemetry.
    pub fn cluster(&self) -> Arc<str> {
        match self {
            Self::Backend(backend) => backend.cluster.clone(),
            Self::Workload(_) => Arc::default(),
        }
    }

    /// Chooses an endpoint; of those that were `tried`, only if there is no other.
    ///
    /// # Errors
    /// What the request is answered with, and why.
    pub fn pick(&self, request: &PickRequest<'_>) -> Result<Picked, (Reply, PickError)> {
        match self {
            Self::Backend(backend) => {
                let now = Instant::now();
                let picked = backend.balancer.pick(request, now, &mut rand::rng());
                let held = picked.map_err(|error| match error {
                    PickError::NoEndpoints if backend.only_names => PickError::NoAddresses,
                    error => error,
                });
                let held = held.map_err(|error| (reply(&error), error))?;
                // It has no address that could be connected to.
                let unknown = PickError::NoHealthyEndpoints;
                let reach = backend.reach(held.uid());
                let reach = reach.ok_or_else(|| (reply(&unknown), unknown))?;
                Ok(Picked {
                    reach,
                    held: Some(held),
                })
            }
            Self::Workload(reach) => Ok(Picked {
                reach: (**reach).clone(),
                held: None,
            }),
        }
    }
}

/// What a client gets when no endpoint could be had.
pub fn reply(error: &PickError) -> Reply {
    let flags = match error.response_flag() {
        "UO" => ResponseFlags::UPSTREAM_OVERFLOW,
        "URX" => ResponseFlags::RETRY_LIMIT_EXCEEDED,
        "NC" => ResponseFlags::NO_CLUSTER,
        _ => ResponseFlags::NO_HEALTHY_UPSTREAM,
    };
    Reply {
        status: error.status(),
        flags,
        reason: error.reason(),
        grpc: None,
        text: match error.status() {
            StatusCode::SERVICE_UNAVAILABLE => "no healthy upstream",
            _ => error.reason(),
        },
    }
}

/// The address that the client dialled, for balancers that pass it through.
pub fn dialled(address: Option<SocketAddr>) -> Option<std::net::IpAddr> {
    address.map(|address| address.ip())
}
