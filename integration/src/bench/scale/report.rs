//! Limits, a table for people and JSON for programs.

use serde::Serialize;

use super::world::Size;
use crate::bench::report::{DISTURBED, align, number, row};

/// What was measured in a cluster of one size.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measured {
    pub(super) size: Size,
    pub(super) changes: usize,
    pub(super) created_seconds: f64,
    /// From the start of the process.
    pub(super) ready_seconds: f64,
    /// From the first connection until every client has everything.
    pub(super) synced_seconds: f64,
    /// Connections that failed meanwhile.
    pub(super) retries: usize,
    pub(super) first_bytes_per_client: f64,
    /// Resident, when ready, without clients.
    pub(super) ready_mib: f64,
    /// Resident, with all clients: after their first responses or after the changes.
    pub(super) memory_mib: f64,
    pub(super) peak_mib: f64,
    /// From the request to the API server to the last client, ascending.
    pub(super) delays_ms: Vec<f64>,
    pub(super) cpu_us_per_change: f64,
    /// And client.
    pub(super) cpu_us_per_message: f64,
    /// And client; gRPC messages, without what TLS and HTTP/2 add.
    pub(super) bytes_per_change: f64,
    /// And client.
    pub(super) messages_per_change: f64,
    pub(super) foreign: f64,
    pub(super) took_seconds: f64,
}

/// All clusters.
#[derive(Debug)]
pub struct Report {
    pub(super) clusters: Vec<Measured>,
}

/// The bars: memory (MiB) and the time to the last client (99th percentile, ms).
fn limits(size: Size) -> Option<(f64, f64)> {
    match size.pods {
        10_000 => Some((250.0, 500.0)),
        100_000 => Some((1024.0, 1000.0)),
        _ => None,
    }
}

struct Line {
    name: &'static str,
    value: f64,
    unit: &'static str,
    limit: Option<f64>,
}

impl Line {
    fn met(&self) -> Option<bool> {
        self.limit.map(|limit| self.value <= limit)
    }
}

impl Measured {
    fn lines(&self) -> Vec<Line> {
        let limits = limits(self.size);
        let line = |name, value, unit| Line {
            name,
            value,
            unit,
            limit: None,
        };
        let bar = |name, value, unit, limit| Line {
            name,
            value,
            unit,
            limit,
        };
        vec![
            bar(
                "memory, peak",
                self.peak_mib,
                "MiB",
                limits.map(|(mib, _)| mib),
            ),
            line("memory, all clients connected", self.memory_mib, "MiB"),
            line("memory, ready, no client", self.ready_mib, "MiB"),
            line(
                "change to last client, p50",
                percentile(&self.delays_ms, 0.5),
                "ms",
            ),
            bar(
                "change to last client, p99",
                percentile(&self.delays_ms, 0.99),
                "ms",
                limits.map(|(_, ms)| ms),
            ),
            line("CPU per change", self.cpu_us_per_change / 1e3, "ms"),
            line("CPU per change and client", self.cpu_us_per_message, "us"),
            line("bytes per change and client", self.bytes_per_change, "B"),
            line(
                "messages per change and client",
                self.messages_per_change,
                "",
            ),
            line("start until ready", self.ready_seconds, "s"),
            line(
                "all clients connect at once: until they have everything",
                self.synced_seconds,
                "s",
            ),
            line(
                "first responses of a client",
                self.first_bytes_per_client / 1e6,
                "MB",
            ),
        ]
    }
}

/// Of ascending values: the smallest that is not less than this share of them.
fn percentile(values: &[f64], share: f64) -> f64 {
    let rank = (values.len() as f64 * share).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

impl Report {
    /// Whether no limit was missed.
    pub fn passed(&self) -> bool {
        let mut lines = self.clusters.iter().flat_map(Measured::lines);
        lines.all(|line| line.met() != Some(false))
    }

    /// The report as JSON: the figures, checks, and every delay.
    pub fn json(&self) -> serde_json::Value {
        let clusters = self.clusters.iter().map(|measured| {
            let checks = measured.lines().into_iter().map(|line| {
                serde_json::json!({
                    "name": line.name, "value": line.value, "unit": line.unit,
                    "limit": line.limit, "met": line.met(),
                })
            });
            serde_json::json!({"measured": measured, "checks": checks.collect::<Vec<_>>()})
        });
        serde_json::json!({"clusters": clusters.collect::<Vec<_>>(), "passed": self.passed()})
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for measured in &self.clusters {
            let Size {
                pods,
                services,
                nodes,
                ..
            } = measured.size;
            let title = format!("aditd: {pods} pods, {services} services, {nodes} nodes");
            let mut rows = vec![row(&[&title, "ours", "", "limit", ""])];
            for line in measured.lines() {
                let mark = match line.met() {
                    Some(true) => "pass",
                    Some(false) => "FAIL",
                    None => "",
                };
                rows.push(vec![
                    line.name.to_owned(),
                    number(line.value),
                    line.unit.to_owned(),
                    line.limit.map_or(String::new(), number),
                    mark.to_owned(),
                ]);
            }
            out.push('\n');
            out += &align(&rows);
            out += &format!(
                "{} changes; took {:.0} s, {:.0} of them to create the objects{}\n",
                measured.changes,
                measured.took_seconds,
                measured.created_seconds,
                match measured.foreign > DISTURBED {
                    true => format!(
                        "; ~ others used {:.0} % of the machine",
                        measured.foreign * 100.0
                    ),
                    false => String::new(),
                }
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(peak_mib: f64, delay: f64) -> Measured {
        Measured {
            size: Size::USUAL,
            changes: 1,
            created_seconds: 1.0,
            ready_seconds: 1.0,
            synced_seconds: 1.0,
            retries: 0,
            first_bytes_per_client: 1.0,
            ready_mib: 1.0,
            memory_mib: 1.0,
            peak_mib,
            delays_ms: vec![delay],
            cpu_us_per_change: 1.0,
            cpu_us_per_message: 1.0,
            bytes_per_change: 1.0,
            messages_per_change: 1.0,
            foreign: 0.0,
            took_seconds: 1.0,
        }
    }

    #[test]
    fn a_missed_limit_fails_the_report() {
        for (peak, delay, passed) in [
            (249.0, 499.0, true),
            (251.0, 499.0, false),
            (249.0, 501.0, false),
        ] {
            let report = Report {
                clusters: vec![measured(peak, delay)],
            };
            assert_eq!(report.passed(), passed);
            assert_eq!(report.table().contains("FAIL"), !passed);
            assert_eq!(report.json()["passed"], passed);
        }
    }

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 0.5), 50.0);
        assert_eq!(percentile(&hundred, 0.99), 99.0);
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }
}
