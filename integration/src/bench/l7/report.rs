//! Medians of rounds, ratios to the peers, limits.

use serde::Serialize;
use serde_json::json;

use super::contender::{Contender, Proxy, Way};
use super::scenario::{MAIN, OPEN_LOOP, Scenario};
use super::spec::LoadResult;
use crate::bench::report::{DISTURBED, MIB, align, median, number, row};
use crate::bench::usage::{Cpu, Memory, Used};

/// Of Envoy's CPU time per request, HBONE in and out.
const OF_ENVOY: f64 = 0.35;
/// Of HAProxy's, in plaintext.
const OF_HAPROXY: f64 = 1.25;
/// Resident memory, MiB.
const MEMORY: f64 = 20.0;

/// One run of one load through one contender.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Round {
    result: LoadResult,
    /// Microseconds for each request.
    cost: Cpu,
    foreign: f64,
}

impl Round {
    pub(super) fn new(result: LoadResult, used: &Used) -> Self {
        let requests = (result.requests + result.failures).max(1) as f64;
        let cpu = used.proxies.first().copied().unwrap_or_default();
        Self {
            cost: cpu.map(|micros| micros / requests),
            foreign: used.foreign,
            result,
        }
    }
}

/// A contender in a scenario.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) contender: Contender,
    pub(super) rounds: Vec<Round>,
    pub(super) memory: Option<Memory>,
    /// Why it could not be measured.
    pub(super) missing: Option<String>,
    /// What it does differently from the others.
    pub(super) unlike: Option<String>,
}

impl Row {
    pub(super) fn new(contender: Contender) -> Self {
        Self {
            contender,
            rounds: Vec::new(),
            memory: None,
            missing: None,
            unlike: None,
        }
    }

    /// The median over rounds.
    fn of(&self, value: impl Fn(&Round) -> f64) -> Option<f64> {
        median(self.rounds.iter().map(value).collect())
    }

    fn cost(&self) -> Option<f64> {
        self.of(|round| round.cost.total())
    }

    fn failures(&self) -> u64 {
        self.rounds.iter().map(|round| round.result.failures).sum()
    }

    fn disturbed(&self) -> bool {
        !self.rounds.is_empty() && self.rounds.iter().all(|round| round.foreign > DISTURBED)
    }
}

/// A scenario and what came of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Table {
    pub(super) scenario: Scenario,
    pub(super) rows: Vec<Row>,
}

impl Table {
    fn row(&self, proxy: Proxy, way: Way) -> Option<&Row> {
        let contender = Contender::new(proxy, way);
        self.rows.iter().find(|row| row.contender == contender)
    }

    /// Ratio of medians: the contenders have taken turns.
    fn ratio(
        &self,
        ours: Way,
        peer: (Proxy, Way),
        value: impl Fn(&Row) -> Option<f64>,
    ) -> Option<f64> {
        let ours = value(self.row(Proxy::Adit, ours)?)?;
        let theirs = value(self.row(peer.0, peer.1)?)?;
        (theirs > 0.0).then(|| ours / theirs)
    }
}

/// Everything that was measured at L7.
#[derive(Debug)]
pub struct Report {
    pub(super) tables: Vec<Table>,
    pub(super) rounds: usize,
    pub(super) seconds: u64,
    pub(super) took_seconds: f64,
}

#[derive(Debug, Clone, Serialize)]
struct Check {
    name: String,
    value: Option<f64>,
    limit: f64,
    /// `None`: it was not measured.
    met: Option<bool>,
}

impl Report {
    /// Whether no limit was missed.
    pub fn passed(&self) -> bool {
        self.checks().iter().all(|check| check.met != Some(false))
    }

    /// The report as JSON: checks, and every round.
    pub fn json(&self) -> serde_json::Value {
        json!({
            "rounds": self.rounds,
            "seconds": self.seconds,
            "took_seconds": self.took_seconds,
            "scenarios": self.tables,
            "checks": self.checks(),
            "passed": self.passed(),
        })
    }

    fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        let mut check = |name: String, value: Option<f64>, limit: f64| {
            let met = value.map(|value| value <= limit);
            checks.push(Check {
                name,
                value,
                limit,
                met,
            });
        };
        let find = |name: &str| self.tables.iter().find(|table| table.scenario.name == name);
        if let Some(main) = find(MAIN) {
            let cost = |ours, peer| main.ratio(ours, peer, Row::cost);
            check(
                "CPU per request, HBONE in and out, relative to Envoy's".into(),
                cost(Way::Both, (Proxy::Envoy, Way::Both)),
                OF_ENVOY,
            );
            check(
                "CPU per request, HBONE in, relative to HAProxy's in plaintext".into(),
                cost(Way::In, (Proxy::Haproxy, Way::Plain)),
                OF_HAPROXY,
            );
            check(
                "the same, an HBONE connection for each client connection".into(),
                cost(Way::InAlone, (Proxy::Haproxy, Way::Plain)),
                OF_HAPROXY,
            );
            let memory = main.row(Proxy::Adit, Way::Both).and_then(|row| row.memory);
            check(
                "resident memory after it, MiB".into(),
                memory.map(|memory| memory.resident as f64 / MIB),
                MEMORY,
            );
        }
        if let Some(open) = find(OPEN_LOOP) {
            let p99 = |row: &Row| row.of(|round| round.result.p99);
            check(
                "p99 at half of Envoy's rate, relative to Envoy's".into(),
                open.ratio(Way::Both, (Proxy::Envoy, Way::Both), p99),
                1.0,
            );
        }
        for table in &self.tables {
            let ours = table
                .rows
                .iter()
                .filter(|row| row.contender.proxy == Proxy::Adit);
            for row in ours.filter(|row| row.failures() > 0 || row.unlike.is_some()) {
                let name = format!(
                    "{}: {}: does not do what the others do",
                    table.scenario.name,
                    row.contender.name()
                );
                check(name, Some(row.failures().max(1) as f64), 0.0);
            }
        }
        checks
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let mut out = format!(
            "\nL7: proxies on one core, load and upstream on another; median of {} rounds of {} \
             s in turns; took {:.0} s\n",
            self.rounds, self.seconds, self.took_seconds
        );
        for table in &self.tables {
            out.push('\n');
            out += &table.text();
        }
        let mut rows = vec![row(&["L7 limits", "ours", "limit", ""])];
        for check in self.checks() {
            rows.push(vec![
                check.name,
                check.value.map_or("-".into(), number),
                number(check.limit),
                match check.met {
                    Some(true) => "pass".into(),
                    Some(false) => "FAIL".into(),
                    None => "not measured".into(),
                },
            ]);
        }
        out.push('\n');
        out + &align(&rows)
    }
}

impl Table {
    /// The scenario for people.
    pub(super) fn text(&self) -> String {
        let mut rows = vec![row(&[
            self.scenario.name,
            "CPU us/request",
            "user",
            "system",
            "/s",
            "p50 us",
            "p99 us",
            "p99.9 us",
            "failed",
            "RSS MiB",
            "foreign %",
        ])];
        let mut notes = String::new();
        for contender in &self.rows {
            let name = contender.contender.name();
            let shown = |value: Option<f64>| value.map_or("-".into(), number);
            let foreign = contender
                .rounds
                .iter()
                .map(|r| format!("{:.0}", r.foreign * 100.0));
            rows.push(vec![
                format!("  {name}{}", if contender.disturbed() { " ~" } else { "" }),
                shown(contender.cost()),
                shown(contender.of(|round| round.cost.user)),
                shown(contender.of(|round| round.cost.system)),
                shown(contender.of(|round| round.result.requests as f64 / round.result.seconds)),
                shown(contender.of(|round| round.result.p50)),
                shown(contender.of(|round| round.result.p99)),
                shown(contender.of(|round| round.result.p999)),
                contender.failures().to_string(),
                shown(contender.memory.map(|memory| memory.resident as f64 / MIB)),
                foreign.collect::<Vec<_>>().join(" "),
            ]);
            let failure = contender
                .rounds
                .iter()
                .find_map(|r| r.result.failure.as_ref());
            for (what, why) in [
                ("not measured", &contender.missing),
                ("does not do the same", &contender.unlike),
                ("failed", &failure.cloned()),
            ] {
                if let Some(why) = why {
                    notes += &format!("    {name}: {what}: {why}\n");
                }
            }
        }
        align(&rows) + &notes
    }
}
