//! HBONE from a client's node: mutual TLS, CONNECT, destination, protocol; in this order, and
//! each of them before anything of the next.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::server::{Incoming, Malformed, serve_observed};
use adit_shared::hbone::{Authority, BaggageFields, ConnectionError};
use adit_shared::identity::{SpiffeId, peer_identity};
use adit_shared::net::drain::DrainMode;
use adit_shared::telemetry::{
    ConnectionInfo, Event, Rejection, Reporter, ResponseFlag, WorkloadLabels,
};
use http::{HeaderValue, StatusCode};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout_at};
use tracing::{debug, warn};

use super::destination::{self, Destination, DestinationError, Target};
use super::http::{self as http_server, Downstream};
use super::http2;
use super::io::Io;
use super::sniff::{self, Spoken};
use super::tcp;
use crate::live::ClientTunnel;
use crate::state::Protocol;
use crate::worker::Worker;

/// How long a TLS handshake may take, from accept.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a CONNECT may be ahead of what we have heard.
const SETTLE: Duration = Duration::from_secs(1);
/// How long a client of a port that is declared HTTP may be silent at first.
const FIRST_BYTE_DEADLINE: Duration = Duration::from_secs(300);

/// Who is at the other end of an HBONE connection.
pub struct Caller {
    /// As its certificate says.
    pub identity: SpiffeId,
    /// Its address on that connection.
    pub peer: SocketAddr,
    /// As telemetry names it.
    pub labels: Arc<WorkloadLabels>,
    /// `x-forwarded-client-cert` of its requests.
    pub certificate_header: HeaderValue,
}

/// Serves one HBONE connection to its end.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr) {
    let telemetry = worker.shared.telemetry.clone();
    let started = Instant::now();
    let local = stream.local_addr().unwrap_or(peer);
    let (tls, identity) = match Box::pin(handshake(&worker, stream)).await {
        Ok(done) => done,
        Err((flag, error)) => {
            telemetry.emit(&Event::HandshakeFailed {
                reporter: Reporter::Destination,
            });
            let info = ConnectionInfo::new(Reporter::Destination, peer, local);
            telemetry.failed(&info, started.elapsed(), flag, &error);
            return;
        }
    };
    telemetry.emit(&Event::HandshakeCompleted {
        reporter: Reporter::Destination,
        duration: started.elapsed(),
    });
    telemetry.emit(&Event::TunnelOpened {
        reporter: Reporter::Destination,
    });
    let caller = std::cell::OnceCell::new();
    let streams = Rc::new(Cell::new(0));
    let (count, owner, known) = (streams.clone(), worker.clone(), identity.clone());
    let handler = async move |incoming: Incoming| {
        count.set(count.get() + 1);
        let caller = caller
            .get_or_init(|| Rc::new(describe(&owner, known.clone(), peer, &incoming)))
            .clone();
        Box::pin(open(owner.clone(), caller, incoming)).await;
    };
    let malformed = |what: Malformed| {
        let reason = match what {
            Malformed::Method(_) => Rejection::Method,
            Malformed::Header(_) => Rejection::Authority,
        };
        warn!(%peer, %identity, "malformed CONNECT: {what}");
        telemetry.emit(&Event::InboundRejected { peer, reason });
    };
    let _listed = worker.live.tunnels.enter(ClientTunnel {
        peer,
        identity: identity.clone(),
        streams: streams.clone(),
        since: worker.now(),
    });
    let drain = worker.shared.drain.clone();
    let served = serve_observed(tls, &worker.shared.config.http2, drain, handler, malformed).await;
    telemetry.emit(&Event::TunnelClosed {
        reporter: Reporter::Destination,
        streams: streams.get(),
    });
    let rejected = match &served {
        Ok(_) => None,
        Err(ConnectionError::PrefaceTimeout) => Some(Rejection::Timeout),
        Err(ConnectionError::Protocol(_)) => Some(Rejection::Protocol),
        Err(error) => {
            debug!(%peer, "HBONE: {error}");
            None
        }
    };
    if let (Some(reason), Err(error)) = (rejected, served) {
        warn!(%peer, %identity, "HBONE: {error}");
        telemetry.emit(&Event::InboundRejected { peer, reason });
    }
}

async fn handshake(
    worker: &Worker,
    stream: TcpStream,
) -> Result<(TlsStream, SpiffeId), (ResponseFlag, String)> {
    let certificate = worker.certificate(HANDSHAKE_DEADLINE).await;
    let certificate = certificate.map_err(|error| (ResponseFlag::IdentityError, error))?;
    let config = certificate.server_config().clone();
    let mut tls = TlsStream::accept(stream, config, HANDSHAKE_DEADLINE)
        .await
        .map_err(|e| (ResponseFlag::TlsFailure, format!("TLS handshake: {e}")))?;
    let chain = tls.take_peer_certificates();
    let identity = peer_identity(&chain);
    let identity = identity.map_err(|e| {
        (
            ResponseFlag::IdentityError,
            format!("client certificate: {e}"),
        )
    })?;
    Ok((tls, identity))
}

/// Who calls, as far as telemetry and the endpoint want to know.
fn describe(worker: &Worker, identity: SpiffeId, peer: SocketAddr, incoming: &Incoming) -> Caller {
    let view = worker.shared.state.load();
    let network = &view.gateway().network;
    let labels = match view.model().workload_at(network, peer.ip()) {
        // What discovery says of the address counts only if it is who the certificate says.
        Some(source) if source.identity == identity => WorkloadLabels {
            principal: Some(identity.clone()),
            ..(&**source).into()
        },
        // As its own proxy describes it; the namespace is that of its certificate.
        _ => {
            let unknown = BaggageFields::default();
            let baggage = incoming.request.baggage.as_deref().unwrap_or(&unknown);
            WorkloadLabels {
                workload: baggage.workload_name.clone(),
                namespace: identity.namespace().into(),
                canonical_service: baggage.service_name.clone(),
                canonical_revision: baggage.service_version.clone(),
                cluster: baggage.cluster.clone(),
                region: baggage.region.clone(),
                zone: baggage.zone.clone(),
                principal: Some(identity.clone()),
            }
        }
    };
    let own = &worker.shared.config.identity;
    let certificate = HeaderValue::try_from(format!("By={own};URI={identity}"));
    Caller {
        peer,
        labels: Arc::new(labels),
        // SPIFFE ids are printable ASCII.
        certificate_header: certificate.unwrap_or_else(|_| HeaderValue::from_static("")),
        identity,
    }
}

/// Judges one CONNECT and serves what is inside of it.
async fn open(worker: Rc<Worker>, caller: Rc<Caller>, mut incoming: Incoming) {
    let _open = worker.open_stream();
    if !worker.shared.state.is_complete() {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        return incoming.respond.refuse(status, "destination_unavailable");
    }
    let authority = &incoming.request.authority;
    let resolved = match resolve(&worker, &caller, authority) {
        Ok(resolved) => Ok(resolved),
        Err(_) => tokio::select! {
            biased;
            _ = incoming.respond.cancelled() => return,
            settled = settle(&worker, &caller, authority) => settled,
        },
    };
    let (destination, target) = match resolved {
        Ok(resolved) => resolved,
        Err(error) => {
            warn!(peer = %caller.peer, identity = %caller.identity, "CONNECT refused: {error}");
            worker.shared.telemetry.emit(&Event::InboundRejected {
                peer: caller.peer,
                reason: Rejection::ForeignAuthority,
            });
            incoming
                .respond
                .refuse(error.status(), "destination_unavailable");
            return;
        }
    };
    // The client's own port where its proxy tells it; the address is the connection's.
    let forwarded = incoming.request.forwarded.as_ref();
    let client = forwarded
        .filter(|f| f.source.ip().to_canonical() == caller.peer.ip().to_canonical())
        .map_or(caller.peer, |f| f.source);
    match target.protocol() {
        Protocol::Tcp | Protocol::Tls => {
            tcp::serve_unanswered(worker, caller, destination, client, incoming.respond).await;
        }
        protocol => {
            let Ok(tunnel) = incoming.respond.accept(None) else {
                return;
            };
            let io = Io::tunnel(tunnel);
            serve_http(worker, caller, destination, client, protocol, io).await;
        }
    }
}

/// Where a CONNECT leads now.
fn resolve(
    worker: &Worker,
    caller: &Caller,
    authority: &Authority,
) -> Result<(Destination, Target), DestinationError> {
    let view = worker.shared.state.load();
    let destination = destination::resolve(&view, authority, caller.identity.namespace())?;
    let target = destination.target(&view);
    let target = target.ok_or_else(|| DestinationError::Unknown(authority.clone()))?;
    Ok((destination, target))
}

/// Waits for what a CONNECT names. A node may have heard a moment before us that a service is to
/// be reached through us, and its first connections must not fail for that.
async fn settle(
    worker: &Worker,
    caller: &Caller,
    authority: &Authority,
) -> Result<(Destination, Target), DestinationError> {
    let until = tokio::time::Instant::now() + SETTLE;
    let mut versions = worker.shared.state.subscribe();
    loop {
        let resolved = resolve(worker, caller, authority);
        if resolved.is_ok() {
            return resolved;
        }
        if !matches!(timeout_at(until, versions.changed()).await, Ok(Ok(()))) {
            return resolved;
        }
    }
}

/// Half of the time for a drain is over: whoever has not said anything by then is closed like
/// other idle clients, and does not hold up the rest.
async fn drained(worker: &Worker) {
    match worker.shared.drain.clone().signalled().await {
        DrainMode::Immediate => {}
        DrainMode::Graceful { deadline } => {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            sleep(left / 2).await;
        }
    }
}

/// Serves a stream on a port that may be HTTP.
async fn serve_http(
    worker: Rc<Worker>,
    caller: Rc<Caller>,
    destination: Destination,
    client: SocketAddr,
    protocol: Protocol,
    mut io: Io,
) {
    let moved = io.count();
    let looking = async {
        match protocol {
            Protocol::Undeclared => sniff::sniff(&mut io).await,
            _ => sniff::http_version(&mut io, FIRST_BYTE_DEADLINE).await,
        }
    };
    let spoken = tokio::select! {
        biased;
        spoken = looking => spoken,
        () = drained(&worker) => return,
    };
    let spoken = match spoken {
        Ok(spoken) => spoken,
        Err(error) => {
            debug!(%client, "closed before a request: {error}");
            return;
        }
    };
    match spoken {
        Spoken::Http1 | Spoken::Http2 => {
            let http2 = spoken == Spoken::Http2;
            let downstream =
                Downstream::new(worker.clone(), caller, destination, client, http2, moved);
            let _listed = worker.enter(&downstream);
            match spoken {
                Spoken::Http2 => http2::server::serve(downstream, io).await,
                _ => http_server::serve_http1(downstream, io).await,
            }
        }
        Spoken::Tls | Spoken::Other => tcp::serve(worker, caller, destination, client, io).await,
    }
}
