//! Informational responses (1xx, RFC 9110 15.2) of an endpoint on their way to the client: what
//! comes before a response, such as 103 with links to load meanwhile.
//!
//! A [`Follower`] takes those of either version from the endpoint and gives them to the client,
//! in either version. What an attempt has told stays told if the request is tried again.
//!
//! hyper tells of those that an endpoint sends over HTTP/1, but its servers send none of their
//! own choice but 100. So they are written to the client's connection of HTTP/1 here, past
//! hyper, between two of its messages: [`Wire`] knows when hyper holds nothing back, and the
//! response waits ([`Interim::finish`]) until what was to precede it has gone.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT, HeaderMap};
use http::{Request, StatusCode, Version};
use hyper::rt::{Read, ReadBufCursor, Write};
use parking_lot::Mutex;
use tracing::debug;

use super::exchange::Exchange;
use super::headers::remove_hop_by_hop;
use super::http2::Before;
use super::io::Io;

/// Bytes of informational responses that wait for their client. What is more is dropped, as it
/// may be: none of them has to arrive.
const MAX_WAITING: usize = 32 << 10;

/// Passes on what an endpoint sends before its response to one request.
#[derive(Clone)]
pub struct Follower {
    to: To,
    /// The client gets 100 from us, as soon as its body is asked for.
    continued: bool,
}

#[derive(Clone)]
enum To {
    Nobody,
    /// The request of this turn.
    Http1(Interim, u64),
    Http2(Before),
}

impl Follower {
    /// Drops all.
    pub const NOBODY: Self = Self {
        to: To::Nobody,
        continued: false,
    };

    /// To whoever sent `exchange`'s request. `has_body`: it comes with one.
    pub fn of(exchange: &Exchange, has_body: bool) -> Self {
        let to = match &exchange.before {
            Some(before) => To::Http2(before.clone()),
            // HTTP/1.0 knows nothing that comes before a response (RFC 9110 15.2).
            None if exchange.version != Version::HTTP_11 => To::Nobody,
            None => {
                let interim = &exchange.downstream.interim;
                To::Http1(interim.clone(), interim.0.lock().turn)
            }
        };
        Self {
            to,
            continued: has_body && exchange.headers.contains_key(EXPECT),
        }
    }

    /// Has those to a request over HTTP/1 passed on.
    pub fn follow<B>(&self, request: &mut Request<B>) {
        if matches!(self.to, To::Nobody) {
            return;
        }
        let follower = self.clone();
        hyper::ext::on_informational(request, move |response| {
            follower.pass(response.status(), response.headers().clone());
        });
    }

    /// Passes one on.
    pub fn pass(&self, status: StatusCode, headers: HeaderMap) {
        if self.continued && status == StatusCode::CONTINUE {
            return;
        }
        match &self.to {
            To::Nobody => {}
            To::Http1(interim, turn) => interim.push(*turn, status, headers),
            To::Http2(before) => before.push(status, headers),
        }
    }
}

/// The informational responses for one connection of HTTP/1.
///
/// Shared with hyper's client, which wants something that may be sent between threads; it never
/// is, and the lock is never held by two.
#[derive(Clone, Default)]
pub struct Interim(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Counts the requests of the connection: what comes for another than the current one is
    /// late and means nothing.
    turn: u64,
    waiting: BytesMut,
    /// Who writes them.
    writer: Option<Waker>,
    /// Who waits until they are written.
    response: Option<Waker>,
}

impl Interim {
    fn push(&self, turn: u64, status: StatusCode, mut headers: HeaderMap) {
        let mut state = self.0.lock();
        if state.turn != turn {
            return;
        }
        remove_hop_by_hop(&mut headers);
        // There is no body (RFC 9110 8.6).
        headers.remove(CONTENT_LENGTH);
        let size: usize = headers
            .iter()
            .map(|(n, v)| n.as_str().len() + v.len() + 4)
            .sum();
        if state.waiting.len() + size + 64 > MAX_WAITING {
            debug!("too much before a response: {status} is not passed on");
            return;
        }
        let waiting = &mut state.waiting;
        waiting.extend_from_slice(b"HTTP/1.1 ");
        waiting.extend_from_slice(status.as_str().as_bytes());
        waiting.extend_from_slice(b" ");
        waiting.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
        waiting.extend_from_slice(b"\r\n");
        for (name, value) in &headers {
            waiting.extend_from_slice(name.as_str().as_bytes());
            waiting.extend_from_slice(b": ");
            waiting.extend_from_slice(value.as_bytes());
            waiting.extend_from_slice(b"\r\n");
        }
        waiting.extend_from_slice(b"\r\n");
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
    }

    /// The response to the current request is there: waits until what came before it has been
    /// written. Nothing more is taken for this request.
    pub async fn finish(&self) {
        self.0.lock().turn += 1;
        poll_fn(|cx| {
            let mut state = self.0.lock();
            if state.waiting.is_empty() {
                return Poll::Ready(());
            }
            state.response = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// What is to be written now. `waker` is woken when there is more.
    fn take(&self, waker: &Waker) -> Bytes {
        let mut state = self.0.lock();
        if state.waiting.is_empty() {
            match &state.writer {
                Some(known) if known.will_wake(waker) => {}
                _ => state.writer = Some(waker.clone()),
            }
            return Bytes::new();
        }
        if let Some(response) = state.response.take() {
            response.wake();
        }
        state.waiting.split().freeze()
    }
}

/// A client's stream, on which whole messages can be put between those that hyper writes.
pub struct Wire {
    io: Io,
    interim: Interim,
    /// Everything that hyper had to write has been written: it flushes when its buffer is empty.
    between: bool,
    /// A message of ours of which a part may have been written. It goes before anything else.
    ours: Bytes,
}

impl Wire {
    /// `io`, with what comes of `interim`.
    pub fn new(io: Io, interim: Interim) -> Self {
        Self {
            io,
            interim,
            between: true,
            ours: Bytes::new(),
        }
    }

    /// Whether hyper holds nothing back that belongs before what it writes next.
    pub fn is_between(&self) -> bool {
        self.between && self.ours.is_empty()
    }

    /// Writes `message` in place of what hyper is about to write.
    pub fn replace(&mut self, message: Bytes) {
        self.ours = message;
    }

    /// The stream below.
    pub fn io(&mut self) -> &mut Io {
        &mut self.io
    }

    /// The stream, when hyper has done with it.
    pub fn into_io(self) -> Io {
        self.io
    }

    /// Writes the informational responses that wait. Ready when one has been taken up, so that
    /// its response may follow; pending when there is none, or when hyper is in the middle of a
    /// message, after which this has to be called again.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_ours(cx))?;
        if !self.between {
            return Poll::Pending;
        }
        self.ours = self.interim.take(cx.waker());
        if self.ours.is_empty() {
            return Poll::Pending;
        }
        let _ = self.poll_ours(cx)?;
        Poll::Ready(Ok(()))
    }

    fn poll_ours(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.ours.is_empty() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.ours))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.ours.advance(n),
            }
            if self.ours.is_empty() {
                // A socket below has nothing to flush that would have to be waited for here.
                let _ = Pin::new(&mut self.io).poll_flush(cx)?;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Read for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_ours(cx))?;
        self.between = false;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_ours(cx))?;
        self.between = true;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_ours(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
