//! Where the requests to a service's port go: its endpoints, how they are chosen and how each
//! of them is reached.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use adit_shared::model::{ServiceEntry, TunnelProtocol, Workload, WorkloadUid};
use adit_shared::policy::http::{HttpPolicies, HttpPolicySet};
use adit_shared::telemetry::WorkloadLabels;

use arc_swap::ArcSwap;
use tracing::warn;

use crate::balance::{self, Balancer, Origin, Selection, TrafficSettings, Update};
use crate::proxy::upstream::{Endpoint, Originate};
use crate::telemetry::Peer;

/// The endpoints of a service's port, or of a subset of them.
pub struct Backend {
    /// Chooses, for all workers and through all changes.
    pub balancer: Arc<Balancer>,
    /// How it is balanced and bounded.
    pub settings: Arc<TrafficSettings>,
    /// As telemetry names it, in Envoy's manner.
    pub cluster: Arc<str>,
    /// It has endpoints, of all of which only names are known.
    pub only_names: bool,
    /// Shared with the views before and after, as the balancer is: whatever that picks can be
    /// reached, whichever view the request has.
    reaches: Arc<ArcSwap<Reaches>>,
}

/// The endpoints of now, and those of one change before, which a pick may just have found.
#[derive(Default)]
struct Reaches {
    now: HashMap<WorkloadUid, Reach>,
    before: HashMap<WorkloadUid, Reach>,
}

/// An endpoint, ready to be sent to.
#[derive(Clone)]
pub struct Reach {
    /// The workload.
    pub workload: Arc<Workload>,
    /// How to get there.
    pub endpoint: Arc<Endpoint>,
    /// As telemetry names it.
    pub peer: Peer,
    /// What its own policies say, if there are any.
    pub policies: Option<Arc<HttpPolicySet>>,
}

/// What all backends of a view have in common.
pub(super) struct Surroundings<'a> {
    pub(super) origin: &'a Origin,
    pub(super) policies: &'a HttpPolicies,
    pub(super) now: Instant,
}

impl Backend {
    pub(super) fn compile(
        entry: &ServiceEntry,
        port: u16,
        subset: Option<&str>,
        selection: Selection,
        originate: Option<&Arc<Originate>>,
        around: &Surroundings<'_>,
        before: Option<&Self>,
    ) -> Self {
        let Selection { settings, members } = selection;
        let service = entry.service();
        let endpoints = balance::Endpoint::of_service(entry, port, &around.origin.network);
        let all = endpoints.len();
        // Names are not looked up here.
        let has_address = |endpoint: &balance::Endpoint| !endpoint.workload.addresses.is_empty();
        let endpoints: Vec<_> = endpoints.into_iter().filter(has_address).collect();
        let only_names = all > 0 && endpoints.is_empty();
        if only_names && !before.is_some_and(|before| before.only_names) {
            let service = &service.key;
            warn!(%service, port, "its endpoints have names and no addresses: requests are refused");
        }
        let known = before.map(|before| before.reaches.load_full());
        let now = endpoints
            .iter()
            .filter_map(|endpoint| {
                let known = known
                    .as_ref()
                    .and_then(|known| known.now.get(&endpoint.uid));
                let reach = Reach::compile(
                    &endpoint.workload,
                    endpoint.port,
                    entry,
                    originate,
                    around,
                    known,
                )?;
                Some((endpoint.uid.clone(), reach))
            })
            .collect();
        let reaches = Reaches {
            now,
            before: known.map(|known| known.now.clone()).unwrap_or_default(),
        };
        // Before the balancer knows them.
        let reaches = match before {
            Some(before) => {
                before.reaches.store(Arc::new(reaches));
                before.reaches.clone()
            }
            None => Arc::new(ArcSwap::from_pointee(reaches)),
        };
        let update = Update {
            settings: settings.clone(),
            subset: members.as_deref(),
            load_balancing: &service.load_balancing,
            origin: around.origin,
            endpoints,
        };
        let balancer = match before {
            Some(before) => {
                before.balancer.update(update, around.now);
                before.balancer.clone()
            }
            None => Arc::new(Balancer::new(update, around.now)),
        };
        let subset = subset.unwrap_or("");
        let hostname = &service.key.hostname;
        Self {
            balancer,
            settings,
            only_names,
            cluster: format!("outbound|{port}|{subset}|{hostname}").into(),
            reaches,
        }
    }

    /// How to reach what the balancer has picked.
    pub fn reach(&self, uid: &str) -> Option<Reach> {
        let reaches = self.reaches.load();
        let reach = reaches.now.get(uid).or_else(|| reaches.before.get(uid));
        reach.cloned()
    }

    /// All endpoints, in no order.
    pub fn reaches(&self) -> Vec<Reach> {
        self.reaches.load().now.values().cloned().collect()
    }
}

impl Reach {
    fn compile(
        workload: &Arc<Workload>,
        port: u16,
        entry: &ServiceEntry,
        originate: Option<&Arc<Originate>>,
        around: &Surroundings<'_>,
        before: Option<&Self>,
    ) -> Option<Self> {
        let endpoint = Endpoint::new(workload, port, Some(entry), originate)?;
        // What has not changed stays the same value: pools and metrics know it again.
        let endpoint = match before {
            Some(before) if *before.endpoint == endpoint => before.endpoint.clone(),
            _ => Arc::new(endpoint),
        };
        let peer = match before {
            Some(before) if Arc::ptr_eq(&before.workload, workload) => before.peer.clone(),
            _ => peer(workload),
        };
        Some(Self {
            workload: workload.clone(),
            endpoint,
            peer,
            policies: policies_of(workload, around.policies),
        })
    }

    /// A workload that was dialled itself.
    pub fn direct(
        workload: &Arc<Workload>,
        address: std::net::SocketAddr,
        policies: &HttpPolicies,
    ) -> Self {
        Self {
            workload: workload.clone(),
            endpoint: Arc::new(Endpoint::at(workload, address, None, None)),
            peer: peer(workload),
            policies: policies_of(workload, policies),
        }
    }
}

fn policies_of(workload: &Workload, policies: &HttpPolicies) -> Option<Arc<HttpPolicySet>> {
    let set = policies.for_workload(&workload.uid);
    (!set.is_empty()).then(|| Arc::new(set))
}

fn peer(workload: &Workload) -> Peer {
    let proven = workload.tunnel_protocol == TunnelProtocol::Hbone;
    Arc::new(WorkloadLabels {
        principal: proven.then(|| workload.identity.clone()),
        ..workload.into()
    })
}
