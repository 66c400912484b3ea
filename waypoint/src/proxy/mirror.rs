//! Copies of requests for other backends (RequestMirror). Nobody waits for their answers, and
//! a mirror that does not keep up with a body loses the rest of it: the request itself is
//! never slowed down.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::policy::http::{Claims, HttpFields, normalize};
use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::uri::Scheme;
use http::{HeaderMap, Method, Request, Uri};
use hyper::body::{Body as _, Frame};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tokio::time::timeout;
use tracing::debug;

use super::authorize::{Asked, authorize};
use super::body::{Replay, RequestBody, RequestProgress};
use super::headers;
use super::interim::Follower;
use super::pick::Choice;
use super::tunnel::Caller;
use super::upstream::{self, Connecting, HttpVersion};
use crate::balance::PickRequest;
use crate::state::{Mesh, Protocol, Reach};
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
    /// Its body.
    pub body: OriginalBody<'a>,
    /// Who has sent it.
    pub caller: &'a Rc<Caller>,
    /// What its end user's token says.
    pub claims: Option<&'a Arc<Claims>>,
    /// What holds for the whole mesh.
    pub mesh: &'a Arc<Mesh>,
}

/// The body of what is copied.
pub enum OriginalBody<'a> {
    /// There is none.
    None,
    /// Nothing of it has been read.
    Coming(&'a Rc<RequestProgress>),
    /// Some of it may have been.
    Kept(&'a Replay),
}

/// Sends a copy on its way.
pub fn send(worker: &Rc<Worker>, choice: Choice, protocol: Protocol, original: &Original<'_>) {
    let Some(counted) = worker.open_mirror() else {
        return;
    };
    let (sender, receiver) = mpsc::channel(BEHIND);
    let body = match original.body {
        OriginalBody::None => RequestBody::Empty,
        OriginalBody::Coming(progress) => {
            progress.mirror(sender);
            RequestBody::Mirrored(receiver)
        }
        OriginalBody::Kept(replay) => {
            replay.mirror(sender);
            RequestBody::Mirrored(receiver)
        }
    };
    let mut request = Request::new(body);
    *request.method_mut() = original.method.clone();
    *request.headers_mut() = original.headers.clone();
    if original.mesh.shadow_host_suffix {
        let host = request.headers().get(HOST).and_then(|h| h.to_str().ok());
        let shadow = host.map(|host| match host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => format!("{name}-shadow:{port}"),
            _ => format!("{host}-shadow"),
        });
        if let Some(Ok(shadow)) = shadow.map(HeaderValue::try_from) {
            request.headers_mut().insert(HOST, shadow);
        }
    }
    let host = request.headers().get(HOST).cloned();
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
    let copy = Copied {
        caller: original.caller.clone(),
        claims: original.claims.cloned(),
        mesh: original.mesh.clone(),
        host,
        version,
    };
    let worker = worker.clone();
    spawn_local(async move {
        let carrying = carry(&worker, &choice, &copy, request);
        let carried = timeout(DEADLINE, carrying).await;
        match carried {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!("mirror: {error}"),
            Err(_) => debug!("mirror: not answered within {DEADLINE:?}"),
        }
        drop(counted);
    });
}

/// What is known of a copy.
struct Copied {
    caller: Rc<Caller>,
    claims: Option<Arc<Claims>>,
    mesh: Arc<Mesh>,
    host: Option<HeaderValue>,
    version: HttpVersion,
}

impl Copied {
    /// The policies of the endpoint itself, which knows no difference between a request and a
    /// copy. A provider of external authorization is not asked for copies.
    fn authorize(&self, reach: &Reach, request: &Request<RequestBody>) -> Result<(), String> {
        let Some(policies) = &reach.policies else {
            return Ok(());
        };
        let mesh = &*self.mesh;
        let path = normalize(request.uri().path(), mesh.path_normalization);
        let path = path.map_err(|error| error.to_string())?;
        let host = self.host.as_ref().and_then(|host| host.to_str().ok());
        let asked = Asked {
            caller: &self.caller,
            destination: reach.endpoint.address,
            server_name: None,
            mesh,
        };
        let request = asked.request(Some(HttpFields {
            method: request.method().as_str(),
            path: &path,
            query: request.uri().query(),
            host: host.unwrap_or_default(),
            headers: request.headers(),
            claims: self.claims.as_deref(),
        }));
        authorize(policies, &request, &mesh.trust).map_err(|denied| denied.error)?;
        let checks = policies.custom(&request, &mesh.trust);
        match checks.iter().find(|check| !check.dry_run) {
            Some(check) => Err(format!("policy {} asks a provider", check.policy)),
            None => Ok(()),
        }
    }
}

async fn carry(
    worker: &Worker,
    choice: &Choice,
    copy: &Copied,
    request: Request<RequestBody>,
) -> Result<(), String> {
    let picked = choice.pick(&PickRequest::default());
    let picked = picked.map_err(|(_, error)| error.to_string())?;
    copy.authorize(&picked.reach, &request)?;
    let endpoint = picked.reach.endpoint.of_caller(&copy.caller);
    let connecting = Connecting::default();
    let (version, nobody) = (copy.version, Follower::NOBODY);
    let sending = upstream::send(worker, &endpoint, version, request, &connecting, nobody);
    let answer = sending.await;
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
