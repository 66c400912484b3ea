//! Status in the API server.
//!
//! The driver says in each step what is to stand there ([`KubernetesStatus`]) and never
//! waits. Two tasks write it: `objects` the conditions and addresses, on the replica that
//! leads; `pods` the annotation of captured pods, on the replica that knows: the one that
//! the pod's node reports to. The others see that annotation in their watch, and so does
//! a control plane that starts anew.
//!
//! A workload says HBONE only when its pod's annotation has been written, so that no
//! replica and no successor takes it back for want of knowledge: clients would go on in
//! plaintext.

mod merge;
mod objects;
mod pods;
mod resources;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

pub use merge::{Change, Wanted, kinds, merge};

use crate::compile::Redirection;
use crate::kubernetes::Kubernetes;
use crate::kubernetes::queue::Queue;
use crate::model::{Finding, ObjectRef, Objects, Pod};
use crate::serve::WriteMetrics;
use crate::status::{CapturedPod, Condition, ObjectStatus, REDIRECTION, REDIRECTION_ENABLED};

/// What is to stand in the API server, as the driver sees it. Belongs to one driver; the
/// tasks that write end with it, or with [`Writers`].
#[derive(Debug)]
pub struct KubernetesStatus {
    shared: Arc<Shared>,
    leading: watch::Receiver<bool>,
    /// Captured pods whose annotation was seen or written; the others are not published.
    kept: BTreeMap<Arc<str>, Kept>,
}

/// How it is known that an annotation is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Written,
    Seen,
}

/// What the driver and the tasks share.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write about objects.
    objects_changed: Notify,
    /// There is something to write about pods.
    pods_changed: Notify,
    metrics: Arc<WriteMetrics>,
    /// An annotation was written, or this replica has begun to lead: the driver has work.
    written: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    /// The driver has told what it wants.
    filled: bool,
    /// Somebody writes, so that changes are worth noting.
    leading: bool,
    wanted: BTreeMap<ObjectRef, Arc<Wanted>>,
    faults: BTreeMap<ObjectRef, Vec<Condition>>,
    findings: Vec<Finding>,
    objects: Queue<ObjectRef>,
    marks: BTreeMap<Arc<str>, Mark>,
    pods: Queue<Arc<str>>,
    /// Uids of pods whose annotation was written since the driver asked.
    confirmed: BTreeSet<Arc<str>>,
}

/// An annotation that is to be set, or to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mark {
    namespace: Arc<str>,
    name: Arc<str>,
    enable: bool,
}

/// What is wrong with generated objects, to be told at their Gateway.
#[derive(Debug, Clone)]
pub struct Faults(Arc<Shared>);

impl Faults {
    /// Has these conditions stand at an object in place of those of the same types that
    /// compiling yields; none: nothing is wrong.
    pub fn set(&self, object: ObjectRef, conditions: Vec<Condition>) {
        let mut state = self.0.state.lock();
        let before = match conditions.is_empty() {
            true => state.faults.remove(&object),
            false => state.faults.insert(object.clone(), conditions.clone()),
        };
        if before.unwrap_or_default() != conditions && state.leading {
            state.objects.add(object);
            self.0.objects_changed.notify_one();
        }
    }

    /// Replaces what is to be told about the cluster as a whole.
    pub fn set_findings(&self, findings: Vec<Finding>) {
        self.0.state.lock().findings = findings;
    }

    /// What is to be told about the cluster as a whole.
    pub fn findings(&self) -> Vec<Finding> {
        self.0.state.lock().findings.clone()
    }

    /// Forgets all of them, as one does who leads no more.
    pub fn clear(&self) {
        let mut state = self.0.state.lock();
        state.faults.clear();
        state.findings.clear();
    }
}

/// The tasks that write. Dropping it ends them.
#[derive(Debug)]
pub struct Writers(tokio::task::JoinSet<()>);

impl Writers {
    /// Ends them, and waits until they have ended.
    pub async fn stop(mut self) {
        self.0.shutdown().await;
    }
}

impl KubernetesStatus {
    /// Starts the tasks that write. Objects are written while `leading` says so.
    ///
    /// Must be called within a tokio runtime.
    pub fn start(kubernetes: &Kubernetes, leading: watch::Receiver<bool>) -> (Self, Writers) {
        let shared = Arc::new(Shared::default());
        let mut tasks = tokio::task::JoinSet::new();
        let client = &kubernetes.client;
        tasks.spawn(objects::run(
            client.clone(),
            shared.clone(),
            leading.clone(),
        ));
        tasks.spawn(pods::run(client.clone(), shared.clone()));
        let status = Self {
            shared,
            leading,
            kept: BTreeMap::new(),
        };
        (status, Writers(tasks))
    }

    /// Where faults of generated objects go.
    pub fn faults(&self) -> Faults {
        Faults(self.shared.clone())
    }

    /// What is counted.
    pub fn metrics(&self) -> Arc<WriteMetrics> {
        self.shared.metrics.clone()
    }

    /// Told when the driver should make a step: more may be published, or taken away.
    pub fn written(&self) -> Arc<Notify> {
        self.shared.written.clone()
    }

    /// Pods with the annotation, and their nodes.
    pub(super) fn captured(objects: &Objects) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        let pods = objects.namespaces.values().flat_map(|of| of.pods.values());
        pods.filter(|pod| is_marked(pod))
            .map(|pod| (&pod.meta.uid, &pod.node))
    }

    /// Sees to the annotations, and takes out of `redirection` whatever nobody but us knows.
    pub(super) fn set_captured(
        &mut self,
        captured: impl IntoIterator<Item = CapturedPod>,
        objects: &Objects,
        redirection: &mut Redirection,
    ) {
        let captured: BTreeMap<_, _> = captured
            .into_iter()
            .map(|pod| (pod.uid.clone(), pod))
            .collect();
        let mut state = self.shared.state.lock();
        for uid in std::mem::take(&mut state.confirmed) {
            self.kept.entry(uid).or_insert(Kept::Written);
        }
        self.kept.retain(|uid, _| captured.contains_key(uid));
        let leading = *self.leading.borrow();
        let mut marks = BTreeMap::new();
        for pod in objects.namespaces.values().flat_map(|of| of.pods.values()) {
            let uid = &pod.meta.uid;
            let marked = is_marked(pod);
            let enable = match (captured.contains_key(uid), marked) {
                (true, true) => {
                    self.kept.insert(uid.clone(), Kept::Seen);
                    continue;
                }
                // Our own annotation, which the watch has not brought yet.
                (true, false) if self.kept.get(uid) == Some(&Kept::Written) => continue,
                (true, false) => true,
                // One replica is enough for that.
                (false, true) if leading && !pod.phase.is_terminal() && !pod.meta.deleting => false,
                (false, _) => continue,
            };
            let mark = Mark {
                namespace: pod.meta.namespace.clone(),
                name: pod.meta.name.clone(),
                enable,
            };
            if state.marks.get(uid) != Some(&mark) {
                state.pods.add(uid.clone());
            }
            marks.insert(uid.clone(), mark);
        }
        state.marks = marks;
        if !state.pods.is_empty() {
            self.shared.pods_changed.notify_one();
        }
        redirection.hbone.retain(|uid| self.kept.contains_key(uid));
    }

    pub(super) fn set_statuses<'a>(
        &mut self,
        statuses: impl IntoIterator<Item = (&'a ObjectRef, &'a ObjectStatus)>,
        objects: &Objects,
    ) {
        let mut state = self.shared.state.lock();
        let mut before = std::mem::take(&mut state.wanted);
        let mut wanted = BTreeMap::new();
        let mut changed = Vec::new();
        for (reference, status) in statuses {
            // It is gone if it is not there: nothing to tell.
            let Some(meta) = objects.meta(reference) else {
                continue;
            };
            let known = before.remove(reference);
            let is_same = |known: &Arc<Wanted>| {
                known.generation == meta.generation
                    && known.uid == meta.uid
                    && known.status == *status
            };
            let entry = match known {
                Some(known) if is_same(&known) => known,
                _ => {
                    changed.push(reference.clone());
                    Arc::new(Wanted {
                        status: status.clone(),
                        generation: meta.generation,
                        uid: meta.uid.clone(),
                    })
                }
            };
            wanted.insert(reference.clone(), entry);
        }
        // What is there and about which nothing is told any more.
        let forgotten = before.into_keys().filter(|of| objects.meta(of).is_some());
        changed.extend(forgotten);
        state.wanted = wanted;
        let first = !std::mem::replace(&mut state.filled, true);
        if state.leading {
            for reference in changed {
                state.objects.add(reference);
            }
        }
        if first || !state.objects.is_empty() {
            self.shared.objects_changed.notify_one();
        }
    }
}

impl Shared {
    /// What is to stand at an object, faults included.
    fn wanted(&self, object: &ObjectRef) -> Option<Arc<Wanted>> {
        let state = self.state.lock();
        let wanted = state.wanted.get(object)?;
        let Some(faults) = state.faults.get(object) else {
            return Some(wanted.clone());
        };
        let mut wanted = Wanted::clone(wanted);
        for fault in faults {
            let mut conditions = wanted.status.conditions.iter_mut();
            match conditions.find(|known| known.kind == fault.kind) {
                Some(known) => *known = fault.clone(),
                None => wanted.status.conditions.push(fault.clone()),
            }
        }
        Some(Arc::new(wanted))
    }

    /// The next object to write about; otherwise when there will be one.
    fn next_object(&self) -> Result<ObjectRef, Option<Instant>> {
        let mut state = self.state.lock();
        let queued = state.objects.len();
        self.metrics
            .objects_queued
            .set(queued.try_into().unwrap_or(i64::MAX));
        let next = state.objects.take(Instant::now());
        next.ok_or_else(|| state.objects.next())
    }

    /// The next pod to annotate; otherwise when there will be one.
    fn next_pod(&self) -> Result<(Arc<str>, Option<Mark>), Option<Instant>> {
        let mut state = self.state.lock();
        let queued = state.pods.len();
        self.metrics
            .pods_queued
            .set(queued.try_into().unwrap_or(i64::MAX));
        match state.pods.take(Instant::now()) {
            Some(uid) => {
                let mark = state.marks.get(&uid).cloned();
                Ok((uid, mark))
            }
            None => Err(state.pods.next()),
        }
    }
}

fn is_marked(pod: &Pod) -> bool {
    pod.meta.annotation(REDIRECTION) == Some(REDIRECTION_ENABLED)
}

/// The time, as conditions state it.
fn rfc3339_now() -> String {
    super::rfc3339(std::time::SystemTime::now())
}
