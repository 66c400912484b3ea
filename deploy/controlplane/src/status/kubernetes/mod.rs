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
#[cfg(test)]
mod oracle;
mod pods;
mod resources;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

pub use merge::{Change, Wanted, kinds, merge};

use crate::compile::{Redirection, RedirectionTracker, Redirections};
use crate::kubernetes::Kubernetes;
use crate::kubernetes::queue::Queue;
use crate::model::{Finding, NamespaceObjects, ObjectRef, Objects, Pod};
use crate::serve::WriteMetrics;
use crate::status::{Condition, ObjectStatus, REDIRECTION, REDIRECTION_ENABLED};

/// What is to stand in the API server, as the driver sees it. Belongs to one driver; the
/// tasks that write end with it, or with [`Writers`].
#[derive(Debug)]
pub struct KubernetesStatus {
    shared: Arc<Shared>,
    leading: watch::Receiver<bool>,
    /// What [`Self::leading`] said when namespaces were gone over last.
    led: bool,
    namespaces: BTreeMap<Arc<str>, OfNamespace>,
}

/// The pods of a namespace.
#[derive(Debug, Default)]
struct OfNamespace {
    /// Captured pods whose annotation was seen or written; the others are not published.
    kept: BTreeMap<Arc<str>, Kept>,
    /// Pods that have an entry in [`State::marks`].
    marked: BTreeSet<Arc<str>>,
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
    /// By namespace; what is in none is under the empty name.
    wanted: BTreeMap<Arc<str>, BTreeMap<ObjectRef, Arc<Wanted>>>,
    faults: BTreeMap<ObjectRef, Vec<Condition>>,
    findings: Vec<Finding>,
    objects: Queue<ObjectRef>,
    marks: BTreeMap<Arc<str>, Mark>,
    pods: Queue<Arc<str>>,
    /// Namespaces and uids of pods whose annotation was written since the driver asked.
    confirmed: BTreeSet<(Arc<str>, Arc<str>)>,
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
            led: false,
            namespaces: BTreeMap::new(),
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

    /// Whether a pod has the annotation.
    pub(super) fn is_marked(pod: &Pod) -> bool {
        pod.meta.annotation(REDIRECTION) == Some(REDIRECTION_ENABLED)
    }

    /// Sees to the annotations in the namespaces that were `touched`, and in those of which
    /// more is known now. What is published of them leaves out whatever nobody but us knows.
    pub(super) fn set_captured(
        &mut self,
        tracker: &RedirectionTracker,
        mut touched: BTreeSet<Arc<str>>,
        objects: &Objects,
        redirections: &mut Redirections,
    ) {
        let mut state = self.shared.state.lock();
        for (namespace, uid) in std::mem::take(&mut state.confirmed) {
            let of = self.namespaces.entry(namespace.clone()).or_default();
            of.kept.entry(uid).or_insert(Kept::Written);
            touched.insert(namespace);
        }
        let leading = *self.leading.borrow();
        if std::mem::replace(&mut self.led, leading) != leading {
            touched.extend(objects.namespaces.keys().cloned());
        }
        for name in touched {
            let now = objects
                .namespaces
                .get(&name)
                .zip(tracker.redirection(&name));
            let Some((of, redirection)) = now else {
                if let Some(gone) = self.namespaces.remove(&name) {
                    for uid in gone.marked {
                        state.marks.remove(&uid);
                    }
                }
                redirections.remove(&name);
                continue;
            };
            let known = self.namespaces.entry(name.clone()).or_default();
            let is_captured = |uid: &str| tracker.captured_on(&name, uid).is_some();
            known.see_to(of, is_captured, leading, &mut state);
            let published = redirections.entry(name.clone()).or_default();
            known.publish(redirection, published);
        }
        if !state.pods.is_empty() {
            self.shared.pods_changed.notify_one();
        }
    }

    /// Replaces what is told about the objects of these namespaces.
    pub(super) fn set_statuses<'a>(
        &mut self,
        statuses: impl IntoIterator<Item = (Arc<str>, Option<&'a BTreeMap<ObjectRef, ObjectStatus>>)>,
        objects: &Objects,
    ) {
        let mut state = self.shared.state.lock();
        let mut changed = Vec::new();
        for (namespace, statuses) in statuses {
            let mut before = state.wanted.remove(&namespace).unwrap_or_default();
            let mut wanted = BTreeMap::new();
            for (reference, status) in statuses.into_iter().flatten() {
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
            if !wanted.is_empty() {
                state.wanted.insert(namespace, wanted);
            }
        }
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

impl OfNamespace {
    /// Decides which annotations are to be set or removed.
    fn see_to(
        &mut self,
        of: &NamespaceObjects,
        is_captured: impl Fn(&str) -> bool,
        leading: bool,
        state: &mut State,
    ) {
        self.kept.retain(|uid, _| is_captured(uid));
        let before = std::mem::take(&mut self.marked);
        for pod in of.pods.values() {
            let uid = &pod.meta.uid;
            let enable = match (is_captured(uid), KubernetesStatus::is_marked(pod)) {
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
                state.marks.insert(uid.clone(), mark);
            }
            self.marked.insert(uid.clone());
        }
        for uid in before.difference(&self.marked) {
            state.marks.remove(uid);
        }
    }

    /// Leaves out of `redirection` whatever nobody but us knows.
    fn publish(&self, redirection: &Arc<Redirection>, published: &mut Arc<Redirection>) {
        if redirection
            .hbone
            .iter()
            .all(|uid| self.kept.contains_key(uid))
        {
            *published = redirection.clone();
            return;
        }
        let mut known = Redirection::clone(redirection);
        known.hbone.retain(|uid| self.kept.contains_key(uid));
        if **published != known {
            *published = Arc::new(known);
        }
    }
}

impl Shared {
    /// What is to stand at an object, faults included.
    fn wanted(&self, object: &ObjectRef) -> Option<Arc<Wanted>> {
        let state = self.state.lock();
        let wanted = state.wanted.get(&object.namespace)?.get(object)?;
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

/// The time, as conditions state it.
fn rfc3339_now() -> String {
    super::rfc3339(std::time::SystemTime::now())
}
