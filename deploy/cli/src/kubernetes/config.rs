//! Which cluster: flags, `KUBECONFIG`, `~/.kube/config`, or the pod that this runs in.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use http::{HeaderName, HeaderValue};
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};

use crate::output::UsageError;

/// Header of `--as-uid` (Kubernetes: user impersonation).
const IMPERSONATE_UID: HeaderName = HeaderName::from_static("impersonate-uid");

/// Flags that choose a Kubernetes cluster, as istioctl has them.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Which cluster")]
pub struct KubernetesArgs {
    #[command(flatten)]
    pub connection: ConnectionArgs,
    /// Namespace of the control plane
    #[arg(
        short = 'i',
        long = "istioNamespace",
        visible_alias = "istio-namespace",
        value_name = "NAMESPACE",
        default_value = "istio-system",
        global = true
    )]
    pub istio_namespace: String,
}

/// The same without the control plane's namespace, which an installation has its own flag
/// for.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Which cluster")]
pub struct ConnectionArgs {
    /// Kubernetes configuration file [default: $KUBECONFIG, else ~/.kube/config]
    #[arg(short = 'c', long, value_name = "FILE", global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the configuration file [default: its current one]
    #[arg(long, value_name = "NAME", global = true)]
    pub context: Option<String>,
    /// User to act as
    #[arg(long = "as", value_name = "USER", global = true)]
    pub impersonate: Option<String>,
    /// Group to act as; may be repeated
    #[arg(long = "as-group", value_name = "GROUP", global = true)]
    pub impersonate_groups: Vec<String>,
    /// Uid to act as
    #[arg(long = "as-uid", value_name = "UID", global = true)]
    pub impersonate_uid: Option<String>,
    /// How long the API server may take for one answer
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = humantime::parse_duration, global = true)]
    pub kubeclient_timeout: Duration,
}

impl ConnectionArgs {
    /// Whether the user named a cluster.
    pub fn names_a_cluster(&self) -> bool {
        self.kubeconfig.is_some() || self.context.is_some()
    }
}

/// What there is without any flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// The file that `KUBECONFIG` names.
    Environment { context: String },
    /// `~/.kube/config`.
    Home { context: String },
    /// The service account of the pod that this runs in.
    InCluster,
}

/// Looks for a cluster that nobody has named by a flag. A configuration without current
/// context is none.
///
/// # Errors
/// A configuration that cannot be read.
pub fn find() -> anyhow::Result<Found> {
    let set = env::var_os("KUBECONFIG").is_some_and(|value| !value.is_empty());
    if !set && !default_path().is_some_and(|path| path.exists()) {
        return Ok(match in_cluster() {
            true => Found::InCluster,
            false => Found::Nothing,
        });
    }
    let context = read(None)?.current_context;
    Ok(match context.filter(|name| !name.is_empty()) {
        None => Found::Nothing,
        Some(context) if set => Found::Environment { context },
        Some(context) => Found::Home { context },
    })
}

/// What was chosen.
pub(super) struct Chosen {
    pub(super) config: Config,
    /// For people.
    pub(super) context: String,
}

pub(super) async fn load(args: &ConnectionArgs) -> anyhow::Result<Chosen> {
    let mut chosen = match args.names_a_cluster() {
        false if find()? == Found::InCluster => Chosen {
            config: Config::incluster()
                .context("the service account of this pod cannot be used")?,
            context: "the cluster that this pod runs in".into(),
        },
        _ => from_file(args).await?,
    };
    let config = &mut chosen.config;
    config.connect_timeout = Some(args.kubeclient_timeout);
    if args.impersonate.is_some() {
        config.auth_info.impersonate.clone_from(&args.impersonate);
    }
    if !args.impersonate_groups.is_empty() {
        config.auth_info.impersonate_groups = Some(args.impersonate_groups.clone());
    }
    if let Some(uid) = &args.impersonate_uid {
        let uid = HeaderValue::from_str(uid)
            .map_err(|_| UsageError(format!("--as-uid {uid:?} is no value of a header")))?;
        config.headers.push((IMPERSONATE_UID, uid));
    }
    Ok(chosen)
}

async fn from_file(args: &ConnectionArgs) -> anyhow::Result<Chosen> {
    let file = args.kubeconfig.as_deref();
    let kubeconfig = read(file)?;
    let from = match file {
        Some(path) => path.display().to_string(),
        None => sources(),
    };
    let names: Vec<&str> = kubeconfig
        .contexts
        .iter()
        .map(|named| named.name.as_str())
        .collect();
    let current = kubeconfig.current_context.as_deref();
    let context = args.context.as_deref().or(current).unwrap_or_default();
    if context.is_empty() {
        bail!(
            "{from} has no current context: choose one with --context: {}",
            listed(&names)
        );
    }
    if !names.contains(&context) {
        bail!(
            "{from} has no context {context:?}; it has {}",
            listed(&names)
        );
    }
    let context = context.to_owned();
    let options = KubeConfigOptions {
        context: Some(context.clone()),
        ..KubeConfigOptions::default()
    };
    let config = Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .with_context(|| format!("context {context:?} of {from} cannot be used"))?;
    Ok(Chosen {
        config,
        context: format!("context {context:?}"),
    })
}

fn read(file: Option<&Path>) -> anyhow::Result<Kubeconfig> {
    let read = match file {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    read.map_err(|error| match error {
        KubeconfigError::ReadConfig(source, path)
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            let who = match file {
                Some(_) => "--kubeconfig",
                None if env::var_os("KUBECONFIG").is_some() => "$KUBECONFIG",
                None => "the default",
            };
            anyhow::anyhow!(
                "there is no kubeconfig {} ({who}): name one with --kubeconfig",
                path.display()
            )
        }
        KubeconfigError::FindPath => no_cluster(),
        error => anyhow::Error::from(error).context(match file {
            Some(path) => format!("kubeconfig {} cannot be read", path.display()),
            None => format!("kubeconfig {} cannot be read", sources()),
        }),
    })
}

/// Neither a cluster nor a mesh.
pub fn no_cluster() -> anyhow::Error {
    anyhow::anyhow!(
        "there is no kubeconfig ($KUBECONFIG, ~/.kube/config) and no local mesh runs: name a \
         cluster with --kubeconfig, or make a mesh with `adit local up`"
    )
}

fn sources() -> String {
    match env::var("KUBECONFIG") {
        Ok(paths) if !paths.is_empty() => paths,
        _ => default_path().map_or_else(|| "~/.kube/config".into(), |p| p.display().to_string()),
    }
}

fn default_path() -> Option<PathBuf> {
    Some(env::home_dir()?.join(".kube").join("config"))
}

fn in_cluster() -> bool {
    let token = Path::new("/var/run/secrets/kubernetes.io/serviceaccount/token");
    env::var_os("KUBERNETES_SERVICE_HOST").is_some() && token.exists()
}

fn listed(names: &[&str]) -> String {
    match names {
        [] => "none".into(),
        names => names.join(", "),
    }
}
