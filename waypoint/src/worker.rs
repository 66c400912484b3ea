//! A worker: one thread, one single-threaded runtime, and everything that a request needs. Its
//! listener, TLS connections, tunnels, pools and buffers belong to it alone, so that a request
//! never changes threads and takes no lock.
//!
//! Each worker has a member of the listener's `SO_REUSEPORT` group. The kernel spreads
//! connections by a hash, which with the few connections of a node is uneven as often as not:
//! so a worker hands a connection that it has accepted to one that has fewer, before a byte of
//! it is read.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use adit_shared::hbone::buffer::BufferPool;
use adit_shared::hbone::{Baggage, BaggageFields};
use adit_shared::identity::{CertificateCache, WorkloadCertificate};
use adit_shared::model::Workload;
use adit_shared::net::accept::{AcceptCounts, AcceptLimits, AcceptPermit, accept_loop};
use adit_shared::net::drain::{DrainMode, DrainWatcher};
use adit_shared::net::socket::{Keepalive, prepare};
use adit_shared::proto::waypoint::Provider;
use adit_shared::telemetry::{Event, LogWriter, Telemetry};
use slab::Slab;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{AbortHandle, LocalSet, spawn_local};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{error, warn};

use crate::authentication::Authenticator;
use crate::config::Config;
use crate::external_authorization::ExternalAuthorization;
use crate::live::{Listing, Live, UpstreamTunnelView};
use crate::proxy::dial::Dialer;
use crate::proxy::exchange::Exchange;
use crate::proxy::http::{Downstream, SWEEP};
use crate::proxy::mirror::MAX_MIRRORS;
use crate::proxy::recheck;
use crate::proxy::tunnel;
use crate::proxy::upstream::{HttpVersion, TunnelPool, Upstreams, new_tunnel_pool};
use crate::route::{AuthProtocol, ExternalAuth, SessionKey};
use crate::state::{Mesh, State};
use crate::telemetry::{
    ExportCounters, ExportTarget, RequestMetrics, RequestTelemetry, SpanExporter, SpanQueue,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// Commands and connections that may wait for a worker.
const QUEUE: usize = 1024;
/// How long a buffer that nobody needs stays with its worker, at the most twice that.
const TRIM_INTERVAL: Duration = Duration::from_secs(30);

/// What all workers share.
pub struct Shared {
    /// Configuration.
    pub config: Config,
    /// Everything that the control plane has said.
    pub state: Arc<State>,
    /// Our own certificate.
    pub certificates: CertificateCache,
    /// Metrics and access log of connections.
    pub telemetry: Telemetry,
    /// Metrics of requests.
    pub requests: Arc<RequestMetrics>,
    /// Where access logs go.
    pub log: Option<LogWriter>,
    /// What becomes of spans.
    pub spans: Arc<ExportCounters>,
    /// Seals the tokens of sessions, where the control plane gives no key.
    pub session_key: SessionKey,
    /// Says when to stop.
    pub drain: DrainWatcher,
}

/// A provider as it was configured, and what asks it; `None`: it cannot be used.
type Asked = (Arc<Provider>, Option<Rc<ExternalAuthorization<Dialer>>>);

/// What a worker has to do, as others see it.
#[derive(Debug, Default)]
struct Load {
    /// HBONE connections, with those on their way to it.
    connections: AtomicUsize,
    /// CONNECT streams that are open.
    streams: AtomicUsize,
    /// Requests that have ended.
    requests: AtomicUsize,
}

/// A connection on its way from one worker to another.
struct HandOver {
    stream: std::net::TcpStream,
    peer: SocketAddr,
    permit: AcceptPermit,
}

enum Command {
    Serve(HandOver),
    Connections { reply: oneshot::Sender<Counts> },
    List { reply: oneshot::Sender<Listing> },
}

/// What a worker holds at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// HBONE connections of clients.
    pub connections: usize,
    /// CONNECT streams on them.
    pub streams: usize,
    /// HTTP connections inside of those.
    pub http_connections: usize,
    /// Requests that have ended.
    pub requests: usize,
    /// Connections of HTTP/1 to endpoints that lie idle.
    pub idle_upstream: usize,
    /// Connections of HTTP/2 to endpoints.
    pub http2_upstream: usize,
}

/// The other workers, as each of them sees them.
#[derive(Clone)]
struct Peer {
    load: Arc<Load>,
    commands: mpsc::Sender<Command>,
}

/// The outside of a worker, which ends when it is told to drain.
pub struct WorkerHandle {
    peer: Peer,
}

/// The worker's thread has ended.
#[derive(Debug, thiserror::Error)]
#[error("the worker has stopped")]
pub struct Stopped;

impl WorkerHandle {
    /// Starts all workers with their listeners. Returns the address that they listen on.
    ///
    /// # Errors
    /// The address is taken, or a thread or its runtime could not be made.
    pub fn start_all(shared: &Arc<Shared>) -> io::Result<(Vec<Self>, SocketAddr)> {
        let mut inboxes = Vec::new();
        let mut peers = Vec::new();
        let mut listeners = Vec::new();
        let mut address = shared.config.hbone_address;
        for _ in 0..shared.config.workers {
            let (commands, inbox) = mpsc::channel(QUEUE);
            let listener = listen(address)?;
            // Port 0 is one port for all.
            address = listener.local_addr()?;
            peers.push(Peer {
                load: Arc::default(),
                commands,
            });
            inboxes.push(inbox);
            listeners.push(listener);
        }
        let mut handles = Vec::new();
        for (index, (inbox, listener)) in inboxes.into_iter().zip(listeners).enumerate() {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let (shared, all) = (shared.clone(), peers.clone());
            std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    shared
                        .telemetry
                        .metrics()
                        .watch_runtime(runtime.handle().clone());
                    let local = LocalSet::new();
                    local.block_on(&runtime, Worker::run(shared, index, all, inbox, listener));
                })?;
            handles.push(Self {
                peer: peers[index].clone(),
            });
        }
        Ok((handles, address))
    }

    /// What the worker holds now.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn counts(&self) -> Result<Counts, Stopped> {
        let (reply, answer) = oneshot::channel();
        let asked = self.peer.commands.send(Command::Connections { reply });
        asked.await.map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// What the worker has open now.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn listing(&self) -> Result<Listing, Stopped> {
        let (reply, answer) = oneshot::channel();
        let asked = self.peer.commands.send(Command::List { reply });
        asked.await.map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// Completes when all have ended, some time after the drain signal has been given.
    pub async fn all_stopped(workers: &[Self]) {
        for worker in workers {
            worker.peer.commands.closed().await;
        }
    }

    /// Completes when one of them has ended. Before a drain that is a fault.
    pub async fn any_stopped(workers: &[Self]) {
        let ends = workers
            .iter()
            .map(|worker| Box::pin(worker.peer.commands.closed()));
        if workers.is_empty() {
            std::future::pending::<()>().await;
        }
        futures_util::future::select_all(ends).await;
    }
}

/// One member of the listener's group.
fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // What is accepted inherits it. Without it an answer in two segments waits for the delayed
    // acknowledgement of the first, 40 ms.
    prepare(&socket, &Keepalive::default())?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The inside of a worker; shared by its connections.
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// HBONE connections to endpoints' nodes.
    pub tunnels: TunnelPool,
    /// HTTP connections to endpoints.
    pub upstreams: Rc<Upstreams>,
    /// Checks end users' tokens.
    pub authenticator: Authenticator,
    /// What is open, to be shown.
    pub live: Live,
    /// Wakes what is under way when the configuration has changed.
    pub changed: Arc<Notify>,
    index: usize,
    peers: Vec<Peer>,
    downstreams: Rc<RefCell<Slab<Rc<Downstream>>>>,
    telemetry: RefCell<RequestTelemetry>,
    description: RefCell<Option<(Arc<Workload>, Baggage)>>,
    draining: Cell<bool>,
    external: RefCell<HashMap<String, Asked>>,
    external_auth: RefCell<HashMap<Arc<ExternalAuth>, Rc<ExternalAuthorization<Dialer>>>>,
    mirrors: Rc<Cell<usize>>,
}

impl Worker {
    async fn run(
        shared: Arc<Shared>,
        index: usize,
        peers: Vec<Peer>,
        mut inbox: mpsc::Receiver<Command>,
        listener: std::net::TcpListener,
    ) {
        let worker = Rc::new(Self {
            tunnels: new_tunnel_pool(&shared.config),
            upstreams: Rc::default(),
            authenticator: Authenticator::new(),
            changed: Arc::default(),
            index,
            peers,
            downstreams: Rc::default(),
            telemetry: RefCell::new(RequestTelemetry::new(
                shared.requests.clone(),
                shared.log.clone(),
            )),
            description: RefCell::new(None),
            draining: Cell::new(false),
            external: RefCell::default(),
            external_auth: RefCell::default(),
            mirrors: Rc::default(),
            live: Live::default(),
            shared,
        });
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                error!("the listener cannot be used: {error}");
                return;
            }
        };
        let mut accepting = spawn_local(accept(worker.clone(), listener));
        let sweeping = spawn_local(sweep(worker.clone()));
        let following = spawn_local(follow(worker.clone()));
        let rechecking = spawn_local(recheck::run(worker.clone()));
        let mut drain = worker.shared.drain.clone();
        let mode = loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(Command::Serve(connection)) => worker.take_over(connection),
                    Some(Command::Connections { reply }) => {
                        let _ = reply.send(worker.counts());
                    }
                    Some(Command::List { reply }) => {
                        let _ = reply.send(worker.listing());
                    }
                    None => break DrainMode::Immediate,
                },
                _ = &mut accepting => {
                    error!("the listener is unusable; this worker stops");
                    break DrainMode::Immediate;
                }
                mode = drain.signalled() => break mode,
            }
        };
        accepting.abort();
        worker.stop(mode, &mut inbox).await;
        sweeping.abort();
        following.abort();
        rechecking.abort();
    }

    /// The worker that has least to do; this one if no other has less.
    fn lightest(&self) -> usize {
        let connections = |peer: &Peer| peer.load.connections.load(Ordering::Relaxed);
        let own = connections(&self.peers[self.index]);
        let others = self.peers.iter().enumerate();
        others
            .map(|(index, peer)| (connections(peer), index))
            .filter(|(connections, _)| *connections < own)
            .min()
            .map_or(self.index, |(_, index)| index)
    }

    /// Serves an accepted connection here or where there is less to do.
    fn place(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr, permit: AcceptPermit) {
        let target = self.lightest();
        let load = &self.peers[target].load;
        load.connections.fetch_add(1, Ordering::Relaxed);
        if target == self.index {
            self.serve(stream, peer, permit);
            return;
        }
        let handed = stream.into_std().map(|stream| HandOver {
            stream,
            peer,
            permit,
        });
        let Ok(connection) = handed else {
            load.connections.fetch_sub(1, Ordering::Relaxed);
            return;
        };
        // A worker that does not keep up with its queue is not given more.
        let sent = self.peers[target]
            .commands
            .try_send(Command::Serve(connection));
        if let Err(refused) = sent {
            load.connections.fetch_sub(1, Ordering::Relaxed);
            if let Command::Serve(connection) = refused.into_inner() {
                let own = &self.peers[self.index].load;
                own.connections.fetch_add(1, Ordering::Relaxed);
                self.take_over(connection);
            }
        }
    }

    /// Serves a connection that is already counted here.
    fn take_over(self: &Rc<Self>, connection: HandOver) {
        let HandOver {
            stream,
            peer,
            permit,
        } = connection;
        match TcpStream::from_std(stream) {
            Ok(stream) => self.serve(stream, peer, permit),
            Err(error) => {
                warn!(%peer, "connection lost: {error}");
                self.load().connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn serve(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr, permit: AcceptPermit) {
        let worker = self.clone();
        spawn_local(async move {
            let counted = Counted(&worker.load().connections);
            Box::pin(tunnel::serve(worker.clone(), stream, peer)).await;
            drop(counted);
            drop(permit);
        });
    }

    fn load(&self) -> &Load {
        &self.peers[self.index].load
    }

    /// Counts a CONNECT stream until it is dropped.
    pub fn open_stream(&self) -> impl Drop + use<> {
        let load = self.peers[self.index].load.clone();
        load.streams.fetch_add(1, Ordering::Relaxed);
        OpenStream(load)
    }

    /// Counts a mirrored request until it is dropped; `None`: there are too many.
    pub fn open_mirror(&self) -> Option<impl Drop + use<>> {
        let count = self.mirrors.clone();
        if count.get() >= MAX_MIRRORS {
            return None;
        }
        count.set(count.get() + 1);
        Some(OpenMirror(count))
    }

    /// Lists an HTTP connection until it is dropped.
    pub fn enter(&self, downstream: &Rc<Downstream>) -> impl Drop + use<> {
        let table = self.downstreams.clone();
        let key = table.borrow_mut().insert(downstream.clone());
        Listed { table, key }
    }

    /// A request has ended.
    pub fn ended(&self, exchange: &Exchange) {
        self.load().requests.fetch_add(1, Ordering::Relaxed);
        let view = self.shared.state.load();
        exchange.record(&self.telemetry.borrow(), &view.mesh().telemetry);
    }

    /// The time.
    pub fn now(&self) -> Instant {
        Instant::now()
    }

    /// Whether the process is about to end.
    pub fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Our own certificate.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn certificate(
        &self,
        deadline: Duration,
    ) -> Result<Arc<WorkloadCertificate>, String> {
        let shared = &self.shared;
        let identity = &shared.config.identity;
        if let Some(certificate) = shared.certificates.try_get(identity) {
            return Ok(certificate);
        }
        timeout(deadline, shared.certificates.get(identity))
            .await
            .map_err(|_| "timed out".to_owned())
            .and_then(|got| got.map_err(|e| e.to_string()))
            .map_err(|e| format!("no certificate for {identity}: {e}"))
    }

    /// What we say of ourselves to other nodes, if discovery knows us.
    pub fn description(&self) -> Option<Baggage> {
        let config = &self.shared.config;
        let view = self.shared.state.load();
        let own = view
            .model()
            .pod(&config.cluster, &config.namespace, &config.pod)?;
        let mut known = self.description.borrow_mut();
        if let Some((workload, baggage)) = &*known
            && Arc::ptr_eq(workload, own)
        {
            return Some(baggage.clone());
        }
        let baggage = Baggage::new(BaggageFields {
            cluster: own.cluster_id.clone(),
            namespace: own.namespace.clone(),
            workload_type: own.workload_type,
            workload_name: own.workload_name.clone(),
            service_name: own.canonical_name.clone(),
            service_version: own.canonical_revision.clone(),
            region: own.locality.region.clone(),
            zone: own.locality.zone.clone(),
        });
        *known = Some((own.clone(), baggage.clone()));
        Some(baggage)
    }

    /// The provider of external authorization of that name, as it is configured now.
    pub fn external(self: &Rc<Self>, name: &str) -> Option<Rc<ExternalAuthorization<Dialer>>> {
        let mesh = self.shared.state.load().mesh().clone();
        let provider = mesh.providers.get(name)?;
        let mut known = self.external.borrow_mut();
        if let Some((of, asked)) = known.get(name)
            && Arc::ptr_eq(of, provider)
        {
            return asked.clone();
        }
        let made = ExternalAuthorization::new(provider, Dialer::new(self));
        let made = made
            .inspect_err(|error| warn!("provider {name}: {error}"))
            .ok()
            .map(Rc::new);
        known.insert(name.to_owned(), (provider.clone(), made.clone()));
        made
    }

    /// What asks the service of a rule's filter ExternalAuth.
    pub fn external_auth(
        self: &Rc<Self>,
        auth: &Arc<ExternalAuth>,
    ) -> Rc<ExternalAuthorization<Dialer>> {
        let mut known = self.external_auth.borrow_mut();
        if let Some(asked) = known.get(auth) {
            return asked.clone();
        }
        // Of filters that no rule has any more.
        known.retain(|auth, _| Arc::strong_count(auth) > 1);
        let version = match &auth.protocol {
            AuthProtocol::Http { .. } => HttpVersion::Http1,
            AuthProtocol::Grpc { .. } => HttpVersion::Http2,
        };
        let dialer = Dialer::to_backend(self, auth.target.clone(), version);
        let made = Rc::new(ExternalAuthorization::of_rule(auth, dialer));
        known.insert(auth.clone(), made.clone());
        made
    }

    fn listing(&self) -> Listing {
        let now = self.now();
        let mut downstream: Vec<_> = self
            .downstreams
            .borrow()
            .iter()
            .map(|(_, downstream)| downstream.view(now))
            .collect();
        downstream.extend(self.live.tcp_views());
        let mut upstream_tunnels = Vec::new();
        self.tunnels.for_each(|key, connection| {
            upstream_tunnels.push(UpstreamTunnelView {
                dst: key.address,
                workload: key.peer.to_string(),
                identity: key.identities.workload().to_string(),
                streams: connection.live_streams(),
                carried: connection.watch().carried(),
            });
        });
        Listing {
            tunnels: self.live.tunnel_views(now),
            downstream,
            upstream: self.live.upstream_views(now),
            upstream_tunnels,
        }
    }

    fn counts(&self) -> Counts {
        let load = self.load();
        let (idle_upstream, http2_upstream) = self.upstreams.counts();
        Counts {
            connections: load.connections.load(Ordering::Relaxed),
            streams: load.streams.load(Ordering::Relaxed),
            requests: load.requests.load(Ordering::Relaxed),
            http_connections: self.downstreams.borrow().len(),
            idle_upstream,
            http2_upstream,
        }
    }

    /// The listener has closed; requests get the deadline. Connections of HTTP/1 are told with
    /// their next response, and idle ones closed at half time.
    async fn stop(self: &Rc<Self>, mode: DrainMode, inbox: &mut mpsc::Receiver<Command>) {
        self.draining.set(true);
        let DrainMode::Graceful { deadline } = mode else {
            return;
        };
        let begun = Instant::now();
        let half = begun + deadline.saturating_duration_since(begun) / 2;
        let mut told = false;
        while Instant::now() < deadline {
            // What was handed over a moment ago is told like the others.
            while let Ok(command) = inbox.try_recv() {
                if let Command::Serve(connection) = command {
                    self.take_over(connection);
                }
            }
            if self.load().streams.load(Ordering::Relaxed) == 0 {
                break;
            }
            let listed: Vec<_> = self
                .downstreams
                .borrow()
                .iter()
                .map(|(_, d)| d.clone())
                .collect();
            for downstream in listed {
                if Instant::now() >= half || downstream.is_http2() {
                    downstream.drain();
                    told = true;
                }
            }
            let next = Instant::now() + Duration::from_millis(20);
            sleep_until(next.min(deadline)).await;
        }
        if told {
            // Their tasks get a turn to write their last frames.
            sleep(Duration::from_millis(20)).await;
        }
        inbox.close();
    }
}

/// Takes one away when it is dropped.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct OpenStream(Arc<Load>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

struct OpenMirror(Rc<Cell<usize>>);

impl Drop for OpenMirror {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

struct Listed {
    table: Rc<RefCell<Slab<Rc<Downstream>>>>,
    key: usize,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.table.borrow_mut().remove(self.key);
    }
}

async fn accept(worker: Rc<Worker>, listener: TcpListener) {
    let limits = AcceptLimits {
        max_connections: worker.shared.config.max_connections,
        ..AcceptLimits::default()
    };
    let counts = Arc::new(AcceptCounts::default());
    let reported = Cell::new(0);
    let accepting = accept_loop(listener, limits, counts.clone(), |stream, peer, permit| {
        // What went wrong before this connection could be accepted.
        let exhausted = counts.exhausted.load(Ordering::Relaxed);
        for _ in reported.replace(exhausted)..exhausted {
            worker.shared.telemetry.emit(&Event::AcceptFailed);
        }
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        worker.place(stream, peer, permit);
    });
    if let Err(error) = accepting.await {
        warn!("listener is unusable: {error}");
    }
}

/// Brings what the worker holds in line with each new state of the configuration.
async fn follow(worker: Rc<Worker>) {
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
async fn sweep(worker: Rc<Worker>) {
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
