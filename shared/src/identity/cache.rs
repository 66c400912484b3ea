//! The certificates of the workloads on this node: fetched when they are wanted,
//! renewed before they end, forgotten when their workloads have gone.
//!
//! One task owns the schedule and runs at most eight fetches at a time, connections
//! that wait first. A fetch that fails is tried again after a pause that doubles from
//! half a second to 150 seconds; a certificate that is still valid stays in use
//! meanwhile. A connection that asks during such a pause gets the last error, or a new
//! try if the last one is more than a second old.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::queue::Queue;
use super::{
    CertificateAuthority, CertificateInvalid, CertificateRequest, Priority, SignError, SpiffeId,
    WorkloadCertificate, next_renewal,
};

/// Wall clock and timer differ after a suspend or a clock change: how often renewals
/// are checked against the wall clock.
const WALL_CLOCK_CHECK: Duration = Duration::from_secs(60);
/// A waiting connection triggers a new try no sooner than this after a failure.
const DEMAND_RETRY: Duration = Duration::from_secs(1);

/// Bounds and times of a [`CertificateCache`].
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Validity that is asked for (`SECRET_TTL`). Default 24 h.
    pub ttl: Duration,
    /// Fetches at the same time. Default 8.
    pub concurrency: usize,
    /// Deadline of one fetch. Default 10 s.
    pub fetch_deadline: Duration,
    /// First pause after a failure. Default 0.5 s.
    pub min_backoff: Duration,
    /// Longest pause after failures. Default 150 s.
    pub max_backoff: Duration,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 3600),
            concurrency: 8,
            fetch_deadline: Duration::from_secs(10),
            min_backoff: Duration::from_millis(500),
            max_backoff: Duration::from_secs(150),
        }
    }
}

/// The certificates of this node. Clones share them; when the last is dropped, the
/// fetching stops.
#[derive(Clone)]
pub struct CertificateCache {
    shared: Arc<Shared>,
}

/// Persistent, so that one new certificate does not copy all others.
type Available = imbl::HashMap<SpiffeId, Arc<WorkloadCertificate>>;
type Outcome = Result<Arc<WorkloadCertificate>, CertificateError>;

struct Shared {
    authority: Arc<dyn CertificateAuthority>,
    options: CacheOptions,
    /// What workers read, without a lock.
    available: ArcSwap<Available>,
    state: Mutex<State>,
    failures: Failures,
    /// Something became ready, or the last handle is gone.
    wake: Arc<Notify>,
}

/// Fetches that failed, by kind.
#[derive(Default)]
struct Failures {
    refused: AtomicU64,
    unreachable: AtomicU64,
    timeout: AtomicU64,
    unusable: AtomicU64,
}

impl Failures {
    fn count(&self, error: &CertificateError) {
        let counter = match error {
            CertificateError::Sign(SignError::Refused(_)) => &self.refused,
            CertificateError::Sign(SignError::Unreachable(_)) => &self.unreachable,
            CertificateError::Timeout(_) => &self.timeout,
            CertificateError::Sign(SignError::Malformed(_))
            | CertificateError::Invalid(_)
            | CertificateError::Key(_) => &self.unusable,
            CertificateError::Forgotten => return,
        };
        counter.fetch_add(1, Relaxed);
    }
}

struct State {
    entries: HashMap<SpiffeId, Entry>,
    queue: Queue<SpiffeId>,
    generation: u64,
}

struct Entry {
    /// Tells a fetch for this entry from one for an entry of the same name that was
    /// forgotten meanwhile.
    generation: u64,
    certificate: Option<Arc<WorkloadCertificate>>,
    renew_at: Option<SystemTime>,
    error: Option<CertificateError>,
    failed_at: Option<Instant>,
    backoff: Option<ExponentialBackoff>,
    fetching: bool,
    /// Holds the outcome of the last fetch; waiters watch it change.
    outcome: watch::Sender<Option<Outcome>>,
}

impl CertificateCache {
    /// A cache that asks `authority`. Its task runs on the current tokio runtime.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(authority: Arc<dyn CertificateAuthority>, options: CacheOptions) -> Self {
        let shared = Arc::new(Shared {
            authority,
            options,
            available: ArcSwap::default(),
            state: Mutex::new(State {
                entries: HashMap::new(),
                queue: Queue::new(),
                generation: 0,
            }),
            failures: Failures::default(),
            wake: Arc::new(Notify::new()),
        });
        tokio::spawn(run(Arc::downgrade(&shared), shared.wake.clone()));
        Self { shared }
    }

    /// The certificate of `identity` if there is a valid one; without waiting or locks.
    pub fn try_get(&self, identity: &SpiffeId) -> Option<Arc<WorkloadCertificate>> {
        let available = self.shared.available.load();
        let certificate = available.get(identity)?;
        certificate
            .is_valid_at(SystemTime::now())
            .then(|| certificate.clone())
    }

    /// The certificate of `identity`, fetched ahead of all others if there is none, and
    /// kept and renewed from then on until [`Self::forget`]. May be awaited on any tokio
    /// runtime with timers.
    ///
    /// # Errors
    /// [`CertificateError`] of the fetch that was waited for; of the last one when that
    /// was within the last second.
    pub async fn get(&self, identity: &SpiffeId) -> Outcome {
        if let Some(certificate) = self.try_get(identity) {
            return Ok(certificate);
        }
        let mut outcome = match self.shared.demand(identity) {
            Demand::Ready(certificate) => return Ok(certificate),
            Demand::Failed(error) => return Err(error),
            Demand::Wait(outcome) => outcome,
        };
        // The fetch has a deadline of its own; this one covers its time in the queue.
        let deadline = self.shared.options.fetch_deadline * 2;
        match timeout(deadline, outcome.changed()).await {
            Ok(Ok(())) => outcome
                .borrow_and_update()
                .clone()
                .unwrap_or(Err(CertificateError::Forgotten)),
            Ok(Err(_)) => Err(CertificateError::Forgotten),
            Err(_) => Err(CertificateError::Timeout(deadline)),
        }
    }

    /// Fetches and keeps the certificate of `identity` in the background: a workload of
    /// this node will want it.
    pub fn prefetch(&self, identity: &SpiffeId) {
        let mut state = self.shared.state.lock();
        if !state.entries.contains_key(identity) {
            state.insert(identity);
            state.queue.push(identity.clone(), Priority::Warmup);
            drop(state);
            self.shared.wake.notify_one();
        }
    }

    /// Drops the certificate of `identity` and stops renewing it. Connections that use
    /// it go on; who waits for it gets [`CertificateError::Forgotten`].
    pub fn forget(&self, identity: &SpiffeId) {
        let mut state = self.shared.state.lock();
        state.queue.remove(identity);
        state.entries.remove(identity);
        let available = self.shared.available.load().without(identity);
        self.shared.available.store(Arc::new(available));
    }

    /// How many fetches have failed since the start, by kind: refused by the authority,
    /// unreachable, not answered in time, answered with something unusable.
    pub fn failures(&self) -> [(&'static str, u64); 4] {
        let failures = &self.shared.failures;
        [
            ("refused", &failures.refused),
            ("unreachable", &failures.unreachable),
            ("timeout", &failures.timeout),
            ("unusable", &failures.unusable),
        ]
        .map(|(kind, count)| (kind, count.load(Relaxed)))
    }

    /// The state of every certificate, ordered by identity.
    pub fn snapshot(&self) -> Vec<CertificateStatus> {
        let now = SystemTime::now();
        let state = self.shared.state.lock();
        let mut all: Vec<_> = state
            .entries
            .iter()
            .map(|(identity, entry)| CertificateStatus {
                identity: identity.clone(),
                state: entry.state(now),
                certificate: entry.certificate.clone(),
                renew_at: entry.renew_at,
                last_error: entry.error.clone(),
            })
            .collect();
        drop(state);
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }
}

enum Demand {
    Ready(Arc<WorkloadCertificate>),
    Wait(watch::Receiver<Option<Outcome>>),
    Failed(CertificateError),
}

impl Shared {
    /// A connection wants `identity` now.
    fn demand(&self, identity: &SpiffeId) -> Demand {
        let mut state = self.state.lock();
        let known = state.entries.contains_key(identity);
        if !known {
            state.insert(identity);
        }
        let State { entries, queue, .. } = &mut *state;
        // Inserted above if it was missing.
        let Some(entry) = entries.get(identity) else {
            return Demand::Failed(CertificateError::Forgotten);
        };
        let now = SystemTime::now();
        if let Some(certificate) = entry.certificate.as_ref().filter(|c| c.is_valid_at(now)) {
            return Demand::Ready(certificate.clone());
        }
        let receiver = entry.outcome.subscribe();
        if entry.fetching {
            return Demand::Wait(receiver);
        }
        let recent = entry
            .failed_at
            .is_some_and(|at| at.elapsed() < DEMAND_RETRY);
        if let (true, Some(error)) = (recent, &entry.error) {
            return Demand::Failed(error.clone());
        }
        queue.push(identity.clone(), Priority::Realtime);
        drop(state);
        self.wake.notify_one();
        Demand::Wait(receiver)
    }

    /// Makes a key, has it certified and checks the result.
    async fn fetch(&self, identity: &SpiffeId) -> Outcome {
        let request =
            CertificateRequest::new(identity).map_err(|e| CertificateError::Key(e.to_string()))?;
        let deadline = self.options.fetch_deadline;
        let signing = self
            .authority
            .sign(identity, request.csr_pem(), self.options.ttl);
        let signed = timeout(deadline, signing)
            .await
            .map_err(|_| CertificateError::Timeout(deadline))??;
        let now = SystemTime::now();
        let certificate = WorkloadCertificate::new(identity, signed, request.into_key(), now)?;
        Ok(Arc::new(certificate))
    }

    /// Files the outcome of a fetch and plans the next one.
    fn complete(&self, identity: &SpiffeId, generation: u64, outcome: Outcome) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let State { entries, queue, .. } = &mut *state;
        let Some(entry) = entries.get_mut(identity) else {
            return;
        };
        if entry.generation != generation {
            return;
        }
        entry.fetching = false;
        match &outcome {
            Ok(certificate) => {
                let (from, to) = (certificate.not_before(), certificate.not_after());
                let renew_at = next_renewal(from, to, rand::random());
                let wait = renew_at
                    .duration_since(SystemTime::now())
                    .unwrap_or_default()
                    // An authority whose certificates are past their half when they
                    // arrive is not asked without pause.
                    .max(self.options.min_backoff);
                tracing::debug!(%identity, serial = certificate.facts().serial, "certificate fetched");
                // The state's lock is held: nobody else replaces the map.
                let available = self.available.load();
                let available = available.update(identity.clone(), certificate.clone());
                self.available.store(Arc::new(available));
                entry.certificate = Some(certificate.clone());
                entry.renew_at = Some(renew_at);
                entry.error = None;
                entry.failed_at = None;
                entry.backoff = None;
                queue.push_later(identity.clone(), now + wait, Priority::Background);
            }
            Err(error) => {
                self.failures.count(error);
                let pause = entry
                    .backoff
                    .get_or_insert_with(|| backoff(&self.options))
                    .next()
                    .unwrap_or(self.options.max_backoff)
                    .min(self.options.max_backoff);
                let kept = entry.is_valid(SystemTime::now());
                tracing::warn!(%identity, %error, retry_in = ?pause, kept, "certificate not fetched");
                entry.error = Some(error.clone());
                entry.failed_at = Some(now);
                let priority = if kept {
                    Priority::Background
                } else {
                    Priority::Warmup
                };
                queue.push_later(identity.clone(), now + pause, priority);
            }
        }
        entry.outcome.send_replace(Some(outcome));
    }

    /// Takes the next identity that is to be fetched now.
    fn take(&self) -> Option<(SpiffeId, u64)> {
        let mut state = self.state.lock();
        let State { entries, queue, .. } = &mut *state;
        loop {
            let identity = queue.pop(Instant::now())?;
            if let Some(entry) = entries.get_mut(&identity) {
                entry.fetching = true;
                return Some((identity, entry.generation));
            }
        }
    }

    /// Makes renewals ready that the wall clock says are due.
    fn check_wall_clock(&self, now: SystemTime) {
        let mut state = self.state.lock();
        let State { entries, queue, .. } = &mut *state;
        for (identity, entry) in entries {
            let due = entry.renew_at.is_some_and(|at| at <= now);
            // One that failed is in its pause.
            if due && !entry.fetching && entry.error.is_none() {
                queue.push(identity.clone(), Priority::Background);
            }
        }
    }

    fn next_due(&self) -> Instant {
        let check = Instant::now() + WALL_CLOCK_CHECK;
        let due = self.state.lock().queue.next_due();
        due.map_or(check, |due| due.min(check))
    }
}

impl State {
    fn insert(&mut self, identity: &SpiffeId) {
        self.generation += 1;
        let entry = Entry {
            generation: self.generation,
            certificate: None,
            renew_at: None,
            error: None,
            failed_at: None,
            backoff: None,
            fetching: false,
            outcome: watch::Sender::new(None),
        };
        self.entries.insert(identity.clone(), entry);
    }
}

impl Entry {
    fn is_valid(&self, now: SystemTime) -> bool {
        self.certificate
            .as_ref()
            .is_some_and(|c| c.is_valid_at(now))
    }

    fn state(&self, now: SystemTime) -> CertificateState {
        match &self.error {
            _ if self.is_valid(now) => CertificateState::Available,
            Some(error) => CertificateState::Unavailable(error.clone()),
            None => CertificateState::Initializing,
        }
    }
}

fn backoff(options: &CacheOptions) -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(options.min_backoff)
        .with_max_delay(options.max_backoff)
        .with_jitter()
        .without_max_times()
        .build()
}

/// Runs the schedule until the last handle is dropped.
async fn run(cache: Weak<Shared>, wake: Arc<Notify>) {
    let mut fetches = JoinSet::new();
    loop {
        let due: Option<Instant> = {
            let Some(shared) = cache.upgrade() else {
                return;
            };
            shared.check_wall_clock(SystemTime::now());
            while fetches.len() < shared.options.concurrency {
                let Some((identity, generation)) = shared.take() else {
                    break;
                };
                let shared = shared.clone();
                fetches.spawn(async move {
                    let outcome = shared.fetch(&identity).await;
                    shared.complete(&identity, generation, outcome);
                });
            }
            // With all slots taken only the end of a fetch can start another.
            (fetches.len() < shared.options.concurrency).then(|| shared.next_due())
        };
        let due = due.unwrap_or_else(|| Instant::now() + WALL_CLOCK_CHECK);
        tokio::select! {
            () = wake.notified() => {}
            Some(_) = fetches.join_next(), if !fetches.is_empty() => {}
            () = tokio::time::sleep_until(due) => {}
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

/// The state of one certificate, for the admin interface.
#[derive(Debug, Clone)]
pub struct CertificateStatus {
    /// Whose.
    pub identity: SpiffeId,
    /// Whether it can be used.
    pub state: CertificateState,
    /// The certificate, even when it has expired.
    pub certificate: Option<Arc<WorkloadCertificate>>,
    /// When it will be renewed.
    pub renew_at: Option<SystemTime>,
    /// Why the last fetch failed, if it did.
    pub last_error: Option<CertificateError>,
}

/// Whether a certificate can be used.
#[derive(Debug, Clone)]
pub enum CertificateState {
    /// It is valid now.
    Available,
    /// It has not been fetched yet.
    Initializing,
    /// There is no valid one, and this is why.
    Unavailable(CertificateError),
}

/// Why there is no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CertificateError {
    /// The authority gave none.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The authority gave one that cannot be used.
    #[error("unusable certificate: {0}")]
    Invalid(#[from] CertificateInvalid),
    /// No key could be made.
    #[error("{0}")]
    Key(String),
    /// The authority did not answer in time.
    #[error("no certificate within {0:?}")]
    Timeout(Duration),
    /// The last workload with this identity has gone.
    #[error("the identity is no longer wanted on this node")]
    Forgotten,
}

#[cfg(test)]
mod tests;
