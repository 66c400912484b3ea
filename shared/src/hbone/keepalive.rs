//! PING, so that a dead peer is noticed: a tunnel may be silent for hours.
//!
//! The first PING goes out one interval after the start, the next one an interval after each
//! answer. A peer whose socket delivers anything meanwhile is alive, even if its answer queues
//! behind bulk data.

use std::cell::Cell;
use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::settings::Settings;

pub(super) struct Keepalive {
    ping: h2::PingPong,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
    heard: Heard,
    settings: Settings,
}

impl Keepalive {
    /// `ping` is `None` only if it was taken from the connection before.
    pub(super) fn new(
        ping: Option<h2::PingPong>,
        heard: Heard,
        settings: Settings,
    ) -> Option<Self> {
        Some(Self {
            ping: ping?,
            timer: Box::pin(sleep(settings.ping_interval)),
            waiting: false,
            heard,
            settings,
        })
    }

    /// Ready when the peer is dead.
    pub(super) fn poll_dead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.waiting && self.ping.poll_pong(cx).is_ready() {
                // An error means that the connection has ended, which its driver sees itself.
                self.waiting = false;
                self.rearm(self.settings.ping_interval);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if !self.waiting {
                self.heard.0.set(false);
                self.waiting = self.ping.send_ping(h2::Ping::opaque()).is_ok();
            } else if !self.heard.0.replace(false) {
                return Poll::Ready(());
            }
            self.rearm(self.settings.ping_timeout);
        }
    }

    fn rearm(&mut self, after: std::time::Duration) {
        self.timer.as_mut().reset(Instant::now() + after);
    }
}

/// Whether bytes have arrived since it was last cleared.
#[derive(Clone, Default)]
pub(super) struct Heard(Rc<Cell<bool>>);

/// A socket that tells when bytes arrive.
pub(super) struct Listening<IO> {
    io: IO,
    heard: Heard,
}

impl<IO> Listening<IO> {
    pub(super) fn new(io: IO) -> (Self, Heard) {
        let heard = Heard::default();
        let listening = Self {
            io,
            heard: heard.clone(),
        };
        (listening, heard)
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Listening<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        if result.is_ready() {
            self.heard.0.set(true);
        }
        result
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Listening<IO> {
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
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
