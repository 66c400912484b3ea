//! Where it all runs: addresses of loopback that nobody else uses, and processes that are
//! bound to a core and end with the bench.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use adit_shared::identity::{LocalCa, TrustDomain};
use anyhow::{Context, anyhow, bail, ensure};
use serde::Serialize;
use tempfile::TempDir;

use super::identity::Credential;
use super::spec::{LoadResult, LoadSpec, UpstreamSpec};
use crate::bench::usage::{Used, Window};

/// The proxy under test has a core to itself.
pub(super) const PROXY_CORE: usize = 0;
/// All else shares another.
pub(super) const OTHER_CORE: usize = 1;
/// Something that starts is there by then.
const START: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// Beyond its length a load may take so long to open and to end.
const OVERTIME: Duration = Duration::from_secs(60);
/// Proxies write what they have buffered.
const SETTLE: Duration = Duration::from_millis(100);

/// Hosts of the bench, as the last byte of their address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HostId {
    /// The pod of service `web`, outside of the mesh.
    Plain = 2,
    /// The pod of service `secure`, behind HBONE.
    Secure = 3,
    Nginx = 11,
    Haproxy = 12,
    Envoy = 13,
    EnvoyWaypoint = 14,
    Waypoint = 15,
    ControlPlane = 16,
}

/// Directories, addresses, the authority and the upstream.
pub(super) struct Ground {
    directory: TempDir,
    block: u8,
    upstream: Option<Process>,
}

impl Ground {
    /// Makes the authority and starts the upstream.
    pub(super) fn new() -> anyhow::Result<Self> {
        let cores = std::thread::available_parallelism()?.get();
        ensure!(cores > OTHER_CORE, "a proxy and its load need a core each");
        let directory = tempfile::Builder::new().prefix("adit-bench-").tempdir()?;
        let mut ground = Self {
            directory,
            // Tests use the blocks below 128.
            block: 128 + (std::process::id() % 120) as u8,
            upstream: None,
        };
        fs::create_dir(ground.ca())?;
        LocalCa::load_or_generate(&ground.ca(), &TrustDomain::default())?;
        let spec = UpstreamSpec {
            plain: ground.address(HostId::Plain, UpstreamSpec::HTTP1),
            hbone: ground.address(HostId::Secure, 15008),
            ca: ground.ca(),
        };
        let mut command = own_program("l7-upstream", &spec)?;
        command.stdin(Stdio::null());
        let upstream = ground.start("upstream", OTHER_CORE, command)?;
        upstream.wait_listening(&[spec.plain, spec.hbone])?;
        ground.upstream = Some(upstream);
        Ok(ground)
    }

    pub(super) fn ip(&self, host: HostId) -> IpAddr {
        Ipv4Addr::new(127, self.block, 0, host as u8).into()
    }

    pub(super) fn address(&self, host: HostId, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(host), port)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Directory of the authority, by Istio's file names.
    pub(super) fn ca(&self) -> PathBuf {
        self.path("ca")
    }

    /// Writes a file and returns its path.
    pub(super) fn write(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Certificate and key of an account as PEM files.
    pub(super) fn credential(&self, account: &str) -> anyhow::Result<[PathBuf; 2]> {
        let credential = Credential::issue(&self.ca(), account)?;
        Ok([
            self.write(&format!("{account}.crt"), &credential.chain_pem)?,
            self.write(&format!("{account}.key"), &credential.key_pem)?,
        ])
    }

    /// Starts a process on one core. What it says goes into `<name>.log`, as do access logs
    /// on standard output.
    pub(super) fn start(
        &self,
        name: &str,
        core: usize,
        command: Command,
    ) -> anyhow::Result<Process> {
        let log = self.path(&format!("{name}.log"));
        Process::start(name, core, command, log)
    }

    /// Runs a load and says what it came to, and what it cost the processes.
    pub(super) fn load(&self, spec: &LoadSpec, pids: &[u32]) -> anyhow::Result<(LoadResult, Used)> {
        let mut command = pinned(OTHER_CORE, own_program("l7-load", spec)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // Its errors become notes in the report.
        command.env("RUST_BACKTRACE", "0");
        let errors = File::create(self.path("load.log"))?;
        let mut child = command.stderr(errors).spawn().context("load generator")?;
        let stdout = child.stdout.take().context("stdout")?;
        let mut stdin = child.stdin.take().context("stdin")?;
        let mut generator = Generator(child);
        let unexpected = |line: &str| {
            let errors = fs::read_to_string(self.path("load.log")).unwrap_or_default();
            let errors = errors.split_whitespace().collect::<Vec<_>>().join(" ");
            anyhow!("the load generator said {line:?}: {errors}")
        };
        let length = Duration::from_secs_f64(spec.seconds);
        let watchdog = generator.end_by(length + OVERTIME)?;
        let mut lines = BufReader::new(stdout).lines();
        let mut line = || lines.next().transpose().map(Option::unwrap_or_default);
        let ready = line()?;
        if ready != "ready" {
            return Err(unexpected(&ready));
        }
        sleep(SETTLE);
        let window = Window::open(pids)?;
        writeln!(stdin, "go")?;
        let report = line()?;
        let result = serde_json::from_str(&report).map_err(|_| unexpected(&report))?;
        sleep(SETTLE);
        let used = window.close()?;
        generator.0.wait()?;
        drop(watchdog);
        Ok((result, used))
    }
}

struct Generator(Child);

impl Generator {
    /// Has it ended if it takes too long.
    fn end_by(&mut self, limit: Duration) -> anyhow::Result<std::sync::mpsc::Sender<()>> {
        let pid = nix::unistd::Pid::from_raw(self.0.id().try_into()?);
        let (done, ended) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            let late = ended.recv_timeout(limit);
            if late == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                // It is not reaped before the sender is dropped.
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        });
        Ok(done)
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A hidden command of this very program.
fn own_program(command: &str, spec: &impl Serialize) -> anyhow::Result<Command> {
    let mut own = Command::new(std::env::current_exe()?);
    own.arg(command).arg(serde_json::to_string(spec)?);
    Ok(own)
}

fn pinned(core: usize, command: Command) -> Command {
    // Whatever ends the bench ends what it has started.
    let mut pinned = Command::new("setpriv");
    pinned.args(["--pdeathsig", "KILL", "taskset", "-c"]);
    pinned.arg(core.to_string());
    pinned.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => pinned.env(name, value),
            None => pinned.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        pinned.current_dir(directory);
    }
    pinned
}

/// A process that ends when this is dropped.
pub(super) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(name: &str, core: usize, command: Command, log: PathBuf) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        // Appending: the file is emptied between loads.
        let output = options.create(true).append(true).open(&log)?;
        let mut command = pinned(core, command);
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// `setpriv` and `taskset` become the program: it is the same process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until something listens on all of these.
    pub(super) fn wait_listening(&self, addresses: &[SocketAddr]) -> anyhow::Result<()> {
        for address in addresses {
            self.wait(&format!("listens on {address}"), || {
                TcpStream::connect_timeout(address, Duration::from_secs(1)).is_ok()
            })?;
        }
        Ok(())
    }

    /// Waits for a condition; says why if the process has ended.
    pub(super) fn wait(
        &self,
        what: &str,
        mut condition: impl FnMut() -> bool,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + START;
        while !condition() {
            let alive = fs::read_to_string(format!("/proc/{}/stat", self.pid()))
                .is_ok_and(|stat| !stat.contains(") Z "));
            if !alive || Instant::now() > deadline {
                bail!(
                    "{}: not yet so: {what}; it {}: {}",
                    self.name,
                    if alive { "runs" } else { "has ended" },
                    last_lines(&self.log),
                );
            }
            sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing that it could still do matters.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Empties a file that a process appends to.
pub(super) fn empty(path: &Path) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    Ok(file.set_len(0)?)
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}
