//! What can go wrong on a TLS stream, and which alert the peer is told (RFC 8446 6.2).

use std::io;

use rustls::AlertDescription;
use thiserror::Error;

/// Why a stream could not be set up.
#[derive(Debug, Error)]
pub enum TlsError {
    /// the socket failed during the TLS handshake
    #[error("the socket failed during the TLS handshake")]
    Io(#[from] io::Error),
    /// the TLS handshake failed
    #[error("the TLS handshake failed: {0}")]
    Handshake(#[from] rustls::Error),
    /// the peer closed the connection during the TLS handshake
    #[error("the peer closed the connection during the TLS handshake")]
    Closed,
    /// the TLS handshake took longer than its deadline
    #[error("the TLS handshake did not end within its deadline")]
    Timeout,
    /// the peer sent more than a handshake may need
    #[error("the peer's handshake messages exceed {limit} bytes")]
    TooLarge {
        /// Bytes of handshake that are accepted at a time.
        limit: usize,
    },
    /// the peer did something that a mesh handshake has no place for
    #[error("the peer sent early data, which is not offered")]
    EarlyData,
    /// another protocol version than TLS 1.3 was negotiated; the configuration is wrong
    #[error("TLS 1.3 was not negotiated; the record layer speaks nothing else")]
    NotTls13,
    /// the negotiated cipher suite is not one of the three that the record layer has
    #[error("the record layer does not have the negotiated cipher suite")]
    UnsupportedSuite,
}

impl TlsError {
    /// Whether the peer's end was closed before it had said anything about the handshake: it
    /// has not judged us, and a process that has taken over from it may.
    pub fn peer_has_gone(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Io(error) => matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::UnexpectedEof
            ),
            _ => false,
        }
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        let kind = match &error {
            TlsError::Io(inner) => inner.kind(),
            TlsError::Closed => io::ErrorKind::UnexpectedEof,
            TlsError::Timeout => io::ErrorKind::TimedOut,
            TlsError::NotTls13 | TlsError::UnsupportedSuite => io::ErrorKind::InvalidInput,
            TlsError::Handshake(_) | TlsError::TooLarge { .. } | TlsError::EarlyData => {
                io::ErrorKind::InvalidData
            }
        };
        Self::new(kind, error)
    }
}

/// Why an established stream failed. It travels inside an [`io::Error`]; see [`Self::of`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// the socket ended without close_notify: the data may have been cut (RFC 8446 6.1)
    #[error("the connection ended without close_notify")]
    Truncated,
    /// the peer sent a fatal alert
    #[error("the peer sent the fatal alert {0:?}")]
    AlertReceived(AlertDescription),
    /// a record could not be opened
    #[error("a record failed authentication")]
    BadRecordMac,
    /// a record is larger than RFC 8446 5.1 and 5.2 allow
    #[error("a record exceeds the permitted size")]
    RecordOverflow,
    /// a record or message came that has no place here
    #[error("unexpected message: {0}")]
    UnexpectedMessage(&'static str),
    /// a message could not be parsed
    #[error("malformed message: {0}")]
    Decode(&'static str),
    /// a message parsed but has a forbidden value
    #[error("illegal parameter: {0}")]
    IllegalParameter(&'static str),
    /// a sequence number or key was used up, or the key schedule failed
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl RecordError {
    /// The alert that the peer is owed, if it is owed one.
    pub fn alert(self) -> Option<AlertDescription> {
        match self {
            Self::Truncated | Self::AlertReceived(_) => None,
            Self::BadRecordMac => Some(AlertDescription::BadRecordMac),
            Self::RecordOverflow => Some(AlertDescription::RecordOverflow),
            Self::UnexpectedMessage(_) => Some(AlertDescription::UnexpectedMessage),
            Self::Decode(_) => Some(AlertDescription::DecodeError),
            Self::IllegalParameter(_) => Some(AlertDescription::IllegalParameter),
            Self::Internal(_) => Some(AlertDescription::InternalError),
        }
    }

    /// The record error inside an error that [`TlsStream`](super::TlsStream) returned; `None`
    /// if the socket itself failed.
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

impl From<RecordError> for io::Error {
    fn from(error: RecordError) -> Self {
        let kind = match error {
            RecordError::Truncated => io::ErrorKind::UnexpectedEof,
            RecordError::AlertReceived(_) => io::ErrorKind::ConnectionAborted,
            RecordError::Internal(_) => io::ErrorKind::Other,
            RecordError::BadRecordMac
            | RecordError::RecordOverflow
            | RecordError::UnexpectedMessage(_)
            | RecordError::Decode(_)
            | RecordError::IllegalParameter(_) => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}
