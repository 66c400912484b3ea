//! The client's side of a connection: opens streams, knows how many live, notices its end.

use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::client::SendRequest;
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout_at};

use super::error::{ConnectionError, OpenError, ResetReason};
use super::headers::{Baggage, ConnectRequest, PROXY_STATUS, proxy_status_error};
use super::keepalive::{Keepalive, Listening};
use super::send_queue::SendQueue;
use super::settings::Settings;
use super::tunnel::Tunnel;
use super::windows::{Keeper, Windows};

/// A connection to an HBONE server. Cloning gives another handle.
///
/// When the last handle and the last tunnel are gone it says GOAWAY and closes.
#[derive(Clone)]
pub struct Connection {
    inner: Rc<Inner>,
}

struct Inner {
    sender: RefCell<SendRequest<Bytes>>,
    /// The peer repeats its baggage: one parsed copy serves all streams.
    baggage: RefCell<Option<Baggage>>,
    queue: SendQueue,
    windows: Rc<Windows>,
    shared: Rc<Shared>,
}

/// What the handles, the tunnels and the driver of a connection share.
struct Shared {
    live: Cell<usize>,
    carried: Cell<u64>,
    idle_since: Cell<Instant>,
    ended: RefCell<Option<ConnectionError>>,
    /// Wakes whoever waits for the connection to end.
    changed: Notify,
    /// Woken when a place for a stream becomes free, or the connection ends.
    freed: RefCell<Option<Rc<Notify>>>,
    /// Whoever opens streams; gone when nobody does any more.
    opener: RefCell<Weak<Inner>>,
}

impl Shared {
    fn wake_freed(&self) {
        if let Some(freed) = &*self.freed.borrow() {
            freed.notify_waiters();
        }
    }
}

/// What the peer says when it accepts.
#[derive(Debug, Clone, Default)]
pub struct ResponseInfo {
    /// The destination workload, if the peer tells.
    pub baggage: Option<Baggage>,
}

impl Connection {
    /// Sends the preface and starts the connection's task on this thread's `LocalSet`.
    ///
    /// # Errors
    /// When the socket fails. It does not wait for the peer.
    pub async fn handshake<IO>(io: IO, settings: &Settings) -> Result<Self, ConnectionError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let (io, heard) = Listening::new(io);
        let (sender, mut connection) = settings.client().handshake::<_, Bytes>(io).await?;
        let shared = Rc::new(Shared {
            live: Cell::new(0),
            carried: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            ended: RefCell::new(None),
            changed: Notify::new(),
            freed: RefCell::new(None),
            opener: RefCell::default(),
        });
        let mut keepalive = Keepalive::new(connection.ping_pong(), heard, *settings);
        let (windows, mut keeper) = Keeper::new(settings);
        let driver = shared.clone();
        spawn_local(async move {
            let end = poll_fn(|cx| {
                if let Some(keeper) = &mut keeper {
                    keeper.poll(cx, &mut connection);
                }
                if let Poll::Ready(end) = Pin::new(&mut connection).poll(cx) {
                    return Poll::Ready(end.map_or_else(Into::into, |()| ConnectionError::Closed));
                }
                match keepalive.as_mut().map(|k| k.poll_dead(cx)) {
                    Some(Poll::Ready(())) => Poll::Ready(ConnectionError::Dead),
                    _ => Poll::Pending,
                }
            })
            .await;
            // First the reason, then the streams: dropping the connection fails them.
            driver.ended.replace(Some(end));
            drop(connection);
            driver.changed.notify_waiters();
            driver.wake_freed();
        });
        let inner = Rc::new(Inner {
            sender: RefCell::new(sender),
            baggage: RefCell::new(None),
            queue: SendQueue::new(settings.connection_send_buffer),
            windows,
            shared,
        });
        inner.shared.opener.replace(Rc::downgrade(&inner));
        Ok(Self { inner })
    }

    /// Opens a stream and waits until the peer has accepted it.
    ///
    /// # Errors
    /// See [`OpenError`]; [`OpenError::retry`] says if another attempt can help. Whatever the
    /// error, no byte of the app has been sent.
    pub async fn open(
        &self,
        request: &ConnectRequest,
        deadline: Instant,
    ) -> Result<(Tunnel, ResponseInfo), OpenError> {
        self.open_in(self.slot(), request, deadline).await
    }

    /// A place for one more stream, whatever the limits are.
    pub(super) fn slot(&self) -> StreamGuard {
        let shared = self.inner.shared.clone();
        shared.live.set(shared.live.get() + 1);
        shared.carried.set(shared.carried.get() + 1);
        StreamGuard(shared)
    }

    /// A place for one more stream, if fewer than `max` are taken.
    pub(super) fn try_slot(&self, max: usize) -> Option<StreamGuard> {
        self.has_room(max).then(|| self.slot())
    }

    /// Whether fewer than `max` places are taken, and fewer than the peer allows.
    pub(super) fn has_room(&self, max: usize) -> bool {
        self.live_streams() < max.min(self.peer_max_streams())
    }

    pub(super) async fn open_in(
        &self,
        slot: StreamGuard,
        request: &ConnectRequest,
        deadline: Instant,
    ) -> Result<(Tunnel, ResponseInfo), OpenError> {
        let request = request
            .to_http()
            .map_err(|e| OpenError::Request(Arc::new(e)))?;
        let (response, mut send) = {
            let mut sender = self.inner.sender.borrow_mut();
            // Fails if the connection has ended or the peer said GOAWAY.
            match sender.poll_ready(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Err(error)) => return Err(self.why(error)),
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            match sender.send_request(request, false) {
                Ok(stream) => stream,
                Err(error) => return Err(self.why(error)),
            }
        };
        let response = match timeout_at(deadline, response).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(self.why(error)),
            Err(_) => {
                send.send_reset(ResetReason::CANCEL.to_h2());
                return Err(OpenError::Timeout);
            }
        };
        let (head, mut recv) = response.into_parts();
        if head.status != StatusCode::OK {
            send.send_reset(ResetReason::CANCEL.to_h2());
            return Err(OpenError::Refused {
                status: head.status,
                detail: head.headers.get(PROXY_STATUS).and_then(proxy_status_error),
            });
        }
        let watched = self.inner.windows.enter(&mut recv);
        let mut known = self.inner.baggage.borrow_mut();
        // It only informs: a bad one is as good as none.
        let baggage = Baggage::from_headers(&head.headers, known.as_ref()).unwrap_or(None);
        known.clone_from(&baggage);
        Ok((
            Tunnel::new(send, recv, watched, self.inner.queue.clone(), Some(slot)),
            ResponseInfo { baggage },
        ))
    }

    /// The reason why the connection ended says more than what its streams see of it.
    fn why(&self, error: h2::Error) -> OpenError {
        let ended = self.inner.shared.ended.borrow();
        match (OpenError::from(error), &*ended) {
            (OpenError::Connection(ConnectionError::Io(_)), Some(end)) => {
                OpenError::Connection(end.clone())
            }
            (error, _) => error,
        }
    }

    /// Streams that are open or being opened.
    pub fn live_streams(&self) -> usize {
        self.inner.shared.live.get()
    }

    /// Streams that the peer allows at once.
    pub fn peer_max_streams(&self) -> usize {
        self.inner.sender.borrow().current_max_send_streams()
    }

    /// Whether new streams can be opened: it has not ended and the peer has not said GOAWAY.
    pub fn is_usable(&self) -> bool {
        if self.inner.shared.ended.borrow().is_some() {
            return false;
        }
        let mut sender = self.inner.sender.borrow_mut();
        !matches!(
            sender.poll_ready(&mut Context::from_waker(Waker::noop())),
            Poll::Ready(Err(_))
        )
    }

    /// Since when there is no stream; `None` if there is one.
    pub fn idle_since(&self) -> Option<Instant> {
        let shared = &self.inner.shared;
        (shared.live.get() == 0).then(|| shared.idle_since.get())
    }

    /// Waits for the end of the connection and tells why it ended.
    pub async fn closed(&self) -> ConnectionError {
        self.watch().closed().await
    }

    /// Has `freed` woken whenever a place for a stream becomes free or the connection ends.
    pub(super) fn notify_freed(&self, freed: Rc<Notify>) {
        self.inner.shared.freed.replace(Some(freed));
    }

    /// A view that does not keep the connection open.
    pub fn watch(&self) -> ConnectionWatch {
        ConnectionWatch(self.inner.shared.clone())
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("live", &self.live_streams())
            .field("ended", &self.inner.shared.ended.borrow())
            .finish()
    }
}

/// Sees a connection end without keeping it open.
#[derive(Clone)]
pub struct ConnectionWatch(Rc<Shared>);

impl ConnectionWatch {
    /// Waits for the end of the connection and tells why it ended.
    pub async fn closed(&self) -> ConnectionError {
        loop {
            let changed = self.0.changed.notified();
            if let Some(end) = &*self.0.ended.borrow() {
                return end.clone();
            }
            changed.await;
        }
    }

    /// Streams that have been opened so far, or tried to.
    pub fn carried(&self) -> u64 {
        self.0.carried.get()
    }

    /// Whether anybody opens streams on it, and still can: not once the peer has said GOAWAY.
    pub fn is_usable(&self) -> bool {
        let opener = self.0.opener.borrow().upgrade();
        opener.is_some_and(|inner| Connection { inner }.is_usable())
    }
}

impl std::fmt::Debug for ConnectionWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectionWatch")
            .field("carried", &self.carried())
            .finish_non_exhaustive()
    }
}

/// Counts one stream of a connection, from before it is opened until it is dropped.
pub(super) struct StreamGuard(Rc<Shared>);

impl StreamGuard {
    pub(super) fn connection(&self) -> ConnectionWatch {
        ConnectionWatch(self.0.clone())
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let live = self.0.live.get() - 1;
        self.0.live.set(live);
        if live == 0 {
            self.0.idle_since.set(Instant::now());
        }
        self.0.wake_freed();
    }
}
