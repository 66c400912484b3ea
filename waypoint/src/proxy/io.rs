//! Byte streams that HTTP runs over: a tunnel, a socket, TLS over a socket. One type for all of
//! them, so that nothing behind it is generic or boxed, with two faces: hyper's, for HTTP, and
//! chunks without a copy, for bytes that are only passed on.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use adit_shared::hbone::{ResetReason, Tunnel, TunnelError};
use adit_shared::net::socket::reset_on_close;
use bytes::{Buf as _, Bytes, BytesMut};
use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead as _, AsyncWrite as _};
use tokio::net::TcpStream;

use super::http2::stream::Stream;
use crate::live::Moved;

/// Most that one chunk of a socket holds.
const SOCKET_CHUNK: usize = 16 << 10;
/// Most that one write to a tunnel takes.
const TUNNEL_CHUNK: usize = 64 << 10;

/// A byte stream.
pub struct Io {
    kind: Kind,
    /// Read before, and not given to anybody yet.
    unread: Bytes,
    /// How much of `unread` counts against the tunnel's window.
    held: usize,
    /// Where somebody wants to see how much passes.
    moved: Option<Rc<Moved>>,
}

enum Kind {
    Tunnel(Tunnel),
    Tcp(TokioIo<TcpStream>),
    Tls(Box<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>>),
    /// A stream of HTTP/2 that carries another protocol (RFC 8441).
    Stream(Box<Stream>),
}

impl Io {
    /// Over a tunnel.
    pub fn tunnel(tunnel: Tunnel) -> Self {
        Self::new(Kind::Tunnel(tunnel))
    }

    /// Over a socket.
    pub fn tcp(stream: TcpStream) -> Self {
        Self::new(Kind::Tcp(TokioIo::new(stream)))
    }

    /// Over TLS.
    pub fn tls(stream: tokio_rustls::client::TlsStream<TcpStream>) -> Self {
        Self::new(Kind::Tls(Box::new(TokioIo::new(stream))))
    }

    /// Over a stream of HTTP/2 that carries another protocol.
    pub fn stream(stream: Box<Stream>) -> Self {
        Self::new(Kind::Stream(stream))
    }

    fn new(kind: Kind) -> Self {
        Self {
            kind,
            unread: Bytes::new(),
            held: 0,
            moved: None,
        }
    }

    /// Counts from now on what passes; of a socket that hyper reads (HTTP/1), only what is sent.
    pub fn count(&mut self) -> Rc<Moved> {
        self.moved.get_or_insert_default().clone()
    }

    fn received(&self, bytes: usize) {
        if let Some(moved) = &self.moved {
            moved.receive(bytes);
        }
    }

    fn sent(&self, bytes: usize) {
        if let Some(moved) = &self.moved {
            moved.send(bytes);
        }
    }

    /// Our address, where there is one.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.kind {
            Kind::Tunnel(_) | Kind::Stream(_) => None,
            Kind::Tcp(io) => io.inner().local_addr().ok(),
            Kind::Tls(io) => io.inner().get_ref().0.local_addr().ok(),
        }
    }

    /// Puts bytes back that a protocol has read ahead.
    pub fn unread(&mut self, bytes: Bytes) {
        if self.unread.is_empty() {
            self.unread = bytes;
        } else if !bytes.is_empty() {
            self.unread = [&bytes[..], &self.unread[..]].concat().into();
        }
    }

    /// Reads more into what can be peeked at, without giving it to anybody. Returns what is
    /// there; the same as before at the end of the stream.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_peek(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let more = ready!(self.poll_fresh(cx))?;
        if let Some(more) = more {
            self.held += self.counted(more.len());
            self.unread = if self.unread.is_empty() {
                more
            } else {
                // In place, as it is ours alone: a client that sends byte by byte would else
                // have us copy what is there as often.
                let before = std::mem::take(&mut self.unread);
                let mut joined = before.try_into_mut().unwrap_or_else(|shared| {
                    let mut copied = BytesMut::with_capacity(2 * (shared.len() + more.len()));
                    copied.extend_from_slice(&shared);
                    copied
                });
                joined.extend_from_slice(&more);
                joined.freeze()
            };
        }
        Poll::Ready(Ok(&self.unread))
    }

    /// What has been read ahead.
    pub fn peeked(&self) -> &[u8] {
        &self.unread
    }

    /// The next bytes; `None` at the end. What a tunnel gave counts against its window until
    /// it is [released](Self::release).
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if !self.unread.is_empty() {
            // Who consumes it releases it; some of it may have been released before, so that
            // counting it twice would give away window of what is still under way.
            let held = std::mem::take(&mut self.held);
            self.release(held);
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.unread))));
        }
        self.poll_fresh(cx)
    }

    /// `n` bytes that were read have been consumed.
    pub fn release(&mut self, n: usize) {
        match &mut self.kind {
            Kind::Tunnel(tunnel) => tunnel.release(n),
            Kind::Stream(stream) => stream.release(n),
            Kind::Tcp(_) | Kind::Tls(_) => {}
        }
    }

    /// Writes from the front of `chunk`; ready when some of it has been taken.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Bytes,
    ) -> Poll<io::Result<usize>> {
        match &mut self.kind {
            Kind::Tunnel(tunnel) => {
                let n = ready!(tunnel.poll_capacity(cx, chunk.len()))?.min(chunk.len());
                tunnel.send(chunk.split_to(n))?;
                self.sent(n);
                Poll::Ready(Ok(n))
            }
            Kind::Stream(stream) => {
                let n = ready!(stream.poll_capacity(cx, chunk.len()))?.min(chunk.len());
                stream.send(chunk.split_to(n))?;
                self.sent(n);
                Poll::Ready(Ok(n))
            }
            Kind::Tcp(_) | Kind::Tls(_) => {
                let n = ready!(Pin::new(&mut *self).poll_write(cx, chunk))?;
                chunk.advance(n);
                Poll::Ready(Ok(n))
            }
        }
    }

    /// Ends both directions so that the other side takes nothing for complete.
    pub fn reset(&mut self) {
        match &mut self.kind {
            Kind::Tunnel(tunnel) => tunnel.reset(ResetReason::CONNECT_ERROR),
            Kind::Tcp(io) => reset_on_close(io.inner()),
            Kind::Tls(io) => reset_on_close(io.inner().get_ref().0),
            Kind::Stream(stream) => stream.reset(),
        }
    }

    /// Ready when the other side resets a stream on which nothing is read or written.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match &mut self.kind {
            Kind::Tunnel(tunnel) => match ready!(tunnel.poll_reset(cx)) {
                TunnelError::Reset(ResetReason::NO_ERROR) => Poll::Pending,
                error => Poll::Ready(error.into()),
            },
            Kind::Tcp(_) | Kind::Tls(_) | Kind::Stream(_) => Poll::Pending,
        }
    }

    /// Reads into a buffer, as tokio wants it; nothing at the end.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            let before = buf.filled().len();
            match &mut self.kind {
                Kind::Tcp(io) => ready!(Pin::new(io.inner_mut()).poll_read(cx, buf))?,
                Kind::Tls(io) => ready!(Pin::new(io.inner_mut()).poll_read(cx, buf))?,
                Kind::Tunnel(_) | Kind::Stream(_) => ready!(self.poll_ahead(cx))?,
            }
            // Those of a tunnel have been counted.
            self.received(buf.filled().len() - before);
        }
        self.give(buf.remaining(), |bytes| buf.put_slice(bytes));
        Poll::Ready(Ok(()))
    }

    /// Writes pieces as one, as far as they are taken.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_gather(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = match &mut self.kind {
            Kind::Tunnel(tunnel) => {
                // Each piece for itself would be a frame of the tunnel.
                let want = pieces.iter().map(|piece| piece.len()).sum::<usize>();
                let want = want.min(TUNNEL_CHUNK);
                if want == 0 {
                    return Poll::Ready(Ok(0));
                }
                let n = ready!(tunnel.poll_capacity(cx, want))?.min(want);
                let mut joined = BytesMut::with_capacity(n);
                for piece in pieces {
                    let room = n - joined.len();
                    joined.extend_from_slice(&piece[..piece.len().min(room)]);
                }
                tunnel.send(joined.freeze())?;
                n
            }
            Kind::Tcp(io) => ready!(Pin::new(io.inner_mut()).poll_write_vectored(cx, pieces))?,
            Kind::Tls(io) => ready!(Pin::new(io.inner_mut()).poll_write_vectored(cx, pieces))?,
            Kind::Stream(_) => {
                let first = pieces.iter().find(|piece| !piece.is_empty());
                return Pin::new(self).poll_write(cx, first.map_or(&[], |piece| piece));
            }
        };
        self.sent(n);
        Poll::Ready(Ok(n))
    }

    /// Makes some of a tunnel's bytes those that are given next.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(chunk) = ready!(self.poll_fresh(cx))? {
            self.held = self.counted(chunk.len());
            self.unread = chunk;
        }
        Poll::Ready(Ok(()))
    }

    /// Gives out what has been read ahead, at most `room` bytes of it.
    fn give(&mut self, room: usize, put: impl FnOnce(&[u8])) {
        let n = self.unread.len().min(room);
        put(&self.unread[..n]);
        self.unread.advance(n);
        let released = self.held.min(n);
        self.held -= released;
        if released > 0 {
            self.release(released);
        }
    }

    fn counted(&self, n: usize) -> usize {
        match self.kind {
            Kind::Tunnel(_) | Kind::Stream(_) => n,
            Kind::Tcp(_) | Kind::Tls(_) => 0,
        }
    }

    fn poll_fresh(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let chunk = match &mut self.kind {
            Kind::Tunnel(tunnel) => ready!(tunnel.poll_read_chunk(cx))?,
            Kind::Tcp(io) => ready!(poll_socket_chunk(Pin::new(io), cx))?,
            Kind::Tls(io) => ready!(poll_socket_chunk(Pin::new(&mut **io), cx))?,
            Kind::Stream(stream) => ready!(stream.poll_read_chunk(cx))?,
        };
        self.received(chunk.as_ref().map_or(0, Bytes::len));
        Poll::Ready(Ok(chunk))
    }
}

fn poll_socket_chunk<R: Read>(
    io: Pin<&mut R>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<Bytes>>> {
    let mut space = [0; SOCKET_CHUNK];
    let mut buffer = ReadBuf::new(&mut space);
    ready!(io.poll_read(cx, buffer.unfilled()))?;
    let filled = buffer.filled();
    Poll::Ready(Ok(
        (!filled.is_empty()).then(|| Bytes::copy_from_slice(filled))
    ))
}

impl Read for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.unread.is_empty() {
            // hyper's buffer does not tell how much was put into it.
            match &mut this.kind {
                Kind::Tcp(io) => return Pin::new(io).poll_read(cx, buf),
                Kind::Tls(io) => return Pin::new(&mut **io).poll_read(cx, buf),
                Kind::Tunnel(_) | Kind::Stream(_) => ready!(this.poll_ahead(cx))?,
            }
        }
        this.give(buf.remaining(), |bytes| buf.put_slice(bytes));
        Poll::Ready(Ok(()))
    }
}

impl Write for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = match &mut self.kind {
            Kind::Tunnel(tunnel) => {
                if buf.is_empty() {
                    return Poll::Ready(Ok(0));
                }
                let want = buf.len().min(TUNNEL_CHUNK);
                let n = ready!(tunnel.poll_capacity(cx, want))?.min(want);
                tunnel.send(Bytes::copy_from_slice(&buf[..n]))?;
                n
            }
            Kind::Tcp(io) => ready!(Pin::new(io).poll_write(cx, buf))?,
            Kind::Stream(stream) => {
                if buf.is_empty() {
                    return Poll::Ready(Ok(0));
                }
                let want = buf.len().min(TUNNEL_CHUNK);
                let n = ready!(stream.poll_capacity(cx, want))?.min(want);
                stream.send(Bytes::copy_from_slice(&buf[..n]))?;
                n
            }
            Kind::Tls(io) => ready!(Pin::new(&mut **io).poll_write(cx, buf))?,
        };
        self.sent(n);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.kind {
            Kind::Tunnel(_) | Kind::Stream(_) => Poll::Ready(Ok(())),
            Kind::Tcp(io) => Pin::new(io).poll_flush(cx),
            Kind::Tls(io) => Pin::new(&mut **io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.kind {
            Kind::Tunnel(tunnel) => Poll::Ready(match tunnel.finish() {
                Ok(()) | Err(TunnelError::Finished) => Ok(()),
                Err(error) => Err(error.into()),
            }),
            Kind::Tcp(io) => Pin::new(io).poll_shutdown(cx),
            Kind::Tls(io) => Pin::new(&mut **io).poll_shutdown(cx),
            Kind::Stream(stream) => Poll::Ready(stream.finish()),
        }
    }
}
