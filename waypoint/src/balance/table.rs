//! The endpoints that can be used at this moment, laid out for choosing one.
//!
//! A [`Plan`] is made when the endpoints or settings change: tiers, groups, hash tables.
//! A [`Table`] is the plan less the endpoints that are ejected; it is made anew with each
//! ejection, shares the hash tables, and never changes. A pick reads nothing else.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use adit_shared::model::WorkloadUid;
use rand::Rng;

use super::endpoint::Host;
use super::error::PickError;
use super::group::Group;
use super::hash::{HashTable, Maglev, Ring};
use super::locality::{self, Availability};
use super::settings::{Algorithm, TrafficSettings};
use super::update::Update;

/// What a pick may take into account.
#[derive(Debug, Clone, Copy, Default)]
pub struct PickRequest<'a> {
    /// Endpoints that have been tried for this request: others are preferred, near or far.
    pub tried: &'a [WorkloadUid],
    /// What consistent hashing goes by ([`super::HashKey::hash`]); without it, it draws.
    pub hash: Option<u64>,
    /// The endpoint of a persistent session: taken if it can still be used.
    pub sticky: Option<&'a str>,
    /// The address that the client dialled, for [`Algorithm::Passthrough`].
    pub destination: Option<IpAddr>,
}

/// What changes with configuration only.
#[derive(Debug)]
pub(super) struct Plan {
    settings: Arc<TrafficSettings>,
    algorithm: Algorithm,
    /// Every endpoint, by uid.
    pub(super) hosts: Vec<Arc<Host>>,
    /// By tier.
    groups: Vec<PlannedGroup>,
    /// Why there is no endpoint when there is none, ejections apart.
    empty: PickError,
    /// Nanoseconds since the epoch from which on no endpoint is in slow start.
    warm_from: u64,
}

#[derive(Debug)]
struct PlannedGroup {
    tier: usize,
    share: u32,
    availability: Availability,
    /// The ready ones.
    members: Vec<Arc<Host>>,
    hash: Option<Arc<HashTable>>,
}

/// What a pick reads.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) settings: Arc<TrafficSettings>,
    algorithm: Algorithm,
    /// Nearest first.
    groups: Vec<Group>,
    /// Up to which draw out of 2^32 each group gets the request.
    ends: Vec<u64>,
    hosts: Vec<Arc<Host>>,
    empty: PickError,
    warm_from: u64,
}

impl Plan {
    /// `hosts` are sorted by uid. `before` lends its hash tables where they fit.
    pub(super) fn new(
        update: &Update<'_>,
        hosts: Vec<Arc<Host>>,
        subset_empty: bool,
        before: Option<&Self>,
    ) -> Self {
        let settings = update.settings.clone();
        let service = update.load_balancing;
        let balancer = &settings.load_balancer;
        let algorithm = match service.mode {
            adit_shared::model::LoadBalancingMode::Passthrough => Algorithm::Passthrough,
            _ => balancer.algorithm,
        };
        let workloads: Vec<_> = hosts.iter().map(|host| &*host.endpoint.workload).collect();
        let placements = locality::place(
            balancer.locality.as_ref(),
            service,
            update.origin,
            &workloads,
        );
        let groups: Vec<PlannedGroup> = placements
            .into_iter()
            .map(|placement| {
                let all = || placement.members.iter().map(|at| &hosts[*at]);
                let members: Vec<_> = all().filter(|host| host.ready).cloned().collect();
                let counts = |host: &&Arc<Host>| {
                    host.ready || (host.endpoint.weight > 0 && host.state.was_ready())
                };
                let hash = hash_table(algorithm, &members, before);
                PlannedGroup {
                    tier: placement.tier,
                    share: placement.share,
                    availability: Availability {
                        usable: members.len(),
                        ready: members.len(),
                        total: all().filter(counts).count(),
                    },
                    members,
                    hash,
                }
            })
            .collect();
        let empty = if subset_empty {
            PickError::SubsetEmpty
        } else if hosts.is_empty() {
            PickError::NoEndpoints
        } else if groups.iter().any(|group| !group.members.is_empty()) {
            PickError::AllEjected
        } else if hosts.iter().any(|host| host.ready) {
            PickError::NoLocalEndpoints
        } else {
            PickError::NoHealthyEndpoints
        };
        let window = balancer.slow_start.map_or(0, |slow| nanos(slow.window));
        let ready_since = hosts.iter().filter(|host| host.ready);
        let warm_from = match window {
            0 => 0,
            window => ready_since
                .map(|host| host.state.ready_since().saturating_add(window))
                .max()
                .unwrap_or(0),
        };
        Self {
            settings,
            algorithm,
            hosts,
            groups,
            empty,
            warm_from,
        }
    }

    pub(super) fn settings(&self) -> &TrafficSettings {
        &self.settings
    }

    /// The plan less what is ejected.
    pub(super) fn table(&self) -> Table {
        let ejected = |host: &Host| host.state.ejected.load(Relaxed);
        let usable = |group: &PlannedGroup| {
            let members = group.members.iter();
            members.filter(|host| !ejected(host)).count()
        };
        let tier_count = self.groups.last().map_or(0, |group| group.tier + 1);
        let mut tiers = vec![
            Availability {
                usable: 0,
                ready: 0,
                total: 0
            };
            tier_count
        ];
        for group in &self.groups {
            let tier = &mut tiers[group.tier];
            tier.usable += usable(group);
            tier.ready += group.availability.ready;
            tier.total += group.availability.total;
        }
        let loads = locality::loads(&tiers, self.settings.panic_threshold());
        // Within a tier: the share, less what the group cannot take (Envoy's locality
        // weighted load balancing).
        let shares: Vec<f64> = self
            .groups
            .iter()
            .map(|group| {
                let health = match loads[group.tier].panic {
                    true => 1.0,
                    false => Availability {
                        usable: usable(group),
                        ..group.availability
                    }
                    .health(),
                };
                f64::from(group.share) * health
            })
            .collect();
        let in_tier = |tier| {
            let groups = self.groups.iter().zip(&shares);
            groups
                .filter(|(group, _)| group.tier == tier)
                .map(|(_, share)| share)
                .sum::<f64>()
        };
        let sums: Vec<f64> = (0..tier_count).map(in_tier).collect();
        let mut groups = Vec::with_capacity(self.groups.len());
        let mut ends = Vec::with_capacity(self.groups.len());
        let mut end = 0.0;
        for (group, share) in self.groups.iter().zip(&shares) {
            let load = loads[group.tier];
            let members = &group.members;
            let open: Vec<bool> = members
                .iter()
                .map(|host| load.panic || !ejected(host))
                .collect();
            if !open.contains(&true) {
                continue;
            }
            if sums[group.tier] > 0.0 {
                end += load.share * share / sums[group.tier];
            }
            groups.push(Group::new(
                self.algorithm,
                members,
                open,
                group.hash.clone(),
            ));
            ends.push((end * (1u64 << 32) as f64) as u64);
        }
        // What rounding left over.
        if let Some(last) = ends.iter().rposition(|end| *end > 0) {
            ends[last..].fill(1 << 32);
        }
        Table {
            settings: self.settings.clone(),
            algorithm: self.algorithm,
            groups,
            ends,
            hosts: self.hosts.clone(),
            empty: self.empty.clone(),
            warm_from: self.warm_from,
        }
    }
}

impl Table {
    /// `turn` counts round-robin picks; `now` is in nanoseconds since the epoch.
    pub(super) fn pick<R: Rng + ?Sized>(
        &self,
        request: &PickRequest<'_>,
        turn: &AtomicU64,
        now: u64,
        rng: &mut R,
    ) -> Result<&Arc<Host>, PickError> {
        if let Some(reason) = &self.settings.invalid {
            return Err(PickError::InvalidPolicy(reason.clone()));
        }
        if let Some(host) = request.sticky.and_then(|uid| self.sticky(uid, request)) {
            return Ok(host);
        }
        let chooser = Chooser {
            algorithm: self.algorithm,
            tried: request.tried,
            hash: request.hash,
            destination: request.destination,
            turn,
            now,
            slow_start: self
                .settings
                .load_balancer
                .slow_start
                .filter(|_| now < self.warm_from),
        };
        let [only] = &self.groups[..] else {
            return self.pick_group(&chooser, rng);
        };
        let again = || Chooser {
            tried: &[],
            ..chooser
        };
        only.choose(&chooser, rng)
            .or_else(|| only.choose(&again(), rng))
            .ok_or_else(|| self.empty.clone())
    }

    fn pick_group<R: Rng + ?Sized>(
        &self,
        chooser: &Chooser<'_>,
        rng: &mut R,
    ) -> Result<&Arc<Host>, PickError> {
        if chooser.algorithm == Algorithm::Passthrough
            && let Some(address) = chooser.destination
            && let Some(host) = self
                .groups
                .iter()
                .find_map(|group| group.at_address(address))
        {
            return Ok(host);
        }
        // The same hash must find the same group, and the draw must not depend on the
        // bits by which the group finds the endpoint.
        let draw = match chooser
            .hash
            .filter(|_| chooser.algorithm.is_consistent_hash())
        {
            Some(hash) => hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32,
            None => u64::from(rng.next_u32()),
        };
        let Some(drawn) = self.ends.iter().position(|end| draw < *end) else {
            return Err(self.empty.clone());
        };
        if let Some(host) = self.groups[drawn].choose(chooser, rng) {
            return Ok(host);
        }
        // All of that group have been tried: the nearest that has not been.
        let others = self.groups.iter();
        let again = Chooser {
            tried: &[],
            ..*chooser
        };
        others
            .filter_map(|group| group.choose(chooser, rng))
            .next()
            .or_else(|| self.groups[drawn].choose(&again, rng))
            .ok_or_else(|| self.empty.clone())
    }

    fn sticky(&self, uid: &str, request: &PickRequest<'_>) -> Option<&Arc<Host>> {
        let host = self.host(uid)?;
        let usable = host.ready && !host.state.ejected.load(Relaxed);
        (usable && !request.tried.contains(&host.endpoint.uid)).then_some(host)
    }

    pub(super) fn host(&self, uid: &str) -> Option<&Arc<Host>> {
        let found = self
            .hosts
            .binary_search_by(|host| (*host.endpoint.uid).cmp(uid));
        found.ok().map(|at| &self.hosts[at])
    }

    pub(super) fn hosts(&self) -> &[Arc<Host>] {
        &self.hosts
    }
}

/// What a group chooses by.
#[derive(Clone, Copy)]
pub(super) struct Chooser<'a> {
    pub(super) algorithm: Algorithm,
    pub(super) tried: &'a [WorkloadUid],
    pub(super) hash: Option<u64>,
    pub(super) destination: Option<IpAddr>,
    pub(super) turn: &'a AtomicU64,
    pub(super) now: u64,
    /// Only while an endpoint is in it.
    pub(super) slow_start: Option<super::settings::SlowStart>,
}

/// The hash table of `members`, that of `before` where it is the same.
fn hash_table(
    algorithm: Algorithm,
    members: &[Arc<Host>],
    before: Option<&Plan>,
) -> Option<Arc<HashTable>> {
    if !algorithm.is_consistent_hash() || members.is_empty() {
        return None;
    }
    let keys = |members: &[Arc<Host>]| -> Vec<(WorkloadUid, u32)> {
        let key = |host: &Arc<Host>| (host.endpoint.uid.clone(), host.endpoint.weight);
        members.iter().map(key).collect()
    };
    let key = keys(members);
    let mut old = before
        .filter(|before| before.algorithm == algorithm)
        .into_iter()
        .flat_map(|before| &before.groups);
    if let Some(same) = old.find(|group| keys(&group.members) == key) {
        return same.hash.clone();
    }
    let key: Vec<(&str, u32)> = key.iter().map(|(uid, weight)| (&**uid, *weight)).collect();
    Some(Arc::new(match algorithm {
        Algorithm::RingHash { minimum_ring_size } => {
            HashTable::Ring(Ring::new(&key, minimum_ring_size))
        }
        _ => HashTable::Maglev(Maglev::new(&key)),
    }))
}

pub(super) fn nanos(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
