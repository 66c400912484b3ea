//! One request, from its head to the head of its response, in the order in which things
//! happen to it.

use std::rc::Rc;
use std::time::Instant;

use adit_shared::model::WorkloadUid;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::uri::Scheme;
use http::{Request, Response, StatusCode, Version, request};
use hyper::body::{Body as _, Incoming};

use super::body::{RequestBody, RequestProgress, ResponseBody};
use super::destination::Target;
use super::exchange::Exchange;
use super::flags::ResponseFlags;
use super::headers::{self, CLIENT_CERTIFICATE, FORWARDED_PROTO, REQUEST_ID};
use super::http::Downstream;
use super::pick::{self, Picked};
use super::reply::Reply;
use super::upgrade::Upgrade;
use super::upstream::{self, Answer, HttpVersion, Reached};
use crate::state::Protocol;

/// Endpoints that are tried for one request before it has been processed anywhere.
const ATTEMPTS: usize = 3;

/// Answers one request.
pub async fn serve(
    downstream: Rc<Downstream>,
    request: Request<Incoming>,
) -> Response<ResponseBody> {
    let (mut head, incoming) = request.into_parts();
    let grpc = headers::is_grpc(&head.headers);
    let upgrade = headers::wants_upgrade(&head);
    let progress = RequestProgress::new(grpc);
    let mut exchange = Exchange::new(downstream.clone(), &head, grpc, progress.clone());
    let answered = match prepare(&downstream, &mut head, upgrade) {
        Ok(()) => {
            let body = if incoming.is_end_stream() {
                progress.finished.set(true);
                RequestBody::Empty
            } else {
                RequestBody::Stream {
                    incoming,
                    progress: progress.clone(),
                }
            };
            forward(&mut exchange, head, body).await
        }
        Err(reply) => Err(reply),
    };
    let mut response = match answered {
        Ok(answer) => return pass_on(exchange, answer, upgrade),
        Err(reply) => {
            exchange.answer(&reply);
            reply.response(grpc)
        }
    };
    say_last(&exchange, &mut response);
    response.map(|body| body.with_exchange(exchange))
}

/// Brings the head into form and puts in what the mesh says of the request.
fn prepare(downstream: &Downstream, head: &mut request::Parts, upgrade: bool) -> Result<(), Reply> {
    headers::normalise(head, upgrade).map_err(|malformed| malformed.reply())?;
    let headers = &mut head.headers;
    // What the client says of its certificate is nothing; its certificate is known.
    headers.insert(
        CLIENT_CERTIFICATE,
        downstream.caller.certificate_header.clone(),
    );
    if !headers.contains_key(REQUEST_ID) {
        headers.insert(REQUEST_ID, headers::new_request_id());
    }
    if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    Ok(())
}

/// Finds an endpoint and sends the request to it; to another one if that has not processed it.
async fn forward(
    exchange: &mut Exchange,
    head: request::Parts,
    body: RequestBody,
) -> Result<Answer, Reply> {
    let downstream = exchange.downstream.clone();
    let target = downstream.target().ok_or(Reply::GONE)?;
    let version = upstream_version(&target, &head);
    let mut request = Some(Box::new(outgoing(&head, version, body)?));
    exchange.uri = head.uri;
    exchange.headers = head.headers;
    let mut tried: Vec<WorkloadUid> = Vec::new();
    let mut last = Reply::NO_HEALTHY_ENDPOINTS;
    while let Some(sending) = request.take() {
        if tried.len() == ATTEMPTS {
            break;
        }
        let Some(Picked { workload, endpoint }) = pick::endpoint(&target, &tried) else {
            break;
        };
        exchange.endpoint = Some(workload);
        exchange.upstream_host = Some(endpoint.address);
        exchange.sent = Some(Instant::now());
        match upstream::send(&downstream.worker, &endpoint, version, *sending).await {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                last = error.reply;
                exchange.upstream_failure = Some(error.error);
                if error.reached != Reached::Sent {
                    request = error.request;
                }
                tried.push(endpoint.uid.clone());
                exchange.retries = u32::try_from(tried.len()).unwrap_or(u32::MAX);
            }
        }
    }
    Err(last)
}

fn upstream_version(target: &Target, head: &request::Parts) -> HttpVersion {
    let http2 = matches!(target.protocol(), Protocol::Http2 | Protocol::Grpc)
        || head.version == Version::HTTP_2;
    if http2 && !head.headers.contains_key(UPGRADE) {
        HttpVersion::Http2
    } else {
        HttpVersion::Http1
    }
}

/// The request as it goes out.
fn outgoing(
    head: &request::Parts,
    version: HttpVersion,
    body: RequestBody,
) -> Result<Request<RequestBody>, Reply> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method.clone();
    *request.headers_mut() = head.headers.clone();
    *request.uri_mut() = match version {
        HttpVersion::Http1 => head.uri.clone(),
        HttpVersion::Http2 => headers::to_absolute(&head.uri, request.headers_mut(), Scheme::HTTP)
            .map_err(|malformed| malformed.reply())?,
    };
    Ok(request)
}

/// The endpoint's answer, as the client gets it.
fn pass_on(mut exchange: Box<Exchange>, answer: Answer, upgrade: bool) -> Response<ResponseBody> {
    let Answer {
        response,
        lease,
        local,
    } = answer;
    let (mut head, incoming) = response.into_parts();
    exchange.upstream_local = local;
    exchange.upstream_time = exchange.sent.map(|sent| sent.elapsed());
    exchange.status = head.status.as_u16();
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        if !upgrade {
            let reply = Reply::UPSTREAM_PROTOCOL;
            exchange.answer(&reply);
            let response = reply.response(exchange.grpc);
            return response.map(|body| body.with_exchange(exchange));
        }
        let protocol = head.headers.get(UPGRADE).cloned();
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
    headers::remove_hop_by_hop(&mut head.headers);
    if exchange.grpc {
        exchange.see_grpc_status(&head.headers);
    }
    let request = exchange.request.clone();
    let body = ResponseBody::upstream(incoming, Some(lease), request, None);
    let mut response = plain(head, body);
    say_last(&exchange, &mut response);
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
            Self::InvalidPath => "invalid_path",
            Self::TransferEncoding => "unsupported_transfer_encoding",
            Self::AmbiguousLength => "ambiguous_length",
            Self::Connect => "connect_not_supported",
        });
        match self {
            // RFC 9112 6.1.
            Self::TransferEncoding => Reply {
                status: StatusCode::NOT_IMPLEMENTED,
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
