//! What a worker does beside requests: it follows the configuration, and closes what lies idle.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::hbone::buffer::BufferPool;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep};

use super::Worker;
use crate::proxy::dial::Dialer;
use crate::proxy::http::SWEEP;
use crate::state::Mesh;
use crate::telemetry::{ExportTarget, SpanExporter, SpanQueue};

/// How long a buffer that nobody needs stays with its worker, at the most twice that.
const TRIM_INTERVAL: Duration = Duration::from_secs(5);

/// Brings what the worker holds in line with each new state of the configuration.
pub(super) async fn follow(worker: Rc<Worker>) {
    let mut versions = worker.shared.state.subscribe();
    let mut exporters = Exporters::default();
    loop {
        {
            let view = worker.shared.state.load_full();
            exporters.follow(&worker, view.mesh());
            let model = view.model();
            let gone = |uid: &str, address: SocketAddr| {
                let workload = model.workload(uid);
                workload.is_none_or(|workload| !workload.addresses.contains(&address.ip()))
            };
            worker.upstreams.evict(|of| gone(&of.uid, of.address));
            worker.tunnels.evict(|of| gone(&of.peer, of.address));
        }
        if versions.changed().await.is_err() {
            return;
        }
    }
}

/// Takes spans to the collectors that are configured.
#[derive(Default)]
struct Exporters {
    mesh: Option<Arc<Mesh>>,
    running: HashMap<String, (ExportTarget, AbortHandle)>,
}

impl Exporters {
    fn follow(&mut self, worker: &Rc<Worker>, mesh: &Arc<Mesh>) {
        if self
            .mesh
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(known, mesh))
        {
            return;
        }
        self.mesh = Some(mesh.clone());
        let config = &worker.shared.config;
        let own = format!("{}.{}", config.gateway, config.namespace);
        let mut before = std::mem::take(&mut self.running);
        for (name, provider) in &mesh.providers {
            let Some(target) = ExportTarget::from_provider(provider, &own) else {
                continue;
            };
            let running = match before.remove(name) {
                Some((known, task)) if known == target => (known, task),
                replaced => {
                    if let Some((_, task)) = replaced {
                        task.abort();
                    }
                    let queue = SpanQueue::new(worker.shared.spans.clone());
                    let mut telemetry = worker.telemetry.borrow_mut();
                    telemetry.set_exporter(name.as_str().into(), Some(queue.clone()));
                    let dial = Dialer::new(worker);
                    let exporter = SpanExporter::new(queue, target.clone(), dial);
                    (target, spawn_local(exporter.run()).abort_handle())
                }
            };
            self.running.insert(name.clone(), running);
        }
        for (name, (_, task)) in before {
            task.abort();
            let mut telemetry = worker.telemetry.borrow_mut();
            telemetry.set_exporter(name.as_str().into(), None);
        }
    }
}

/// Closes what has been idle or slow for too long.
pub(super) async fn sweep(worker: Rc<Worker>) {
    let mut trimmed = Instant::now();
    loop {
        sleep(SWEEP).await;
        let now = Instant::now();
        for (_, downstream) in worker.downstreams.borrow().iter() {
            downstream.sweep(now);
        }
        worker.upstreams.sweep(now);
        if now.saturating_duration_since(trimmed) >= TRIM_INTERVAL {
            trimmed = now;
            worker.telemetry.borrow().forget_series();
            BufferPool::local().trim();
        }
    }
}
