//! The balancer of one service, port and subset, shared by all workers.
//!
//! A pick loads the current [`Table`] and counts on atomics; it takes no lock and
//! allocates nothing. Changes (updates, ejections, returns) make a new table under a
//! lock. Returns need no timer: a pick that comes after one is due brings it about.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use adit_shared::model::{Workload, WorkloadUid};
use arc_swap::ArcSwap;
use http::{HeaderMap, Uri};
use parking_lot::Mutex;
use rand::Rng;

use super::endpoint::{Endpoint, EndpointState, Host};
use super::error::PickError;
use super::hash_key::Hashed;
use super::limits::{Limits, Permit};
use super::outcome::Outcome;
use super::outlier::{EjectionCause, EjectionEvent, EjectionStatus, Ejections};
use super::settings::TrafficSettings;
use super::table::{PickRequest, Plan, Table};
use super::update::Update;

/// Spreads the requests to one service, port and subset over its endpoints.
#[derive(Debug)]
pub struct Balancer {
    core: Arc<Core>,
}

#[derive(Debug)]
pub(super) struct Core {
    epoch: Instant,
    table: ArcSwap<Table>,
    /// Round-robin picks so far.
    turn: AtomicU64,
    /// Nanoseconds since the epoch at which [`Control::ejections`] has to be looked at.
    next_sweep: AtomicU64,
    limits: Arc<Limits>,
    control: Mutex<Control>,
}

#[derive(Debug)]
struct Control {
    plan: Plan,
    ejections: Ejections,
}

/// An endpoint that has been picked, and the request that counts as active at it until
/// this is dropped.
#[derive(Debug)]
pub struct Picked {
    host: Arc<Host>,
    _request: Option<Permit>,
}

/// An endpoint as it stands, for the admin endpoint and for metrics.
#[derive(Debug, Clone)]
pub struct EndpointStatus {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// It gets requests, unless it is ejected.
    pub ready: bool,
    /// Outlier detection has taken it out.
    pub ejected: bool,
    /// Requests in flight.
    pub active: u32,
    /// Requests since it is known.
    pub requests: u64,
    /// Smoothed time to an answer; `None`: not known.
    pub latency: Option<Duration>,
}

impl Balancer {
    /// The balancer of a service in its first state.
    pub fn new(update: Update<'_>, now: Instant) -> Self {
        let core = Arc::new_cyclic(|weak| {
            let limits = Arc::new(Limits::default());
            limits.apply(&update.settings);
            let (plan, ejections) = Control::plan(update, None, weak, now, 0);
            Core {
                epoch: now,
                table: ArcSwap::from_pointee(plan.table()),
                turn: AtomicU64::new(0),
                next_sweep: AtomicU64::new(u64::MAX),
                limits,
                control: Mutex::new(Control { plan, ejections }),
            }
        });
        Self { core }
    }

    /// Takes a new state over. What is known of endpoints that stay is kept; requests in
    /// flight go on.
    pub fn update(&self, update: Update<'_>, now: Instant) {
        let core = &self.core;
        let mut control = core.control.lock();
        core.limits.apply(&update.settings);
        let now = core.nanos(now);
        let weak = Arc::downgrade(core);
        let (plan, ejections) = Control::plan(update, Some(&control), &weak, core.epoch, now);
        *control = Control { plan, ejections };
        core.publish(&control);
    }

    /// What [`PickRequest::hash`] is for a request, and the cookie that its response has to
    /// set. `source` is the client's address.
    pub fn hash<R: Rng + ?Sized>(
        &self,
        headers: &HeaderMap,
        uri: &Uri,
        source: IpAddr,
        rng: &mut R,
    ) -> Hashed {
        let table = self.core.table.load();
        let balancer = &table.settings.load_balancer;
        match &balancer.hash_key {
            Some(key) if balancer.algorithm.is_consistent_hash() => {
                key.hash(headers, uri, source, rng)
            }
            _ => Hashed::default(),
        }
    }

    /// Chooses an endpoint for one request.
    ///
    /// # Errors
    ///
    /// Why there is none, or which limit is reached.
    pub fn pick<R: Rng + ?Sized>(
        &self,
        request: &PickRequest<'_>,
        now: Instant,
        rng: &mut R,
    ) -> Result<Picked, PickError> {
        let core = &*self.core;
        let now = core.nanos(now);
        if now >= core.next_sweep.load(Relaxed) {
            core.sweep(now);
        }
        let permit = core.limits.acquire_request()?;
        let table = core.table.load();
        let host = table.pick(request, &core.turn, now, rng)?.clone();
        host.state.begin();
        Ok(Picked {
            host,
            _request: permit,
        })
    }

    /// Returns endpoints whose ejection is over. Picks do so by themselves; this keeps
    /// the metrics of a service without requests right.
    pub fn sweep(&self, now: Instant) {
        let now = self.core.nanos(now);
        if now >= self.core.next_sweep.load(Relaxed) {
            self.core.sweep(now);
        }
    }

    /// The circuit breakers.
    pub fn limits(&self) -> &Arc<Limits> {
        &self.core.limits
    }

    /// The settings in force.
    pub fn settings(&self) -> Arc<TrafficSettings> {
        self.core.table.load().settings.clone()
    }

    /// Takes the ejections and returns since the last call, oldest first; at most
    /// [`super::MAX_EVENTS`] are kept.
    pub fn take_events(&self) -> Vec<EjectionEvent> {
        self.core.control.lock().ejections.take_events()
    }

    /// The counters of outlier detection.
    pub fn ejections(&self) -> EjectionStatus {
        self.core.control.lock().ejections.status()
    }

    /// Every endpoint as it stands, by uid.
    pub fn endpoints(&self, now: Instant) -> Vec<EndpointStatus> {
        let now_ms = self.core.millis(now);
        let table = self.core.table.load();
        let hosts = table.hosts().iter();
        hosts
            .map(|host| {
                let state = &host.state;
                let latency = state.latency(now_ms);
                EndpointStatus {
                    endpoint: host.endpoint.clone(),
                    ready: host.ready,
                    ejected: state.ejected.load(Relaxed),
                    active: state.active(),
                    requests: state.requests(),
                    latency: (latency > 0.0)
                        .then(|| Duration::from_secs_f64(f64::from(latency) / 1e6)),
                }
            })
            .collect()
    }
}

impl Picked {
    /// Where the request goes.
    pub fn workload(&self) -> &Arc<Workload> {
        &self.host.endpoint.workload
    }

    /// The workload's uid, for [`PickRequest::tried`] and for session persistence.
    pub fn uid(&self) -> &WorkloadUid {
        &self.host.endpoint.uid
    }

    /// The port at the workload.
    pub fn port(&self) -> u16 {
        self.host.endpoint.port
    }

    /// Tells how it went while the request goes on counting as active: an answer that is
    /// still being streamed. At most once for a pick.
    pub fn report(&self, outcome: Outcome, now: Instant) {
        let state = &*self.host.state;
        if let Some(latency) = outcome.latency {
            state.observe(latency, outcome.is_unanswered(), now);
        }
        let count = |counter: &AtomicU32| counter.fetch_add(1, Relaxed) + 1;
        let failures = &state.failures;
        if outcome.is_success() {
            failures.reset();
            return;
        }
        // Without a balancer nobody will pick the endpoint again.
        let Some(core) = state.core.upgrade() else {
            return;
        };
        let table = core.table.load();
        let Some(outlier) = &table.settings.outlier_detection else {
            return;
        };
        let reached = |counter: &AtomicU32, threshold: u32| {
            let reached = count(counter) >= threshold && threshold > 0;
            if reached {
                counter.store(0, Relaxed);
            }
            reached
        };
        let cause = if outcome.is_unanswered() && outlier.split_local_origin_errors {
            let threshold = outlier.consecutive_local_origin_failures;
            reached(&failures.local_origin, threshold).then_some(EjectionCause::LocalOrigin)
        } else {
            // It did answer.
            if outlier.split_local_origin_errors {
                super::endpoint::clear(&failures.local_origin);
            }
            let gateway = match outcome.is_gateway_error() {
                true => reached(&failures.gateway_errors, outlier.consecutive_gateway_errors),
                false => {
                    super::endpoint::clear(&failures.gateway_errors);
                    false
                }
            };
            let server = reached(&failures.server_errors, outlier.consecutive_5xx);
            match (server, gateway) {
                (true, _) => Some(EjectionCause::Consecutive5xx),
                (_, true) => Some(EjectionCause::GatewayErrors),
                _ => None,
            }
        };
        drop(table);
        if let Some(cause) = cause {
            core.eject(&self.host, cause, now);
        }
    }

    /// Tells how the request went and ends it.
    pub fn finish(self, outcome: Outcome, now: Instant) {
        self.report(outcome, now);
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.host.state.end();
    }
}

impl Core {
    fn nanos(&self, now: Instant) -> u64 {
        super::table::nanos(now.saturating_duration_since(self.epoch))
    }

    fn millis(&self, now: Instant) -> u32 {
        (self.nanos(now) / 1_000_000) as u32
    }

    fn publish(&self, control: &Control) {
        self.table.store(Arc::new(control.plan.table()));
        self.next_sweep
            .store(control.ejections.next_sweep(), Relaxed);
    }

    fn eject(&self, host: &Host, cause: EjectionCause, now: Instant) {
        let nanos = self.nanos(now);
        let mut control = self.control.lock();
        let Control { plan, ejections } = &mut *control;
        // It may have gone, or have come back as another one, meanwhile.
        let uid = &host.endpoint.uid;
        let known = plan
            .host(uid)
            .filter(|known| Arc::ptr_eq(&known.state, &host.state));
        let Some(known) = known else { return };
        let hosts = plan.hosts.iter().filter(|host| host.ready).count();
        let changed = plan
            .settings()
            .outlier_detection
            .as_ref()
            .is_some_and(|outlier| ejections.eject(known, cause, outlier, hosts, nanos));
        if changed {
            self.publish(&control);
        }
    }

    /// Somebody else who is at it already will do.
    fn sweep(&self, now: u64) {
        let Some(mut control) = self.control.try_lock() else {
            return;
        };
        let Control { plan, ejections } = &mut *control;
        if ejections.sweep(now, |uid| plan.host(uid).cloned()) {
            self.publish(&control);
        } else {
            self.next_sweep.store(ejections.next_sweep(), Relaxed);
        }
    }
}

impl Control {
    fn plan(
        update: Update<'_>,
        before: Option<&Self>,
        core: &Weak<Core>,
        epoch: Instant,
        now: u64,
    ) -> (Plan, Ejections) {
        let mut update = update;
        let endpoints = std::mem::take(&mut update.endpoints);
        let any = !endpoints.is_empty();
        let by_uid: BTreeMap<WorkloadUid, Endpoint> = endpoints
            .into_iter()
            .filter(|endpoint| {
                update
                    .subset
                    .is_none_or(|subset| subset.contains(&endpoint.uid))
            })
            .map(|endpoint| (endpoint.uid.clone(), endpoint))
            .collect();
        let allow_unhealthy = update.load_balancing.allow_unhealthy;
        let hosts: Vec<Arc<Host>> = by_uid
            .into_values()
            .map(|endpoint| {
                let old = before.and_then(|before| before.plan.host(&endpoint.uid));
                // A pod of a StatefulSet comes back under its uid, at another address.
                let same = |old: &&Arc<Host>| {
                    old.endpoint.workload.addresses == endpoint.workload.addresses
                };
                let old = old.filter(same);
                let ready = endpoint.weight > 0 && (endpoint.healthy || allow_unhealthy);
                let state = match old {
                    Some(old) => old.state.clone(),
                    None => Arc::new(EndpointState::new(core.clone(), epoch)),
                };
                state.set_ready(ready, old.is_some_and(|old| old.ready), now);
                Arc::new(Host {
                    endpoint,
                    ready,
                    state,
                })
            })
            .collect();
        let subset_empty = any && hosts.is_empty();
        let plan = Plan::new(
            &update,
            hosts,
            subset_empty,
            before.map(|before| &before.plan),
        );
        let mut ejections = match before {
            Some(before) => before.ejections.clone(),
            None => Ejections::default(),
        };
        let enabled = update.settings.outlier_detection.is_some();
        ejections.retain(enabled, |uid| plan.host(uid).cloned());
        (plan, ejections)
    }
}

impl Plan {
    pub(super) fn host(&self, uid: &str) -> Option<&Arc<Host>> {
        let found = self
            .hosts
            .binary_search_by(|host| (*host.endpoint.uid).cmp(uid));
        found.ok().map(|at| &self.hosts[at])
    }
}
