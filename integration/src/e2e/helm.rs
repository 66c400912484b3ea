//! The program `helm`, run on the charts of this tree as their README has it.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Secret;
use kube::api::ListParams;
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::timeout;

use super::case::Skip;
use super::cluster::SYSTEM;
use super::environment::{BUILD, Environment, directory, root, say};
use super::test::remove_namespace;

/// Helm's own limit of waiting is five minutes.
const COMMAND: Duration = Duration::from_secs(330);
/// The exit status of `integration/helm/build` that says so.
const NO_GO: i32 = 3;

/// `helm` in a folder with a copy of the charts: what it writes beside them is not the tree's.
pub(crate) struct Helm<'a> {
    environment: &'a Environment,
    program: PathBuf,
    folder: TempDir,
}

impl<'a> Helm<'a> {
    /// Builds the program, unless it has been before.
    ///
    /// # Errors
    /// [`Skip`]: there is no Go; or it does not build.
    pub(crate) async fn new(environment: &'a Environment) -> anyhow::Result<Self> {
        let mut build = Command::new(directory("helm").join("build"));
        build.stdin(Stdio::null()).kill_on_drop(true);
        let done = timeout(BUILD, build.output()).await;
        let done = done.context("build helm: no end")??;
        if done.status.code() == Some(NO_GO) {
            return Err(Skip("needs Go, which helm is built with".into()).into());
        }
        let out = String::from_utf8_lossy(&done.stdout);
        if !done.status.success() {
            bail!(
                "build helm: {}\n{out}{}",
                done.status,
                String::from_utf8_lossy(&done.stderr)
            );
        }
        let program = out.lines().last().context("helm is nowhere")?.into();
        let folder = tempfile::tempdir()?;
        let charts = folder.path().join("deploy");
        std::fs::create_dir(&charts)?;
        let mut copy = Command::new("cp");
        copy.arg("-r").arg(root().join("deploy/charts")).arg(charts);
        anyhow::ensure!(copy.status().await?.success(), "the charts are not copied");
        Ok(Self {
            environment,
            program,
            folder,
        })
    }

    /// Runs a line, as `install ztunnel deploy/charts/ztunnel`; its standard output.
    ///
    /// # Errors
    /// It fails.
    pub(crate) async fn run(&self, line: &str) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command
            .args(line.split_whitespace())
            .current_dir(self.folder.path())
            .env("KUBECONFIG", self.environment.cluster.kubeconfig())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        // Settings, plugins and repositories of whoever runs the tests are none of theirs.
        for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(name, self.folder.path().join("helm"));
        }
        let done = timeout(COMMAND, command.output()).await;
        let done = done.with_context(|| format!("helm {line}: no end"))??;
        let (out, err) = (
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr),
        );
        anyhow::ensure!(done.status.success(), "helm {line}: {out}{err}");
        Ok(out.into_owned())
    }

    /// The same with this tree's images.
    ///
    /// # Errors
    /// It fails.
    pub(crate) async fn run_with_images(&self, line: &str) -> anyhow::Result<String> {
        let (hub, tag) = self.environment.images();
        let images = format!("--set global.hub={hub} --set global.tag={tag}");
        self.run(&format!("{line} {images}")).await
    }

    /// Removes every release of the mesh's namespace, those that have failed as well.
    ///
    /// # Errors
    /// One stays.
    pub(crate) async fn remove_all(&self) -> anyhow::Result<()> {
        let releases = self.run(&format!("list -aq -n {SYSTEM}")).await?;
        let releases = releases.split_whitespace().collect::<Vec<_>>().join(" ");
        if !releases.is_empty() {
            // Pods that are still ending would take away what is installed next.
            let waits = "--cascade foreground --wait";
            self.run(&format!("uninstall {releases} -n {SYSTEM} {waits}"))
                .await?;
        }
        Ok(())
    }
}

/// Removes what a test has left that was killed: `adit install` leaves alone what is Helm's,
/// and `adit uninstall` the namespace that it made.
pub(super) async fn remove_left(environment: &Environment) -> anyhow::Result<()> {
    let cluster = &environment.cluster;
    let namespace = cluster.get("", "v1", "Namespace", SYSTEM).await?;
    let label = "app.kubernetes.io/managed-by";
    if namespace.is_none_or(|found| found["metadata"]["labels"][label] == "adit") {
        return Ok(());
    }
    say("Adit: remove what Helm has installed");
    let releases = ListParams::default().labels("owner=helm").limit(1);
    let secrets = cluster.api::<Secret>(SYSTEM).list(&releases).await?;
    if !secrets.items.is_empty() {
        Helm::new(environment).await?.remove_all().await?;
    }
    remove_namespace(cluster, SYSTEM).await
}
