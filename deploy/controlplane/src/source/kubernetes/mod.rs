//! Follows the API server of a cluster.
//!
//! Every kind has a [watch](watch) of its own; kinds of custom resources have one while
//! [discovery](discover) says that they are there. Decoded objects go through one bounded
//! queue to the one who [merges](merge) them and publishes the state. Nothing of the API
//! server's JSON is kept.
//!
//! The API server may go away: what is known stays, and the watches go on where they were
//! when it is back.

mod discover;
mod kinds;
mod merge;
mod object;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch as channel};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::{Instant, interval, sleep, timeout_at};

use self::discover::{Discovered, discover, watch_crds};
use self::kinds::FOLLOWED;
use self::merge::{Event, Merged};
use self::watch::Watch;
use super::watch::{SourceState, log_new};
use crate::kubernetes::Kubernetes;
use crate::model::Kind;

/// Decoded objects that wait to be merged; a watch that is faster waits.
const QUEUE: usize = 1024;
/// Rounds of discovery after a CRD has changed: what it defines is served a little later.
const HURRIED_ROUNDS: u32 = 10;
const HURRIED_INTERVAL: Duration = Duration::from_secs(1);
/// Until everything has been read, it is said what is still missing.
const SAY_MISSING: Duration = Duration::from_secs(10);

/// How the API server is followed.
#[derive(Debug, Clone, Copy)]
pub struct KubernetesOptions {
    /// Quiet time after a change before it is published.
    pub debounce: Duration,
    /// Longest time that a change waits for others.
    pub max_delay: Duration,
    /// How often discovery looks for kinds that have come or gone, without a hint.
    pub discovery: Duration,
    /// How long a kind has to be absent before its objects are taken away: an API server
    /// that starts does not have its custom resources at once.
    pub absence: Duration,
}

impl Default for KubernetesOptions {
    fn default() -> Self {
        Self {
            debounce: Duration::from_millis(10),
            max_delay: Duration::from_millis(100),
            discovery: Duration::from_secs(30),
            absence: Duration::from_secs(30),
        }
    }
}

/// A cluster that is being followed. Dropping it ends that.
#[derive(Debug)]
pub struct KubernetesSource {
    state: channel::Receiver<SourceState>,
    task: JoinHandle<()>,
}

impl KubernetesSource {
    /// Starts to follow. The first states are not [`synced`](SourceState::synced).
    ///
    /// Must be called within a tokio runtime.
    pub fn start(kubernetes: Kubernetes, options: KubernetesOptions) -> Self {
        let (publish, state) = channel::channel(SourceState::default());
        let task = tokio::spawn(run(kubernetes.client, options, publish));
        Self { state, task }
    }

    /// The state and its changes.
    pub fn subscribe(&self) -> channel::Receiver<SourceState> {
        self.state.clone()
    }
}

impl Drop for KubernetesSource {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(
    client: kube::Client,
    options: KubernetesOptions,
    publish: channel::Sender<SourceState>,
) {
    let (events, mut queue) = mpsc::channel(QUEUE);
    let (discovered, mut discoveries) = mpsc::channel(1);
    let rediscover = Arc::new(Notify::new());
    let mut watches = Watches {
        client: client.clone(),
        events,
        rediscover: rediscover.clone(),
        tasks: JoinSet::new(),
        running: BTreeMap::new(),
        absent_since: BTreeMap::new(),
        absence: options.absence,
    };
    for resource in FOLLOWED.iter().filter(|resource| !resource.is_custom()) {
        if let Some(version) = resource.versions.first() {
            watches.follow(resource.kind, version);
        }
    }
    watches
        .tasks
        .spawn(watch_crds(client.clone(), rediscover.clone()));
    watches.tasks.spawn(rediscover_forever(
        client,
        options.discovery,
        rediscover,
        discovered,
    ));

    let mut merged = Merged::new(FOLLOWED.iter().map(|resource| resource.kind));
    let mut say = interval(SAY_MISSING);
    say.reset();
    loop {
        tokio::select! {
            event = queue.recv() => {
                // `watches` holds a sender, so there is always another event.
                let Some(event) = event else { return };
                watches.take(&mut merged, event);
                settle(&mut queue, options, |event| watches.take(&mut merged, event)).await;
            }
            found = discoveries.recv() => {
                let Some(found) = found else { return };
                for kind in watches.reconcile(&found, merged.awaited()) {
                    merged.take(Event::Absent(kind));
                }
            }
            ended = watches.tasks.join_next() => {
                if let Some(Err(error)) = ended && error.is_panic() {
                    // The process is started anew rather than left half blind.
                    tracing::error!(%error, "a watch has ended by a defect");
                    return;
                }
            }
            _ = say.tick(), if !merged.awaited().is_empty() => {
                let missing: Vec<_> = merged.awaited().iter().map(|kind| kind.as_str()).collect();
                tracing::info!(missing = missing.join(", "), "the cluster has not been read yet");
            }
        }
        if publish.is_closed() {
            return;
        }
        publish_state(&merged, &publish);
    }
}

fn publish_state(merged: &Merged, publish: &channel::Sender<SourceState>) {
    let mut state = merged.state();
    if !state.synced {
        // Nobody may act on them, and a shared set is copied at the next change.
        state.objects = Default::default();
    }
    log_new(&publish.borrow().findings, &state.findings);
    publish.send_if_modified(|current| {
        let first = state.synced && !current.synced;
        if first {
            tracing::info!(
                namespaces = state.objects.namespaces.len(),
                "the cluster has been read"
            );
        }
        let changed =
            first || !current.objects.same(&state.objects) || current.findings != state.findings;
        *current = state;
        changed
    });
}

/// Takes what comes until nothing has come for a while.
async fn settle(
    queue: &mut mpsc::Receiver<Event>,
    options: KubernetesOptions,
    mut take: impl FnMut(Event),
) {
    let end = Instant::now() + options.max_delay;
    loop {
        let quiet = (Instant::now() + options.debounce).min(end);
        match timeout_at(quiet, queue.recv()).await {
            Ok(Some(event)) => {
                take(event);
                if Instant::now() >= end {
                    return;
                }
            }
            _ => return,
        }
    }
}

async fn rediscover_forever(
    client: kube::Client,
    regular: Duration,
    hint: Arc<Notify>,
    discovered: mpsc::Sender<Discovered>,
) {
    let mut hurried = HURRIED_ROUNDS;
    loop {
        match discover(&client).await {
            Ok(found) => {
                if discovered.send(found).await.is_err() {
                    return;
                }
            }
            Err(reason) => {
                tracing::warn!(reason, "discovery failed");
                hurried = hurried.max(1);
            }
        }
        let pause = match hurried {
            0 => regular,
            _ => HURRIED_INTERVAL.min(regular),
        };
        hurried = hurried.saturating_sub(1);
        tokio::select! {
            () = sleep(pause) => {}
            () = hint.notified() => {
                hurried = HURRIED_ROUNDS;
                // Hints come in bursts.
                sleep(HURRIED_INTERVAL.min(regular) / 5).await;
            }
        }
    }
}

/// The watches that run.
struct Watches {
    client: kube::Client,
    events: mpsc::Sender<Event>,
    rediscover: Arc<Notify>,
    tasks: JoinSet<()>,
    running: BTreeMap<Kind, Running>,
    absent_since: BTreeMap<Kind, Instant>,
    absence: Duration,
}

struct Running {
    version: &'static str,
    task: AbortHandle,
}

impl Watches {
    /// Merges what a watch says, if it still has something to say.
    fn take(&self, merged: &mut Merged, event: Event) {
        if self.running.contains_key(&event.kind()) {
            merged.take(event);
        }
    }

    fn follow(&mut self, kind: Kind, version: &'static str) {
        let Some(resource) = FOLLOWED.iter().find(|resource| resource.kind == kind) else {
            return;
        };
        if resource.is_custom() {
            tracing::info!(resource = resource.qualified(), version, "following");
        }
        let watch = Watch {
            resource,
            version,
            client: self.client.clone(),
            events: self.events.clone(),
            rediscover: self.rediscover.clone(),
        };
        let task = self.tasks.spawn(watch.run());
        if let Some(before) = self.running.insert(kind, Running { version, task }) {
            // Its objects stay until the new one has listed them.
            before.task.abort();
        }
    }

    /// Starts and ends watches of custom resources; gives the kinds that are not there.
    /// What is not `awaited` any more was there or known not to be: it has to be absent
    /// for a while before that is believed.
    fn reconcile(
        &mut self,
        found: &Discovered,
        awaited: &std::collections::BTreeSet<Kind>,
    ) -> Vec<Kind> {
        let mut absent = Vec::new();
        for (&kind, &version) in found {
            let running = self.running.get(&kind).map(|running| running.version);
            match (version, running) {
                (Some(version), _) => {
                    self.absent_since.remove(&kind);
                    if running != Some(version) {
                        self.follow(kind, version);
                    }
                }
                (None, None) => {
                    if awaited.contains(&kind) {
                        absent.push(kind);
                    }
                }
                (None, Some(_)) => {
                    let since = self.absent_since.entry(kind).or_insert_with(Instant::now);
                    if since.elapsed() >= self.absence {
                        tracing::info!(%kind, "the API server does not have this kind any more");
                        self.absent_since.remove(&kind);
                        if let Some(running) = self.running.remove(&kind) {
                            running.task.abort();
                        }
                        absent.push(kind);
                    }
                }
            }
        }
        absent
    }
}
