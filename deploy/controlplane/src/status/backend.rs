//! The two places where status is kept, as the driver uses them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use super::kubernetes::KubernetesStatus;
use super::{CapturedPod, StatusError, StatusStore};
use crate::compile::{Captured, Compiler, RedirectionTracker, Redirections};
use crate::model::{ObjectRef, Objects, Pod};

/// Where status is kept.
#[derive(Debug)]
pub enum StatusBackend {
    /// A directory, or memory.
    Directory(StatusStore),
    /// The API server.
    Kubernetes(KubernetesStatus),
}

impl StatusBackend {
    /// Pods that were captured when a control plane wrote about them last.
    pub fn captured(&self, objects: &Objects) -> Vec<Captured> {
        match self {
            Self::Directory(store) => store
                .captured()
                .map(|pod| Captured {
                    namespace: pod.namespace.clone(),
                    uid: pod.uid.clone(),
                    node: pod.node.clone(),
                })
                .collect(),
            Self::Kubernetes(_) => {
                let pods = objects.namespaces.values().flat_map(|of| of.pods.values());
                pods.filter(|pod| self.adopts(pod))
                    .map(|pod| Captured {
                        namespace: pod.meta.namespace.clone(),
                        uid: pod.meta.uid.clone(),
                        node: pod.node.clone(),
                    })
                    .collect()
            }
        }
    }

    /// Whether a pod says of itself that somebody found it to be captured.
    pub fn adopts(&self, pod: &Pod) -> bool {
        match self {
            Self::Directory(_) => false,
            Self::Kubernetes(_) => KubernetesStatus::is_marked(pod),
        }
    }

    /// Keeps which pods are captured, before anybody relies on it. `touched` are the
    /// namespaces that the tracker has gone over. What may be published of them, because
    /// it is kept, is in `redirections` afterwards.
    ///
    /// # Errors
    /// The file system's. The API server's failures are tried again by themselves.
    pub fn set_captured(
        &mut self,
        tracker: &RedirectionTracker,
        touched: BTreeSet<Arc<str>>,
        objects: &Objects,
        redirections: &mut Redirections,
    ) -> Result<(), StatusError> {
        match self {
            Self::Directory(store) => {
                for name in touched {
                    match tracker.redirection(&name) {
                        Some(redirection) => redirections.insert(name, redirection.clone()),
                        None => redirections.remove(&name),
                    };
                }
                store.set_captured(captured_pods(tracker, objects))
            }
            Self::Kubernetes(status) => {
                status.set_captured(tracker, touched, objects, redirections);
                Ok(())
            }
        }
    }

    /// Replaces the status of the objects of whatever the compiler compiled last.
    ///
    /// # Errors
    /// As [`Self::set_captured`].
    pub fn set_statuses(
        &mut self,
        compiler: &Compiler,
        objects: &Objects,
        now: SystemTime,
    ) -> Result<(), StatusError> {
        match self {
            Self::Directory(store) => {
                let generation = |of: &ObjectRef| objects.meta(of)?.generation;
                store.set_statuses(compiler.statuses(), generation, now)
            }
            Self::Kubernetes(status) => {
                status.set_statuses(compiler.changed_statuses(), objects);
                Ok(())
            }
        }
    }
}

fn captured_pods(
    tracker: &RedirectionTracker,
    objects: &Objects,
) -> impl Iterator<Item = CapturedPod> {
    let pods = objects.namespaces.values().flat_map(|of| of.pods.values());
    pods.filter_map(|pod| {
        let meta = &pod.meta;
        Some(CapturedPod {
            uid: meta.uid.clone(),
            node: tracker.captured_on(&meta.namespace, &meta.uid)?.clone(),
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
        })
    })
}
