//! The server's end of an HBONE connection.

use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::header::HeaderValue;
use http::{Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::headers::PeerHeaders;
use super::keepalive::peer_lost;
use super::settings::Settings;
use super::tunnel::Tunnel;

/// How an HBONE connection ended that a server served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No complete HTTP/2 preface in time.
    #[error("no HTTP/2 preface within {0:?}")]
    HandshakeTimeout(Duration),
    /// The peer does not speak HTTP/2, or broke its rules.
    #[error("HTTP/2: {0}")]
    Protocol(String),
    /// The connection was lost.
    #[error("connection: {0}")]
    Io(io::Error),
    /// The peer stopped answering PINGs.
    #[error("the peer does not answer any more")]
    Silent,
}

impl From<h2::Error> for ServeError {
    fn from(error: h2::Error) -> Self {
        if error.is_io() {
            let text = error.to_string();
            return Self::Io(error.into_io().unwrap_or_else(|| io::Error::other(text)));
        }
        Self::Protocol(error.to_string())
    }
}

/// A request that arrived.
#[derive(Debug)]
pub struct Incoming {
    /// `:method`; anything but CONNECT is to be refused.
    pub method: Method,
    /// `:authority`, if there is one.
    pub authority: Option<String>,
    /// The other headers.
    pub headers: PeerHeaders,
    /// How to answer.
    pub respond: Respond,
}

/// The answer to a request. Dropping it resets the stream.
#[derive(Debug)]
pub struct Respond {
    send: SendResponse<Bytes>,
    recv: RecvStream,
}

impl Respond {
    /// Answers 200; `baggage` tells the peer what the destination workload is.
    ///
    /// # Errors
    /// The stream or its connection is gone.
    pub fn accept(mut self, baggage: Option<HeaderValue>) -> Result<Tunnel, ServeError> {
        let mut response = Response::new(());
        if let Some(baggage) = baggage {
            response.headers_mut().insert("baggage", baggage);
        }
        let stream = self.send.send_response(response, false)?;
        Ok(Tunnel::new(stream, self.recv, None))
    }

    /// Answers `status` and nothing else.
    pub fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        // If the peer is gone there is nobody to tell.
        let _ = self.send.send_response(response, true);
    }

    /// Completes when the peer gives up waiting for the answer.
    pub async fn abandoned(&mut self) {
        let _ = std::future::poll_fn(|cx| self.send.poll_reset(cx)).await;
    }
}

/// Serves one connection, whose TLS handshake is done, until it ends. Each request is a task
/// of the current worker. When `drain` completes, the peer is told to open no more streams
/// (GOAWAY), and those that are open go on.
///
/// # Errors
/// [`ServeError`] if it did not end in good order; streams end by themselves.
pub async fn serve<IO, H, F>(
    io: IO,
    settings: &Settings,
    drain: impl Future<Output = ()>,
    handler: H,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin + 'static,
    H: Fn(Incoming) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.frame_size())
        .max_concurrent_streams(settings.max_concurrent_streams)
        .max_header_list_size(settings.server_header_list)
        .max_send_buffer_size(settings.send_buffer);
    let mut connection = timeout(settings.handshake_timeout, builder.handshake(io))
        .await
        .map_err(|_| ServeError::HandshakeTimeout(settings.handshake_timeout))??;

    let handler = Rc::new(handler);
    let pings = connection.ping_pong();
    let lost = async {
        match pings {
            Some(pings) => peer_lost(pings, settings.ping_interval, settings.ping_timeout).await,
            None => std::future::pending().await,
        }
    };
    let mut lost = Box::pin(lost);
    let mut drain = Box::pin(drain);
    let mut draining = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, send))) => {
                    let handler = handler.clone();
                    spawn_local(async move { handler(incoming(request, send)).await });
                }
                Some(Err(error)) => return Err(error.into()),
                None => return Ok(()),
            },
            () = &mut drain, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = &mut lost => {
                connection.abrupt_shutdown(Reason::NO_ERROR);
                return Err(ServeError::Silent);
            }
        }
    }
}

fn incoming(request: Request<RecvStream>, send: SendResponse<Bytes>) -> Incoming {
    let (parts, recv) = request.into_parts();
    Incoming {
        method: parts.method,
        authority: parts.uri.authority().map(|a| a.as_str().to_owned()),
        headers: PeerHeaders::of(&parts.headers),
        respond: Respond { send, recv },
    }
}
