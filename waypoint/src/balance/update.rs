//! What a balancer is told when endpoints or settings change.

use std::sync::Arc;

use adit_shared::model::LoadBalancing;

use super::endpoint::Endpoint;
use super::locality::Origin;
use super::settings::{SubsetMembers, TrafficSettings};

/// One state of a service's port, or of a subset of it.
#[derive(Debug)]
pub struct Update<'a> {
    /// How to balance ([`super::Selection::settings`]).
    pub settings: Arc<TrafficSettings>,
    /// The workloads of the subset; `None`: all endpoints.
    pub subset: Option<&'a SubsetMembers>,
    /// What the service itself says: `trafficDistribution`, `publishNotReadyAddresses`.
    pub load_balancing: &'a LoadBalancing,
    /// Where the waypoint is.
    pub origin: &'a Origin,
    /// All endpoints of the port, ready or not, in any order. Of two with one uid the
    /// last is taken.
    pub endpoints: Vec<Endpoint>,
}
