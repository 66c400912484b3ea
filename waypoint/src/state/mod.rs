//! What the control plane has sent, compiled into one immutable view for the request path.
//!
//! [`State`] takes resources in any order, keeps those that can be used, and publishes a
//! [`View`] after each batch. Only the services that a batch touches are compiled anew; the
//! rest of a view is shared with the one before. What a user got wrong is kept as such and
//! fails closed; what cannot be decoded is rejected, and its last good version stays.

mod backend;
mod handler;
mod resources;
mod secrets;
mod view;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use adit_shared::model::{ServiceEntry, ServiceName, SharedModel, Update};
use adit_shared::policy::http::HttpTarget;
use adit_shared::proto::waypoint as pb;
use adit_shared::xds::client::{Rejected, Resource};
use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::authentication::{Fetcher, KeySources, Resolve};

pub use backend::{Backend, Reach};
pub use handler::{Addresses, Resources};
use resources::Store;
pub use view::{Gateway, Mesh, PortView, Protocol, ServiceView, View};

/// Which services a change touches.
#[derive(Debug, Default)]
struct Touched {
    /// All of them: a policy without a target, a setting of the mesh.
    everything: bool,
    /// These.
    services: HashSet<ServiceName>,
    /// Those of these hosts, which may begin with `*.`.
    hosts: Vec<Arc<str>>,
    /// Those that have one of these workloads.
    workloads: Vec<Arc<str>>,
}

impl Touched {
    fn is_empty(&self) -> bool {
        !self.everything
            && self.workloads.is_empty()
            && self.services.is_empty()
            && self.hosts.is_empty()
    }

    /// Whether `service` has to be compiled anew.
    fn contains(&self, entry: &ServiceEntry) -> bool {
        let service = &entry.service().key;
        self.everything
            || self.workloads.iter().any(|uid| entry.has_endpoint(uid))
            || self.services.contains(service)
            || self
                .hosts
                .iter()
                .any(|host| host_matches(host, &service.hostname))
    }

    fn targets<'a>(&mut self, targets: impl IntoIterator<Item = &'a pb::Target>) {
        let mut any = false;
        for target in targets {
            any = true;
            match &target.kind {
                Some(pb::target::Kind::Service(service)) => {
                    self.services.insert(resources::service_name(service));
                }
                _ => self.everything = true,
            }
        }
        // No target at all is everything.
        self.everything |= !any;
    }

    fn policy_targets(&mut self, targets: &[HttpTarget]) {
        for target in targets {
            match target {
                HttpTarget::Service {
                    namespace,
                    hostname,
                } => {
                    self.services.insert(ServiceName {
                        namespace: namespace.clone(),
                        hostname: hostname.clone(),
                    });
                }
                HttpTarget::Workload(uid) => self.workloads.push(uid.clone()),
                _ => self.everything = true,
            }
        }
    }

    fn backends(&mut self, resource: &pb::BackendTls) {
        let services = resource.targets.iter().filter_map(|t| t.service.as_ref());
        self.services.extend(services.map(resources::service_name));
    }
}

/// Whether a host of a traffic policy, `*.` prefix allowed, is or covers `hostname`.
fn host_matches(host: &str, hostname: &str) -> bool {
    match host.strip_prefix('*') {
        Some(suffix) => hostname.len() > suffix.len() && hostname.ends_with(suffix),
        None => host == hostname,
    }
}

/// Finds services of the mesh for whoever fetches issuers' keys: by their endpoints, for the
/// waypoint itself is not captured.
fn resolver(gateway: &Gateway, model: &Arc<SharedModel>) -> Box<Resolve> {
    let (namespace, model) = (gateway.namespace.clone(), model.clone());
    Box::new(move |host, port| {
        let model = model.load();
        let entry = model.service_by_hostname(host, &namespace)?;
        let key = &entry.service().key;
        let addresses = entry.endpoints().iter().filter_map(|workload| {
            let own = workload.ports_of(key).into_iter().flatten();
            let target = own
                .filter(|own| own.service_port == port)
                .find_map(|own| own.target_port)
                .or_else(|| entry.service().port(port)?.target_port)?;
            Some(SocketAddr::new(*workload.addresses.first()?, target))
        });
        Some(addresses.collect())
    })
}

/// Everything that is known, and the view of it that requests read.
pub struct State {
    model: Arc<SharedModel>,
    view: ArcSwap<View>,
    store: Mutex<Store>,
    version: watch::Sender<u64>,
    complete: AtomicBool,
}

impl State {
    /// An empty state of the waypoint `gateway`. Issuers' keys are fetched on `runtime`.
    pub fn new(gateway: Gateway, runtime: Handle) -> Self {
        let model = Arc::new(SharedModel::new());
        let fetcher = Fetcher::new(Some(resolver(&gateway, &model)));
        let store = Store::new(KeySources::new(runtime, fetcher));
        Self {
            model,
            view: ArcSwap::from_pointee(View::empty(gateway, &store)),
            store: Mutex::new(store),
            version: watch::Sender::new(0),
            complete: AtomicBool::new(false),
        }
    }

    /// Everything has been received once. Before that nothing is served: what is missing may be
    /// the policy that denies.
    pub fn completed(&self) {
        self.complete.store(true, Ordering::Release);
    }

    /// Whether everything has been received once.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
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
        store.settle();
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
