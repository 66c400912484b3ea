//! What comes from the client: counted, copied to mirrors, and given up when it stalls.

use std::cell::{Cell, RefCell};
use std::future::Future as _;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{BodyError, MessageCounter};
use crate::proxy::headers::clean_trailers;
use crate::proxy::http::{BODY_DEADLINE, IDLE_TIMEOUT};
use crate::proxy::incoming::Incoming;
use crate::proxy::mirror::Piece;

/// What the parts of a request's handling know of its body.
#[derive(Debug, Default)]
pub struct RequestProgress {
    /// Bytes that came from the client.
    pub bytes: Cell<u64>,
    /// gRPC messages among them.
    pub messages: Cell<u64>,
    /// The client has sent all of it.
    pub finished: Cell<bool>,
    /// The client's side failed.
    pub failed: Cell<bool>,
    /// Something of the body was given to an endpoint.
    pub started: Cell<bool>,
    /// The client stopped in the middle of it.
    pub stalled: Cell<bool>,
    stall: Stall,
    grpc: RefCell<Option<MessageCounter>>,
    /// Who gets a copy of it.
    mirrors: RefCell<Vec<mpsc::Sender<Piece>>>,
}

impl RequestProgress {
    /// For a body of which nothing has come; `grpc` has its messages counted.
    pub fn new(grpc: bool) -> Rc<Self> {
        Rc::new(Self {
            grpc: RefCell::new(grpc.then(MessageCounter::default)),
            ..Self::default()
        })
    }

    /// Has what comes from now on copied.
    pub fn mirror(&self, sender: mpsc::Sender<Piece>) {
        self.mirrors.borrow_mut().push(sender);
    }

    /// Copies; who does not keep up gets no more, and knows that it is not all.
    fn copy(&self, piece: impl Fn() -> Piece) {
        let mut mirrors = self.mirrors.borrow_mut();
        if !mirrors.is_empty() {
            mirrors.retain(|mirror| mirror.try_send(piece()).is_ok());
        }
    }

    fn see(&self, data: &[u8]) {
        self.bytes.set(self.bytes.get() + data.len() as u64);
        if let Some(counter) = &mut *self.grpc.borrow_mut() {
            self.messages.set(self.messages.get() + counter.count(data));
        }
    }
}

/// The next of what the client sends, seen by `progress` and all who get a copy.
pub(super) fn poll_incoming(
    incoming: &mut Incoming,
    progress: &RequestProgress,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
    progress.started.set(true);
    let frame = match Pin::new(&mut *incoming).poll_frame(cx) {
        Poll::Ready(frame) => frame,
        Poll::Pending => {
            let limit = match incoming.size_hint().exact() {
                Some(_) => BODY_DEADLINE,
                None => IDLE_TIMEOUT,
            };
            ready!(progress.stall.poll(cx, limit));
            progress.failed.set(true);
            progress.stalled.set(true);
            progress.mirrors.borrow_mut().clear();
            return Poll::Ready(Some(Err(BodyError::Stalled)));
        }
    };
    progress.stall.went_on();
    Poll::Ready(match frame {
        None => {
            progress.finished.set(true);
            progress.copy(|| Piece::End);
            None
        }
        Some(Ok(mut frame)) => {
            if let Some(trailers) = frame.trailers_mut() {
                clean_trailers(trailers);
            }
            if let Some(data) = frame.data_ref() {
                progress.see(data);
                progress.copy(|| Piece::Frame(Frame::data(data.clone())));
            } else if let Some(trailers) = frame.trailers_ref() {
                progress.copy(|| Piece::Frame(Frame::trailers(trailers.clone())));
            }
            if incoming.is_end_stream() {
                progress.finished.set(true);
                progress.copy(|| Piece::End);
            }
            Some(Ok(frame))
        }
        Some(Err(error)) => {
            progress.failed.set(true);
            progress.mirrors.borrow_mut().clear();
            Some(Err(error))
        }
    })
}

/// Notices that a body does not go on. Costs nothing until it has to be waited for.
#[derive(Debug, Default)]
struct Stall {
    /// Since when it has been waited for.
    since: Cell<Option<Instant>>,
    timer: RefCell<Option<Pin<Box<Sleep>>>>,
}

impl Stall {
    /// Something came.
    fn went_on(&self) {
        self.since.set(None);
    }

    /// Nothing has come: ready when that has been so for `limit`.
    fn poll(&self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let end = match self.since.get() {
            Some(since) => since + limit,
            None => {
                let now = Instant::now();
                self.since.set(Some(now));
                now + limit
            }
        };
        let mut timer = self.timer.borrow_mut();
        let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
        loop {
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            // It was set for an earlier wait.
            timer.as_mut().reset(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::{sleep, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_may_pause_as_often_as_it_likes_but_never_for_long() {
        let stall = Stall::default();
        let begun = Instant::now();
        let nearly = BODY_DEADLINE - Duration::from_secs(1);
        for _ in 0..5 {
            let waiting = poll_fn(|cx| stall.poll(cx, BODY_DEADLINE));
            assert!(timeout(nearly, waiting).await.is_err());
            stall.went_on();
            // The endpoint takes its time, which is not the client's fault.
            sleep(BODY_DEADLINE * 2).await;
        }
        assert_eq!(begun.elapsed(), (nearly + BODY_DEADLINE * 2) * 5);
        let begun = Instant::now();
        poll_fn(|cx| stall.poll(cx, BODY_DEADLINE)).await;
        let waited = begun.elapsed();
        assert!(waited >= BODY_DEADLINE && waited <= BODY_DEADLINE + Duration::from_millis(2));
    }
}
