//! Outlier detection: endpoints that fail several times in a row are taken out for a
//! while.
//!
//! *What trips it*: consecutive 5xx answers, gateway errors, or failures without an
//! answer, counted per endpoint by all workers ([`super::Picked::report`]); the counter
//! that has reached its threshold starts anew, whether or not the ejection is carried out.
//! *What bounds it*: `max_ejection_percent` of the ready endpoints; beyond it the
//! endpoint stays, and the refusal is counted. *How it recovers*: after the base time,
//! times the number of ejections so far, the endpoint is back with clean counters; no
//! probe is sent. Each interval without an ejection forgives one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use adit_shared::model::WorkloadUid;

use super::endpoint::Host;
use super::settings::OutlierDetection;
use super::table::nanos;

/// Events that wait to be taken; the oldest are dropped beyond that.
pub const MAX_EVENTS: usize = 1024;

/// Why an endpoint was ejected, or would have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EjectionCause {
    /// `consecutive_5xx`
    Consecutive5xx,
    /// `consecutive_gateway_failure`
    GatewayErrors,
    /// `consecutive_local_origin_failure`
    LocalOrigin,
}

impl EjectionCause {
    /// Envoy's name, as in its metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "consecutive_5xx",
            Self::GatewayErrors => "consecutive_gateway_failure",
            Self::LocalOrigin => "consecutive_local_origin_failure",
        }
    }
}

/// Something that outlier detection did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EjectionEvent {
    /// The endpoint.
    pub uid: WorkloadUid,
    /// What was done to it.
    pub change: EjectionChange,
}

/// What outlier detection did to an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EjectionChange {
    /// Taken out.
    Ejected {
        /// Why.
        cause: EjectionCause,
        /// For how long.
        duration: Duration,
        /// How many times now, as far as it is remembered.
        times: u32,
    },
    /// Back in.
    Returned,
    /// Not taken out, for too many are out already.
    Refused {
        /// Why it would have been.
        cause: EjectionCause,
    },
}

/// Counters of outlier detection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EjectionStatus {
    /// Endpoints that are out now.
    pub active: usize,
    /// Ejections for [`EjectionCause::Consecutive5xx`].
    pub consecutive_5xx: u64,
    /// Ejections for [`EjectionCause::GatewayErrors`].
    pub gateway_errors: u64,
    /// Ejections for [`EjectionCause::LocalOrigin`].
    pub local_origin: u64,
    /// Ejections refused because of `max_ejection_percent`.
    pub refused: u64,
}

/// Which endpoints are or have been out. Times are in nanoseconds since the epoch.
#[derive(Debug, Clone, Default)]
pub(super) struct Ejections {
    records: BTreeMap<WorkloadUid, Record>,
    /// When the next interval ends; none while there are no records.
    interval_end: Option<u64>,
    interval: u64,
    events: VecDeque<EjectionEvent>,
    counters: EjectionStatus,
}

#[derive(Debug, Clone)]
struct Record {
    /// Out until then.
    until: Option<u64>,
    /// Ejections that are not forgiven.
    times: u32,
}

impl Ejections {
    /// Ejects `host` unless too many of `hosts` are out. Returns whether it did.
    pub(super) fn eject(
        &mut self,
        host: &Host,
        cause: EjectionCause,
        settings: &OutlierDetection,
        hosts: usize,
        now: u64,
    ) -> bool {
        let uid = &host.endpoint.uid;
        if host.state.ejected.load(Relaxed) {
            return false;
        }
        // Envoy since 1.31: the one to be ejected counts, so that 10 % of nine is none.
        let out = (self.active() + 1) * 100;
        if out > usize::from(settings.max_ejection_percent) * hosts {
            self.counters.refused += 1;
            self.note(uid, EjectionChange::Refused { cause });
            return false;
        }
        let record = self.records.entry(uid.clone()).or_insert(Record {
            until: None,
            times: 0,
        });
        record.times = record.times.saturating_add(1);
        let longest = OutlierDetection::MAX_EJECTION_TIME.max(settings.base_ejection_time);
        let duration = settings
            .base_ejection_time
            .saturating_mul(record.times)
            .min(longest);
        // More ejections than the longest time needs would only have to be forgiven.
        if duration == longest {
            let base = settings.base_ejection_time.as_nanos().max(1);
            let enough = longest.as_nanos().div_ceil(base);
            record.times = record.times.min(u32::try_from(enough).unwrap_or(u32::MAX));
        }
        record.until = Some(now.saturating_add(nanos(duration)));
        let times = record.times;
        self.interval = nanos(settings.interval).max(1);
        self.interval_end
            .get_or_insert(now.saturating_add(self.interval));
        host.state.ejected.store(true, Relaxed);
        let counter = match cause {
            EjectionCause::Consecutive5xx => &mut self.counters.consecutive_5xx,
            EjectionCause::GatewayErrors => &mut self.counters.gateway_errors,
            EjectionCause::LocalOrigin => &mut self.counters.local_origin,
        };
        *counter += 1;
        let change = EjectionChange::Ejected {
            cause,
            duration,
            times,
        };
        self.note(uid, change);
        true
    }

    /// Returns those whose time is over and forgives. Returns whether any came back.
    pub(super) fn sweep(
        &mut self,
        now: u64,
        host: impl Fn(&WorkloadUid) -> Option<Arc<Host>>,
    ) -> bool {
        let forgiven = match self.interval_end {
            Some(end) if end <= now => {
                let intervals = 1 + (now - end) / self.interval;
                let end = end.saturating_add(intervals.saturating_mul(self.interval));
                self.interval_end = Some(end);
                u32::try_from(intervals).unwrap_or(u32::MAX)
            }
            _ => 0,
        };
        let mut returned = Vec::new();
        self.records.retain(|uid, record| match record.until {
            Some(until) if until <= now => {
                record.until = None;
                returned.push(uid.clone());
                true
            }
            Some(_) => true,
            None => {
                record.times = record.times.saturating_sub(forgiven);
                record.times > 0
            }
        });
        for uid in &returned {
            if let Some(host) = host(uid) {
                admit(&host);
            }
            self.note(uid, EjectionChange::Returned);
        }
        if self.records.is_empty() {
            self.interval_end = None;
        }
        !returned.is_empty()
    }

    /// Forgets endpoints that are gone or are others now; all of them if outlier
    /// detection has been switched off.
    pub(super) fn retain(
        &mut self,
        enabled: bool,
        host: impl Fn(&WorkloadUid) -> Option<Arc<Host>>,
    ) {
        let mut returned = Vec::new();
        self.records.retain(|uid, record| {
            let Some(host) = host(uid) else { return false };
            let stays = host.state.ejected.load(Relaxed) || record.until.is_none();
            if stays && !enabled && record.until.is_some() {
                admit(&host);
                returned.push(uid.clone());
            }
            stays && enabled
        });
        for uid in &returned {
            self.note(uid, EjectionChange::Returned);
        }
        if self.records.is_empty() {
            self.interval_end = None;
        }
    }

    /// When there is something to do next; `u64::MAX`: nothing.
    pub(super) fn next_sweep(&self) -> u64 {
        let returns = self.records.values().filter_map(|record| record.until);
        returns.chain(self.interval_end).min().unwrap_or(u64::MAX)
    }

    pub(super) fn status(&self) -> EjectionStatus {
        EjectionStatus {
            active: self.active(),
            ..self.counters
        }
    }

    pub(super) fn take_events(&mut self) -> Vec<EjectionEvent> {
        self.events.drain(..).collect()
    }

    fn active(&self) -> usize {
        let records = self.records.values();
        records.filter(|record| record.until.is_some()).count()
    }

    fn note(&mut self, uid: &WorkloadUid, change: EjectionChange) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        let uid = uid.clone();
        self.events.push_back(EjectionEvent { uid, change });
    }
}

/// Lets an endpoint back in, with nothing held against it.
fn admit(host: &Host) {
    host.state.failures.reset();
    host.state.ejected.store(false, Relaxed);
}
