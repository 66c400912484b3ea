//! Copies of requests for other backends (RequestMirror). Nobody waits for their answers, and
//! a mirror that does not keep up with a body loses the rest of it: the request itself is
//! never slowed down.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::uri::Scheme;
use http::{HeaderMap, Method, Request, Uri};
use hyper::body::{Body as _, Frame};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::timeout;
use tracing::debug;

use super::body::{RequestBody, RequestProgress};
use super::headers;
use super::pick::Choice;
use super::tunnel::Caller;
use super::upstream::{self, Connecting, HttpVersion};
use crate::balance::PickRequest;
use crate::state::Protocol;
use crate::worker::Worker;

/// Frames of a body that a mirror may lie behind.
const BEHIND: usize = 64;
/// Copies that a worker has under way; more are not made.
pub const MAX_MIRRORS: usize = 1024;
/// How long a copy and its answer may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// What is copied.
pub struct Original<'a> {
    /// Method.
    pub method: &'a Method,
    /// Path and query as they are sent.
    pub uri: &'a Uri,
    /// Headers as they are sent.
    pub headers: &'a HeaderMap,
    /// Its body; `None`: it has none.
    pub body: Option<&'a Rc<RequestProgress>>,
    /// Who has sent it.
    pub caller: &'a Rc<Caller>,
    /// The host is marked as that of a copy.
    pub shadow: bool,
}

/// Sends a copy on its way.
pub fn send(worker: &Rc<Worker>, choice: Choice, protocol: Protocol, original: &Original<'_>) {
    let Some(counted) = worker.open_mirror() else {
        return;
    };
    let body = match original.body {
        None => RequestBody::Empty,
        Some(progress) => {
            let (sender, receiver) = mpsc::channel(BEHIND);
            progress.mirror(sender);
            RequestBody::Mirrored(receiver)
        }
    };
    let mut request = Request::new(body);
    *request.method_mut() = original.method.clone();
    *request.headers_mut() = original.headers.clone();
    if original.shadow {
        let host = request.headers().get(HOST).and_then(|h| h.to_str().ok());
        let shadow = host.map(|host| match host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => format!("{name}-shadow:{port}"),
            _ => format!("{host}-shadow"),
        });
        if let Some(Ok(shadow)) = shadow.map(HeaderValue::try_from) {
            request.headers_mut().insert(HOST, shadow);
        }
    }
    let version = match protocol {
        Protocol::Http2 | Protocol::Grpc => HttpVersion::Http2,
        _ => HttpVersion::Http1,
    };
    *request.uri_mut() = match version {
        HttpVersion::Http1 => original.uri.clone(),
        HttpVersion::Http2 => {
            match headers::to_absolute(original.uri, request.headers_mut(), Scheme::HTTP) {
                Ok(uri) => uri,
                Err(_) => return,
            }
        }
    };
    let (worker, caller) = (worker.clone(), original.caller.clone());
    spawn_local(async move {
        let carrying = carry(&worker, &choice, &caller, version, request);
        let carried = timeout(DEADLINE, carrying).await;
        match carried {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!("mirror: {error}"),
            Err(_) => debug!("mirror: not answered within {DEADLINE:?}"),
        }
        drop(counted);
    });
}

async fn carry(
    worker: &Worker,
    choice: &Choice,
    caller: &Caller,
    version: HttpVersion,
    request: Request<RequestBody>,
) -> Result<(), String> {
    let picked = choice.pick(&PickRequest::default());
    let picked = picked.map_err(|(_, error)| error.to_string())?;
    let endpoint = picked.reach.endpoint.of_caller(caller);
    let connecting = Connecting::default();
    let answer = upstream::send(worker, &endpoint, version, request, &connecting).await;
    let answer = answer.map_err(|error| error.error)?;
    let mut body = answer.response.into_body();
    while let Some(frame) =
        std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await
    {
        frame.map_err(|error| error.to_string())?;
    }
    answer.lease.give_back();
    Ok(())
}

/// What a mirror gets of a body.
pub enum Piece {
    /// A frame.
    Frame(Frame<Bytes>),
    /// There is no more.
    End,
}
