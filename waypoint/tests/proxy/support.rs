//! A waypoint with its workers, backends behind HBONE servers as a node has them, and clients
//! that call through HBONE connections with certificates of their own. All on loopback, all
//! real; configuration goes in by the state's API.

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::server::Incoming as Connect;
use adit_shared::hbone::{ConnectRequest, Connection, OpenError, Settings, Tunnel};
use adit_shared::identity::{
    CacheOptions, CertificateCache, LocalCa, SpiffeId, TrustDomain, WorkloadCertificate,
};
use adit_shared::model::{
    GatewayAddress, GatewayDestination, Health, IpFamilies, LoadBalancing, Locality, Membership,
    Port, Service, ServiceAddress, ServiceName, TunnelProtocol, Update, Workload,
};
use adit_shared::net::drain::{self, DrainMode, DrainTrigger, DrainWatcher};
use adit_shared::proto::waypoint as pb;
use adit_shared::telemetry::{Metrics, Telemetry};
use adit_shared::xds::client::Resource;
use adit_waypoint::client::LocalExecutor;
use adit_waypoint::config::{Config, http2_settings};
use adit_waypoint::route::SessionKey;
use adit_waypoint::state::{Gateway, State};
use adit_waypoint::telemetry::{RequestCollector, RequestMetrics};
use adit_waypoint::worker::{Counts, Shared, WorkerHandle};
use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};

/// Nothing here takes longer.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// What backends answer with, and clients send.
pub type Body = BoxBody<Bytes, Infallible>;

/// A body of one piece.
pub fn body(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed()
}

/// Runs a test on one thread with a `LocalSet`.
pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        timeout(DEADLINE * 3, test).await.expect("the test ends");
    });
}

/// Waits for a condition.
pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = Instant::now() + DEADLINE;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The trust domain of all.
pub fn trust_domain() -> TrustDomain {
    TrustDomain::default()
}

/// The identity of a service account.
pub fn identity(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new(trust_domain(), namespace, account).expect("legal")
}

/// An address of loopback that no other test uses: pods listen on port 15008, all of them.
pub fn new_address() -> IpAddr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let process = std::process::id();
    let [high, low] = n.to_be_bytes();
    // 127.64.0.0 to 127.127.255.255, by process.
    let block = 64 + (process % 64) as u8;
    IpAddr::V4(Ipv4Addr::new(127, block, high, low))
}

/// A mesh of one waypoint.
pub struct Mesh {
    pub certificates: CertificateCache,
    pub state: Arc<State>,
    pub requests: Arc<RequestMetrics>,
    pub workers: Vec<WorkerHandle>,
    pub address: SocketAddr,
    drain: DrainTrigger,
    next_vip: AtomicUsize,
}

impl Mesh {
    /// A waypoint `shop/waypoint` with one worker.
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// One whose configuration `change` has changed.
    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let ca = Arc::new(LocalCa::generate(&trust_domain()).expect("a CA"));
        let certificates = CertificateCache::new(ca, CacheOptions::default());
        let state = Arc::new(State::new(
            Gateway::new(
                "waypoint",
                "shop",
                "cluster.local",
                "",
                trust_domain(),
                "Kubernetes//Pod/shop/waypoint",
            ),
            tokio::runtime::Handle::current(),
        ));
        let requests = Arc::new(RequestMetrics::new(1000));
        let mut metrics = Metrics::new("waypoint", "test");
        metrics.register("istio", Box::new(RequestCollector(requests.clone())));
        let metrics = Arc::new(metrics);
        state.completed();
        let (trigger, watcher) = drain::channel();
        let mut config = config();
        change(&mut config);
        let shared = Arc::new(Shared {
            config,
            state: state.clone(),
            certificates: certificates.clone(),
            telemetry: Telemetry::new(metrics, None, Vec::new()),
            requests: requests.clone(),
            log: None,
            spans: Arc::default(),
            session_key: SessionKey::new(&[7; 32]).expect("a key"),
            drain: watcher,
        });
        let (workers, address) = WorkerHandle::start_all(&shared).expect("workers");
        Self {
            certificates,
            state,
            requests,
            workers,
            address,
            drain: trigger,
            next_vip: AtomicUsize::new(1),
        }
    }

    /// A certificate.
    pub async fn certificate(&self, identity: &SpiffeId) -> Arc<WorkloadCertificate> {
        self.certificates
            .get(identity)
            .await
            .expect("a certificate")
    }

    /// Gives the waypoint a resource of its own.
    pub fn put<M: prost::Message>(&self, type_url: &str, name: &str, message: &M) {
        let resource = Resource {
            name: name.to_owned(),
            version: "1".into(),
            aliases: Vec::new(),
            body: message.encode_to_vec().into(),
        };
        let rejected = self.state.apply(type_url, vec![resource], &[]);
        assert!(rejected.is_empty(), "{rejected:?}");
    }

    /// Takes one away.
    pub fn remove(&self, type_url: &str, name: &str) {
        self.state.apply(type_url, Vec::new(), &[name.to_owned()]);
    }

    /// A service `shop/<name>` that uses the waypoint, with port 80 of that protocol; returns
    /// its VIP.
    pub fn service(&self, name: &str, protocol: pb::service_port::Protocol) -> Vip {
        let n = self.next_vip.fetch_add(1, Ordering::Relaxed);
        let ip = IpAddr::V4(Ipv4Addr::new(10, 96, (n >> 8) as u8, n as u8));
        let key = service_name(name);
        self.state.apply_addresses([Update::UpsertService(Service {
            key: key.clone(),
            name: name.into(),
            addresses: vec![ServiceAddress {
                network: "".into(),
                block: ip.into(),
            }],
            ports: vec![Port {
                service_port: 80,
                target_port: Some(8080),
            }],
            subject_alt_names: Vec::new(),
            waypoint: Some(our_waypoint()),
            weighted_waypoints: Vec::new(),
            load_balancing: LoadBalancing::default(),
            ip_families: IpFamilies::Automatic,
            canonical: true,
            namespace_private: false,
        })]);
        self.put(
            pb::SERVICE_TYPE,
            &key.to_string(),
            &pb::Service {
                namespace: "shop".into(),
                hostname: key.hostname.to_string(),
                ports: vec![pb::ServicePort {
                    port: 80,
                    name: "main".into(),
                    protocol: protocol.into(),
                }],
            },
        );
        Vip {
            key,
            address: SocketAddr::new(ip, 80),
        }
    }

    /// A pod of `service` behind its node's HBONE, whose app answers as `app` does.
    pub async fn pod<A>(&self, service: &Vip, name: &str, app: A) -> Pod
    where
        A: App,
    {
        let pod = Pod::start(self, name, app).await;
        self.join(service, &pod);
        pod
    }

    /// Makes `pod` an endpoint of `service`.
    pub fn join(&self, service: &Vip, pod: &Pod) {
        self.join_as(service, pod, |_| {});
    }

    /// The same, with something that `change` says of it.
    pub fn join_as(&self, service: &Vip, pod: &Pod, change: impl FnOnce(&mut Workload)) {
        let mut workload = workload(&pod.name, pod.ip, &[&service.key], TunnelProtocol::Hbone);
        change(&mut workload);
        self.state
            .apply_addresses([Update::UpsertWorkload(workload)]);
    }

    /// A client with the identity of a service account.
    pub async fn client(&self, namespace: &str, account: &str) -> Client {
        let certificate = self.certificate(&identity(namespace, account)).await;
        let connection = hbone(self.address, &certificate).await;
        Client { connection }
    }

    /// What the workers hold.
    pub async fn counts(&self) -> Vec<Counts> {
        let mut all = Vec::new();
        for worker in &self.workers {
            all.push(worker.counts().await.expect("it runs"));
        }
        all
    }

    /// Begins a drain.
    pub fn drain(&self, time: Duration) {
        let deadline = Instant::now() + time;
        self.drain.signal(DrainMode::Graceful { deadline });
    }
}

/// Has requests of HTTP/2 to a service sent on as HTTP/1.1.
pub fn downgrade(mesh: &Mesh, to: &Vip) {
    let policy = pb::TrafficPolicy {
        object: Some(pb::ObjectRef {
            kind: "DestinationRule".into(),
            namespace: "shop".into(),
            name: "downgrade".into(),
            created: 1,
        }),
        host: to.key.hostname.to_string(),
        settings: Some(pb::TrafficSettings {
            connection_pool: Some(pb::ConnectionPool {
                h2_upgrade: pb::connection_pool::H2Upgrade::DoNotUpgrade.into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    mesh.put(
        pb::TRAFFIC_POLICY_TYPE,
        "DestinationRule/shop/downgrade",
        &policy,
    );
}

/// A service that can be dialled.
#[derive(Clone)]
pub struct Vip {
    pub key: ServiceName,
    pub address: SocketAddr,
}

/// The name of a service of namespace shop.
pub fn service_name(name: &str) -> ServiceName {
    ServiceName {
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
    }
}

fn our_waypoint() -> Arc<GatewayAddress> {
    Arc::new(GatewayAddress {
        destination: GatewayDestination::Hostname(service_name("waypoint")),
        hbone_port: 15008,
    })
}

/// A workload of namespace shop.
pub fn workload(
    name: &str,
    ip: IpAddr,
    services: &[&ServiceName],
    tunnel_protocol: TunnelProtocol,
) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        addresses: vec![ip],
        hostname: "".into(),
        network: "".into(),
        tunnel_protocol,
        identity: identity("shop", name),
        native_tunnel: false,
        application_tunnel: None,
        waypoint: None,
        network_gateway: None,
        node: "n1".into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_type: "deployment",
        workload_name: name.into(),
        cluster_id: "Kubernetes".into(),
        locality: Locality::default(),
        host_network: false,
        health: Health::Healthy,
        capacity: 1,
        authorization_policies: Vec::new(),
        served_by: Default::default(),
        require_waypoint: false,
        callers_matter: false,
        services: services
            .iter()
            .map(|service| Membership {
                service: (*service).clone(),
                ports: vec![Port {
                    service_port: 80,
                    target_port: Some(8080),
                }]
                .into(),
            })
            .collect(),
    }
}

fn config() -> Config {
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    Config {
        gateway: "waypoint".into(),
        namespace: "shop".into(),
        pod: "waypoint".into(),
        service_account: "waypoint".into(),
        ip: None,
        node: "n1".into(),
        network: String::new(),
        cluster: "Kubernetes".into(),
        cluster_domain: "cluster.local".into(),
        trust_domain: trust_domain(),
        identity: identity("shop", "waypoint"),
        xds_address: String::new(),
        xds_root_ca: "".into(),
        alt_xds_hostname: None,
        ca_address: String::new(),
        ca_root_ca: "".into(),
        alt_ca_hostname: None,
        auth_token: "".into(),
        certificate_ttl: Duration::from_secs(3600),
        workers: 1,
        hbone_address: loopback,
        admin_address: loopback,
        stats_address: loopback,
        readiness_address: loopback,
        pool_max_streams: 16,
        pool_unused_release: Duration::from_secs(60),
        http2: http2_settings(),
        termination_deadline: Duration::from_secs(5),
        max_connections: 1000,
        metadata: Default::default(),
    }
}

/// What runs in a pod: takes the tunnels that reach its port.
pub trait App: 'static {
    /// Serves one connection.
    fn serve(self: Rc<Self>, tunnel: Tunnel) -> impl Future<Output = ()> + 'static;
}

/// An app that speaks HTTP of either version.
pub struct Http<F>(pub F);

impl<F, R> App for Http<F>
where
    F: Fn(Request<Incoming>) -> R + 'static,
    R: Future<Output = Response<Body>> + 'static,
{
    async fn serve(self: Rc<Self>, tunnel: Tunnel) {
        let service = service_fn(move |request| {
            let answer = (self.0)(request);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let io = TokioIo::new(tunnel.into_io());
        let builder = hyper_util::server::conn::auto::Builder::new(LocalExecutor);
        let _ = builder.serve_connection(io, service).await;
    }
}

/// An app that handles the bytes itself.
pub struct Raw<F>(pub F);

impl<F, R> App for Raw<F>
where
    F: Fn(Tunnel) -> R + 'static,
    R: Future<Output = ()> + 'static,
{
    async fn serve(self: Rc<Self>, tunnel: Tunnel) {
        (self.0)(tunnel).await;
    }
}

/// An app that speaks HTTP/2 frame by frame: gets each request with its stream.
pub struct Http2<F>(pub F);

impl<F, R> App for Http2<F>
where
    F: Fn(Request<h2::RecvStream>, h2::server::SendResponse<Bytes>) -> R + 'static,
    R: Future<Output = ()> + 'static,
{
    async fn serve(self: Rc<Self>, tunnel: Tunnel) {
        let Ok(mut connection) = h2::server::handshake(tunnel.into_io()).await else {
            return;
        };
        while let Some(Ok((request, respond))) = connection.accept().await {
            spawn_local((self.0)(request, respond));
        }
    }
}

/// A pod and its node's tunnel.
pub struct Pod {
    pub name: String,
    pub ip: IpAddr,
    /// CONNECT streams that have reached it.
    pub tunnels: Rc<std::cell::Cell<usize>>,
    /// HBONE connections that have reached it.
    pub connections: Rc<std::cell::Cell<usize>>,
    /// For whom they were opened, as the waypoint says.
    pub callers: Rc<std::cell::RefCell<Vec<Option<SpiffeId>>>>,
    accepting: tokio::task::AbortHandle,
    /// Of the connections that are accepted from now on.
    drain: Rc<RefCell<(DrainTrigger, DrainWatcher)>>,
}

impl Pod {
    async fn start<A: App>(mesh: &Mesh, name: &str, app: A) -> Self {
        let ip = new_address();
        let listener = TcpListener::bind((ip, 15008))
            .await
            .expect("a free address");
        let certificate = mesh.certificate(&identity("shop", name)).await;
        let app = Rc::new(app);
        let tunnels = Rc::new(std::cell::Cell::new(0));
        let connections = Rc::new(std::cell::Cell::new(0));
        let callers = Rc::<std::cell::RefCell<Vec<_>>>::default();
        let told = callers.clone();
        let (count, connected) = (tunnels.clone(), connections.clone());
        let drain = Rc::new(RefCell::new(drain::channel()));
        let current = drain.clone();
        let accepting = spawn_local(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("accept");
                let config = certificate.server_config().clone();
                let watcher = current.borrow().1.clone();
                let (app, count) = (app.clone(), count.clone());
                connected.set(connected.get() + 1);
                let told = told.clone();
                spawn_local(async move {
                    let Ok(tls) = TlsStream::accept(stream, config, DEADLINE).await else {
                        return;
                    };
                    let handler = async move |incoming: Connect| {
                        count.set(count.get() + 1);
                        let forwarded = incoming.request.forwarded;
                        told.borrow_mut().push(forwarded.and_then(|f| f.principal));
                        if let Ok(tunnel) = incoming.respond.accept(None) {
                            app.clone().serve(tunnel).await;
                        }
                    };
                    let settings = Settings::DEFAULT;
                    let _ = adit_shared::hbone::serve(tls, &settings, watcher, handler).await;
                });
            }
        })
        .abort_handle();
        Self {
            name: name.to_owned(),
            ip,
            tunnels,
            connections,
            callers,
            accepting,
            drain,
        }
    }

    /// Another process takes over its node: what is open has some time to end, what is new is not
    /// concerned.
    pub fn replace(&self, time: Duration) {
        let (trigger, _) = self.drain.replace(drain::channel());
        let deadline = Instant::now() + time;
        trigger.signal(DrainMode::Graceful { deadline });
    }

    /// Ends it: its node resets everything.
    pub fn kill(&self) {
        self.accepting.abort();
        self.drain.borrow().0.signal(DrainMode::Immediate);
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// An HBONE connection to `address`.
pub async fn hbone(address: SocketAddr, certificate: &WorkloadCertificate) -> Connection {
    let stream = TcpStream::connect(address).await.expect("connects");
    let name = ServerName::IpAddress(address.ip().into());
    let config = certificate.client_config().clone();
    let tls = TlsStream::connect(stream, config, name, DEADLINE)
        .await
        .expect("TLS");
    Connection::handshake(tls, &Settings::DEFAULT)
        .await
        .expect("HTTP/2")
}

/// A client's node.
pub struct Client {
    pub connection: Connection,
}

impl Client {
    /// A tunnel to a service.
    pub async fn tunnel(&self, to: SocketAddr) -> Result<Tunnel, OpenError> {
        let request = ConnectRequest::new(to);
        let deadline = Instant::now() + DEADLINE;
        self.connection.open(&request, deadline).await.map(|t| t.0)
    }

    /// A connection of HTTP/1 to a service.
    pub async fn http1(&self, to: &Vip) -> http1::SendRequest<Body> {
        let tunnel = self.tunnel(to.address).await.expect("accepted");
        let io = TokioIo::new(tunnel.into_io());
        let (sender, connection) = http1::handshake(io).await.expect("HTTP/1");
        spawn_local(connection);
        sender
    }

    /// A connection of HTTP/2 to a service.
    pub async fn http2(&self, to: &Vip) -> http2::SendRequest<Body> {
        let tunnel = self.tunnel(to.address).await.expect("accepted");
        let io = TokioIo::new(tunnel.into_io());
        let (sender, connection) = http2::handshake(LocalExecutor, io).await.expect("HTTP/2");
        spawn_local(connection);
        sender
    }

    /// A connection of HTTP/2 to a service, frame by frame.
    pub async fn frames(&self, to: &Vip) -> h2::client::SendRequest<Bytes> {
        let tunnel = self.tunnel(to.address).await.expect("accepted");
        let handshake = h2::client::handshake(tunnel.into_io()).await;
        let (sender, connection) = handshake.expect("HTTP/2");
        spawn_local(async move {
            let _ = connection.await;
        });
        sender
    }

    /// One GET on a connection of its own.
    pub async fn get(&self, to: &Vip, path: &str) -> Answer {
        let mut sender = self.http1(to).await;
        send(&mut sender, get(path)).await
    }
}

/// A GET.
pub fn get(path: &str) -> Request<Body> {
    Request::get(path)
        .header("host", "web.shop")
        .body(body(""))
        .expect("legal")
}

/// What came back, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub version: Version,
    pub headers: http::HeaderMap,
    pub body: Bytes,
    pub trailers: Option<http::HeaderMap>,
}

impl Answer {
    /// Reads a response.
    pub async fn read(response: Response<Incoming>) -> Self {
        let (head, body) = response.into_parts();
        let collected = timeout(DEADLINE, body.collect()).await;
        let collected = collected.expect("in time").expect("whole");
        Self {
            status: head.status.as_u16(),
            version: head.version,
            headers: head.headers,
            trailers: collected.trailers().cloned(),
            body: collected.to_bytes(),
        }
    }

    /// The body as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    /// A header as text; empty: not there.
    pub fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value.map_or("", |value| value.to_str().expect("ASCII"))
    }
}

/// One request on a connection of HTTP/1.
pub async fn send(sender: &mut http1::SendRequest<Body>, request: Request<Body>) -> Answer {
    sender.ready().await.expect("open");
    let response = timeout(DEADLINE, sender.send_request(request)).await;
    Answer::read(response.expect("in time").expect("answered")).await
}

/// One request on a connection of HTTP/2.
pub async fn send2(sender: &http2::SendRequest<Body>, request: Request<Body>) -> Answer {
    let mut sender = sender.clone();
    let response = timeout(DEADLINE, sender.send_request(request)).await;
    Answer::read(response.expect("in time").expect("answered")).await
}

/// Requests that an app has seen.
pub type Seen = Arc<Mutex<Vec<http::request::Parts>>>;

/// An app that answers 200 with its name, and keeps what it has seen.
pub fn echo(name: &'static str) -> (impl App, Seen) {
    let seen = Seen::default();
    let kept = seen.clone();
    let app = Http(move |request: Request<Incoming>| {
        let kept = kept.clone();
        async move {
            let (head, incoming) = request.into_parts();
            kept.lock().expect("not poisoned").push(head);
            let sent = incoming.collect().await.map(|c| c.to_bytes());
            let mut text = name.as_bytes().to_vec();
            text.extend_from_slice(&sent.unwrap_or_default());
            Response::new(body(text))
        }
    });
    (app, seen)
}
