//! New connections to endpoints.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::{
    CheckoutError, ConnectRequest, Connection, ConnectionWatch, Forwarded, OpenError, Settings,
    Tunnel,
};
use adit_shared::identity::peer_identity;
use adit_shared::model::route::ExpectedIdentities;
use adit_shared::telemetry::{Event, Reporter};
use http::StatusCode;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{Connecting, Endpoint, HttpVersion, Origin, TunnelKey, Way};
use crate::balance::{Permit, Picked, Resource};
use crate::proxy::io::Io;
use crate::proxy::pick;
use crate::proxy::reply::Reply;
use crate::worker::Worker;

/// How long a TCP connect may take (Istio: 10 s).
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long a TLS handshake may take, and the wait for a certificate before it.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long it may take until a peer has answered a CONNECT: its own connect has 10 s.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);
/// The largest window there is (RFC 9113 6.9.1).
const MAX_WINDOW: u32 = (1 << 31) - 1;

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{error}")]
pub struct ConnectError {
    /// What the request is answered with.
    pub reply: Reply,
    /// What, which peer.
    pub error: String,
}

impl ConnectError {
    fn new(reply: Reply, error: impl Into<String>) -> Self {
        Self {
            reply,
            error: error.into(),
        }
    }

    fn of_socket(target: SocketAddr, error: &io::Error) -> Self {
        let reply = match error.kind() {
            io::ErrorKind::ConnectionRefused => Reply::CONNECT_REFUSED,
            io::ErrorKind::TimedOut => Reply::CONNECT_TIMEOUT,
            _ => Reply::CONNECT_FAILED,
        };
        Self::new(reply, format!("connect to {target}: {error}"))
    }
}

/// A new byte stream to an endpoint.
pub struct Connected {
    /// The stream.
    pub io: Io,
    /// The HBONE connection that it is a stream of.
    pub tunnel: Option<ConnectionWatch>,
    /// Our address towards it, where it is a socket of its own.
    pub local: Option<SocketAddr>,
    /// Its place among the connections that are allowed.
    pub permit: Option<Permit>,
    /// For who wants to count it as active at its endpoint.
    pub held: Option<Picked>,
    /// How long nothing may move on it, where it carries opaque bytes; `None`: for ever.
    pub idle: Option<Duration>,
}

/// Opens a byte stream to `endpoint` for `origin`, which is named to the endpoint's node.
/// `version` is what it will carry, if that is HTTP.
///
/// # Errors
/// [`ConnectError`]; nothing has been sent.
pub async fn open_tcp(
    worker: &Worker,
    endpoint: &Endpoint,
    origin: Option<&Origin>,
    version: Option<HttpVersion>,
    connecting: &Connecting,
) -> Result<Connected, ConnectError> {
    let permit = match &connecting.limits {
        None => None,
        Some(limits) => Some(
            limits
                .acquire(Resource::Connections)
                .map_err(|error| ConnectError::new(pick::reply(&error), error.to_string()))?,
        ),
    };
    match &endpoint.way {
        Way::Plain => {
            let stream = connect(endpoint.address, connecting.deadline).await?;
            let local = stream.local_addr().ok();
            Ok(Connected {
                io: Io::tcp(stream),
                tunnel: None,
                local,
                permit,
                held: None,
                idle: None,
            })
        }
        Way::Tls(originate) => {
            let invalid = |why: std::sync::Arc<str>| {
                let error = format!("TLS settings for {}: {why}", endpoint.address);
                ConnectError::new(Reply::TLS_FAILED, error)
            };
            let (config, name) = originate.config(version).map_err(invalid)?;
            let stream = connect(endpoint.address, connecting.deadline).await?;
            let local = stream.local_addr().ok();
            let handshake = TlsConnector::from(config).connect(name, stream);
            let shaken = timeout(HANDSHAKE_DEADLINE, handshake).await;
            let shaken = shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            let stream = shaken.map_err(|error| {
                let error = format!("TLS with {}: {error}", endpoint.address);
                ConnectError::new(Reply::TLS_FAILED, error)
            })?;
            let agreed = stream.get_ref().1.alpn_protocol();
            if version == Some(HttpVersion::Http2) && agreed.is_some_and(|name| name != b"h2") {
                let error = format!("{} does not speak HTTP/2", endpoint.address);
                return Err(ConnectError::new(Reply::TLS_FAILED, error));
            }
            Ok(Connected {
                io: Io::tls(stream),
                tunnel: None,
                local,
                permit,
                held: None,
                idle: None,
            })
        }
        Way::Hbone {
            gateway,
            identities,
        } => {
            let tunnel = open_tunnel(
                worker,
                endpoint,
                *gateway,
                identities,
                origin.or(endpoint.caller.as_ref()),
                connecting.deadline,
            );
            let tunnel = tunnel.await?;
            Ok(Connected {
                tunnel: tunnel.connection(),
                io: Io::tunnel(tunnel),
                local: None,
                permit,
                held: None,
                idle: None,
            })
        }
    }
}

async fn connect(target: SocketAddr, deadline: Duration) -> Result<TcpStream, ConnectError> {
    let connected = timeout(deadline, TcpStream::connect(target)).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let stream = connected.map_err(|error| ConnectError::of_socket(target, &error))?;
    // It fails only for what is no socket.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn open_tunnel(
    worker: &Worker,
    endpoint: &Endpoint,
    gateway: SocketAddr,
    identities: &ExpectedIdentities,
    origin: Option<&Origin>,
    deadline: Duration,
) -> Result<Tunnel, ConnectError> {
    let key = TunnelKey {
        peer: endpoint.uid.clone(),
        address: gateway,
        identities: identities.clone(),
    };
    let mut request = ConnectRequest::new(endpoint.address);
    request.forwarded = origin.map(|origin| Forwarded {
        source: origin.address,
        host: None,
        principal: Some(origin.identity.clone()),
    });
    request.baggage = worker.description();
    let connect = async || connect_tunnel(worker, gateway, identities, deadline).await;
    let deadline = Instant::now() + OPEN_DEADLINE;
    let opened = worker
        .tunnels
        .checkout(&key, &request, deadline.into(), connect)
        .await;
    match opened {
        Ok((tunnel, _)) => Ok(tunnel),
        Err(CheckoutError::Connect(error)) => Err((*error).clone()),
        Err(error) => {
            let reply = match &error {
                CheckoutError::Open(OpenError::Refused { status, detail }) => {
                    match (*status, detail.as_deref()) {
                        (StatusCode::UNAUTHORIZED, _) => DENIED_BY_PEER,
                        (_, Some("connection_refused")) => Reply::CONNECT_REFUSED,
                        _ => Reply::CONNECT_FAILED,
                    }
                }
                CheckoutError::Open(OpenError::Timeout) | CheckoutError::Timeout => {
                    Reply::CONNECT_TIMEOUT
                }
                _ => Reply::CONNECT_FAILED,
            };
            let error = format!("CONNECT {} at {gateway}: {error}", endpoint.address);
            Err(ConnectError::new(reply, error))
        }
    }
}

/// The endpoint's own L4 policies deny this waypoint.
const DENIED_BY_PEER: Reply = Reply {
    reason: "upstream_denied",
    ..Reply::CONNECT_FAILED
};

/// A new HBONE connection with our own certificate, to one that is expected.
async fn connect_tunnel(
    worker: &Worker,
    gateway: SocketAddr,
    identities: &ExpectedIdentities,
    deadline: Duration,
) -> Result<Connection, ConnectError> {
    let shared = &worker.shared;
    let certificate = worker.certificate(HANDSHAKE_DEADLINE).await;
    let certificate = certificate.map_err(|error| ConnectError::new(Reply::TLS_FAILED, error))?;
    let stream = connect(gateway, deadline).await?;
    let started = Instant::now();
    let name = ServerName::IpAddress(gateway.ip().into());
    let config = certificate.client_config().clone();
    let tls = TlsStream::connect(stream, config, name, HANDSHAKE_DEADLINE).await;
    let mut tls = tls.map_err(|error| {
        shared.telemetry.emit(&Event::HandshakeFailed {
            reporter: Reporter::Source,
        });
        let error = format!("TLS handshake with {gateway}: {error}");
        ConnectError::new(Reply::TLS_FAILED, error)
    })?;
    let peer = peer_identity(&tls.take_peer_certificates()).map_err(|error| {
        let error = format!("certificate of {gateway}: {error}");
        ConnectError::new(Reply::TLS_FAILED, error)
    })?;
    if !identities.contains(&peer) {
        let expected: Vec<String> = identities.iter().map(ToString::to_string).collect();
        let error = format!("{gateway} is {peer}, expected {}", expected.join(" or "));
        return Err(ConnectError::new(Reply::TLS_FAILED, error));
    }
    shared.telemetry.emit(&Event::HandshakeCompleted {
        reporter: Reporter::Source,
        duration: started.elapsed(),
    });
    // Every stream that the pool may open has its part of the window, so that responses that
    // nobody reads do not hold up the others.
    let http2 = shared.config.http2;
    let streams = u32::try_from(shared.config.pool_max_streams).unwrap_or(u32::MAX);
    let window = http2.stream_window.saturating_mul(streams).min(MAX_WINDOW);
    let settings = Settings {
        connection_window: window.max(http2.connection_window),
        ..http2
    };
    let connection = Connection::handshake(tls, &settings).await;
    let connection = connection.map_err(|error| {
        let error = format!("HTTP/2 with {gateway}: {error}");
        ConnectError::new(Reply::CONNECT_FAILED, error)
    })?;
    shared.telemetry.emit(&Event::TunnelOpened {
        reporter: Reporter::Source,
    });
    let (watch, telemetry) = (connection.watch(), shared.telemetry.clone());
    spawn_local(async move {
        watch.closed().await;
        telemetry.emit(&Event::TunnelClosed {
            reporter: Reporter::Source,
            streams: watch.carried(),
        });
    });
    Ok(connection)
}
