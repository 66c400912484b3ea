//! Connections to endpoints that carry one request after another (HTTP/1) or many at once
//! (HTTP/2). A worker has its own; the one that was used last is used next, so that those
//! that the demand does not need grow old and are closed.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_LENGTH, HeaderValue, TRANSFER_ENCODING};
use http::{Method, Request, StatusCode, Version};
use hyper::body::Body as _;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioTimer;
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::connect::{ConnectError, Connected, open_tcp};
use super::{Answer, Connecting, Endpoint, HttpVersion, Reached, SendError};
use crate::live::{Entered, ToEndpoint};
use crate::proxy::body::RequestBody;
use crate::proxy::http::LocalExecutor;
use crate::proxy::io::Io;
use crate::proxy::reply::Reply;
use crate::proxy::websocket;
use crate::worker::Worker;

/// A connection that was not used for so long is closed. Shorter than what servers wait for
/// their clients, so that we are the first to close.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(55);
/// Connections that lie idle for one endpoint. More are closed when they come back.
pub const MAX_IDLE: usize = 1024;
/// Streams on one HTTP/2 connection, if the endpoint allows that many.
pub const MAX_STREAMS: usize = 100;
/// Stale connections that one request tries before it makes its own.
const STALE: usize = 3;
/// Bytes of a response's headers.
const MAX_HEADER_LIST: u32 = 64 << 10;
/// Headers of a response.
const MAX_HEADERS: usize = 100;
/// Bytes that a stream of HTTP/2 may send before the client has taken any.
const STREAM_WINDOW: u32 = 64 << 10;
/// The same for all streams of a connection: none can starve another.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS as u32;
/// Bytes of requests that wait in one stream.
const SEND_BUFFER: usize = 64 << 10;
/// How often an endpoint is asked whether it lives.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// How long it may take to answer.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a request waits for another's attempt at an HTTP/2 connection.
const SHARED_CONNECT: Duration = Duration::from_secs(20);

/// How long an endpoint may take for its settings, before it counts as offering nothing.
const SETTINGS_DEADLINE: Duration = Duration::from_millis(500);
/// How often they are looked for meanwhile.
const SETTINGS_POLL: Duration = Duration::from_millis(5);

type Sender1 = http1::SendRequest<RequestBody>;
type Sender2 = http2::SendRequest<RequestBody>;

/// A worker's connections to endpoints.
#[derive(Default)]
pub struct Upstreams {
    http1: RefCell<HashMap<Arc<Endpoint>, Vec<Idle>>>,
    http2: RefCell<HashMap<Arc<Endpoint>, Rc<Shared>>>,
}

/// A connection of HTTP/1 that nobody uses.
struct Idle {
    sender: Sender1,
    /// Requests that it has carried.
    carried: u32,
    local: Option<SocketAddr>,
    since: Instant,
}

/// The connections of HTTP/2 to one endpoint.
#[derive(Default)]
struct Shared {
    connections: RefCell<Vec<Rc<Multiplexed>>>,
    connecting: Cell<bool>,
    /// Attempts that have ended, and how the last of them failed.
    attempts: Cell<u64>,
    failed: RefCell<Option<ConnectError>>,
    changed: Notify,
}

struct Multiplexed {
    sender: Sender2,
    live: Cell<usize>,
    /// Streams that the endpoint allows at once.
    allowed: Rc<Cell<usize>>,
    /// Whether it takes extended CONNECT.
    connects: Rc<Offer>,
    made: Instant,
    local: Option<SocketAddr>,
    idle_since: Cell<Instant>,
}

/// What an endpoint says once of itself, some time after its connection was made.
#[derive(Default)]
struct Offer {
    made: Cell<bool>,
    told: Notify,
    /// Somebody wants to know: hyper does not say that it has settings.
    asked: Notify,
}

impl Offer {
    fn set(&self, made: bool) {
        if self.made.replace(made) != made {
            self.told.notify_waiters();
        }
    }
}

impl Multiplexed {
    /// Whether it takes extended CONNECT. Its settings are the first that it sends (RFC 9113
    /// 3.4), and are waited for.
    async fn takes_connect(&self) -> bool {
        let until = self.made + SETTINGS_DEADLINE;
        while !self.connects.made.get() && Instant::now() < until {
            self.connects.asked.notify_one();
            let _ = timeout(SETTINGS_POLL, self.connects.told.notified()).await;
        }
        self.connects.made.get()
    }
}

impl Upstreams {
    /// Closes what has been idle for too long.
    pub fn sweep(&self, now: Instant) {
        let fresh = |since: Instant| now.saturating_duration_since(since) < IDLE_TIMEOUT;
        self.http1.borrow_mut().retain(|_, idle| {
            idle.retain(|idle| fresh(idle.since) && !idle.sender.is_closed());
            !idle.is_empty()
        });
        self.http2.borrow_mut().retain(|_, shared| {
            shared.connections.borrow_mut().retain(|connection| {
                !connection.sender.is_closed()
                    && (connection.live.get() > 0 || fresh(connection.idle_since.get()))
            });
            shared.connecting.get() || !shared.connections.borrow().is_empty()
        });
    }

    /// Closes what is idle towards endpoints that match: they are gone.
    pub fn evict(&self, predicate: impl Fn(&Endpoint) -> bool) {
        self.http1.borrow_mut().retain(|key, _| !predicate(key));
        self.http2.borrow_mut().retain(|key, _| !predicate(key));
    }

    /// How many connections of HTTP/1 lie idle, and how many of HTTP/2 there are.
    pub fn counts(&self) -> (usize, usize) {
        let http2 = self.http2.borrow();
        (
            self.http1.borrow().values().map(Vec::len).sum(),
            http2.values().map(|s| s.connections.borrow().len()).sum(),
        )
    }

    fn take(&self, endpoint: &Arc<Endpoint>) -> Option<Idle> {
        let mut all = self.http1.borrow_mut();
        let idle = all.get_mut(endpoint)?;
        loop {
            let last = idle.pop()?;
            if !last.sender.is_closed() {
                return Some(last);
            }
        }
    }

    fn put(&self, endpoint: &Arc<Endpoint>, idle: Idle) {
        let mut all = self.http1.borrow_mut();
        match all.get_mut(endpoint) {
            Some(list) if list.len() < MAX_IDLE => list.push(idle),
            Some(_) => {}
            None => {
                all.insert(endpoint.clone(), vec![idle]);
            }
        }
    }

    fn shared(&self, endpoint: &Arc<Endpoint>) -> Rc<Shared> {
        let mut all = self.http2.borrow_mut();
        if let Some(shared) = all.get(endpoint) {
            return shared.clone();
        }
        let shared = Rc::<Shared>::default();
        all.insert(endpoint.clone(), shared.clone());
        shared
    }
}

/// A connection in use. Dropped, it is closed (HTTP/1) or its stream is free (HTTP/2).
pub struct Lease(Kind);

enum Kind {
    Http1 {
        upstreams: Rc<Upstreams>,
        endpoint: Arc<Endpoint>,
        sender: Sender1,
        carried: u32,
        /// It may carry more.
        more: bool,
        local: Option<SocketAddr>,
        upgraded: oneshot::Receiver<Upgraded>,
    },
    /// Counts the stream until it is dropped.
    Http2(#[expect(dead_code, reason = "held for its drop")] Stream),
    /// One that carries another protocol now.
    Upgraded(Stream, OnUpgrade),
}

/// What is left of a connection of HTTP/1, or of a stream of HTTP/2, when both sides have agreed
/// on another protocol.
pub struct Upgraded {
    /// The stream, with what was read ahead.
    pub io: Io,
    /// Its place on its connection.
    _stream: Option<Stream>,
}

impl Lease {
    /// The response has been read: the connection may carry another request. Its request must
    /// have been sent, too; otherwise drop the lease.
    pub fn give_back(self) {
        if let Kind::Http1 {
            upstreams,
            endpoint,
            sender,
            carried,
            more: true,
            local,
            ..
        } = self.0
            && !sender.is_closed()
        {
            let since = Instant::now();
            upstreams.put(
                &endpoint,
                Idle {
                    sender,
                    carried,
                    local,
                    since,
                },
            );
        }
    }

    /// Waits for the stream of a connection that has answered with 101.
    pub async fn into_upgraded(self) -> Option<Upgraded> {
        match self.0 {
            Kind::Http1 { upgraded, .. } => upgraded.await.ok(),
            Kind::Http2(_) => None,
            Kind::Upgraded(stream, upgraded) => Some(Upgraded {
                io: Io::stream(upgraded.await.ok()?),
                _stream: Some(stream),
            }),
        }
    }

    /// Whether it is a stream of HTTP/2.
    pub fn is_http2(&self) -> bool {
        !matches!(self.0, Kind::Http1 { .. })
    }
}

/// One stream of an HTTP/2 connection.
struct Stream(Rc<Multiplexed>, Rc<Shared>);

impl Stream {
    fn new(connection: &Rc<Multiplexed>, shared: &Rc<Shared>) -> Self {
        connection.live.set(connection.live.get() + 1);
        Self(connection.clone(), shared.clone())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let live = self.0.live.get() - 1;
        self.0.live.set(live);
        if live == 0 {
            self.0.idle_since.set(Instant::now());
        }
        self.1.changed.notify_one();
    }
}

fn not_connected(error: ConnectError, request: Request<RequestBody>) -> SendError {
    SendError {
        reply: error.reply,
        error: error.error,
        reached: Reached::NotConnected,
        request: Some(Box::new(request)),
    }
}

pub(super) async fn send_http1(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    mut request: Request<RequestBody>,
    connecting: &Connecting,
) -> Result<Answer, SendError> {
    *request.version_mut() = Version::HTTP_11;
    // hyper leaves out a body of unknown length where GET and HEAD do not say that there is one.
    if matches!(*request.method(), Method::GET | Method::HEAD)
        && !request.body().is_end_stream()
        && !request.headers().contains_key(CONTENT_LENGTH)
    {
        let chunked = HeaderValue::from_static("chunked");
        request.headers_mut().insert(TRANSFER_ENCODING, chunked);
    }
    let upgrade = request.headers().contains_key(http::header::UPGRADE);
    let begun = Instant::now();
    for stale in 0.. {
        // What may become another protocol gets a connection of its own.
        let pooled = (stale < STALE && !upgrade).then(|| worker.upstreams.take(endpoint));
        let (mut sender, carried, local, upgraded) = match pooled.flatten() {
            Some(mut idle) => {
                // Its last response was read a moment ago, and hyper has yet to notice.
                if !idle.sender.is_ready() && idle.sender.ready().await.is_err() {
                    continue;
                }
                (idle.sender, idle.carried, idle.local, None)
            }
            None => match connect_http1(worker, endpoint, connecting).await {
                Ok((sender, local, upgraded)) => (sender, 0, local, Some(upgraded)),
                Err(error) => return Err(not_connected(error, request)),
            },
        };
        let fresh = upgraded.is_some();
        let waited = begun.elapsed();
        match sender.try_send_request(request).await {
            Ok(response) => {
                return Ok(Answer {
                    response,
                    connecting: waited,
                    local,
                    lease: Lease(Kind::Http1 {
                        upstreams: worker.upstreams.clone(),
                        endpoint: endpoint.clone(),
                        sender,
                        carried: carried + 1,
                        more: connecting.max_requests.is_none_or(|max| carried + 1 < max),
                        local,
                        upgraded: upgraded.unwrap_or_else(|| oneshot::channel().1),
                    }),
                });
            }
            Err(error) => request = again(error, fresh)?,
        }
    }
    // The loop ends by an answer, an error or a fresh connection's failure.
    Err(no_connection(request))
}

/// The request, if nothing of it was sent on a connection that was stale.
fn again(
    mut error: TrySendError<Request<RequestBody>>,
    fresh: bool,
) -> Result<Request<RequestBody>, SendError> {
    match error.take_message() {
        Some(request) if !fresh => Ok(request),
        unsent => {
            let unsent = unsent.map(Box::new);
            Err(judge(&error.into_error(), unsent, fresh))
        }
    }
}

fn no_connection(request: Request<RequestBody>) -> SendError {
    SendError {
        reply: Reply::UPSTREAM_CLOSED,
        error: "no connection stays open".to_owned(),
        reached: Reached::NotProcessed,
        request: Some(Box::new(request)),
    }
}

/// What an error of hyper's client means.
fn judge(
    error: &hyper::Error,
    unsent: Option<Box<Request<RequestBody>>>,
    fresh: bool,
) -> SendError {
    use std::error::Error as _;
    let mut text = error.to_string();
    let mut source = error.source();
    let mut h2 = None;
    while let Some(inner) = source {
        if h2.is_none() {
            h2 = inner.downcast_ref::<h2::Error>();
        }
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    let refused = h2.is_some_and(|h2| {
        h2.is_remote()
            && match h2.reason() {
                Some(h2::Reason::REFUSED_STREAM) => h2.is_reset(),
                // Streams that it has taken up go on after a graceful GOAWAY; what fails with
                // it lies beyond.
                Some(h2::Reason::NO_ERROR) => h2.is_go_away(),
                _ => false,
            }
    });
    let reached = if unsent.is_some() || refused {
        Reached::NotProcessed
    } else if !fresh && h2.is_none() && (error.is_incomplete_message() || error.is_canceled()) {
        Reached::Stale
    } else {
        Reached::Sent
    };
    let reply = if error.is_user() {
        Reply::BODY_FAILED
    } else if error.is_parse() || error.is_parse_status() || error.is_parse_too_large() {
        Reply::UPSTREAM_PROTOCOL
    } else if h2.is_some_and(h2::Error::is_reset) {
        Reply::UPSTREAM_RESET
    } else {
        Reply::UPSTREAM_CLOSED
    };
    SendError {
        reply,
        error: text,
        reached,
        request: unsent,
    }
}

/// Shows the connection to whoever asks what is open.
fn list(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    version: HttpVersion,
    io: &mut Io,
) -> Entered<ToEndpoint> {
    worker.live.endpoints.enter(ToEndpoint {
        endpoint: endpoint.clone(),
        version,
        moved: io.count(),
        since: worker.now(),
    })
}

type Made1 = (Sender1, Option<SocketAddr>, oneshot::Receiver<Upgraded>);

async fn connect_http1(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    connecting: &Connecting,
) -> Result<Made1, ConnectError> {
    let version = Some(HttpVersion::Http1);
    // Boxed: making a connection is large and rare, and every request would carry its size.
    let opening = Box::pin(open_tcp(worker, endpoint, None, version, connecting));
    let Connected {
        mut io,
        local,
        permit,
        ..
    } = opening.await?;
    let listed = list(worker, endpoint, HttpVersion::Http1, &mut io);
    let handshake = http1::Builder::new()
        .writev(false)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_LIST as usize + (16 << 10))
        .handshake(io)
        .await;
    let (sender, mut connection) = handshake.map_err(|error| ConnectError {
        reply: Reply::CONNECT_FAILED,
        error: error.to_string(),
    })?;
    let (hand_over, upgraded) = oneshot::channel();
    let address = endpoint.address;
    spawn_local(async move {
        match poll_fn(|cx| connection.poll_without_shutdown(cx)).await {
            Ok(()) => {
                let parts = connection.into_parts();
                let mut io = parts.io;
                io.unread(parts.read_buf);
                // Nobody takes it unless the response was 101.
                let upgraded = Upgraded { io, _stream: None };
                if let Err(Upgraded { mut io, .. }) = hand_over.send(upgraded) {
                    let closing =
                        poll_fn(|cx| hyper::rt::Write::poll_shutdown(Pin::new(&mut io), cx));
                    let _ = timeout(Duration::from_secs(1), closing).await;
                }
            }
            Err(error) => debug!(%address, "upstream HTTP/1: {error}"),
        }
        drop((permit, listed));
    });
    Ok((sender, local, upgraded))
}

pub(super) async fn send_http2(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    mut request: Request<RequestBody>,
    connecting: &Connecting,
) -> Result<Answer, SendError> {
    *request.version_mut() = Version::HTTP_2;
    let upgrade = request.headers().contains_key(http::header::UPGRADE);
    let begun = Instant::now();
    for stale in 0.. {
        let shared = worker.upstreams.shared(endpoint);
        let acquired = acquire(worker, endpoint, &shared, stale >= STALE, connecting).await;
        let (stream, fresh) = match acquired {
            Ok(acquired) => acquired,
            Err(error) => return Err(not_connected(error, request)),
        };
        let waited = begun.elapsed();
        if upgrade && request.method() != Method::CONNECT {
            if !stream.0.takes_connect().await {
                // What it does not offer it may still do over HTTP/1 (RFC 8441 3).
                drop(stream);
                websocket::to_origin_form(&mut request);
                return Box::pin(send_http1(worker, endpoint, request, connecting)).await;
            }
            websocket::to_extended_connect(&mut request);
        }
        let mut sender = stream.0.sender.clone();
        match sender.try_send_request(request).await {
            Ok(mut response) if upgrade && response.status() == StatusCode::OK => {
                let upgraded = hyper::upgrade::on(&mut response);
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                return Ok(Answer {
                    response,
                    connecting: waited,
                    local: stream.0.local,
                    lease: Lease(Kind::Upgraded(stream, upgraded)),
                });
            }
            Ok(response) => {
                return Ok(Answer {
                    response,
                    connecting: waited,
                    local: stream.0.local,
                    lease: Lease(Kind::Http2(stream)),
                });
            }
            Err(error) => {
                // It takes no more requests, or has broken off.
                if error.error().is_closed() || error.error().is_canceled() {
                    let gone = &stream.0;
                    let mut all = shared.connections.borrow_mut();
                    all.retain(|other| !Rc::ptr_eq(other, gone));
                }
                request = again(error, fresh)?;
            }
        }
    }
    Err(no_connection(request))
}

/// A place on a connection; of several requests that need a new one, one makes it.
async fn acquire(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    shared: &Rc<Shared>,
    mut only_new: bool,
    connecting: &Connecting,
) -> Result<(Stream, bool), ConnectError> {
    loop {
        if !only_new && let Some(stream) = shared.pick() {
            return Ok((stream, false));
        }
        if !shared.connecting.get() {
            let attempt = Attempt::new(shared);
            let made = connect_http2(worker, endpoint, connecting).await;
            shared.failed.replace(made.as_ref().err().cloned());
            drop(attempt);
            let connection = Rc::new(made?);
            let stream = Stream::new(&connection, shared);
            shared.connections.borrow_mut().push(connection);
            return Ok((stream, true));
        }
        only_new = false;
        let attempts = shared.attempts.get();
        let changed = shared.changed.notified();
        if timeout(SHARED_CONNECT, changed).await.is_err() {
            return Err(ConnectError {
                reply: Reply::CONNECT_TIMEOUT,
                error: format!("no connection to {} in time", endpoint.address),
            });
        }
        // Those who waited for an attempt fail with it, rather than one after the other.
        if shared.attempts.get() != attempts
            && let Some(error) = &*shared.failed.borrow()
        {
            return Err(error.clone());
        }
    }
}

impl Shared {
    fn pick(self: &Rc<Self>) -> Option<Stream> {
        let mut all = self.connections.borrow_mut();
        all.retain(|connection| !connection.sender.is_closed());
        let connection = all.iter().find(|connection| {
            let max = connection.allowed.get().min(MAX_STREAMS);
            connection.live.get() < max
        })?;
        Some(Stream::new(connection, self))
    }
}

/// Says that an attempt is under way, until it is dropped.
struct Attempt<'a>(&'a Shared);

impl<'a> Attempt<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.connecting.set(true);
        Self(shared)
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.0.connecting.set(false);
        self.0.attempts.set(self.0.attempts.get() + 1);
        self.0.changed.notify_waiters();
    }
}

async fn connect_http2(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    connecting: &Connecting,
) -> Result<Multiplexed, ConnectError> {
    let version = Some(HttpVersion::Http2);
    let opening = Box::pin(open_tcp(worker, endpoint, None, version, connecting));
    let Connected {
        mut io,
        local,
        permit,
        ..
    } = opening.await?;
    let listed = list(worker, endpoint, HttpVersion::Http2, &mut io);
    let handshake = http2::Builder::new(LocalExecutor)
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEADER_LIST)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .handshake(io)
        .await;
    let (sender, mut connection) = handshake.map_err(|error| ConnectError {
        reply: Reply::CONNECT_FAILED,
        error: error.to_string(),
    })?;
    let address = endpoint.address;
    let allowed = Rc::new(Cell::new(connection.current_max_send_streams()));
    let told = allowed.clone();
    let connects = Rc::<Offer>::default();
    let offer = connects.clone();
    spawn_local(async move {
        let mut asked = pin!(offer.asked.notified());
        let ended = poll_fn(|cx| {
            let ended = Pin::new(&mut connection).poll(cx);
            while asked.as_mut().poll(cx).is_ready() {
                asked.set(offer.asked.notified());
            }
            told.set(connection.current_max_send_streams());
            offer.set(connection.is_extended_connect_protocol_enabled());
            ended
        });
        if let Err(error) = ended.await {
            debug!(%address, "upstream HTTP/2: {error}");
        }
        drop((permit, listed));
    });
    Ok(Multiplexed {
        sender,
        allowed,
        connects,
        made: Instant::now(),
        live: Cell::new(0),
        local,
        idle_since: Cell::new(Instant::now()),
    })
}
