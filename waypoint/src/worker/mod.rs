//! A worker: one thread, one single-threaded runtime, and everything that a request needs. Its
//! listener, TLS connections, tunnels, pools and buffers belong to it alone, so that a request
//! never changes threads and takes no lock.
//!
//! Each worker has a member of the listener's `SO_REUSEPORT` group. The kernel spreads
//! connections by a hash, which with the few connections of a node is uneven as often as not:
//! so a worker hands a connection that it has accepted to one that has fewer, before a byte of
//! it is read.

mod handle;
mod upkeep;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use adit_shared::hbone::{Baggage, BaggageFields};
use adit_shared::identity::{CertificateCache, WorkloadCertificate};
use adit_shared::model::Workload;
use adit_shared::net::accept::{AcceptCounts, AcceptLimits, AcceptPermit, accept_loop};
use adit_shared::net::drain::{DrainMode, DrainWatcher};
use adit_shared::proto::waypoint::Provider;
use adit_shared::telemetry::{Event, LogWriter, Telemetry};
use slab::Slab;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{error, warn};

use self::handle::{Command, HandOver, Load, Peer};
pub use self::handle::{Counts, Stopped, WorkerHandle};
use self::upkeep::{follow, sweep};

use crate::authentication::Authenticator;
use crate::config::Config;
use crate::external_authorization::ExternalAuthorization;
use crate::live::{Listing, Live, UpstreamTunnelView};
use crate::proxy::dial::Dialer;
use crate::proxy::exchange::Exchange;
use crate::proxy::http::Downstream;
use crate::proxy::mirror::MAX_MIRRORS;
use crate::proxy::recheck;
use crate::proxy::tunnel;
use crate::proxy::upstream::{HttpVersion, TunnelPool, Upstreams, new_tunnel_pool};
use crate::route::{AuthProtocol, ExternalAuth, SessionKey};
use crate::state::State;
use crate::telemetry::{ExportCounters, RequestMetrics, RequestTelemetry};

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
