//! Which endpoint a request or a connection goes to: what the balancer says, for a service;
//! the workload itself, where that was dialled.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use adit_shared::model::WorkloadUid;
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
                let held = picked.map_err(|error| (reply(&error), error))?;
                if let Some(reach) = backend.reach(held.uid()) {
                    return Ok(Picked {
                        reach: reach.clone(),
                        held: Some(held),
                    });
                }
                // The balancer can be a moment ahead of the view: it has an endpoint already
                // that this request has not. Those that it has were good a moment ago.
                let known = |reach: &&Reach| !request.tried.contains(&reach.endpoint.uid);
                let reach = backend.reaches().find(known);
                let reach = reach.or_else(|| backend.reaches().next()).cloned();
                let unknown = PickError::NoHealthyEndpoints;
                let reach = reach.ok_or_else(|| (reply(&unknown), unknown))?;
                Ok(Picked { reach, held: None })
            }
            Self::Workload(reach) => Ok(Picked {
                reach: (**reach).clone(),
                held: None,
            }),
        }
    }

    /// Whether another try can go elsewhere than to those that were `tried`.
    pub fn has_more(&self, tried: &[WorkloadUid]) -> bool {
        match self {
            Self::Backend(backend) => backend
                .reaches()
                .any(|reach| !tried.contains(&reach.endpoint.uid)),
            Self::Workload(_) => tried.is_empty(),
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
