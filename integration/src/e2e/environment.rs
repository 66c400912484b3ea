//! Brings up what is missing for the tests (cluster, images, Adit) and takes away what it
//! brought up.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, ListParams};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::time::timeout;

use super::case::Skip;
use super::cluster::{Cluster, SYSTEM};
use super::helm;
use super::test::{TEST_LABEL, remove_namespace};

/// Builds on two cores take this long at most.
pub(super) const BUILD: Duration = Duration::from_secs(45 * 60);
const INSTALL: Duration = Duration::from_secs(300);
/// What is interrupted cleans up by then.
const END: Duration = Duration::from_secs(150);
/// What the images of the tests are called: not to be mistaken for released ones.
const HUB: &str = "localhost/adit-e2e";
const TAG: &str = "e2e";
/// What the images of the commit before are tagged with.
const PREVIOUS_TAG: &str = "previous";
/// The exit status of `scripts/previous` that says so.
const NO_COMMIT_BEFORE: i32 = 3;
const IMAGES: [&str; 5] = ["aditd", "ztunnel", "waypoint", "adit-cni", "app"];

/// Where the tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// `integration/cluster`.
    Namespaces,
    /// `kind`, which needs Docker.
    Kind,
    /// Whatever `KUBECONFIG` leads to.
    Given,
}

impl Flavour {
    /// A command that runs the arguments that are added to it on a node.
    pub(crate) fn on_node(self, node: &str) -> anyhow::Result<Command> {
        match self {
            Self::Namespaces => {
                let number = node
                    .strip_prefix("node-")
                    .with_context(|| format!("{node} is no node of integration/cluster"))?;
                let mut command = Command::new(directory("cluster").join("node"));
                command.args(["exec", number]);
                Ok(command)
            }
            Self::Kind => {
                let mut command = Command::new("docker");
                command.args(["exec", node]);
                Ok(command)
            }
            Self::Given => Err(Skip("needs a shell on the nodes".into()).into()),
        }
    }
}

/// What a user asks for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Where the tests run.
    pub flavour: Flavour,
    /// With [`Flavour::Given`].
    pub kubeconfig: Option<PathBuf>,
    /// Images that the cluster can pull; `None`: this tree's are built and loaded.
    pub images: Option<(String, String)>,
    /// This tree's images are built with optimizations, which takes ten minutes more.
    pub optimized: bool,
    /// Take the images that are loaded already.
    pub loaded: bool,
    /// The mesh is there already and stays.
    pub installed: bool,
    /// Leave everything in place at the end.
    pub keep: bool,
}

impl Wanted {
    /// Whether Adit may be installed, with or without the mesh's namespace there already.
    fn may_install(&self, there: bool) -> bool {
        self.flavour != Flavour::Given || self.installed || !there
    }

    fn stays(&self) -> bool {
        self.installed || self.keep
    }
}

/// What the tests stand on.
pub struct Environment {
    wanted: Wanted,
    /// The cluster, as tests see it.
    pub cluster: Cluster,
    hub: String,
    tag: String,
    started_cluster: bool,
    installed: bool,
}

impl Environment {
    /// Brings up what is missing.
    ///
    /// # Errors
    /// Something does not come up; what did is taken away again.
    pub async fn up(wanted: Wanted) -> anyhow::Result<Self> {
        let started_cluster = start_cluster(&wanted).await?;
        let kubeconfig = match &wanted.kubeconfig {
            Some(path) => path.clone(),
            None if wanted.flavour == Flavour::Kind => cluster_directory().join("kind/kubeconfig"),
            None => own_kubeconfig(),
        };
        let (hub, tag) = wanted
            .images
            .clone()
            .unwrap_or_else(|| (HUB.into(), TAG.into()));
        let cluster = Cluster::connect(kubeconfig, wanted.flavour).await?;
        let mut environment = Self {
            wanted,
            cluster,
            hub,
            tag,
            started_cluster,
            installed: false,
        };
        if let Err(error) = environment.prepare().await {
            environment.down().await.ok();
            return Err(error);
        }
        Ok(environment)
    }

    async fn prepare(&mut self) -> anyhow::Result<()> {
        self.is_ours().await?;
        if self.wanted.images.is_none() && !self.wanted.loaded {
            self.load_images().await?;
        }
        self.gateway_api().await?;
        if !self.wanted.installed {
            helm::remove_left(self).await?;
            self.installed = true;
            self.install().await?;
        }
        Ok(())
    }

    /// A mesh that somebody runs in a cluster that is not ours would be overwritten, and
    /// removed at the end.
    async fn is_ours(&self) -> anyhow::Result<()> {
        let there = self.cluster.get("", "v1", "Namespace", SYSTEM).await?;
        anyhow::ensure!(
            self.wanted.may_install(there.is_some()),
            "the cluster that KUBECONFIG leads to has a namespace {SYSTEM}: these tests install \
             Adit there, and take all of it away. Remove it first, or use the Adit that is \
             there with --installed"
        );
        Ok(())
    }

    /// Whether Adit stays when the tests are over: then no test may take it away.
    pub fn stays(&self) -> bool {
        self.wanted.stays()
    }

    /// The image of the sample application.
    pub fn app_image(&self) -> String {
        format!("{}/app:{}", self.hub, self.tag)
    }

    async fn load_images(&self) -> anyhow::Result<()> {
        say("images: of this tree");
        let mut build = Command::new(root().join("deploy/images/build"));
        let profile = match self.is_optimized() {
            true => "release",
            false => "dev",
        };
        build.args(IMAGES).env("PROFILE", profile);
        build.env("HUB", &self.hub).env("TAG", &self.tag);
        let output = target().join("images").join(profile);
        build.env("OUTPUT", &output);
        quiet("build the images", build, BUILD).await?;
        self.load(IMAGES.map(|image| output.join(format!("{image}.tar"))))
            .await
    }

    /// Into the nodes.
    async fn load(&self, files: impl IntoIterator<Item = PathBuf>) -> anyhow::Result<()> {
        let script = match self.wanted.flavour {
            Flavour::Namespaces => directory("cluster").join("load-images"),
            Flavour::Kind => directory("kind").join("load-images"),
            Flavour::Given => bail!(
                "a cluster that KUBECONFIG leads to pulls its images: push what `make images` \
                 wrote, then give --hub and --tag"
            ),
        };
        let mut load = Command::new(script);
        load.args(files);
        quiet("load the images", load, INSTALL).await
    }

    /// The Gateway API's resource definitions are the user's to install; a cluster for
    /// tests has no user.
    async fn gateway_api(&self) -> anyhow::Result<()> {
        let groups = self.cluster.client().list_api_groups().await?;
        if groups
            .groups
            .iter()
            .any(|group| group.name == "gateway.networking.k8s.io")
        {
            return Ok(());
        }
        if self.wanted.flavour == Flavour::Given {
            bail!("the cluster lacks the Gateway API's resource definitions: install them first");
        }
        say("Gateway API: resource definitions");
        let mut command = Command::new(directory("conformance").join("crds"));
        command.env("KUBECONFIG", self.cluster.kubeconfig());
        quiet("install the Gateway API", command, INSTALL).await
    }

    /// `adit install`, as a user does it.
    ///
    /// # Errors
    /// It fails.
    pub async fn install(&self) -> anyhow::Result<()> {
        self.install_with(&[]).await
    }

    /// The same with more settings, each `path=value`.
    ///
    /// # Errors
    /// It fails.
    pub async fn install_with(&self, settings: &[&str]) -> anyhow::Result<()> {
        say("Adit: install");
        let mut install = self.adit(&["install"])?;
        self.set(&mut install, &self.tag, settings);
        quiet("install Adit", install, INSTALL).await
    }

    /// `adit upgrade` to this tree's version.
    ///
    /// # Errors
    /// It fails.
    pub async fn upgrade(&self) -> anyhow::Result<()> {
        say("Adit: upgrade");
        let mut upgrade = self.adit(&["upgrade"])?;
        self.set(&mut upgrade, &self.tag, &[]);
        quiet("upgrade Adit", upgrade, INSTALL).await
    }

    fn set(&self, command: &mut Command, tag: &str, settings: &[&str]) {
        command.args(["-y", "--set", "profile=ambient"]);
        command.args(["--set", &format!("hub={}", self.hub)]);
        command.args(["--set", &format!("tag={tag}")]);
        for setting in settings {
            command.args(["--set", setting]);
        }
    }

    /// Whether the programs are built as they are released: limits of time mean those.
    pub fn is_optimized(&self) -> bool {
        self.wanted.images.is_some() || self.wanted.optimized
    }

    /// Where images come from, and what they are tagged with.
    pub(super) fn images(&self) -> (&str, &str) {
        (&self.hub, &self.tag)
    }

    /// What this tree's images are tagged with.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// For tests that install Adit anew.
    ///
    /// # Errors
    /// [`Skip`]: the installation is not the tests' own.
    pub fn may_reinstall(&self) -> anyhow::Result<()> {
        match self.installed {
            true => Ok(()),
            false => Err(Skip("Adit was not installed by the tests".into()).into()),
        }
    }

    /// Builds the commit before this one and loads its images; where its `adit` is.
    ///
    /// # Errors
    /// [`Skip`]: this clone has no commit before; or it cannot be built or loaded.
    pub async fn previous(&self) -> anyhow::Result<PathBuf> {
        if self.wanted.images.is_some() {
            return Err(Skip("the cluster pulls images, of this version only".into()).into());
        }
        say("images: of the commit before");
        let mut build = Command::new(directory("scripts").join("previous"));
        build
            .arg(PREVIOUS_TAG)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let done = timeout(BUILD, build.output()).await;
        let done = done.context("build the commit before: no end")??;
        if done.status.code() == Some(NO_COMMIT_BEFORE) {
            let why = "this clone has no commit before, or one that makes no images";
            return Err(Skip(why.into()).into());
        }
        let (out, err) = (
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr),
        );
        anyhow::ensure!(
            done.status.success(),
            "build the commit before: {}\n{out}{err}",
            done.status
        );
        let images = PathBuf::from(out.lines().last().context("no directory")?);
        let files = IMAGES.iter().filter(|image| **image != "app");
        let files = files.map(|image| images.join(format!("{image}.tar")));
        self.load(files).await?;
        Ok(images.join("adit"))
    }

    /// `adit install` by the program that [`Self::previous`] built.
    ///
    /// # Errors
    /// It fails.
    pub async fn install_previous(&self, adit: &Path) -> anyhow::Result<()> {
        say("Adit: install the version before");
        let mut install = Command::new(adit);
        install
            .arg("install")
            .env("KUBECONFIG", self.cluster.kubeconfig());
        self.set(&mut install, PREVIOUS_TAG, &[]);
        quiet("install the version before", install, INSTALL).await
    }

    /// `adit uninstall --purge`.
    ///
    /// # Errors
    /// It fails.
    pub async fn uninstall(&self) -> anyhow::Result<()> {
        let uninstall = self.adit(&["uninstall", "--purge", "-y"])?;
        quiet("uninstall Adit", uninstall, INSTALL).await
    }

    /// `adit` with the cluster's kubeconfig.
    ///
    /// # Errors
    /// The program has not been built.
    pub fn adit(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(program("adit")?);
        command
            .args(arguments)
            .env("KUBECONFIG", self.cluster.kubeconfig());
        Ok(command)
    }

    /// Runs a program on the cluster until it ends or is interrupted; whether it succeeded.
    /// `LOAD` tells it what loads images into the nodes; it is empty where they pull them.
    ///
    /// # Errors
    /// It cannot be started, or was interrupted.
    pub async fn exec(
        &self,
        program: &Path,
        interrupted: impl Future<Output = ()>,
    ) -> anyhow::Result<bool> {
        let mut command = Command::new(program);
        command.env("KUBECONFIG", self.cluster.kubeconfig());
        match self.wanted.flavour {
            Flavour::Namespaces => command.env("LOAD", directory("cluster").join("load-images")),
            Flavour::Kind => command.env("LOAD", directory("kind").join("load-images")),
            Flavour::Given => command.env("LOAD", ""),
        };
        let ended = run_unless(command, interrupted).await;
        ended.with_context(|| format!("run {}", program.display()))
    }

    /// Takes away what [`Self::up`] brought up.
    ///
    /// # Errors
    /// Something stays.
    pub async fn down(&self) -> anyhow::Result<()> {
        if self.wanted.keep {
            return Ok(());
        }
        let cleaned = self.remove_namespaces().await;
        let uninstalled = match self.installed && self.is_installed().await {
            // A cluster that goes away takes Adit along.
            true if !self.started_cluster => {
                say("Adit: uninstall");
                self.uninstall().await
            }
            _ => Ok(()),
        };
        if self.started_cluster {
            say("cluster: down");
            let script = match self.wanted.flavour {
                Flavour::Kind => directory("kind").join("down"),
                _ => directory("cluster").join("down"),
            };
            quiet("take the cluster down", Command::new(script), INSTALL).await?;
        }
        cleaned.and(uninstalled)
    }

    /// What tests left that did not come to their end.
    async fn remove_namespaces(&self) -> anyhow::Result<()> {
        let api = Api::<Namespace>::all(self.cluster.client());
        let left = ListParams::default().labels(TEST_LABEL);
        for namespace in api.list(&left).await? {
            let name = namespace.metadata.name.unwrap_or_default();
            remove_namespace(&self.cluster, &name).await?;
        }
        Ok(())
    }

    async fn is_installed(&self) -> bool {
        let found = self.cluster.get("", "v1", "Namespace", SYSTEM).await;
        matches!(found, Ok(Some(_)))
    }
}

/// Whether this started it.
async fn start_cluster(wanted: &Wanted) -> anyhow::Result<bool> {
    let directory = match wanted.flavour {
        Flavour::Given => return Ok(false),
        Flavour::Namespaces => directory("cluster"),
        Flavour::Kind => directory("kind"),
    };
    let mut status = Command::new(directory.join("up"));
    status.arg("--status").stdout(Stdio::null());
    if status.status().await.context("cluster status")?.success() {
        return Ok(false);
    }
    say("cluster: up");
    quiet(
        "bring the cluster up",
        Command::new(directory.join("up")),
        BUILD,
    )
    .await?;
    Ok(true)
}

/// Runs a command, whether it succeeded, unless it is interrupted: then it and all that it has
/// started are asked to end, and killed if they do not.
async fn run_unless(
    mut command: Command,
    interrupted: impl Future<Output = ()>,
) -> anyhow::Result<bool> {
    // In a group of its own: a signal reaches what a script has started, and one from the
    // terminal reaches nobody but us.
    let mut child = command
        .stdin(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let group = child.id().and_then(|id| i32::try_from(id).ok());
    let group = Pid::from_raw(group.context("a child without a process id")?);
    tokio::select! {
        status = child.wait() => return Ok(status?.success()),
        () = interrupted => say("interrupted: ending what runs"),
    }
    // It has not been waited for: the id is still its own.
    let _ = killpg(group, Signal::SIGTERM);
    if timeout(END, child.wait()).await.is_err() {
        let _ = killpg(group, Signal::SIGKILL);
        child.wait().await?;
    }
    bail!("interrupted")
}

/// Runs a command; what it says is shown only when it fails.
async fn quiet(what: &str, mut command: Command, limit: Duration) -> anyhow::Result<()> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(limit, command.output())
        .await
        .with_context(|| format!("{what}: not done within {limit:?}"))?
        .with_context(|| format!("{what}: {:?}", command.as_std().get_program()))?;
    if !output.status.success() {
        bail!(
            "{what}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

pub(crate) fn say(line: &str) {
    println!("{line}");
}

pub(super) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

pub(super) fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The kubeconfig of `integration/cluster`.
pub fn own_kubeconfig() -> PathBuf {
    cluster_directory().join("kubeconfig")
}

fn cluster_directory() -> PathBuf {
    std::env::var_os("ADIT_CLUSTER_DIR")
        .map_or_else(|| "/var/lib/adit/cluster".into(), PathBuf::from)
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A program of the tree, built beside this one.
fn program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.with_file_name(name);
    anyhow::ensure!(
        path.exists(),
        "{} has not been built: cargo build --bins",
        path.display()
    );
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_runs_on_the_cluster_ends_when_it_is_interrupted() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let mut command = Command::new("sh");
        // A script that cleans up, and what it has started.
        let script =
            "trap 'echo > $1; exit 0' TERM; sleep 600 & echo $! > $2.new; mv $2.new $2; wait";
        command.args(["-c", script, "sh", &path("cleaned"), &path("started")]);
        let started = folder.path().join("started");
        let interrupted = async {
            while !started.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let ended = timeout(Duration::from_secs(30), run_unless(command, interrupted)).await;
        let error = ended.expect("an end").expect_err("interrupted");
        assert_eq!(error.to_string(), "interrupted");
        assert!(folder.path().join("cleaned").exists());
        let sleep = std::fs::read_to_string(started).expect("a process id");
        let sleep = Pid::from_raw(sleep.trim().parse().expect("a number"));
        // A zombie, until its new parent has looked.
        let is_alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{sleep}/stat"));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        let gone = async {
            while is_alive() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(10), gone)
            .await
            .expect("its child ends too");

        let mut command = Command::new("sh");
        command.args(["-c", "exit 3"]);
        let never = std::future::pending();
        assert!(!run_unless(command, never).await.expect("a status"));
    }

    #[test]
    fn a_mesh_of_others_is_neither_overwritten_nor_removed() {
        // The cluster, --installed, --keep; whether it may be installed over a namespace
        // that is there, and whether it stays.
        for (flavour, installed, keep, may, stays) in [
            (Flavour::Given, false, false, false, false),
            (Flavour::Given, true, false, true, true),
            (Flavour::Given, false, true, false, true),
            (Flavour::Namespaces, false, false, true, false),
            (Flavour::Kind, false, true, true, true),
        ] {
            let wanted = Wanted {
                flavour,
                kubeconfig: None,
                images: None,
                optimized: false,
                loaded: false,
                installed,
                keep,
            };
            let found = (wanted.may_install(true), wanted.stays());
            assert_eq!(found, (may, stays), "{wanted:?}");
            assert!(wanted.may_install(false));
        }
    }
}
