//! The metrics, by Istio's names where Istio has them; ours begin with `adit_`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::LogWriter;
use super::event::{Event, EventSink, Reporter, TcpLabels};
use super::pools::{WorkerPools, encode_pools};
use super::series::{MAX_SERIES, SeriesTable, TableHealth, TcpSeries};
use crate::identity::CertificateCache;

/// One label whose values are known at compile time.
type Label = [(&'static str, &'static str); 1];
type Histograms = Family<Label, Histogram, fn() -> Histogram>;

/// Every metric of a proxy.
///
/// What is counted for each connection is resolved once ([`Self::tcp_series`]); the rest
/// is counted by [`Event`]s. Reading them ([`Self::encode`]) holds no lock that a worker
/// takes for longer than copying a list.
pub struct Metrics {
    registry: Registry,
    tcp: Arc<SeriesTable>,
    xds_messages: Family<[(&'static str, String); 1], Counter>,
    xds_bytes: Family<[(&'static str, String); 1], Counter>,
    xds_terminations: Family<Label, Counter>,
    proxies_active: Gauge,
    proxies_pending: Gauge,
    proxies_started: Counter,
    proxies_stopped: Counter,
    handshakes: Histograms,
    handshake_failures: Family<Label, Counter>,
    tunnels: Family<Label, Gauge>,
    tunnel_streams: Histograms,
    rejections: Family<Label, Counter>,
    endpoint_retries: Counter,
    waypoint_failures: Family<[(&'static str, &'static str); 2], Counter>,
    accept_failures: Counter,
    full_listeners: Counter,
    repairs: Family<Label, Counter>,
    report_failures: Family<Label, Counter>,
    sources: Sources,
}

/// What is asked for its state when the metrics are read.
#[derive(Debug, Clone, Default)]
struct Sources(Arc<Mutex<SourceList>>);

#[derive(Default)]
struct SourceList {
    runtimes: Vec<tokio::runtime::Handle>,
    pools: Vec<WorkerPools>,
    certificates: Option<CertificateCache>,
    log: Option<LogWriter>,
}

impl fmt::Debug for SourceList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceList")
            .field("runtimes", &self.runtimes.len())
            .finish_non_exhaustive()
    }
}

impl Metrics {
    /// Metrics of `component` (`ztunnel`), whose version is `tag`.
    pub fn new(component: &str, tag: &str) -> Self {
        Self::with_series_limit(component, tag, MAX_SERIES)
    }

    /// As [`Self::new`], with another bound for the number of TCP label sets.
    pub fn with_series_limit(component: &str, tag: &str, limit: usize) -> Self {
        let mut registry = Registry::default();
        let tcp = Arc::new(SeriesTable::new(limit));

        let istio = registry.sub_registry_with_prefix("istio");
        istio.register_collector(Box::new(tcp.clone()));
        let build = Family::<[(&'static str, String); 2], Gauge>::default();
        build
            .get_or_create(&[("component", component.into()), ("tag", tag.into())])
            .set(1);
        istio.register("build", "Component build info", build);
        let xds_terminations = Family::default();
        istio.register(
            "xds_connection_terminations",
            "The total number of completed connections to the xds server",
            xds_terminations.clone(),
        );
        let xds_messages = Family::default();
        istio.register(
            "xds_message",
            "Total number of messages received",
            xds_messages.clone(),
        );
        let xds_bytes = Family::default();
        istio.register(
            "xds_message_bytes",
            "Total number of bytes received",
            xds_bytes.clone(),
        );

        let manager = registry.sub_registry_with_prefix("workload_manager");
        let proxies_active = Gauge::default();
        manager.register(
            "active_proxy_count",
            "The current number of pods that are proxied",
            proxies_active.clone(),
        );
        let proxies_pending = Gauge::default();
        manager.register(
            "pending_proxy_count",
            "The current number of pods whose proxy could not be started yet",
            proxies_pending.clone(),
        );
        let proxies_started = Counter::default();
        manager.register(
            "proxies_started",
            "The total number of pods whose proxy was started",
            proxies_started.clone(),
        );
        let proxies_stopped = Counter::default();
        manager.register(
            "proxies_stopped",
            "The total number of pods whose proxy was stopped",
            proxies_stopped.clone(),
        );

        let adit = registry.sub_registry_with_prefix("adit");
        adit.register_collector(Box::new(TableHealth(tcp.clone())));
        let handshakes = Histograms::new_with_constructor(handshake_buckets);
        adit.register(
            "tls_handshake_duration_seconds",
            "Duration of TLS handshakes of tunnels",
            handshakes.clone(),
        );
        let handshake_failures = Family::default();
        adit.register(
            "tls_handshake_failures",
            "The total number of failed TLS handshakes of tunnels",
            handshake_failures.clone(),
        );
        let tunnels = Family::default();
        adit.register(
            "tunnels_open",
            "The current number of HBONE connections",
            tunnels.clone(),
        );
        let tunnel_streams = Histograms::new_with_constructor(stream_buckets);
        adit.register(
            "tunnel_streams",
            "How many connections an HBONE connection had carried when it ended",
            tunnel_streams.clone(),
        );
        let rejections = Family::default();
        adit.register(
            "inbound_rejections",
            "The total number of connections and streams that were refused for breach of protocol",
            rejections.clone(),
        );
        let accept_failures = Counter::default();
        adit.register(
            "accept_failures",
            "Connections that waited because the system had no descriptor or memory for them",
            accept_failures.clone(),
        );
        let full_listeners = Counter::default();
        adit.register(
            "listener_saturations",
            "How often a listener had as many connections as it may, so that others waited",
            full_listeners.clone(),
        );
        let endpoint_retries = Counter::default();
        adit.register(
            "endpoint_retries",
            "The total number of failed connects that were tried on another endpoint",
            endpoint_retries.clone(),
        );
        let waypoint_failures = Family::default();
        adit.register(
            "waypoint_failures",
            "Connections that were ended because they could not pass the waypoint they have to",
            waypoint_failures.clone(),
        );
        let repairs = Family::default();
        adit.register(
            "redirection_repairs",
            "The total number of rules, routes and maps that were put right again",
            repairs.clone(),
        );

        let report_failures = Family::default();
        adit.register(
            "enrolment_report_failures",
            "The total number of enrolment reports that the control plane refused or did not get",
            report_failures.clone(),
        );

        let sources = Sources::default();
        registry.register_collector(Box::new(sources.clone()));
        registry.register_collector(Box::new(Process));
        Self {
            registry,
            tcp,
            xds_messages,
            xds_bytes,
            xds_terminations,
            proxies_active,
            proxies_pending,
            proxies_started,
            proxies_stopped,
            handshakes,
            handshake_failures,
            tunnels,
            tunnel_streams,
            rejections,
            endpoint_retries,
            waypoint_failures,
            accept_failures,
            full_listeners,
            repairs,
            report_failures,
            sources,
        }
    }

    /// Adds metrics of the component's own, whose names begin with `prefix` (`istio`, `adit`).
    pub fn register(&mut self, prefix: &str, collector: Box<dyn Collector>) {
        let registry = self.registry.sub_registry_with_prefix(prefix);
        registry.register_collector(collector);
    }

    /// The counters of one label set.
    pub fn tcp_series(&self, labels: &TcpLabels) -> Arc<TcpSeries> {
        self.tcp.get(labels)
    }

    /// Drops TCP series that have been idle for `idle`, unless `keep` says that their
    /// workloads still exist. To be called about once a minute.
    pub fn sweep(&self, idle: Duration, keep: &dyn Fn(&TcpLabels) -> bool) {
        self.tcp.sweep(idle, keep);
    }

    /// How many pods wait for their proxy.
    pub fn set_pending_proxies(&self, count: usize) {
        self.proxies_pending
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Adds a runtime to the `tokio_*` metrics, as the next worker.
    pub fn watch_runtime(&self, runtime: tokio::runtime::Handle) {
        self.sources.0.lock().runtimes.push(runtime);
    }

    /// Adds a worker's pools to the sums over all workers.
    pub fn watch_pools(&self, pools: WorkerPools) {
        self.sources.0.lock().pools.push(pools);
    }

    /// Shows when the certificates of `cache` end.
    pub fn watch_certificates(&self, cache: CertificateCache) {
        self.sources.0.lock().certificates = Some(cache);
    }

    /// Shows how many lines `log` dropped.
    pub fn watch_log(&self, log: LogWriter) {
        self.sources.0.lock().log = Some(log);
    }

    /// All metrics as OpenMetrics text. Takes a while with many series: not for a
    /// worker's thread.
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(64 << 10);
        // Writing to a string cannot fail, and no collector fails by itself.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn of(reporter: Reporter) -> Label {
    [("reporter", reporter.as_str())]
}

/// A handshake takes some 300 us of CPU; what is above is waiting.
fn handshake_buckets() -> Histogram {
    Histogram::new([
        0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 10.0,
    ])
}

fn stream_buckets() -> Histogram {
    Histogram::new([
        1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 1_000.0, 10_000.0, 100_000.0,
    ])
}

impl EventSink for Metrics {
    fn on_event(&self, event: &Event<'_>) {
        match *event {
            // Counted on the series of the connection, where no lookup is needed.
            Event::ConnectionOpened { .. }
            | Event::ConnectionClosed { .. }
            | Event::ConnectionFailed { .. } => {}
            Event::HandshakeCompleted { reporter, duration } => {
                let histogram = self.handshakes.get_or_create(&of(reporter));
                histogram.observe(duration.as_secs_f64());
            }
            Event::HandshakeFailed { reporter } => {
                self.handshake_failures.get_or_create(&of(reporter)).inc();
            }
            Event::TunnelOpened { reporter } => {
                self.tunnels.get_or_create(&of(reporter)).inc();
            }
            Event::TunnelClosed { reporter, streams } => {
                self.tunnels.get_or_create(&of(reporter)).dec();
                let histogram = self.tunnel_streams.get_or_create(&of(reporter));
                histogram.observe(streams as f64);
            }
            Event::InboundRejected { reason, .. } => {
                let label = [("reason", reason.as_str())];
                self.rejections.get_or_create(&label).inc();
            }
            Event::EndpointRetried => {
                self.endpoint_retries.inc();
            }
            Event::WaypointFailed { reason, told } => {
                let labels = [("reason", reason), ("told", told)];
                self.waypoint_failures.get_or_create(&labels).inc();
            }
            Event::AcceptFailed => {
                self.accept_failures.inc();
            }
            Event::ListenerFull => {
                self.full_listeners.inc();
            }
            Event::XdsMessage { type_url, bytes } => {
                let label = [("url", type_url.to_owned())];
                self.xds_messages.get_or_create(&label).inc();
                self.xds_bytes.get_or_create(&label).inc_by(bytes as u64);
            }
            Event::XdsTerminated { reason } => {
                let label = [("reason", reason.as_str())];
                self.xds_terminations.get_or_create(&label).inc();
            }
            Event::RedirectionRepaired { kind } => {
                self.repairs.get_or_create(&[("kind", kind)]).inc();
            }
            Event::ReportFailed { refused } => {
                let reason = if refused { "refused" } else { "unavailable" };
                self.report_failures
                    .get_or_create(&[("reason", reason)])
                    .inc();
            }
            Event::ProxyStarted => {
                self.proxies_started.inc();
                self.proxies_active.inc();
            }
            Event::ProxyStopped => {
                self.proxies_stopped.inc();
                self.proxies_active.dec();
            }
        }
    }
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (runtimes, pools, certificates, log) = {
            let list = self.0.lock();
            let (runtimes, pools) = (list.runtimes.clone(), list.pools.clone());
            (runtimes, pools, list.certificates.clone(), list.log.clone())
        };
        encode_runtimes(&mut encoder, &runtimes)?;
        encode_pools(&mut encoder, &pools)?;
        if let Some(certificates) = certificates {
            encode_certificates(&mut encoder, &certificates)?;
        }
        if let Some(log) = log {
            let metric = encoder.encode_descriptor(
                "adit_log_lines_dropped",
                "The total number of log lines that the output was too slow for",
                None,
                MetricType::Counter,
            )?;
            ConstCounter::new(log.dropped()).encode(metric)?;
        }
        Ok(())
    }
}

/// Seconds until each certificate of this node ends; negative once it has.
fn encode_certificates(
    encoder: &mut DescriptorEncoder<'_>,
    cache: &CertificateCache,
) -> Result<(), fmt::Error> {
    let mut metric = encoder.encode_descriptor(
        "adit_certificate_expiry_seconds",
        "Seconds until the certificate of an identity ends",
        None,
        MetricType::Gauge,
    )?;
    let now = SystemTime::now();
    for status in cache.snapshot() {
        let Some(certificate) = status.certificate else {
            continue;
        };
        let left = match certificate.not_after().duration_since(now) {
            Ok(left) => left.as_secs() as i64,
            Err(past) => -(past.duration().as_secs() as i64),
        };
        let labels = [("identity", status.identity.to_string())];
        ConstGauge::new(left).encode(metric.encode_family(&labels)?)?;
    }
    let mut metric = encoder.encode_descriptor(
        "adit_certificate_fetch_failures",
        "The total number of certificates that were asked for and not got",
        None,
        MetricType::Counter,
    )?;
    for (reason, count) in cache.failures() {
        ConstCounter::new(count).encode(metric.encode_family(&[("reason", reason)])?)?;
    }
    Ok(())
}

fn encode_runtimes(
    encoder: &mut DescriptorEncoder<'_>,
    runtimes: &[tokio::runtime::Handle],
) -> Result<(), fmt::Error> {
    let metrics: Vec<_> = runtimes.iter().map(|r| r.metrics()).collect();
    let sum = |read: fn(&tokio::runtime::RuntimeMetrics) -> usize| -> i64 {
        metrics.iter().map(|m| read(m) as i64).sum()
    };
    for (name, help, value) in [
        (
            "tokio_num_workers",
            "The number of worker threads",
            sum(|m| m.num_workers()),
        ),
        (
            "tokio_num_alive_tasks",
            "The number of alive tasks",
            sum(|m| m.num_alive_tasks()),
        ),
        (
            "tokio_global_queue_depth",
            "The number of tasks in the global queues",
            sum(|m| m.global_queue_depth()),
        ),
    ] {
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(metric)?;
    }

    // Each worker is a runtime of its own, so runtimes are numbered, not their threads.
    let workers = || {
        let each = |m: &tokio::runtime::RuntimeMetrics| {
            (0..m.num_workers())
                .map(|w| (m.clone(), w))
                .collect::<Vec<_>>()
        };
        metrics.iter().flat_map(each).enumerate()
    };
    let mut metric = encoder.encode_descriptor(
        "tokio_worker_total_busy_duration_seconds",
        "How long the worker has been busy",
        None,
        MetricType::Counter,
    )?;
    for (n, (m, worker)) in workers() {
        let labels = [("worker", n)];
        let busy = m.worker_total_busy_duration(worker).as_secs_f64();
        ConstCounter::new(busy).encode(metric.encode_family(&labels)?)?;
    }
    let mut metric = encoder.encode_descriptor(
        "tokio_worker_park_count",
        "How often the worker parked",
        None,
        MetricType::Counter,
    )?;
    for (n, (m, worker)) in workers() {
        let labels = [("worker", n)];
        let count = m.worker_park_count(worker);
        ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
    }
    let mut metric = encoder.encode_descriptor(
        "tokio_worker_park_unpark_count",
        "How often the worker parked and unparked",
        None,
        MetricType::Counter,
    )?;
    for (n, (m, worker)) in workers() {
        let labels = [("worker", n)];
        let count = m.worker_park_unpark_count(worker);
        ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

/// What the kernel knows of this process.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // The last good count, for the time when even a directory cannot be opened.
        static OPEN: AtomicI64 = AtomicI64::new(0);
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            // One of them is the directory itself.
            OPEN.store(entries.count() as i64 - 1, Relaxed);
        }
        let open = OPEN.load(Relaxed);
        let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
        let max = limit.map_or(-1, |(soft, _)| i64::try_from(soft).unwrap_or(i64::MAX));
        for (name, help, value) in [
            ("process_open_fds", "Number of open file descriptors", open),
            (
                "process_max_fds",
                "Maximum number of open file descriptors",
                max,
            ),
        ] {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
