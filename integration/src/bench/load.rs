//! The load generators: iperf3 and wrk from Debian, and our own sample program.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use serde_json::Value;

use super::ground::Ground;

/// A load ends so much later than it was told, at the most.
const OVERTIME: Duration = Duration::from_secs(20);

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Throughput.
    Bulk { streams: u32 },
    /// One byte each way, again and again, on one connection.
    RoundTrips,
    /// Connect, one byte each way, close.
    Connections { clients: u32 },
    /// HTTP/1.1 requests on connections that stay open.
    KeepAlive { connections: u32 },
    /// HTTP/1.1 requests, each on a connection of its own.
    HttpClose { clients: u32 },
}

/// What a load generator says.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Outcome {
    /// Operations: bytes for [`Load::Bulk`], otherwise round trips, connections, requests.
    pub(super) operations: f64,
    /// Gbit/s for [`Load::Bulk`], otherwise operations per second.
    pub(super) rate: f64,
    pub(super) failures: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) latency: Option<Latency>,
    /// Congestion control that the sender used, where the generator says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) congestion_control: Option<String>,
}

/// Microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: Option<f64>,
}

impl Load {
    pub(super) fn name(self) -> String {
        match self {
            Self::Bulk { streams: 1 } => "bulk, 1 stream".into(),
            Self::Bulk { streams } => format!("bulk, {streams} streams"),
            Self::RoundTrips => "1-byte round trips, 1 connection".into(),
            Self::Connections { clients: 1 } => "connections, 1 client".into(),
            Self::Connections { clients } => format!("connections, {clients} clients"),
            Self::KeepAlive { connections } => {
                format!("HTTP keep-alive, {connections} connections")
            }
            Self::HttpClose { clients } => format!("HTTP close, {clients} clients"),
        }
    }

    /// Unit of [`Outcome::rate`].
    pub(super) fn rate_unit(self) -> &'static str {
        match self {
            Self::Bulk { .. } => "Gbit/s",
            _ => "/s",
        }
    }

    /// What CPU time is divided by.
    pub(super) fn cost_unit(self) -> &'static str {
        match self {
            Self::Bulk { .. } => "ms/GB",
            Self::RoundTrips => "us/round trip",
            Self::Connections { .. } | Self::HttpClose { .. } => "us/connection",
            Self::KeepAlive { .. } => "us/request",
        }
    }

    /// CPU microseconds per [`Self::cost_unit`].
    pub(super) fn cost(self, cpu_us: f64, operations: f64) -> f64 {
        match self {
            // us per byte = s per MB = 1e6 ms per GB
            Self::Bulk { .. } => cpu_us / operations * 1e6,
            _ => cpu_us / operations,
        }
    }

    pub(super) fn run(self, ground: &Ground, seconds: u64) -> anyhow::Result<Outcome> {
        let outcome = match self {
            Self::Bulk { streams } => iperf3(ground, streams, seconds),
            Self::RoundTrips => {
                let options = ["--warmup", "0"];
                sample(ground, "rr", seconds, &options, "round_trips")
            }
            Self::Connections { clients } => {
                let options = ["--clients", &clients.to_string()];
                sample(ground, "conns", seconds, &options, "connections")
            }
            Self::KeepAlive { connections } => wrk(ground, connections, seconds, &[]),
            Self::HttpClose { clients } => {
                wrk(ground, clients, seconds, &["-H", "Connection: close"])
            }
        };
        let outcome = outcome.with_context(|| self.name())?;
        ensure!(outcome.operations > 0.0, "{}: nothing moved", self.name());
        Ok(outcome)
    }
}

fn deadline(seconds: u64) -> Duration {
    Duration::from_secs(seconds) + OVERTIME
}

fn iperf3(ground: &Ground, streams: u32, seconds: u64) -> anyhow::Result<Outcome> {
    let (streams, time) = (streams.to_string(), seconds.to_string());
    let argv = [
        "iperf3",
        "--client",
        &ground.server,
        "--json",
        "--time",
        &time,
        "--parallel",
        &streams,
    ];
    let output = ground.in_client(&argv, deadline(seconds))?;
    let report: Value = serde_json::from_str(&output.stdout).context("iperf3's JSON")?;
    if let Some(error) = report["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let received = &report["end"]["sum_received"];
    let number = |field: &str| {
        received[field]
            .as_f64()
            .with_context(|| format!("iperf3: {field}"))
    };
    Ok(Outcome {
        operations: number("bytes")?,
        rate: number("bits_per_second")? / 1e9,
        congestion_control: report["end"]["sender_tcp_congestion"]
            .as_str()
            .map(str::to_owned),
        ..Outcome::default()
    })
}

fn sample(
    ground: &Ground,
    command: &str,
    seconds: u64,
    options: &[&str],
    counted: &str,
) -> anyhow::Result<Outcome> {
    let (target, time) = (format!("{}:9090", ground.server), seconds.to_string());
    let mut argv = vec!["adit-sample", command, &target, "--seconds", &time];
    argv.extend(options);
    let output = ground.in_client(&argv, deadline(seconds))?;
    let report: Value = serde_json::from_str(output.stdout.trim()).context("adit-sample's JSON")?;
    let number = |value: &Value, field: &str| {
        let found = value[field].as_f64();
        found.with_context(|| format!("adit-sample {command}: {field}"))
    };
    let latency = &report["latency"];
    Ok(Outcome {
        operations: number(&report, counted)?,
        rate: number(&report, "per_second")?,
        failures: report["failures"].as_u64().unwrap_or(0),
        latency: Some(Latency {
            p50: number(latency, "p50_us")?,
            p99: number(latency, "p99_us")?,
            p999: Some(number(latency, "p999_us")?),
        }),
        congestion_control: None,
    })
}

fn wrk(ground: &Ground, connections: u32, seconds: u64, more: &[&str]) -> anyhow::Result<Outcome> {
    let url = format!("http://{}:8080/healthz", ground.server);
    let (connections, time) = (connections.to_string(), format!("{seconds}s"));
    let mut argv = vec!["wrk", "-t1", "-c", &connections, "-d", &time, "--latency"];
    argv.extend(more);
    argv.push(&url);
    let output = ground.in_client(&argv, deadline(seconds))?;
    parse_wrk(&output.stdout).with_context(|| format!("wrk said: {}", output.stdout))
}

fn parse_wrk(text: &str) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let (mut p50, mut p99) = (None, None);
    for line in text.lines().map(str::trim) {
        if let Some(value) = line.strip_prefix("50%") {
            p50 = micros(value.trim());
        } else if let Some(value) = line.strip_prefix("99%") {
            p99 = micros(value.trim());
        } else if let Some(value) = line.strip_prefix("Requests/sec:") {
            outcome.rate = value.trim().parse().context("Requests/sec")?;
        } else if let Some((requests, _)) = line.split_once(" requests in ") {
            outcome.operations = requests.parse().context("requests")?;
        } else if let Some(errors) = line.strip_prefix("Socket errors:") {
            // connect 0, read 0, write 0, timeout 0
            let numbers = errors
                .split([' ', ','])
                .filter_map(|n| n.parse::<u64>().ok());
            outcome.failures += numbers.sum::<u64>();
        } else if let Some(count) = line.strip_prefix("Non-2xx or 3xx responses:") {
            outcome.failures += count.trim().parse::<u64>().context("responses")?;
        }
    }
    ensure!(
        outcome.operations > 0.0 && outcome.rate > 0.0,
        "no requests"
    );
    outcome.latency = Some(Latency {
        p50: p50.context("no 50% line")?,
        p99: p99.context("no 99% line")?,
        p999: None,
    });
    Ok(outcome)
}

/// wrk's `12.34us`, `1.20ms`, `2.00s`, in microseconds.
fn micros(text: &str) -> Option<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 60e6)];
    units
        .iter()
        .find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_is_read() {
        let text = "Running 2s test @ http://10.0.0.1:8080/\n  1 threads and 64 connections\n  \
                    Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency   2.34ms    \
                    1.05ms  20.10ms   71.00%\n  Latency Distribution\n     50%    2.10ms\n     \
                    75%    2.80ms\n     90%    3.40ms\n     99%  640.00us\n  54321 requests in \
                    2.00s, 7.10MB read\n  Socket errors: connect 0, read 3, write 0, timeout 1\n  \
                    Non-2xx or 3xx responses: 2\nRequests/sec:  27160.50\nTransfer/sec: 3MB\n";
        let outcome = parse_wrk(text).expect("an outcome");
        assert_eq!(outcome.operations, 54321.0);
        assert_eq!(outcome.rate, 27160.5);
        assert_eq!(outcome.failures, 6);
        let latency = outcome.latency.expect("latency");
        assert_eq!((latency.p50, latency.p99), (2100.0, 640.0));
    }

    #[test]
    fn costs_have_the_units_of_the_limits() {
        // A second of CPU for a GB is 1000 ms per GB.
        assert_eq!(Load::Bulk { streams: 1 }.cost(1e6, 1e9), 1000.0);
        assert_eq!(Load::RoundTrips.cost(1e6, 1e4), 100.0);
    }
}
