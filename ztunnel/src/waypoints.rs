//! Waypoints that connections have failed at: what the admin endpoint says of them. Whether one
//! is tried does not depend on it; that is the control plane's to say.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use adit_shared::model::WorkloadUid;
use parking_lot::Mutex;

/// Instances of waypoints that are remembered. A node knows fewer.
const MAX_INSTANCES: usize = 1024;

/// How an instance of a waypoint has failed since it was last reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// First time.
    pub since: SystemTime,
    /// How often.
    pub failures: u64,
    /// What happened last.
    pub error: String,
}

/// All of those that fail at the moment.
#[derive(Debug, Default)]
pub struct FailingWaypoints {
    /// There are some: who succeeds looks no further while there are none.
    any: AtomicBool,
    instances: Mutex<HashMap<WorkloadUid, Failing>>,
}

impl FailingWaypoints {
    /// A connection to that instance has failed.
    pub fn failed(&self, instance: &WorkloadUid, error: &str) {
        let mut instances = self.instances.lock();
        self.any.store(true, Ordering::Relaxed);
        if let Some(failing) = instances.get_mut(instance) {
            failing.failures += 1;
            failing.error = error.to_owned();
        } else if instances.len() < MAX_INSTANCES {
            let failing = Failing {
                since: SystemTime::now(),
                failures: 1,
                error: error.to_owned(),
            };
            instances.insert(instance.clone(), failing);
        }
    }

    /// One has succeeded.
    pub fn reached(&self, instance: &WorkloadUid) {
        if !self.any.load(Ordering::Relaxed) {
            return;
        }
        let mut instances = self.instances.lock();
        instances.remove(instance);
        self.any.store(!instances.is_empty(), Ordering::Relaxed);
    }

    /// Forgets instances that `known` does not know any more: nobody reaches them ever again,
    /// and as long as one is remembered every connection that succeeds looks here.
    pub fn forget(&self, known: impl Fn(&str) -> bool) {
        let mut instances = self.instances.lock();
        instances.retain(|uid, _| known(uid));
        self.any.store(!instances.is_empty(), Ordering::Relaxed);
    }

    /// Forgets as [`FailingWaypoints::forget`], and tells the others.
    pub fn snapshot(&self, known: impl Fn(&str) -> bool) -> HashMap<WorkloadUid, Failing> {
        self.forget(known);
        self.instances.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_fails_until_it_is_reached_or_gone() {
        let failing = FailingWaypoints::default();
        let (one, two): (WorkloadUid, WorkloadUid) = ("one".into(), "two".into());
        failing.reached(&one);
        failing.failed(&one, "refused");
        failing.failed(&one, "timed out");
        failing.failed(&two, "refused");
        let now = failing.snapshot(|_| true);
        assert_eq!((now[&one].failures, &*now[&one].error), (2, "timed out"));
        failing.reached(&one);
        let now = failing.snapshot(|_| true);
        assert!(!now.contains_key(&one) && now.contains_key(&two));
        assert!(failing.snapshot(|_| false).is_empty());
        assert!(!failing.any.load(Ordering::Relaxed));
    }

    #[test]
    fn nobody_looks_for_instances_that_are_gone() {
        let failing = FailingWaypoints::default();
        failing.failed(&"gone".into(), "refused");
        failing.failed(&"there".into(), "refused");
        failing.forget(|uid| uid == "there");
        assert!(failing.any.load(Ordering::Relaxed));
        assert_eq!(failing.instances.lock().len(), 1);
        failing.forget(|_| false);
        assert!(!failing.any.load(Ordering::Relaxed));
    }
}
