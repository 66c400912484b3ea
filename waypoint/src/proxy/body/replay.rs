//! The body of a request that may be sent again.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use tokio::sync::mpsc;

use super::progress::poll_incoming;
use super::{BodyError, RequestBody, RequestProgress};
use crate::proxy::incoming::Incoming;
use crate::proxy::mirror::Piece;

/// Bytes of a request's body that are kept for another try. A longer body is sent once.
pub const REPLAY_LIMIT: usize = 64 << 10;

/// Pieces of a body that are kept: many small ones cost more than their sum.
const MAX_CHUNKS: usize = 4096;
/// Of what is shown to others before it is sent, so many small pieces are made one.
const JOIN_CHUNKS: usize = 64;
/// What counts as small, on the average.
const SMALL_CHUNK: usize = 1 << 10;

/// A body that may be sent again.
pub struct Replay {
    incoming: RefCell<Incoming>,
    progress: Rc<RequestProgress>,
    kept: RefCell<Kept>,
    attempt: Cell<u32>,
    /// Bytes that are kept.
    limit: usize,
}

#[derive(Default)]
struct Kept {
    chunks: Vec<Bytes>,
    size: usize,
    trailers: Option<HeaderMap>,
    ended: bool,
    /// It ended before its end: whoever reads so far has to know.
    broken: bool,
    /// Too long: what was there is gone.
    overflowed: bool,
    /// So many of the chunks have been joined, or are not worth it.
    joined: usize,
}

impl Kept {
    /// Keeps a chunk. Small ones are joined: each costs more than its bytes, and a client
    /// chooses how it cuts.
    fn keep(&mut self, data: Bytes) {
        self.size += data.len();
        self.chunks.push(data);
        let new = &self.chunks[self.joined..];
        if new.len() < JOIN_CHUNKS {
            return;
        }
        if new.iter().map(Bytes::len).sum::<usize>() < JOIN_CHUNKS * SMALL_CHUNK {
            let joined = new.concat().into();
            self.chunks.truncate(self.joined);
            self.chunks.push(joined);
        }
        self.joined = self.chunks.len();
    }
}

impl Replay {
    /// Keeps what comes of `incoming`.
    pub fn new(incoming: Incoming, progress: Rc<RequestProgress>) -> Rc<Self> {
        Self::with_limit(incoming, progress, REPLAY_LIMIT)
    }

    /// Keeps at least `limit` bytes of it.
    pub fn with_limit(incoming: Incoming, progress: Rc<RequestProgress>, limit: usize) -> Rc<Self> {
        Rc::new(Self {
            limit: limit.max(REPLAY_LIMIT),
            incoming: RefCell::new(incoming),
            progress,
            kept: RefCell::default(),
            attempt: Cell::new(0),
        })
    }

    /// Whether another try can have all of it.
    pub fn is_whole(&self) -> bool {
        !self.kept.borrow().overflowed && !self.progress.failed.get()
    }

    /// Reads until `want` bytes are there. Returns as many, and whether they are all.
    pub async fn fill(&self, want: usize) -> (Bytes, bool) {
        loop {
            let enough = {
                let kept = self.kept.borrow();
                kept.ended || kept.broken || kept.overflowed || kept.size >= want
            };
            if enough || self.progress.failed.get() {
                break;
            }
            let next =
                poll_fn(|cx| poll_incoming(&mut self.incoming.borrow_mut(), &self.progress, cx));
            let next = next.await;
            let mut kept = self.kept.borrow_mut();
            match next {
                None => kept.ended = true,
                Some(Err(_)) => kept.broken = true,
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => kept.keep(data),
                    Err(frame) => {
                        kept.trailers = frame.into_trailers().ok();
                        kept.ended = true;
                    }
                },
            }
        }
        let ended = self.incoming.borrow().is_end_stream();
        let kept = self.kept.borrow();
        let mut seen = BytesMut::with_capacity(kept.size.min(want));
        for chunk in &kept.chunks {
            let room = want - seen.len();
            seen.extend_from_slice(&chunk[..chunk.len().min(room)]);
        }
        let complete = (kept.ended || ended) && !kept.broken;
        let whole = complete && kept.size <= want && !kept.overflowed;
        (seen.freeze(), whole)
    }

    /// Has all of it copied: what was read already, for somebody who had to see it first, and
    /// what comes from now on.
    pub fn mirror(&self, sender: mpsc::Sender<Piece>) {
        let kept = self.kept.borrow();
        // Dropped without an end, the sender says that it is not all.
        if kept.overflowed || kept.broken {
            return;
        }
        if !kept.chunks.is_empty() {
            // One piece of many, as only so many may wait.
            let seen = match &*kept.chunks {
                [only] => only.clone(),
                many => many.concat().into(),
            };
            if sender.try_send(Piece::Frame(Frame::data(seen))).is_err() {
                return;
            }
        }
        if !kept.ended && !self.incoming.borrow().is_end_stream() {
            self.progress.mirror(sender);
            return;
        }
        if let Some(trailers) = &kept.trailers {
            let _ = sender.try_send(Piece::Frame(Frame::trailers(trailers.clone())));
        }
        let _ = sender.try_send(Piece::End);
    }

    /// The body for one more try; earlier ones end.
    pub fn attempt(self: &Rc<Self>) -> RequestBody {
        self.attempt.set(self.attempt.get() + 1);
        RequestBody::Replay {
            shared: self.clone(),
            attempt: self.attempt.get(),
            at: 0,
        }
    }

    /// The next frame for the try of this number, which has been given `at` chunks.
    pub(super) fn poll_frame(
        &self,
        cx: &mut Context<'_>,
        attempt: u32,
        at: &mut usize,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if attempt != self.attempt.get() {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        let mut kept = self.kept.borrow_mut();
        if let Some(chunk) = kept.chunks.get(*at) {
            *at += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        if kept.broken {
            return Poll::Ready(Some(Err(BodyError::Broken)));
        }
        if kept.ended {
            return Poll::Ready(
                kept.trailers
                    .clone()
                    .map(|t| Ok(Frame::trailers(t)))
                    .filter(|_| {
                        let first = *at == kept.chunks.len();
                        *at += 1;
                        first
                    }),
            );
        }
        let next = ready!(poll_incoming(
            &mut self.incoming.borrow_mut(),
            &self.progress,
            cx
        ));
        match &next {
            None => kept.ended = true,
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    kept.size += data.len();
                    if kept.size > self.limit || kept.chunks.len() >= MAX_CHUNKS {
                        kept.overflowed = true;
                        kept.chunks = Vec::new();
                        kept.joined = 0;
                        *at = 0;
                    }
                    if !kept.overflowed {
                        kept.chunks.push(data.clone());
                        *at += 1;
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    kept.trailers = Some(trailers.clone());
                    kept.ended = true;
                    // Given out below.
                    *at += 1;
                }
            }
            Some(Err(_)) => {}
        }
        Poll::Ready(next)
    }

    /// Whether a try that has been given `at` chunks has been given all.
    pub(super) fn is_end_stream(&self, at: usize) -> bool {
        let kept = self.kept.borrow();
        if at < kept.chunks.len() || kept.broken {
            return false;
        }
        match kept.ended {
            true => kept.trailers.is_none() || at > kept.chunks.len(),
            false => self.incoming.borrow().is_end_stream(),
        }
    }

    /// What is left for a try that has been given `at` chunks.
    pub(super) fn size_hint(&self, at: usize) -> SizeHint {
        let kept = self.kept.borrow();
        let left: usize = kept.chunks.iter().skip(at).map(Bytes::len).sum();
        let incoming = self.incoming.borrow().size_hint();
        match incoming.exact() {
            Some(more) if kept.broken && more == 0 => SizeHint::default(),
            Some(more) => SizeHint::with_exact(left as u64 + more),
            None => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cost_no_more_than_they_hold() {
        let mut kept = Kept::default();
        for n in 0..100_000_u32 {
            kept.keep(Bytes::copy_from_slice(&[(n % 251) as u8]));
        }
        assert_eq!(kept.size, 100_000);
        assert!(kept.chunks.len() < 2000, "{} chunks", kept.chunks.len());
        let whole = kept.chunks.concat();
        let expected: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
        assert!(whole == expected);
        // Large ones stay as they are.
        let mut kept = Kept::default();
        let large = Bytes::from(vec![7; 16 << 10]);
        for _ in 0..JOIN_CHUNKS + 1 {
            kept.keep(large.clone());
        }
        assert_eq!(kept.chunks.len(), JOIN_CHUNKS + 1);
        assert_eq!(kept.chunks[0].as_ptr(), large.as_ptr());
    }
}
