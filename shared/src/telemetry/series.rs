//! The TCP series: one set of counters for each (client workload, server workload,
//! service). Pods come and go, so series are bounded in number and dropped when idle.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::event::{Reporter, ResponseFlag, SecurityPolicy, TcpLabels, WorkloadLabels};

/// More series than this are counted together in one whose labels are `unknown`.
pub const MAX_SERIES: usize = 20_000;

/// The counters of one label set. Those who count hold it; the table drops it when
/// nobody has for a while.
#[derive(Debug)]
pub struct TcpSeries {
    labels: TcpLabels,
    opened: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    closed: [AtomicU64; ResponseFlag::ALL.len()],
    failed: [AtomicU64; ResponseFlag::ALL.len()],
    /// Milliseconds since the table was made.
    touched: AtomicU64,
}

impl TcpSeries {
    fn new(labels: TcpLabels, now: u64) -> Self {
        Self {
            labels,
            opened: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            closed: Default::default(),
            failed: Default::default(),
            touched: AtomicU64::new(now),
        }
    }

    /// The labels.
    pub fn labels(&self) -> &TcpLabels {
        &self.labels
    }

    pub(super) fn count_opened(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    /// Bytes that the server received (istio/istio#32399: the server's point of view at
    /// both reporters).
    pub(super) fn count_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
    }

    /// Bytes that the server sent.
    pub(super) fn count_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }

    pub(super) fn count_closed(&self, flag: ResponseFlag) {
        self.closed[flag as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn count_failed(&self, flag: ResponseFlag) {
        self.failed[flag as usize].fetch_add(1, Relaxed);
    }

    /// Connections opened less connections closed.
    fn open_now(&self) -> i64 {
        let closed: u64 = self.closed.iter().map(|c| c.load(Relaxed)).sum();
        self.opened.load(Relaxed).saturating_sub(closed) as i64
    }
}

/// All TCP series.
#[derive(Debug)]
pub(super) struct SeriesTable {
    series: RwLock<HashMap<TcpLabels, Arc<TcpSeries>>>,
    overflow: [[Arc<TcpSeries>; 2]; Reporter::ALL.len()],
    limit: usize,
    started: Instant,
    evicted: AtomicU64,
    overflowed: AtomicU64,
}

impl SeriesTable {
    pub(super) fn new(limit: usize) -> Self {
        let overflow = |reporter, security| {
            let labels = TcpLabels {
                reporter,
                security,
                source: WorkloadLabels::default(),
                destination: WorkloadLabels::default(),
                service: None,
            };
            Arc::new(TcpSeries::new(labels, 0))
        };
        let both = |reporter| {
            [SecurityPolicy::MutualTls, SecurityPolicy::Unknown].map(|s| overflow(reporter, s))
        };
        Self {
            series: RwLock::default(),
            overflow: Reporter::ALL.map(both),
            limit,
            started: Instant::now(),
            evicted: AtomicU64::new(0),
            overflowed: AtomicU64::new(0),
        }
    }

    /// The series of `labels`, made if there is room.
    pub(super) fn get(&self, labels: &TcpLabels) -> Arc<TcpSeries> {
        let now = self.now();
        if let Some(series) = self.series.read().get(labels) {
            series.touched.store(now, Relaxed);
            return series.clone();
        }
        let mut table = self.series.write();
        let full = table.len() >= self.limit;
        match table.entry(labels.clone()) {
            Entry::Occupied(series) => series.get().clone(),
            Entry::Vacant(_) if full => {
                self.overflowed.fetch_add(1, Relaxed);
                let security = labels.security as usize;
                self.overflow[labels.reporter as usize][security].clone()
            }
            Entry::Vacant(place) => place
                .insert(Arc::new(TcpSeries::new(labels.clone(), now)))
                .clone(),
        }
    }

    /// Drops series that no open connection uses and that were not used for `idle`,
    /// unless `keep` says that their workloads still exist.
    pub(super) fn sweep(&self, idle: Duration, keep: &dyn Fn(&TcpLabels) -> bool) {
        let now = self.now();
        let Some(oldest) = now.checked_sub(millis(idle)) else {
            return;
        };
        // Candidates under the read lock, so that workers are not held up by `keep`.
        let mut candidates = Vec::new();
        for series in self.series.read().values() {
            if Arc::strong_count(series) > 1 {
                // In use: its idle time begins when it is not, so that what the last
                // connection carried is still scraped.
                series.touched.store(now, Relaxed);
            } else if is_idle(series, oldest) && !keep(&series.labels) {
                candidates.push(series.labels.clone());
            }
        }
        for labels in candidates {
            let mut table = self.series.write();
            if let Entry::Occupied(entry) = table.entry(labels)
                && is_idle(entry.get(), oldest)
            {
                entry.remove();
                self.evicted.fetch_add(1, Relaxed);
            }
        }
    }

    fn now(&self) -> u64 {
        millis(self.started.elapsed())
    }

    fn snapshot(&self) -> Vec<Arc<TcpSeries>> {
        let used = |s: &&Arc<TcpSeries>| {
            let failed = s.failed.iter().any(|f| f.load(Relaxed) > 0);
            failed || s.opened.load(Relaxed) > 0
        };
        let overflow = self.overflow.iter().flatten().filter(used);
        let table = self.series.read();
        table.values().chain(overflow).cloned().collect()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Whether only the table holds `series` and nobody asked for it since `oldest`.
fn is_idle(series: &Arc<TcpSeries>, oldest: u64) -> bool {
    Arc::strong_count(series) == 1 && series.touched.load(Relaxed) <= oldest
}

impl Collector for SeriesTable {
    /// Holds no lock while it writes.
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Read = fn(&TcpSeries) -> &AtomicU64;
        let all = self.snapshot();
        let plain: [(&str, &str, Read); 3] = [
            (
                "tcp_connections_opened",
                "The total number of TCP connections opened",
                |s| &s.opened,
            ),
            (
                "tcp_received_bytes",
                "The size of total bytes received during request in case of a TCP connection",
                |s| &s.received,
            ),
            (
                "tcp_sent_bytes",
                "The size of total bytes sent during response in case of a TCP connection",
                |s| &s.sent,
            ),
        ];
        for (name, help, read) in plain {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &all {
                let labels = Flagged(&series.labels, ResponseFlag::None);
                let value = ConstCounter::new(read(series).load(Relaxed));
                value.encode(metric.encode_family(&labels)?)?;
            }
        }

        type ReadFlag = fn(&TcpSeries) -> &[AtomicU64; ResponseFlag::ALL.len()];
        let flagged: [(&str, &str, ReadFlag); 2] = [
            (
                "tcp_connections_closed",
                "The total number of TCP connections closed",
                |s| &s.closed,
            ),
            (
                "tcp_connections_failed",
                "The total number of TCP connections that failed",
                |s| &s.failed,
            ),
        ];
        for (name, help, read) in flagged {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &all {
                for flag in ResponseFlag::ALL {
                    let value = read(series)[flag as usize].load(Relaxed);
                    if value > 0 {
                        let labels = Flagged(&series.labels, flag);
                        ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
                    }
                }
            }
        }

        let mut metric = encoder.encode_descriptor(
            "tcp_sockets_open",
            "The current number of TCP connections that are proxied",
            None,
            MetricType::Gauge,
        )?;
        for reporter in Reporter::ALL {
            let of = all.iter().filter(|s| s.labels.reporter == reporter);
            // A node proxy is never one.
            if reporter == Reporter::Waypoint && of.clone().next().is_none() {
                continue;
            }
            let open: i64 = of.map(|s| s.open_now()).sum();
            let labels = [("reporter", reporter.as_str())];
            ConstGauge::new(open).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// The sizes of the table itself.
#[derive(Debug)]
pub(super) struct TableHealth(pub(super) Arc<SeriesTable>);

impl Collector for TableHealth {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let count = i64::try_from(self.0.series.read().len()).unwrap_or(i64::MAX);
        let metric = encoder.encode_descriptor(
            "telemetry_tcp_series",
            "The current number of TCP label sets",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(count).encode(metric)?;
        for (name, help, value) in [
            (
                "telemetry_tcp_series_evicted",
                "The total number of TCP label sets dropped because their workloads were gone",
                &self.0.evicted,
            ),
            (
                "telemetry_tcp_series_overflowed",
                "The total number of connections counted without labels for lack of room",
                &self.0.overflowed,
            ),
        ] {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value.load(Relaxed)).encode(metric)?;
        }
        Ok(())
    }
}

/// Istio's label set: that of the series and the response flag.
#[derive(Debug)]
struct Flagged<'a>(&'a TcpLabels, ResponseFlag);

impl EncodeLabelSet for Flagged<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let Self(labels, flag) = self;
        let mut put = |key: &str, value: &str| {
            let value = if value.is_empty() { "unknown" } else { value };
            (key, value).encode(encoder.encode_label())
        };
        put("reporter", labels.reporter.as_str())?;
        let source = &labels.source;
        put("source_workload", &source.workload)?;
        put("source_canonical_service", &source.canonical_service)?;
        put("source_canonical_revision", &source.canonical_revision)?;
        put("source_workload_namespace", &source.namespace)?;
        let principal = |w: &WorkloadLabels| w.principal.as_ref().map(ToString::to_string);
        put("source_principal", &principal(source).unwrap_or_default())?;
        put("source_app", &source.canonical_service)?;
        put("source_version", &source.canonical_revision)?;
        put("source_cluster", &source.cluster)?;
        let service = labels.service.as_ref();
        put("destination_service", service.map_or("", |s| &s.hostname))?;
        put(
            "destination_service_namespace",
            service.map_or("", |s| &s.namespace),
        )?;
        put("destination_service_name", service.map_or("", |s| &s.name))?;
        let destination = &labels.destination;
        put("destination_workload", &destination.workload)?;
        put(
            "destination_canonical_service",
            &destination.canonical_service,
        )?;
        put(
            "destination_canonical_revision",
            &destination.canonical_revision,
        )?;
        put("destination_workload_namespace", &destination.namespace)?;
        put(
            "destination_principal",
            &principal(destination).unwrap_or_default(),
        )?;
        put("destination_app", &destination.canonical_service)?;
        put("destination_version", &destination.canonical_revision)?;
        put("destination_cluster", &destination.cluster)?;
        put("request_protocol", "tcp")?;
        put("response_flags", flag.as_str())?;
        put("connection_security_policy", labels.security.as_str())?;
        put("source_region", &source.region)?;
        put("source_zone", &source.zone)?;
        put("destination_region", &destination.region)?;
        put("destination_zone", &destination.zone)
    }
}
