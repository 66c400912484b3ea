//! Medians, limits, a table for people and JSON for programs.

use std::fmt::Write as _;
use std::fs;

use anyhow::Context;
use serde::Serialize;

use super::load::{Latency, Load, Outcome};
use super::usage::{Cpu, Used};

/// Rounds in which others used more of the machine than this are disturbed.
pub(super) const DISTURBED: f64 = 0.05;
/// The last part of the burst must be at least so fast, relative to the first.
const BURST_KEPT: f64 = 0.8;
/// Fewer connections than this fill no table.
const BURST_CONNECTIONS: f64 = 28_000.0;
pub(super) const MIB: f64 = 1024.0 * 1024.0;

/// What a measurement must come in at, what it should, and what the best existing node proxy
/// takes on a 2-core machine over the same topology; both proxies together.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Target {
    limit: Option<f64>,
    aim: Option<f64>,
    peer: Option<f64>,
    /// Rates through the peer, and without a mesh on the machine that it was measured on: that
    /// machine is another one, and its figures are to be read in this light.
    peer_rates: Option<PeerRates>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PeerRates {
    direct: f64,
    mesh: f64,
}

fn target(load: Load) -> Target {
    let (limit, aim, peer, mesh, direct) = match load {
        Load::Bulk { streams: 1 } => (Some(800.0), 560.0, 1124.0, 9.7, 37.4),
        Load::Bulk { .. } => (Some(800.0), 560.0, 1516.0, 7.4, 38.2),
        Load::RoundTrips => (Some(75.0), 43.0, 85.0, 8200.0, 17_100.0),
        Load::Connections { clients: 1 } => (Some(400.0), 290.0, 576.0, 1709.0, 11_100.0),
        Load::Connections { .. } => (None, 145.0, 290.0, 4556.0, 23_700.0),
        Load::KeepAlive { .. } => (Some(36.0), 22.0, 43.0, 27_200.0, 137_000.0),
        Load::HttpClose { .. } => (None, 141.0, 282.0, 4462.0, 19_500.0),
    };
    Target {
        limit,
        aim: Some(aim),
        peer: Some(peer),
        peer_rates: Some(PeerRates { direct, mesh }),
    }
}

/// One run of one load.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Round {
    outcome: Outcome,
    /// CPU per operation of the client's and the server's proxy, in the load's unit.
    cost: Vec<Cpu>,
    foreign: f64,
    seconds: f64,
}

impl Round {
    pub(super) fn new(load: Load, outcome: Outcome, used: &Used) -> Self {
        let cost = |cpu: &Cpu| cpu.map(|us| load.cost(us, outcome.operations));
        Self {
            cost: used.proxies.iter().map(cost).collect(),
            foreign: used.foreign,
            seconds: used.took.as_secs_f64(),
            outcome,
        }
    }

    fn disturbed(&self) -> bool {
        self.foreign > DISTURBED
    }

    fn both(&self) -> f64 {
        self.cost.iter().map(|cpu| cpu.total()).sum()
    }
}

/// All rounds of one load.
#[derive(Debug, Clone)]
pub(super) struct Series {
    load: Load,
    pub(super) direct: Vec<Round>,
    pub(super) mesh: Vec<Round>,
}

impl Series {
    pub(super) fn new(load: Load) -> Self {
        Self {
            load,
            direct: Vec::new(),
            mesh: Vec::new(),
        }
    }
}

/// Medians of rounds; of those that nobody disturbed, if there are any.
#[derive(Debug, Clone, Serialize)]
struct Summary {
    rate: f64,
    latency_us: Option<Latency>,
    failures: u64,
    cost: Option<f64>,
    client_proxy: Option<Cpu>,
    server_proxy: Option<Cpu>,
    disturbed: bool,
}

impl Summary {
    fn of(rounds: &[Round]) -> Self {
        let quiet: Vec<&Round> = rounds.iter().filter(|r| !r.disturbed()).collect();
        let disturbed = quiet.is_empty();
        let used = if disturbed {
            rounds.iter().collect()
        } else {
            quiet
        };
        let of = |value: &dyn Fn(&Round) -> Option<f64>| {
            median(used.iter().filter_map(|round| value(round)).collect())
        };
        let latency = |value: &dyn Fn(&Latency) -> Option<f64>| {
            of(&|round| round.outcome.latency.as_ref().and_then(value))
        };
        let proxy = |index: usize| {
            let part = |value: fn(&Cpu) -> f64| of(&|round| round.cost.get(index).map(value));
            Some(Cpu {
                user: part(|cpu| cpu.user)?,
                system: part(|cpu| cpu.system)?,
            })
        };
        let percentiles = latency(&|l| Some(l.p50)).zip(latency(&|l| Some(l.p99)));
        Self {
            rate: of(&|round| Some(round.outcome.rate)).unwrap_or(0.0),
            latency_us: percentiles.map(|(p50, p99)| Latency {
                p50,
                p99,
                p999: latency(&|l| l.p999),
            }),
            failures: rounds.iter().map(|round| round.outcome.failures).sum(),
            cost: of(&|round| (!round.cost.is_empty()).then(|| round.both())),
            client_proxy: proxy(0),
            server_proxy: proxy(1),
            disturbed,
        }
    }
}

pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Resident memory of both proxies, bytes.
#[derive(Debug, Clone, Serialize)]
pub(super) struct MemoryReport {
    /// After start, one workload enrolled at each.
    pub(super) idle: [u64; 2],
    /// After a first load, no connection open.
    pub(super) before: [u64; 2],
    pub(super) connections: u32,
    /// With that many idle connections.
    pub(super) held: [u64; 2],
    /// After they have been closed.
    pub(super) after: [u64; 2],
}

impl MemoryReport {
    fn per_connection(&self) -> [f64; 2] {
        [0, 1].map(|i| {
            self.held[i].saturating_sub(self.before[i]) as f64 / f64::from(self.connections)
        })
    }
}

/// Short connections, back to back.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Burst {
    pub(super) parts: Vec<Round>,
}

/// What the figures were measured on.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    kernel: String,
    processor: String,
    cores: usize,
    memory_mib: u64,
    congestion_control: String,
    load_average: String,
}

impl Machine {
    pub(super) fn read(congestion_control: String) -> anyhow::Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|l| Some(l.split_once(':')?.1.trim().to_owned()))
                .unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo")?, "MemTotal");
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor: field(&read("/proc/cpuinfo")?, "model name"),
            cores: std::thread::available_parallelism()?.get(),
            memory_mib: memory
                .trim_end_matches(" kB")
                .parse::<u64>()
                .map_or(0, |kib| kib / 1024),
            congestion_control,
            load_average: read("/proc/loadavg")?.trim().to_owned(),
        })
    }
}

/// Everything that was measured.
#[derive(Debug)]
pub struct Report {
    pub(super) machine: Machine,
    pub(super) access_log: bool,
    pub(super) rounds: usize,
    pub(super) seconds: u64,
    pub(super) took_seconds: f64,
    pub(super) series: Vec<Series>,
    pub(super) memory: Option<MemoryReport>,
    pub(super) peak: [u64; 2],
    pub(super) burst: Option<Burst>,
}

/// One line that has a limit.
#[derive(Debug, Clone, Serialize)]
struct Check {
    name: String,
    value: f64,
    unit: &'static str,
    #[serde(flatten)]
    target: Target,
    /// `None`: it has no limit, or was not measured well enough.
    met: Option<bool>,
}

impl Report {
    /// Whether no limit was missed.
    pub fn passed(&self) -> bool {
        self.checks().iter().all(|check| check.met != Some(false))
    }

    /// The report as JSON: medians, checks, and every round.
    pub fn json(&self) -> serde_json::Value {
        let series = self.series.iter().map(|series| {
            serde_json::json!({
                "name": series.load.name(),
                "rate_unit": series.load.rate_unit(),
                "cost_unit": series.load.cost_unit(),
                "target": target(series.load),
                "direct": Summary::of(&series.direct),
                "mesh": Summary::of(&series.mesh),
                "rounds": { "direct": series.direct, "mesh": series.mesh },
            })
        });
        serde_json::json!({
            "machine": self.machine,
            "access_log": self.access_log,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "took_seconds": self.took_seconds,
            "loads": series.collect::<Vec<_>>(),
            "memory": self.memory,
            "peak": self.peak,
            "burst": self.burst,
            "checks": self.checks(),
            "passed": self.passed(),
        })
    }

    fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        for series in &self.series {
            let summary = Summary::of(&series.mesh);
            let target = target(series.load);
            checks.push(Check {
                name: series.load.name(),
                value: summary.cost.unwrap_or(0.0),
                unit: series.load.cost_unit(),
                met: target
                    .limit
                    .map(|limit| summary.cost.is_some_and(|cost| cost <= limit)),
                target,
            });
        }
        if let Some(memory) = &self.memory {
            let mib = memory.idle.map(|bytes| bytes as f64 / MIB);
            let limited = |name: &str, value: f64, unit, limit, aim, peer| Check {
                name: name.into(),
                value,
                unit,
                target: Target {
                    limit: Some(limit),
                    aim: Some(aim),
                    peer: Some(peer),
                    peer_rates: None,
                },
                met: Some(value <= limit),
            };
            let worst = mib[0].max(mib[1]);
            checks.push(limited(
                "memory, idle, the larger proxy",
                worst,
                "MiB",
                15.0,
                7.5,
                17.0,
            ));
            checks.push(Check {
                name: "memory, idle, both proxies".into(),
                value: mib[0] + mib[1],
                unit: "MiB",
                target: Target {
                    aim: Some(15.0),
                    peer: Some(33.4),
                    ..Target::default()
                },
                met: None,
            });
            let each: f64 = memory.per_connection().iter().sum();
            let name = "memory, idle connection, both proxies";
            checks.push(limited(name, each / 1024.0, "KiB", 8.0, 5.3, 10.6));
        }
        if let Some(burst) = &self.burst {
            let rates: Vec<f64> = burst.parts.iter().map(|part| part.outcome.rate).collect();
            let total: f64 = burst.parts.iter().map(|part| part.outcome.operations).sum();
            if let (Some(first), Some(last)) = (rates.first(), rates.last()) {
                let kept = last / first;
                checks.push(Check {
                    name: format!("{total:.0} short connections: last part relative to first"),
                    value: kept * 100.0,
                    unit: "%",
                    target: Target {
                        limit: Some(BURST_KEPT * 100.0),
                        aim: None,
                        peer: Some(4.0),
                        peer_rates: None,
                    },
                    met: (total >= BURST_CONNECTIONS).then_some(kept >= BURST_KEPT),
                });
            }
        }
        checks
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let machine = &self.machine;
        let mut out = format!(
            "{} cores ({}), {} MiB, Linux {}, {}; load average {}; access log {}; median of {} \
             rounds of {} s; took {:.0} s\n\n",
            machine.cores,
            machine.processor,
            machine.memory_mib,
            machine.kernel,
            machine.congestion_control,
            machine.load_average,
            if self.access_log { "on" } else { "off" },
            self.rounds,
            self.seconds,
            self.took_seconds,
        );
        let mut rows = vec![row(&[
            "",
            "direct",
            "mesh",
            "",
            "p50 us direct",
            "p50 us",
            "p99 us",
            "p99.9 us",
            "failed",
            "peer direct",
            "peer mesh",
        ])];
        for series in &self.series {
            let (direct, mesh) = (Summary::of(&series.direct), Summary::of(&series.mesh));
            let latency = |s: &Summary, value: fn(&Latency) -> Option<f64>| {
                s.latency_us
                    .as_ref()
                    .and_then(value)
                    .map_or(String::new(), number)
            };
            let rates = target(series.load).peer_rates;
            let peer = |rate: fn(PeerRates) -> f64| {
                rates.map_or(String::new(), |rates| number(rate(rates)))
            };
            rows.push(vec![
                series.load.name() + if mesh.disturbed { " ~" } else { "" },
                number(direct.rate),
                number(mesh.rate),
                series.load.rate_unit().into(),
                latency(&direct, |l| Some(l.p50)),
                latency(&mesh, |l| Some(l.p50)),
                latency(&mesh, |l| Some(l.p99)),
                latency(&mesh, |l| l.p999),
                (direct.failures + mesh.failures).to_string(),
                peer(|rates| rates.direct),
                peer(|rates| rates.mesh),
            ]);
        }
        out += &align(&rows);

        let mut rows = vec![row(&[
            "CPU of the proxies",
            "client user",
            "system",
            "server user",
            "system",
            "foreign %",
        ])];
        for series in &self.series {
            let mesh = Summary::of(&series.mesh);
            let part = |cpu: Option<Cpu>, value: fn(Cpu) -> f64| {
                cpu.map_or(String::new(), |cpu| number(value(cpu)))
            };
            let foreign = series
                .mesh
                .iter()
                .map(|r| format!("{:.0}", r.foreign * 100.0));
            rows.push(vec![
                format!("{}, {}", series.load.name(), series.load.cost_unit()),
                part(mesh.client_proxy, |c| c.user),
                part(mesh.client_proxy, |c| c.system),
                part(mesh.server_proxy, |c| c.user),
                part(mesh.server_proxy, |c| c.system),
                foreign.collect::<Vec<_>>().join(" "),
            ]);
        }
        out.push('\n');
        out += &align(&rows);

        let both = |name: &str, bytes: [f64; 2], divisor: f64| {
            let [client, server] = bytes.map(|b| b / divisor);
            vec![
                name.to_owned(),
                number(client),
                number(server),
                number(client + server),
            ]
        };
        let mut rows = vec![row(&["memory", "client", "server", "both"])];
        if let Some(memory) = &self.memory {
            let held = format!("{} idle connections, MiB", memory.connections);
            let mib = |bytes: [u64; 2]| bytes.map(|b| b as f64);
            rows.push(both("idle, MiB", mib(memory.idle), MIB));
            rows.push(both("after a first load, MiB", mib(memory.before), MIB));
            rows.push(both(&held, mib(memory.held), MIB));
            rows.push(both("each, KiB", memory.per_connection(), 1024.0));
            rows.push(both("after they closed, MiB", mib(memory.after), MIB));
        }
        rows.push(both(
            "peak over everything, MiB",
            self.peak.map(|b| b as f64),
            MIB,
        ));
        out.push('\n');
        out += &align(&rows);

        if let Some(burst) = &self.burst {
            let parts = burst.parts.iter().map(|part| {
                let failed = match part.outcome.failures {
                    0 => String::new(),
                    count => format!(" ({count} failed)"),
                };
                format!("{}{failed}", number(part.outcome.rate))
            });
            let parts: Vec<String> = parts.collect();
            // A String takes everything.
            let _ = writeln!(
                out,
                "\nshort connections from one client, /s: {}",
                parts.join(", ")
            );
        }

        let mut rows = vec![row(&[
            "both proxies",
            "ours",
            "",
            "limit",
            "aim",
            "peer",
            "",
        ])];
        for check in self.checks() {
            let optional = |value: Option<f64>| value.map_or(String::new(), number);
            let mark = match check.met {
                Some(true) => "pass",
                Some(false) => "FAIL",
                None => "",
            };
            rows.push(vec![
                check.name,
                number(check.value),
                check.unit.into(),
                optional(check.target.limit),
                optional(check.target.aim),
                optional(check.target.peer),
                mark.into(),
            ]);
        }
        out.push('\n');
        out += &align(&rows);
        if self
            .series
            .iter()
            .any(|series| Summary::of(&series.mesh).disturbed)
        {
            out += "~ others used more than 5 % of the machine in every round: rates and \
                    latencies are worth little, CPU figures more\n";
        }
        out
    }
}

pub(super) fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

/// Three significant digits, or whole numbers.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Columns: the first to the left, the others to the right.
pub(super) fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let width = *width;
            // A String takes everything.
            let _ = match index {
                0 => write!(line, "{cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        out += line.trim_end();
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn round(rate: f64, cpu_us: f64, foreign: f64) -> Round {
        let outcome = Outcome {
            operations: 1000.0,
            rate,
            ..Outcome::default()
        };
        let cpu = Cpu {
            user: cpu_us / 4.0,
            system: cpu_us / 4.0,
        };
        let used = Used {
            proxies: vec![cpu, cpu],
            foreign,
            took: Duration::from_secs(1),
        };
        Round::new(Load::RoundTrips, outcome, &used)
    }

    #[test]
    fn undisturbed_rounds_are_preferred() {
        let rounds = [
            round(1.0, 90_000.0, 0.5),
            round(3.0, 60_000.0, 0.01),
            round(5.0, 70_000.0, 0.0),
        ];
        let summary = Summary::of(&rounds);
        assert_eq!((summary.rate, summary.disturbed), (4.0, false));
        assert_eq!(summary.cost, Some(65.0));
        let summary = Summary::of(&rounds[..1]);
        assert_eq!((summary.rate, summary.disturbed), (1.0, true));
    }

    #[test]
    fn medians() {
        let table: &[(&[f64], Option<f64>)] = &[
            (&[], None),
            (&[3.0], Some(3.0)),
            (&[9.0, 1.0], Some(5.0)),
            (&[9.0, 1.0, 2.0], Some(2.0)),
        ];
        for (values, expected) in table {
            assert_eq!(median(values.to_vec()), *expected, "{values:?}");
        }
    }

    #[test]
    fn a_missed_limit_fails_the_report() {
        let report = |cpu_us| {
            let mut series = Series::new(Load::RoundTrips);
            series.mesh.push(round(1.0, cpu_us, 0.0));
            series.direct.push(round(1.0, 0.0, 0.0));
            Report {
                machine: Machine::read("cubic".into()).expect("machine"),
                access_log: true,
                rounds: 1,
                seconds: 1,
                took_seconds: 1.0,
                series: vec![series],
                memory: None,
                peak: [0, 0],
                burst: None,
            }
        };
        assert!(report(74_000.0).passed());
        assert!(report(74_000.0).table().contains("pass"));
        assert!(!report(76_000.0).passed());
        assert!(report(76_000.0).table().contains("FAIL"));
        assert_eq!(report(76_000.0).json()["passed"], false);
    }
}
