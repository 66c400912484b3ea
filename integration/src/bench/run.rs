//! The measurements, in the order in which they disturb each other least.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::ground::Ground;
use super::load::{Load, Outcome};
use super::report::{Burst, Machine, MemoryReport, Report, Round, Series};
use super::usage::{Memory, Used, Window, memory};

/// What is measured, in order.
const LOADS: &[Load] = &[
    Load::Bulk { streams: 1 },
    Load::Bulk { streams: 8 },
    Load::RoundTrips,
    Load::Connections { clients: 1 },
    Load::Connections { clients: 16 },
    Load::KeepAlive { connections: 64 },
    Load::HttpClose { clients: 16 },
];

/// Parts of the test that many short connections from one client do not slow down.
const BURSTS: usize = 4;
const BURST_CLIENTS: u32 = 16;
/// Proxies write what a load made them log, and give back what it made them hold.
const SETTLE: Duration = Duration::from_millis(200);
/// How long proxies have to give memory back after connections have closed.
const AFTER: Duration = Duration::from_secs(2);
const HOLD_DEADLINE: Duration = Duration::from_secs(60);

/// What is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Rounds; figures are medians over them.
    pub rounds: usize,
    /// Length of a load in the mesh, seconds; without a mesh half of it.
    pub seconds: u64,
    /// Length of each of the four parts of the test with many short connections, seconds.
    pub burst_seconds: u64,
    /// Idle connections.
    pub held: u32,
    /// Whether the proxies write access logs, as they are shipped.
    pub access_log: bool,
    /// Only loads whose name contains this.
    pub only: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rounds: 3,
            seconds: 4,
            burst_seconds: 10,
            held: 2000,
            access_log: true,
            only: None,
        }
    }
}

impl Options {
    /// A short run which shows that everything works; its figures are rough.
    pub fn quick() -> Self {
        Self {
            rounds: 1,
            seconds: 2,
            burst_seconds: 2,
            ..Self::default()
        }
    }

    pub(super) fn wants(&self, name: &str) -> bool {
        self.only
            .as_ref()
            .is_none_or(|only| name.contains(only.as_str()))
    }
}

/// Proxies that have just started are not idle yet; they look themselves over every 15 s.
const UNTIL_IDLE: std::time::Duration = std::time::Duration::from_secs(20);

/// Runs everything; says on standard error what it does.
///
/// # Errors
/// Whatever did not run. Missed limits are in the report.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let begin = Instant::now();
    let log = if options.access_log {
        "info"
    } else {
        "info,access=off"
    };
    eprintln!("bench: two nodes, with and without a mesh");
    let direct = Ground::direct().context("pods without a mesh")?;
    let mesh = Ground::meshed(log).context("pods in a mesh")?;
    let pids = mesh.proxies()?;
    std::thread::sleep(UNTIL_IDLE);
    let idle = memories(&pids)?;
    mesh.verify()?;
    let congestion_control = mesh.congestion_control()?;
    if congestion_control == "bbr" {
        bail!("the pods use bbr, whose pacing makes figures on a veth meaningless");
    }

    let memory_report = match options.wants("memory") {
        true => Some(idle_connections(options, &mesh, &pids, idle)?),
        false => None,
    };
    let loads: Vec<Load> = LOADS
        .iter()
        .copied()
        .filter(|load| options.wants(&load.name()))
        .collect();
    let mut series: Vec<Series> = loads.iter().map(|load| Series::new(*load)).collect();
    for (load, series) in loads.iter().zip(&mut series) {
        eprintln!("bench: {}", load.name());
        // The first operations load code, fill caches and open tunnels.
        load.run(&direct, 1)?;
        load.run(&mesh, 1)?;
        for _ in 0..options.rounds {
            let (outcome, used) = measure(*load, &direct, &[], options.seconds.div_ceil(2))?;
            series.direct.push(Round::new(*load, outcome, &used));
            let (outcome, used) = measure(*load, &mesh, &pids, options.seconds)?;
            series.mesh.push(Round::new(*load, outcome, &used));
        }
    }
    let burst = match options.wants("burst") {
        true => Some(bursts(options, &mesh, &pids)?),
        false => None,
    };
    let end = memories(&pids)?;
    let mut report = Report {
        machine: Machine::read(congestion_control)?,
        access_log: options.access_log,
        rounds: options.rounds,
        seconds: options.seconds,
        took_seconds: 0.0,
        series,
        memory: memory_report,
        peak: end.map(|m| m.peak),
        burst,
    };
    if mesh.proxies()? != pids {
        bail!("a ztunnel ended while it was measured");
    }
    report.took_seconds = begin.elapsed().as_secs_f64();
    Ok(report)
}

fn measure(
    load: Load,
    ground: &Ground,
    pids: &[u32],
    seconds: u64,
) -> anyhow::Result<(Outcome, Used)> {
    sleep(SETTLE);
    let window = Window::open(pids)?;
    let outcome = load.run(ground, seconds)?;
    // The proxies still close what the generator left open.
    sleep(SETTLE);
    Ok((outcome, window.close()?))
}

fn memories(pids: &[u32; 2]) -> anyhow::Result<[Memory; 2]> {
    Ok([memory(pids[0])?, memory(pids[1])?])
}

/// Holds idle connections and looks at what they cost.
fn idle_connections(
    options: &Options,
    mesh: &Ground,
    pids: &[u32; 2],
    idle: [Memory; 2],
) -> anyhow::Result<MemoryReport> {
    eprintln!("bench: memory of {} idle connections", options.held);
    // What code a first connection loads is not a cost of each.
    Load::Connections { clients: 16 }.run(mesh, 1)?;
    sleep(AFTER);
    let before = memories(pids)?;
    let (target, count) = (format!("{}:9090", mesh.server), options.held.to_string());
    let seconds = HOLD_DEADLINE.as_secs().to_string();
    let child = mesh.start_in_client(&[
        "adit-sample",
        "hold",
        &target,
        "--count",
        &count,
        "--seconds",
        &seconds,
    ])?;
    let holder = Holder(child);
    let holder = holder.wait_open(u64::from(options.held))?;
    sleep(SETTLE);
    let held = memories(pids)?;
    drop(holder);
    sleep(AFTER);
    let after = memories(pids)?;
    let resident = |m: [Memory; 2]| m.map(|m| m.resident);
    Ok(MemoryReport {
        idle: resident(idle),
        before: resident(before),
        connections: options.held,
        held: resident(held),
        after: resident(after),
    })
}

/// A client that holds connections; ends when this is dropped.
struct Holder(Child);

impl Holder {
    /// Waits until all are open.
    fn wait_open(mut self, expected: u64) -> anyhow::Result<Self> {
        let stdout = self.0.stdout.take().context("stdout")?;
        let mut line = String::new();
        let mut lines = BufReader::new(stdout);
        // It bounds itself: an operation that takes too long is a failure that it reports.
        lines.read_line(&mut line)?;
        let report: Value =
            serde_json::from_str(&line).with_context(|| format!("adit-sample hold: {line:?}"))?;
        if report["open"].as_u64() != Some(expected) {
            bail!("not all idle connections could be opened: {report}");
        }
        Ok(self)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Ok(pid) = self.0.id().try_into() {
            // It may have ended by itself; it is reaped only below.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}

/// Short connections from one client, back to back, until any table of ports that fills up
/// has done so.
fn bursts(options: &Options, mesh: &Ground, pids: &[u32; 2]) -> anyhow::Result<Burst> {
    eprintln!("bench: many short connections from one client");
    let load = Load::Connections {
        clients: BURST_CLIENTS,
    };
    let mut parts = Vec::new();
    for _ in 0..BURSTS {
        let window = Window::open(pids)?;
        let outcome = load.run(mesh, options.burst_seconds)?;
        parts.push(Round::new(load, outcome, &window.close()?));
    }
    Ok(Burst { parts })
}
