//! What can go wrong on a connection, on a stream, and while opening one; whose fault it is and
//! whether another attempt can help.

use std::fmt;
use std::io;
use std::sync::Arc;

use http::StatusCode;

/// Why a stream was reset: an error code of RFC 9113 7.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ResetReason(u32);

impl ResetReason {
    /// Graceful: the sender wants no more data.
    pub const NO_ERROR: Self = Self(0x0);
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: Self = Self(0x1);
    /// The sender failed.
    pub const INTERNAL_ERROR: Self = Self(0x2);
    /// The stream was refused before anything was done for it.
    pub const REFUSED_STREAM: Self = Self(0x7);
    /// The sender has no use for the stream any more.
    pub const CANCEL: Self = Self(0x8);
    /// The TCP connection behind the stream was reset (RFC 9113 8.5).
    pub const CONNECT_ERROR: Self = Self(0xa);

    /// The number on the wire.
    pub const fn code(self) -> u32 {
        self.0
    }

    pub(super) fn to_h2(self) -> h2::Reason {
        self.0.into()
    }
}

impl From<h2::Reason> for ResetReason {
    fn from(reason: h2::Reason) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for ResetReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_h2(), f)
    }
}

impl fmt::Debug for ResetReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_h2(), f)
    }
}

/// Why a connection ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectionError {
    /// The socket or TLS failed.
    #[error("connection failed: {0}")]
    Io(#[source] Arc<io::Error>),
    /// The peer sent GOAWAY.
    #[error("peer closes the connection: {reason}{debug}")]
    GoAway {
        /// Its reason; `NO_ERROR` when it shuts down.
        reason: ResetReason,
        /// What it says about it, preceded by a colon; bounded.
        debug: Box<str>,
    },
    /// The peer broke the protocol.
    #[error("peer breaks HTTP/2: {0}")]
    Protocol(ResetReason),
    /// The peer answered no PING in time.
    #[error("peer does not answer PING")]
    Dead,
    /// The peer did not send its preface in time.
    #[error("no HTTP/2 preface in time")]
    PrefaceTimeout,
    /// It was closed here.
    #[error("connection is closed")]
    Closed,
}

impl ConnectionError {
    /// Whether this is an orderly end: no harm is done.
    pub fn is_orderly(&self) -> bool {
        match self {
            Self::GoAway { reason, .. } => *reason == ResetReason::NO_ERROR,
            Self::Closed => true,
            _ => false,
        }
    }
}

impl From<io::Error> for ConnectionError {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

impl From<h2::Error> for ConnectionError {
    fn from(error: h2::Error) -> Self {
        let reason = error.reason().map(ResetReason::from);
        match reason {
            Some(reason) if error.is_remote() => {
                // The text that h2 shows ends with the debug data, quoted.
                const LEN: usize = 128;
                let text = error.to_string();
                let debug = text.split_once(" (").map_or("", |(_, debug)| debug);
                let debug = debug.trim_end_matches(')');
                let debug = match debug.char_indices().nth(LEN) {
                    Some((end, _)) => &debug[..end],
                    None => debug,
                };
                let colon = if debug.is_empty() { "" } else { ": " };
                Self::GoAway {
                    reason,
                    debug: format!("{colon}{debug}").into(),
                }
            }
            Some(reason) => Self::Protocol(reason),
            None => match error.into_io() {
                Some(io) => io.into(),
                None => Self::Closed,
            },
        }
    }
}

/// Why a tunnel ended other than by both sides finishing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TunnelError {
    /// The peer reset the stream.
    #[error("peer reset the stream: {0}")]
    Reset(ResetReason),
    /// The connection below it ended.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// This side has finished or reset it before.
    #[error("stream is closed for writing")]
    Finished,
}

impl From<h2::Error> for TunnelError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason.into()),
            _ if error.reason().is_none() && !error.is_io() => Self::Finished,
            _ => Self::Connection(error.into()),
        }
    }
}

impl From<TunnelError> for io::Error {
    fn from(error: TunnelError) -> Self {
        let kind = match &error {
            TunnelError::Reset(_) => io::ErrorKind::ConnectionReset,
            TunnelError::Connection(_) => io::ErrorKind::ConnectionAborted,
            TunnelError::Finished => io::ErrorKind::BrokenPipe,
        };
        Self::new(kind, error)
    }
}

/// Whether a stream that could not be opened may be tried again. No byte of the app has been
/// sent before a tunnel is open, so the question is only where another attempt can succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The peer has decided, or the fault is ours: the answer would be the same.
    Never,
    /// This destination fails: another endpoint may succeed.
    Elsewhere,
    /// The peer has not looked at it: the same destination may succeed on a new connection.
    Anywhere,
}

/// Why a stream could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// The peer answered with another status than 200.
    #[error("peer refuses with status {}{}", status.as_u16(), DisplayDetail(detail))]
    Refused {
        /// 400 bad request, 401 denied by policy, 503 destination not reachable.
        status: StatusCode,
        /// The error type of its `proxy-status` header (RFC 9209 2.3), if it sent one.
        detail: Option<Box<str>>,
    },
    /// The peer reset the stream before it answered.
    #[error("peer reset the stream before it answered: {0}")]
    Reset(ResetReason),
    /// The connection ended first, or takes no new streams.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The peer did not answer before the deadline.
    #[error("peer did not answer the CONNECT in time")]
    Timeout,
    /// The request cannot be written.
    #[error("request cannot be sent: {0}")]
    Request(#[source] Arc<http::Error>),
}

struct DisplayDetail<'a>(&'a Option<Box<str>>);

impl fmt::Display for DisplayDetail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(detail) => write!(f, " ({detail})"),
            None => Ok(()),
        }
    }
}

impl OpenError {
    /// Where another attempt can succeed.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Refused { status, .. } => match *status {
                StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::BAD_GATEWAY
                | StatusCode::GATEWAY_TIMEOUT => Retry::Elsewhere,
                _ => Retry::Never,
            },
            Self::Reset(ResetReason::REFUSED_STREAM) => Retry::Anywhere,
            Self::Reset(_) | Self::Timeout => Retry::Elsewhere,
            Self::Connection(ConnectionError::Protocol(_)) => Retry::Elsewhere,
            Self::Connection(_) => Retry::Anywhere,
            Self::Request(_) => Retry::Never,
        }
    }
}

impl From<h2::Error> for OpenError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason.into()),
            _ => Self::Connection(error.into()),
        }
    }
}
