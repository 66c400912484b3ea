//! An open tunnel: the narrow interface behind which HTTP/2 framing lives.
//!
//! Bytes come and go as [`Bytes`], without a copy. Flow control is explicit on both sides: what
//! was read is released when it has been consumed, and capacity is asked for before writing, so
//! that a slow app on one side slows the app on the other side and nothing piles up in between.
//!
//! END_STREAM is FIN; RST_STREAM is RST and stays one. Dropping a tunnel that neither side has
//! finished resets it.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use h2::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::client::{ConnectionWatch, StreamGuard};
use super::error::{ResetReason, TunnelError};
use super::send_queue::SendQueue;
use super::windows::Watched;

/// One app connection's stream through an HBONE connection.
pub struct Tunnel {
    /// Goes before the handles of the stream.
    watched: Watched,
    send: SendStream<Bytes>,
    recv: RecvStream,
    queue: SendQueue,
    /// Counts the stream on its client connection.
    guard: Option<StreamGuard>,
}

/// One is held per app connection.
const _: () = assert!(size_of::<Tunnel>() <= 80);

impl Tunnel {
    pub(super) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        watched: Watched,
        queue: SendQueue,
        guard: Option<StreamGuard>,
    ) -> Self {
        Self {
            watched,
            send,
            recv,
            queue,
            guard,
        }
    }

    /// The connection that it was opened on; `None`: the peer has opened it.
    pub fn connection(&self) -> Option<ConnectionWatch> {
        self.guard.as_ref().map(StreamGuard::connection)
    }

    /// The next bytes from the peer, never empty; `None` when it has finished. What it returns
    /// counts against the peer's window until it is [released](Self::release).
    ///
    /// # Errors
    /// When the peer resets the stream or the connection ends.
    pub async fn read_chunk(&mut self) -> Result<Option<Bytes>, TunnelError> {
        poll_fn(|cx| self.poll_read_chunk(cx)).await
    }

    /// Poll form of [`Self::read_chunk`].
    pub fn poll_read_chunk(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, TunnelError>> {
        loop {
            return Poll::Ready(match ready!(self.recv.poll_data(cx)) {
                Some(Ok(chunk)) if chunk.is_empty() => continue,
                Some(Ok(chunk)) => Ok(Some(chunk)),
                None => Ok(None),
                // The peer has sent all and wants no more (RFC 9113 8.1).
                Some(Err(e)) if e.is_reset() && e.reason() == Some(h2::Reason::NO_ERROR) => {
                    Ok(None)
                }
                Some(Err(e)) => Err(e.into()),
            });
        }
    }

    /// Gives `n` bytes of window back to the peer: they have been consumed.
    pub fn release(&mut self, n: usize) {
        // It fails for more bytes than were received, which is harmless here: it gives nothing.
        let _ = self.recv.flow_control().release_capacity(n);
        self.watched.released(n);
    }

    /// Writes all of `chunk`, in as few DATA frames as the windows allow.
    ///
    /// # Errors
    /// When the stream is finished or reset, or the connection ends.
    pub async fn write_chunk(&mut self, mut chunk: Bytes) -> Result<(), TunnelError> {
        while !chunk.is_empty() {
            let n = poll_fn(|cx| self.poll_capacity(cx, chunk.len())).await?;
            self.send(chunk.split_to(n.min(chunk.len())))?;
        }
        Ok(())
    }

    /// Reserves capacity for up to `want` bytes, and is ready with how many may be sent now (at
    /// least one). The reservation takes window from the other streams of the connection: send
    /// soon, or [give it back](Self::unreserve).
    ///
    /// # Errors
    /// When the stream is finished or reset, or the connection ends.
    pub fn poll_capacity(
        &mut self,
        cx: &mut Context<'_>,
        want: usize,
    ) -> Poll<Result<usize, TunnelError>> {
        let room = match self.queue.poll_room(cx) {
            Poll::Ready(room) => room,
            Poll::Pending => {
                // Others cannot use it either, but a reset must still be seen.
                self.send.reserve_capacity(0);
                return self.poll_reset(cx).map(Err);
            }
        };
        let want = want.min(room);
        self.send.reserve_capacity(want);
        match self.send.poll_capacity(cx) {
            Poll::Ready(Some(Ok(n))) if n > 0 => Poll::Ready(Ok(n)),
            Poll::Ready(Some(Err(e))) => Poll::Ready(Err(e.into())),
            Poll::Ready(None) => Poll::Ready(Err(self.write_error(cx))),
            // It tells of changes only: what was assigned before has to be asked for.
            Poll::Ready(Some(Ok(_))) | Poll::Pending => match self.send.capacity() {
                0 => Poll::Pending,
                n => Poll::Ready(Ok(n)),
            },
        }
    }

    /// Gives reserved capacity back to the other streams.
    pub fn unreserve(&mut self) {
        self.send.reserve_capacity(0);
    }

    /// Queues bytes for which [`Self::poll_capacity`] gave the capacity.
    ///
    /// # Errors
    /// When the stream is finished or reset, or the connection ends.
    pub fn send(&mut self, chunk: Bytes) -> Result<(), TunnelError> {
        self.send
            .send_data(self.queue.track(chunk), false)
            .map_err(|_| self.write_error(&mut Context::from_waker(std::task::Waker::noop())))
    }

    /// Half-closes: after what was written the peer reads the end. Reading goes on.
    ///
    /// # Errors
    /// When the stream is finished or reset already, or the connection has ended.
    pub fn finish(&mut self) -> Result<(), TunnelError> {
        self.send
            .send_data(Bytes::new(), true)
            .map_err(|_| self.write_error(&mut Context::from_waker(std::task::Waker::noop())))
    }

    /// Resets the stream in both directions; what was written and not sent yet is dropped.
    pub fn reset(&mut self, reason: ResetReason) {
        self.send.send_reset(reason.to_h2());
    }

    /// Ready when the peer resets the stream or the connection ends; for times in which nothing
    /// is read or written.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<TunnelError> {
        Poll::Ready(match ready!(self.send.poll_reset(cx)) {
            Ok(reason) => TunnelError::Reset(reason.into()),
            Err(error) => error.into(),
        })
    }

    /// Why nothing can be written.
    fn write_error(&mut self, cx: &mut Context<'_>) -> TunnelError {
        match self.poll_reset(cx) {
            Poll::Ready(error) => error,
            Poll::Pending => TunnelError::Finished,
        }
    }

    /// The tunnel as a byte stream, for protocols that run inside of it.
    pub fn into_io(self) -> TunnelIo {
        TunnelIo {
            tunnel: self,
            unread: Bytes::new(),
        }
    }
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel")
            .field("stream", &self.send.stream_id())
            .finish()
    }
}

/// A [`Tunnel`] as a byte stream. Costs a copy each way; the copy loop does not use it.
#[derive(Debug)]
pub struct TunnelIo {
    tunnel: Tunnel,
    unread: Bytes,
}

impl AsyncRead for TunnelIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            match ready!(self.tunnel.poll_read_chunk(cx))? {
                Some(chunk) => self.unread = chunk,
                None => return Poll::Ready(Ok(())),
            }
        }
        let n = self.unread.len().min(buf.remaining());
        buf.put_slice(&self.unread[..n]);
        self.unread.advance(n);
        self.tunnel.release(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let n = ready!(self.tunnel.poll_capacity(cx, buf.len()))?.min(buf.len());
        self.tunnel.send(Bytes::copy_from_slice(&buf[..n]))?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match self.tunnel.finish() {
            Ok(()) | Err(TunnelError::Finished) => Ok(()),
            Err(error) => Err(error.into()),
        })
    }
}
