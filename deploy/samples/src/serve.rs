//! The server: HTTP/1.1, HTTP/2 with prior knowledge and gRPC on one port, told apart by
//! the first bytes. It answers with what it knows: its own name, the request, and who
//! asked.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use clap::Args;
use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use prost::Message;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::echo::{self, EchoRequest, EchoResponse};
use crate::socket::listen;
use crate::tcp;

/// Request bodies that are echoed.
const MAX_BODY: usize = 16 * 1024 * 1024;
/// `/bytes/<n>`.
const MAX_BYTES: u64 = 16 * 1024 * 1024 * 1024;
/// `/delay/<ms>`.
const MAX_DELAY: u64 = 600_000;
/// How long open requests may go on after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Options of `serve`.
#[derive(Args)]
pub(crate) struct Options {
    /// HTTP/1.1, HTTP/2 and gRPC
    #[arg(long, default_value = "[::]:8080", env = "HTTP_ADDRESS")]
    http: SocketAddr,
    /// Raw TCP: echo
    #[arg(long, default_value = "[::]:9090", env = "TCP_ADDRESS")]
    tcp: SocketAddr,
    /// Raw TCP: reads and throws away
    #[arg(long, default_value = "[::]:9091", env = "SINK_ADDRESS")]
    sink: SocketAddr,
    /// Raw TCP: sends zeros until the client closes
    #[arg(long, default_value = "[::]:9092", env = "SOURCE_ADDRESS")]
    source: SocketAddr,
    /// A line that the echo port sends first (server-first protocols)
    #[arg(long, env = "GREETING")]
    greeting: Option<String>,
    /// Name that answers carry
    #[arg(long, env = "POD_NAME")]
    name: Option<String>,
    /// Version that answers carry
    #[arg(long, default_value = "v1", env = "VERSION")]
    version: String,
}

struct Server {
    name: String,
    version: String,
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
    peer: SocketAddr,
    local: SocketAddr,
}

/// Serves until SIGTERM or SIGINT.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let name = match options.name {
        Some(name) => name,
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")?
            .trim()
            .to_owned(),
    };
    let http = listen(options.http)?;
    let echo = listen(options.tcp)?;
    let sink = listen(options.sink)?;
    let source = listen(options.source)?;
    let server = Arc::new(Server {
        name,
        version: options.version,
    });
    println!(
        "{} serves HTTP on {}, TCP on {}, a sink on {}, a source on {}",
        server.name, options.http, options.tcp, options.sink, options.source
    );
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async move {
            let (stop, stopping) = watch::channel(false);
            tokio::task::spawn_local(tcp::serve(echo, tcp::Mode::Echo(options.greeting)));
            tokio::task::spawn_local(tcp::serve(sink, tcp::Mode::Sink));
            tokio::task::spawn_local(tcp::serve(source, tcp::Mode::Source));
            let mut open = JoinSet::new();
            tokio::select! {
                () = accept(http, server, &mut open, stopping) => {}
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.send_replace(true);
            // Requests that are answered in time are answered; the rest is cut.
            let all = async { while open.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(GRACE, all).await;
        })
        .await;
    Ok(())
}

async fn accept(
    listener: TcpListener,
    server: Arc<Server>,
    open: &mut JoinSet<()>,
    stopping: watch::Receiver<bool>,
) {
    loop {
        while open.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: waiting is all that helps.
                eprintln!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some((peer, local)) = addresses(&stream) else {
            continue;
        };
        let server = server.clone();
        let service = service_fn(move |request| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(answer(&server, request, peer, local).await) }
        });
        // TCP_NODELAY only speeds things up.
        let _ = stream.set_nodelay(true);
        let mut stopping = stopping.clone();
        open.spawn_local(async move {
            let builder = auto::Builder::new(TokioExecutor::new());
            let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
            // Here and below: a client that goes away is no news.
            tokio::select! {
                _ = connection.as_mut() => return,
                _ = stopping.wait_for(|stop| *stop) => {}
            }
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        });
    }
}

/// Peer and own address; none when the peer has gone already.
pub(crate) fn addresses(stream: &TcpStream) -> Option<(SocketAddr, SocketAddr)> {
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let peer = stream.peer_addr().ok()?;
    Some((canonical(peer), canonical(stream.local_addr().ok()?)))
}

async fn answer(
    server: &Server,
    request: Request<Incoming>,
    peer: SocketAddr,
    local: SocketAddr,
) -> Response<Body> {
    let grpc = request
        .headers()
        .get(http::header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    if grpc {
        return answer_grpc(server, request, peer).await;
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
        return zeros(server, count.min(MAX_BYTES));
    } else if path == "/echo" {
        let kind = request.headers().get(http::header::CONTENT_TYPE).cloned();
        return match Limited::new(request.into_body(), MAX_BODY).collect().await {
            Ok(body) => {
                let mut response = respond(server, StatusCode::OK, full(body.to_bytes()));
                if let Some(kind) = kind {
                    response
                        .headers_mut()
                        .insert(http::header::CONTENT_TYPE, kind);
                }
                response
            }
            Err(error) => {
                let text = Bytes::from(error.to_string());
                respond(server, StatusCode::PAYLOAD_TOO_LARGE, full(text))
            }
        };
    }
    let (parts, _) = request.into_parts();
    let answer = Answer {
        name: &server.name,
        version: &server.version,
        method: parts.method.as_str(),
        path: parts.uri.path_and_query().map_or("/", |p| p.as_str()),
        authority: parts.uri.authority().map(|a| a.as_str()),
        protocol: format!("{:?}", parts.version),
        headers: headers(&parts.headers),
        peer,
        local,
    };
    // Strings and addresses always have a JSON form.
    let text = serde_json::to_vec(&answer).unwrap_or_default();
    let mut response = respond(server, status, full(text.into()));
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

fn respond(server: &Server, status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    if let Ok(name) = HeaderValue::from_str(&server.name) {
        response.headers_mut().insert("x-adit-sample", name);
    }
    response
}

fn number(path: &str, prefix: &str) -> Option<u64> {
    path.strip_prefix(prefix)?.parse().ok()
}

fn headers(all: &HeaderMap) -> BTreeMap<String, Vec<String>> {
    let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in all {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        map.entry(name.to_string()).or_default().push(value);
    }
    map
}

fn full(bytes: Bytes) -> Body {
    Full::new(bytes).boxed_unsync()
}

fn zeros(server: &Server, count: u64) -> Response<Body> {
    const CHUNK: usize = 64 * 1024;
    let chunk = Bytes::from_static(&[0; CHUNK]);
    let frames = futures_util::stream::unfold(count, move |left| {
        let size = left.min(CHUNK as u64);
        let frame = chunk.slice(..size as usize);
        async move { (size > 0).then(|| (Ok(Frame::data(frame)), left - size)) }
    });
    let mut response = respond(
        server,
        StatusCode::OK,
        StreamBody::new(frames).boxed_unsync(),
    );
    response
        .headers_mut()
        .insert(http::header::CONTENT_LENGTH, HeaderValue::from(count));
    response
}

/// gRPC over HTTP/2 (PROTOCOL-HTTP2.md): one length-prefixed message each way, status in
/// the trailers.
async fn answer_grpc(
    server: &Server,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Response<Body> {
    let outcome = match request.uri().path() {
        echo::PATH => read_message(request.into_body()).await,
        other => Err((12, format!("{other} is not implemented"))),
    };
    let (message, status, text) = match outcome {
        Ok(request) => {
            let response = EchoResponse {
                message: request.message,
                server: server.name.clone(),
                version: server.version.clone(),
                peer: peer.to_string(),
            };
            (Some(frame(&response)), 0, String::new())
        }
        Err((status, text)) => (None, status, text),
    };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(status));
    if let Ok(text) = HeaderValue::from_str(&text) {
        trailers.insert("grpc-message", text);
    }
    let frames = message.map(Frame::data).into_iter();
    let frames = frames.chain(std::iter::once(Frame::trailers(trailers)));
    let body = StreamBody::new(futures_util::stream::iter(frames).map(Ok)).boxed_unsync();
    let mut response = respond(server, StatusCode::OK, body);
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    response
}

fn frame(message: &EchoResponse) -> Bytes {
    let mut bytes = BytesMut::with_capacity(5 + message.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    bytes.extend_from_slice(&message.encode_to_vec());
    bytes.freeze()
}

async fn read_message(body: Incoming) -> Result<EchoRequest, (u32, String)> {
    let invalid = |text: &str| (3, text.to_owned());
    let body = Limited::new(body, MAX_BODY).collect().await;
    let mut bytes = body.map_err(|error| (13, error.to_string()))?.to_bytes();
    if bytes.len() < 5 || bytes.get_u8() != 0 {
        return Err(invalid("no uncompressed message"));
    }
    if bytes.get_u32() as usize != bytes.len() {
        return Err(invalid("not exactly one message"));
    }
    EchoRequest::decode(bytes).map_err(|error| invalid(&error.to_string()))
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
    fn a_frame_has_its_length_in_front() {
        let response = EchoResponse {
            message: "hi".into(),
            ..Default::default()
        };
        assert_eq!(&frame(&response)[..], b"\0\0\0\0\x04\x0a\x02hi");
    }
}
