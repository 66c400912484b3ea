//! The two places where status is kept, as the driver uses them.

use std::sync::Arc;
use std::time::SystemTime;

use super::kubernetes::KubernetesStatus;
use super::{CapturedPod, ObjectStatus, StatusError, StatusStore};
use crate::compile::{Desired, Redirection, RedirectionTracker};
use crate::model::{ObjectRef, Objects};

/// Where status is kept.
#[derive(Debug)]
pub enum StatusBackend {
    /// A directory, or memory.
    Directory(StatusStore),
    /// The API server.
    Kubernetes(KubernetesStatus),
}

impl StatusBackend {
    /// Pods that were captured when a control plane wrote about them last, and their nodes.
    pub fn captured(&self, objects: &Objects) -> Vec<(Arc<str>, Arc<str>)> {
        match self {
            Self::Directory(store) => store
                .captured()
                .map(|pod| (pod.uid.clone(), pod.node.clone()))
                .collect(),
            Self::Kubernetes(_) => KubernetesStatus::captured(objects)
                .map(|(uid, node)| (uid.clone(), node.clone()))
                .collect(),
        }
    }

    /// Tells the tracker of pods that other replicas found to be captured.
    pub fn adopt(&self, objects: &Objects, desired: &Desired, tracker: &mut RedirectionTracker) {
        if let Self::Kubernetes(_) = self {
            for (uid, node) in KubernetesStatus::captured(objects) {
                // One that is being withdrawn is marked for a while still.
                if desired.enrolled.get(uid) == Some(node) {
                    tracker.adopt(uid, node);
                }
            }
        }
    }

    /// Keeps which pods are captured, before anybody relies on it: takes out of
    /// `redirection` whatever could not be kept yet.
    ///
    /// # Errors
    /// The file system's. The API server's failures are tried again by themselves.
    pub fn set_captured(
        &mut self,
        captured: impl IntoIterator<Item = CapturedPod>,
        objects: &Objects,
        redirection: &mut Redirection,
    ) -> Result<(), StatusError> {
        match self {
            Self::Directory(store) => store.set_captured(captured),
            Self::Kubernetes(status) => {
                status.set_captured(captured, objects, redirection);
                Ok(())
            }
        }
    }

    /// Replaces the status of all objects.
    ///
    /// # Errors
    /// As [`Self::set_captured`].
    pub fn set_statuses<'a>(
        &mut self,
        statuses: impl IntoIterator<Item = (&'a ObjectRef, &'a ObjectStatus)>,
        objects: &Objects,
        now: SystemTime,
    ) -> Result<(), StatusError> {
        match self {
            Self::Directory(store) => {
                let generation = |of: &ObjectRef| objects.meta(of)?.generation;
                store.set_statuses(statuses, generation, now)
            }
            Self::Kubernetes(status) => {
                status.set_statuses(statuses, objects);
                Ok(())
            }
        }
    }
}
