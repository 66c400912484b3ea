//! The client's end of an HBONE connection.

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::headers::ConnectRequest;
use super::keepalive::peer_lost;
use super::settings::Settings;
use super::tunnel::Tunnel;

/// Why a stream could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// The peer answered with another status than 200.
    #[error("the peer refused the connection with status {0}")]
    Refused(StatusCode),
    /// No answer by the deadline.
    #[error("no answer to CONNECT within {0:?}")]
    Timeout(Duration),
    /// The connection takes no more streams, or the peer did not process this one.
    #[error("the HBONE connection takes no more streams: {0}")]
    NotProcessed(String),
    /// The connection was lost, or the peer broke the protocol.
    #[error("the HBONE connection failed: {0}")]
    Connection(String),
    /// The authority cannot be written into a request.
    #[error("the request cannot be sent: {0}")]
    Request(String),
}

impl OpenError {
    /// The peer has not acted on the request, so that it may be sent again as it is.
    pub fn not_processed(&self) -> bool {
        matches!(self, Self::NotProcessed(_))
    }

    fn of(error: h2::Error) -> Self {
        let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
        if refused || (error.is_go_away() && error.is_remote()) {
            Self::NotProcessed(error.to_string())
        } else {
            Self::Connection(error.to_string())
        }
    }
}

/// What the peer said with its 200.
#[derive(Debug, Default)]
pub struct ResponseInfo {
    /// The destination workload, as the peer describes it.
    pub baggage: Option<String>,
}

/// One HBONE connection. Clones share it; it closes when the last clone and the last stream
/// are gone.
#[derive(Clone)]
pub struct Connection {
    inner: Rc<Inner>,
}

/// h2 ends a connection in good order once its last handle and stream are dropped.
struct Inner {
    send: SendRequest<Bytes>,
    state: Rc<State>,
}

/// What the driver, the streams and the pool share.
#[derive(Debug)]
struct State {
    streams: Cell<usize>,
    opened: Cell<u64>,
    closed: Cell<bool>,
    idle_since: Cell<Instant>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("state", &self.inner.state)
            .finish_non_exhaustive()
    }
}

/// Counts a stream while it lives.
#[derive(Debug)]
pub(super) struct StreamLease {
    state: Rc<State>,
}

impl StreamLease {
    fn new(state: &Rc<State>) -> Self {
        state.streams.set(state.streams.get() + 1);
        state.opened.set(state.opened.get() + 1);
        Self {
            state: state.clone(),
        }
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        self.state.streams.set(self.state.streams.get() - 1);
        self.state.idle_since.set(Instant::now());
    }
}

impl Connection {
    /// Speaks HTTP/2 over `io`, whose TLS handshake is done. The connection is driven by a
    /// task of the current worker; `ended` is called when it is over, with the number of
    /// streams that it has carried.
    ///
    /// # Errors
    /// [`OpenError::Timeout`] and [`OpenError::Connection`].
    pub async fn handshake<IO>(
        io: IO,
        settings: &Settings,
        ended: impl FnOnce(u64) + 'static,
    ) -> Result<Self, OpenError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_frame_size(settings.frame_size())
            .max_header_list_size(settings.client_header_list)
            .max_send_buffer_size(settings.send_buffer)
            .enable_push(false);
        let handshake = timeout(settings.handshake_timeout, builder.handshake(io));
        let (send, mut connection) = handshake
            .await
            .map_err(|_| OpenError::Timeout(settings.handshake_timeout))?
            .map_err(OpenError::of)?;
        let state = Rc::new(State {
            streams: Cell::new(0),
            opened: Cell::new(0),
            closed: Cell::new(false),
            idle_since: Cell::new(Instant::now()),
        });
        let driven = state.clone();
        let (interval, limit) = (settings.ping_interval, settings.ping_timeout);
        let end = Ended {
            state: driven,
            ended: Some(ended),
        };
        spawn_local(async move {
            let _end = end;
            let Some(pings) = connection.ping_pong() else {
                return;
            };
            tokio::select! {
                // Errors reach the streams; there is nobody else to tell.
                _ = connection => {}
                () = peer_lost(pings, interval, limit) => {}
            }
        });
        Ok(Self {
            inner: Rc::new(Inner { send, state }),
        })
    }

    /// Opens a stream; returns when the peer has answered.
    ///
    /// # Errors
    /// [`OpenError`] says whether the request may be sent again.
    pub async fn open(
        &self,
        request: &ConnectRequest,
        deadline: Duration,
    ) -> Result<(Tunnel, ResponseInfo), OpenError> {
        // Counted from here, so that requests of the same moment spread.
        let lease = StreamLease::new(&self.inner.state);
        timeout(deadline, self.open_unbounded(request, lease))
            .await
            .unwrap_or(Err(OpenError::Timeout(deadline)))
    }

    async fn open_unbounded(
        &self,
        request: &ConnectRequest,
        lease: StreamLease,
    ) -> Result<(Tunnel, ResponseInfo), OpenError> {
        let request = request
            .to_http()
            .map_err(|e| OpenError::Request(e.to_string()))?;
        let not_sent = |e: h2::Error| OpenError::NotProcessed(e.to_string());
        let mut send = self.inner.send.clone().ready().await.map_err(not_sent)?;
        let (response, stream) = send.send_request(request, false).map_err(not_sent)?;
        let (parts, recv) = response.await.map_err(OpenError::of)?.into_parts();
        if parts.status != StatusCode::OK {
            return Err(OpenError::Refused(parts.status));
        }
        let tunnel = Tunnel::new(stream, recv, Some(lease));
        Ok((
            tunnel,
            ResponseInfo {
                baggage: text(&parts.headers, "baggage"),
            },
        ))
    }

    /// Streams that are open or being opened.
    pub fn streams(&self) -> usize {
        self.inner.state.streams.get()
    }

    /// Streams that the peer allows at the same time.
    pub fn max_streams(&self) -> usize {
        self.inner.send.current_max_send_streams()
    }

    /// Whether `other` is this very connection.
    pub fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.inner, &other.inner)
    }

    /// The connection is over.
    pub fn is_closed(&self) -> bool {
        self.inner.state.closed.get()
    }

    /// Since when there has been no stream; `None` while there is one.
    pub fn idle_since(&self) -> Option<Instant> {
        (self.streams() == 0).then(|| self.inner.state.idle_since.get())
    }
}

/// Tells, however the driver ends.
struct Ended<F: FnOnce(u64)> {
    state: Rc<State>,
    ended: Option<F>,
}

impl<F: FnOnce(u64)> Drop for Ended<F> {
    fn drop(&mut self) {
        self.state.closed.set(true);
        if let Some(ended) = self.ended.take() {
            ended(self.state.opened.get());
        }
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(Into::into)
}
