//! What all proxies forward to: answers HTTP/1.1, HTTP/2 and gRPC with as many bytes as the
//! path asks for, in plaintext and behind HBONE as a pod's node serves it. It does as little
//! as it can, so that it is never what limits a proxy.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::server::Incoming;
use adit_shared::hbone::{Settings, serve};
use adit_shared::net::drain;
use anyhow::Context;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

use super::head::Head;
use super::identity::Credential;
use super::spec::{MAX_BODY, UpstreamSpec, body_of};

const HANDSHAKE: Duration = Duration::from_secs(10);

/// Names the route that a request took: routes of all proxies set it, the upstream repeats it.
pub(super) const ROUTE: &str = "x-route";
/// What the upstream repeats it in.
pub(super) const SEEN: &str = "x-seen";

/// Serves until the process ends.
///
/// # Errors
/// An address is taken, or the authority cannot be read.
pub fn run(spec: &UpstreamSpec) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, async {
        let body = Rc::new(Bytes::from(vec![b'x'; MAX_BODY]));
        let http1 = TcpListener::bind((spec.plain.ip(), UpstreamSpec::HTTP1)).await?;
        let http2 = TcpListener::bind((spec.plain.ip(), UpstreamSpec::HTTP2)).await?;
        let hbone = TcpListener::bind(spec.hbone).await?;
        let credential = Credential::issue(&spec.ca, "secure")?;
        let tls = credential.certificate.server_config().clone();
        let kept = body.clone();
        spawn_local(accept(http1, move |stream| {
            let body = kept.clone();
            async move { answer_http1(stream, &body).await }
        }));
        let kept = body.clone();
        spawn_local(accept(http2, move |stream| {
            let body = kept.clone();
            async move { answer_http2(stream, &body).await }
        }));
        // Never signalled: the process is ended.
        let (_trigger, watcher) = drain::channel();
        accept(hbone, move |stream| {
            let (tls, body, watcher) = (tls.clone(), body.clone(), watcher.clone());
            async move {
                let tls = TlsStream::accept(stream, tls, HANDSHAKE)
                    .await
                    .context("TLS")?;
                let handler = async move |incoming: Incoming| {
                    let port = incoming.request.authority.port();
                    let Ok(tunnel) = incoming.respond.accept(None) else {
                        return;
                    };
                    let io = tunnel.into_io();
                    // How a tunnel ends is the proxy's business.
                    let _ = match port {
                        UpstreamSpec::HTTP2 => answer_http2(io, &body).await,
                        _ => answer_http1(io, &body).await,
                    };
                };
                serve(tls, &Settings::DEFAULT, watcher, handler).await?;
                Ok(())
            }
        })
        .await;
        Ok(())
    })
}

async fn accept<F, R>(listener: TcpListener, serve: F)
where
    F: Fn(TcpStream) -> R,
    R: Future<Output = anyhow::Result<()>> + 'static,
{
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Descriptors are used up; some come back.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let serving = serve(stream);
        spawn_local(async move {
            if let Err(error) = serving.await {
                eprintln!("upstream: {error:#}");
            }
        });
    }
}

async fn answer_http1(
    mut io: impl AsyncRead + AsyncWrite + Unpin,
    body: &Bytes,
) -> anyhow::Result<()> {
    let mut received = Vec::with_capacity(4096);
    let mut answer = Vec::with_capacity(512);
    loop {
        let head = loop {
            if let Some(head) = Head::find(&received) {
                break head;
            }
            if ended(io.read_buf(&mut received).await)? {
                return Ok(());
            }
        };
        let first = received.split(|b| *b == b' ');
        let size = body_of(first.into_iter().nth(1).unwrap_or_default());
        answer.clear();
        let seen = head.value(&received, ROUTE).unwrap_or_default();
        answer.extend_from_slice(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nx-seen: ");
        answer.extend_from_slice(seen);
        answer.extend_from_slice(format!("\r\ncontent-length: {size}\r\n\r\n").as_bytes());
        let sent = head.content_length(&received).unwrap_or(0);
        let mut missing = (head.length + sent).saturating_sub(received.len());
        received.drain(..(head.length + sent).min(received.len()));
        while missing > 0 {
            received.clear();
            if ended(io.read_buf(&mut received).await)? {
                return Ok(());
            }
            let taken = missing.min(received.len());
            missing -= taken;
            received.drain(..taken);
        }
        if size <= 8192 {
            answer.extend_from_slice(&body[..size]);
            io.write_all(&answer).await?;
        } else {
            io.write_all(&answer).await?;
            io.write_all(&body[..size]).await?;
        }
        io.flush().await?;
    }
}

/// Whether the peer has closed; one that resets has too.
fn ended(read: io::Result<usize>) -> anyhow::Result<bool> {
    match read {
        Ok(count) => Ok(count == 0),
        Err(_) => Ok(true),
    }
}

async fn answer_http2<IO>(io: IO, body: &Rc<Bytes>) -> anyhow::Result<()>
where
    IO: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(1 << 20)
        .initial_connection_window_size(8 << 20)
        .max_concurrent_streams(1000);
    let mut connection = builder.handshake::<_, Bytes>(io).await?;
    while let Some(request) = connection.accept().await {
        // A proxy that closes without GOAWAY has closed.
        let Ok((request, respond)) = request else {
            return Ok(());
        };
        let body = body.clone();
        spawn_local(async move {
            let _ = answer_stream(request, respond, &body).await;
        });
    }
    Ok(())
}

async fn answer_stream(
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    body: &Bytes,
) -> Result<(), h2::Error> {
    let (head, mut incoming) = request.into_parts();
    while let Some(chunk) = incoming.data().await {
        let length = chunk?.len();
        let _ = incoming.flow_control().release_capacity(length);
    }
    let size = body_of(head.uri.path().as_bytes());
    let mut response = Response::new(());
    let headers = response.headers_mut();
    if let Some(route) = head.headers.get(ROUTE) {
        headers.insert(SEEN, route.clone());
    }
    let grpc = head
        .headers
        .get("content-type")
        .is_some_and(|kind| kind == "application/grpc");
    let kind = if grpc {
        "application/grpc"
    } else {
        "text/plain"
    };
    headers.insert("content-type", HeaderValue::from_static(kind));
    let empty = size == 0 && !grpc;
    let mut stream = respond.send_response(response, empty)?;
    if empty {
        return Ok(());
    }
    let mut data = body.slice(..size);
    if grpc {
        let mut message = Vec::with_capacity(5 + size);
        message.push(0);
        // No body is longer than MAX_BODY.
        message.extend_from_slice(&u32::try_from(size).unwrap_or(0).to_be_bytes());
        message.extend_from_slice(&data);
        data = message.into();
    }
    stream.send_data(data, !grpc)?;
    if grpc {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        stream.send_trailers(trailers)?;
    }
    Ok(())
}
