//! Flags that several of the commands have.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::spec::Spec;
use crate::output::UsageError;

/// What is to be installed.
#[derive(Debug, clap::Args)]
pub struct SpecArgs {
    /// An IstioOperator file or a file of values; a later one has precedence
    #[arg(short, long = "filename", value_name = "FILE")]
    filename: Vec<PathBuf>,
    /// One value, over files: profile=demo, hub=H, tag=T, values.pilot.env.A=b,
    /// components.cni.enabled=false, meshConfig.trustDomain=T
    #[arg(short, long, value_name = "PATH=VALUE")]
    set: Vec<String>,
    /// The control plane's revision
    #[arg(short, long, value_name = "NAME")]
    revision: Option<String>,
    /// The namespace of the mesh's own components
    #[arg(
        short = 'i',
        long = "istioNamespace",
        alias = "istio-namespace",
        value_name = "NAMESPACE"
    )]
    istio_namespace: Option<String>,
}

impl SpecArgs {
    /// Files, then `--set`, then the flags.
    pub fn read(&self) -> anyhow::Result<Spec> {
        self.read_over(Spec::default())
    }

    /// The same over what an earlier installation was given.
    pub fn read_over(&self, mut spec: Spec) -> anyhow::Result<Spec> {
        for path in &self.filename {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            spec.add_file(&path.display().to_string(), &text)
                .map_err(usage)?;
        }
        for assignment in &self.set {
            spec.set(assignment).map_err(usage)?;
        }
        for (key, value) in [
            ("revision", &self.revision),
            ("namespace", &self.istio_namespace),
        ] {
            if let Some(value) = value {
                spec.lay(&[key.to_owned()], value.as_str().into());
            }
        }
        Ok(spec)
    }

    /// Where the mesh's own components are.
    pub fn namespace(&self) -> &str {
        self.istio_namespace.as_deref().unwrap_or("istio-system")
    }

    /// The revision that was named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or_default()
    }
}

/// The command line cannot be obeyed.
pub fn usage(error: impl std::fmt::Display) -> anyhow::Error {
    UsageError(error.to_string()).into()
}

/// Which cluster.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ClusterArgs {
    /// The kubeconfig file; default KUBECONFIG, else ~/.kube/config
    #[arg(short = 'c', long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig file; default its current one
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
}

impl ClusterArgs {
    /// A client of the cluster's API server, and how the cluster is called.
    pub async fn connect(&self) -> anyhow::Result<(Client, String)> {
        // Refused if there is one already, which is then as good.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        let config = match &self.kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path)
                    .with_context(|| format!("cannot read the kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(file, &options).await
            }
            None => Config::from_kubeconfig(&options).await,
        };
        let mut config = match (config, &self.kubeconfig, &self.context) {
            (Ok(config), _, _) => config,
            // In a pod, as the pod's account.
            (Err(error), None, None) => Config::incluster()
                .map_err(|_| error)
                .context("no cluster: there is no usable kubeconfig")?,
            (Err(error), _, _) => return Err(error).context("the kubeconfig cannot be used"),
        };
        config.connect_timeout = Some(Duration::from_secs(10));
        let name = match &self.context {
            Some(name) => name.clone(),
            None => config
                .cluster_url
                .host()
                .unwrap_or("the cluster")
                .to_owned(),
        };
        let client = Client::try_from(config).context("the kubeconfig cannot be used")?;
        Ok((client, name))
    }
}
