//! Circuit breakers: how many connections, waiting requests, requests and retries a
//! service may have at once, all workers together.
//!
//! A place is a [`Permit`]; dropping it gives the place back. A limit that is lowered
//! takes nobody's place away: it refuses until enough have gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use super::error::{PickError, Resource};
use super::settings::TrafficSettings;

/// Requests that may wait for connections of one service where the user sets no limit.
/// Istio has none; this one bounds memory.
pub const DEFAULT_MAX_PENDING: u32 = 65_536;

/// The limits of one service, port and subset, and how much of them is in use.
#[derive(Debug)]
pub struct Limits {
    connections: Gauge,
    pending: Gauge,
    requests: Gauge,
    retries: Gauge,
    /// `f32` percent in the upper half, the minimum in the lower; or [`NO_BUDGET`].
    retry_budget: AtomicU64,
    max_requests_per_connection: AtomicU32,
    /// Somebody wants to know the number of requests.
    counts_requests: std::sync::atomic::AtomicBool,
}

/// No `f32` between 0 and 100 looks like this.
const NO_BUDGET: u64 = u64::MAX;

#[derive(Debug)]
struct Gauge {
    active: AtomicU32,
    max: AtomicU32,
    refused: AtomicU64,
}

/// A place under a limit, given back when dropped.
#[derive(Debug)]
pub struct Permit {
    limits: Arc<Limits>,
    resource: Resource,
}

/// One limit as it stands, for metrics and the admin endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitStatus {
    /// In use.
    pub active: u32,
    /// The limit; `u32::MAX`: none.
    pub max: u32,
    /// How often somebody was refused.
    pub refused: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let limits = Self {
            connections: Gauge::default(),
            pending: Gauge::default(),
            requests: Gauge::default(),
            retries: Gauge::default(),
            retry_budget: AtomicU64::new(NO_BUDGET),
            max_requests_per_connection: AtomicU32::new(0),
            counts_requests: false.into(),
        };
        limits.pending.max.store(DEFAULT_MAX_PENDING, Relaxed);
        limits
    }
}

impl Limits {
    /// Takes a place.
    ///
    /// # Errors
    ///
    /// [`PickError::Overflow`] with the limit that is reached.
    pub fn acquire(self: &Arc<Self>, resource: Resource) -> Result<Permit, PickError> {
        let granted = match resource {
            Resource::Retries | Resource::RetryBudget => return self.acquire_retry(),
            resource => self.gauge(resource).acquire(),
        };
        match granted {
            true => Ok(self.permit(resource)),
            false => Err(PickError::Overflow(resource)),
        }
    }

    /// A place for a retry: under the budget where there is one, else under the limit
    /// (Envoy's `retry_budget` overrides `max_retries`).
    fn acquire_retry(self: &Arc<Self>) -> Result<Permit, PickError> {
        let (granted, resource) = match self.retries_in_budget() {
            Some(max) => (self.retries.acquire_up_to(max), Resource::RetryBudget),
            None => (self.retries.acquire(), Resource::Retries),
        };
        match granted {
            true => Ok(self.permit(Resource::Retries)),
            false => Err(PickError::Overflow(resource)),
        }
    }

    /// How many retries the budget allows now.
    fn retries_in_budget(&self) -> Option<u32> {
        let budget = self.retry_budget.load(Relaxed);
        if budget == NO_BUDGET {
            return None;
        }
        let percent = f32::from_bits((budget >> 32) as u32);
        let in_flight = self
            .requests
            .active
            .load(Relaxed)
            .saturating_add(self.pending.active.load(Relaxed));
        let share = (f64::from(in_flight) * f64::from(percent) / 100.0) as u32;
        Some(share.max(budget as u32))
    }

    /// Requests that one connection may carry; `None`: any number.
    pub fn max_requests_per_connection(&self) -> Option<u32> {
        match self.max_requests_per_connection.load(Relaxed) {
            0 => None,
            max => Some(max),
        }
    }

    /// One limit as it stands.
    pub fn status(&self, resource: Resource) -> LimitStatus {
        let gauge = self.gauge(resource);
        LimitStatus {
            active: gauge.active.load(Relaxed),
            max: match resource {
                Resource::RetryBudget => self.retries_in_budget().unwrap_or(u32::MAX),
                _ => gauge.max.load(Relaxed),
            },
            refused: gauge.refused.load(Relaxed),
        }
    }

    /// A place among the requests, where their number matters to anybody: counting them
    /// on one cache line for all workers is not free.
    pub(super) fn acquire_request(self: &Arc<Self>) -> Result<Option<Permit>, PickError> {
        if !self.counts_requests.load(Relaxed) {
            return Ok(None);
        }
        self.acquire(Resource::Requests).map(Some)
    }

    pub(super) fn apply(&self, settings: &TrafficSettings) {
        let pool = &settings.connection_pool;
        let set = |gauge: &Gauge, max: Option<std::num::NonZeroU32>, default| {
            gauge
                .max
                .store(max.map_or(default, |max| max.get()), Relaxed);
        };
        set(&self.connections, pool.max_connections, u32::MAX);
        set(
            &self.pending,
            pool.max_pending_requests,
            DEFAULT_MAX_PENDING,
        );
        set(&self.requests, pool.max_requests, u32::MAX);
        set(&self.retries, pool.max_retries, u32::MAX);
        let budget = settings.retry_budget.map_or(NO_BUDGET, |budget| {
            let percent = budget.percent as f32;
            u64::from(percent.to_bits()) << 32 | u64::from(budget.min_retries)
        });
        self.retry_budget.store(budget, Relaxed);
        let per_connection = pool.max_requests_per_connection;
        self.max_requests_per_connection
            .store(per_connection.map_or(0, |max| max.get()), Relaxed);
        let counts = pool.max_requests.is_some() || settings.retry_budget.is_some();
        self.counts_requests.store(counts, Relaxed);
    }

    fn permit(self: &Arc<Self>, resource: Resource) -> Permit {
        Permit {
            limits: self.clone(),
            resource,
        }
    }

    fn gauge(&self, resource: Resource) -> &Gauge {
        match resource {
            Resource::Connections => &self.connections,
            Resource::Pending => &self.pending,
            Resource::Requests => &self.requests,
            Resource::Retries | Resource::RetryBudget => &self.retries,
        }
    }
}

impl Default for Gauge {
    fn default() -> Self {
        Self {
            active: AtomicU32::new(0),
            max: AtomicU32::new(u32::MAX),
            refused: AtomicU64::new(0),
        }
    }
}

impl Gauge {
    fn acquire(&self) -> bool {
        self.acquire_up_to(self.max.load(Relaxed))
    }

    fn acquire_up_to(&self, max: u32) -> bool {
        // A loop and not an addition that is taken back: that would refuse others who
        // look meanwhile.
        let granted = self
            .active
            .fetch_update(Relaxed, Relaxed, |active| {
                (active < max).then(|| active + 1)
            })
            .is_ok();
        if !granted {
            self.refused.fetch_add(1, Relaxed);
        }
        granted
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let gauge = self.limits.gauge(self.resource);
        gauge.active.fetch_sub(1, Relaxed);
    }
}
