//! What the control plane has sent, compiled into one immutable view for the request path.
//!
//! [`State`] takes resources in any order, keeps those that can be used, and publishes a
//! [`View`] after each batch. Only the services that a batch touches are compiled anew; the
//! rest of a view is shared with the one before. What a user got wrong is kept as such and
//! fails closed; what cannot be decoded is rejected, and its last good version stays.

mod handler;
mod resources;
mod view;

use std::collections::HashSet;
use std::sync::Arc;

use adit_shared::model::{ServiceName, SharedModel, Update};
use adit_shared::xds::client::{Rejected, Resource};
use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use tokio::sync::watch;

pub use handler::{Addresses, Resources};
use resources::Store;
pub use view::{Gateway, PortView, Protocol, ServiceView, View};

/// Which services a change touches.
#[derive(Debug, Default)]
struct Touched {
    /// All of them: a policy without a target, a setting of the mesh.
    everything: bool,
    /// These.
    services: HashSet<ServiceName>,
}

/// Everything that is known, and the view of it that requests read.
pub struct State {
    model: Arc<SharedModel>,
    view: ArcSwap<View>,
    store: Mutex<Store>,
    version: watch::Sender<u64>,
}

impl State {
    /// An empty state of the waypoint `gateway`.
    pub fn new(gateway: Gateway) -> Self {
        Self {
            model: Arc::new(SharedModel::new()),
            view: ArcSwap::from_pointee(View::empty(gateway)),
            store: Mutex::default(),
            version: watch::Sender::new(0),
        }
    }

    /// Workloads and services.
    pub fn model(&self) -> &Arc<SharedModel> {
        &self.model
    }

    /// The current view, for the duration of one decision.
    pub fn load(&self) -> Guard<Arc<View>> {
        self.view.load()
    }

    /// The current view, to be kept.
    pub fn load_full(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Follows the version of the view.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Applies changes of workloads and services.
    pub fn apply_addresses(&self, updates: impl IntoIterator<Item = Update>) {
        let mut store = self.store.lock();
        self.model.apply(updates);
        // Which services differ is seen by comparing their entries.
        self.publish(&mut store, Touched::default());
    }

    /// Applies one response of the waypoint's own resources. What cannot be used is returned.
    pub fn apply(
        &self,
        type_url: &str,
        updates: Vec<Resource>,
        removed: &[String],
    ) -> Vec<Rejected> {
        let mut store = self.store.lock();
        let mut touched = Touched::default();
        let mut rejected = Vec::new();
        for resource in updates {
            let Resource { name, body, .. } = resource;
            if let Err(reason) = store.upsert(type_url, &name, body, &mut touched) {
                rejected.push(Rejected { name, reason });
            }
        }
        for name in removed {
            store.remove(type_url, name, &mut touched);
        }
        self.publish(&mut store, touched);
        rejected
    }

    /// Makes the next view. The lock of the store is held: views come in order.
    fn publish(&self, store: &mut Store, touched: Touched) {
        let before = self.view.load_full();
        if let Some(next) = before.next(self.model.load_full(), store, &touched) {
            let version = next.version();
            self.view.store(Arc::new(next));
            self.version.send_replace(version);
        }
    }
}
