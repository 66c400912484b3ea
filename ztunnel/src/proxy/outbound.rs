//! What a pod sends: the destination is what the app dialled; the model says which way it
//! goes; an endpoint that cannot be reached is replaced by another before the app notices.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::hbone::record::{TlsError, TlsStream};
use adit_shared::hbone::{
    CheckoutError, ConnectRequest, Connection, Forwarded, OpenError, Retry, Traceparent, Tunnel,
};
use adit_shared::identity::{SpiffeId, WorkloadCertificate, peer_identity};
use adit_shared::model::route::{
    self, ExpectedIdentities, Hbone, Outbound, Unavailable, Unsupported, Via,
};
use adit_shared::model::{Service, Workload, WorkloadUid};
use adit_shared::net::socket::reset_on_close;
use adit_shared::telemetry::{ConnectionInfo, Event, Rejection, Reporter, ResponseFlag};
use http::StatusCode;
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::fail_closed::{self, Cause};
use super::upstream::connect_out;
use super::{
    Accepted, Failed, Opened, Peer, TunnelKey, accept_each, canonical, carry, certificate_of,
    reject, workload_of,
};
use crate::connections::Flow;
use crate::pod::Pod;
use crate::worker::Worker;

/// Endpoints that are tried for one connection.
const ENDPOINT_ATTEMPTS: usize = 3;
/// How long it may take until the peer has answered a CONNECT: its own connect has 10 s.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);
/// How long a TLS handshake may take.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How often it is looked whether a workload that does not answer still exists.
const GONE_INTERVAL: Duration = Duration::from_millis(200);

/// Serves the pod's outbound listener until the task is dropped.
pub async fn accept(worker: Rc<Worker>, pod: Arc<Pod>, listener: TcpListener) {
    accept_each(worker, pod, listener, "outbound", serve).await;
}

async fn serve(worker: Rc<Worker>, pod: Arc<Pod>, accepted: Accepted) {
    let Accepted {
        stream,
        peer,
        _permit,
        opening,
    } = accepted;
    let opened = Box::pin(open(&worker, pod, stream, peer)).await;
    drop(opening);
    if let Some(opened) = opened {
        carry(&worker, opened).await;
    }
}

/// Finds the way of a connection and opens it; `None` when that fails, which has been recorded.
async fn open(
    worker: &Rc<Worker>,
    pod: Arc<Pod>,
    app: TcpStream,
    client: SocketAddr,
) -> Option<Opened> {
    let started = Instant::now();
    // The route that loops captured connections to us leaves their destination as it was.
    let original = app.local_addr().map(canonical).ok()?;
    if pod.is_proxy_port(original) || original.ip().is_loopback() {
        reject(worker, &app, client, Rejection::Loop);
        return None;
    }
    let telemetry = &worker.shared.telemetry;
    let Some(source) = workload_of(worker, &pod).await else {
        reset_on_close(&app);
        let info = ConnectionInfo::new(Reporter::Source, client, original);
        let error = "this workload is not known yet";
        telemetry.failed(&info, started.elapsed(), ResponseFlag::Connect, &error);
        return None;
    };
    match connect(worker, &pod, &source, client, original).await {
        Ok(Connected {
            peer,
            actual,
            hbone,
            info,
        }) => {
            let flow = Flow::Outbound {
                original,
                actual,
                hbone,
            };
            Some(Opened {
                record: telemetry.open(info),
                entry: worker.connections.enter(pod, client, flow),
                app,
                peer,
            })
        }
        Err(Unopened {
            failed,
            info,
            waypoint,
        }) => {
            telemetry.failed(&info, started.elapsed(), failed.flag, &failed);
            match waypoint {
                // Boxed: an HTTP server is large, and hardly ever needed.
                Some(cause) => {
                    let told = Box::pin(fail_closed::tell(app, cause)).await;
                    telemetry.emit(&Event::WaypointFailed {
                        reason: cause.as_str(),
                        told: told.as_str(),
                    });
                }
                None => reset_on_close(&app),
            }
            None
        }
    }
}

/// A connection that can be carried.
struct Connected {
    peer: Peer,
    actual: SocketAddr,
    hbone: bool,
    info: ConnectionInfo,
}

async fn connect(
    worker: &Rc<Worker>,
    pod: &Arc<Pod>,
    source: &Arc<Workload>,
    client: SocketAddr,
    original: SocketAddr,
) -> Result<Connected, Unopened> {
    let info = |destination: SocketAddr| {
        ConnectionInfo::new(Reporter::Source, client, destination).with_source(source)
    };
    let mut tried: Vec<WorkloadUid> = Vec::new();
    let mut last: Option<Unopened> = None;
    while tried.len() < ENDPOINT_ATTEMPTS {
        let way = {
            let snapshot = worker.shared.model.load();
            route::outbound(&snapshot, source, original, &tried, &mut rand::rng())
        };
        if last.is_some() && !matches!(way, Outbound::Unavailable { .. }) {
            worker.shared.telemetry.emit(&Event::EndpointRetried);
        }
        match way {
            Outbound::Hbone(way) => {
                let described = describe(info(way.gateway), &way.destination, &way.service)
                    .with_mutual_tls(
                        pod.spec.identity.clone(),
                        way.identities.workload().clone(),
                        way.authority.to_string().into(),
                    );
                match open_tunnel(worker, pod, source, client, &way).await {
                    Ok(tunnel) => {
                        if way.via != Via::Direct {
                            worker.shared.failing_waypoints.reached(&way.peer.uid);
                        }
                        return Ok(Connected {
                            peer: Peer::Tunnel(tunnel),
                            actual: way.gateway,
                            hbone: true,
                            info: described,
                        });
                    }
                    Err(attempt) => {
                        // One that has answered lives.
                        if way.via != Via::Direct && attempt.cause == Cause::Unreachable {
                            let error = attempt.failed.to_string();
                            let failing = &worker.shared.failing_waypoints;
                            failing.failed(&way.peer.uid, &error);
                        }
                        let elsewhere = attempt.elsewhere;
                        let unopened = attempt.unopened(&way, described);
                        if !elsewhere {
                            return Err(unopened);
                        }
                        last = Some(unopened);
                        tried.push(way.peer.uid.clone());
                    }
                }
            }
            Outbound::Plain(way) => {
                let destination = Some(way.destination.clone());
                let described = describe(info(way.address), &destination, &way.service);
                let connecting = async {
                    tokio::select! {
                        biased;
                        connected = connect_out(worker, pod, way.address) => connected.map_err(|e| {
                            let error = format!("connect to {}: {e}", way.address);
                            Failed::new(ResponseFlag::Connect, error)
                        }),
                        failed = gone(worker, &way.destination, way.address) => Err(failed),
                    }
                };
                match connecting.await {
                    Ok(peer) => {
                        return Ok(Connected {
                            peer: Peer::Tcp(peer),
                            actual: way.address,
                            hbone: false,
                            info: described,
                        });
                    }
                    Err(failed) => {
                        last = Some(Unopened::new(failed, described));
                        tried.push(way.destination.uid.clone());
                    }
                }
            }
            Outbound::Passthrough { service } => {
                let described = describe(info(original), &None, &service);
                return match connect_out(worker, pod, original).await {
                    Ok(peer) => Ok(Connected {
                        peer: Peer::Tcp(peer),
                        actual: original,
                        hbone: false,
                        info: described,
                    }),
                    Err(e) => {
                        let error = format!("connect to {original}: {e}");
                        let failed = Failed::new(ResponseFlag::Connect, error);
                        Err(Unopened::new(failed, described))
                    }
                };
            }
            Outbound::Unavailable { reason, service } => {
                // After a failure its own reason says more than that nothing else is left.
                return Err(last.unwrap_or_else(|| {
                    let failed = Failed::new(ResponseFlag::Connect, reason.to_string());
                    let info = describe(info(original), &None, &service);
                    Unopened {
                        waypoint: (reason == Unavailable::NoWaypoint).then_some(Cause::NoWaypoint),
                        ..Unopened::new(failed, info)
                    }
                }));
            }
            Outbound::Unsupported { reason, service } => {
                let failed = Failed::new(ResponseFlag::Connect, reason.to_string());
                let info = describe(info(original), &None, &service);
                let elsewhere = reason == Unsupported::WaypointOnOtherNetwork;
                return Err(Unopened {
                    waypoint: elsewhere.then_some(Cause::Unreachable),
                    ..Unopened::new(failed, info)
                });
            }
        }
    }
    Err(last.unwrap_or_else(|| {
        let failed = Failed::new(ResponseFlag::Connect, "no endpoint");
        Unopened::new(failed, info(original))
    }))
}

/// A connection for which there is no other end.
struct Unopened {
    failed: Failed,
    info: ConnectionInfo,
    /// It is a waypoint that could not be passed.
    waypoint: Option<Cause>,
}

impl Unopened {
    fn new(failed: Failed, info: ConnectionInfo) -> Self {
        Self {
            failed,
            info,
            waypoint: None,
        }
    }
}

fn describe(
    mut info: ConnectionInfo,
    destination: &Option<Arc<Workload>>,
    service: &Option<Arc<Service>>,
) -> ConnectionInfo {
    if let Some(destination) = destination {
        info = info.with_destination(destination);
    }
    match service {
        Some(service) => info.with_service(service),
        None => info,
    }
}

/// How an attempt failed.
struct Attempt {
    failed: Failed,
    /// What it means where the peer is a waypoint.
    cause: Cause,
    /// Another endpoint may do.
    elsewhere: bool,
}

impl Attempt {
    /// Nobody has answered.
    fn unreachable(failed: Failed) -> Self {
        Self {
            failed,
            cause: Cause::Unreachable,
            elsewhere: true,
        }
    }

    /// Nobody was asked, and nobody else would be.
    fn without_certificate(failed: Failed) -> Self {
        Self {
            failed,
            cause: Cause::NoCertificate,
            elsewhere: false,
        }
    }

    /// It was the last.
    fn unopened(self, way: &Hbone, info: ConnectionInfo) -> Unopened {
        let Self { failed, cause, .. } = self;
        if way.via == Via::Direct {
            return Unopened::new(failed, info);
        }
        let failed = match cause {
            Cause::NoCertificate => failed,
            _ => Failed::new(failed.flag, format!("waypoint {}: {failed}", way.peer.name)),
        };
        Unopened {
            waypoint: Some(cause),
            ..Unopened::new(failed, info)
        }
    }
}

async fn open_tunnel(
    worker: &Rc<Worker>,
    pod: &Arc<Pod>,
    source: &Arc<Workload>,
    client: SocketAddr,
    way: &Hbone,
) -> Result<Tunnel, Attempt> {
    // Boxed: it is hardly ever waited for.
    let certificate = Box::pin(certificate_of(worker, pod))
        .await
        .map_err(Attempt::without_certificate)?;
    let key = TunnelKey::new(pod, &certificate, way);
    let request = ConnectRequest {
        authority: way.authority.into(),
        forwarded: Some(Forwarded {
            source: client,
            // A name that cannot stand there is only missing in somebody's telemetry.
            host: way
                .service
                .as_ref()
                .and_then(|s| s.key.hostname.parse().ok()),
            principal: None,
        }),
        baggage: Some(worker.descriptions.of(source)),
        traceparent: Some(Traceparent::random()),
    };
    let connect =
        async || connect_tunnel(worker, pod, &certificate, way.gateway, &way.identities).await;
    let deadline = Instant::now() + OPEN_DEADLINE;
    let opening = worker
        .pool
        .checkout(&key, &request, deadline.into(), connect);
    let opened = tokio::select! {
        biased;
        opened = opening => opened,
        failed = gone(worker, &way.peer, way.gateway) => return Err(Attempt::unreachable(failed)),
    };
    opened.map(|(tunnel, _)| tunnel).map_err(|error| {
        let retry = error.retry(|_| Retry::Elsewhere);
        let (cause, failed) = match &error {
            CheckoutError::Connect(failed) => (Cause::Unreachable, (**failed).clone()),
            CheckoutError::Open(OpenError::Refused {
                status: StatusCode::UNAUTHORIZED,
                ..
            }) => {
                let error = format!("{} at {} denies this caller", way.authority, way.peer.name);
                (Cause::Denied, Failed::new(ResponseFlag::Denied, error))
            }
            error => {
                let cause = match error {
                    CheckoutError::Open(OpenError::Refused { .. }) => Cause::Refused,
                    _ => Cause::Unreachable,
                };
                let error = format!("CONNECT {} at {}: {error}", way.authority, way.gateway);
                (cause, Failed::new(ResponseFlag::Connect, error))
            }
        };
        Attempt {
            failed,
            cause,
            elsewhere: retry != Retry::Never,
        }
    })
}

/// Returns when discovery has dropped `workload`, or its address, while a connection to it is
/// being opened: a pod that has vanished answers nothing, and the app need not wait for that.
/// Looks only now and then: usually the connection is there long before.
async fn gone(worker: &Worker, workload: &Workload, address: SocketAddr) -> Failed {
    loop {
        sleep(GONE_INTERVAL).await;
        let snapshot = worker.shared.model.load();
        let known = snapshot.workload(&workload.uid);
        if known.is_none_or(|known| !known.addresses.contains(&address.ip())) {
            let error = format!("{} at {address} is gone", workload.name);
            return Failed::new(ResponseFlag::Connect, error);
        }
    }
}

/// A new HBONE connection: from the pod, with this certificate of it, to one that is expected.
async fn connect_tunnel(
    worker: &Worker,
    pod: &Pod,
    certificate: &WorkloadCertificate,
    gateway: SocketAddr,
    identities: &ExpectedIdentities,
) -> Result<Connection, Failed> {
    let shared = &worker.shared;
    let handshake = match handshake(worker, pod, certificate, gateway).await {
        // A process that another one takes over from: the other answers now.
        Ok(Err(error)) if error.peer_has_gone() => {
            handshake(worker, pod, certificate, gateway).await
        }
        answered => answered,
    };
    let (mut tls, duration) = handshake?.map_err(|e| {
        shared.telemetry.emit(&Event::HandshakeFailed {
            reporter: Reporter::Source,
        });
        let error = format!("TLS handshake with {gateway}: {e}");
        Failed::new(ResponseFlag::TlsFailure, error)
    })?;
    let peer = peer_identity(&tls.take_peer_certificates()).map_err(|e| {
        Failed::new(
            ResponseFlag::IdentityError,
            format!("certificate of {gateway}: {e}"),
        )
    })?;
    if !identities.contains(&peer) {
        return Err(Failed::new(
            ResponseFlag::IdentityError,
            unexpected(gateway, &peer, identities),
        ));
    }
    shared.telemetry.emit(&Event::HandshakeCompleted {
        reporter: Reporter::Source,
        duration,
    });
    let connection = Connection::handshake(tls, &shared.config.http2)
        .await
        .map_err(|e| {
            Failed::new(
                ResponseFlag::Http2Handshake,
                format!("HTTP/2 with {gateway}: {e}"),
            )
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

/// One attempt, and how long its TLS part took; the outer error is TCP's.
async fn handshake(
    worker: &Worker,
    pod: &Pod,
    certificate: &WorkloadCertificate,
    gateway: SocketAddr,
) -> Result<Result<(TlsStream, Duration), TlsError>, Failed> {
    let stream = connect_out(worker, pod, gateway).await.map_err(|e| {
        let flag = if e.kind() == std::io::ErrorKind::TimedOut {
            ResponseFlag::NetworkPolicy
        } else {
            ResponseFlag::Connect
        };
        let hint = match flag {
            ResponseFlag::NetworkPolicy => " (maybe a NetworkPolicy blocks HBONE port 15008)",
            _ => "",
        };
        Failed::new(flag, format!("connect to {gateway}: {e}{hint}"))
    })?;
    let name = ServerName::IpAddress(gateway.ip().into());
    let config = certificate.client_config().clone();
    let started = Instant::now();
    let connecting = TlsStream::connect(stream, config, name, HANDSHAKE_DEADLINE);
    Ok(connecting.await.map(|tls| (tls, started.elapsed())))
}

fn unexpected(gateway: SocketAddr, peer: &SpiffeId, expected: &ExpectedIdentities) -> String {
    let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
    format!("{gateway} is {peer}, expected {}", expected.join(" or "))
}
