//! An app's socket and a tunnel.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::net::TcpStream;

use super::chunks::{Chunks, GATHER};
use super::timer::IdleTimer;
use super::turn::{POLL_BUDGET, SMALL, Turn};
use super::watch::FailureWatch;
use super::{Copied, CopyEnd, CopySettings, Traffic};
use crate::hbone::buffer::BufferPool;
use crate::hbone::{ResetReason, Tunnel, TunnelError};
use crate::net::socket;

/// Copies between `app` and `tunnel` until both directions have finished or one side fails.
pub fn through_tunnel<T: Traffic>(
    app: TcpStream,
    tunnel: Tunnel,
    traffic: T,
    settings: CopySettings,
) -> TunnelCopy<T> {
    TunnelCopy {
        app: Rc::new(app),
        tunnel,
        traffic,
        settings,
        up: Up::Open(Turn::new()),
        down_open: true,
        undelivered: Chunks::default(),
        app_failed: FailureWatch::default(),
        timer: IdleTimer::default(),
        sent: 0,
        received: 0,
        ended: false,
    }
}

/// The future of [`through_tunnel`].
pub struct TunnelCopy<T: Traffic> {
    app: Rc<TcpStream>,
    tunnel: Tunnel,
    traffic: T,
    settings: CopySettings,
    /// App to tunnel.
    up: Up,
    /// Tunnel to app: the peer has not finished yet.
    down_open: bool,
    /// Chunks that the app's socket does not take yet. Empty, it holds no memory.
    undelivered: Chunks,
    /// Sees the app's reset after its FIN, when nothing is read any more.
    app_failed: FailureWatch,
    timer: IdleTimer,
    sent: u64,
    received: u64,
    ended: bool,
}

/// One is held per app connection, on each of the two proxies.
const _: () = assert!(size_of::<TunnelCopy<()>>() <= 256);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Up {
    Open(Turn),
    /// The app has finished, and the tunnel has been told.
    Finished,
    /// The peer wants no more (RST_STREAM with NO_ERROR), but what it sent is still delivered.
    Unwanted,
}

/// What became of a direction in one poll.
enum Step {
    /// Bytes moved and more may follow: others first.
    Yield,
    /// The direction has finished.
    Finished,
}

impl<T: Traffic> TunnelCopy<T> {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<CopyEnd> {
        let mut again = false;
        if self.down_open || !self.undelivered.is_empty() {
            match self.poll_down(cx) {
                Poll::Ready(Ok(Step::Yield)) => again = true,
                Poll::Ready(Ok(Step::Finished)) => self.timer.half_close(&self.settings),
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => {}
            }
        }
        if let Up::Open(turn) = self.up {
            match self.poll_up(cx, turn) {
                Poll::Ready(Ok(Step::Yield)) => again = true,
                Poll::Ready(Ok(Step::Finished)) => self.timer.half_close(&self.settings),
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => {}
            }
        }
        let up_open = matches!(self.up, Up::Open(_));
        if !up_open && !self.down_open && self.undelivered.is_empty() {
            return Poll::Ready(CopyEnd::Finished);
        }
        if self.timer.is_half_closed()
            && let Poll::Ready(end) = self.poll_closed_side(cx, up_open)
        {
            return Poll::Ready(end);
        }
        if let Poll::Ready(end) = self.timer.poll(cx, &self.settings) {
            return Poll::Ready(end);
        }
        if again {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// App to tunnel. Only when bytes are there is window reserved, then a buffer taken: an idle
    /// connection holds neither, and a blocked one no buffer.
    fn poll_up(&mut self, cx: &mut Context<'_>, mut turn: Turn) -> Poll<Result<Step, CopyEnd>> {
        let mut budget = POLL_BUDGET;
        loop {
            ready!(self.app.poll_read_ready(cx)).map_err(CopyEnd::App)?;
            let want = turn.class().bytes();
            let capacity = match ready!(self.tunnel.poll_capacity(cx, want)) {
                Ok(capacity) => capacity,
                Err(error) => return Poll::Ready(self.peer_takes_no_more(error)),
            };
            let mut buffer = BufferPool::local().take(turn.class());
            let room = capacity.min(buffer.len());
            let n = match self.app.try_read(&mut buffer[..room]) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.tunnel.unreserve();
                    continue;
                }
                Err(error) => return Poll::Ready(Err(CopyEnd::App(error))),
            };
            if n == 0 {
                self.tunnel.unreserve();
                self.up = Up::Finished;
                return Poll::Ready(match self.tunnel.finish() {
                    Ok(()) => Ok(Step::Finished),
                    Err(error) => self.peer_takes_no_more(error),
                });
            }
            self.sent += n as u64;
            self.traffic.sent(n);
            self.timer.moved();
            let chunk = if n < SMALL {
                Bytes::copy_from_slice(&buffer[..n])
            } else {
                buffer.freeze(n)
            };
            if let Err(error) = self.tunnel.send(chunk) {
                return Poll::Ready(self.peer_takes_no_more(error));
            }
            turn.learn(n, room);
            self.up = Up::Open(turn);
            if n < room {
                // Drained: what is reserved beyond it belongs to the others, and the next read
                // would only be told to wait.
                self.tunnel.unreserve();
                socket::drained(&self.app);
            }
            budget = budget.saturating_sub(n);
            if budget == 0 {
                return Poll::Ready(Ok(Step::Yield));
            }
        }
    }

    /// The tunnel cannot be written. If the peer merely wants no more, the other direction goes
    /// on; otherwise it is over.
    fn peer_takes_no_more(&mut self, error: TunnelError) -> Result<Step, CopyEnd> {
        match error {
            TunnelError::Reset(ResetReason::NO_ERROR) => {
                self.up = Up::Unwanted;
                Ok(Step::Finished)
            }
            error => Err(CopyEnd::Tunnel(error)),
        }
    }

    /// Tunnel to app. Gathers what is there into one write.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step, CopyEnd>> {
        let mut budget = POLL_BUDGET;
        loop {
            while self.down_open
                && self.undelivered.bytes() < POLL_BUDGET
                && !self.undelivered.is_full()
            {
                match self.tunnel.poll_read_chunk(cx) {
                    Poll::Ready(Ok(Some(chunk))) => {
                        self.received += chunk.len() as u64;
                        self.traffic.received(chunk.len());
                        self.timer.moved();
                        self.undelivered.push(chunk);
                    }
                    Poll::Ready(Ok(None)) => self.down_open = false,
                    Poll::Ready(Err(error)) => {
                        return Poll::Ready(Err(CopyEnd::Tunnel(error)));
                    }
                    Poll::Pending if self.undelivered.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            if self.undelivered.is_empty() {
                socket::shutdown_write(&self.app).map_err(CopyEnd::App)?;
                return Poll::Ready(Ok(Step::Finished));
            }
            ready!(self.app.poll_write_ready(cx)).map_err(CopyEnd::App)?;
            let mut slices = [IoSlice::new(&[]); GATHER];
            let slices = self.undelivered.slices(&mut slices);
            let n = match self.app.try_write_vectored(slices) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Poll::Ready(Err(CopyEnd::App(error))),
            };
            self.undelivered.advance(n);
            self.tunnel.release(n);
            self.timer.moved();
            budget = budget.saturating_sub(n);
            if budget == 0 {
                return Poll::Ready(Ok(Step::Yield));
            }
        }
    }

    /// Resets that the closed direction would not see.
    fn poll_closed_side(&mut self, cx: &mut Context<'_>, up_open: bool) -> Poll<CopyEnd> {
        if up_open {
            // The peer has finished, so nothing is read from the tunnel.
            return match self.tunnel.poll_reset(cx) {
                // It wants no more; `poll_up` will see it too.
                Poll::Ready(TunnelError::Reset(ResetReason::NO_ERROR)) | Poll::Pending => {
                    Poll::Pending
                }
                Poll::Ready(error) => Poll::Ready(CopyEnd::Tunnel(error)),
            };
        }
        self.app_failed.poll(cx, &self.app).map(CopyEnd::App)
    }

    /// Passes the end on to the sides that do not know it yet.
    fn end(&mut self, end: CopyEnd) -> Copied {
        self.ended = true;
        if !end.is_finished() {
            self.tunnel.reset(match end {
                // RFC 9113 8.5: a TCP error is CONNECT_ERROR.
                CopyEnd::App(_) => ResetReason::CONNECT_ERROR,
                _ => ResetReason::CANCEL,
            });
            socket::reset_on_close(&self.app);
        }
        Copied {
            sent: self.sent,
            received: self.received,
            end,
        }
    }
}

impl<T: Traffic + Unpin> Future for TunnelCopy<T> {
    type Output = Copied;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Copied> {
        let end = ready!(self.poll_end(cx));
        Poll::Ready(self.end(end))
    }
}

impl<T: Traffic> Drop for TunnelCopy<T> {
    fn drop(&mut self) {
        // The socket closes only when the watch has let go of it.
        self.app_failed.stop();
        if !self.ended {
            // The tunnel resets itself when it is dropped.
            socket::reset_on_close(&self.app);
        }
    }
}
