//! Port 15017: HTTPS for the API server, HTTP/2 or HTTP/1.1.
//!
//! Anybody who reaches the port may speak to it: the API server brings nothing to be known by.
//! So everything is bounded, over all and by address: connections, requests, bytes that are
//! held before they are looked at, and what is looked at at a time.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::net::accept::AcceptCounts;
use bytes::{Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Admission, PATH};
use crate::quota::Quota;
use crate::serve::accept::{accept, handshake};

/// The bounds of the port. Callers are API servers, of which there are few.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WebhookLimits {
    /// Connections that are served.
    pub connections: usize,
    /// Connections that are served of one address. Three times as many wait for a place;
    /// more are closed.
    pub connections_of_peer: usize,
    /// Requests at a time on one HTTP/2 connection.
    pub streams: u32,
    /// Bytes of a request: two versions of an object, of which etcd takes 1.5 MiB each.
    pub body: usize,
    /// Requests of more than 64 KiB that are read and looked at at a time.
    pub large: usize,
    /// For a place, and for the TLS handshake.
    pub handshake: Duration,
    /// For a request to arrive and be answered. The API server waits for as long.
    pub request: Duration,
    /// A connection without a request is closed after this.
    pub idle: Duration,
    /// A connection is not used for longer.
    pub max_age: Duration,
}

impl Default for WebhookLimits {
    fn default() -> Self {
        Self {
            connections: 32,
            connections_of_peer: 8,
            streams: 4,
            body: 4 << 20,
            large: 4,
            handshake: Duration::from_secs(10),
            request: Duration::from_secs(10),
            idle: Duration::from_secs(10),
            max_age: Duration::from_secs(600),
        }
    }
}

/// Connections that wait for each that is served.
const WAITING: usize = 3;
/// What is read of a request before it needs a turn, and of a stream before it is asked for.
pub(super) const SMALL: usize = 64 << 10;
const MAX_HEADER_LIST: u32 = 16 << 10;

/// The port of the webhook.
pub(crate) struct Port<C> {
    pub(crate) admission: Admission,
    pub(crate) limits: WebhookLimits,
    /// The TLS configuration of the moment.
    pub(crate) tls: C,
    pub(crate) accepts: Arc<AcceptCounts>,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl<C: Fn() -> Arc<ServerConfig> + Send + Sync + 'static> Port<C> {
    /// Accepts until stopped.
    pub(crate) async fn run(self: Arc<Self>, listener: TcpListener) {
        let limits = self.limits;
        let sockets = Quota::new(limits.connections_of_peer * (WAITING + 1));
        let places = Places {
            all: Arc::new(Semaphore::new(limits.connections.max(1))),
            peers: Quota::new(limits.connections_of_peer),
        };
        let requests = Arc::new(Requests {
            admission: self.admission.clone(),
            limits,
            large: Semaphore::new(limits.large.max(1)),
        });
        let this = self.clone();
        let connected = move |tcp, peer: std::net::SocketAddr, accepted| {
            let address = peer.ip().to_canonical();
            let Some(socket) = sockets.take(address) else {
                tracing::debug!(%peer, "too many webhook connections of this address");
                return;
            };
            let (this, places, requests) = (this.clone(), places.clone(), requests.clone());
            this.tasks.clone().spawn(async move {
                let _held = (accepted, socket);
                if let Err(error) = this.connection(tcp, address, &places, requests).await {
                    tracing::debug!(%peer, error, "webhook connection failed");
                }
            });
        };
        let sockets = limits.connections * (WAITING + 1);
        accept(
            listener,
            sockets,
            self.accepts.clone(),
            &self.stop,
            connected,
        )
        .await;
    }

    async fn connection(
        &self,
        tcp: TcpStream,
        peer: IpAddr,
        places: &Places,
        requests: Arc<Requests>,
    ) -> Result<(), String> {
        let limits = self.limits;
        let place = async {
            let own = places.peers.wait(peer).await;
            // The semaphore is never closed.
            (own, places.all.acquire().await)
        };
        let _place = tokio::select! {
            place = timeout(limits.handshake, place) => {
                place.map_err(|_| "no place in time".to_owned())?
            }
            () = self.stop.cancelled() => return Ok(()),
        };
        // The API server calls webhooks over HTTP/1.1, which xDS and CA do not offer.
        let mut config = ServerConfig::clone(&(self.tls)());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let tls = match handshake(tcp, Arc::new(config), limits.handshake, &self.stop).await {
            Ok(Some(tls)) => tls,
            Ok(None) => return Ok(()),
            Err((_, error)) => return Err(error),
        };

        let (busy, idle) = watch::channel(0_usize);
        let service = service_fn(move |request| {
            let under_way = UnderWay::begin(busy.clone());
            let requests = requests.clone();
            async move {
                let _under_way = under_way;
                Ok::<_, Infallible>(requests.answer(request).await)
            }
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.handshake)
            .max_buf_size(SMALL);
        // A constant, and it fits.
        let window = SMALL as u32;
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams)
            .max_header_list_size(MAX_HEADER_LIST)
            .initial_stream_window_size(window)
            .initial_connection_window_size(window.saturating_mul(limits.streams));
        let connection = builder.serve_connection(TokioIo::new(tls), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            done = connection.as_mut() => return done.map_err(|error| error.to_string()),
            () = unused(idle, limits.idle) => {}
            () = sleep(limits.max_age) => {}
            () = self.stop.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        match timeout(limits.request, connection).await {
            Ok(done) => done.map_err(|error| error.to_string()),
            Err(_) => Err("requests were still under way".to_owned()),
        }
    }
}

/// Which connections are served.
#[derive(Clone)]
struct Places {
    all: Arc<Semaphore>,
    peers: Quota<IpAddr>,
}

/// A request of a connection, until it has been answered.
struct UnderWay(watch::Sender<usize>);

impl UnderWay {
    fn begin(busy: watch::Sender<usize>) -> Self {
        busy.send_modify(|requests| *requests += 1);
        Self(busy)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|requests| *requests -= 1);
    }
}

/// Returns when there was no request for that long.
async fn unused(mut busy: watch::Receiver<usize>, limit: Duration) {
    loop {
        // Whoever counts ends with the connection, and this with it.
        if busy.wait_for(|requests| *requests == 0).await.is_err() {
            return;
        }
        if timeout(limit, busy.changed()).await.is_err() {
            return;
        }
    }
}

/// Answers requests, of all connections.
struct Requests {
    admission: Admission,
    limits: WebhookLimits,
    large: Semaphore,
}

impl Requests {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.uri().path() != PATH {
            return text(StatusCode::NOT_FOUND, "no such page\n");
        }
        if request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "POST only\n");
        }
        let answered = timeout(self.limits.request, async {
            let (body, _turn) = self.read(request.into_body()).await?;
            self.admission
                .review(body)
                .await
                .map_err(|error| text(StatusCode::BAD_REQUEST, &format!("{error}\n")))
        });
        match answered.await {
            Ok(Ok(json)) => {
                let mut response = Response::new(Full::new(json.into()));
                let kind = HeaderValue::from_static("application/json");
                response.headers_mut().insert(CONTENT_TYPE, kind);
                response
            }
            Ok(Err(refused)) => refused,
            Err(_) => text(StatusCode::REQUEST_TIMEOUT, "no request in time\n"),
        }
    }

    /// The body of a request, with the turn that a large one has to wait for.
    async fn read(
        &self,
        mut body: Incoming,
    ) -> Result<(Bytes, Option<SemaphorePermit<'_>>), Response<Full<Bytes>>> {
        let too_long = || text(StatusCode::PAYLOAD_TOO_LARGE, "the request is too long\n");
        let max = self.limits.body;
        if body.size_hint().lower() > max as u64 {
            return Err(too_long());
        }
        let (mut read, mut turn) = (BytesMut::new(), None);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                text(
                    StatusCode::BAD_REQUEST,
                    &format!("half a request: {error}\n"),
                )
            })?;
            // Trailers say nothing.
            let Ok(data) = frame.into_data() else {
                continue;
            };
            let length = read.len() + data.len();
            if length > max {
                return Err(too_long());
            }
            if length > SMALL && turn.is_none() {
                // The semaphore is never closed.
                turn = self.large.acquire().await.ok();
            }
            read.extend_from_slice(&data);
        }
        Ok((read.freeze(), turn))
    }
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(text.as_bytes())));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
