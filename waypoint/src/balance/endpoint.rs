//! One endpoint, as it is configured and as it does.
//!
//! What is configured ([`Endpoint`]) comes anew with each update. What it does
//! ([`EndpointState`]) is a few atomics that all workers write and that survive updates,
//! for as long as the workload is the same one.

use std::net::IpAddr;
use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use adit_shared::model::{Health, ServiceEntry, Workload, WorkloadUid};

use super::balancer::Core;
use super::group::{LATENCY_FLOOR_US, LATENCY_MARGIN};

/// Time over which answers are averaged.
const AVERAGE_MS: f32 = 2_000.0;
/// Time in which a latency is forgotten when no answers come, so that an endpoint that
/// was slow is tried again. Longer than [`AVERAGE_MS`]: a good answer after a pause must
/// not make the endpoint look worse than the pause has.
const FORGET_MS: f32 = 5_000.0;
/// By how much one answer can raise the latency: not beyond what counts as equally fast, so that
/// one hiccup turns nobody away. A slow endpoint is known after a handful of requests.
const LATENCY_RISE: f32 = LATENCY_MARGIN;
/// What a failure without an answer counts at least; otherwise an endpoint that fails
/// fast would be the most attractive one.
const FAILURE_LATENCY_US: f32 = 10_000.0;
/// Nothing counts as slower.
const MAX_LATENCY_US: f32 = 60_000_000.0;

/// Where the number of requests begins in [`EndpointState::requests`]. Those in flight are
/// fewer than 16 million: each has a task and a buffer.
const REQUEST: u64 = 1 << 24;

/// An endpoint as the configuration has it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The workload's uid: what its state is kept by.
    pub uid: WorkloadUid,
    /// The workload.
    pub workload: Arc<Workload>,
    /// The port at the workload.
    pub port: u16,
    /// Its share; 0: none.
    pub weight: u32,
    /// It may be given requests.
    pub healthy: bool,
}

impl Endpoint {
    /// The endpoint that `workload` is at `port`, with its capacity as weight.
    pub fn new(workload: Arc<Workload>, port: u16) -> Self {
        Self {
            uid: workload.uid.clone(),
            port,
            weight: workload.capacity,
            healthy: workload.health == Health::Healthy,
            workload,
        }
    }

    /// The endpoints of `service_port` that can be reached from `network`: those with the
    /// port, and with an address there or a name to look up.
    pub fn of_service(entry: &ServiceEntry, service_port: u16, network: &str) -> Vec<Self> {
        let service = entry.service();
        let port_at = |workload: &Workload| {
            let own = workload.ports_of(&service.key).into_iter().flatten();
            own.filter(|port| port.service_port == service_port)
                .find_map(|port| port.target_port)
                .or_else(|| service.port(service_port)?.target_port)
                // An app behind a tunnel that takes any port.
                .or_else(|| workload.application_tunnel?.port.map(|_| service_port))
        };
        let reachable = |workload: &Workload| {
            let named = !workload.addresses.is_empty() || !workload.hostname.is_empty();
            &*workload.network == network && named
        };
        let workloads = entry.endpoints().iter();
        workloads
            .filter(|workload| reachable(workload))
            .filter_map(|workload| Some(Self::new(workload.clone(), port_at(workload)?)))
            .collect()
    }

    /// Whether it can be reached at `address`.
    pub(super) fn has_address(&self, address: IpAddr) -> bool {
        self.workload.addresses.contains(&address)
    }
}

/// An endpoint of one table: configuration and state.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) endpoint: Endpoint,
    /// It gets requests, unless it is ejected.
    pub(super) ready: bool,
    pub(super) state: Arc<EndpointState>,
}

/// What an endpoint does. On cache lines of its own: workers write it with each request.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct EndpointState {
    pub(super) core: Weak<Core>,
    /// What times are counted from.
    epoch: Instant,
    /// Requests in flight in the lower 24 bits, requests ever above: one write for both.
    requests: AtomicU64,
    /// Latency in microseconds (`f32`; 0: not known) and the millisecond of the last
    /// answer, in one word so that both change together.
    latency: AtomicU64,
    /// Nanoseconds since the balancer's epoch at which it became ready.
    ready_since: AtomicU64,
    /// It has been ready at some time.
    was_ready: AtomicBool,
    pub(super) ejected: AtomicBool,
    pub(super) failures: Failures,
}

/// Failures in a row.
#[derive(Debug, Default)]
pub(super) struct Failures {
    pub(super) server_errors: AtomicU32,
    pub(super) gateway_errors: AtomicU32,
    pub(super) local_origin: AtomicU32,
}

impl Failures {
    pub(super) fn reset(&self) {
        for counter in [
            &self.server_errors,
            &self.gateway_errors,
            &self.local_origin,
        ] {
            clear(counter);
        }
    }
}

/// Sets to zero without taking the cache line from others when it is zero already.
pub(super) fn clear(counter: &AtomicU32) {
    if counter.load(Relaxed) != 0 {
        counter.store(0, Relaxed);
    }
}

impl EndpointState {
    pub(super) fn new(core: Weak<Core>, epoch: Instant) -> Self {
        Self {
            core,
            epoch,
            requests: AtomicU64::new(0),
            latency: AtomicU64::new(0),
            ready_since: AtomicU64::new(0),
            was_ready: AtomicBool::new(false),
            ejected: AtomicBool::new(false),
            failures: Failures::default(),
        }
    }

    pub(super) fn begin(&self) {
        self.requests.fetch_add(REQUEST + 1, Relaxed);
    }

    pub(super) fn end(&self) {
        self.requests.fetch_sub(1, Relaxed);
    }

    /// Requests in flight.
    pub(super) fn active(&self) -> u32 {
        (self.requests.load(Relaxed) % REQUEST) as u32
    }

    /// Requests ever.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Relaxed) / REQUEST
    }

    /// Smoothed latency in microseconds, faded by the time since the last answer; 0: not
    /// known.
    pub(super) fn latency(&self, now_ms: u32) -> f32 {
        let word = self.latency.load(Relaxed);
        let (latency, at) = unpack(word);
        latency * fade(now_ms.wrapping_sub(at), FORGET_MS)
    }

    /// It is too fast to count as slower than any other, whatever time has passed.
    pub(super) fn is_fast(&self) -> bool {
        unpack(self.latency.load(Relaxed)).0 <= LATENCY_FLOOR_US * LATENCY_MARGIN
    }

    /// Takes an answer into account: up at once, though not by more than
    /// [`LATENCY_RISE`], down over [`AVERAGE_MS`] (a peak EWMA, as linkerd's).
    pub(super) fn observe(&self, latency: Duration, failed: bool, now: Instant) {
        let now_ms = now.saturating_duration_since(self.epoch).as_millis() as u32;
        let sample = latency.as_micros() as f32;
        let sample = match failed {
            true => sample.max(FAILURE_LATENCY_US),
            false => sample,
        };
        let sample = sample.clamp(1.0, MAX_LATENCY_US);
        // A lost race loses one sample of two that came at the same time.
        let (before, at) = unpack(self.latency.load(Relaxed));
        let keep = fade(now_ms.wrapping_sub(at), AVERAGE_MS);
        let after = if before == 0.0 {
            // The first answer of an app says little of the next ones.
            sample.min(LATENCY_FLOOR_US * LATENCY_RISE)
        } else if sample > before {
            // A failure says nothing of how slow the endpoint is, but all of its kind
            // should soon count the same.
            sample.min(before.max(250.0) * LATENCY_RISE)
        } else {
            before * keep + sample * (1.0 - keep)
        };
        self.latency.store(pack(after, now_ms), Relaxed);
    }

    /// Notes whether it is ready now; an endpoint that becomes ready starts slowly.
    pub(super) fn set_ready(&self, ready: bool, was: bool, now: u64) {
        if ready {
            if !was {
                self.ready_since.store(now, Relaxed);
            }
            self.was_ready.store(true, Release);
        }
    }

    pub(super) fn ready_since(&self) -> u64 {
        self.ready_since.load(Relaxed)
    }

    pub(super) fn was_ready(&self) -> bool {
        self.was_ready.load(Acquire)
    }
}

fn pack(latency: f32, at: u32) -> u64 {
    u64::from(latency.to_bits()) << 32 | u64::from(at)
}

fn unpack(word: u64) -> (f32, u32) {
    (f32::from_bits((word >> 32) as u32), word as u32)
}

/// About `exp(-elapsed / period)`, by the first terms of its series: cheaper, and no two
/// endpoints are told apart by the rest.
fn fade(elapsed_ms: u32, period_ms: f32) -> f32 {
    let x = elapsed_ms as f32 / period_ms;
    1.0 / (1.0 + x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x / 24.0))))
}
