//! Two sockets. Small messages go through a buffer; when reads fill it, splice(2) moves pages
//! from one socket to the other without copying them through this process.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use tokio::net::TcpStream;

use super::pipe::{PIPE_SIZE, PooledPipe};
use super::timer::IdleTimer;
use super::turn::{POLL_BUDGET, Turn};
use super::watch::FailureWatch;
use super::{Copied, CopyEnd, CopySettings, Traffic};
use crate::hbone::buffer::{BufferPool, SizeClass};
use crate::net::socket;

/// Copies between `first` (the app, or whoever connected) and `second` (the upstream) until both
/// directions have finished or one side fails.
pub fn through_socket<T: Traffic>(
    first: TcpStream,
    second: TcpStream,
    traffic: T,
    settings: CopySettings,
) -> SocketCopy<T> {
    SocketCopy {
        first: Rc::new(first),
        second: Rc::new(second),
        traffic,
        settings,
        up: Half::default(),
        down: Half::default(),
        failure: FailureWatch::default(),
        timer: IdleTimer::default(),
        ended: false,
    }
}

/// The future of [`through_socket`].
pub struct SocketCopy<T: Traffic> {
    first: Rc<TcpStream>,
    second: Rc<TcpStream>,
    traffic: T,
    settings: CopySettings,
    /// First to second.
    up: Half,
    /// Second to first.
    down: Half,
    failure: FailureWatch,
    timer: IdleTimer,
    ended: bool,
}

/// One is held per plaintext connection.
const _: () = assert!(size_of::<SocketCopy<()>>() <= 280);

/// One direction.
#[derive(Default)]
struct Half {
    undelivered: Undelivered,
    turn: Turn,
    /// The source has finished.
    ended: bool,
    /// And the destination has been told.
    finished: bool,
    moved: u64,
}

/// What has been read and not been written yet.
#[derive(Default)]
enum Undelivered {
    #[default]
    Nothing,
    Bytes(Bytes),
    Pipe(PooledPipe),
}

/// Which socket of a direction failed.
enum Failed {
    Source(io::Error),
    Destination(io::Error),
}

impl Half {
    /// Moves bytes; calls `moved` with how many have been read. Ready when the budget of this
    /// poll is used up or the direction has finished.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        mut moved: impl FnMut(usize),
    ) -> Poll<Result<(), Failed>> {
        let mut budget = POLL_BUDGET;
        loop {
            ready!(self.poll_deliver(cx, to)).map_err(Failed::Destination)?;
            if self.ended {
                socket::shutdown_write(to).map_err(Failed::Destination)?;
                self.undelivered = Undelivered::Nothing;
                self.finished = true;
                return Poll::Ready(Ok(()));
            }
            if budget == 0 {
                return Poll::Ready(Ok(()));
            }
            match from.poll_read_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Failed::Source(error))),
                Poll::Pending => {
                    // An idle direction holds neither buffer nor pipe.
                    self.undelivered = Undelivered::Nothing;
                    return Poll::Pending;
                }
            }
            match self.read(from) {
                Ok(0) => self.ended = true,
                Ok(n) => {
                    self.moved += n as u64;
                    moved(n);
                    budget = budget.saturating_sub(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(Failed::Source(error))),
            }
        }
    }

    /// Reads into a buffer or a pipe; there is nothing undelivered.
    fn read(&mut self, from: &TcpStream) -> io::Result<usize> {
        if self.turn.class() > SizeClass::Kib16 {
            if !matches!(self.undelivered, Undelivered::Pipe(_))
                && let Some(pipe) = PooledPipe::take()
            {
                self.undelivered = Undelivered::Pipe(pipe);
            }
            if let Undelivered::Pipe(pipe) = &mut self.undelivered {
                let n = pipe.fill(from)?;
                self.turn.learn(n, PIPE_SIZE);
                return Ok(n);
            }
        }
        let mut buffer = BufferPool::local().take(self.turn.class());
        let room = buffer.len();
        let n = from.try_read(&mut buffer)?;
        if n < room {
            socket::drained(from);
        }
        self.turn.learn(n, room);
        self.undelivered = Undelivered::Bytes(buffer.freeze(n));
        Ok(n)
    }

    /// Ready when nothing is undelivered.
    fn poll_deliver(&mut self, cx: &mut Context<'_>, to: &TcpStream) -> Poll<io::Result<()>> {
        loop {
            let empty = match &self.undelivered {
                Undelivered::Nothing => true,
                Undelivered::Bytes(bytes) => bytes.is_empty(),
                Undelivered::Pipe(pipe) => pipe.is_empty(),
            };
            if empty {
                // A pipe is kept for the next read; a buffer would be in its way.
                if let Undelivered::Bytes(_) = self.undelivered {
                    self.undelivered = Undelivered::Nothing;
                }
                return Poll::Ready(Ok(()));
            }
            ready!(to.poll_write_ready(cx))?;
            let written = match &mut self.undelivered {
                Undelivered::Nothing => Ok(()),
                Undelivered::Bytes(bytes) => to.try_write(bytes).map(|n| bytes.advance(n)),
                Undelivered::Pipe(pipe) => pipe.empty_into(to).map(|_| ()),
            };
            match written {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => result?,
            }
        }
    }
}

impl<T: Traffic> SocketCopy<T> {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<CopyEnd> {
        let mut again = false;
        if !self.up.finished {
            let timer = &mut self.timer;
            let moved = |n| {
                timer.moved();
                self.traffic.sent(n);
            };
            match self.up.poll(cx, &self.first, &self.second, moved) {
                Poll::Ready(Ok(())) => again = true,
                Poll::Ready(Err(Failed::Source(e))) => return Poll::Ready(CopyEnd::App(e)),
                Poll::Ready(Err(Failed::Destination(e))) => {
                    return Poll::Ready(CopyEnd::Upstream(e));
                }
                Poll::Pending => {}
            }
        }
        if !self.down.finished {
            let timer = &mut self.timer;
            let moved = |n| {
                timer.moved();
                self.traffic.received(n);
            };
            match self.down.poll(cx, &self.second, &self.first, moved) {
                Poll::Ready(Ok(())) => again = true,
                Poll::Ready(Err(Failed::Source(e))) => return Poll::Ready(CopyEnd::Upstream(e)),
                Poll::Ready(Err(Failed::Destination(e))) => {
                    return Poll::Ready(CopyEnd::App(e));
                }
                Poll::Pending => {}
            }
        }
        match (self.up.finished, self.down.finished) {
            (true, true) => return Poll::Ready(CopyEnd::Finished),
            (true, false) => {
                self.timer.half_close(&self.settings);
                if let Poll::Ready(error) = self.failure.poll(cx, &self.first) {
                    return Poll::Ready(CopyEnd::App(error));
                }
            }
            (false, true) => {
                self.timer.half_close(&self.settings);
                if let Poll::Ready(error) = self.failure.poll(cx, &self.second) {
                    return Poll::Ready(CopyEnd::Upstream(error));
                }
            }
            (false, false) => {}
        }
        if let Poll::Ready(end) = self.timer.poll(cx, &self.settings) {
            return Poll::Ready(end);
        }
        if again {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl<T: Traffic + Unpin> Future for SocketCopy<T> {
    type Output = Copied;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Copied> {
        let end = ready!(self.poll_end(cx));
        self.ended = end.is_finished();
        Poll::Ready(Copied {
            sent: self.up.moved,
            received: self.down.moved,
            end,
        })
    }
}

impl<T: Traffic> Drop for SocketCopy<T> {
    fn drop(&mut self) {
        // The sockets close only when the watch has let go of them.
        self.failure.stop();
        if !self.ended {
            socket::reset_on_close(&self.first);
            socket::reset_on_close(&self.second);
        }
    }
}
