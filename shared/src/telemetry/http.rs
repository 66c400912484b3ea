//! The small HTTP servers of a process: readiness, metrics, admin. Each connection has
//! deadlines, their number is bounded, and a process out of file descriptors keeps its
//! listener.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;

use super::{Metrics, Readiness};

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 64;
/// For the headers of a request, and between two requests of a connection.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// For a connection altogether: a reader that takes nothing does not stay. Admin calls
/// may run for minutes (a CPU profile).
const CONNECTION_DEADLINE: Duration = Duration::from_secs(600);
/// Pause after an accept that failed for lack of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 128;

/// What handlers answer with.
pub type HttpResponse = Response<Full<Bytes>>;

/// Serves HTTP/1.1 on `listener` by `handler` until dropped. Never returns: every error
/// of a connection ends that connection only.
pub async fn serve<H, F>(listener: TcpListener, handler: H)
where
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = HttpResponse> + Send + 'static,
{
    let handler = Arc::new(handler);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Beyond the bound, connections wait in the listener's backlog.
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let stream = accept(&listener).await;
        let handler = handler.clone();
        tokio::spawn(async move {
            let connection = serve_connection(stream, handler);
            // Clients that vanish or misbehave are no event.
            let _ = tokio::time::timeout(CONNECTION_DEADLINE, connection).await;
            drop(slot);
        });
    }
}

async fn serve_connection<H, F>(stream: TcpStream, handler: Arc<H>) -> hyper::Result<()>
where
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = HttpResponse> + Send + 'static,
{
    let service = service_fn(move |request| {
        let response = handler(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .max_buf_size(32 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

/// Accepts one connection, however long that takes.
async fn accept(listener: &TcpListener) -> TcpStream {
    let mut warned = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            // The client left between SYN and accept: its own affair.
            Err(error) if is_of_one_connection(&error) => {}
            // EMFILE, ENFILE, ENOBUFS, ENOMEM: others give something back in time.
            Err(error) => {
                if !warned {
                    tracing::warn!(%error, "cannot accept an HTTP connection; trying again");
                    warned = true;
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted
    )
}

/// Opens a listener of [`serve`]. An IPv6 wildcard takes IPv4 too where the kernel has
/// both. Another process of the same user may listen there as well (`SO_REUSEPORT`): in a
/// rolling update the new one starts before the old one ends.
///
/// # Errors
/// When the address is taken or not ours.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves `/healthz/ready`: 200 `ready`, or 500 with the names of what is pending.
pub async fn serve_readiness(listener: TcpListener, readiness: Readiness) {
    serve(listener, move |request| {
        let response = match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/healthz/ready") => readiness_response(&readiness),
            (_, "/healthz/ready") => method_not_allowed("GET, HEAD"),
            _ => not_found(),
        };
        std::future::ready(response)
    })
    .await;
}

/// Serves the metrics on `/metrics` and `/stats/prometheus`.
pub async fn serve_metrics(listener: TcpListener, metrics: Arc<Metrics>) {
    serve(listener, move |request| {
        let metrics = metrics.clone();
        async move {
            match (request.method(), request.uri().path()) {
                (&Method::GET | &Method::HEAD, "/metrics" | "/stats/prometheus") => {
                    metrics_response(metrics).await
                }
                (_, "/metrics" | "/stats/prometheus") => method_not_allowed("GET, HEAD"),
                _ => not_found(),
            }
        }
    })
    .await;
}

/// Answers a readiness probe.
pub fn readiness_response(readiness: &Readiness) -> HttpResponse {
    let pending = readiness.pending();
    if pending.is_empty() {
        return text(StatusCode::OK, "ready\n");
    }
    let body = format!("not ready, pending: {}\n", pending.join(", "));
    text(StatusCode::INTERNAL_SERVER_ERROR, body)
}

/// Answers a scrape. The text is made on a thread for blocking work: with many series it
/// takes tens of milliseconds.
pub async fn metrics_response(metrics: Arc<Metrics>) -> HttpResponse {
    match tokio::task::spawn_blocking(move || metrics.encode()).await {
        Ok(body) => with_type(
            StatusCode::OK,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            body,
        ),
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics failed\n"),
    }
}

/// A plain-text response.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> HttpResponse {
    with_type(status, "text/plain; charset=utf-8", body)
}

/// A JSON response of serialised text.
pub fn json(status: StatusCode, body: impl Into<Bytes>) -> HttpResponse {
    with_type(status, "application/json", body)
}

/// An HTML page.
pub fn html(body: &'static str) -> HttpResponse {
    with_type(StatusCode::OK, "text/html; charset=utf-8", body)
}

/// 404.
pub fn not_found() -> HttpResponse {
    text(StatusCode::NOT_FOUND, "not found\n")
}

/// 405 that names what is allowed.
pub fn method_not_allowed(allowed: &'static str) -> HttpResponse {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
    let allowed = HeaderValue::from_static(allowed);
    response.headers_mut().insert(ALLOW, allowed);
    response
}

fn with_type(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> HttpResponse {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
