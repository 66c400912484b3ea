//! HBONE to a pod: mutual TLS, CONNECT, authority, policy, app; in this order, and each of
//! them before anything of the next.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::server::{Incoming, Malformed, serve_observed};
use adit_shared::hbone::{BaggageFields, ConnectionError};
use adit_shared::identity::{PeerIdentityError, SpiffeId, peer_identity, peer_not_after};
use adit_shared::model::inbound::{self, AuthorityError};
use adit_shared::net::socket::reset_on_close;
use adit_shared::telemetry::{
    ConnectionInfo, Event, Origin, Rejection, Reporter, ResponseFlag, Telemetry, WorkloadLabels,
};
use http::StatusCode;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tracing::{debug, warn};

use super::upstream::connect_app;
use super::{
    Accepted, Failed, Judge, Opened, Peer, accept_each, canonical, carry, certificate_of, reject,
    workload_of,
};
use crate::connections::{Closed, Flow, PolicyInput};
use crate::pod::{Busy, Pod};
use crate::worker::Worker;

/// How long a TLS handshake may take, from accept.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// The wall clock may be set: how often it is compared with the end of a caller's certificate.
const WALL_CLOCK_CHECK: Duration = Duration::from_secs(60);

/// Serves the pod's HBONE listener until the task is dropped.
pub async fn accept(worker: Rc<Worker>, pod: Arc<Pod>, listener: TcpListener) {
    accept_each(worker, pod, listener, "inbound HBONE", serve).await;
}

/// One HBONE connection.
async fn serve(worker: Rc<Worker>, pod: Arc<Pod>, accepted: Accepted) {
    let Accepted {
        stream,
        peer,
        _permit,
        opening,
    } = accepted;
    let _tunnel = worker.tunnels.clone();
    // Boxed, as everything about a tunnel is: what one task takes is counted for all listeners.
    Box::pin(serve_tunnel(worker, pod, stream, peer, opening)).await;
}

async fn serve_tunnel(
    worker: Rc<Worker>,
    pod: Arc<Pod>,
    stream: TcpStream,
    peer: SocketAddr,
    opening: Busy,
) {
    let Ok(local) = stream.local_addr().map(canonical) else {
        return;
    };
    if !pod.owns(local.ip()) {
        return reject(&worker, &stream, peer, Rejection::Loop);
    }
    let telemetry = worker.shared.telemetry.clone();
    let started = Instant::now();
    let Authenticated {
        tls,
        identity,
        until,
    } = match Box::pin(handshake(&worker, &pod, stream)).await {
        Ok(done) => done,
        Err(failed) => {
            telemetry.emit(&Event::HandshakeFailed {
                reporter: Reporter::Destination,
            });
            let info = ConnectionInfo::new(Reporter::Destination, peer, local);
            telemetry.failed(&info, started.elapsed(), failed.flag, &failed);
            return;
        }
    };
    drop(opening);
    telemetry.emit(&Event::HandshakeCompleted {
        reporter: Reporter::Destination,
        duration: started.elapsed(),
    });
    telemetry.emit(&Event::TunnelOpened {
        reporter: Reporter::Destination,
    });

    let caller = Caller {
        identity,
        peer,
        local: local.ip(),
    };
    let owner = worker.clone();
    // A proxy that stops drains its pods.
    let drain = pod.drain.watcher();
    let streams = Rc::new(Cell::new(0));
    let count = streams.clone();
    let of = caller.clone();
    let expiring = pod.clone();
    let handler = async move |incoming: Incoming| {
        count.set(count.get() + 1);
        let opening = open(&owner, pod.clone(), of.clone(), incoming);
        if let Some(opened) = Box::pin(opening).await {
            carry(&owner, opened).await;
        }
    };
    let malformed = |what: Malformed| {
        let reason = match what {
            Malformed::Method(_) => Rejection::Method,
            Malformed::Header(_) => Rejection::Authority,
        };
        warn!(%peer, identity = %caller.identity, "malformed request: {what}");
        telemetry.emit(&Event::InboundRejected { peer, reason });
    };
    let serving = serve_observed(tls, &worker.shared.config.http2, drain, handler, malformed);
    let served = tokio::select! {
        biased;
        served = serving => served.map(Some),
        // Whoever holds the key after that need not be who it was.
        () = reached(until) => {
            warn!(%peer, identity = %caller.identity, "inbound HBONE: the caller's certificate has expired");
            close_expired(&worker, &expiring, peer);
            Ok(None)
        }
    };
    let carried = streams.get();
    telemetry.emit(&Event::TunnelClosed {
        reporter: Reporter::Destination,
        streams: carried,
    });
    match served {
        Ok(_) => {}
        Err(error @ ConnectionError::PrefaceTimeout) => {
            warn!(%peer, identity = %caller.identity, "inbound HBONE: {error}");
            telemetry.emit(&Event::InboundRejected {
                peer,
                reason: Rejection::Timeout,
            });
        }
        Err(error @ ConnectionError::Protocol(_)) => {
            warn!(%peer, identity = %caller.identity, "inbound HBONE: {error}");
            telemetry.emit(&Event::InboundRejected {
                peer,
                reason: Rejection::Protocol,
            });
        }
        Err(error) => debug!(%peer, "inbound HBONE: {error}"),
    }
}

/// Who is at the other end of an HBONE connection.
#[derive(Clone)]
struct Caller {
    identity: SpiffeId,
    peer: SocketAddr,
    /// The pod's address that was connected to.
    local: std::net::IpAddr,
}

/// A caller that has proved who it is.
struct Authenticated {
    tls: TlsStream,
    identity: SpiffeId,
    /// The end of its certificate.
    until: SystemTime,
}

async fn handshake(worker: &Worker, pod: &Pod, stream: TcpStream) -> Result<Authenticated, Failed> {
    let certificate = certificate_of(worker, pod).await?;
    let config = certificate.server_config().clone();
    let mut tls = TlsStream::accept(stream, config, HANDSHAKE_DEADLINE)
        .await
        .map_err(|e| Failed::new(ResponseFlag::TlsFailure, format!("TLS handshake: {e}")))?;
    let chain = tls.take_peer_certificates();
    let unreadable = |e: PeerIdentityError| {
        let error = format!("client certificate: {e}");
        Failed::new(ResponseFlag::IdentityError, error)
    };
    Ok(Authenticated {
        tls,
        identity: peer_identity(&chain).map_err(unreadable)?,
        until: peer_not_after(&chain).map_err(unreadable)?,
    })
}

/// Returns when the wall clock says so; a timer alone does not notice when that is set.
async fn reached(time: SystemTime) {
    while let Ok(left) = time.duration_since(SystemTime::now()) {
        // An instant that is not after it is past at the same second.
        let left = left.max(Duration::from_millis(1));
        sleep(left.min(WALL_CLOCK_CHECK)).await;
    }
}

/// Ends what a caller has open over one tunnel.
fn close_expired(worker: &Worker, pod: &Pod, peer: SocketAddr) {
    worker.connections.for_each(|live| {
        let Flow::Inbound(input) = &live.flow else {
            return;
        };
        // The port is the tunnel's own.
        let over_tunnel = input.identity.is_some() && input.source == peer;
        if over_tunnel && live.pod.incarnation == pod.incarnation {
            live.close(Closed::CertificateExpired);
        }
    });
}

/// Judges one CONNECT request and connects to the app; `None` when it was refused, which has
/// been recorded and answered.
async fn open(
    worker: &Worker,
    pod: Arc<Pod>,
    caller: Caller,
    mut incoming: Incoming,
) -> Option<Opened> {
    let started = Instant::now();
    let _busy = pod.busy();
    let telemetry = &worker.shared.telemetry;
    let authority = incoming.request.authority.to_string();
    let refuse = |incoming: Incoming, status: StatusCode, reason: Rejection| {
        warn!(peer = %caller.peer, identity = %caller.identity, reason = reason.as_str(),
            authority = %incoming.request.authority, "CONNECT refused");
        telemetry.emit(&Event::InboundRejected {
            peer: caller.peer,
            reason,
        });
        incoming.respond.refuse(status, "http_request_denied");
    };
    let Some(workload) = workload_of(worker, &pod).await else {
        let info = ConnectionInfo::new(
            Reporter::Destination,
            caller.peer,
            SocketAddr::new(caller.local, 0),
        );
        let error = "this workload is not known yet";
        telemetry.failed(&info, started.elapsed(), ResponseFlag::Connect, &error);
        incoming
            .respond
            .refuse(StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable");
        return None;
    };
    let snapshot = worker.shared.model.load_full();
    let target = match inbound::target(&snapshot, &workload, caller.local, &authority) {
        Ok(target) => target,
        Err(error) => {
            let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::BAD_REQUEST);
            let reason = match error {
                AuthorityError::NotLocal { .. } => Rejection::ForeignAuthority,
                _ => Rejection::Authority,
            };
            refuse(incoming, status, reason);
            return None;
        }
    };
    let destination = SocketAddr::new(caller.local, target.port);
    let upstream = SocketAddr::new(caller.local, target.upstream_port);
    if pod.is_proxy_port(upstream) {
        refuse(incoming, StatusCode::SERVICE_UNAVAILABLE, Rejection::Loop);
        return None;
    }

    if target.proxy_protocol {
        // Without the header that it expects the app would take the client's bytes for one.
        let info = ConnectionInfo::new(Reporter::Destination, caller.peer, upstream);
        let error =
            "this workload's application tunnel wants a PROXY header, which is not supported";
        telemetry.failed(&info, started.elapsed(), ResponseFlag::Connect, &error);
        incoming
            .respond
            .refuse(StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable");
        return None;
    }

    // The client's own port where its proxy tells it; the address is the connection's.
    let forwarded = incoming.request.forwarded.as_ref();
    let client_port = forwarded
        .filter(|f| f.source.ip().to_canonical() == caller.peer.ip())
        .map_or(caller.peer.port(), |f| f.source.port());
    let client = SocketAddr::new(caller.peer.ip(), client_port);
    let mut info =
        ConnectionInfo::new(Reporter::Destination, client, destination).with_destination(&workload);
    match snapshot.workload_at(&workload.network, caller.peer.ip()) {
        // What discovery says of the address counts only if it is who the certificate says.
        Some(source) if source.identity == caller.identity => info = info.with_source(source),
        _ => info.labels.source = labels_of_peer(&caller, &incoming),
    }
    let named = forwarded
        .and_then(|f| f.host.as_ref())
        .map(ToString::to_string);
    let service = target.service.clone().or_else(|| {
        let entry = snapshot.service_by_hostname(named.as_deref()?, &workload.namespace)?;
        entry
            .has_endpoint(&workload.uid)
            .then(|| entry.service().clone())
    });
    if let Some(service) = &service {
        info = info.with_service(service);
    }
    let info = info.with_mutual_tls(
        caller.identity.clone(),
        pod.spec.identity.clone(),
        authority.into(),
    );

    // Only of a waypoint that the control plane says serves this pod; the policies ask anew.
    let origin = forwarded.and_then(|forwarded| {
        Some(Box::new(Origin {
            address: forwarded.source,
            identity: forwarded.principal.clone()?,
        }))
    });
    let info = match workload.served_by.contains(&caller.identity) {
        true => info.with_origin(origin.clone()),
        false => info,
    };

    let input = PolicyInput {
        identity: Some(caller.identity),
        source: caller.peer,
        destination,
        origin,
    };
    let judge = Judge::of(worker);
    let judged = match judge.authorize(Some(&workload), &input) {
        Ok(version) => version,
        Err(denied) => {
            deny(telemetry, &info, started, incoming, &denied);
            return None;
        }
    };
    let connecting = connect_app(worker, &pod, client, upstream);
    let connected = tokio::select! {
        biased;
        // Nobody waits for the answer: a client that opens and resets streams in series must
        // not have us connect to the app for each of them.
        gone = incoming.respond.cancelled() => {
            telemetry.failed(&info, started.elapsed(), ResponseFlag::Connect, &gone);
            return None;
        }
        connected = connecting => connected,
    };
    let app = match connected {
        Ok(app) => app,
        Err(error) => {
            let error = format!("connect to the app at {upstream}: {error}");
            telemetry.failed(&info, started.elapsed(), ResponseFlag::Connect, &error);
            incoming
                .respond
                .refuse(StatusCode::SERVICE_UNAVAILABLE, "connection_refused");
            return None;
        }
    };
    let entry = match judge.enter(&worker.connections, pod, client, input, judged) {
        Ok(entry) => entry,
        Err(denied) => {
            reset_on_close(&app);
            deny(telemetry, &info, started, incoming, &denied);
            return None;
        }
    };
    let tunnel = match incoming.respond.accept(None) {
        Ok(tunnel) => tunnel,
        Err(error) => {
            telemetry.failed(&info, started.elapsed(), ResponseFlag::Connect, &error);
            return None;
        }
    };
    Some(Opened {
        record: telemetry.open(info),
        entry,
        app,
        peer: Peer::Tunnel(tunnel),
    })
}

/// Answers what a policy denies.
fn deny(
    telemetry: &Telemetry,
    info: &ConnectionInfo,
    started: Instant,
    incoming: Incoming,
    denied: &Failed,
) {
    telemetry.failed(info, started.elapsed(), denied.flag, denied);
    incoming
        .respond
        .refuse(StatusCode::UNAUTHORIZED, "connection_refused");
}

/// A caller that discovery does not know, as its own proxy describes it; the namespace is
/// that of its certificate.
fn labels_of_peer(caller: &Caller, incoming: &Incoming) -> WorkloadLabels {
    let unknown = BaggageFields::default();
    let baggage = incoming.request.baggage.as_deref().unwrap_or(&unknown);
    WorkloadLabels {
        workload: baggage.workload_name.clone(),
        namespace: caller.identity.namespace().into(),
        canonical_service: baggage.service_name.clone(),
        canonical_revision: baggage.service_version.clone(),
        cluster: baggage.cluster.clone(),
        region: baggage.region.clone(),
        zone: baggage.zone.clone(),
        principal: None,
    }
}
