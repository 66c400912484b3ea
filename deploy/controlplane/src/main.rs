//! `aditd`: wires the parts of the control plane together.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use adit_controlplane::auth::{
    Authenticator, JwtAuthenticator, ReviewOptions, TokenReviewer, TrustedAccounts,
};
use adit_controlplane::ca::{
    CertificateIssuer, ClusterCa, CurrentCa, RotationTimes, TtlPolicy, parse_duration,
};
use adit_controlplane::compile::MeshConfig;
use adit_controlplane::driver::{ControlPlane, Input, Options};
use adit_controlplane::kubernetes::lease::Elector;
use adit_controlplane::kubernetes::{self, RootCertificates};
use adit_controlplane::provision::{PodDefaults, Provisioner, WaypointSettings};
use adit_controlplane::serve::{Backends, ServeConfig, Serving};
use adit_controlplane::source::WatchOptions;
use adit_controlplane::webhook::{Admission, CaBundles, Webhook, WebhookLimits};
use adit_shared::identity::{LocalCa, TrustDomain};
use adit_shared::net::socket::any_address;
use adit_shared::telemetry::logging;
use anyhow::Context as _;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};

/// What ztunnel and waypoints ask for unless told otherwise (`SECRET_TTL`).
const PROXY_CERT_TTL: Duration = Duration::from_secs(24 * 3600);
/// For the last lines of the log.
const LOG_FLUSH: Duration = Duration::from_secs(2);

/// Control plane of the Adit mesh: configuration and certificates for node proxies.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Reads the cluster that this process runs in, or the one of KUBECONFIG, in place of
    /// directories; keys and tokens are the cluster's too.
    #[arg(long, env = "ADIT_KUBERNETES")]
    kubernetes: bool,
    /// Directory or file of manifests; may be given several times.
    #[arg(long, env = "ADIT_CONFIG_DIR", value_delimiter = ':')]
    config_dir: Vec<PathBuf>,
    /// Where status is kept. Without it a restart forgets which pods are captured.
    #[arg(long, env = "ADIT_STATUS_DIR")]
    status_dir: Option<PathBuf>,
    /// Key and certificates of the certificate authority: Istio's `cacerts` files if they are
    /// there, made at the first start if not. Clients take root-cert.pem from here.
    #[arg(long, env = "ADIT_CA_DIR")]
    ca_dir: Option<PathBuf>,
    /// PEM file of the public keys that service-account tokens are signed with (P-256).
    #[arg(long, env = "ADIT_TOKEN_KEY")]
    token_key: Option<PathBuf>,
    /// Refuses tokens of other issuers.
    #[arg(long, env = "ADIT_TOKEN_ISSUER")]
    token_issuer: Option<String>,
    /// In a cluster: the namespace of the control plane.
    #[arg(long, env = "POD_NAMESPACE", default_value = "istio-system")]
    namespace: String,
    /// In a cluster: the name of this replica's pod; must differ from replica to replica.
    #[arg(long, env = "POD_NAME")]
    pod_name: Option<String>,
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
    #[arg(long, env = "ADIT_LISTEN", default_value_t = any_address(15012))]
    listen: SocketAddr,
    /// Address for metrics, readiness and /debug/syncz. Plain HTTP without authentication.
    #[arg(long, env = "ADIT_MONITORING_LISTEN", default_value_t = any_address(15014))]
    monitoring_listen: SocketAddr,
    /// In a cluster: address of the validating webhook (HTTPS).
    #[arg(long, env = "ADIT_WEBHOOK_LISTEN", default_value_t = any_address(15017))]
    webhook_listen: SocketAddr,
    /// In a cluster: the ValidatingWebhookConfiguration whose caBundle is kept current; empty:
    /// none. By default Istio's name for it, of the revision and the namespace.
    #[arg(long, env = "ADIT_WEBHOOK_CONFIGURATION")]
    webhook_configuration: Option<String>,
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
    #[command(flatten)]
    waypoints: WaypointArgs,
    /// Validity of certificates for which none is asked.
    #[arg(long, env = "DEFAULT_WORKLOAD_CERT_TTL", default_value = "24h", value_parser = parse_duration)]
    default_workload_cert_ttl: Duration,
    /// Validity of certificates whatever is asked for.
    #[arg(long, env = "MAX_WORKLOAD_CERT_TTL", default_value = "2160h", value_parser = parse_duration)]
    max_workload_cert_ttl: Duration,
    /// In a cluster: how long a new certificate authority is announced before it signs, so
    /// that every proxy renews meanwhile. Default: three fifths of a certificate's life.
    #[arg(long, env = "ADIT_CA_ROTATION_ANNOUNCE", value_parser = parse_duration)]
    ca_rotation_announce: Option<Duration>,
    /// In a cluster: how long the authority before is trusted after that. Default: a little
    /// more than a certificate's life.
    #[arg(long, env = "ADIT_CA_ROTATION_RETIRE", value_parser = parse_duration)]
    ca_rotation_retire: Option<Duration>,
}

impl Args {
    fn rotation_times(&self) -> RotationTimes {
        // Proxies ask for this much themselves, whatever the default for others is.
        let life = self.default_workload_cert_ttl.max(PROXY_CERT_TTL);
        let times = RotationTimes::for_certificates_of(life);
        RotationTimes {
            announce: self.ca_rotation_announce.unwrap_or(times.announce),
            retire: self.ca_rotation_retire.unwrap_or(times.retire),
        }
    }
}

/// In a cluster: what waypoints are run with.
#[derive(Debug, clap::Args)]
struct WaypointArgs {
    /// Where images come from.
    #[arg(long, env = "ADIT_HUB", default_value = "docker.io/adit")]
    hub: String,
    /// Which images.
    #[arg(long, env = "ADIT_TAG", default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Image of waypoints, in place of hub and tag.
    #[arg(long, env = "ADIT_WAYPOINT_IMAGE")]
    waypoint_image: Option<String>,
    /// When nodes fetch it: Always, IfNotPresent or Never.
    #[arg(
        long,
        env = "ADIT_WAYPOINT_IMAGE_PULL_POLICY",
        default_value = "IfNotPresent"
    )]
    waypoint_image_pull_policy: String,
    /// Names of Secrets for the registry, in the Gateways' namespaces.
    #[arg(long, env = "ADIT_WAYPOINT_IMAGE_PULL_SECRETS", value_delimiter = ',')]
    waypoint_image_pull_secrets: Vec<String>,
    /// Resources and placement of waypoints, as JSON: the chart's global.waypoint.
    #[arg(long, env = "ADIT_WAYPOINT_DEFAULTS", default_value = "")]
    waypoint_defaults: PodDefaults,
    /// Where waypoints find the control plane.
    #[arg(
        long,
        env = "ADIT_CONTROL_PLANE_ADDRESS",
        default_value = "https://istiod.istio-system.svc:15012"
    )]
    control_plane_address: String,
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

    let Surroundings {
        input,
        authenticator,
        ca,
        mut cluster,
    } = surroundings(&args).await?;
    let kubernetes = match &input {
        Input::Kubernetes(kubernetes) => Some(kubernetes.clone()),
        Input::Directories { .. } => None,
    };
    let elector = kubernetes
        .as_ref()
        .map(|kubernetes| Elector::start(kubernetes, &args.revision));
    let mut options = options(&args, input);
    options.leading = elector.as_ref().map(Elector::leading);
    options.authority = Some(ca.clone());
    let mesh = options.mesh.clone();
    let mut control_plane = ControlPlane::start(options)
        .await
        .context("status directory")?;
    let mut provisioner = tokio::task::JoinSet::new();
    if let (Some(kubernetes), Some(elector), Some(faults)) =
        (&kubernetes, &elector, control_plane.faults())
    {
        let provision = Provisioner::new(kubernetes, waypoint_settings(&args), faults);
        provisioner.spawn(provision.run(elector.leading()));
    }
    let webhook = args.kubernetes.then(|| Webhook {
        listen: args.webhook_listen,
        admission: Admission::new(control_plane.source(), mesh),
        limits: WebhookLimits::default(),
    });
    let serving_names = serving_names(&args);
    let issuer = CertificateIssuer::new(
        ca,
        control_plane.pods(),
        args.trust_domain,
        args.trusted_node_accounts,
        TtlPolicy {
            default: args.default_workload_cert_ttl,
            max: args.max_workload_cert_ttl,
        },
    );
    let mut serving = Serving::start(
        ServeConfig {
            listen: args.listen,
            monitoring: Some(args.monitoring_listen),
            webhook,
            serving_names,
            ..ServeConfig::default()
        },
        Backends {
            snapshots: control_plane.snapshots(),
            authenticator,
            issuer: Arc::new(issuer),
            reports: control_plane.reports(),
        },
    )
    .await?;
    if let Some(writes) = control_plane.write_metrics() {
        // Nobody else has set it.
        let _ = serving.metrics().writes.set(writes);
    }

    // What ends by itself has met a defect, and the rest would go on without it unnoticed.
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        () = control_plane.ended() => Some("compiling the configuration"),
        () = serving.ended() => Some("serving"),
        Some(result) = provisioner.join_next() => {
            if let Err(error) = result {
                error!(%error, "waypoints are not run any more");
            }
            Some("running waypoints")
        }
        what = Cluster::ended(cluster.as_mut()) => Some(what),
    };
    info!("stopping");
    // Another replica leads as soon as the Lease is back, so whoever writes ends before.
    provisioner.shutdown().await;
    control_plane.stop_writing().await;
    if let Some(elector) = elector {
        elector.release().await;
    }
    if !serving.stop().await {
        info!("not every connection ended in time");
    }
    match ended {
        None => Ok(()),
        Some(what) => anyhow::bail!("{what} has ended by itself"),
    }
}

/// What differs between a cluster and a directory.
struct Surroundings {
    input: Input,
    authenticator: Arc<dyn Authenticator>,
    ca: CurrentCa,
    cluster: Option<Cluster>,
}

/// What goes on in a cluster as long as this lives.
struct Cluster {
    ca: ClusterCa,
    roots: RootCertificates,
    bundles: Option<CaBundles>,
}

impl Cluster {
    /// Returns what has ended, once something has.
    async fn ended(this: Option<&mut Self>) -> &'static str {
        let Some(Self { ca, roots, bundles }) = this else {
            return std::future::pending().await;
        };
        let bundles = async {
            match bundles {
                Some(bundles) => bundles.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = ca.ended() => "following the certificate authority",
            () = roots.ended() => "handing out root certificates",
            () = bundles => "keeping the webhook's caBundle",
        }
    }
}

async fn surroundings(args: &Args) -> anyhow::Result<Surroundings> {
    if args.kubernetes {
        anyhow::ensure!(
            args.config_dir.is_empty(),
            "--kubernetes and --config-dir exclude each other"
        );
        let identity = match &args.pod_name {
            Some(name) => name.clone(),
            None => hostname().context("POD_NAME is not set")?,
        };
        let kubernetes = kubernetes::connect(&args.namespace, &identity).await?;
        let reviewer = TokenReviewer::new(kubernetes.client.clone(), ReviewOptions::default());
        let times = args.rotation_times();
        let ca = ClusterCa::start(&kubernetes, args.trust_domain.clone(), times).await?;
        let cluster = Cluster {
            roots: RootCertificates::start(kubernetes.clone(), ca.current()),
            bundles: webhook_configuration(args)
                .map(|name| CaBundles::start(kubernetes.clone(), name, ca.current())),
            ca,
        };
        return Ok(Surroundings {
            input: Input::Kubernetes(kubernetes),
            authenticator: Arc::new(reviewer),
            ca: cluster.ca.current(),
            cluster: Some(cluster),
        });
    }
    anyhow::ensure!(
        !args.config_dir.is_empty(),
        "--config-dir or --kubernetes is needed"
    );
    let key = args
        .token_key
        .as_deref()
        .context("--token-key is needed with --config-dir")?;
    let authenticator = JwtAuthenticator::from_file(key, args.token_issuer.as_deref())?;
    Ok(Surroundings {
        input: Input::Directories {
            roots: args.config_dir.clone(),
            watch: WatchOptions::default(),
        },
        authenticator: Arc::new(authenticator),
        ca: local_ca(args)?,
        cluster: None,
    })
}

fn local_ca(args: &Args) -> anyhow::Result<CurrentCa> {
    let directory = args
        .ca_dir
        .as_deref()
        .context("--ca-dir is needed with --config-dir")?;
    let ca = LocalCa::load_or_generate(directory, &args.trust_domain)
        .context("certificate authority")?;
    Ok(Arc::new(ca).into())
}

fn waypoint_settings(args: &Args) -> WaypointSettings {
    let of = &args.waypoints;
    let not_empty = |text: &&String| !text.is_empty();
    WaypointSettings {
        image: match of.waypoint_image.as_ref().filter(not_empty) {
            Some(image) => image.clone(),
            None => WaypointSettings::image_of(&of.hub, &of.tag),
        },
        pull_policy: of.waypoint_image_pull_policy.clone(),
        pull_secrets: of
            .waypoint_image_pull_secrets
            .iter()
            .filter(not_empty)
            .cloned()
            .collect(),
        defaults: of.waypoint_defaults.clone(),
        control_plane: of.control_plane_address.clone(),
        trust_domain: args.trust_domain.to_string(),
        cluster_id: args.cluster_id.clone(),
        cluster_domain: args.cluster_domain.clone(),
        network: args.network.clone(),
        revision: args.revision.clone(),
        root_namespace: args.root_namespace.clone(),
        node_accounts: args.trusted_node_accounts.clone(),
    }
}

fn webhook_configuration(args: &Args) -> Option<String> {
    let name = match (&args.webhook_configuration, args.revision.as_str()) {
        (Some(name), _) => name.clone(),
        (None, "" | "default") => format!("istio-validator-{}", args.namespace),
        (None, revision) => format!("istio-validator-{revision}-{}", args.namespace),
    };
    Some(name).filter(|name| !name.is_empty())
}

/// The usual names are of the usual namespace and domain.
fn serving_names(args: &Args) -> Vec<String> {
    let mut names = args.serving_names.clone();
    if args.kubernetes {
        let service = match args.revision.as_str() {
            "" | "default" => "istiod".to_owned(),
            revision => format!("istiod-{revision}"),
        };
        for service in ["istiod", &service] {
            let name = format!("{service}.{}", args.namespace);
            names.push(format!("{name}.svc.{}", args.cluster_domain));
            names.push(format!("{name}.svc"));
            names.push(name);
        }
        names.sort();
        names.dedup();
    }
    names
}

/// A pod's host name is its own name.
fn hostname() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("host name")?;
    Ok(name.trim().to_owned())
}

fn options(args: &Args, input: Input) -> Options {
    let mut options = Options {
        input,
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
