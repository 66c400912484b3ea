//! What is measured, in its order.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rand::Rng as _;
use tokio::time::{sleep, timeout};

use super::client::Clients;
use super::report::{Measured, Report};
use super::server::{Aditd, ApiServer};
use super::world::{Size, World};
use crate::bench::report::MIB;
use crate::bench::usage::{Window, memory};

/// Creating all objects of the largest cluster, on two cores.
const CREATE: Duration = Duration::from_secs(30 * 60);
const READY: Duration = Duration::from_secs(300);
/// Five hundred first responses of the largest cluster.
const SYNC: Duration = Duration::from_secs(600);
/// For a change to be everywhere.
const ARRIVE: Duration = Duration::from_secs(60);
/// Before the changes: what the start has set off comes to its end.
const SETTLE: Duration = Duration::from_secs(5);
/// At most so long between a change and the next one.
const PAUSE_MS: u64 = 60;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// The control plane; `None`: the one that is built beside this program.
    pub aditd: Option<PathBuf>,
    /// The clusters, one after the other.
    pub sizes: Vec<Size>,
    /// Changes of endpoints.
    pub changes: usize,
    /// The API server of this name, with the objects of the largest cluster, is used and
    /// kept: creating them takes most of the time. `None`: each cluster has its own.
    pub api_server: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            aditd: None,
            sizes: vec![Size::USUAL],
            changes: 200,
            api_server: None,
        }
    }
}

impl Options {
    /// Shows that everything works.
    pub fn quick() -> Self {
        Self {
            sizes: vec![Size::QUICK],
            changes: 20,
            ..Self::default()
        }
    }

    /// Adds the cluster that takes minutes to make.
    pub fn with_large(mut self) -> Self {
        self.sizes.push(Size::LARGE);
        self
    }
}

/// Measures every cluster.
///
/// # Errors
/// Something does not come up, or a client loses its connection; everything that was started
/// is ended in any case.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let aditd = match &options.aditd {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("aditd"),
    };
    ensure!(aditd.is_file(), "{} is not built", aditd.display());
    // The clients have a thread of their own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut clusters = Vec::new();
    // A named one has room for the objects of one size.
    let others = match options.api_server {
        Some(_) => options.sizes.len().saturating_sub(1),
        None => 0,
    };
    for size in options.sizes.iter().skip(others) {
        clusters.push(runtime.block_on(measure(&aditd, *size, options))?);
    }
    Ok(Report { clusters })
}

async fn measure(aditd: &Path, size: Size, options: &Options) -> anyhow::Result<Measured> {
    let changes = options.changes;
    let begin = Instant::now();
    eprintln!(
        "scale: creating {} pods, {} services, {} nodes",
        size.pods, size.services, size.nodes
    );
    let api = ApiServer::start(options.api_server.as_deref()).await?;
    let world = World::connect(&api.kubeconfig, size).await?;
    if !world.is_complete().await? {
        timeout(CREATE, world.create())
            .await
            .with_context(|| format!("objects not created after {CREATE:?}"))??;
    }
    let proxies = world.proxies().await?;
    let created = begin.elapsed();
    eprintln!("scale: created in {:.0} s; starting", created.as_secs_f64());

    let (server, ready) = Aditd::start(aditd, &api.kubeconfig, READY).await?;
    let at_start = memory(server.pid())?;
    let roots = world.roots().await?;
    let connecting = Instant::now();
    let clients = Clients::start(proxies, server.xds, &roots)?;
    clients
        .unless_failed(SYNC, clients.seen.synced(size.nodes))
        .await
        .with_context(|| server.last_words())?;
    let synced = connecting.elapsed();
    let first_bytes = clients.seen.bytes.load(Ordering::Relaxed);
    let after_sync = memory(server.pid())?;
    eprintln!("scale: ready after {ready:?}, clients after {synced:?}; {after_sync:?}");
    let prepared = world.changes(changes).await?;
    sleep(SETTLE).await;

    let pids = [server.pid()];
    let messages = clients.seen.messages.load(Ordering::Relaxed);
    let bytes = clients.seen.bytes.load(Ordering::Relaxed);
    let window = Window::open(&pids)?;
    let mut delays = Vec::with_capacity(changes);
    for change in prepared {
        clients.seen.expect(&change.resource);
        let started = Instant::now();
        world.make(&change).await?;
        let last = clients
            .unless_failed(ARRIVE, clients.seen.arrived(size.nodes))
            .await
            .with_context(|| change.resource.clone())?;
        delays.push(last.duration_since(started));
        let pause = rand::rng().random_range(0..PAUSE_MS);
        sleep(Duration::from_millis(pause)).await;
    }
    let used = window.close()?;
    let cpu = used.proxies.first().context("no CPU time")?.total();
    let of_clients = (changes * size.nodes) as f64;
    let since = |now: u64, then: u64| (now - then) as f64;
    let bytes = since(clients.seen.bytes.load(Ordering::Relaxed), bytes);
    let messages = since(clients.seen.messages.load(Ordering::Relaxed), messages);
    let at_end = memory(server.pid())?;
    delays.sort_unstable();
    Ok(Measured {
        size,
        changes,
        created_seconds: created.as_secs_f64(),
        ready_seconds: ready.as_secs_f64(),
        synced_seconds: synced.as_secs_f64(),
        retries: clients.seen.retries.load(Ordering::Relaxed),
        first_bytes_per_client: first_bytes as f64 / size.nodes as f64,
        ready_mib: at_start.resident as f64 / MIB,
        memory_mib: at_end.resident.max(after_sync.resident) as f64 / MIB,
        peak_mib: at_end.peak as f64 / MIB,
        delays_ms: delays.iter().map(|d| d.as_secs_f64() * 1e3).collect(),
        cpu_us_per_change: cpu / changes as f64,
        cpu_us_per_message: cpu / of_clients,
        bytes_per_change: bytes / of_clients,
        messages_per_change: messages / of_clients,
        foreign: used.foreign,
        took_seconds: begin.elapsed().as_secs_f64(),
    })
}
