//! The receiving direction of a stream: large reads into a borrowed buffer, records opened one
//! by one as the caller takes them.
//!
//! The buffer starts at 16 KiB, grows while reads come back full, and is given back as soon as
//! everything in it is consumed. Only a partial record keeps memory while a connection waits.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};

use super::error::RecordError;
use super::open::{Content, Message, Opener, inner_len, record_len};
use super::stream::TlsStream;
use crate::hbone::buffer::{BufferPool, PooledBuf, SizeClass};

/// A partial record up to this size waits in an allocation of its own length, a larger one in
/// a 16 KiB buffer.
const SMALL_TAIL: usize = 1024;

/// The state of this direction.
pub(super) struct Receiving {
    opener: Opener,
    buf: Option<PooledBuf>,
    /// Opened and not consumed yet, in `buf`.
    plain: Range<usize>,
    /// Read and not opened yet, in `buf`; behind `plain`.
    sealed: Range<usize>,
    /// What follows `sealed` while it does not lie in `buf`: bytes that came along with the
    /// handshake, or a small partial record while `buf` is given back.
    tail: Box<[u8]>,
    /// The size of the next read.
    turn: SizeClass,
    /// close_notify has come.
    closed: bool,
}

impl Receiving {
    pub(super) fn new(opener: Opener, early: Vec<u8>) -> Self {
        Self {
            opener,
            buf: None,
            plain: 0..0,
            sealed: 0..0,
            tail: early.into_boxed_slice(),
            turn: SizeClass::Kib16,
            closed: false,
        }
    }

    pub(super) fn memory(&self) -> usize {
        self.tail.len() + self.buf.as_ref().map_or(0, |buf| buf.whole().len())
    }

    fn plain(&self) -> &[u8] {
        self.buf
            .as_ref()
            .map_or(&[], |buf| &buf.whole()[self.plain.clone()])
    }

    fn consume(&mut self, amount: usize) {
        self.plain.start = self.plain.end.min(self.plain.start.saturating_add(amount));
        self.release_if_empty();
    }

    fn release_if_empty(&mut self) {
        if self.plain.is_empty() && self.sealed.is_empty() {
            self.release();
        }
    }

    /// Forgets the content of the buffer and gives it back.
    fn release(&mut self) {
        self.buf = None;
        self.plain = 0..0;
        self.sealed = 0..0;
    }

    /// The first record in the buffer, if all of it is there.
    fn whole_record(&self) -> Result<Option<Range<usize>>, RecordError> {
        let Some(buf) = &self.buf else {
            return Ok(None);
        };
        let sealed = &buf.whole()[self.sealed.clone()];
        Ok(record_len(sealed)?
            .filter(|len| *len <= sealed.len())
            .map(|len| self.sealed.start..self.sealed.start + len))
    }

    /// Opens the record at `range` in place.
    fn open(&mut self, range: Range<usize>) -> Result<Content, RecordError> {
        let buf = self.buf.as_mut().ok_or(NO_BUFFER)?;
        self.sealed.start = range.end;
        let content = self.opener.open(&mut buf.whole_mut()[range.clone()])?;
        if let Content::Data(data) = &content {
            self.plain = range.start + data.start..range.start + data.end;
        }
        Ok(content)
    }

    /// Opens the record at `range` into `out`.
    fn open_into(&mut self, range: Range<usize>, out: &mut [u8]) -> Result<Content, RecordError> {
        let buf = self.buf.as_ref().ok_or(NO_BUFFER)?;
        self.sealed.start = range.end;
        self.opener.open_into(&buf.whole()[range], out)
    }

    /// Reads more of what `sealed` begins; `Ok(0)` is the end of the socket.
    fn poll_more<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        pool: &BufferPool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut buf = self.make_room(pool);
        let room = &mut buf.whole_mut()[self.sealed.end..];
        if !self.tail.is_empty() {
            let len = self.tail.len().min(room.len());
            room[..len].copy_from_slice(&self.tail[..len]);
            self.tail = self.tail[len..].into();
            self.sealed.end += len;
            self.buf = Some(buf);
            return Poll::Ready(Ok(len));
        }
        let wanted = room.len();
        let mut room = ReadBuf::new(room);
        let outcome = Pin::new(io).poll_read(cx, &mut room);
        let len = room.filled().len();
        match outcome {
            Poll::Ready(Ok(())) => {
                self.sealed.end += len;
                self.adapt(len, wanted);
                self.buf = Some(buf);
                Poll::Ready(Ok(len))
            }
            Poll::Ready(Err(error)) => {
                self.release();
                Poll::Ready(Err(error))
            }
            Poll::Pending => {
                self.park(buf, pool);
                Poll::Pending
            }
        }
    }

    /// A buffer with `sealed` at its front, of the size of the next turn if the pool has it.
    fn make_room(&mut self, pool: &BufferPool) -> PooledBuf {
        self.plain = 0..0;
        let old = self.buf.take();
        let mut buf = match old {
            Some(buf) if buf.class() >= self.turn => buf,
            Some(old) => {
                let mut new = pool.take(self.turn);
                if new.class() > old.class() {
                    let sealed = &old.whole()[self.sealed.clone()];
                    new.whole_mut()[..sealed.len()].copy_from_slice(sealed);
                    self.sealed = 0..sealed.len();
                    new
                } else {
                    // The pool is dry: do not ask again before the next full read.
                    self.turn = old.class();
                    old
                }
            }
            None => {
                self.sealed = 0..0;
                pool.take(self.turn)
            }
        };
        if self.sealed.start > 0 {
            buf.whole_mut().copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        buf
    }

    fn adapt(&mut self, len: usize, wanted: usize) {
        if len == wanted {
            self.turn = self.turn.larger();
        } else if len < self.turn.smaller().bytes() {
            self.turn = self.turn.smaller();
        }
    }

    /// Keeps no more memory than the partial record needs while the socket is silent.
    fn park(&mut self, buf: PooledBuf, pool: &BufferPool) {
        let sealed = &buf.whole()[self.sealed.clone()];
        if sealed.len() <= SMALL_TAIL {
            self.tail = sealed.into();
            self.release();
        } else if buf.class() == SizeClass::Kib16 {
            self.buf = Some(buf);
        } else {
            // A partial record always fits into the smallest buffer.
            let mut small = pool.take(SizeClass::Kib16);
            small.whole_mut()[..sealed.len()].copy_from_slice(sealed);
            self.sealed = 0..sealed.len();
            self.buf = Some(small);
        }
    }
}

const NO_BUFFER: RecordError = RecordError::Internal("no buffer");

impl<IO: AsyncRead + AsyncWrite + Unpin> TlsStream<IO> {
    /// Makes opened data available, or finds the end of the stream (then there is none).
    fn poll_plain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if !self.rx.plain.is_empty() || self.rx.closed {
                return Poll::Ready(Ok(()));
            }
            if let Some(error) = self.failed {
                return Poll::Ready(Err(error.into()));
            }
            let step = match self.rx.whole_record() {
                Ok(Some(range)) => self
                    .rx
                    .open(range)
                    .and_then(|content| self.handle(&content)),
                Ok(None) => match ready!(self.rx.poll_more(&mut self.io, &self.pool, cx))? {
                    0 => Err(RecordError::Truncated),
                    _ => Ok(()),
                },
                Err(error) => Err(error),
            };
            if let Err(error) = step {
                return Poll::Ready(Err(self.fail_reading(error, cx)));
            }
        }
    }

    /// Nothing that was received after `error` is of use.
    fn fail_reading(&mut self, error: RecordError, cx: &mut Context<'_>) -> io::Error {
        self.rx.tail = Box::default();
        self.rx.release();
        self.fail(error, cx)
    }

    /// Acts on what a record held besides data.
    fn handle(&mut self, content: &Content) -> Result<(), RecordError> {
        match content {
            Content::Data(_) | Content::Nothing => {}
            Content::CloseNotify => {
                // RFC 8446 6.1: whatever follows is ignored.
                self.rx.closed = true;
                self.rx.tail = Box::default();
                self.rx.release();
            }
            Content::Handshake => {
                while let Some(message) = self.rx.opener.next_message()? {
                    match message {
                        Message::KeyUpdate { requested } => {
                            self.rx.opener.rekey(self.schedule.next_rx()?)?;
                            // However often it asks while we are silent, one answer will do
                            // (RFC 8446 4.6.3).
                            self.tx.owe_update(requested);
                        }
                        Message::NewSessionTicket(ticket) => self.schedule.store_ticket(&ticket)?,
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies opened data, and opens further records straight into the caller's memory while
    /// there is room for them and no wait is needed.
    fn read_available(&mut self, out: &mut ReadBuf<'_>, cx: &mut Context<'_>) {
        loop {
            let plain = self.rx.plain();
            if !plain.is_empty() {
                let len = plain.len().min(out.remaining());
                out.put_slice(&plain[..len]);
                self.rx.consume(len);
            }
            if out.remaining() == 0 || self.rx.closed || self.failed.is_some() {
                return self.rx.release_if_empty();
            }
            let opened = match self.rx.whole_record() {
                Ok(None) => return self.rx.release_if_empty(),
                Ok(Some(range)) => {
                    let needed = inner_len(range.len());
                    let ready = out.initialized().len() - out.filled().len();
                    // Memory that would have to be zeroed first is not worth it.
                    if needed <= ready {
                        let room = out.initialize_unfilled_to(needed);
                        self.rx.open_into(range, room).inspect(|content| {
                            if let Content::Data(data) = content {
                                out.advance(data.len());
                            }
                        })
                    } else {
                        self.rx.open(range)
                    }
                }
                Err(error) => Err(error),
            };
            if let Err(error) = opened.and_then(|content| self.handle(&content)) {
                // What was opened before it is the caller's; the next call returns the error.
                self.fail_reading(error, cx);
                return;
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = out.filled().len();
        loop {
            this.read_available(out, cx);
            if out.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            ready!(this.poll_plain(cx))?;
            if this.rx.plain.is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncBufRead for TlsStream<IO> {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        ready!(this.poll_plain(cx))?;
        Poll::Ready(Ok(this.rx.plain()))
    }

    fn consume(self: Pin<&mut Self>, amount: usize) {
        self.get_mut().rx.consume(amount);
    }
}
