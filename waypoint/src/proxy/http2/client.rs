//! A connection of HTTP/2 to an endpoint, and requests on it.
//!
//! What trips it: GOAWAY and REFUSED_STREAM, which say that a request was not looked at; a peer
//! that is silent (PING); a request that is given up, which is reset (CANCEL).

use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::keepalive::Keepalive;
use super::pipe::{Pipe, PipeError};
use super::stream::Stream;
use super::wire::Wire;
use super::{content_length, remove_connection_headers, set_content_length};
use crate::proxy::body::{BodyError, RequestBody};
use crate::proxy::incoming::Incoming;
use crate::proxy::interim::Follower;
use crate::proxy::io::Io;

/// Streams on one connection, if the endpoint allows that many.
pub const MAX_STREAMS: usize = 100;
/// Bytes of a response's headers.
const MAX_HEADER_LIST: u32 = 64 << 10;
/// Bytes that a stream may send before the client has taken any.
const STREAM_WINDOW: u32 = 64 << 10;
/// The same for all streams of a connection: none can starve another.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS as u32;
/// Bytes of requests that wait in one stream.
const SEND_BUFFER: usize = 64 << 10;
/// Resets for its own errors that an endpoint may provoke.
const MAX_ERROR_RESETS: usize = 1024;
/// How often an endpoint is asked whether it lives, while something is asked of it.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// How long it may take to answer.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection. When it is dropped and its last stream is gone it says GOAWAY and closes.
pub struct Connection {
    sender: RefCell<SendRequest<Bytes>>,
    shared: Rc<Shared>,
}

/// What a connection and its task share.
struct Shared {
    /// Requests under way.
    live: Cell<usize>,
    /// Bodies of requests that are still sent after their response has begun.
    uploads: Cell<usize>,
    /// Woken when the endpoint may have said something of itself.
    told: Notify,
}

/// What came of a request.
pub enum Answered {
    /// A response.
    Response(Response<Incoming>),
    /// Consent to an extended CONNECT.
    Stream(Response<Incoming>, Box<Stream>),
}

/// Why there is no response.
pub enum Failed {
    /// The connection takes no more requests. Nothing of this one was sent.
    Unsent(Box<Request<RequestBody>>, h2::Error),
    /// The request's body failed.
    Body(BodyError),
    /// The stream or the connection did.
    Http2(h2::Error),
}

impl Connection {
    /// Sends the preface and starts the connection's task. `done` is dropped when it ends.
    ///
    /// # Errors
    /// When the stream fails. It does not wait for the endpoint.
    pub async fn handshake<D: 'static>(io: Io, done: D) -> Result<Self, h2::Error> {
        let (wire, heard) = Wire::new(io);
        let (sender, mut connection) = Builder::new()
            .enable_push(false)
            .initial_max_send_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADER_LIST)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buffer_size(SEND_BUFFER)
            .max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
            .handshake::<_, Bytes>(wire)
            .await?;
        let shared = Rc::new(Shared {
            live: Cell::new(0),
            uploads: Cell::new(0),
            told: Notify::new(),
        });
        let ping = connection.ping_pong();
        let mut keepalive = Keepalive::new(ping, heard, PING_INTERVAL, PING_TIMEOUT);
        let told = shared.clone();
        spawn_local(async move {
            let ended = poll_fn(|cx| {
                let ended = Pin::new(&mut connection).poll(cx);
                told.told.notify_waiters();
                if ended.is_ready() {
                    return ended;
                }
                let idle = told.live.get() == 0 && told.uploads.get() == 0;
                if let Some(keepalive) = &mut keepalive
                    && keepalive.poll_dead(cx, idle).is_ready()
                {
                    debug!("upstream HTTP/2: PING was not answered");
                    return Poll::Ready(Ok(()));
                }
                Poll::Pending
            });
            if let Err(error) = ended.await {
                debug!("upstream HTTP/2: {error}");
            }
            drop(done);
        });
        Ok(Self {
            sender: RefCell::new(sender),
            shared,
        })
    }
    /// Whether it takes no more requests.
    pub fn is_closed(&self) -> bool {
        // This handle has no stream that it would have to wait for.
        let waker = Waker::noop();
        let ready = self
            .sender
            .borrow_mut()
            .poll_ready(&mut Context::from_waker(waker));
        matches!(ready, Poll::Ready(Err(_)))
    }

    /// Requests under way.
    pub fn live(&self) -> usize {
        self.shared.live.get()
    }

    /// Whether one more may be.
    pub fn has_room(&self) -> bool {
        let allowed = self.sender.borrow().current_max_send_streams();
        self.live() < allowed.min(MAX_STREAMS)
    }

    /// Counts one.
    pub fn enter(&self) {
        self.shared.live.set(self.live() + 1);
    }

    /// It has ended. Returns how many others are under way.
    pub fn leave(&self) -> usize {
        let live = self.live().saturating_sub(1);
        self.shared.live.set(live);
        live
    }

    /// Whether the endpoint takes extended CONNECT. Its settings are the first that it sends
    /// (RFC 9113 3.4), and are waited for until then.
    pub async fn takes_connect(&self, until: Instant) -> bool {
        loop {
            let told = self.shared.told.notified();
            if self.sender.borrow().is_extended_connect_protocol_enabled() {
                return true;
            }
            if timeout_at(until, told).await.is_err() {
                return false;
            }
        }
    }

    /// Sends a request and waits for its response. What comes before that goes to `follower`.
    ///
    /// # Errors
    /// [`Failed`].
    pub async fn send(
        &self,
        request: Request<RequestBody>,
        follower: &Follower,
    ) -> Result<Answered, Failed> {
        // A handle of its own: h2 has each wait for the stream that it has opened last.
        let mut sender = self.sender.borrow().clone();
        let ready = sender.poll_ready(&mut Context::from_waker(Waker::noop()));
        if let Poll::Ready(Err(error)) = ready {
            return Err(Failed::Unsent(Box::new(request), error));
        }
        let (head, body) = request.into_parts();
        let mut request = Request::from_parts(head, ());
        let headers = request.headers_mut();
        remove_connection_headers(headers);
        if let Some(length) = body.size_hint().exact()
            && (length != 0 || says_what_it_sends(request.method()))
        {
            set_content_length(request.headers_mut(), length);
        }
        let connect = request.method() == Method::CONNECT;
        let empty = body.is_end_stream();
        let sent = sender.send_request(request, empty && !connect);
        let (response, stream) = sent.map_err(Failed::Http2)?;
        drop(sender);
        if connect {
            return consent(response, stream, follower).await;
        }
        let mut sending = Sending {
            response,
            upload: (!empty).then(|| Pipe::new(body, stream, Reason::CANCEL)),
            failed: None,
            follower,
        };
        let response = poll_fn(|cx| sending.poll(cx)).await?;
        // What the endpoint does not wait for goes on beside its response.
        let upload = sending.upload.map(|upload| {
            let uploading = Uploading::new(&self.shared);
            let task = spawn_local(async move {
                let _uploading = uploading;
                if let Err(error) = upload.await {
                    debug!("upstream HTTP/2, after the response: {error}");
                }
            });
            task.abort_handle()
        });
        let length = content_length(response.headers());
        let response = response.map(|recv| Incoming::response(recv, length, upload));
        Ok(Answered::Response(response))
    }
}

/// Counts what is sent of a request after its response has begun.
struct Uploading(Rc<Shared>);

impl Uploading {
    fn new(shared: &Rc<Shared>) -> Self {
        shared.uploads.set(shared.uploads.get() + 1);
        Self(shared.clone())
    }
}

impl Drop for Uploading {
    fn drop(&mut self) {
        self.0.uploads.set(self.0.uploads.get().saturating_sub(1));
    }
}

/// A request under way, and what is being sent of its body.
struct Sending<'a> {
    response: ResponseFuture,
    upload: Option<Pipe<RequestBody>>,
    failed: Option<BodyError>,
    follower: &'a Follower,
}

impl Sending<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<RecvStream>, Failed>> {
        if let Some(upload) = &mut self.upload
            && let Poll::Ready(sent) = Pin::new(upload).poll(cx)
        {
            self.upload = None;
            match sent {
                Ok(()) => {}
                Err(PipeError::Body(error)) => self.failed = Some(error),
                // What the endpoint answers says more.
                Err(error) => debug!("upstream HTTP/2, request: {error}"),
            }
        }
        let response = ready!(poll_response(&mut self.response, self.follower, cx));
        Poll::Ready(response.map_err(|error| match self.failed.take() {
            Some(failed) => Failed::Body(failed),
            None => Failed::Http2(error),
        }))
    }
}

/// The response, and before it what comes before it.
fn poll_response(
    response: &mut ResponseFuture,
    follower: &Follower,
    cx: &mut Context<'_>,
) -> Poll<Result<Response<RecvStream>, h2::Error>> {
    while let Some(before) = ready!(response.poll_informational(cx)) {
        let (head, ()) = before?.into_parts();
        // HTTP/2 has none of these (RFC 9113 8.6).
        if head.status != StatusCode::SWITCHING_PROTOCOLS {
            follower.pass(head.status, head.headers);
        }
    }
    Pin::new(response).poll(cx)
}

/// The answer to an extended CONNECT.
async fn consent(
    mut response: ResponseFuture,
    mut stream: SendStream<Bytes>,
    follower: &Follower,
) -> Result<Answered, Failed> {
    let response = poll_fn(|cx| poll_response(&mut response, follower, cx)).await;
    let (head, recv) = response.map_err(Failed::Http2)?.into_parts();
    let length = content_length(&head.headers);
    if head.status != StatusCode::OK {
        let incoming = Incoming::response(recv, length, None);
        return Ok(Answered::Response(Response::from_parts(head, incoming)));
    }
    if length.is_some_and(|length| length != 0) {
        stream.send_reset(Reason::PROTOCOL_ERROR);
        return Err(Failed::Http2(Reason::PROTOCOL_ERROR.into()));
    }
    let stream = Box::new(Stream::new(stream, recv));
    let response = Response::from_parts(head, Incoming::Empty);
    Ok(Answered::Stream(response, stream))
}

/// Whether a request of this method without a body says so by a length of 0 (RFC 9110 8.6).
fn says_what_it_sends(method: &Method) -> bool {
    !matches!(
        *method,
        Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT
    )
}
