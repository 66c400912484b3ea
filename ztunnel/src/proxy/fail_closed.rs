//! A connection that has to pass a waypoint and cannot: nothing goes around it. An HTTP client
//! is told so in its own language, for a 503 with a reason is something that clients retry,
//! count and show, where a reset says nothing; anybody else is reset.

use std::convert::Infallible;
use std::io::{self, Cursor};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use adit_shared::net::first_bytes::{Spoken, judge};
use adit_shared::net::socket::reset_on_close;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use http::{HeaderName, Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, join, split};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::timeout;

/// How long a client may take to say its first line. One that waits for its server to speak
/// first is reset after it.
const SILENCE: Duration = Duration::from_secs(1);
/// Longest request line that is read.
const MAX_LINE: usize = 16 << 10;
/// After the answer, how long and how much a client may go on sending: closing a socket with
/// unread bytes resets it, and takes the answer from a client that has not read it yet.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 4 << 20;
/// An HTTP/2 client that asks nothing more for so long is told to come back on a new connection.
const QUIET: Duration = Duration::from_millis(250);
/// Requests that one HTTP/2 client may have at once.
const MAX_STREAMS: u32 = 100;
/// Bytes of headers that one of them may have.
const MAX_HEADERS: u32 = 64 << 10;

/// The waypoint's own name for the same thing, on the answers that it gives itself.
const REASON: HeaderName = HeaderName::from_static("x-adit-reason");

/// Why a waypoint could not be passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It is not known, or none of its instances may be used.
    NoWaypoint,
    /// None of its instances that were tried could be connected to, or was who it should be.
    Unreachable,
    /// It did not take the connection: it does not serve the destination, or not yet.
    Refused,
    /// Its policies deny this caller.
    Denied,
    /// The caller has no certificate yet: no instance was asked.
    NoCertificate,
}

impl Cause {
    /// One word for `x-adit-reason` and the metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoWaypoint => "no_healthy_waypoint",
            Self::Unreachable => "waypoint_unreachable",
            Self::Refused => "waypoint_refused",
            Self::Denied => "waypoint_denied",
            Self::NoCertificate => "no_certificate",
        }
    }
}

/// How a client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// HTTP/1.1 503.
    Http1,
    /// HTTP/2 503, or gRPC UNAVAILABLE, and GOAWAY.
    Http2,
    /// A reset: it speaks something else, or nothing.
    Reset,
}

impl Told {
    /// The metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Reset => "reset",
        }
    }
}

/// Ends the connection of `app`, which has had no answer yet.
pub async fn tell(mut app: TcpStream, cause: Cause) -> Told {
    let mut first = Vec::new();
    let told = match timeout(SILENCE, listen(&mut app, &mut first)).await {
        Ok(Ok(told)) => told,
        Ok(Err(_)) | Err(_) => Told::Reset,
    };
    match told {
        Told::Http1 => answer_http1(&mut app, cause).await,
        Told::Http2 => answer_http2(first, app, cause).await,
        Told::Reset => reset_on_close(&app),
    }
    told
}

/// Reads until it is known what the client speaks; what was read is in `first`.
async fn listen<R: AsyncRead + Unpin>(app: &mut R, first: &mut Vec<u8>) -> io::Result<Told> {
    loop {
        match judge(first) {
            Some(Spoken::Http2) => return Ok(Told::Http2),
            // Other protocols have commands that begin like it: only the version is proof.
            Some(Spoken::Http1) => match request_line(first) {
                Some(true) => return Ok(Told::Http1),
                Some(false) => return Ok(Told::Reset),
                None => {}
            },
            Some(Spoken::Tls | Spoken::Other) => return Ok(Told::Reset),
            None => {}
        }
        let room = MAX_LINE.saturating_sub(first.len()) as u64;
        if (&mut *app).take(room).read_buf(first).await? == 0 {
            return Ok(Told::Reset);
        }
    }
}

/// Whether the first line ends as a request line does (RFC 9112 3); `None`: it has no end yet.
fn request_line(bytes: &[u8]) -> Option<bool> {
    let line = bytes.trim_ascii_start();
    let end = line.iter().position(|b| *b == b'\n')?;
    let line = line[..end].trim_ascii_end();
    Some(line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0"))
}

async fn answer_http1<S: AsyncRead + AsyncWrite + Unpin>(app: &mut S, cause: Cause) {
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\n{REASON}: {}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        cause.as_str()
    );
    // A client that is gone, or does not end, has been told as well as it can be.
    let _ = timeout(LINGER, async {
        app.write_all(answer.as_bytes()).await?;
        app.shutdown().await?;
        let mut rest = app.take(LINGER_BYTES as u64);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    })
    .await;
}

async fn answer_http2<S>(first: Vec<u8>, app: S, cause: Cause)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (reader, writer) = split(app);
    let io = TokioIo::new(join(Cursor::new(first).chain(reader), writer));
    let answered = Rc::new(Notify::new());
    let asked = answered.clone();
    let service = service_fn(move |request| {
        asked.notify_one();
        std::future::ready(Ok::<_, Infallible>(unavailable(&request, cause)))
    });
    let mut serving = http2::Builder::new(LocalExecutor)
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .serve_connection(io, service);
    // Who sends one request after another gets all of them answered: what a client has just
    // taken up when it hears GOAWAY is lost with many.
    let quiet = async {
        let mut patience = SILENCE;
        while timeout(patience, answered.notified()).await.is_ok() {
            patience = QUIET;
        }
    };
    tokio::select! {
        _ = &mut serving => return,
        _ = timeout(LINGER, quiet) => {}
    }
    // Streams that are under way are answered, the client opens no others.
    Pin::new(&mut serving).graceful_shutdown();
    let _ = timeout(LINGER, serving).await;
}

/// The answer to one request; gRPC has its own form (PROTOCOL-HTTP2.md, Trailers-Only).
fn unavailable<B>(request: &Request<B>, cause: Cause) -> Response<Empty<Bytes>> {
    let mut response = Response::new(Empty::new());
    let grpc = request
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    let headers = response.headers_mut();
    headers.insert(REASON, HeaderValue::from_static(cause.as_str()));
    if grpc {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        // UNAVAILABLE.
        headers.insert("grpc-status", HeaderValue::from_static("14"));
        headers.insert("grpc-message", HeaderValue::from_static(cause.as_str()));
    } else {
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

/// Runs what HTTP/2 needs on the worker itself.
#[derive(Clone, Copy)]
struct LocalExecutor;

impl<F: Future<Output = ()> + 'static> Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        spawn_local(future);
    }
}

#[cfg(test)]
mod tests {
    use hyper::client::conn::http2 as client;
    use tokio::net::TcpListener;
    use tokio::task::LocalSet;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let to = listener.local_addr().expect("bound");
        let (client, accepted) = tokio::join!(TcpStream::connect(to), listener.accept());
        (client.expect("connected"), accepted.expect("accepted").0)
    }

    #[tokio::test]
    async fn a_client_is_answered_in_what_it_speaks() {
        LocalSet::new().run_until(speak_everything()).await;
    }

    async fn speak_everything() {
        for (said, told) in [
            (&b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..], Told::Http1),
            (
                b"POST /x HTTP/1.0\r\ncontent-length: 9\r\n\r\nabc",
                Told::Http1,
            ),
            (b"\r\nOPTIONS * HTTP/1.1\r\n\r\n", Told::Http1),
            // Begins like HTTP and is none.
            (b"SET h 1\r\n", Told::Reset),
            (b"GET /\r\n", Told::Reset),
            (b"\x16\x03\x01\x02\x00", Told::Reset),
            (b"EHLO there\r\n", Told::Reset),
            (b"", Told::Reset),
        ] {
            let (mut client, server) = pair().await;
            client.write_all(said).await.expect("sent");
            let telling = spawn_local(tell(server, Cause::Unreachable));
            let mut answer = Vec::new();
            let read = client.read_to_end(&mut answer).await;
            let text = String::from_utf8_lossy(&answer).into_owned();
            match told {
                Told::Http1 => {
                    read.expect("an answer and its end");
                    assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
                    assert!(text.contains("x-adit-reason: waypoint_unreachable\r\n"));
                    assert!(text.ends_with("\r\nconnection: close\r\n\r\n"), "{text}");
                    drop(client);
                }
                _ => assert_eq!(
                    read.map_err(|e| e.kind()),
                    Err(io::ErrorKind::ConnectionReset)
                ),
            }
            assert_eq!(telling.await.expect("no panic"), told, "{text}");
        }
    }

    /// A client in the middle of an upload reads its answer: nothing of what it sends lies
    /// unread when the socket closes.
    #[tokio::test]
    async fn an_upload_does_not_cost_the_answer() {
        LocalSet::new().run_until(upload()).await;
    }

    async fn upload() {
        let (client, server) = pair().await;
        let telling = spawn_local(tell(server, Cause::Refused));
        let (mut reader, mut writer) = client.into_split();
        let upload = async {
            writer
                .write_all(b"PUT / HTTP/1.1\r\ncontent-length: 2000000\r\n\r\n")
                .await?;
            writer.write_all(&vec![7; 2_000_000]).await?;
            writer.shutdown().await
        };
        let mut answer = String::new();
        let (uploaded, read) = tokio::join!(upload, reader.read_to_string(&mut answer));
        uploaded.expect("taken");
        read.expect("no reset");
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert_eq!(telling.await.expect("no panic"), Told::Http1);
    }

    #[tokio::test]
    async fn requests_of_one_http2_connection_are_answered_then_it_ends() {
        LocalSet::new()
            .run_until(async {
                let (stream, server) = pair().await;
                let telling = spawn_local(tell(server, Cause::NoWaypoint));
                let (mut sender, connection) =
                    client::handshake(LocalExecutor, TokioIo::new(stream))
                        .await
                        .expect("a handshake");
                let ended = spawn_local(connection);
                let ask = |kind: &'static str| {
                    Request::post("http://a/")
                        .header(CONTENT_TYPE, kind)
                        .body(Empty::<Bytes>::new())
                        .expect("a request")
                };
                let plain = sender.send_request(ask("text/plain"));
                let grpc = sender.send_request(ask("application/grpc+proto"));
                let (plain, grpc) = tokio::join!(plain, grpc);
                let plain = plain.expect("an answer");
                assert_eq!(plain.status(), StatusCode::SERVICE_UNAVAILABLE);
                assert_eq!(plain.headers()[REASON], "no_healthy_waypoint");
                let grpc = grpc.expect("an answer");
                assert_eq!(grpc.status(), StatusCode::OK);
                assert_eq!(grpc.headers()["grpc-status"], "14");
                assert_eq!(grpc.headers()[REASON], "no_healthy_waypoint");
                ended.await.expect("no panic").expect("a clean end");
                assert_eq!(telling.await.expect("no panic"), Told::Http2);
            })
            .await;
    }
}
