//! Port 15012: accepts, speaks TLS and HTTP/2, and hands requests to the three services.
//!
//! hyper is driven directly rather than by tonic's server: every connection has a
//! handshake deadline, a deadline for its first request, and an age; their number is
//! bounded; and running out of file descriptors pauses accepting instead of ending it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use adit_shared::proto::ca::istio_certificate_service_server::{
    IstioCertificateServiceServer, SERVICE_NAME as CA_SERVICE,
};
use adit_shared::proto::enrolment::enrolment_service_server::{
    EnrolmentServiceServer, SERVICE_NAME as ENROLMENT_SERVICE,
};
use adit_shared::proto::xds::aggregated_discovery_service_server::SERVICE_NAME as ADS_SERVICE;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rand::Rng as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tracing::debug;

use super::accept::{accept, handshake};
use super::ads::Ads;
use super::certificates::Certificates;
use super::gate::{Gate, Peer};
use super::metrics::Metrics;
use super::reports::Reports;
use super::tls::ServingTls;

/// Certificate requests and enrolment reports.
const MAX_UNARY_REQUEST: usize = 4 << 20;
const HTTP2_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const HTTP2_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// One proxy has one xDS stream and a few calls at a time.
const MAX_CONCURRENT_STREAMS: u32 = 256;
const MAX_HEADER_LIST: u32 = 64 << 10;
/// What a stream may send before it is read: every client may do so at once.
const WINDOW: u32 = 128 << 10;

/// The bounds of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Open connections; more wait in the kernel's backlog.
    pub connections: usize,
    /// For the TLS handshake.
    pub handshake: Duration,
    /// For the first request of a caller whose token is good.
    pub first_request: Duration,
    /// A connection takes no more requests after this, less up to a tenth.
    pub max_age: Duration,
    /// For requests that are under way when a connection ends.
    pub drain: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            handshake: Duration::from_secs(10),
            first_request: Duration::from_secs(20),
            // A little more than a stream, so that a stream ends by itself.
            max_age: Duration::from_secs(32 * 60),
            drain: Duration::from_secs(5),
        }
    }
}

/// The services behind the port. Cheap to clone.
#[derive(Clone)]
pub(super) struct Services {
    gate: Gate,
    pub(super) ads: Ads,
    pub(super) certificates: IstioCertificateServiceServer<Certificates>,
    pub(super) reports: EnrolmentServiceServer<Reports>,
}

impl Services {
    pub(super) fn new(gate: Gate, ads: Ads, certificates: Certificates, reports: Reports) -> Self {
        Self {
            gate,
            ads,
            certificates: IstioCertificateServiceServer::new(certificates)
                .max_decoding_message_size(MAX_UNARY_REQUEST),
            reports: EnrolmentServiceServer::new(reports)
                .max_decoding_message_size(MAX_UNARY_REQUEST),
        }
    }

    async fn call(
        mut self,
        mut request: http::Request<Incoming>,
        admitted: Arc<AtomicBool>,
        metrics: Arc<Metrics>,
    ) -> Result<http::Response<Body>, Infallible> {
        let (name, service) = match request.uri().path().split('/').nth(1).unwrap_or_default() {
            ADS_SERVICE => ("xds", Service::Ads),
            CA_SERVICE => {
                metrics.certificate_requests.inc();
                ("ca", Service::Certificates)
            }
            ENROLMENT_SERVICE => ("enrolment", Service::Reports),
            _ => return Ok(Status::unimplemented("no such service").into_http()),
        };
        // Before a body is read: a message may be megabytes.
        if let Err(status) = self.gate.admit(name, &mut request).await {
            return Ok(status.into_http());
        }
        admitted.store(true, Ordering::Relaxed);
        // These services are always ready: they have no back-pressure of their own.
        match service {
            Service::Ads => Ok(self.ads.call(request)),
            Service::Certificates => self.certificates.call(request).await,
            Service::Reports => self.reports.call(request).await,
        }
    }
}

enum Service {
    Ads,
    Certificates,
    Reports,
}

/// The port.
pub(super) struct Listener {
    pub(super) services: Services,
    pub(super) tls: Arc<ServingTls>,
    pub(super) limits: ConnectionLimits,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Listener {
    /// Accepts until stopped.
    pub(super) async fn run(self: Arc<Self>, listener: TcpListener) {
        let this = self.clone();
        let connected = move |tcp, peer, place| {
            let this = this.clone();
            this.tasks.clone().spawn(async move {
                let _place = place;
                let _counted = this.metrics.connections.hold();
                if let Err((reason, error)) = this.connection(tcp, peer).await {
                    this.metrics.connection_failures.inc(reason);
                    debug!(%peer, reason, error, "connection failed");
                }
            });
        };
        let accepts = self.metrics.accepts.clone();
        let most = self.limits.connections;
        accept(listener, most, accepts, &self.stop, connected).await;
    }

    async fn connection(
        &self,
        tcp: TcpStream,
        peer: SocketAddr,
    ) -> Result<(), (&'static str, String)> {
        let limits = self.limits;
        let config = self.tls.config();
        let Some(tls) = handshake(tcp, config, limits.handshake, &self.stop).await? else {
            return Ok(());
        };

        // A stranger does not keep a place among the connections by asking in vain.
        let requested = Arc::new(AtomicBool::new(false));
        let service = {
            let requested = requested.clone();
            let (services, metrics) = (self.services.clone(), self.metrics.clone());
            service_fn(move |mut request: http::Request<Incoming>| {
                request.extensions_mut().insert(Peer(peer));
                services
                    .clone()
                    .call(request, requested.clone(), metrics.clone())
            })
        };
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(HTTP2_KEEPALIVE_INTERVAL)
            .keep_alive_timeout(HTTP2_KEEPALIVE_TIMEOUT)
            .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
            .max_header_list_size(MAX_HEADER_LIST)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(4 * WINDOW)
            .serve_connection(TokioIo::new(tls), service);
        let mut connection = std::pin::pin!(connection);

        let http = |error: hyper::Error| ("http", error.to_string());
        let age = limits.max_age.mul_f64(rand::rng().random_range(0.9..=1.0));
        let end_of_life = Instant::now() + age;
        tokio::select! {
            done = connection.as_mut() => return done.map_err(http),
            () = sleep(limits.first_request) => {}
            () = self.stop.cancelled() => {}
        }
        if !self.stop.is_cancelled() {
            if !requested.load(Ordering::Relaxed) {
                return Err(("no_request", "no request in time".to_owned()));
            }
            tokio::select! {
                done = connection.as_mut() => return done.map_err(http),
                () = sleep_until(end_of_life) => {}
                () = self.stop.cancelled() => {}
            }
        }
        connection.as_mut().graceful_shutdown();
        match timeout(limits.drain, connection).await {
            Ok(done) => done.map_err(http),
            Err(_) => Err(("drain", "requests were still under way".to_owned())),
        }
    }
}
