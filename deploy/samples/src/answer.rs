//! What the server answers over HTTP: its own name and version, the request as it came,
//! and who asked; or what the path or a fault asks for.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use serde::Serialize;

use crate::collector::{SPANS, Spans};
use crate::fault::{Counters, Fault};
use crate::{grpc, websocket};

/// Request bodies that are read.
const MAX_BODY: usize = 16 * 1024 * 1024;
/// `/bytes/<n>`.
const MAX_BYTES: u64 = 16 * 1024 * 1024 * 1024;
/// `/delay/<ms>`.
const MAX_DELAY: u64 = 600_000;

/// An error is the end of the connection.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Who answers.
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) counters: Counters,
    pub(crate) spans: Spans,
}

/// What every answer says.
#[derive(Serialize)]
struct Answer<'a> {
    name: &'a str,
    version: &'a str,
    method: &'a str,
    path: &'a str,
    authority: Option<&'a str>,
    protocol: String,
    headers: BTreeMap<String, Vec<String>>,
    /// The caller that a waypoint vouches for, by `x-forwarded-client-cert`.
    identity: Option<String>,
    body_bytes: usize,
    trailers: BTreeMap<String, Vec<String>>,
    peer: SocketAddr,
    local: SocketAddr,
}

impl Server {
    pub(crate) fn new(name: String, version: String) -> Self {
        Self {
            name,
            version,
            counters: Counters::default(),
            spans: Spans::default(),
        }
    }

    /// A response that says who made it.
    pub(crate) fn respond(&self, status: StatusCode, body: Body) -> Response<Body> {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        for (name, value) in [
            ("x-adit-sample", &self.name),
            ("x-adit-version", &self.version),
        ] {
            if let Ok(value) = HeaderValue::from_str(value) {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}

/// Answers one request.
pub(crate) async fn answer(
    server: Rc<Server>,
    request: Request<Incoming>,
    peer: SocketAddr,
    local: SocketAddr,
) -> Response<Body> {
    let fault = Fault::of(
        request.headers(),
        request.uri().query(),
        (&server.name, &server.version),
        &server.counters,
    );
    if let Some(delay) = fault.delay {
        tokio::time::sleep(delay).await;
    }
    if fault.abort {
        let broken = futures_util::stream::once(async { Err(std::io::Error::other("abort")) });
        return server.respond(StatusCode::OK, StreamBody::new(broken).boxed_unsync());
    }
    if grpc::is_grpc(request.headers()) {
        return grpc::answer(server, request, peer, &fault);
    }
    if let Some(status) = fault.status {
        return server.respond(status, full(Bytes::from_static(b"fault injected\n")));
    }
    if websocket::is_upgrade(request.headers()) {
        return websocket::upgrade(&server, request);
    }
    let path = request.uri().path().to_owned();
    let mut status = StatusCode::OK;
    if let Some(millis) = number(&path, "/delay/") {
        tokio::time::sleep(Duration::from_millis(millis.min(MAX_DELAY))).await;
    } else if let Some(code) = number(&path, "/status/") {
        let code = u16::try_from(code).ok();
        status = code
            .and_then(|code| StatusCode::from_u16(code).ok())
            .filter(|status| !status.is_informational())
            .unwrap_or(StatusCode::BAD_REQUEST);
    } else if let Some(count) = number(&path, "/bytes/") {
        return zeros(&server, count.min(MAX_BYTES));
    } else if path == "/echo" {
        return echo(&server, request).await;
    } else if path == "/stream" {
        return relay(&server, request);
    } else if path == SPANS {
        return server.respond(StatusCode::OK, full(server.spans.json().into()));
    }
    describe(&server, request, status, peer, local).await
}

/// The request as it came, as JSON, and its query's `trailer=name:value` as trailers.
async fn describe(
    server: &Server,
    request: Request<Incoming>,
    status: StatusCode,
    peer: SocketAddr,
    local: SocketAddr,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let (mut body_bytes, mut trailers) = (0, HeaderMap::new());
    if !body.is_end_stream() {
        match Limited::new(body, MAX_BODY).collect().await {
            Ok(body) => {
                trailers = body.trailers().cloned().unwrap_or_default();
                body_bytes = body.to_bytes().len();
            }
            Err(error) => return too_large(server, &error.to_string()),
        }
    }
    let answer = Answer {
        name: &server.name,
        version: &server.version,
        method: parts.method.as_str(),
        path: parts.uri.path_and_query().map_or("/", |p| p.as_str()),
        authority: parts.uri.authority().map(|a| a.as_str()),
        protocol: format!("{:?}", parts.version),
        identity: identity(&parts.headers),
        headers: headers(&parts.headers),
        body_bytes,
        trailers: headers(&trailers),
        peer,
        local,
    };
    // Strings and addresses always have a JSON form.
    let text = serde_json::to_vec(&answer).unwrap_or_default();
    let trailers = wanted_trailers(parts.uri.query().unwrap_or_default());
    let names = trailers.keys().map(HeaderName::as_str);
    let names: Vec<&str> = names.collect();
    let announced = HeaderValue::from_str(&names.join(", "));
    let body = match trailers.is_empty() {
        true => full(text.into()),
        false => {
            let frames = [Frame::data(Bytes::from(text)), Frame::trailers(trailers)];
            StreamBody::new(futures_util::stream::iter(frames.map(Ok))).boxed_unsync()
        }
    };
    let mut response = server.respond(status, body);
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    if let Ok(announced) = announced
        && !announced.is_empty()
    {
        // RFC 9110 6.6.2; hyper sends trailers of HTTP/1.1 only when they are announced.
        response.headers_mut().insert(header::TRAILER, announced);
    }
    response
}

/// `trailer=name:value` of a query.
fn wanted_trailers(query: &str) -> HeaderMap {
    let parts = query
        .split('&')
        .filter_map(|part| part.strip_prefix("trailer="));
    parts
        .filter_map(|part| {
            let (name, value) = part.split_once(':')?;
            Some((
                HeaderName::try_from(name).ok()?,
                HeaderValue::from_str(value).ok()?,
            ))
        })
        .collect()
}

/// The body as it came, when it is complete, with its trailers.
async fn echo(server: &Server, request: Request<Incoming>) -> Response<Body> {
    let kind = request.headers().get(header::CONTENT_TYPE).cloned();
    match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => {
            let trailers = body.trailers().cloned();
            let data = Frame::data(body.to_bytes());
            let frames = std::iter::once(data).chain(trailers.map(Frame::trailers));
            let frames = futures_util::stream::iter(frames.map(Ok).collect::<Vec<_>>());
            let mut response =
                server.respond(StatusCode::OK, StreamBody::new(frames).boxed_unsync());
            if let Some(kind) = kind {
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
            }
            response
        }
        Err(error) => too_large(server, &error.to_string()),
    }
}

/// The body frame by frame, while it comes.
fn relay(server: &Server, request: Request<Incoming>) -> Response<Body> {
    let body = request.into_body().map_err(std::io::Error::other);
    server.respond(StatusCode::OK, body.boxed_unsync())
}

fn too_large(server: &Server, text: &str) -> Response<Body> {
    let body = full(Bytes::from(text.to_owned()));
    server.respond(StatusCode::PAYLOAD_TOO_LARGE, body)
}

/// `URI=` of Envoy's `x-forwarded-client-cert`: the last element is the nearest proxy's.
fn identity(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("x-forwarded-client-cert")?.to_str().ok()?;
    let last = value.rsplit(',').next()?;
    let mut fields = last
        .split(';')
        .filter_map(|field| field.trim().split_once('='));
    let uri = fields.find(|(key, _)| key.eq_ignore_ascii_case("uri"))?.1;
    Some(uri.trim_matches('"').to_owned())
}

fn number(path: &str, prefix: &str) -> Option<u64> {
    path.strip_prefix(prefix)?.parse().ok()
}

pub(crate) fn headers(all: &HeaderMap) -> BTreeMap<String, Vec<String>> {
    let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in all {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        map.entry(name.to_string()).or_default().push(value);
    }
    map
}

pub(crate) fn full(bytes: Bytes) -> Body {
    Full::new(bytes)
        .map_err(|never: Infallible| match never {})
        .boxed_unsync()
}

fn zeros(server: &Server, count: u64) -> Response<Body> {
    const CHUNK: usize = 64 * 1024;
    let chunk = Bytes::from_static(&[0; CHUNK]);
    let frames = futures_util::stream::unfold(count, move |left| {
        let size = left.min(CHUNK as u64);
        let frame = chunk.slice(..size as usize);
        async move { (size > 0).then(|| (Ok(Frame::data(frame)), left - size)) }
    });
    let body = StreamBody::new(frames).boxed_unsync();
    let mut response = server.respond(StatusCode::OK, body);
    let length = HeaderValue::from(count);
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, length);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_paths() {
        assert_eq!(number("/delay/12", "/delay/"), Some(12));
        assert_eq!(number("/delay/x", "/delay/"), None);
        assert_eq!(number("/other", "/delay/"), None);
    }

    #[test]
    fn the_caller_of_the_nearest_proxy() {
        let mut headers = HeaderMap::new();
        assert_eq!(identity(&headers), None);
        let text = "By=x;URI=spiffe://a/ns/n/sa/one,By=y;URI=\"spiffe://a/ns/n/sa/two\"";
        headers.insert("x-forwarded-client-cert", HeaderValue::from_static(text));
        assert_eq!(
            identity(&headers).as_deref(),
            Some("spiffe://a/ns/n/sa/two")
        );
    }

    #[test]
    fn trailers_of_a_query() {
        let trailers = wanted_trailers("a=b&trailer=x-sum:12&trailer=nothing");
        assert_eq!(trailers.len(), 1);
        assert_eq!(trailers["x-sum"], "12");
    }
}
