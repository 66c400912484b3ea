//! `aditd`: wires the parts of the control plane together.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use adit_controlplane::auth::{JwtAuthenticator, TrustedAccounts};
use adit_controlplane::ca::{CertificateIssuer, TtlPolicy, parse_duration};
use adit_controlplane::compile::MeshConfig;
use adit_controlplane::driver::{ControlPlane, Options};
use adit_controlplane::serve::{Backends, ServeConfig, Serving};
use adit_shared::identity::{LocalCa, TrustDomain};
use adit_shared::telemetry::logging;
use anyhow::Context as _;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};

/// For the last lines of the log.
const LOG_FLUSH: Duration = Duration::from_secs(2);

/// Control plane of the Adit mesh: configuration and certificates for node proxies.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Directory or file of manifests; may be given several times.
    #[arg(long, env = "ADIT_CONFIG_DIR", required = true, value_delimiter = ':')]
    config_dir: Vec<PathBuf>,
    /// Where status is kept. Without it a restart forgets which pods are captured.
    #[arg(long, env = "ADIT_STATUS_DIR")]
    status_dir: Option<PathBuf>,
    /// Key and certificates of the certificate authority: Istio's `cacerts` files if they are
    /// there, made at the first start if not. Clients take root-cert.pem from here.
    #[arg(long, env = "ADIT_CA_DIR")]
    ca_dir: PathBuf,
    /// PEM file of the public keys that service-account tokens are signed with (P-256).
    #[arg(long, env = "ADIT_TOKEN_KEY")]
    token_key: PathBuf,
    /// Refuses tokens of other issuers.
    #[arg(long, env = "ADIT_TOKEN_ISSUER")]
    token_issuer: Option<String>,
    /// Trust domain of every workload.
    #[arg(long, env = "TRUST_DOMAIN", default_value = TrustDomain::DEFAULT, value_parser = TrustDomain::new)]
    trust_domain: TrustDomain,
    /// Further trust domains whose names in policies mean this mesh.
    #[arg(long, env = "TRUST_DOMAIN_ALIASES", value_delimiter = ',', value_parser = TrustDomain::new)]
    trust_domain_aliases: Vec<TrustDomain>,
    /// Policies in this namespace cover the mesh.
    #[arg(long, env = "ROOT_NAMESPACE", default_value = "istio-system")]
    root_namespace: String,
    /// Prefix of workload uids.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    cluster_id: String,
    /// Network of the workloads; empty is the default network.
    #[arg(long, env = "NETWORK", default_value = "")]
    network: String,
    /// Suffix of service names, after `.svc.`.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    cluster_domain: String,
    /// Policies with another `istio.io/rev` are ignored.
    #[arg(long, env = "REVISION", default_value = "default")]
    revision: String,
    /// No pod of these namespaces is enrolled.
    #[arg(
        long,
        env = "EXCLUDE_NAMESPACES",
        default_value = "kube-system",
        value_delimiter = ','
    )]
    exclude_namespaces: Vec<String>,
    /// What is bound to a waypoint that is not ready is reached without it (Istio's
    /// behaviour), past the policies that the waypoint enforces.
    #[arg(long, env = "ADIT_WAYPOINT_FAIL_OPEN")]
    waypoint_fail_open: bool,
    /// How long clients get to follow an opt-out before the pod is released.
    #[arg(long, env = "ADIT_WITHDRAW_DELAY", value_parser = parse_duration)]
    withdraw_delay: Option<Duration>,
    /// Address for node proxies (TLS).
    #[arg(long, env = "ADIT_LISTEN", default_value = "0.0.0.0:15012")]
    listen: SocketAddr,
    /// Address for metrics, readiness and /debug/syncz. Plain HTTP without authentication.
    #[arg(long, env = "ADIT_MONITORING_LISTEN", default_value = "0.0.0.0:15014")]
    monitoring_listen: SocketAddr,
    /// More DNS names and IP addresses for the serving certificate.
    #[arg(long, env = "ADIT_SERVING_NAMES", value_delimiter = ',')]
    serving_names: Vec<String>,
    /// Service accounts of node proxies, namespace/name.
    #[arg(
        long,
        env = "CA_TRUSTED_NODE_ACCOUNTS",
        default_value = "istio-system/ztunnel"
    )]
    trusted_node_accounts: TrustedAccounts,
    /// Validity of certificates for which none is asked.
    #[arg(long, env = "DEFAULT_WORKLOAD_CERT_TTL", default_value = "24h", value_parser = parse_duration)]
    default_workload_cert_ttl: Duration,
    /// Validity of certificates whatever is asked for.
    #[arg(long, env = "MAX_WORKLOAD_CERT_TTL", default_value = "2160h", value_parser = parse_duration)]
    max_workload_cert_ttl: Duration,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let log = match logging::init() {
        Ok(log) => log,
        Err(error) => {
            eprintln!("aditd: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    };
    log.flush(LOG_FLUSH);
    code
}

fn run(args: Args) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    // First of all: a stop that comes early must not be lost.
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;

    let authenticator = JwtAuthenticator::from_file(&args.token_key, args.token_issuer.as_deref())?;
    let ca = LocalCa::load_or_generate(&args.ca_dir, &args.trust_domain)
        .context("certificate authority")?;
    let mut options = options(&args);
    // Of the authority's key: replicas and restarts agree without anything that has to be kept.
    options.mesh.shared_secret = Some(ca.derive_secret("adit waypoints"));
    let mut control_plane = ControlPlane::start(options)
        .await
        .context("status directory")?;
    let issuer = CertificateIssuer::new(
        Arc::new(ca),
        control_plane.pods(),
        args.trust_domain,
        args.trusted_node_accounts,
        TtlPolicy {
            default: args.default_workload_cert_ttl,
            max: args.max_workload_cert_ttl,
        },
    );
    let serving = Serving::start(
        ServeConfig {
            listen: args.listen,
            monitoring: Some(args.monitoring_listen),
            serving_names: args.serving_names,
            ..ServeConfig::default()
        },
        Backends {
            snapshots: control_plane.snapshots(),
            authenticator: Arc::new(authenticator),
            issuer: Arc::new(issuer),
            reports: control_plane.reports(),
        },
    )
    .await?;

    let failed = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = control_plane.ended() => true,
    };
    info!("stopping");
    if !serving.stop().await {
        info!("not every connection ended in time");
    }
    anyhow::ensure!(!failed, "the control plane has ended by itself");
    Ok(())
}

fn options(args: &Args) -> Options {
    let mut options = Options {
        config: args.config_dir.clone(),
        status: args.status_dir.clone(),
        mesh: MeshConfig {
            trust_domain: args.trust_domain.clone(),
            trust_domain_aliases: args.trust_domain_aliases.clone(),
            root_namespace: args.root_namespace.as_str().into(),
            cluster_id: args.cluster_id.as_str().into(),
            network: args.network.as_str().into(),
            cluster_domain: args.cluster_domain.as_str().into(),
            revision: args.revision.as_str().into(),
            excluded_namespaces: args
                .exclude_namespaces
                .iter()
                .filter(|namespace| !namespace.is_empty())
                .map(|namespace| namespace.as_str().into())
                .collect(),
            waypoint_fail_open: args.waypoint_fail_open,
            shared_secret: None,
        },
        ..Options::default()
    };
    if let Some(delay) = args.withdraw_delay {
        options.withdraw_delay = delay;
    }
    options
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
