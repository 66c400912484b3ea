//! The server's certificate: issued by our own authority, renewed at half of its life.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use adit_shared::identity::{LocalCa, LocalCaError, control_plane_server_config};
use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::ca::CurrentCa;

use super::metrics::Metrics;

const RETRY: Duration = Duration::from_secs(60);
/// No renewal comes sooner than this after another, however short-lived certificates are.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// The names by which clients reach a control plane in Kubernetes, and locally.
const NAMES: [&str; 7] = [
    "istiod.istio-system.svc",
    "istiod.istio-system.svc.cluster.local",
    "istiod.istio-system",
    "aditd.istio-system.svc",
    "aditd.istio-system.svc.cluster.local",
    "aditd.istio-system",
    "localhost",
];

/// The serving certificate is unusable.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    /// It cannot be issued.
    #[error("serving certificate: {0}")]
    Issue(#[from] LocalCaError),
    /// TLS does not take it.
    #[error("serving certificate: {0}")]
    Tls(#[from] rustls::Error),
}

/// The TLS configuration of the moment.
pub(super) struct ServingTls {
    ca: CurrentCa,
    names: Vec<String>,
    addresses: Vec<IpAddr>,
    ttl: Duration,
    metrics: Arc<Metrics>,
    config: ArcSwap<ServerConfig>,
}

impl ServingTls {
    /// Issues the first certificate. `more` are names and addresses beyond the usual ones.
    pub(super) fn new(
        ca: CurrentCa,
        more: &[String],
        ttl: Duration,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, Duration), ServingError> {
        let mut names: Vec<String> = NAMES.map(str::to_owned).into();
        let mut addresses = vec![
            IpAddr::from(std::net::Ipv4Addr::LOCALHOST),
            IpAddr::from(std::net::Ipv6Addr::LOCALHOST),
        ];
        for name in more {
            match name.parse::<IpAddr>() {
                Ok(address) => addresses.push(address),
                Err(_) => names.push(name.clone()),
            }
        }
        let (config, renew_in) = issue(&ca.get(), &names, &addresses, ttl, &metrics)?;
        let tls = Self {
            ca,
            names,
            addresses,
            ttl,
            metrics,
            config: ArcSwap::new(config),
        };
        Ok((tls, renew_in))
    }

    /// What to accept the next connection with.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        self.config.load_full()
    }

    /// Renews until stopped. Connections keep what they were accepted with.
    pub(super) async fn renew(&self, first_in: Duration, stop: CancellationToken) {
        let mut wait = first_in;
        let mut ca = self.ca.clone();
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait.max(MIN_INTERVAL)) => {}
                () = ca.changed() => {}
                () = stop.cancelled() => return,
            }
            wait = match issue(
                &ca.get(),
                &self.names,
                &self.addresses,
                self.ttl,
                &self.metrics,
            ) {
                Ok((config, renew_in)) => {
                    self.config.store(config);
                    info!(?renew_in, "serving certificate renewed");
                    renew_in
                }
                Err(error) => {
                    error!(%error, retry_in = ?RETRY, "serving certificate not renewed");
                    RETRY
                }
            };
        }
    }
}

fn issue(
    ca: &LocalCa,
    names: &[String],
    addresses: &[IpAddr],
    ttl: Duration,
    metrics: &Metrics,
) -> Result<(Arc<ServerConfig>, Duration), ServingError> {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let certificate = ca.issue_serving(&names, addresses, ttl)?;
    let not_after = certificate.facts.not_after;
    let left = not_after
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    let config = control_plane_server_config(certificate.into_identity())?;
    metrics.serving_expiry.set(unix_seconds(not_after));
    metrics.ca_expiry.set(unix_seconds(ca.not_after()));
    Ok((Arc::new(config), left / 2))
}

fn unix_seconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .unwrap_or_default()
}
