//! The server's side: accepts CONNECT streams of one connection and hands each to a handler.
//!
//! What trips it: a client that sends no preface or no stream (deadlines), oversized headers
//! (HTTP/2's own limit, announced), other methods and bad authorities (400), too many streams
//! (REFUSED_STREAM), resets in series (the h2 crate's limits), silence (PING). None of it
//! disturbs the other streams, let alone other connections.

use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::server::SendResponse;
use http::header::HeaderMap;
use http::{Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::error::{ConnectionError, ResetReason, TunnelError};
use super::headers::{BAGGAGE, Baggage, ConnectRequest, HeaderError, PROXY_STATUS, proxy_status};
use super::keepalive::{Keepalive, Listening};
use super::send_queue::SendQueue;
use super::settings::Settings;
use super::tunnel::Tunnel;
use super::windows::{Keeper, Watched, Windows};
use crate::net::drain::{DrainMode, DrainWatcher};

/// One CONNECT stream that waits for an answer.
#[derive(Debug)]
pub struct Incoming {
    /// What the client asks for.
    pub request: ConnectRequest,
    /// Headers that were dropped because they were malformed. They only inform.
    pub ignored: Vec<HeaderError>,
    /// Answers.
    pub respond: Responder,
}

/// Answers a CONNECT. Dropped without an answer, it resets the stream.
pub struct Responder {
    /// Goes before the handles of the stream.
    watched: Watched,
    send: SendResponse<Bytes>,
    recv: h2::RecvStream,
    queue: SendQueue,
}

/// A request that was answered with 400.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// Its method is not CONNECT.
    #[error("method {0} instead of CONNECT")]
    Method(Method),
    /// Its `:authority` is missing or malformed.
    #[error(transparent)]
    Header(HeaderError),
}

/// What a connection did, when it has ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    /// CONNECT streams that were handed to the handler.
    pub accepted: u64,
    /// Requests that were answered here because they were malformed.
    pub malformed: u64,
    /// Streams that were refused because too many handlers of earlier ones, which their client
    /// has reset, still run.
    pub refused: u64,
}

/// Counts a handler while it runs.
struct Handling(Rc<Cell<u32>>);

impl Handling {
    fn new(count: &Rc<Cell<u32>>) -> Self {
        count.set(count.get() + 1);
        Self(count.clone())
    }
}

impl Drop for Handling {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Serves a connection until it ends: the handler is called for each CONNECT stream, in a task
/// of its own on this thread's `LocalSet`.
///
/// When `drain` is signalled, the client is told (GOAWAY), streams go on until its deadline, and
/// then the connection is closed.
///
/// # Errors
/// Why the connection ended, if not by an orderly close of either side.
pub async fn serve<IO, H>(
    io: IO,
    settings: &Settings,
    drain: DrainWatcher,
    handler: H,
) -> Result<Served, ConnectionError>
where
    IO: AsyncRead + AsyncWrite + Unpin + 'static,
    H: AsyncFn(Incoming) + 'static,
{
    serve_observed(io, settings, drain, handler, |_| {}).await
}

/// [`serve`], which tells of each malformed request when it has been answered.
///
/// # Errors
/// As [`serve`].
pub async fn serve_observed<IO, H>(
    io: IO,
    settings: &Settings,
    drain: DrainWatcher,
    handler: H,
    malformed: impl Fn(Malformed),
) -> Result<Served, ConnectionError>
where
    IO: AsyncRead + AsyncWrite + Unpin + 'static,
    H: AsyncFn(Incoming) + 'static,
{
    let (io, heard) = Listening::new(io);
    let handshake = settings.server().handshake::<_, Bytes>(io);
    let mut connection = timeout(settings.preface_timeout, handshake)
        .await
        .map_err(|_| ConnectionError::PrefaceTimeout)??;
    let keepalive = Keepalive::new(connection.ping_pong(), heard, *settings);
    let mut supervisor = Supervisor {
        keepalive,
        drain: LocalDrain::new(drain),
        draining: false,
        timer: Box::pin(sleep(settings.first_stream_timeout)),
        active: false,
        settings: *settings,
    };
    let handler = Rc::new(handler);
    // Streams that their client has reset do not count against its limit, but what was
    // started for them may still run (CVE-2023-44487).
    let handled = Rc::new(Cell::new(0_u32));
    let most = settings.max_concurrent_streams.saturating_mul(2);
    let queue = SendQueue::new(settings.connection_send_buffer);
    let (windows, mut keeper) = Keeper::new(settings);
    let mut known = None;
    let mut served = Served::default();
    loop {
        let next = poll_fn(|cx| {
            if let Some(keeper) = &mut keeper {
                keeper.poll(cx, &mut connection);
            }
            // What the peer has sent counts before any verdict that it is dead or idle.
            if let Poll::Ready(stream) = connection.poll_accept(cx) {
                return Poll::Ready(Ok(stream));
            }
            match ready!(supervisor.poll(cx, &mut connection)) {
                Ok(()) => connection.poll_accept(cx).map(Ok),
                Err(verdict) => Poll::Ready(Err(verdict)),
            }
        })
        .await;
        match next {
            Ok(Some(Ok((request, send)))) => {
                supervisor.active = true;
                if handled.get() >= most {
                    let mut send = send;
                    send.send_reset(h2::Reason::REFUSED_STREAM);
                    served.refused += 1;
                    continue;
                }
                match read_request(request, send, &queue, &windows, known.as_ref()) {
                    Ok(incoming) => {
                        served.accepted += 1;
                        known.clone_from(&incoming.request.baggage);
                        let handler = handler.clone();
                        let handling = Handling::new(&handled);
                        spawn_local(async move {
                            handler(incoming).await;
                            drop(handling);
                        });
                    }
                    Err(what) => {
                        served.malformed += 1;
                        malformed(what);
                    }
                }
            }
            Ok(Some(Err(error))) => {
                let error = ConnectionError::from(error);
                return if error.is_orderly() {
                    Ok(served)
                } else {
                    Err(error)
                };
            }
            Ok(None) => return Ok(served),
            Err(Verdict::Dead) => return Err(ConnectionError::Dead),
            Err(Verdict::Close) => {
                connection.abrupt_shutdown(h2::Reason::NO_ERROR);
                // What the peer does with the last frames changes nothing any more.
                let closing = poll_fn(|cx| connection.poll_closed(cx));
                let _ = timeout(settings.close_timeout, closing).await;
                return Ok(served);
            }
        }
    }
}

/// Turns a stream into a request, or answers it.
fn read_request(
    request: Request<h2::RecvStream>,
    send: SendResponse<Bytes>,
    queue: &SendQueue,
    windows: &Rc<Windows>,
    known: Option<&Baggage>,
) -> Result<Incoming, Malformed> {
    let (head, mut recv) = request.into_parts();
    let respond = Responder {
        watched: windows.enter(&mut recv),
        send,
        recv,
        queue: queue.clone(),
    };
    if head.method != Method::CONNECT {
        respond.refuse(StatusCode::BAD_REQUEST, "http_request_error");
        return Err(Malformed::Method(head.method));
    }
    match ConnectRequest::from_http(&head.uri, &head.headers, known) {
        Ok((request, ignored)) => Ok(Incoming {
            request,
            ignored,
            respond,
        }),
        Err(error) => {
            respond.refuse(StatusCode::BAD_REQUEST, "http_request_error");
            Err(Malformed::Header(error))
        }
    }
}

impl Responder {
    /// Accepts: 200, with the destination workload's baggage if given.
    ///
    /// # Errors
    /// When the client has given up meanwhile.
    pub fn accept(mut self, baggage: Option<&Baggage>) -> Result<Tunnel, TunnelError> {
        let mut response = Response::new(());
        if let Some(baggage) = baggage {
            let headers: &mut HeaderMap = response.headers_mut();
            headers.insert(BAGGAGE, baggage.header().clone());
        }
        match self.send.send_response(response, false) {
            Ok(send) => Ok(Tunnel::new(send, self.recv, self.watched, self.queue, None)),
            Err(error) => Err(self.why(error)),
        }
    }

    /// Refuses with a status: 400 for a bad request, 401 when policy denies, 503 when the
    /// destination cannot be reached. `error` is an error type of RFC 9209 2.3 such as
    /// `connection_refused`, which goes into `proxy-status`; empty for none.
    pub fn refuse(mut self, status: StatusCode, error: &'static str) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        if let Some(value) = proxy_status(error) {
            response.headers_mut().insert(PROXY_STATUS, value);
        }
        // A client that has given up meanwhile needs no answer.
        let _ = self.send.send_response(response, true);
    }

    /// Resets the stream without an answer.
    pub fn reset(mut self, reason: ResetReason) {
        self.send.send_reset(reason.to_h2());
    }

    /// Waits until the client gives up (or the connection ends), so that work for it can stop.
    pub async fn cancelled(&mut self) -> TunnelError {
        poll_fn(|cx| {
            Poll::Ready(match ready!(self.send.poll_reset(cx)) {
                Ok(reason) => TunnelError::Reset(reason.into()),
                Err(error) => error.into(),
            })
        })
        .await
    }

    fn why(&mut self, error: h2::Error) -> TunnelError {
        match self
            .send
            .poll_reset(&mut Context::from_waker(Waker::noop()))
        {
            Poll::Ready(Ok(reason)) => TunnelError::Reset(reason.into()),
            Poll::Ready(Err(error)) => error.into(),
            Poll::Pending => error.into(),
        }
    }
}

impl std::fmt::Debug for Responder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Responder")
            .field("stream", &self.send.stream_id())
            .finish()
    }
}

/// Everything that ends a connection from our side.
struct Supervisor {
    keepalive: Option<Keepalive>,
    drain: LocalDrain,
    draining: bool,
    /// First the deadline for a stream to appear, then the idle timeout, then the drain's.
    timer: Pin<Box<Sleep>>,
    /// A stream was accepted since the timer was set.
    active: bool,
    settings: Settings,
}

enum Verdict {
    Close,
    Dead,
}

impl Supervisor {
    /// `Ok` when the connection was told something that it has to pass on now.
    fn poll<IO>(
        &mut self,
        cx: &mut Context<'_>,
        connection: &mut h2::server::Connection<IO, Bytes>,
    ) -> Poll<Result<(), Verdict>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        match self.keepalive.as_mut().map(|k| k.poll_dead(cx)) {
            Some(Poll::Ready(())) => return Poll::Ready(Err(Verdict::Dead)),
            Some(Poll::Pending) | None => {}
        }
        let mut told = false;
        match self.drain.poll(cx) {
            Some(DrainMode::Immediate) => return Poll::Ready(Err(Verdict::Close)),
            Some(DrainMode::Graceful { deadline }) if !self.draining => {
                self.draining = true;
                told = true;
                connection.graceful_shutdown();
                self.timer.as_mut().reset(deadline);
            }
            Some(DrainMode::Graceful { .. }) | None => {}
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if self.draining {
                return Poll::Ready(Err(Verdict::Close));
            }
            if !self.active && !connection.has_streams() {
                self.draining = true;
                told = true;
                connection.graceful_shutdown();
                self.rearm(self.settings.ping_timeout);
            } else {
                self.active = false;
                self.rearm(self.settings.idle_timeout);
            }
        }
        if told {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    fn rearm(&mut self, after: std::time::Duration) {
        self.timer.as_mut().reset(Instant::now() + after);
    }
}

/// A drain signal that costs a comparison to look at. A [`DrainWatcher`] takes a lock that all
/// workers share each time it is polled, and a connection is polled for every message.
struct LocalDrain {
    state: Rc<LocalDrainState>,
    task: AbortHandle,
}

#[derive(Default)]
struct LocalDrainState {
    mode: Cell<Option<DrainMode>>,
    waker: RefCell<Option<Waker>>,
}

impl LocalDrain {
    fn new(mut watcher: DrainWatcher) -> Self {
        let state = Rc::new(LocalDrainState::default());
        let told = state.clone();
        let task = spawn_local(async move {
            loop {
                let mode = watcher.signalled().await;
                told.mode.set(Some(mode));
                if let Some(waker) = told.waker.take() {
                    waker.wake();
                }
                // A graceful drain may still become an immediate one.
                if mode == DrainMode::Immediate {
                    return;
                }
                watcher.changed().await;
            }
        });
        Self {
            state,
            task: task.abort_handle(),
        }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Option<DrainMode> {
        let mode = self.state.mode.get();
        if mode != Some(DrainMode::Immediate) {
            let mut waker = self.state.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        mode
    }
}

impl Drop for LocalDrain {
    fn drop(&mut self) {
        self.task.abort();
    }
}
