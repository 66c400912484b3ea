//! What has to be done before the process is ready, by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// The tasks that readiness waits for. Clones are one registry.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    /// How many tasks of each name are pending.
    pending: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Readiness {
    /// A registry without tasks: ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a pending task.
    pub fn task(&self, name: impl Into<String>) -> ReadinessTask {
        let name = name.into();
        *self.pending.lock().entry(name.clone()).or_default() += 1;
        ReadinessTask {
            readiness: self.clone(),
            name,
            pending: true,
        }
    }

    /// The names of pending tasks; empty when ready.
    pub fn pending(&self) -> Vec<String> {
        self.pending.lock().keys().cloned().collect()
    }
}

/// One thing that readiness waits for. Dropping it while pending leaves the process not
/// ready: a task that died has not been done.
#[derive(Debug)]
#[must_use = "readiness waits for it"]
pub struct ReadinessTask {
    readiness: Readiness,
    name: String,
    pending: bool,
}

impl ReadinessTask {
    /// It is done.
    pub fn done(&mut self) {
        self.set(false);
    }

    /// It has to be done again.
    pub fn pending(&mut self) {
        self.set(true);
    }

    fn set(&mut self, pending: bool) {
        if self.pending == pending {
            return;
        }
        self.pending = pending;
        let mut all = self.readiness.pending.lock();
        let count = all.entry(self.name.clone()).or_default();
        *count = if pending {
            *count + 1
        } else {
            count.saturating_sub(1)
        };
        if *count == 0 {
            all.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_every_task_and_forgets_none_that_died() {
        let readiness = Readiness::new();
        assert!(readiness.pending().is_empty());
        let mut xds = readiness.task("xds");
        let mut proxies = readiness.task("proxies");
        assert_eq!(readiness.pending(), ["proxies", "xds"]);
        xds.done();
        xds.done();
        assert_eq!(readiness.pending(), ["proxies"]);
        proxies.done();
        assert!(readiness.pending().is_empty());
        proxies.pending();
        assert_eq!(readiness.pending(), ["proxies"]);
        drop(proxies);
        assert_eq!(readiness.pending(), ["proxies"]);
    }

    #[test]
    fn tasks_of_one_name_are_counted() {
        let readiness = Readiness::new();
        let mut one = readiness.task("dns");
        let mut two = readiness.task("dns");
        one.done();
        assert_eq!(readiness.pending(), ["dns"]);
        two.done();
        assert!(readiness.pending().is_empty());
    }
}
