//! Which endpoint of a service gets a connection: weighted by capacity, near ones
//! first where the service asks for that.
//!
//! The endpoints that have a port stand in one array, sorted by network and then by
//! the service's locality scopes, beside the running sum of their capacities. Those
//! that match a client on the first *n* scopes are then one slice, found by bisection,
//! and a weighted draw from a slice is one more bisection. So one array serves clients
//! anywhere, and a draw neither allocates nor scans.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering as Memory};
use std::sync::{Arc, OnceLock};

use rand::Rng;

use super::types::{
    Health, LoadBalancing, LoadBalancingMode, LocalityScope, Service, Workload, WorkloadUid,
};

/// Draws that may hit an excluded endpoint before the slice is scanned instead.
const REDRAWS: usize = 8;

/// The draw tables of one service, made when the service is first used and from then
/// on with every change: a service that this node never calls costs nothing.
#[derive(Debug, Default)]
pub(super) struct Balancer {
    tables: OnceLock<Tables>,
    used: Arc<AtomicBool>,
}

/// What a draw came to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Drawn<'a> {
    /// This endpoint, at this port.
    Endpoint(&'a Arc<Workload>, u16),
    /// None is left that may be used.
    Nothing,
    /// There are some, all on other networks.
    OtherNetwork,
    /// There are some, all without an address.
    WithoutAddress,
}

#[derive(Debug)]
struct Tables {
    /// By service port, sorted.
    by_port: Vec<(u16, Table)>,
    /// Every endpoint, for callers that bring their own port; 0 stands for it.
    any_port: Table,
}

#[derive(Debug, Default)]
struct Table {
    endpoints: Vec<Endpoint>,
    /// `sums[i]` is the capacity of endpoints 0 to i together.
    sums: Vec<u64>,
    /// Endpoints were left out because they have no address but a host name.
    without_address: bool,
    /// Endpoints of other networks can be reached by a gateway.
    gateways: bool,
}

#[derive(Debug)]
struct Endpoint {
    workload: Arc<Workload>,
    port: u16,
}

impl Balancer {
    /// The balancer of the same service after a change.
    pub(super) fn successor(&self) -> Self {
        Self {
            tables: OnceLock::new(),
            used: self.used.clone(),
        }
    }

    /// Builds the tables if the service is in use, so that no connection waits for it.
    pub(super) fn warm(&self, service: &Service, endpoints: &[Arc<Workload>]) {
        if self.used.load(Memory::Relaxed) {
            self.tables(service, endpoints);
        }
    }

    /// Draws an endpoint for `client`. `service_port` is what the client dialled;
    /// `None` takes any endpoint and gives port 0.
    pub(super) fn draw<R: Rng + ?Sized>(
        &self,
        service: &Service,
        endpoints: &[Arc<Workload>],
        client: &Workload,
        service_port: Option<u16>,
        exclude: &[WorkloadUid],
        rng: &mut R,
    ) -> Drawn<'_> {
        let tables = self.tables(service, endpoints);
        let table = match service_port {
            None => &tables.any_port,
            Some(port) => match tables
                .by_port
                .binary_search_by_key(&port, |(port, _)| *port)
            {
                Ok(at) => &tables.by_port[at].1,
                Err(_) => return Drawn::Nothing,
            },
        };
        table.draw(&service.load_balancing, client, exclude, rng)
    }

    fn tables(&self, service: &Service, endpoints: &[Arc<Workload>]) -> &Tables {
        self.tables.get_or_init(|| {
            self.used.store(true, Memory::Relaxed);
            Tables::new(service, endpoints)
        })
    }
}

impl Tables {
    fn new(service: &Service, endpoints: &[Arc<Workload>]) -> Self {
        let lb = &service.load_balancing;
        let mut by_port: Vec<(u16, Table)> = service
            .ports
            .iter()
            .map(|port| {
                let table = Table::new(lb, endpoints, |workload| {
                    target_port(service, workload, port.service_port)
                });
                (port.service_port, table)
            })
            .collect();
        by_port.sort_by_key(|(port, _)| *port);
        by_port.dedup_by_key(|(port, _)| *port);
        Self {
            by_port,
            any_port: Table::new(lb, endpoints, |_| Some(0)),
        }
    }
}

/// What `service_port` is at `workload`: its own map, else the service's, else the
/// port itself where the app sits behind a tunnel that takes any.
pub(super) fn target_port(
    service: &Service,
    workload: &Workload,
    service_port: u16,
) -> Option<u16> {
    let own = workload.ports_of(&service.key).into_iter().flatten();
    own.filter(|port| port.service_port == service_port)
        .find_map(|port| port.target_port)
        .or_else(|| service.port(service_port)?.target_port)
        .or_else(|| workload.application_tunnel?.port.map(|_| service_port))
}

impl Table {
    fn new(
        lb: &LoadBalancing,
        all: &[Arc<Workload>],
        port: impl Fn(&Workload) -> Option<u16>,
    ) -> Self {
        let mut table = Self::default();
        for workload in all {
            let usable =
                workload.capacity > 0 && (lb.allow_unhealthy || workload.health == Health::Healthy);
            let Some(port) = port(workload).filter(|_| usable) else {
                continue;
            };
            if !workload.addresses.is_empty() {
                table.gateways |= workload.network_gateway.is_some();
                let workload = workload.clone();
                table.endpoints.push(Endpoint { workload, port });
            } else if workload.network_gateway.is_some() {
                table.gateways = true;
            } else if !workload.hostname.is_empty() {
                table.without_address = true;
            }
        }
        table.endpoints.shrink_to_fit();
        // Stable: endpoints that the scopes do not tell apart stay in the order of uids.
        table
            .endpoints
            .sort_by(|a, b| compare(&a.workload, &b.workload, &lb.scopes));
        let mut sum = 0;
        let capacities = table
            .endpoints
            .iter()
            .map(|e| u64::from(e.workload.capacity));
        table.sums = capacities
            .map(|capacity| {
                sum += capacity;
                sum
            })
            .collect();
        table
    }

    fn draw<R: Rng + ?Sized>(
        &self,
        lb: &LoadBalancing,
        client: &Workload,
        exclude: &[WorkloadUid],
        rng: &mut R,
    ) -> Drawn<'_> {
        let network = self.matching(client, &[]);
        if network.is_empty() {
            return match self {
                Self { gateways: true, .. } => Drawn::OtherNetwork,
                Self {
                    without_address: true,
                    ..
                } => Drawn::WithoutAddress,
                _ => Drawn::Nothing,
            };
        }
        let all = lb.scopes.len();
        let ranks = match lb.mode {
            LoadBalancingMode::Standard | LoadBalancingMode::Passthrough => 0..1,
            LoadBalancingMode::Strict => all..all + 1,
            LoadBalancingMode::Failover => 0..all + 1,
        };
        for scopes in ranks.rev() {
            let slice = self.matching(client, &lb.scopes[..scopes]);
            if let Some(endpoint) = self.draw_from(slice, exclude, rng) {
                return Drawn::Endpoint(&endpoint.workload, endpoint.port);
            }
        }
        Drawn::Nothing
    }

    /// The slice of endpoints on the client's network that match it on all `scopes`,
    /// which are the first of those the table is sorted by.
    fn matching(&self, client: &Workload, scopes: &[LocalityScope]) -> Range<usize> {
        // Two workloads on unknown nodes are not on the same one.
        if scopes.contains(&LocalityScope::Node) && client.node.is_empty() {
            return 0..0;
        }
        let order = |e: &Endpoint| compare(&e.workload, client, scopes);
        let start = self
            .endpoints
            .partition_point(|e| order(e) == Ordering::Less);
        let rest = &self.endpoints[start..];
        start..start + rest.partition_point(|e| order(e) == Ordering::Equal)
    }

    fn draw_from<R: Rng + ?Sized>(
        &self,
        slice: Range<usize>,
        exclude: &[WorkloadUid],
        rng: &mut R,
    ) -> Option<&Endpoint> {
        let last = slice.end.checked_sub(1).filter(|_| !slice.is_empty())?;
        let base = slice.start.checked_sub(1).map_or(0, |at| self.sums[at]);
        let is_excluded = |e: &Endpoint| exclude.contains(&e.workload.uid);
        for _ in 0..REDRAWS {
            let draw = rng.random_range(base..self.sums[last]);
            let sums = &self.sums[slice.clone()];
            let endpoint = &self.endpoints[slice.start + sums.partition_point(|sum| *sum <= draw)];
            if !is_excluded(endpoint) {
                return Some(endpoint);
            }
        }
        let left = || {
            self.endpoints[slice.clone()]
                .iter()
                .filter(|e| !is_excluded(e))
        };
        let total: u64 = left().map(|e| u64::from(e.workload.capacity)).sum();
        let mut draw = match total {
            0 => return None,
            total => rng.random_range(0..total),
        };
        left().find(|e| {
            let capacity = u64::from(e.workload.capacity);
            let hit = draw < capacity;
            draw = draw.saturating_sub(capacity);
            hit
        })
    }
}

/// Orders workloads by network, then by each scope in turn.
fn compare(a: &Workload, b: &Workload, scopes: &[LocalityScope]) -> Ordering {
    let mut order = a.network.cmp(&b.network);
    for scope in scopes {
        order = order.then_with(|| value(a, *scope).cmp(value(b, *scope)));
    }
    order
}

fn value(workload: &Workload, scope: LocalityScope) -> &str {
    match scope {
        LocalityScope::Region => &workload.locality.region,
        LocalityScope::Zone => &workload.locality.zone,
        LocalityScope::Subzone => &workload.locality.subzone,
        LocalityScope::Node => &workload.node,
        LocalityScope::Cluster => &workload.cluster_id,
        LocalityScope::Network => &workload.network,
    }
}
