//! What a pod sends: the destination is what the app dialled; the model says which way it
//! goes; an endpoint that cannot be reached is replaced by another before the app notices.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::hbone::pool::CheckoutError;
use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::{
    Authority, Baggage, ConnectRequest, Connection, Forwarded, OpenError, Traceparent, Tunnel,
};
use adit_shared::identity::{SpiffeId, peer_identity};
use adit_shared::model::route::{self, ExpectedIdentities, Hbone, Outbound};
use adit_shared::model::{Service, Workload, WorkloadUid};
use adit_shared::net::copy;
use adit_shared::telemetry::{ConnectionInfo, Event, Rejection, Reporter, ResponseFlag};
use http::{HeaderValue, StatusCode};
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::upstream::connect_out;
use super::{Failed, Peer, TunnelKey, accept_loop, canonical, carry, reject, workload_of};
use crate::connections::Flow;
use crate::pod::Pod;
use crate::worker::Worker;

/// Endpoints that are tried for one connection.
const ENDPOINT_ATTEMPTS: usize = 3;
/// How long a TLS handshake may take, and the wait for a certificate before it.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Serves the pod's outbound listener until the task is dropped.
pub async fn accept(worker: Rc<Worker>, pod: Arc<Pod>, listener: TcpListener) {
    accept_loop(worker, pod, listener, "outbound", serve).await;
}

async fn serve(worker: Rc<Worker>, pod: Arc<Pod>, app: TcpStream, client: SocketAddr) {
    let started = Instant::now();
    // The route that loops captured connections to us leaves their destination as it was.
    let Ok(original) = app.local_addr().map(canonical) else {
        return;
    };
    if pod.is_proxy_port(original) || original.ip().is_loopback() {
        return reject(&worker, &app, client, Rejection::Loop);
    }
    let telemetry = &worker.shared.telemetry;
    let Some(source) = workload_of(&worker, &pod).await else {
        copy::abort(&app);
        let info = ConnectionInfo::new(Reporter::Source, client, original);
        let error = "this workload is not known yet";
        return telemetry.failed(&info, started.elapsed(), ResponseFlag::Connect, &error);
    };
    match connect(&worker, &pod, &source, client, original).await {
        Ok(Connected {
            peer,
            actual,
            hbone,
            info,
        }) => {
            let open = telemetry.open(info);
            let flow = Flow::Outbound {
                original,
                actual,
                hbone,
            };
            let entry = worker.connections.enter(pod, client, flow);
            carry(&worker, entry, app, peer, open).await;
        }
        Err((failed, info)) => {
            copy::abort(&app);
            telemetry.failed(&info, started.elapsed(), failed.flag, &failed);
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
    source: &Workload,
    client: SocketAddr,
    original: SocketAddr,
) -> Result<Connected, (Failed, ConnectionInfo)> {
    let info = |destination: SocketAddr| {
        ConnectionInfo::new(Reporter::Source, client, destination).with_source(source)
    };
    let mut tried: Vec<WorkloadUid> = Vec::new();
    let mut last: Option<(Failed, ConnectionInfo)> = None;
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
                        return Ok(Connected {
                            peer: Peer::Tunnel(tunnel),
                            actual: way.gateway,
                            hbone: true,
                            info: described,
                        });
                    }
                    Err(Attempt::Final(failed)) => return Err((failed, described)),
                    Err(Attempt::Elsewhere(failed)) => {
                        last = Some((failed, described));
                        tried.push(way.peer.uid.clone());
                    }
                }
            }
            Outbound::Plain(way) => {
                let destination = Some(way.destination.clone());
                let described = describe(info(way.address), &destination, &way.service);
                match connect_out(pod, way.address).await {
                    Ok(peer) => {
                        return Ok(Connected {
                            peer: Peer::Tcp(peer),
                            actual: way.address,
                            hbone: false,
                            info: described,
                        });
                    }
                    Err(e) => {
                        let error = format!("connect to {}: {e}", way.address);
                        last = Some((Failed::new(ResponseFlag::Connect, error), described));
                        tried.push(way.destination.uid.clone());
                    }
                }
            }
            Outbound::Passthrough { service } => {
                let described = describe(info(original), &None, &service);
                return match connect_out(pod, original).await {
                    Ok(peer) => Ok(Connected {
                        peer: Peer::Tcp(peer),
                        actual: original,
                        hbone: false,
                        info: described,
                    }),
                    Err(e) => {
                        let error = format!("connect to {original}: {e}");
                        Err((Failed::new(ResponseFlag::Connect, error), described))
                    }
                };
            }
            Outbound::Unavailable { reason, service } => {
                // After a failure its own reason says more than that nothing else is left.
                return Err(last.unwrap_or_else(|| {
                    let failed = Failed::new(ResponseFlag::Connect, reason.to_string());
                    (failed, describe(info(original), &None, &service))
                }));
            }
            Outbound::Unsupported { reason, service } => {
                let failed = Failed::new(ResponseFlag::Connect, reason.to_string());
                return Err((failed, describe(info(original), &None, &service)));
            }
        }
    }
    Err(last.unwrap_or_else(|| {
        (
            Failed::new(ResponseFlag::Connect, "no endpoint"),
            info(original),
        )
    }))
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

/// How an attempt failed: for good, or so that another endpoint may do.
enum Attempt {
    Final(Failed),
    Elsewhere(Failed),
}

async fn open_tunnel(
    worker: &Rc<Worker>,
    pod: &Arc<Pod>,
    source: &Workload,
    client: SocketAddr,
    way: &Hbone,
) -> Result<Tunnel, Attempt> {
    let key = TunnelKey {
        source_pod: pod.spec.uid.clone(),
        peer: way.peer.uid.clone(),
        address: way.gateway,
    };
    let request = ConnectRequest {
        authority: Authority::Address(way.authority),
        forwarded: Some(Forwarded {
            client,
            host: way.service.as_ref().map(|s| s.key.hostname.to_string()),
        }),
        baggage: baggage(source),
        traceparent: Some(Traceparent::random(&mut rand::rng())),
    };
    let connect = || {
        let (worker, pod) = (worker.clone(), pod.clone());
        let (gateway, identities) = (way.gateway, way.identities.clone());
        async move { connect_tunnel(worker, pod, gateway, identities).await }
    };
    let opened = worker.pool.checkout(&key, &request, connect).await;
    opened
        .map(|(tunnel, _)| tunnel)
        .map_err(|error| match error {
            CheckoutError::Connect(failed) => Attempt::Elsewhere((*failed).clone()),
            CheckoutError::Open(OpenError::Refused(StatusCode::UNAUTHORIZED)) => {
                let error = format!("{} at {} denies this caller", way.authority, way.peer.name);
                Attempt::Final(Failed::new(ResponseFlag::Denied, error))
            }
            CheckoutError::Open(error) => {
                let error = format!("CONNECT {} at {}: {error}", way.authority, way.gateway);
                Attempt::Elsewhere(Failed::new(ResponseFlag::Connect, error))
            }
        })
}

/// A new HBONE connection: from the pod, with the pod's certificate, to one that is expected.
async fn connect_tunnel(
    worker: Rc<Worker>,
    pod: Arc<Pod>,
    gateway: SocketAddr,
    identities: ExpectedIdentities,
) -> Result<Connection, Failed> {
    let shared = &worker.shared;
    let identity = &pod.spec.identity;
    let certificate = match shared.certificates.try_get(identity) {
        Some(certificate) => certificate,
        None => timeout(HANDSHAKE_DEADLINE, shared.certificates.get(identity))
            .await
            .map_err(|_| "timed out".to_owned())
            .and_then(|got| got.map_err(|e| e.to_string()))
            .map_err(|e| {
                let error = format!("no certificate for {identity}: {e}");
                Failed::new(ResponseFlag::IdentityError, error)
            })?,
    };
    let stream = connect_out(&pod, gateway).await.map_err(|e| {
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

    let started = Instant::now();
    let name = ServerName::IpAddress(gateway.ip().into());
    let config = certificate.client_config().clone();
    let tls = TlsStream::connect(stream, config, name, HANDSHAKE_DEADLINE).await;
    let mut tls = tls.map_err(|e| {
        shared.telemetry.emit(&Event::HandshakeFailed {
            reporter: Reporter::Source,
        });
        Failed::new(
            ResponseFlag::TlsFailure,
            format!("TLS handshake with {gateway}: {e}"),
        )
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
            unexpected(gateway, &peer, &identities),
        ));
    }
    shared.telemetry.emit(&Event::HandshakeCompleted {
        reporter: Reporter::Source,
        duration: started.elapsed(),
    });
    let telemetry = shared.telemetry.clone();
    let ended = move |streams| {
        telemetry.emit(&Event::TunnelClosed {
            reporter: Reporter::Source,
            streams,
        });
    };
    let connection = Connection::handshake(tls, &shared.config.http2, ended)
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
    Ok(connection)
}

fn unexpected(gateway: SocketAddr, peer: &SpiffeId, expected: &ExpectedIdentities) -> String {
    let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
    format!("{gateway} is {peer}, expected {}", expected.join(" or "))
}

fn baggage(source: &Workload) -> Option<HeaderValue> {
    let baggage = Baggage {
        cluster: source.cluster_id.to_string(),
        namespace: source.namespace.to_string(),
        kind: source.workload_type.to_string(),
        workload: source.workload_name.to_string(),
        service: source.canonical_name.to_string(),
        version: source.canonical_revision.to_string(),
        region: source.locality.region.to_string(),
        zone: source.locality.zone.to_string(),
    };
    // A name that cannot stand in a header is only missing in somebody's telemetry.
    HeaderValue::try_from(baggage.to_string()).ok()
}
