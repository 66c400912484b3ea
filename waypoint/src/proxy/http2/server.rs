//! Serves HTTP/2 on a tunnel, with the limits and deadlines of a proxy.
//!
//! Each request has a task, which answers it and sends its response; it ends with its stream,
//! so that what a client resets is not worked on.

use std::future::{Future as _, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, SendResponse};
use h2::{Reason, RecvStream};
use http::header::EXPECT;
use http::{Method, Request};
use http_body::Body as _;
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tracing::debug;

use super::keepalive::Keepalive;
use super::pipe::Pipe;
use super::stream::Stream;
use super::wire::Wire;
use super::{Before, content_length, remove_connection_headers, set_content_length};
use crate::proxy::http::{Closing, Downstream, MAX_HEADER_LIST, MAX_STREAMS};
use crate::proxy::incoming::Incoming;
use crate::proxy::io::Io;
use crate::proxy::request::{self, Asker};

/// So many bytes of headers more than are allowed are read, so that it is us who refuse them:
/// what is beyond h2 answers with 431 itself and tells nobody.
const ANSWERED: u32 = 16 << 10;
/// Bytes that a stream may send before we take any.
const STREAM_WINDOW: u32 = 64 << 10;
/// The same for all streams of a connection.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Bytes of responses that wait in one stream.
const SEND_BUFFER: usize = 64 << 10;
/// Resets that a client may have outstanding before we take them for an attack
/// (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 20;
/// Resets for its own errors that a client may provoke.
const MAX_ERROR_RESETS: usize = 100;
/// How often a connection is asked whether it lives. The tunnel below has its own PING; this
/// one is for the client behind the other proxy.
const PING_INTERVAL: Duration = Duration::from_secs(60);
/// How long it may take to answer.
const PING_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves HTTP/2 until the connection ends.
pub async fn serve(downstream: Rc<Downstream>, io: Io) {
    let (wire, heard) = Wire::new(io);
    let handshake = Builder::new()
        .max_header_list_size(MAX_HEADER_LIST + ANSWERED)
        .max_concurrent_streams(MAX_STREAMS)
        // RFC 8441.
        .enable_connect_protocol()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
        .handshake::<_, Bytes>(wire);
    let mut handshake = pin!(handshake);
    let shaken = poll_fn(|cx| {
        if downstream.closing() == Closing::Now {
            return Poll::Ready(None);
        }
        downstream.remember(cx.waker());
        handshake.as_mut().poll(cx).map(Some)
    });
    let mut connection = match shaken.await {
        None => return,
        Some(Ok(connection)) => connection,
        Some(Err(error)) => return debug!(client = %downstream.client, "HTTP/2: {error}"),
    };
    let ping = connection.ping_pong();
    let mut keepalive = Keepalive::new(ping, heard, PING_INTERVAL, PING_TIMEOUT);
    let mut told = false;
    let served = poll_fn(|cx| {
        match downstream.closing() {
            Closing::Open => {}
            Closing::Graceful if told => {}
            Closing::Graceful => {
                told = true;
                connection.graceful_shutdown();
            }
            Closing::Now => return Poll::Ready(Ok(())),
        }
        while let Poll::Ready(next) = connection.poll_accept(cx) {
            match next {
                Some(Ok((request, respond))) => {
                    // Boxed: tokio moves a task's future about, at its beginning and its end.
                    spawn_local(Box::pin(answer(downstream.clone(), request, respond)));
                }
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Ok(())),
            }
        }
        if let Some(keepalive) = &mut keepalive
            && keepalive.poll_dead(cx, false).is_ready()
        {
            debug!(client = %downstream.client, "HTTP/2: PING was not answered");
            return Poll::Ready(Ok(()));
        }
        downstream.remember(cx.waker());
        Poll::Pending
    })
    .await;
    if let Err(error) = served {
        debug!(client = %downstream.client, "HTTP/2: {error}");
    }
}

/// Answers one request. Ends without an answer when its client resets it.
async fn answer(
    downstream: Rc<Downstream>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (head, recv) = request.into_parts();
    let before = Before::default();
    let head_only = head.method == Method::HEAD;
    let length = content_length(&head.headers);
    let (incoming, connect) = if head.method == Method::CONNECT {
        if length.is_some_and(|length| length != 0) {
            return respond.send_reset(Reason::PROTOCOL_ERROR);
        }
        let (hand_over, stream) = oneshot::channel();
        (Incoming::Empty, Some((hand_over, stream, recv)))
    } else {
        let expects = head.headers.get(EXPECT);
        let expects =
            expects.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        let expects = expects.then(|| before.clone());
        (Incoming::request(recv, length, expects), None)
    };
    let (connect, stream) = match connect {
        Some((hand_over, stream, recv)) => (Some((hand_over, recv)), Some(stream)),
        None => (None, None),
    };
    let asker = Asker::Http2 {
        before: before.clone(),
        stream,
    };
    let response = {
        let request = Request::from_parts(head, incoming);
        let mut serving = pin!(request::serve(downstream, request, asker));
        poll_fn(|cx| {
            let served = serving.as_mut().poll(cx);
            if (served.is_pending() || before.is_waiting()) && respond.poll_reset(cx).is_ready() {
                return Poll::Ready(None);
            }
            if served.is_pending() {
                before.send(&mut respond, cx);
            }
            served.map(Some)
        })
        .await
    };
    let Some(response) = response else {
        return;
    };
    before.finish(&mut respond);
    let (mut head, body) = response.into_parts();
    remove_connection_headers(&mut head.headers);
    let empty = body.is_end_stream();
    if !empty && let Some(length) = body.size_hint().exact() {
        set_content_length(&mut head.headers, length);
    }
    let agreed = connect.filter(|_| head.status.is_success());
    let last = (empty || head_only) && agreed.is_none();
    let head = http::Response::from_parts(head, ());
    let send = match respond.send_response(head, last) {
        Ok(send) => send,
        // The stream has ended, or a route has made headers that cannot be sent.
        Err(error) => {
            debug!("HTTP/2 response: {error}");
            return respond.send_reset(Reason::INTERNAL_ERROR);
        }
    };
    if let Some((hand_over, recv)) = agreed {
        // Dropped where nobody takes it over, it is reset.
        let _ = hand_over.send(Stream::new(send, recv));
    } else if !empty && head_only {
        body.leave_out();
    } else if !last && let Err(error) = Pipe::new(body, send, Reason::INTERNAL_ERROR).await {
        debug!("HTTP/2 response: {error}");
    }
}
