//! Connections to endpoints that carry one request after another (HTTP/1) or many at once
//! (HTTP/2). A worker has its own; the one that was used last is used next, so that those
//! that the demand does not need grow old and are closed.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::hbone::ConnectionWatch;
use http::header::{CONTENT_LENGTH, HeaderValue, TRANSFER_ENCODING};
use http::{Method, Request, StatusCode, Version};
use http_body::Body as _;
use hyper::client::conn::{TrySendError, http1};
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::connect::{ConnectError, Connected, open_tcp};
use super::{Answer, Connecting, Endpoint, HttpVersion, Reached, SendError};
use crate::live::{Entered, ToEndpoint};
use crate::proxy::body::RequestBody;
use crate::proxy::http2::client::{self as http2, Answered, Failed};
use crate::proxy::http2::stream::Stream as Bytestream;
use crate::proxy::interim::Follower;
use crate::proxy::io::Io;
use crate::proxy::reply::Reply;
use crate::proxy::websocket;
use crate::worker::Worker;

/// A connection that was not used for so long is closed. Shorter than what servers wait for
/// their clients, so that we are the first to close.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(55);
/// Connections that lie idle for one endpoint. More are closed when they come back.
pub const MAX_IDLE: usize = 1024;
/// Stale connections that one request tries before it makes its own.
const STALE: usize = 3;
/// Bytes of a response's headers.
const MAX_HEADER_LIST: usize = 64 << 10;
/// Headers of a response.
const MAX_HEADERS: usize = 100;
/// How long a request waits for another's attempt at an HTTP/2 connection.
const SHARED_CONNECT: Duration = Duration::from_secs(20);

/// How long an endpoint may take for its settings, before it counts as offering nothing.
const SETTINGS_DEADLINE: Duration = Duration::from_millis(500);

type Sender1 = http1::SendRequest<RequestBody>;

/// A worker's connections to endpoints.
#[derive(Default)]
pub struct Upstreams {
    http1: RefCell<HashMap<Arc<Endpoint>, Vec<Idle>>>,
    http2: RefCell<HashMap<Arc<Endpoint>, Rc<Shared>>>,
}

/// A connection of HTTP/1 that nobody uses.
struct Idle {
    sender: Sender1,
    tunnel: Option<ConnectionWatch>,
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
    connection: http2::Connection,
    tunnel: Option<ConnectionWatch>,
    made: Instant,
    local: Option<SocketAddr>,
    idle_since: Cell<Instant>,
}

impl Idle {
    /// Whether it may carry another request.
    fn is_usable(&self) -> bool {
        !self.sender.is_closed() && stays(self.tunnel.as_ref())
    }
}

impl Multiplexed {
    fn is_usable(&self) -> bool {
        !self.connection.is_closed() && stays(self.tunnel.as_ref())
    }
}

/// Whether a connection stays. One within HBONE ends with its tunnel's connection, and where the
/// node at the other end has said GOAWAY, which is about to be replaced, that is soon: what is
/// under way has time to end, and what comes goes over a new one.
fn stays(tunnel: Option<&ConnectionWatch>) -> bool {
    tunnel.is_none_or(ConnectionWatch::is_usable)
}

impl Upstreams {
    /// Closes what has been idle for too long, or will not stay.
    pub fn sweep(&self, now: Instant) {
        let fresh = |since: Instant| now.saturating_duration_since(since) < IDLE_TIMEOUT;
        self.http1.borrow_mut().retain(|_, idle| {
            idle.retain(|idle| fresh(idle.since) && idle.is_usable());
            !idle.is_empty()
        });
        self.http2.borrow_mut().retain(|_, shared| {
            shared.connections.borrow_mut().retain(|connection| {
                let kept = connection.connection.live() > 0 || fresh(connection.idle_since.get());
                kept && connection.is_usable()
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
            if last.is_usable() {
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
        tunnel: Option<ConnectionWatch>,
        carried: u32,
        /// It may carry more.
        more: bool,
        local: Option<SocketAddr>,
        upgraded: oneshot::Receiver<Upgraded>,
    },
    /// Counts the stream until it is dropped.
    Http2(Stream),
    /// One that carries another protocol now.
    Upgraded(Stream, Box<Bytestream>),
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
            tunnel,
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
                    tunnel,
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
                io: Io::stream(upgraded),
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
        connection.connection.enter();
        Self(connection.clone(), shared.clone())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.0.connection.leave() == 0 {
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
    follower: &Follower,
) -> Result<Answer, SendError> {
    *request.version_mut() = Version::HTTP_11;
    follower.follow(&mut request);
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
        let (mut sender, tunnel, carried, local, upgraded) = match pooled.flatten() {
            Some(mut idle) => {
                // Its last response was read a moment ago, and hyper has yet to notice.
                if !idle.sender.is_ready() && idle.sender.ready().await.is_err() {
                    continue;
                }
                (idle.sender, idle.tunnel, idle.carried, idle.local, None)
            }
            None => match connect_http1(worker, endpoint, connecting).await {
                Ok((sender, tunnel, local, upgraded)) => (sender, tunnel, 0, local, Some(upgraded)),
                Err(error) => return Err(not_connected(error, request)),
            },
        };
        let fresh = upgraded.is_some();
        let waited = begun.elapsed();
        match sender.try_send_request(request).await {
            Ok(response) => {
                return Ok(Answer {
                    response: response.map(Into::into),
                    connecting: waited,
                    local,
                    lease: Lease(Kind::Http1 {
                        upstreams: worker.upstreams.clone(),
                        endpoint: endpoint.clone(),
                        sender,
                        tunnel,
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

/// What an error of hyper's client means (HTTP/1).
fn judge(
    error: &hyper::Error,
    unsent: Option<Box<Request<RequestBody>>>,
    fresh: bool,
) -> SendError {
    let reached = if unsent.is_some() {
        Reached::NotProcessed
    } else if !fresh && (error.is_incomplete_message() || error.is_canceled()) {
        Reached::Stale
    } else {
        Reached::Sent
    };
    let reply = if error.is_user() {
        Reply::BODY_FAILED
    } else if error.is_parse() || error.is_parse_status() || error.is_parse_too_large() {
        Reply::UPSTREAM_PROTOCOL
    } else {
        Reply::UPSTREAM_CLOSED
    };
    SendError {
        reply,
        error: with_sources(error),
        reached,
        request: unsent,
    }
}

/// What it means that there is no response over HTTP/2.
fn judge_http2(failed: Failed) -> SendError {
    let (error, unsent) = match failed {
        Failed::Unsent(unsent, error) => (error, Some(unsent)),
        Failed::Http2(error) => (error, None),
        Failed::Body(error) => {
            return SendError {
                reply: Reply::BODY_FAILED,
                error: with_sources(&error),
                reached: Reached::Sent,
                request: None,
            };
        }
    };
    let refused = error.is_remote()
        && match error.reason() {
            Some(h2::Reason::REFUSED_STREAM) => error.is_reset(),
            // Streams that it has taken up go on after a graceful GOAWAY; what fails with it
            // lies beyond.
            Some(h2::Reason::NO_ERROR) => error.is_go_away(),
            _ => false,
        };
    SendError {
        reply: match error.is_reset() {
            true => Reply::UPSTREAM_RESET,
            false => Reply::UPSTREAM_CLOSED,
        },
        error: with_sources(&error),
        reached: match refused || unsent.is_some() {
            true => Reached::NotProcessed,
            false => Reached::Sent,
        },
        request: unsent,
    }
}

/// An error with what has led to it.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
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

type Made1 = (
    Sender1,
    Option<ConnectionWatch>,
    Option<SocketAddr>,
    oneshot::Receiver<Upgraded>,
);

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
        tunnel,
        local,
        permit,
        ..
    } = opening.await?;
    let listed = list(worker, endpoint, HttpVersion::Http1, &mut io);
    let handshake = http1::Builder::new()
        .writev(false)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_LIST + (16 << 10))
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
    Ok((sender, tunnel, local, upgraded))
}

pub(super) async fn send_http2(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    mut request: Request<RequestBody>,
    connecting: &Connecting,
    follower: &Follower,
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
            let until = stream.0.made + SETTINGS_DEADLINE;
            if !stream.0.connection.takes_connect(until).await {
                // What it does not offer it may still do over HTTP/1 (RFC 8441 3).
                drop(stream);
                websocket::to_origin_form(&mut request);
                let sending = send_http1(worker, endpoint, request, connecting, follower);
                return Box::pin(sending).await;
            }
            websocket::to_extended_connect(&mut request);
        }
        let (response, kind) = match stream.0.connection.send(request, follower).await {
            Ok(Answered::Response(response)) => (response, Kind::Http2(stream)),
            Ok(Answered::Stream(mut response, bytes)) => {
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                (response, Kind::Upgraded(stream, bytes))
            }
            Err(failed) => {
                // It takes no more requests, or has broken off.
                let gone = &stream.0;
                if gone.connection.is_closed() {
                    let mut all = shared.connections.borrow_mut();
                    all.retain(|other| !Rc::ptr_eq(other, gone));
                }
                match failed {
                    Failed::Unsent(unsent, _) if !fresh => request = *unsent,
                    failed => return Err(judge_http2(failed)),
                }
                continue;
            }
        };
        let local = match &kind {
            Kind::Http2(stream) | Kind::Upgraded(stream, _) => stream.0.local,
            Kind::Http1 { local, .. } => *local,
        };
        return Ok(Answer {
            response,
            connecting: waited,
            local,
            lease: Lease(kind),
        });
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
        all.retain(|connection| connection.is_usable());
        let connection = all.iter().find(|made| made.connection.has_room())?;
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
        tunnel,
        local,
        permit,
        ..
    } = opening.await?;
    let listed = list(worker, endpoint, HttpVersion::Http2, &mut io);
    let handshake = http2::Connection::handshake(io, (permit, listed)).await;
    let connection = handshake.map_err(|error| ConnectError {
        reply: Reply::CONNECT_FAILED,
        error: error.to_string(),
    })?;
    Ok(Multiplexed {
        connection,
        tunnel,
        made: Instant::now(),
        local,
        idle_since: Cell::new(Instant::now()),
    })
}
