//! A socket that takes and gives bytes in pieces of any size, and is not ready when it likes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub(super) struct Chunky<IO> {
    pub(super) io: IO,
    state: u64,
    largest: usize,
}

impl<IO> Chunky<IO> {
    /// Pieces of up to `largest` bytes, drawn from `seed`.
    pub(super) fn new(io: IO, seed: u64, largest: usize) -> Self {
        Self {
            io,
            state: seed | 1,
            largest: largest.max(1),
        }
    }

    fn draw(&mut self) -> usize {
        // xorshift64: the test has to be repeatable, not random.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        usize::try_from(self.state >> 11).unwrap_or(1)
    }

    /// The size of the next piece; `None` for "not now".
    fn piece(&mut self, cx: &Context<'_>) -> Option<usize> {
        if self.draw().is_multiple_of(4) {
            cx.waker().wake_by_ref();
            return None;
        }
        Some(1 + self.draw() % self.largest)
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Chunky<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(piece) = self.piece(cx) else {
            return Poll::Pending;
        };
        let mut part = vec![0; piece.min(buf.remaining())];
        let mut part = ReadBuf::new(&mut part);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
        buf.put_slice(part.filled());
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Chunky<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Some(piece) = self.piece(cx) else {
            return Poll::Pending;
        };
        let part = &bytes[..piece.min(bytes.len())];
        Pin::new(&mut self.io).poll_write(cx, part)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
