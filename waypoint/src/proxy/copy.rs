//! Passes bytes on between two streams that nobody looks into any more: TCP, TLS, and what a
//! request has been upgraded to. Nothing piles up: a chunk is read when the one before has
//! been taken, and window is given back when its bytes have gone.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::rt::Write as _;
use tokio::time::{Instant, sleep_until};

use super::io::Io;

/// Bytes that one direction moves before it lets others have a turn.
const BUDGET: usize = 256 << 10;
/// How long a connection may stay half-closed without anything moving: the other half must
/// not be held open for ever by a peer that has forgotten it.
pub const HALF_CLOSED_IDLE: Duration = Duration::from_secs(600);

/// How a copy ended.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The client's side failed; the endpoint's was reset.
    #[error("client: {0}")]
    Client(#[source] io::Error),
    /// The endpoint's side failed; the client's was reset.
    #[error("endpoint: {0}")]
    Endpoint(#[source] io::Error),
    /// Nothing moved for too long.
    #[error("idle")]
    Idle,
}

/// Counts the bytes of both directions.
pub trait Traffic {
    /// From the client.
    fn request(&self, bytes: usize);
    /// To the client.
    fn response(&self, bytes: usize);
}

#[derive(Default)]
struct Direction {
    chunk: Bytes,
    ended: bool,
    shut: bool,
}

/// Which side an error belongs to.
enum Side {
    From(io::Error),
    To(io::Error),
}

impl Direction {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Io,
        to: &mut Io,
        moved: impl Fn(usize),
    ) -> Poll<Result<(), Side>> {
        let mut budget = BUDGET;
        loop {
            if self.shut {
                return Poll::Ready(Ok(()));
            }
            if self.chunk.is_empty() && !self.ended {
                match ready!(from.poll_chunk(cx)).map_err(Side::From)? {
                    Some(chunk) => self.chunk = chunk,
                    None => self.ended = true,
                }
            }
            if self.chunk.is_empty() {
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(Side::To)?;
                self.shut = true;
                continue;
            }
            let n = ready!(to.poll_send(cx, &mut self.chunk)).map_err(Side::To)?;
            from.release(n);
            moved(n);
            budget = budget.saturating_sub(n);
            if budget == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }
}

/// Copies until both directions have ended. What fails resets the other side, so that nobody
/// takes a broken transfer for a complete one.
///
/// # Errors
/// [`CopyError`].
pub async fn between(
    mut client: Io,
    mut endpoint: Io,
    traffic: &impl Traffic,
    idle: Option<Duration>,
) -> Result<(), CopyError> {
    let mut up = Direction::default();
    let mut down = Direction::default();
    let moved = Cell::new(false);
    let mut timer = std::pin::pin!(sleep_until(Instant::now() + HALF_CLOSED_IDLE));
    let mut armed = None;
    let ended = poll_fn(|cx| {
        let sent = |n| {
            moved.set(true);
            traffic.request(n);
        };
        let received = |n| {
            moved.set(true);
            traffic.response(n);
        };
        let upwards = up.poll(cx, &mut client, &mut endpoint, sent);
        match upwards {
            Poll::Ready(Err(Side::From(error))) => {
                return Poll::Ready(Err(CopyError::Client(error)));
            }
            Poll::Ready(Err(Side::To(error))) => {
                return Poll::Ready(Err(CopyError::Endpoint(error)));
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        let downwards = down.poll(cx, &mut endpoint, &mut client, received);
        match downwards {
            Poll::Ready(Err(Side::From(error))) => {
                return Poll::Ready(Err(CopyError::Endpoint(error)));
            }
            Poll::Ready(Err(Side::To(error))) => {
                return Poll::Ready(Err(CopyError::Client(error)));
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        if up.shut && down.shut {
            return Poll::Ready(Ok(()));
        }
        // A side that is not read any more tells of its end only here.
        if up.ended
            && let Poll::Ready(error) = client.poll_reset(cx)
        {
            return Poll::Ready(Err(CopyError::Client(error)));
        }
        if down.ended
            && let Poll::Ready(error) = endpoint.poll_reset(cx)
        {
            return Poll::Ready(Err(CopyError::Endpoint(error)));
        }
        let allowed = if up.ended || down.ended {
            Some(HALF_CLOSED_IDLE)
        } else {
            idle
        };
        if let Some(allowed) = allowed {
            use std::future::Future as _;
            if moved.take() || armed != Some(allowed) {
                armed = Some(allowed);
                timer.as_mut().reset(Instant::now() + allowed);
            }
            if timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(CopyError::Idle));
            }
        }
        Poll::Pending
    })
    .await;
    if ended.is_err() {
        client.reset();
        endpoint.reset();
    }
    ended
}
