//! How connections begin, at every port: accepted within a bound, shaken hands with in time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::net::accept::{AcceptCounts, AcceptLimits, AcceptPermit, accept_loop};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// Accepts until stopped, and calls `connected`, which spawns. It ends before the stop only if
/// the listener itself is broken.
pub(crate) async fn accept(
    listener: TcpListener,
    max_connections: usize,
    counts: Arc<AcceptCounts>,
    stop: &CancellationToken,
    connected: impl FnMut(TcpStream, SocketAddr, AcceptPermit),
) {
    let limits = AcceptLimits {
        max_connections,
        ..AcceptLimits::default()
    };
    tokio::select! {
        ended = accept_loop(listener, limits, counts, connected) => {
            if let Err(error) = ended {
                error!(%error, "a listener is broken");
            }
        }
        () = stop.cancelled() => {}
    }
}

/// A TLS handshake; `None`: stopped before there was one.
///
/// # Errors
/// In one word, for metrics, and for people.
pub(crate) async fn handshake(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    deadline: Duration,
    stop: &CancellationToken,
) -> Result<Option<TlsStream<TcpStream>>, (&'static str, String)> {
    // Fails only if the connection is gone, which the handshake will say.
    let _ = tcp.set_nodelay(true);
    let handshake = TlsAcceptor::from(config).accept(tcp);
    tokio::select! {
        tls = timeout(deadline, handshake) => tls
            .map_err(|_| ("handshake_timeout", "no TLS handshake in time".to_owned()))?
            .map(Some)
            .map_err(|error| ("handshake", error.to_string())),
        () = stop.cancelled() => Ok(None),
    }
}
