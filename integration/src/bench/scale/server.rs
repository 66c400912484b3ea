//! The API server without nodes, and `aditd` on it.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{sleep, timeout};

/// etcd and the API server may have to be built from source first.
const BUILD: Duration = Duration::from_secs(45 * 60);
const STOP: Duration = Duration::from_secs(20);
/// Runs of the benchmark have API servers of this name and their process id.
const PREFIX: &str = "bench-scale-";
const READY_POLL: Duration = Duration::from_millis(10);
const READY_ANSWER: Duration = Duration::from_secs(1);
/// Of the log of a control plane that did not come up.
const SHOWN_LOG: usize = 4000;

/// etcd and an API server. Dropping it ends both and removes their data, unless they are kept.
pub(super) struct ApiServer {
    name: String,
    kept: bool,
    pub(super) kubeconfig: PathBuf,
}

impl ApiServer {
    /// Starts one, and takes away what killed runs left behind. One that has a name is
    /// started unless it runs already, and is kept.
    pub(super) async fn start(name: Option<&str>) -> anyhow::Result<Self> {
        remove_leftovers().await?;
        let own = format!("{PREFIX}{}", std::process::id());
        let mut server = Self {
            name: name.map_or(own, ToOwned::to_owned),
            kept: name.is_some(),
            kubeconfig: PathBuf::new(),
        };
        server.kubeconfig = script(&["start", &server.name], BUILD).await?.into();
        Ok(server)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let stopped = command(&["stop", &self.name]).status();
        if !stopped.is_ok_and(|status| status.success()) {
            eprintln!(
                "bench: the API server {} could not be stopped: {} stop {0}",
                self.name,
                program().display()
            );
        }
    }
}

async fn remove_leftovers() -> anyhow::Result<()> {
    for name in script(&["list"], STOP).await?.lines() {
        let owner = name.strip_prefix(PREFIX);
        let owner = owner.and_then(|pid| pid.parse::<i32>().ok());
        if let Some(owner) = owner
            && kill(Pid::from_raw(owner), None).is_err()
        {
            script(&["stop", name], STOP).await?;
        }
    }
    Ok(())
}

fn program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/api-server")
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(arguments).stdin(Stdio::null());
    command
}

async fn script(arguments: &[&str], limit: Duration) -> anyhow::Result<String> {
    let mut command = tokio::process::Command::from(command(arguments));
    command.kill_on_drop(true).stderr(Stdio::inherit());
    let output = timeout(limit, command.output())
        .await
        .with_context(|| format!("api-server {arguments:?}: not done within {limit:?}"))??;
    ensure!(
        output.status.success(),
        "api-server {arguments:?}: {}",
        output.status
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The control plane that is measured. Dropping it ends it.
pub(super) struct Aditd {
    child: Child,
    pub(super) xds: SocketAddr,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

impl Aditd {
    /// Starts `program` as it runs in a cluster. The time until it is ready comes along.
    pub(super) async fn start(
        program: &Path,
        kubeconfig: &Path,
        limit: Duration,
    ) -> anyhow::Result<(Self, Duration)> {
        let directory = tempfile::tempdir()?;
        let log = directory.path().join("aditd.log");
        let [xds, monitoring, webhook] = free_addresses()?;
        let mut command = Command::new(program);
        command.env_clear().env("KUBECONFIG", kubeconfig);
        command.args(["--kubernetes", "--pod-name", "istiod-bench"]);
        for (flag, address) in [
            ("--listen", xds),
            ("--monitoring-listen", monitoring),
            ("--webhook-listen", webhook),
        ] {
            command.arg(flag).arg(address.to_string());
        }
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?);
        command.stderr(output);
        let started = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut server = Self {
            child,
            xds,
            log,
            _directory: directory,
        };
        let ready = timeout(limit, server.ready(monitoring)).await;
        match ready {
            Ok(Ok(())) => Ok((server, started.elapsed())),
            Ok(Err(error)) => Err(error.context(server.last_words())),
            Err(_) => bail!("not ready after {limit:?}: {}", server.last_words()),
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of its log.
    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let end = &log[log.len().saturating_sub(SHOWN_LOG)..];
        String::from_utf8_lossy(end).into_owned()
    }

    async fn ready(&mut self, monitoring: SocketAddr) -> anyhow::Result<()> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("aditd ended: {status}");
            }
            let answer = tokio::task::spawn_blocking(move || {
                adit_local::http_request(monitoring, "GET", "/ready", READY_ANSWER)
            })
            .await?;
            if answer.is_ok_and(|answer| answer.status == 200) {
                return Ok(());
            }
            sleep(READY_POLL).await;
        }
    }
}

impl Drop for Aditd {
    fn drop(&mut self) {
        // It is our child, and has not been waited for unless it ended by itself.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let deadline = Instant::now() + STOP;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Loopback addresses that nobody listens on.
fn free_addresses() -> anyhow::Result<[SocketAddr; 3]> {
    let listener = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let listeners = [listener()?, listener()?, listener()?];
    let [a, b, c] = listeners.map(|listener| listener.local_addr());
    Ok([a?, b?, c?])
}
