//! A byte stream as the `h2` crate wants it, which tells whether anything was heard on it.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use hyper::rt::Write as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::proxy::io::Io;

/// Whether bytes have arrived since it was last cleared.
#[derive(Clone, Default)]
pub struct Heard(Rc<Cell<bool>>);

impl Heard {
    /// Whether they have; clears it.
    pub fn take(&self) -> bool {
        self.0.replace(false)
    }
}

/// The stream below a connection.
pub struct Wire {
    io: Io,
    heard: Heard,
}

impl Wire {
    /// `io`, with what is known of its bytes.
    pub fn new(io: Io) -> (Self, Heard) {
        let heard = Heard::default();
        let wire = Self {
            io,
            heard: heard.clone(),
        };
        (wire, heard)
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = self.io.poll_fill(cx, buf);
        if read.is_ready() {
            self.heard.0.set(true);
        }
        read
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io.poll_gather(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
