//! The model as every thread sees it: one writer, readers that never wait.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::snapshot::Snapshot;
use super::store::{Store, Update};

/// A [`Store`] whose snapshots are published. Loading one costs no lock and, as a
/// rule, no reference count.
#[derive(Debug)]
pub struct SharedModel {
    snapshot: ArcSwap<Snapshot>,
    store: Mutex<Store>,
    version: watch::Sender<u64>,
}

impl SharedModel {
    /// An empty model.
    pub fn new() -> Self {
        Self {
            snapshot: ArcSwap::default(),
            store: Mutex::default(),
            version: watch::Sender::new(0),
        }
    }

    /// Applies a batch, publishes the result once and wakes those who watch. Returns
    /// the version that holds it. A batch that changes nothing wakes nobody.
    pub fn apply(&self, updates: impl IntoIterator<Item = Update>) -> u64 {
        let mut store = self.store.lock();
        let changed = store.apply(updates);
        let version = store.snapshot().version();
        if changed {
            self.snapshot.store(Arc::new(store.snapshot().clone()));
            self.version.send_replace(version);
        }
        version
    }

    /// The current state, for the duration of one decision.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// The current state, to be kept.
    pub fn load_full(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// The version of the current state.
    pub fn version(&self) -> u64 {
        self.load().version()
    }

    /// Follows the version. When it has moved, [`Self::load`] gives that state or a
    /// newer one.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

impl Default for SharedModel {
    fn default() -> Self {
        Self::new()
    }
}
