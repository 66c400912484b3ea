//! Serves the node proxies on port 15012: configuration (delta ADS), certificates, and the
//! enrolment reports that come back; and operators on 15014.
//!
//! A request's way: [`listener`] (TLS, HTTP/2) -> [`gate`] (who calls) -> [`ads`],
//! [`certificates`] or [`reports`]. A change's way: the compiler publishes a
//! [`ResourceSnapshot`] -> [`debounce`] -> each stream compares it with what it has sent.

pub(crate) mod accept;
mod ads;
mod body;
mod certificates;
mod clients;
mod debounce;
mod gate;
mod listener;
mod metrics;
mod monitoring;
mod reports;
mod requests;
mod snapshot;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info};

pub use ads::StreamLimits;
pub use clients::{ClientReport, TypeReport};
pub use debounce::Debounce;
pub use listener::ConnectionLimits;
pub use metrics::{Counter, Counters, Gauge, GaugeGuard, Metrics, WriteMetrics};
pub use reports::EnrolmentSink;
pub use snapshot::{NodeView, ResourceSnapshot, SnapshotBuilder};
pub use tls::ServingError;

use crate::auth::Authenticator;
use crate::ca::CertificateIssuer;
use crate::quota::Quota;
use crate::webhook::{self, Webhook};

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Where node proxies connect.
    pub listen: SocketAddr,
    /// Where operators connect, if anywhere.
    pub monitoring: Option<SocketAddr>,
    /// The webhook that the API server asks, if there is one.
    pub webhook: Option<Webhook>,
    /// DNS names and IP addresses for the serving certificate, beyond the usual ones.
    pub serving_names: Vec<String>,
    /// How long the serving certificate is valid; it is renewed at half of that.
    pub serving_ttl: Duration,
    /// How pushes are collected.
    pub debounce: Debounce,
    /// Bounds of xDS streams.
    pub streams: StreamLimits,
    /// Bounds of connections.
    pub connections: ConnectionLimits,
    /// How long a stop waits for streams and connections to end.
    pub stop_deadline: Duration,
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 15012)),
            monitoring: Some(SocketAddr::from(([0, 0, 0, 0], 15014))),
            webhook: None,
            serving_names: vec![],
            serving_ttl: Duration::from_secs(7 * 24 * 3600),
            debounce: Debounce::default(),
            streams: StreamLimits::default(),
            connections: ConnectionLimits::default(),
            stop_deadline: Duration::from_secs(10),
        }
    }
}

/// What is served and to whom.
pub struct Backends {
    /// Published configurations; the first that [is ready](ResourceSnapshot::is_ready) opens
    /// the service.
    pub snapshots: watch::Receiver<Arc<ResourceSnapshot>>,
    /// Verifies tokens.
    pub authenticator: Arc<dyn Authenticator>,
    /// Issues certificates.
    pub issuer: Arc<CertificateIssuer>,
    /// Takes what nodes report.
    pub reports: Arc<dyn EnrolmentSink>,
}

/// Why the service does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A port cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// No certificate to serve with.
    #[error(transparent)]
    Serving(#[from] ServingError),
}

/// A running service.
pub struct Serving {
    address: SocketAddr,
    monitoring: Option<SocketAddr>,
    webhook: Option<SocketAddr>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// What serves the ports and renews the certificate: none of it ends before the stop.
    essential: JoinSet<()>,
    deadline: Duration,
}

impl Serving {
    /// Starts to serve; must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn start(config: ServeConfig, backends: Backends) -> Result<Self, ServeError> {
        let Backends {
            snapshots: source,
            authenticator,
            issuer,
            reports,
        } = backends;
        let metrics = Arc::new(Metrics::default());
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let mut essential = JoinSet::new();
        let clients = clients::Clients::default();

        let (tls, renew_in) = tls::ServingTls::new(
            issuer.ca().clone(),
            &config.serving_names,
            config.serving_ttl,
            metrics.clone(),
        )?;
        let tls = Arc::new(tls);
        let (listener, address) = listen(config.listen).await?;
        let monitoring = match config.monitoring {
            Some(address) => Some(listen(address).await?),
            None => None,
        };

        let (target, snapshots) = watch::channel(source.borrow().clone());
        let mut webhook_address = None;
        if let Some(webhook) = config.webhook {
            let (listener, address) = listen(webhook.listen).await?;
            webhook_address = Some(address);
            let tls = tls.clone();
            let port = Arc::new(webhook::Port {
                admission: webhook.admission,
                limits: webhook.limits,
                accepts: metrics.accepts.clone(),
                tls: move || tls.config(),
                stop: stop.clone(),
                tasks: tasks.clone(),
            });
            essential.spawn(tasks.track_future(port.run(listener)));
            info!(%address, "serving the validating webhook");
        }

        let debounce = stoppable(&stop, config.debounce.run(source, target));
        essential.spawn(tasks.track_future(debounce));
        essential.spawn(tasks.track_future({
            let (tls, stop) = (tls.clone(), stop.clone());
            async move { tls.renew(renew_in, stop).await }
        }));

        let gate = gate::Gate::new(authenticator, metrics.clone());
        let trusted = issuer.trusted().clone();
        let ads = ads::Ads(Arc::new(ads::Shared {
            trusted: trusted.clone(),
            pods: issuer.pods().clone(),
            snapshots: snapshots.clone(),
            clients: clients.clone(),
            metrics: metrics.clone(),
            limits: config.streams,
            admission: Arc::new(Semaphore::new(config.streams.streams)),
            large_pushes: Arc::new(Semaphore::new(config.streams.large_in_flight as usize)),
            turns: requests::Turns::new(config.streams.large_requests),
            of_pods: Quota::new(config.streams.streams_of_pod),
            stop: stop.clone(),
            tasks: tasks.clone(),
        }));
        let certificates = certificates::Certificates {
            issuer,
            metrics: metrics.clone(),
        };
        let reports = reports::Reports {
            trusted,
            sink: reports,
            metrics: metrics.clone(),
        };
        let port = Arc::new(listener::Listener {
            services: listener::Services::new(gate, ads, certificates, reports),
            tls,
            limits: config.connections,
            metrics: metrics.clone(),
            stop: stop.clone(),
            tasks: tasks.clone(),
        });
        essential.spawn(tasks.track_future(port.run(listener)));
        let monitoring_address = monitoring.as_ref().map(|(_, address)| *address);
        if let Some((listener, _)) = monitoring {
            let port = Arc::new(monitoring::Monitoring {
                metrics: metrics.clone(),
                clients,
                snapshots,
                stop: stop.clone(),
                tasks: tasks.clone(),
            });
            essential.spawn(tasks.track_future(port.run(listener)));
        }
        info!(%address, monitoring = ?monitoring_address, "serving");
        Ok(Self {
            address,
            monitoring: monitoring_address,
            webhook: webhook_address,
            metrics,
            stop,
            tasks,
            essential,
            deadline: config.stop_deadline,
        })
    }

    /// Where node proxies connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where operators connect.
    pub fn monitoring_address(&self) -> Option<SocketAddr> {
        self.monitoring
    }

    /// Where the API server asks.
    pub fn webhook_address(&self) -> Option<SocketAddr> {
        self.webhook
    }

    /// What has been counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Returns when something without which serving is of no use has ended before the stop,
    /// which it does by a defect only: the process should end too, so that it is started anew.
    pub async fn ended(&mut self) {
        if let Some(Err(error)) = self.essential.join_next().await {
            error!(%error, "a part of serving has ended");
        }
    }

    /// Ends streams and connections in good order, within the deadline for that. Returns
    /// whether all did.
    pub async fn stop(self) -> bool {
        self.stop.cancel();
        self.tasks.close();
        tokio::time::timeout(self.deadline, self.tasks.wait())
            .await
            .is_ok()
    }
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServeError> {
    let failed = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

fn stoppable<F>(stop: &CancellationToken, task: F) -> impl Future<Output = ()> + use<F>
where
    F: Future<Output = ()>,
{
    let stop = stop.clone();
    async move {
        tokio::select! {
            () = task => {}
            () = stop.cancelled() => {}
        }
    }
}
