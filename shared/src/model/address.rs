//! Who holds an address on one network: workloads, services by virtual address, and
//! services by block. The indexes hold names of services, never the services, so that
//! a change of a service's endpoints cannot leave an old one behind.

use std::net::IpAddr;
use std::sync::Arc;

use imbl::HashMap;
use ipnet::IpNet;

use super::types::{Health, Service, ServiceName, Workload};

/// The services that claim one name or address: canonical ones first, then by name.
#[derive(Debug, Clone)]
pub(super) struct Claims(Arc<[Claim]>);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    /// False sorts first.
    not_canonical: bool,
    service: ServiceName,
    private: bool,
}

/// How good a claim is to one client, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Visible,
    Canonical,
    OwnNamespace,
}

impl Claim {
    fn of(service: &Service) -> Self {
        Self {
            not_canonical: !service.canonical,
            service: service.key.clone(),
            private: service.namespace_private,
        }
    }

    /// `None` where the client may not see the service.
    fn rank(&self, client_namespace: &str) -> Option<Rank> {
        if &*self.service.namespace == client_namespace {
            Some(Rank::OwnNamespace)
        } else if self.private {
            None
        } else if self.not_canonical {
            Some(Rank::Visible)
        } else {
            Some(Rank::Canonical)
        }
    }
}

impl Claims {
    fn one(claim: Claim) -> Self {
        Self(Arc::new([claim]))
    }

    fn with(&self, claim: Claim) -> Self {
        let others = self.0.iter().filter(|c| c.service != claim.service);
        let mut claims: Vec<_> = others.cloned().collect();
        claims.push(claim);
        claims.sort_unstable();
        Self(claims.into())
    }

    /// `None` when nothing is left.
    fn without(&self, service: &ServiceName) -> Option<Self> {
        let rest: Vec<_> = self
            .0
            .iter()
            .filter(|claim| claim.service != *service)
            .cloned()
            .collect();
        (!rest.is_empty()).then(|| Self(rest.into()))
    }

    /// The best claim for a client of `namespace`, the first among equals.
    fn best(&self, namespace: &str) -> Option<(Rank, &ServiceName)> {
        let mut best: Option<(Rank, &ServiceName)> = None;
        for claim in self.0.iter() {
            if let Some(rank) = claim.rank(namespace)
                && best.is_none_or(|(other, _)| rank > other)
            {
                best = Some((rank, &claim.service));
            }
        }
        best
    }

    pub(super) fn for_client(&self, namespace: &str) -> Option<&ServiceName> {
        self.best(namespace).map(|(_, service)| service)
    }
}

/// Adds `service`'s claim on `key`.
pub(super) fn claim<K>(claims: &mut HashMap<K, Claims>, key: K, service: &Service)
where
    K: std::hash::Hash + Eq + Clone,
{
    let claim = Claim::of(service);
    let all = match claims.get(&key) {
        Some(others) => others.with(claim),
        None => Claims::one(claim),
    };
    claims.insert(key, all);
}

/// Removes the claim of `service` on `key`.
pub(super) fn disclaim<K>(claims: &mut HashMap<K, Claims>, key: &K, service: &ServiceName)
where
    K: std::hash::Hash + Eq + Clone,
{
    let Some(all) = claims.get(key) else { return };
    match all.without(service) {
        Some(rest) => claims.insert(key.clone(), rest),
        None => claims.remove(key),
    };
}

/// The workloads at one address: almost always one.
#[derive(Debug, Clone)]
enum Holders {
    One(Arc<Workload>),
    Many(Arc<[Arc<Workload>]>),
}

impl Holders {
    fn as_slice(&self) -> &[Arc<Workload>] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    /// Pods before others, because an external endpoint may name a pod's address;
    /// healthy before unhealthy, because an address may be reused before the old pod
    /// is gone; then by uid.
    fn new(mut all: Vec<Arc<Workload>>) -> Option<Self> {
        let key = |w: &Arc<Workload>| (!w.is_pod(), w.health == Health::Unhealthy);
        all.sort_by(|a, b| key(a).cmp(&key(b)).then_with(|| a.uid.cmp(&b.uid)));
        match <[_; 1]>::try_from(all) {
            Ok([one]) => Some(Self::One(one)),
            Err(all) if all.is_empty() => None,
            Err(all) => Some(Self::Many(all.into())),
        }
    }
}

/// Everything that is addressed on one network.
#[derive(Debug, Clone, Default)]
pub(super) struct NetworkIndex {
    workloads: HashMap<IpAddr, Holders>,
    vips: HashMap<IpAddr, Claims>,
    blocks: HashMap<IpNet, Claims>,
    /// Prefix lengths in use in `blocks` and by how many, longest first.
    lengths_v4: Vec<(u8, usize)>,
    lengths_v6: Vec<(u8, usize)>,
}

impl NetworkIndex {
    pub(super) fn is_empty(&self) -> bool {
        self.workloads.is_empty() && self.vips.is_empty() && self.blocks.is_empty()
    }

    pub(super) fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(&address)?.as_slice().first()
    }

    pub(super) fn add_workload(&mut self, address: IpAddr, workload: &Arc<Workload>) {
        let mut all = self.others_at(address, workload);
        all.push(workload.clone());
        if let Some(holders) = Holders::new(all) {
            self.workloads.insert(address, holders);
        }
    }

    pub(super) fn remove_workload(&mut self, address: IpAddr, workload: &Workload) {
        match Holders::new(self.others_at(address, workload)) {
            Some(holders) => self.workloads.insert(address, holders),
            None => self.workloads.remove(&address),
        };
    }

    fn others_at(&self, address: IpAddr, workload: &Workload) -> Vec<Arc<Workload>> {
        let holders = self.workloads.get(&address);
        let all = holders.map_or(&[][..], Holders::as_slice).iter();
        all.filter(|other| other.uid != workload.uid)
            .cloned()
            .collect()
    }

    pub(super) fn vip(&self, address: IpAddr, namespace: &str) -> Option<&ServiceName> {
        self.vips.get(&address)?.for_client(namespace)
    }

    /// The best block that holds `address`: of the client's own namespace before
    /// others, then the longest, then canonical. One lookup per prefix length in use.
    pub(super) fn block(&self, address: IpAddr, namespace: &str) -> Option<&ServiceName> {
        let mut best: Option<((bool, u8, Rank), &ServiceName)> = None;
        for &(length, _) in self.lengths(address) {
            let claim = IpNet::new(address, length)
                .ok()
                .and_then(|block| self.blocks.get(&block.trunc()))
                .and_then(|claims| claims.best(namespace));
            if let Some((rank, service)) = claim {
                let key = (rank == Rank::OwnNamespace, length, rank);
                if best.is_none_or(|(other, _)| key > other) {
                    best = Some((key, service));
                }
                if rank == Rank::OwnNamespace {
                    break;
                }
            }
        }
        best.map(|(_, service)| service)
    }

    pub(super) fn add_block(&mut self, block: IpNet, service: &Service) {
        if block.prefix_len() == block.max_prefix_len() {
            return claim(&mut self.vips, block.addr(), service);
        }
        if !self.blocks.contains_key(&block) {
            let length = block.prefix_len();
            let lengths = self.lengths_mut(block);
            match lengths.binary_search_by(|(other, _)| length.cmp(other)) {
                Ok(at) => lengths[at].1 += 1,
                Err(at) => lengths.insert(at, (length, 1)),
            }
        }
        claim(&mut self.blocks, block, service);
    }

    pub(super) fn remove_block(&mut self, block: IpNet, service: &ServiceName) {
        if block.prefix_len() == block.max_prefix_len() {
            return disclaim(&mut self.vips, &block.addr(), service);
        }
        if !self.blocks.contains_key(&block) {
            return;
        }
        disclaim(&mut self.blocks, &block, service);
        if !self.blocks.contains_key(&block) {
            let lengths = self.lengths_mut(block);
            for entry in lengths.iter_mut() {
                if entry.0 == block.prefix_len() {
                    entry.1 -= 1;
                }
            }
            lengths.retain(|(_, blocks)| *blocks > 0);
        }
    }

    fn lengths(&self, address: IpAddr) -> &[(u8, usize)] {
        match address {
            IpAddr::V4(_) => &self.lengths_v4,
            IpAddr::V6(_) => &self.lengths_v6,
        }
    }

    fn lengths_mut(&mut self, block: IpNet) -> &mut Vec<(u8, usize)> {
        match block {
            IpNet::V4(_) => &mut self.lengths_v4,
            IpNet::V6(_) => &mut self.lengths_v6,
        }
    }
}
