//! One request, from its head to the head of its response, in the order in which things
//! happen to it.

use std::borrow::Cow;
use std::rc::Rc;

use adit_shared::policy::http::{HttpFields, NormalizedPath, normalize};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderValue, UPGRADE, WWW_AUTHENTICATE};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version, request};
use http_body::Body as _;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::authorize::{Asked, authorize};
use super::body::{RequestBody, RequestProgress, ResponseBody};
use super::destination::Target;
use super::exchange::Exchange;
use super::external::{self, Ask};
use super::forward::{self, Forwarded, Plan, Refused};
use super::headers::{self, CLIENT_CERTIFICATE, FORWARDED_PROTO};
use super::http::Downstream;
use super::http2::{self, Before};
use super::incoming::Incoming;
use super::reply::Reply;
use super::routing::{self, Routing};
use super::steps;
use super::upgrade::Upgrade;
use super::upstream;
use super::websocket;
use crate::authentication::{AuthenticationSet, Unauthenticated};
use crate::external_authorization::Denial;
use crate::route::Answer;
use crate::state::View;
use crate::telemetry::{ResponseFlags, TraceContext, ensure_request_id};

/// What is known of the client's side of a request beside its message.
pub enum Asker {
    /// It is the current one of its connection.
    Http1,
    /// It has a stream.
    Http2 {
        /// What goes before its response.
        before: Before,
        /// What a CONNECT becomes when it is agreed to.
        stream: Option<oneshot::Receiver<http2::stream::Stream>>,
    },
}

/// Answers one request.
pub async fn serve(
    downstream: Rc<Downstream>,
    request: Request<Incoming>,
    asker: Asker,
) -> Response<ResponseBody> {
    let (mut head, incoming) = request.into_parts();
    let grpc = headers::is_grpc(&head.headers);
    let (before, stream) = match asker {
        Asker::Http1 => (None, None),
        Asker::Http2 { before, stream } => (Some(before), stream),
    };
    let stream = stream.filter(|_| websocket::from_extended_connect(&mut head));
    let upgrade = match stream {
        Some(stream) => Asks::Stream(stream),
        None if headers::wants_upgrade(&head) => Asks::Connection,
        None => Asks::Nothing,
    };
    let upgrades = !matches!(upgrade, Asks::Nothing);
    let progress = RequestProgress::new(grpc);
    let mut exchange = Exchange::new(downstream, &head, grpc, progress.clone());
    exchange.before = before;
    let body = if incoming.is_end_stream() {
        progress.finished.set(true);
        RequestBody::Empty
    } else {
        RequestBody::Stream { incoming, progress }
    };
    let mut response = match handle(&mut exchange, head, body, upgrades).await {
        Ok(Handled::Forwarded(forwarded)) => return pass_on(exchange, forwarded, upgrade),
        Ok(Handled::Answered(answer)) => {
            let mut response = routing::respond(&mut exchange, *answer);
            for change in &exchange.response_changes {
                change.apply(response.headers_mut());
            }
            response
        }
        Ok(Handled::Denied(denial)) => {
            let mut response = external::respond(&mut exchange, *denial);
            // A page of another origin may only read the answer if CORS says so.
            if let Some(routed) = &exchange.routed {
                routed.apply_response(response.headers_mut());
            }
            response
        }
        Ok(Handled::Unauthenticated(refused)) => unauthenticated(&mut exchange, *refused),
        Err(reply) => {
            exchange.answer(&reply);
            let mut response = reply.response(grpc);
            if let Some(routed) = &exchange.routed {
                routed.apply_response(response.headers_mut());
            }
            response
        }
    };
    say_last(&exchange, &mut response);
    if exchange.method == Method::HEAD {
        leave_body_out(&mut response);
    }
    response.map(|body| body.with_exchange(exchange))
}

/// Makes our own answer one to HEAD, which says how long its body would be (RFC 9110 9.3.2).
/// Dropped by whoever sends the response, the body would look like one that its client has not
/// waited for.
fn leave_body_out(response: &mut Response<ResponseBody>) {
    let length = response.body().size_hint().exact();
    if let Some(length) = length.filter(|length| *length > 0) {
        let headers = response.headers_mut();
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    *response.body_mut() = ResponseBody::empty();
}

/// Counts and logs a request that could not be read, and was refused with `reply`.
pub fn refused(downstream: &Rc<Downstream>, reply: &Reply) {
    let mut request = Request::new(());
    // As Envoy's log has what is not known.
    if let Ok(unknown) = Method::from_bytes(b"-") {
        *request.method_mut() = unknown;
    }
    let (head, ()) = request.into_parts();
    let progress = RequestProgress::new(false);
    let mut exchange = Exchange::new(downstream.clone(), &head, false, progress);
    if let (_, Some(target)) = downstream.target() {
        exchange.addressed(&target);
    }
    exchange.answer(reply);
    exchange.finish();
}

/// What a client wants to become another protocol.
enum Asks {
    Nothing,
    /// Its connection (HTTP/1).
    Connection,
    /// Its stream (HTTP/2), which is this one then.
    Stream(oneshot::Receiver<http2::stream::Stream>),
}

/// What a request has come to.
#[expect(
    clippy::large_enum_variant,
    reason = "the large one is what nearly all requests come to; a box would cost each of them"
)]
enum Handled {
    /// An endpoint has answered.
    Forwarded(Forwarded),
    /// The configuration answers.
    Answered(Box<Answer>),
    /// A provider of external authorization does.
    Denied(Box<Denial>),
    /// An end user's token is no good.
    Unauthenticated(Box<Unauthenticated>),
}

/// Everything that happens before the endpoint's answer.
async fn handle(
    exchange: &mut Exchange,
    mut head: request::Parts,
    mut body: RequestBody,
    upgrade: bool,
) -> Result<Handled, Reply> {
    let downstream = exchange.downstream.clone();
    headers::normalise(&mut head, upgrade).map_err(|malformed| {
        // Whoever sent this and we may not agree where it ends; hyper's own refusals end their
        // connections too. A stream of HTTP/2 has its end for itself.
        // After a CONNECT hyper has no answer left to close with.
        if !downstream.is_http2() && malformed != headers::Malformed::Connect {
            downstream.drain();
        }
        malformed.reply()
    })?;
    let asks = {
        let (view, target) = downstream.target();
        // Logged and sent from here on, whatever becomes of it.
        let target = target.inspect(|target| exchange.addressed(target));
        exchange.note("destination", || steps::destination(&view, target.as_ref()));
        trace(exchange, &mut head);
        introduce(&downstream, &mut head);
        let asks = match &target {
            Some(target) => look_at(exchange, &view, target, &mut head),
            None => Err(Reply::GONE),
        };
        let asks = asks.inspect_err(|_| exchange.headers = std::mem::take(&mut head.headers))?;
        match asks {
            Look::Ask(asks) => asks,
            Look::Authenticate(set) => {
                drop(view);
                let authenticator = &downstream.worker.authenticator;
                match Box::pin(authenticator.authenticate(&set, &mut head)).await {
                    Ok(claims) => {
                        exchange.claims = claims;
                        exchange.note(
                            "authentication",
                            || json!({ "result": "passed", "token": exchange.claims.is_some() }),
                        );
                    }
                    Err(refused) => {
                        exchange.note(
                            "authentication",
                            || json!({ "result": "refused", "reason": refused.reason.to_string() }),
                        );
                        exchange.headers = head.headers;
                        return Ok(Handled::Unauthenticated(Box::new(refused)));
                    }
                }
                let (view, target) = downstream.target();
                match &target {
                    Some(target) => custom(exchange, &view, target, &mut head),
                    None => Err(Reply::GONE),
                }
                .inspect_err(|_| exchange.headers = std::mem::take(&mut head.headers))?
            }
        }
    };
    if !asks.is_empty() {
        let asking = external::check(exchange, &mut head, &mut body, asks);
        let asked = Box::pin(asking).await;
        exchange.note("externalAuthorization", || {
            steps::external(exchange, asked.is_ok())
        });
        if let Err(denial) = asked {
            exchange.headers = head.headers;
            return Ok(Handled::Denied(denial));
        }
    }
    let (mut decided, mut mesh) = {
        // Anew: asking took its time.
        let (view, target) = downstream.target();
        let decided = match &target {
            Some(target) => decide(exchange, &view, target, &mut head),
            None => Err(Reply::GONE),
        };
        (decided, view.mesh().clone())
    };
    exchange.note("route", || steps::route(exchange, &decided));
    if let Ok(Routing::Ask(asking)) = decided {
        // Boxed: few rules have that.
        let checking = external::check_rule(exchange, &mut head, &mut body, &asking);
        let asked = Box::pin(checking).await;
        exchange.note("routeExternalAuthorization", || {
            steps::external(exchange, asked.is_ok())
        });
        if let Err(refused) = asked {
            exchange.headers = head.headers;
            exchange.routed = Some(asking.routed);
            return match refused {
                Refused::Reply(reply) => Err(reply),
                Refused::Denied(denial) => Ok(Handled::Denied(denial)),
            };
        }
        let (view, target) = downstream.target();
        decided = match &target {
            Some(target) => routing::resume(exchange, &view, target, *asking, &mut head),
            None => Err(Reply::GONE),
        };
        mesh = view.mesh().clone();
        exchange.note("authorizedRoute", || steps::route(exchange, &decided));
    }
    let uri = std::mem::take(&mut head.uri);
    exchange.headers = head.headers;
    let plan = match decided? {
        Routing::Forward(decided) => Ok(Plan::new(mesh, uri, decided)),
        Routing::Answer { delay, answer } => Err((delay, answer)),
        // It was asked, and asks once.
        Routing::Ask(_) => return Err(Reply::INVALID_ROUTE),
    };
    match plan {
        Ok(plan) => {
            if let Some(delay) = plan.delay() {
                sleep(delay).await;
            }
            match forward::forward(exchange, plan, body).await {
                Ok(forwarded) => Ok(Handled::Forwarded(forwarded)),
                Err(Refused::Reply(reply)) => Err(reply),
                Err(Refused::Denied(denial)) => Ok(Handled::Denied(denial)),
            }
        }
        Err((delay, answer)) => {
            if let Some(delay) = delay {
                sleep(delay).await;
            }
            Ok(Handled::Answered(Box::new(answer)))
        }
    }
}

/// What has to be waited for before a request can be judged.
enum Look {
    /// The check of its tokens.
    Authenticate(AuthenticationSet),
    /// What these say.
    Ask(Vec<Ask>),
}

/// Normalises the path, and finds what has to be waited for.
fn look_at(
    exchange: &mut Exchange,
    view: &View,
    target: &Target,
    head: &mut request::Parts,
) -> Result<Look, Reply> {
    normal_path(view, head)?;
    if !target.authentication().is_empty() {
        return Ok(Look::Authenticate(target.authentication().clone()));
    }
    custom(exchange, view, target, head).map(Look::Ask)
}

/// Whom CUSTOM policies want to be asked.
fn custom(
    exchange: &mut Exchange,
    view: &View,
    target: &Target,
    head: &mut request::Parts,
) -> Result<Vec<Ask>, Reply> {
    let path = normal_path(view, head)?;
    let policies = target.policies();
    if policies.is_empty() {
        return Ok(Vec::new());
    }
    let caller = exchange.downstream.caller.clone();
    let destination = exchange.downstream.destination.dialled();
    let asked = Asked {
        caller: &caller,
        destination: destination.unwrap_or(caller.peer),
        server_name: None,
        mesh: view.mesh(),
    };
    let request = asked.request(Some(fields(exchange, head, &path)));
    let checks = policies.custom(&request, &view.mesh().trust);
    Ok(checks.iter().map(Ask::from).collect())
}

/// Authorization and route: everything that is decided without waiting for anybody.
fn decide(
    exchange: &mut Exchange,
    view: &View,
    target: &Target,
    head: &mut request::Parts,
) -> Result<Routing, Reply> {
    let path = normal_path(view, head)?;
    let policies = target.policies();
    if !policies.is_empty() {
        let caller = exchange.downstream.caller.clone();
        let destination = exchange.downstream.destination.dialled();
        let asked = Asked {
            caller: &caller,
            destination: destination.unwrap_or(caller.peer),
            server_name: None,
            mesh: view.mesh(),
        };
        let request = asked.request(Some(fields(exchange, head, &path)));
        let judged = authorize(policies, &request, &view.mesh().trust);
        exchange.note("authorization", || steps::authorization(&judged));
        if let Err(denied) = judged {
            exchange.policy = denied.policy;
            return Err(Reply::DENIED);
        }
    }
    exchange.allowed(view, target);
    routing::route(exchange, view, target, head, &path)
}

/// Makes the path comparable; the request goes on with it.
///
/// # Errors
/// It is none.
pub fn normal_path(
    view: &View,
    head: &mut request::Parts,
) -> Result<NormalizedPath<'static>, Reply> {
    let mode = view.mesh().path_normalization;
    let path = normalize(head.uri.path(), mode)
        .map_err(|_| Reply::bad_request("invalid_path"))?
        .into_owned();
    if path.as_str() != head.uri.path() {
        let text: Cow<'_, str> = match head.uri.query() {
            Some(query) => format!("{}?{query}", path.as_str()).into(),
            None => path.as_str().into(),
        };
        let changed = PathAndQuery::try_from(&*text);
        let changed = changed.map_err(|_| Reply::bad_request("invalid_path"))?;
        head.uri = Uri::from(changed);
    }
    Ok(path)
}

/// The HTTP part of what policies are asked.
fn fields<'a>(
    exchange: &'a Exchange,
    head: &'a request::Parts,
    path: &'a NormalizedPath<'a>,
) -> HttpFields<'a> {
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    HttpFields {
        method: head.method.as_str(),
        path,
        query: head.uri.query(),
        host: host.unwrap_or_default(),
        headers: &head.headers,
        claims: exchange.claims.as_deref(),
    }
}

/// The answer to a request with a token that is no good.
fn unauthenticated(exchange: &mut Exchange, refused: Unauthenticated) -> Response<ResponseBody> {
    let reply = Reply {
        status: refused.status,
        ..Reply::UNAUTHENTICATED
    };
    exchange.answer(&reply);
    exchange.upstream_failure = Some(refused.reason.to_string());
    let mut response = reply.response(exchange.grpc);
    if let Some(challenge) = refused.www_authenticate {
        response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    }
    if !exchange.grpc {
        *response.body_mut() = ResponseBody::full(refused.reason.to_string().into());
    }
    response
}

/// Finds or begins the request's trace, and gives it an id.
fn trace(exchange: &mut Exchange, head: &mut request::Parts) {
    let random: [u64; 3] = rand::random();
    ensure_request_id(&mut head.headers, [random[2], random[0]]);
    if let Some(telemetry) = &exchange.telemetry {
        let tracing = &telemetry.tracing;
        exchange.trace = TraceContext::begin(
            &mut head.headers,
            tracing.sampling,
            !tracing.no_propagation && !tracing.providers.is_empty(),
            random,
        );
    }
}

/// Puts in what the mesh says of the request.
fn introduce(downstream: &Downstream, head: &mut request::Parts) {
    let headers = &mut head.headers;
    // What the client says of its certificate is nothing; its certificate is known.
    headers.insert(
        CLIENT_CERTIFICATE,
        downstream.caller.certificate_header.clone(),
    );
    if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    // HTTP/1.0 may leave it out; who was dialled is all that it can mean (RFC 9112 3.2).
    if !headers.contains_key(HOST)
        && let Ok(host) = HeaderValue::try_from(downstream.destination.host())
    {
        headers.insert(HOST, host);
    }
}

/// The endpoint's answer, as the client gets it.
fn pass_on(
    mut exchange: Box<Exchange>,
    forwarded: Forwarded,
    upgrade: Asks,
) -> Response<ResponseBody> {
    let Forwarded {
        answer,
        deadline,
        headers: added,
    } = forwarded;
    let upstream::Answer {
        response,
        lease,
        local,
        ..
    } = answer;
    let (mut head, incoming) = response.into_parts();
    exchange.upstream_local = local;
    exchange.status = head.status.as_u16();
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        if lease.is_http2() {
            websocket::accept(&exchange.headers, &mut head.headers);
        }
        let accepted = websocket::is_accepted(&exchange.headers, &head.headers);
        match upgrade {
            Asks::Connection => {
                // By a server of HTTP/2 it is not said again.
                let asked = exchange.headers.get(UPGRADE);
                let protocol = head.headers.get(UPGRADE).or(asked).cloned();
                headers::remove_hop_by_hop(&mut head.headers);
                head.headers
                    .insert(CONNECTION, HeaderValue::from_static("upgrade"));
                if let Some(protocol) = protocol {
                    head.headers.insert(UPGRADE, protocol);
                }
                let downstream = exchange.downstream.clone();
                let upgrade = Upgrade { lease, exchange };
                downstream.upgrade.replace(Some(upgrade));
                return plain(head, ResponseBody::empty());
            }
            Asks::Stream(stream) if accepted => {
                headers::remove_hop_by_hop(&mut head.headers);
                websocket::clean(&mut head.headers);
                head.status = StatusCode::OK;
                exchange.status = head.status.as_u16();
                let upgrade = Upgrade { lease, exchange };
                spawn_local(upgrade.carry_stream(stream));
                return plain(head, ResponseBody::empty());
            }
            _ => return unexpected(exchange),
        }
    }
    // To a CONNECT this would be consent.
    if matches!(upgrade, Asks::Stream(_)) && head.status.is_success() {
        return unexpected(exchange);
    }
    headers::remove_hop_by_hop(&mut head.headers);
    if exchange.grpc {
        exchange.see_grpc_status(&head.headers);
    }
    if let Some(routed) = &exchange.routed {
        routed.apply_response(&mut head.headers);
    }
    for change in &exchange.response_changes {
        change.apply(&mut head.headers);
    }
    for (name, value) in added {
        head.headers.append(name, value);
    }
    if exchange.wants_response_headers() {
        exchange.response_headers = head.headers.clone();
    }
    let request = exchange.request.clone();
    let body = ResponseBody::upstream(incoming, Some(lease), request, deadline);
    let mut response = plain(head, body);
    say_last(&exchange, &mut response);
    response.map(|body| body.with_exchange(exchange))
}

/// The endpoint has answered what was not asked.
fn unexpected(mut exchange: Box<Exchange>) -> Response<ResponseBody> {
    let reply = Reply::UPSTREAM_PROTOCOL;
    exchange.answer(&reply);
    let response = reply.response(exchange.grpc);
    response.map(|body| body.with_exchange(exchange))
}

/// A response without what hyper has put into the endpoint's.
fn plain(head: http::response::Parts, body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}

/// Tells the client of HTTP/1 that this was the last response, if it was.
fn say_last(exchange: &Exchange, response: &mut Response<ResponseBody>) {
    if exchange.version != Version::HTTP_2 && exchange.downstream.is_closing() {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
}

impl headers::Malformed {
    /// What the client is told.
    fn reply(self) -> Reply {
        let reply = Reply::bad_request(match self {
            Self::MissingHost => "missing_host",
            Self::DuplicateHost => "duplicate_host",
            Self::InvalidHost => "invalid_host",
            Self::DifferentHosts => "different_hosts",
            Self::InvalidPath => "invalid_path",
            Self::TransferEncoding => "unsupported_transfer_encoding",
            Self::AmbiguousLength => "ambiguous_length",
            Self::TooManyHeaders => "too_many_headers",
            Self::HeadersTooLarge => "headers_too_large",
            Self::Connect => "connect_not_supported",
        });
        match self {
            // RFC 9112 6.1.
            Self::TransferEncoding => Reply {
                status: StatusCode::NOT_IMPLEMENTED,
                ..reply
            },
            Self::TooManyHeaders | Self::HeadersTooLarge => Reply {
                status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                ..reply
            },
            Self::Connect => Reply {
                status: StatusCode::METHOD_NOT_ALLOWED,
                flags: ResponseFlags::NO_ROUTE,
                ..reply
            },
            _ => reply,
        }
    }
}
