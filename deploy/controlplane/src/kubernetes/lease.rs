//! Which replica writes: an election over a `coordination.k8s.io` Lease.
//!
//! Every replica serves; one of them writes status and runs the waypoints. The rules are
//! client-go's. A holder renews every [`Timing::retry`] and counts as the leader until
//! [`Timing::renew_deadline`] after it *began* the last request that succeeded. The others
//! take over when they have watched the record stay the same for [`Timing::lease`], which
//! is longer, so that what the old leader has under way is over by then. Nobody compares
//! the times that stand in the record: clocks of different nodes may differ by any amount,
//! and only how long something was observed counts.
//!
//! [`Election`] decides and is pure; [`Elector`] asks it, and speaks with the API server.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::apply::{Failure, RequestError, request};
use super::{FIELD_MANAGER, Kubernetes};

/// The Lease of the replica that writes. Control planes of another revision have another.
pub const LEADER: &str = "adit-leader";

/// How long a holder that stops tries to give the Lease back.
const RELEASE_DEADLINE: Duration = Duration::from_secs(3);

/// The times of an election, which all candidates have to agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// A record that has not changed for so long is free.
    pub lease: Duration,
    /// A holder that could not renew for so long leads no more.
    pub renew_deadline: Duration,
    /// Pause between tries.
    pub retry: Duration,
}

impl Default for Timing {
    /// client-go's.
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// What a candidate does next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Writes this, and leads if that succeeds.
    Write(LeaseSpec),
    /// Asks again later: somebody else holds it.
    Wait,
}

/// One candidate's view of the Lease.
#[derive(Debug)]
pub struct Election {
    identity: Arc<str>,
    timing: Timing,
    /// The record as it was seen last, and since when.
    seen: Option<(LeaseSpec, Instant)>,
    /// When the last request was begun that made or kept us the holder.
    renewed: Option<Instant>,
}

impl Election {
    /// A candidate that has seen nothing yet. `identity` is this process's and nobody else's.
    pub fn new(identity: impl Into<Arc<str>>, timing: Timing) -> Self {
        Self {
            identity: identity.into(),
            timing,
            seen: None,
            renewed: None,
        }
    }

    /// Decides by the record that there is; `None`: there is no Lease. `wall_clock` goes
    /// into the record for people to read.
    pub fn observe(
        &mut self,
        live: Option<&LeaseSpec>,
        now: Instant,
        wall_clock: Timestamp,
    ) -> Step {
        let Some(live) = live else {
            self.renewed = None;
            return Step::Write(self.claim(None, wall_clock));
        };
        let since = match &self.seen {
            Some((seen, since)) if seen == live => *since,
            _ => now,
        };
        self.seen = Some((live.clone(), since));
        let holder = live.holder_identity.as_deref().unwrap_or_default();
        if holder == &*self.identity {
            return Step::Write(self.claim(Some(live), wall_clock));
        }
        self.renewed = None;
        // The holder may have been told to keep it for longer than we would.
        let stated = live.lease_duration_seconds.unwrap_or_default();
        let stated = Duration::from_secs(stated.try_into().unwrap_or_default());
        let free = holder.is_empty() || now >= since + self.timing.lease.max(stated);
        if free {
            Step::Write(self.claim(Some(live), wall_clock))
        } else {
            Step::Wait
        }
    }

    /// The record was written; the request for that was begun at `begun`.
    pub fn wrote(&mut self, record: LeaseSpec, begun: Instant) {
        self.seen = Some((record, begun));
        self.renewed = Some(begun);
    }

    /// Until when this candidate leads; `None`: it does not.
    pub fn leads_until(&self) -> Option<Instant> {
        Some(self.renewed? + self.timing.renew_deadline)
    }

    /// Whether it leads.
    pub fn leads(&self, now: Instant) -> bool {
        self.leads_until().is_some_and(|until| now < until)
    }

    /// The record that gives the Lease back.
    pub fn release(&mut self, live: &LeaseSpec, wall_clock: Timestamp) -> LeaseSpec {
        self.renewed = None;
        LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            renew_time: Some(MicroTime(wall_clock)),
            acquire_time: Some(MicroTime(wall_clock)),
            ..live.clone()
        }
    }

    fn claim(&self, live: Option<&LeaseSpec>, wall_clock: Timestamp) -> LeaseSpec {
        let now = Some(MicroTime(wall_clock));
        let ours = live.filter(|live| live.holder_identity.as_deref() == Some(&self.identity));
        let transitions = live.and_then(|live| live.lease_transitions);
        let seconds = self.timing.lease.as_secs().max(1);
        LeaseSpec {
            holder_identity: Some(self.identity.to_string()),
            lease_duration_seconds: Some(seconds.try_into().unwrap_or(i32::MAX)),
            acquire_time: match ours {
                Some(ours) => ours.acquire_time.clone(),
                None => now.clone(),
            },
            renew_time: now,
            lease_transitions: match (live, ours) {
                (None, _) => Some(0),
                (Some(_), Some(_)) => transitions,
                (Some(_), None) => Some(transitions.unwrap_or_default().saturating_add(1)),
            },
            ..LeaseSpec::default()
        }
    }
}

/// Where the Lease is kept.
pub trait LeaseStore: Send + Sync + 'static {
    /// Reads it; `None`: there is none.
    fn read(&self) -> impl Future<Output = Result<Option<Lease>, RequestError>> + Send;
    /// Makes it, if there is none.
    fn create(&self, lease: Lease) -> impl Future<Output = Result<Lease, RequestError>> + Send;
    /// Replaces the version that `lease` is of.
    fn replace(&self, lease: Lease) -> impl Future<Output = Result<Lease, RequestError>> + Send;
}

/// The Lease in the API server.
#[derive(Debug, Clone)]
pub struct ApiLease {
    api: Api<Lease>,
    name: String,
}

impl ApiLease {
    /// The Lease of that name.
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.into(),
        }
    }
}

fn params() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.into()),
        ..PostParams::default()
    }
}

impl LeaseStore for ApiLease {
    async fn read(&self) -> Result<Option<Lease>, RequestError> {
        request(self.api.get_opt(&self.name)).await
    }

    async fn create(&self, mut lease: Lease) -> Result<Lease, RequestError> {
        lease.metadata.name = Some(self.name.clone());
        request(self.api.create(&params(), &lease)).await
    }

    async fn replace(&self, lease: Lease) -> Result<Lease, RequestError> {
        request(self.api.replace(&self.name, &params(), &lease)).await
    }
}

/// A candidate that runs. Dropping it ends it without giving the Lease back, as a crash
/// would: the next leader waits until it has run out.
#[derive(Debug)]
pub struct Elector {
    leading: watch::Receiver<bool>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Elector {
    /// Stands for election among the replicas of a revision of the control plane.
    ///
    /// Must be called within a tokio runtime.
    pub fn start(kubernetes: &Kubernetes, revision: &str) -> Self {
        // A pod that restarts keeps its name and is another candidate even so: what its
        // predecessor had under way may still arrive.
        let identity = format!("{}_{:08x}", kubernetes.identity, rand::random::<u32>());
        let name = match revision {
            "" | "default" => LEADER.to_owned(),
            revision => format!("{LEADER}-{revision}"),
        };
        let store = ApiLease::new(kubernetes.client.clone(), &kubernetes.namespace, &name);
        Self::with(store, Election::new(identity, Timing::default()))
    }

    /// Stands for the election over `store`.
    pub fn with(store: impl LeaseStore, election: Election) -> Self {
        let (publish, leading) = watch::channel(false);
        let (stop, stopped) = oneshot::channel();
        let candidate = Candidate {
            store,
            election,
            held: None,
            publish,
        };
        Self {
            leading,
            stop: Some(stop),
            task: tokio::spawn(candidate.run(stopped)),
        }
    }

    /// Whether this replica leads, as it changes. Says false in time: whoever stops then,
    /// and has no request under way for more than [`super::apply::DEADLINE`], never meets
    /// the next leader.
    pub fn leading(&self) -> watch::Receiver<bool> {
        self.leading.clone()
    }

    /// Gives the Lease back, so that another replica leads at once. What the leader does
    /// has to have ended before.
    pub async fn release(mut self) {
        if let Some(stop) = self.stop.take() {
            // It has ended by itself if this fails.
            let _ = stop.send(());
        }
        if timeout(RELEASE_DEADLINE, &mut self.task).await.is_err() {
            tracing::info!("the Lease could not be given back; it runs out by itself");
        }
    }
}

impl Drop for Elector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Candidate<S> {
    store: S,
    election: Election,
    /// As the API server answered our last write.
    held: Option<Lease>,
    publish: watch::Sender<bool>,
}

impl<S: LeaseStore> Candidate<S> {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let mut refused = false;
        loop {
            let begun = Instant::now();
            let result = self.attempt(begun).await;
            self.tell();
            match &result {
                Ok(()) => refused = false,
                Err(error) if error.failure() == Failure::Conflict => {
                    tracing::debug!("another replica was faster");
                }
                Err(error) if !refused => {
                    tracing::warn!(
                        "cannot take part in the election over the Lease {LEADER}: {error}"
                    );
                    refused = true;
                }
                Err(error) => tracing::debug!("election: {error}"),
            }
            // Candidates that started together spread out.
            let pause = self
                .election
                .timing
                .retry
                .mul_f64(rand::random_range(0.9..1.2));
            let next = begun + pause;
            let stop = loop {
                let until = self
                    .election
                    .leads_until()
                    .filter(|_| *self.publish.borrow());
                tokio::select! {
                    () = sleep_until(next) => break false,
                    () = sleep_until(until.unwrap_or(next)), if until.is_some() => self.tell(),
                    _ = &mut stopped => break true,
                }
            };
            if stop {
                self.publish.send_replace(false);
                self.give_back().await;
                return;
            }
        }
    }

    /// Reads, decides and writes, for at most as long as it may still lead.
    async fn attempt(&mut self, begun: Instant) -> Result<(), RequestError> {
        let limit = match self.election.leads_until() {
            Some(until) => until.max(begun),
            None => begun + self.election.timing.renew_deadline,
        };
        match timeout_at(limit, self.read_and_write(begun)).await {
            Ok(result) => result,
            Err(_) => Err(RequestError::Deadline(limit - begun)),
        }
    }

    async fn read_and_write(&mut self, begun: Instant) -> Result<(), RequestError> {
        // A holder knows the Lease as it is; if not, the write fails, and it reads again.
        let live = match self.held.take() {
            Some(held) => Some(held),
            None => self.store.read().await?,
        };
        let record = live
            .as_ref()
            .map(|live| live.spec.clone().unwrap_or_default());
        let step = self
            .election
            .observe(record.as_ref(), begun, Timestamp::now());
        let Step::Write(record) = step else {
            return Ok(());
        };
        let spec = Some(record.clone());
        let lease = match live {
            Some(live) => self.store.replace(Lease { spec, ..live }).await?,
            None => {
                let metadata = ObjectMeta::default();
                self.store.create(Lease { metadata, spec }).await?
            }
        };
        // What the server made of it (it may cut digits off times) is what is seen next.
        self.election
            .wrote(lease.spec.clone().unwrap_or(record), begun);
        self.held = Some(lease);
        Ok(())
    }

    fn tell(&self) {
        let leads = self.election.leads(Instant::now());
        self.publish.send_if_modified(|before| {
            if *before != leads {
                tracing::info!(
                    identity = &*self.election.identity,
                    "{}",
                    if leads {
                        "this replica leads"
                    } else {
                        "this replica leads no more"
                    }
                );
            }
            std::mem::replace(before, leads) != leads
        });
    }

    async fn give_back(mut self) {
        let leads = self.election.leads(Instant::now());
        let Some(held) = self.held.take().filter(|_| leads) else {
            return;
        };
        let record = held.spec.clone().unwrap_or_default();
        let spec = Some(self.election.release(&record, Timestamp::now()));
        if let Err(error) = self.store.replace(Lease { spec, ..held }).await {
            tracing::info!("the Lease could not be given back: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use kube::core::Status;

    use super::*;

    const TIMING: Timing = Timing {
        lease: Duration::from_secs(15),
        renew_deadline: Duration::from_secs(10),
        retry: Duration::from_secs(2),
    };

    fn wall(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).expect("a time")
    }

    fn written(step: Step) -> LeaseSpec {
        match step {
            Step::Write(record) => record,
            Step::Wait => panic!("it waits"),
        }
    }

    #[test]
    fn the_first_candidate_makes_the_lease_and_keeps_it() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut a = Election::new("a", TIMING);
        let made = written(a.observe(None, at(0), wall(0)));
        assert_eq!(made.holder_identity.as_deref(), Some("a"));
        assert_eq!(made.lease_transitions, Some(0));
        assert!(!a.leads(at(0)), "nothing has been written yet");
        a.wrote(made.clone(), at(0));
        assert!(a.leads(at(9)) && !a.leads(at(10)));
        let renewed = written(a.observe(Some(&made), at(2), wall(2)));
        assert_eq!(renewed.acquire_time, made.acquire_time);
        assert_ne!(renewed.renew_time, made.renew_time);
        assert_eq!(renewed.lease_transitions, Some(0));
        a.wrote(renewed, at(2));
        assert_eq!(a.leads_until(), Some(at(12)));
    }

    #[test]
    fn another_waits_for_as_long_as_it_sees_the_record_change() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (mut a, mut b) = (Election::new("a", TIMING), Election::new("b", TIMING));
        let mut record = written(a.observe(None, at(0), wall(0)));
        a.wrote(record.clone(), at(0));
        for second in (2..40).step_by(2) {
            record = written(a.observe(Some(&record), at(second), wall(second as i64)));
            a.wrote(record.clone(), at(second));
            // Its clock is a day ahead, which must not matter.
            assert_eq!(
                b.observe(Some(&record), at(second), wall(86_400)),
                Step::Wait
            );
        }
        // a stops at 38.
        assert_eq!(b.observe(Some(&record), at(52), wall(0)), Step::Wait);
        assert!(!a.leads(at(48)), "a is out before b is in");
        let taken = written(b.observe(Some(&record), at(53), wall(0)));
        assert_eq!(taken.lease_transitions, Some(1));
        b.wrote(taken.clone(), at(53));
        assert!(b.leads(at(53)));
        // a comes back and sees that it has lost.
        assert_eq!(a.observe(Some(&taken), at(54), wall(54)), Step::Wait);
        assert!(!a.leads(at(54)));
    }

    #[test]
    fn a_lease_that_was_given_back_is_free_at_once() {
        let now = Instant::now();
        let (mut a, mut b) = (Election::new("a", TIMING), Election::new("b", TIMING));
        let record = written(a.observe(None, now, wall(0)));
        a.wrote(record.clone(), now);
        let free = a.release(&record, wall(1));
        assert!(!a.leads(now));
        let taken = written(b.observe(Some(&free), now, wall(1)));
        assert_eq!(taken.holder_identity.as_deref(), Some("b"));
    }

    #[test]
    fn a_holder_that_asks_for_longer_gets_it() {
        let now = Instant::now();
        let mut b = Election::new("b", TIMING);
        let record = LeaseSpec {
            holder_identity: Some("old".into()),
            lease_duration_seconds: Some(60),
            ..LeaseSpec::default()
        };
        assert_eq!(b.observe(Some(&record), now, wall(0)), Step::Wait);
        let later = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(b.observe(Some(&record), later(59), wall(0)), Step::Wait);
        assert!(matches!(
            b.observe(Some(&record), later(60), wall(0)),
            Step::Write(_)
        ));
    }

    /// An API server with one Lease, which can be out of reach.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<MemoryState>>);

    #[derive(Default)]
    struct MemoryState {
        lease: Option<Lease>,
        version: u64,
        silent: bool,
    }

    impl Memory {
        async fn change(&self, lease: Lease, create: bool) -> Result<Lease, RequestError> {
            if self.0.lock().expect("alone").silent {
                std::future::pending::<()>().await;
            }
            let mut state = self.0.lock().expect("alone");
            let known = state
                .lease
                .as_ref()
                .map(|l| l.metadata.resource_version.clone());
            let fits = match &known {
                None => create,
                Some(version) => !create && *version == lease.metadata.resource_version,
            };
            if !fits {
                let status = Status::failure("changed", "Conflict").with_code(409);
                return Err(kube::Error::Api(status.boxed()).into());
            }
            state.version += 1;
            let mut lease = lease;
            lease.metadata.resource_version = Some(state.version.to_string());
            state.lease = Some(lease.clone());
            Ok(lease)
        }
    }

    impl LeaseStore for Memory {
        async fn read(&self) -> Result<Option<Lease>, RequestError> {
            if self.0.lock().expect("alone").silent {
                std::future::pending::<()>().await;
            }
            Ok(self.0.lock().expect("alone").lease.clone())
        }
        async fn create(&self, lease: Lease) -> Result<Lease, RequestError> {
            self.change(lease, true).await
        }
        async fn replace(&self, lease: Lease) -> Result<Lease, RequestError> {
            self.change(lease, false).await
        }
    }

    async fn wait_for(leading: &mut watch::Receiver<bool>, value: bool) {
        let waited = timeout(
            Duration::from_secs(120),
            leading.wait_for(|now| *now == value),
        );
        waited.await.expect("in time").expect("runs");
    }

    #[tokio::test(start_paused = true)]
    async fn one_leads_and_hands_over_when_it_stops() {
        let memory = Memory::default();
        let a = Elector::with(memory.clone(), Election::new("a", TIMING));
        wait_for(&mut a.leading(), true).await;
        let b = Elector::with(memory.clone(), Election::new("b", TIMING));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(*a.leading().borrow() && !*b.leading().borrow());
        let before = Instant::now();
        a.release().await;
        wait_for(&mut b.leading(), true).await;
        assert!(
            before.elapsed() < Duration::from_secs(4),
            "{:?}",
            before.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_without_api_server_stops_before_another_could_start() {
        let memory = Memory::default();
        let a = Elector::with(memory.clone(), Election::new("a", TIMING));
        wait_for(&mut a.leading(), true).await;
        let before = Instant::now();
        memory.0.lock().expect("alone").silent = true;
        wait_for(&mut a.leading(), false).await;
        let took = before.elapsed();
        assert!(took <= TIMING.renew_deadline, "{took:?}");
        memory.0.lock().expect("alone").silent = false;
        wait_for(&mut a.leading(), true).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_crashed_leader_is_followed_when_its_lease_has_run_out() {
        let memory = Memory::default();
        let a = Elector::with(memory.clone(), Election::new("a", TIMING));
        wait_for(&mut a.leading(), true).await;
        let b = Elector::with(memory.clone(), Election::new("b", TIMING));
        tokio::time::sleep(Duration::from_secs(5)).await;
        drop(a);
        let before = Instant::now();
        wait_for(&mut b.leading(), true).await;
        let took = before.elapsed().as_secs();
        assert!((12..20).contains(&took), "{took}");
    }
}
