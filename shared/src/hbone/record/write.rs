//! The sending direction of a stream: the caller's slices sealed into one borrowed buffer, and
//! one write to the socket per turn.
//!
//! While sealed bytes wait for the socket nothing more is accepted; that is the back-pressure.
//! The buffer is given back when the last of them is written.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::AlertDescription;
use tokio::io::{AsyncRead, AsyncWrite};

use super::error::RecordError;
use super::seal::Sealer;
use super::stream::TlsStream;
use crate::hbone::buffer::{BufferPool, PooledBuf, SizeClass};

/// What a turn may carry beyond the nominal size of its buffer, so that a frame header in front
/// of a full payload does not make a turn of its own.
const TURN_SLACK: usize = 128;

/// The state of this direction.
pub(super) struct Sending {
    pub(super) sealer: Sealer,
    buf: Option<PooledBuf>,
    /// Sealed and not written yet, in `buf`.
    pending: Range<usize>,
    /// The peer asked for a KeyUpdate; it goes out in front of the next data.
    update_owed: bool,
    /// close_notify or a fatal alert is sealed: it is the last record.
    closed: bool,
}

impl Sending {
    pub(super) fn new(sealer: Sealer) -> Self {
        Self {
            sealer,
            buf: None,
            pending: 0..0,
            update_owed: false,
            closed: false,
        }
    }

    pub(super) fn memory(&self) -> usize {
        self.buf.as_ref().map_or(0, |buf| buf.whole().len())
    }

    pub(super) fn owe_update(&mut self, requested: bool) {
        self.update_owed |= requested;
    }

    /// Seals the last record of this direction behind whatever is pending.
    fn seal_last(&mut self, alert: AlertDescription, pool: &BufferPool) -> Result<(), RecordError> {
        if self.closed {
            return Ok(());
        }
        self.closed = true;
        let buf = self.buf.get_or_insert_with(|| pool.take(SizeClass::Kib16));
        let room = &mut buf.whole_mut()[self.pending.end..];
        self.pending.end += self.sealer.seal_alert(alert, room)?;
        Ok(())
    }

    /// Writes what is pending.
    fn poll_drain<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(buf) = &self.buf {
            while !self.pending.is_empty() {
                let bytes = &buf.whole()[self.pending.clone()];
                match ready!(Pin::new(&mut *io).poll_write(cx, bytes))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    len => self.pending.start += len.min(bytes.len()),
                }
            }
        }
        self.buf = None;
        self.pending = 0..0;
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> TlsStream<IO> {
    /// Makes `error` the end of the stream, and tells the peer as far as the socket takes it
    /// now; a shutdown sends the rest.
    pub(super) fn fail(&mut self, error: RecordError, cx: &mut Context<'_>) -> io::Error {
        self.failed = Some(error);
        if let Some(alert) = error.alert() {
            if self.tx.seal_last(alert, &self.pool).is_ok() {
                let _ = self.tx.poll_drain(&mut self.io, cx);
            }
        } else {
            self.tx.closed = true;
        }
        error.into()
    }

    /// Seals one turn into a new buffer; returns how many of the caller's bytes are in it.
    fn seal_turn(&mut self, slices: &[IoSlice<'_>], total: usize) -> Result<usize, RecordError> {
        let tx = &mut self.tx;
        let mut buf = self
            .pool
            .take(SizeClass::for_len(total.saturating_sub(TURN_SLACK)));
        let limit = buf.class().bytes() + TURN_SLACK;
        let out = buf.whole_mut();
        let mut end = 0;
        if tx.update_owed || tx.sealer.remaining() <= 1 {
            end += tx.sealer.seal_key_update(out)?;
            tx.sealer.rekey(self.schedule.next_tx()?)?;
            tx.update_owed = false;
        }
        let (taken, written) = tx.sealer.seal_data(slices, limit, &mut out[end..])?;
        tx.pending = 0..end + written;
        tx.buf = Some(buf);
        Ok(taken)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Some(error) = this.failed {
            return Poll::Ready(Err(error.into()));
        }
        if this.tx.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let total = slices
            .iter()
            .map(|slice| slice.len())
            .fold(0, usize::saturating_add);
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        ready!(this.tx.poll_drain(&mut this.io, cx))?;
        let taken = match this.seal_turn(slices, total) {
            Ok(taken) => taken,
            Err(error) => return Poll::Ready(Err(this.fail(error, cx))),
        };
        // Pending is fine: the bytes are accepted, and the next call waits for them.
        match this.tx.poll_drain(&mut this.io, cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.tx.poll_drain(&mut this.io, cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.tx.closed {
            let last = AlertDescription::CloseNotify;
            if let Err(error) = this.tx.seal_last(last, &this.pool) {
                return Poll::Ready(Err(error.into()));
            }
        }
        ready!(this.tx.poll_drain(&mut this.io, cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
