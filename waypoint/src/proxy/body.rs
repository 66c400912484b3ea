//! Bodies on their way: counted, passed on frame by frame, never collected beyond what a
//! retry may need.

use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep_until};

use super::exchange::Exchange;
use super::headers::clean_trailers;
use super::http::{BODY_DEADLINE, IDLE_TIMEOUT};
use super::incoming::Incoming;
use super::mirror::Piece;
use super::recheck::Recheck;
use super::upstream::Lease;

/// Bytes of a request's body that are kept for another try. A longer body is sent once.
pub const REPLAY_LIMIT: usize = 64 << 10;

/// Pieces of a body that are kept: many small ones cost more than their sum.
const MAX_CHUNKS: usize = 4096;
/// Of what is shown to others before it is sent, so many small pieces are made one.
const JOIN_CHUNKS: usize = 64;
/// What counts as small, on the average.
const SMALL_CHUNK: usize = 1 << 10;

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Its source failed (HTTP/1).
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// Its source failed (HTTP/2).
    #[error(transparent)]
    Http2(#[from] h2::Error),
    /// More of them than of headers.
    #[error("the trailers are too large")]
    Trailers,
    /// The client's side failed while it was looked at before.
    #[error("the client has not sent all of it")]
    Broken,
    /// Another try has taken its place.
    #[error("superseded by another attempt")]
    Superseded,
    /// The client sends nothing more of it.
    #[error("the client has stopped sending")]
    Stalled,
    /// The request's time is over.
    #[error("the request's time is over")]
    Timeout,
    /// A policy that has changed denies it.
    #[error("denied by a policy that has changed")]
    Denied,
}

impl BodyError {
    /// What it was on a stream of HTTP/2.
    pub fn reason(&self) -> Option<h2::Reason> {
        match self {
            Self::Http2(error) => error.reason(),
            _ => None,
        }
    }
}

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

/// Finds the beginnings of gRPC messages in a stream of bytes: five bytes of prefix, the last
/// four of which are the length.
#[derive(Debug, Default)]
pub struct MessageCounter {
    prefix: u8,
    length: u32,
    skip: u64,
}

impl MessageCounter {
    /// How many messages begin in `data`.
    pub fn count(&mut self, mut data: &[u8]) -> u64 {
        let mut messages = 0;
        while !data.is_empty() {
            if self.skip > 0 {
                let n = (self.skip).min(data.len() as u64);
                self.skip -= n;
                // At most the length of `data`.
                data = &data[n as usize..];
                continue;
            }
            if self.prefix > 0 {
                self.length = (self.length << 8) | u32::from(data[0]);
            }
            self.prefix += 1;
            data = &data[1..];
            if self.prefix == 5 {
                messages += 1;
                self.skip = u64::from(self.length);
                self.prefix = 0;
                self.length = 0;
            }
        }
        messages
    }
}

/// The body of a request towards an endpoint.
pub enum RequestBody {
    /// None.
    Empty,
    /// Passed on once.
    Stream {
        /// From the client.
        incoming: Incoming,
        /// What is known of it.
        progress: Rc<RequestProgress>,
    },
    /// Kept, as long as it is short, to be sent again.
    Replay {
        /// What all tries share.
        shared: Rc<Replay>,
        /// Which try this is.
        attempt: u32,
        /// The next of the kept chunks.
        at: usize,
    },
    /// One piece.
    Full(Option<Bytes>),
    /// A copy of another request's.
    Mirrored(mpsc::Receiver<Piece>),
}

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

    fn poll_frame(
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
}

fn poll_incoming(
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

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Stream { incoming, progress } => poll_incoming(incoming, progress, cx),
            Self::Replay {
                shared,
                attempt,
                at,
            } => shared.poll_frame(cx, *attempt, at),
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Mirrored(pieces) => Poll::Ready(match ready!(pieces.poll_recv(cx)) {
                Some(Piece::Frame(frame)) => Some(Ok(frame)),
                Some(Piece::End) => None,
                None => Some(Err(BodyError::Superseded)),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Stream { incoming, .. } => incoming.is_end_stream(),
            Self::Replay { shared, at, .. } => {
                let kept = shared.kept.borrow();
                if *at < kept.chunks.len() || kept.broken {
                    return false;
                }
                match kept.ended {
                    true => kept.trailers.is_none() || *at > kept.chunks.len(),
                    false => shared.incoming.borrow().is_end_stream(),
                }
            }
            Self::Full(bytes) => bytes.is_none(),
            Self::Mirrored(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Stream { incoming, .. } => incoming.size_hint(),
            Self::Replay { shared, at, .. } => {
                let kept = shared.kept.borrow();
                let left: usize = kept.chunks.iter().skip(*at).map(Bytes::len).sum();
                let incoming = shared.incoming.borrow().size_hint();
                match incoming.exact() {
                    Some(more) if kept.broken && more == 0 => SizeHint::default(),
                    Some(more) => SizeHint::with_exact(left as u64 + more),
                    None => SizeHint::default(),
                }
            }
            Self::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Mirrored(_) => SizeHint::default(),
        }
    }
}

/// The body of a response towards the client. Dropped, it ends its exchange.
pub struct ResponseBody {
    kind: Kind,
    /// Ends with the body.
    exchange: Option<Box<Exchange>>,
    recheck: Recheck,
}

enum Kind {
    Empty,
    Full(Bytes),
    Upstream {
        incoming: Incoming,
        /// Goes back into the pool when the body has been read.
        lease: Option<Lease>,
        /// Whether the request has been sent, without which the connection is of no use.
        request: Rc<RequestProgress>,
        /// The request's whole time.
        deadline: Option<Pin<Box<Sleep>>>,
    },
}

impl ResponseBody {
    /// No body.
    pub fn empty() -> Self {
        Self {
            kind: Kind::Empty,
            exchange: None,
            recheck: Recheck::default(),
        }
    }

    /// One piece.
    pub fn full(bytes: Bytes) -> Self {
        Self {
            kind: Kind::Full(bytes),
            exchange: None,
            recheck: Recheck::default(),
        }
    }

    /// What an endpoint sends.
    pub fn upstream(
        incoming: Incoming,
        lease: Option<Lease>,
        request: Rc<RequestProgress>,
        deadline: Option<Pin<Box<Sleep>>>,
    ) -> Self {
        let mut body = Self {
            kind: Kind::Upstream {
                incoming,
                lease,
                request,
                deadline,
            },
            exchange: None,
            recheck: Recheck::default(),
        };
        body.settle();
        body
    }

    /// Has `exchange` end with this body.
    pub fn with_exchange(mut self, exchange: Box<Exchange>) -> Self {
        self.exchange = Some(exchange);
        if self.is_end_stream() {
            self.finish();
        }
        self
    }

    /// The endpoint's connection is free as soon as the last of its body has been read.
    fn settle(&mut self) {
        if let Kind::Upstream {
            incoming,
            lease,
            request,
            ..
        } = &mut self.kind
            && incoming.is_end_stream()
            && let Some(lease) = lease.take()
            && request.finished.get()
        {
            lease.give_back();
        }
    }

    /// It is not sent, as the response to HEAD has none, and ends its exchange as if it were.
    pub fn leave_out(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        if let Some(exchange) = self.exchange.take() {
            exchange.finish();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let mut frame = match &mut this.kind {
            Kind::Empty => None,
            Kind::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                (!bytes.is_empty()).then(|| Ok(Frame::data(bytes)))
            }
            Kind::Upstream {
                incoming, deadline, ..
            } => match Pin::new(incoming).poll_frame(cx) {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    if let Some(deadline) = deadline
                        && deadline.as_mut().poll(cx).is_ready()
                    {
                        Some(Err(BodyError::Timeout))
                    } else if let Some(exchange) = &mut this.exchange
                        && let Poll::Ready(denied) = this.recheck.poll_denied(exchange, cx)
                    {
                        exchange.policy = denied.policy;
                        Some(Err(BodyError::Denied))
                    } else {
                        return Poll::Pending;
                    }
                }
            },
        };
        match &mut frame {
            None => {
                this.settle();
                this.finish();
            }
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    clean_trailers(trailers);
                }
                if let Some(exchange) = &mut this.exchange {
                    if let Some(data) = frame.data_ref() {
                        exchange.see_response(data);
                    } else if let Some(trailers) = frame.trailers_ref() {
                        exchange.see_trailers(trailers);
                    }
                }
                this.settle();
                if this.is_end_stream() {
                    this.finish();
                }
            }
            Some(Err(error)) => {
                if let Some(exchange) = this.exchange.take() {
                    exchange.fail_body(error);
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Full(bytes) => bytes.is_empty(),
            Kind::Upstream { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Upstream { incoming, .. } => incoming.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn messages_are_counted_wherever_they_are_cut() {
        let mut stream = Vec::new();
        for length in [0_u32, 3, 300] {
            stream.push(0);
            stream.extend_from_slice(&length.to_be_bytes());
            stream.extend(std::iter::repeat_n(7, length as usize));
        }
        for size in [1, 2, 4, 7, 1000] {
            let mut counter = MessageCounter::default();
            let messages: u64 = stream.chunks(size).map(|chunk| counter.count(chunk)).sum();
            assert_eq!(messages, 3, "in pieces of {size}");
        }
    }

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
