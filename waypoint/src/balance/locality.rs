//! Which endpoints are near, and how much of the load each ring of nearness gets.
//!
//! Endpoints stand in *tiers*: the first gets everything for as long as enough of it can
//! be used, the rest overflows into the next. Within a tier there may be several groups
//! with given shares (`distribute`). Tiers follow, in this order of precedence, the
//! traffic policy's locality setting, then the service's `trafficDistribution`.

use std::sync::Arc;

use adit_shared::model::{LoadBalancing, LoadBalancingMode, Locality, LocalityScope, Workload};

use super::settings::{Distribution, LocalityPattern, LocalityPolicy};

/// A tier of which 1 / 1.4, about 71 %, can be used still takes all of its load (Envoy's
/// default `overprovisioning_factor`).
const OVERPROVISIONING: f64 = 1.4;

/// Where the waypoint itself is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// Region, zone, subzone.
    pub locality: Locality,
    /// Its node.
    pub node: Arc<str>,
    /// Its cluster.
    pub cluster: Arc<str>,
    /// Its network.
    pub network: Arc<str>,
}

impl Origin {
    /// Where `workload` is.
    pub fn of(workload: &Workload) -> Self {
        Self {
            locality: workload.locality.clone(),
            node: workload.node.clone(),
            cluster: workload.cluster_id.clone(),
            network: workload.network.clone(),
        }
    }
}

/// Endpoints that share load by weight.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// Counts from 0 without gaps.
    pub(super) tier: usize,
    /// Share within the tier.
    pub(super) share: u32,
    /// Indices of the endpoints.
    pub(super) members: Vec<usize>,
}

/// Puts endpoints into tiers and groups, sorted by tier. Endpoints in none are too far.
pub(super) fn place(
    policy: Option<&LocalityPolicy>,
    service: &LoadBalancing,
    origin: &Origin,
    endpoints: &[&Workload],
) -> Vec<Placement> {
    let known = !origin.locality.region.is_empty();
    match policy {
        Some(LocalityPolicy::Distribute(distributions)) => {
            let ours = distributions
                .iter()
                .find(|distribution| distribution.from.matches(&origin.locality));
            match ours {
                Some(ours) => distribute(ours, endpoints),
                None => by_rank(endpoints, |_| Some(0)),
            }
        }
        Some(LocalityPolicy::Failover(failover)) if known => {
            let region = &origin.locality.region;
            let step = failover.iter().find(|(from, _)| from == region);
            by_rank(endpoints, |workload| {
                let here = &workload.locality;
                Some(match nearness(&origin.locality, here) {
                    0 if step.is_some_and(|(_, to)| *to != here.region) => 4,
                    equal_parts => 3 - equal_parts,
                })
            })
        }
        Some(LocalityPolicy::Failover(_)) => by_rank(endpoints, |_| Some(0)),
        None => {
            let all = service.scopes.len();
            by_rank(endpoints, |workload| match service.mode {
                LoadBalancingMode::Standard | LoadBalancingMode::Passthrough => Some(0),
                LoadBalancingMode::Failover => Some(all - shared_scopes(service, origin, workload)),
                LoadBalancingMode::Strict => {
                    (shared_scopes(service, origin, workload) == all).then_some(0)
                }
            })
        }
    }
}

/// What a tier can take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Availability {
    /// Endpoints that can be used now.
    pub(super) usable: usize,
    /// Those that could be if none were ejected.
    pub(super) ready: usize,
    /// Those, and the ones that have been ready and are not now: capacity that is
    /// missing. One that has never been ready is still starting and is not missed.
    pub(super) total: usize,
}

impl Availability {
    /// Share of the load that this can take, 0 to 1.
    pub(super) fn health(self) -> f64 {
        match self.total {
            0 => 0.0,
            total => (OVERPROVISIONING * self.usable as f64 / total as f64).min(1.0),
        }
    }

    fn below(self, panic_threshold: u8) -> bool {
        self.ready > 0 && self.usable * 100 < usize::from(panic_threshold) * self.ready
    }
}

/// A tier's share of the load, and whether ejected endpoints are used in it too.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Load {
    pub(super) share: f64,
    pub(super) panic: bool,
}

/// How the load is spread over tiers (Envoy, "priority levels"): each takes what its
/// health allows of what is left. Where all together cannot take everything, each takes
/// in proportion, and those below the panic threshold use their ejected endpoints too.
pub(super) fn loads(tiers: &[Availability], panic_threshold: u8) -> Vec<Load> {
    let sum: f64 = tiers.iter().map(|tier| tier.health()).sum();
    let enough = sum.min(1.0);
    let mut left = 1.0;
    let mut loads: Vec<Load> = tiers
        .iter()
        .map(|tier| {
            let share: f64 = match enough {
                0.0 => 0.0,
                enough => (tier.health() / enough).min(left),
            };
            left -= share;
            let panic = sum < 1.0 && tier.below(panic_threshold);
            Load { share, panic }
        })
        .collect();
    // All in panic: by their size.
    let panicking: usize = tiers.iter().map(|tier| tier.ready).sum();
    if sum < 1.0
        && panicking > 0
        && loads
            .iter()
            .zip(tiers)
            .all(|(l, t)| l.panic || t.ready == 0)
    {
        for (load, tier) in loads.iter_mut().zip(tiers) {
            load.share = tier.ready as f64 / panicking as f64;
        }
    }
    loads
}

fn by_rank(endpoints: &[&Workload], rank: impl Fn(&Workload) -> Option<usize>) -> Vec<Placement> {
    let mut ranks: Vec<Vec<usize>> = Vec::new();
    for (at, workload) in endpoints.iter().enumerate() {
        let Some(rank) = rank(workload) else { continue };
        if ranks.len() <= rank {
            ranks.resize_with(rank + 1, Vec::new);
        }
        ranks[rank].push(at);
    }
    ranks.retain(|members| !members.is_empty());
    let tiers = ranks.into_iter().enumerate();
    tiers
        .map(|(tier, members)| Placement {
            tier,
            share: 1,
            members,
        })
        .collect()
}

/// One group for each share. An endpoint belongs to the most specific pattern that it
/// matches, the first among equals; one that matches none gets nothing, as in Istio.
fn distribute(distribution: &Distribution, endpoints: &[&Workload]) -> Vec<Placement> {
    let mut groups: Vec<Placement> = distribution
        .to
        .iter()
        .map(|(_, share)| Placement {
            tier: 0,
            share: *share,
            members: Vec::new(),
        })
        .collect();
    for (at, workload) in endpoints.iter().enumerate() {
        let patterns = distribution.to.iter().enumerate().rev();
        let best = patterns
            .filter(|(_, (pattern, _))| pattern.matches(&workload.locality))
            .max_by_key(|(_, (pattern, _))| pattern.specificity());
        if let Some((group, _)) = best {
            groups[group].members.push(at);
        }
    }
    groups.retain(|group| group.share > 0 && !group.members.is_empty());
    groups
}

/// How many of region, zone and subzone are equal, from the left.
fn nearness(a: &Locality, b: &Locality) -> usize {
    [
        a.region == b.region,
        a.zone == b.zone,
        a.subzone == b.subzone,
    ]
    .into_iter()
    .take_while(|equal| *equal)
    .count()
}

/// How many of the service's scopes `workload` shares with us, from the left.
fn shared_scopes(service: &LoadBalancing, origin: &Origin, workload: &Workload) -> usize {
    let shares = |scope: &LocalityScope| match scope {
        LocalityScope::Region => workload.locality.region == origin.locality.region,
        LocalityScope::Zone => workload.locality.zone == origin.locality.zone,
        LocalityScope::Subzone => workload.locality.subzone == origin.locality.subzone,
        // Two workloads on unknown nodes are not on the same one.
        LocalityScope::Node => !origin.node.is_empty() && workload.node == origin.node,
        LocalityScope::Cluster => workload.cluster_id == origin.cluster,
        LocalityScope::Network => workload.network == origin.network,
    };
    service
        .scopes
        .iter()
        .take_while(|scope| shares(scope))
        .count()
}

impl LocalityPattern {
    /// Whether `locality` is one of those that it describes.
    pub fn matches(&self, locality: &Locality) -> bool {
        let values = [&locality.region, &locality.zone, &locality.subzone];
        let mut parts = self.parts.iter().zip(values);
        parts.all(|(part, value)| part.as_ref().is_none_or(|part| part == value))
    }

    fn specificity(&self) -> usize {
        self.parts.iter().flatten().count()
    }
}
