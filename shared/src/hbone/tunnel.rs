//! One stream of an HBONE connection, which carries one connection of an app.
//!
//! The interface is narrow on purpose: read a chunk, write a chunk, half-close, reset.
//! A chunk that was read keeps its part of the flow-control window until it is released, so
//! that a slow app slows its own peer and nobody else.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use std::future::poll_fn;

use super::client::StreamLease;

/// Why a stream was reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// Nothing was wrong; the stream is not needed (NO_ERROR).
    Graceful,
    /// Not wanted any more (CANCEL).
    Cancel,
    /// The TCP connection behind it was reset or failed (CONNECT_ERROR, RFC 9113 8.5).
    ConnectionReset,
    /// The server did not process it (REFUSED_STREAM).
    Refused,
    /// Anything else, by number (RFC 9113 7).
    Other(u32),
}

impl From<Reason> for ResetReason {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::NO_ERROR => Self::Graceful,
            Reason::CANCEL => Self::Cancel,
            Reason::CONNECT_ERROR => Self::ConnectionReset,
            Reason::REFUSED_STREAM => Self::Refused,
            other => Self::Other(other.into()),
        }
    }
}

impl From<ResetReason> for Reason {
    fn from(reason: ResetReason) -> Self {
        match reason {
            ResetReason::Graceful => Self::NO_ERROR,
            ResetReason::Cancel => Self::CANCEL,
            ResetReason::ConnectionReset => Self::CONNECT_ERROR,
            ResetReason::Refused => Self::REFUSED_STREAM,
            ResetReason::Other(code) => code.into(),
        }
    }
}

/// How a stream failed.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The peer reset the stream.
    #[error("the peer reset the stream ({0:?})")]
    Reset(ResetReason),
    /// The connection below it is gone.
    #[error("the HBONE connection was lost: {0}")]
    Connection(String),
}

impl From<h2::Error> for TunnelError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason.into()),
            _ => Self::Connection(error.to_string()),
        }
    }
}

/// Both directions of a stream.
#[derive(Debug)]
pub struct Tunnel {
    reader: TunnelReader,
    writer: TunnelWriter,
}

impl Tunnel {
    pub(super) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        lease: Option<StreamLease>,
    ) -> Self {
        Self {
            reader: TunnelReader { recv },
            writer: TunnelWriter {
                send,
                _lease: lease,
            },
        }
    }

    /// The two directions apart.
    pub fn split(self) -> (TunnelReader, TunnelWriter) {
        (self.reader, self.writer)
    }
}

/// What the peer sends.
#[derive(Debug)]
pub struct TunnelReader {
    recv: RecvStream,
}

impl TunnelReader {
    /// The next chunk; `None` at the peer's half-close. Chunks are never empty.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing more can be read.
    pub async fn read_chunk(&mut self) -> Result<Option<Bytes>, TunnelError> {
        poll_fn(|cx| self.poll_read_chunk(cx)).await
    }

    /// [`Self::read_chunk`] as a poll function.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing more can be read.
    pub fn poll_read_chunk(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, TunnelError>> {
        loop {
            return Poll::Ready(match ready!(self.recv.poll_data(cx)) {
                Some(Ok(chunk)) if chunk.is_empty() => continue,
                Some(Ok(chunk)) => Ok(Some(chunk)),
                Some(Err(error)) => match TunnelError::from(error) {
                    // A peer that has no more to say and no interest in more.
                    TunnelError::Reset(ResetReason::Graceful) => Ok(None),
                    error => Err(error),
                },
                None => Ok(None),
            });
        }
    }

    /// Gives `bytes` of window back to the peer, once they have been consumed.
    pub fn release(&mut self, bytes: usize) {
        // Fails only for more than was received, or on a stream that is over.
        let _ = self.recv.flow_control().release_capacity(bytes);
    }
}

/// What is sent to the peer. Dropping it before [`Self::finish`] resets the stream.
#[derive(Debug)]
pub struct TunnelWriter {
    send: SendStream<Bytes>,
    /// Counts the stream on its connection while it lives.
    _lease: Option<StreamLease>,
}

impl TunnelWriter {
    /// Waits until the peer and our own buffers take something, asks for up to `wanted`
    /// bytes and says how many will be taken without waiting: at least 1.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing more can be written.
    pub async fn capacity(&mut self, wanted: usize) -> Result<usize, TunnelError> {
        poll_fn(|cx| self.poll_capacity(cx, wanted)).await
    }

    fn poll_capacity(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
    ) -> Poll<Result<usize, TunnelError>> {
        self.send.reserve_capacity(wanted);
        loop {
            let capacity = self.send.capacity();
            if capacity > 0 {
                return Poll::Ready(Ok(capacity.min(wanted)));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                None => {
                    let reason = match ready!(self.send.poll_reset(cx)) {
                        Ok(reason) => TunnelError::Reset(reason.into()),
                        Err(error) => error.into(),
                    };
                    return Poll::Ready(Err(reason));
                }
            }
        }
    }

    /// Gives up what [`Self::capacity`] reserved and was not used.
    pub fn release_capacity(&mut self) {
        self.send.reserve_capacity(0);
    }

    /// Sends a chunk; of any size, though one within [`Self::capacity`] is not held up.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing more can be written.
    pub fn send_chunk(&mut self, chunk: Bytes) -> Result<(), TunnelError> {
        Ok(self.send.send_data(chunk, false)?)
    }

    /// Sends a chunk in pieces as the peer takes them.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing more can be written.
    pub async fn write_chunk(&mut self, mut chunk: Bytes) -> Result<(), TunnelError> {
        while !chunk.is_empty() {
            let capacity = self.capacity(chunk.len()).await?;
            self.send_chunk(chunk.split_to(capacity.min(chunk.len())))?;
        }
        Ok(())
    }

    /// Half-close: the peer reads an orderly end after what was sent.
    ///
    /// # Errors
    /// [`TunnelError`] when the stream is over already.
    pub fn finish(&mut self) -> Result<(), TunnelError> {
        Ok(self.send.send_data(Bytes::new(), true)?)
    }

    /// Ends both directions; what was not sent yet is dropped.
    pub fn reset(&mut self, reason: ResetReason) {
        self.send.send_reset(reason.into());
    }

    /// Completes when the peer resets the stream.
    ///
    /// # Errors
    /// [`TunnelError::Connection`] when the connection is lost.
    pub async fn reset_by_peer(&mut self) -> Result<ResetReason, TunnelError> {
        Ok(poll_fn(|cx| self.send.poll_reset(cx)).await?.into())
    }
}
