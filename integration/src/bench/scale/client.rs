//! Connections as node proxies have them: TLS, a token, delta ADS with ztunnel's types.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use adit_shared::identity::{TrustBundle, control_plane_client_config};
use adit_shared::proto::xds::DeltaDiscoveryRequest;
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ENROLMENT_TYPE};
use adit_shared::xds::client::NodeMetadata;
use anyhow::{Context, bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use h2::SendStream;
use prost::Message as _;
use rand::Rng as _;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

use super::wire::{Reader, Response};

/// In ztunnel's order.
const TYPES: [&str; 3] = [AUTHORIZATION_TYPE, ADDRESS_TYPE, ENROLMENT_TYPE];
const METHOD: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// The name that the control plane's certificate has.
const SERVER_NAME: &str = "istiod.istio-system.svc";
/// As our proxies set it.
const WINDOW: u32 = 4 << 20;
const HANDSHAKE: Duration = Duration::from_secs(60);
/// Between attempts, doubling.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(15);

/// What a connection says of itself.
#[derive(Debug, Clone)]
pub(super) struct NodeProxy {
    pub(super) node: String,
    pub(super) pod: String,
    pub(super) token: String,
}

/// What all connections have seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) messages: AtomicU64,
    pub(super) bytes: AtomicU64,
    /// Connections that have got a response of every type.
    pub(super) synced: AtomicUsize,
    /// Connections that failed before that.
    pub(super) retries: AtomicUsize,
    changed: Notify,
    expected: std::sync::Mutex<Expected>,
}

/// The resource whose change is awaited.
#[derive(Debug, Default)]
struct Expected {
    change: u64,
    resource: String,
    arrived: usize,
    last: Option<Instant>,
}

impl Seen {
    /// From now on arrivals of `resource` are counted.
    pub(super) fn expect(&self, resource: &str) {
        let mut expected = self.expected();
        *expected = Expected {
            change: expected.change + 1,
            resource: resource.to_owned(),
            ..Expected::default()
        };
    }

    /// When the last of `clients` got what was expected.
    pub(super) async fn arrived(&self, clients: usize) -> Instant {
        self.wait(|seen| {
            let expected = seen.expected();
            expected.last.filter(|_| expected.arrived >= clients)
        })
        .await
    }

    /// Waits until that many connections have everything.
    pub(super) async fn synced(&self, clients: usize) {
        let synced = |seen: &Self| (seen.synced.load(Ordering::Relaxed) >= clients).then_some(());
        self.wait(synced).await;
    }

    async fn wait<T>(&self, done: impl Fn(&Self) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            if let Some(value) = done(self) {
                return value;
            }
            changed.await;
        }
    }

    fn expected(&self) -> std::sync::MutexGuard<'_, Expected> {
        // Nothing panics while it is held.
        self.expected
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// `change` is the last one that this connection has seen.
    fn response(&self, response: &Response, at: Instant, clients: usize, change: &mut u64) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes
            .fetch_add(response.bytes as u64, Ordering::Relaxed);
        if response.names.is_empty() {
            return;
        }
        let mut expected = self.expected();
        if *change < expected.change && response.names.contains(&expected.resource) {
            *change = expected.change;
            expected.arrived += 1;
            expected.last = Some(at);
            if expected.arrived == clients {
                self.changed.notify_one();
            }
        }
    }
}

/// All connections, on a thread of their own. Dropping it ends them.
pub(super) struct Clients {
    pub(super) seen: Arc<Seen>,
    failure: watch::Receiver<Option<String>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Clients {
    /// Connects all of `proxies` to `address` at once.
    pub(super) fn start(
        proxies: Vec<NodeProxy>,
        address: SocketAddr,
        roots: &str,
    ) -> anyhow::Result<Self> {
        let roots = TrustBundle::from_pem(roots)?.roots()?;
        let tls = TlsConnector::from(Arc::new(control_plane_client_config(roots)?));
        let seen = Arc::new(Seen::default());
        let (failed, failure) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let all = seen.clone();
        let thread = std::thread::Builder::new()
            .name("scale-clients".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        error = first_failure(proxies, address, tls, all) => {
                            failed.send_replace(Some(format!("{error:#}")));
                        }
                        _ = stopped => {}
                    }
                });
            })?;
        Ok(Self {
            seen,
            failure,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// `of`, unless a connection fails first.
    pub(super) async fn unless_failed<T>(
        &self,
        limit: Duration,
        of: impl Future<Output = T>,
    ) -> anyhow::Result<T> {
        let mut failure = self.failure.clone();
        tokio::select! {
            value = timeout(limit, of) => {
                value.with_context(|| format!("not all clients have it after {limit:?}"))
            }
            failed = failure.wait_for(Option::is_some) => match failed {
                Ok(error) => bail!("{}", error.as_deref().unwrap_or_default()),
                Err(_) => bail!("the clients have ended"),
            },
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Unless they have ended already.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// Runs all connections; none of them ends by itself.
async fn first_failure(
    proxies: Vec<NodeProxy>,
    address: SocketAddr,
    tls: TlsConnector,
    seen: Arc<Seen>,
) -> anyhow::Error {
    let clients = proxies.len();
    let mut running = JoinSet::new();
    for proxy in proxies {
        let (tls, seen) = (tls.clone(), seen.clone());
        running.spawn(async move {
            let mut wait = RETRY_MIN;
            loop {
                let mut synced = false;
                let ended = connection(&proxy, address, &tls, &seen, clients, &mut synced).await;
                let error = match ended {
                    Ok(()) => anyhow::anyhow!("the stream ended"),
                    Err(error) => error,
                };
                // As proxies do at the start; what was there is not to be lost.
                if synced || wait > RETRY_MAX {
                    return error.context(proxy.node);
                }
                seen.retries.fetch_add(1, Ordering::Relaxed);
                let spread = rand::rng().random_range(0.5..=1.0);
                sleep(wait.mul_f64(spread)).await;
                wait *= 2;
            }
        });
    }
    match running.join_next().await {
        Some(Ok(error)) => error,
        Some(Err(error)) => error.into(),
        None => anyhow::anyhow!("no clients"),
    }
}

async fn connection(
    proxy: &NodeProxy,
    address: SocketAddr,
    tls: &TlsConnector,
    seen: &Seen,
    clients: usize,
    synced: &mut bool,
) -> anyhow::Result<()> {
    let handshake = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let tls = tls.connect(ServerName::try_from(SERVER_NAME)?, tcp).await?;
        let connection = h2::client::Builder::new()
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .handshake::<_, Bytes>(tls)
            .await?;
        anyhow::Ok(connection)
    };
    let (sender, connection) = timeout(HANDSHAKE, handshake).await.context("handshake")??;
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = &mut connection => Ok(ended?),
        ended = stream(proxy, sender, seen, clients, synced) => ended,
    }
}

async fn stream(
    proxy: &NodeProxy,
    sender: h2::client::SendRequest<Bytes>,
    seen: &Seen,
    clients: usize,
    synced: &mut bool,
) -> anyhow::Result<()> {
    let request = http::Request::post(format!("https://{SERVER_NAME}{METHOD}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {}", proxy.token))
        .body(())?;
    let (response, mut requests) = sender.ready().await?.send_request(request, false)?;
    for (index, type_url) in TYPES.into_iter().enumerate() {
        let node = (index == 0).then(|| metadata(proxy).to_node());
        // Without names: all.
        let request = DeltaDiscoveryRequest {
            node,
            type_url: type_url.into(),
            ..DeltaDiscoveryRequest::default()
        };
        send(&mut requests, &request)?;
    }
    let (head, mut body) = response.await?.into_parts();
    let status = head.headers.get("grpc-status");
    ensure!(
        head.status.is_success() && status.is_none(),
        "refused: {} {:?} {:?}",
        head.status,
        status,
        head.headers.get("grpc-message")
    );
    let mut reader = Reader::default();
    let mut missing = TYPES.to_vec();
    let mut change = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        let at = Instant::now();
        body.flow_control().release_capacity(data.len())?;
        for response in reader.feed(&data)? {
            seen.response(&response, at, clients, &mut change);
            let acknowledgement = DeltaDiscoveryRequest {
                type_url: response.type_url.clone(),
                response_nonce: response.nonce,
                ..DeltaDiscoveryRequest::default()
            };
            send(&mut requests, &acknowledgement)?;
            let before = missing.len();
            missing.retain(|type_url| *type_url != response.type_url);
            if before > 0 && missing.is_empty() {
                *synced = true;
                if seen.synced.fetch_add(1, Ordering::Relaxed) + 1 == clients {
                    seen.changed.notify_one();
                }
            }
        }
    }
    let trailers = body.trailers().await?.unwrap_or_default();
    bail!("the control plane ended the stream: {trailers:?}")
}

fn metadata(proxy: &NodeProxy) -> NodeMetadata {
    NodeMetadata {
        pod_name: proxy.pod.clone(),
        namespace: super::world::SYSTEM.into(),
        service_account: super::world::ZTUNNEL.into(),
        node_name: proxy.node.clone(),
        cluster_id: "Kubernetes".into(),
        ..NodeMetadata::default()
    }
}

fn send(
    requests: &mut SendStream<Bytes>,
    request: &DeltaDiscoveryRequest,
) -> Result<(), anyhow::Error> {
    let length = request.encoded_len();
    let mut frame = BytesMut::with_capacity(length + 5);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length)?);
    request.encode(&mut frame)?;
    // It waits in memory if need be: acknowledgements are small.
    Ok(requests.send_data(frame.freeze(), false)?)
}
