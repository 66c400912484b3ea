//! Runs the control plane: follows the source and the nodes' reports, compiles, writes
//! status, publishes snapshots.
//!
//! One task owns all state and moves in steps. A step is triggered by a change of the
//! objects, a report, or a deadline, and does everything that follows from it; whatever
//! happens meanwhile is taken together into the next one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use adit_shared::proto::enrolment::{EnrolmentState, PodEnrolment};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinError, JoinHandle};

use crate::auth::Caller;
use crate::ca::{CurrentCa, PodDirectory};
use crate::compile::l7::gateway_of_pod;
use crate::compile::{Compiler, MeshConfig, RedirectionTracker, Redirections, WITHDRAW_DELAY};
use crate::kubernetes::Kubernetes;
use crate::model::{Finding, Objects, Pod};
use crate::serve::{EnrolmentSink, ResourceSnapshot, WriteMetrics};
use crate::source::{
    DirectorySource, KubernetesOptions, KubernetesSource, SourceState, WatchOptions,
};
use crate::status::kubernetes::{Faults, KubernetesStatus, Writers};
use crate::status::{StatusBackend, StatusError, StatusStore};

/// When a status file could not be written, this is how long until the next attempt.
const STATUS_RETRY: Duration = Duration::from_secs(1);
/// What the authority's key is used for besides signing.
const WAYPOINT_SECRETS: &str = "adit waypoints";

/// What a control plane is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the objects come from.
    pub input: Input,
    /// Where status is kept; `None`: in memory, and a restart forgets which pods are
    /// captured.
    pub status: Option<PathBuf>,
    /// In a cluster: status is written to the API server, about objects while this says
    /// true. `None`: as without a cluster.
    pub leading: Option<watch::Receiver<bool>>,
    /// Mesh-wide settings.
    pub mesh: MeshConfig,
    /// How long clients get to follow an opt-out.
    pub withdraw_delay: Duration,
    /// What the keys that replicas of a waypoint share are made from; `None`:
    /// [`MeshConfig::shared_secret`].
    pub authority: Option<CurrentCa>,
}

/// Where objects come from.
#[derive(Debug, Clone)]
pub enum Input {
    /// Directories or files of manifests.
    Directories {
        /// Their paths.
        roots: Vec<PathBuf>,
        /// How they are followed.
        watch: WatchOptions,
    },
    /// The API server of a cluster.
    Kubernetes(Kubernetes),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            input: Input::Directories {
                roots: Vec::new(),
                watch: WatchOptions::default(),
            },
            status: None,
            leading: None,
            mesh: MeshConfig::default(),
            withdraw_delay: WITHDRAW_DELAY,
            authority: None,
        }
    }
}

/// A running control plane, without the servers. Dropping it ends it.
#[derive(Debug)]
pub struct ControlPlane {
    snapshots: watch::Receiver<Arc<ResourceSnapshot>>,
    source: watch::Receiver<SourceState>,
    pods: Arc<Pods>,
    reports: Arc<Reports>,
    faults: Option<Faults>,
    write_metrics: Option<Arc<WriteMetrics>>,
    writers: Option<Writers>,
    task: JoinHandle<()>,
}

impl ControlPlane {
    /// Reads the configuration and the status, and publishes the first snapshot. With the
    /// API server as the source that comes when all of its objects have been read; until
    /// then the snapshot is an empty one that is not ready.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// A status directory that cannot be read. Wrong configuration is no error: what is
    /// wrong is in [`Self::findings`].
    pub async fn start(options: Options) -> Result<Self, StatusError> {
        let mut writers = None;
        let status = match (&options.input, &options.leading, &options.status) {
            (Input::Kubernetes(kubernetes), Some(leading), _) => {
                let (status, tasks) = KubernetesStatus::start(kubernetes, leading.clone());
                writers = Some(tasks);
                StatusBackend::Kubernetes(status)
            }
            (_, _, Some(directory)) => StatusBackend::Directory(StatusStore::open(directory)?),
            (_, _, None) => StatusBackend::Directory(StatusStore::in_memory()),
        };
        let (faults, write_metrics, written) = match &status {
            StatusBackend::Kubernetes(status) => (
                Some(status.faults()),
                Some(status.metrics()),
                status.written(),
            ),
            StatusBackend::Directory(_) => (None, None, Arc::default()),
        };
        let source = match options.input {
            Input::Directories { roots, watch } => {
                Source::Directories(DirectorySource::open(roots, watch).await)
            }
            Input::Kubernetes(kubernetes) => Source::Kubernetes(KubernetesSource::start(
                kubernetes,
                KubernetesOptions::default(),
            )),
        };
        let mut state = source.subscribe();
        let first = state.borrow_and_update().clone();
        let captured = status.captured(&first.objects);
        let engine = Engine {
            tracker: RedirectionTracker::new(options.withdraw_delay, captured),
            compiler: Compiler::new(options.mesh),
            authority: options.authority,
            redirections: Redirections::new(),
            status,
            snapshot: ResourceSnapshot::default(),
            status_failed: false,
            seeded: first.synced,
        };
        let pods = Arc::new(Pods {
            objects: ArcSwap::from_pointee(first.objects.clone()),
            complete: matches!(source, Source::Kubernetes(_)),
        });
        let reports = Arc::new(Reports::default());
        // Half of the objects compile to half of a mesh, which takes away the other half.
        let engine = match first.synced {
            false => engine,
            true => match step(engine, first.objects, BTreeMap::new()).await {
                Ok(engine) => engine,
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                // The runtime shuts down, and this task with it.
                Err(_) => std::future::pending().await,
            },
        };
        let (publish, snapshots) = watch::channel(Arc::new(engine.snapshot.clone()));
        let task = tokio::spawn(run(
            engine,
            source,
            state.clone(),
            pods.clone(),
            reports.clone(),
            written,
            publish,
        ));
        Ok(Self {
            snapshots,
            source: state,
            pods,
            reports,
            faults,
            write_metrics,
            writers,
            task,
        })
    }

    /// Snapshots as they are published.
    pub fn snapshots(&self) -> watch::Receiver<Arc<ResourceSnapshot>> {
        self.snapshots.clone()
    }

    /// What is wrong with the configuration now.
    pub fn findings(&self) -> Arc<Vec<Finding>> {
        let of_source = self.source.borrow().findings.clone();
        let others = self.faults.as_ref().map(Faults::findings);
        match others.filter(|others| !others.is_empty()) {
            None => of_source,
            Some(others) => Arc::new(of_source.iter().cloned().chain(others).collect()),
        }
    }

    /// The objects, as they are followed.
    pub fn source(&self) -> watch::Receiver<SourceState> {
        self.source.clone()
    }

    /// Which pods run where, for the certificate service.
    pub fn pods(&self) -> Arc<dyn PodDirectory> {
        self.pods.clone()
    }

    /// Where reports of the nodes go.
    pub fn reports(&self) -> Arc<dyn EnrolmentSink> {
        self.reports.clone()
    }

    /// In a cluster: where it is told what is wrong with objects that are generated.
    pub fn faults(&self) -> Option<Faults> {
        self.faults.clone()
    }

    /// In a cluster: what is counted of writing to it.
    pub fn write_metrics(&self) -> Option<Arc<WriteMetrics>> {
        self.write_metrics.clone()
    }

    /// Ends the tasks that write to the API server, and waits until they have ended.
    pub async fn stop_writing(&mut self) {
        if let Some(writers) = self.writers.take() {
            writers.stop().await;
        }
    }

    /// Returns when the control plane has ended, which it does by a defect only: the
    /// process should end too, so that it is started anew.
    pub async fn ended(&mut self) {
        if let Err(error) = (&mut self.task).await {
            tracing::error!(%error, "the control plane has ended");
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is followed. Dropping it ends that.
enum Source {
    Directories(DirectorySource),
    Kubernetes(KubernetesSource),
}

impl Source {
    fn subscribe(&self) -> watch::Receiver<SourceState> {
        match self {
            Self::Directories(source) => source.subscribe(),
            Self::Kubernetes(source) => source.subscribe(),
        }
    }
}

/// The pods of the source, as the certificate service asks for them.
#[derive(Debug)]
struct Pods {
    objects: ArcSwap<Objects>,
    /// The pods of node proxies are among them.
    complete: bool,
}

impl PodDirectory for Pods {
    fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        use crate::model::Phase;
        let objects = self.objects.load();
        objects.namespaces.get(namespace).is_some_and(|of| {
            of.pods.values().any(|pod| {
                &*pod.node == node
                    && &*pod.service_account == service_account
                    && pod.phase != Phase::Failed
            })
        })
    }

    fn knows(&self, caller: &Caller) -> bool {
        if !self.complete {
            return true;
        }
        let objects = self.objects.load();
        let pod = objects
            .namespaces
            .get(caller.namespace.as_str())
            .and_then(|of| of.pods.get(caller.pod_name.as_str()));
        pod.is_some_and(|pod| {
            *pod.meta.uid == *caller.pod_uid
                && *pod.service_account == *caller.service_account
                && *pod.node == *caller.node
                && !pod.phase.is_terminal()
        })
    }

    fn gateway_of(&self, caller: &Caller) -> Option<String> {
        let objects = self.objects.load();
        let of = objects.namespaces.get(caller.namespace.as_str())?;
        let pod = of.pods.get(caller.pod_name.as_str())?;
        let same = *pod.meta.uid == *caller.pod_uid
            && *pod.service_account == *caller.service_account
            && !pod.phase.is_terminal();
        gateway_of_pod(pod).filter(|_| same).map(ToOwned::to_owned)
    }
}

/// The latest report of each node that has not been taken into account yet.
#[derive(Debug, Default)]
struct Reports {
    pending: Mutex<BTreeMap<String, Vec<PodEnrolment>>>,
    arrived: Notify,
}

impl EnrolmentSink for Reports {
    fn report(&self, node: &str, pods: Vec<PodEnrolment>) {
        self.pending.lock().insert(node.into(), pods);
        self.arrived.notify_one();
    }
}

impl Reports {
    fn take(&self) -> BTreeMap<String, Vec<PodEnrolment>> {
        std::mem::take(&mut self.pending.lock())
    }
}

async fn run(
    mut engine: Engine,
    source: Source,
    mut state: watch::Receiver<SourceState>,
    pods: Arc<Pods>,
    reports: Arc<Reports>,
    written: Arc<Notify>,
    publish: watch::Sender<Arc<ResourceSnapshot>>,
) {
    loop {
        let deadline = engine.next_deadline();
        let wait = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = state.changed() => {
                if changed.is_err() {
                    tracing::error!("the configuration is no longer followed");
                    break;
                }
            }
            () = reports.arrived.notified() => {}
            () = written.notified() => {}
            () = replaced(engine.authority.as_mut()) => {}
            () = wait => {}
        }
        let SourceState {
            objects, synced, ..
        } = state.borrow_and_update().clone();
        if !synced {
            continue;
        }
        // A pod whose certificate is asked for has to be known before it is published.
        pods.objects.store(Arc::new(objects.clone()));
        engine = match step(engine, objects, reports.take()).await {
            Ok(engine) => engine,
            Err(error) => {
                tracing::error!(%error, "compiling the configuration failed");
                break;
            }
        };
        publish.send_if_modified(|current| {
            let changed = current.generation() != engine.snapshot.generation();
            *current = Arc::new(engine.snapshot.clone());
            changed
        });
    }
    drop(source);
}

/// Returns when there is another authority than there was.
async fn replaced(authority: Option<&mut CurrentCa>) {
    match authority {
        Some(authority) => authority.changed().await,
        None => std::future::pending().await,
    }
}

/// Compiling takes its time, and writing status blocks.
async fn step(
    mut engine: Engine,
    objects: Objects,
    reports: BTreeMap<String, Vec<PodEnrolment>>,
) -> Result<Engine, JoinError> {
    tokio::task::spawn_blocking(move || {
        engine.step(&objects, &reports, Instant::now(), SystemTime::now());
        engine
    })
    .await
}

/// All state of the control plane besides the source's.
struct Engine {
    tracker: RedirectionTracker,
    compiler: Compiler,
    authority: Option<CurrentCa>,
    /// As far as it is kept, so that it may be published.
    redirections: Redirections,
    status: StatusBackend,
    snapshot: ResourceSnapshot,
    status_failed: bool,
    /// The tracker knows which pods were captured before.
    seeded: bool,
}

impl Engine {
    fn step(
        &mut self,
        objects: &Objects,
        reports: &BTreeMap<String, Vec<PodEnrolment>>,
        now: Instant,
        wall_clock: SystemTime,
    ) {
        if let Some(authority) = &self.authority {
            // Replicas and restarts agree without anything that has to be kept, also after
            // the authority was replaced under some of them.
            let secret = authority.get().derive_secret(WAYPOINT_SECRETS);
            self.compiler.share_secret(secret);
        }
        for (node, pods) in reports {
            self.log_failures(node, pods);
            self.tracker.report(node, pods);
        }
        if !std::mem::replace(&mut self.seeded, true) {
            // Those that are to be released get their delay, for clients know them as captured.
            for pod in self.status.captured(objects) {
                self.tracker.adopt(pod);
            }
        }
        let adopts = |pod: &Pod| self.status.adopts(pod);
        let mesh = self.compiler.mesh();
        let touched = self.tracker.reconcile(objects, mesh, adopts, now);
        // Before anybody relies on it.
        let written =
            self.status
                .set_captured(&self.tracker, touched, objects, &mut self.redirections);
        let mut builder = self.snapshot.edit();
        let namespaces = self
            .compiler
            .update(objects, &self.redirections, &mut builder);
        self.snapshot = builder.build();
        let statuses = self
            .status
            .set_statuses(&self.compiler, objects, wall_clock);
        let written = written.and(statuses);
        self.status_failed = match written {
            Ok(()) => false,
            Err(error) => {
                tracing::error!(%error, "status cannot be written; a restart would let clients of captured pods use plaintext");
                true
            }
        };
        tracing::debug!(
            generation = self.snapshot.generation(),
            namespaces,
            took = ?now.elapsed(),
            "compiled"
        );
    }

    fn next_deadline(&self) -> Option<Instant> {
        let retry = self.status_failed.then(|| Instant::now() + STATUS_RETRY);
        [self.tracker.next_deadline(), retry]
            .into_iter()
            .flatten()
            .min()
    }

    fn log_failures(&self, node: &str, pods: &[PodEnrolment]) {
        for pod in pods {
            let known = self.tracker.reported(node, &pod.uid);
            let repeated = known.is_some_and(|known| {
                known.state == EnrolmentState::Failed && known.message == pod.message
            });
            if pod.state() == EnrolmentState::Failed && !repeated {
                tracing::warn!(
                    node,
                    uid = pod.uid,
                    message = pod.message,
                    "the node cannot capture a pod"
                );
            }
        }
    }
}
