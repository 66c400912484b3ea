//! Flags that several of the commands have.

use std::path::PathBuf;

use anyhow::Context as _;

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
