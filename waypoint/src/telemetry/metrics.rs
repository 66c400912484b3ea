//! Istio's request metrics, reporter `waypoint`.
//!
//! A label set has some thirty labels, so its counters are looked up by the addresses of the
//! shared values that make it up (each worker has a small cache of its own) and by value only
//! the first time. The number of label sets is bounded: beyond the bound requests are counted
//! in one set whose labels are `unknown`. Sets whose workloads are gone are dropped.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use adit_shared::telemetry::{ServiceLabels, WorkloadLabels};
use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::event::{Peer, RequestEvent, ResponseFlags};
use super::follow::Following;
use super::overrides::{Metric, MetricView, Tag};
use super::tap::Tap;

/// Label sets; more are counted together.
pub const MAX_SERIES: usize = 20_000;
/// Label sets that a worker remembers by address; then it starts anew.
const MAX_REMEMBERED: usize = 4_096;
/// Bounds of the histograms: Envoy's, which Istio uses for milliseconds and for bytes.
const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// What distinguishes one series from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Labels {
    source: WorkloadLabels,
    destination: WorkloadLabels,
    service: Option<ServiceLabels>,
    request_protocol: &'static str,
    status: u16,
    grpc_status: Option<u32>,
    flags: ResponseFlags,
    /// Of the Telemetry API: its view and the values of its added tags.
    view: Option<Arc<MetricView>>,
    added: Vec<Arc<str>>,
}

/// The counters of one label set.
#[derive(Debug)]
pub struct RequestSeries {
    labels: Labels,
    requests: AtomicU64,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
    request_messages: AtomicU64,
    response_messages: AtomicU64,
    touched: AtomicU64,
}

impl RequestSeries {
    fn new(labels: Labels, now: u64) -> Self {
        Self {
            labels,
            requests: AtomicU64::new(0),
            duration: Histogram::default(),
            request_bytes: Histogram::default(),
            response_bytes: Histogram::default(),
            request_messages: AtomicU64::new(0),
            response_messages: AtomicU64::new(0),
            touched: AtomicU64::new(now),
        }
    }

    fn count(&self, event: &RequestEvent<'_>) {
        self.requests.fetch_add(1, Relaxed);
        self.duration.observe(event.duration.as_secs_f64() * 1e3);
        let traffic = &event.traffic;
        self.request_bytes.observe(traffic.request_bytes as f64);
        self.response_bytes.observe(traffic.response_bytes as f64);
        if traffic.request_messages > 0 {
            self.request_messages
                .fetch_add(traffic.request_messages, Relaxed);
        }
        if traffic.response_messages > 0 {
            self.response_messages
                .fetch_add(traffic.response_messages, Relaxed);
        }
    }

    fn shows(&self, metric: Metric) -> bool {
        let view = self.labels.view.as_ref();
        !view.is_some_and(|view| view.is_disabled(metric))
    }
}

/// A histogram over [`BOUNDS`].
#[derive(Debug, Default)]
struct Histogram {
    /// The last one is above every bound.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// In millionths, so that it can be added to without a lock.
    sum: AtomicU64,
}

impl Histogram {
    fn observe(&self, value: f64) {
        let at = BOUNDS.partition_point(|bound| *bound < value);
        self.buckets[at].fetch_add(1, Relaxed);
        self.sum.fetch_add((value * 1e6) as u64, Relaxed);
    }
}

/// By address: the values live as long as the entry, which holds them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ByAddress {
    source: usize,
    destination: usize,
    service: usize,
    view: usize,
    grpc: bool,
    status: u16,
    grpc_status: Option<u32>,
    flags: ResponseFlags,
}

struct Remembered {
    series: Arc<RequestSeries>,
    /// So that no other value gets one of the addresses.
    _held: Held,
}

struct Held {
    _source: Peer,
    _destination: Option<Peer>,
    _service: Option<Arc<ServiceLabels>>,
    _view: Option<Arc<MetricView>>,
}

/// One worker's way to the series.
#[derive(Default)]
pub struct SeriesCache(RefCell<HashMap<ByAddress, Remembered>>);

impl fmt::Debug for SeriesCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = self.0.borrow().len();
        f.debug_tuple("SeriesCache").field(&len).finish()
    }
}

/// All request series of the process.
#[derive(Debug)]
pub struct RequestMetrics {
    series: RwLock<HashMap<Labels, Arc<RequestSeries>>>,
    overflow: Arc<RequestSeries>,
    limit: usize,
    started: Instant,
    overflowed: AtomicU64,
    evicted: AtomicU64,
    tap: Tap,
    following: Following,
}

impl RequestMetrics {
    /// No series yet, and `limit` at most.
    pub fn new(limit: usize) -> Self {
        let unknown = Labels {
            source: WorkloadLabels::default(),
            destination: WorkloadLabels::default(),
            service: None,
            request_protocol: "http",
            status: 0,
            grpc_status: None,
            flags: ResponseFlags::NONE,
            view: None,
            added: Vec::new(),
        };
        Self {
            series: RwLock::default(),
            overflow: Arc::new(RequestSeries::new(unknown, 0)),
            limit,
            started: Instant::now(),
            overflowed: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            tap: Tap::default(),
            following: Following::default(),
        }
    }

    /// What is counted, request by request.
    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    /// Follows a request for whoever wants to see what becomes of it.
    pub fn following(&self) -> &Following {
        &self.following
    }

    /// Counts one request, as `view` says.
    pub fn count(
        &self,
        cache: &SeriesCache,
        event: &RequestEvent<'_>,
        view: Option<&Arc<MetricView>>,
    ) {
        // Values of added tags are the request's own: no address stands for them.
        if view.is_some_and(|view| view.adds_tags()) {
            return self.get(event, view).count(event);
        }
        let address = |of: Option<&Peer>| of.map_or(0, |peer| Arc::as_ptr(peer) as usize);
        let key = ByAddress {
            source: address(Some(event.source)),
            destination: address(event.destination),
            service: event.service.map_or(0, |s| Arc::as_ptr(s) as usize),
            view: view.map_or(0, |view| Arc::as_ptr(view) as usize),
            grpc: event.protocol.label() == "grpc",
            status: event.status,
            grpc_status: event.grpc_status,
            flags: event.flags,
        };
        let mut remembered = cache.0.borrow_mut();
        if let Some(known) = remembered.get(&key) {
            return known.series.count(event);
        }
        let series = self.get(event, view);
        series.count(event);
        if remembered.len() >= MAX_REMEMBERED {
            remembered.clear();
        }
        let held = Held {
            _source: event.source.clone(),
            _destination: event.destination.cloned(),
            _service: event.service.cloned(),
            _view: view.cloned(),
        };
        let entry = Remembered {
            series,
            _held: held,
        };
        remembered.insert(key, entry);
    }

    fn get(&self, event: &RequestEvent<'_>, view: Option<&Arc<MetricView>>) -> Arc<RequestSeries> {
        let labels = Labels {
            source: (**event.source).clone(),
            destination: event.destination.map(|d| (**d).clone()).unwrap_or_default(),
            service: event.service.map(|service| (**service).clone()),
            request_protocol: event.protocol.label(),
            status: event.status,
            grpc_status: event.grpc_status,
            flags: event.flags,
            view: view.cloned(),
            added: view.map(|view| view.values(event)).unwrap_or_default(),
        };
        let now = self.now();
        if let Some(series) = self.series.read().get(&labels) {
            series.touched.store(now, Relaxed);
            return series.clone();
        }
        let mut table = self.series.write();
        let full = table.len() >= self.limit;
        match table.entry(labels) {
            Entry::Occupied(series) => series.get().clone(),
            Entry::Vacant(_) if full => {
                self.overflowed.fetch_add(1, Relaxed);
                self.overflow.clone()
            }
            Entry::Vacant(place) => {
                let series = Arc::new(RequestSeries::new(place.key().clone(), now));
                place.insert(series).clone()
            }
        }
    }

    /// Drops series that were not looked up for `idle` and of which `keep` does not say that
    /// their workloads still exist. Workers forget theirs by [`SeriesCache::forget`].
    pub fn sweep(&self, idle: Duration, keep: &dyn Fn(&WorkloadLabels) -> bool) {
        let Some(oldest) = self.now().checked_sub(idle.as_millis() as u64) else {
            return;
        };
        let now = self.now();
        let mut gone = Vec::new();
        for (labels, series) in &*self.series.read() {
            if Arc::strong_count(series) > 1 {
                series.touched.store(now, Relaxed);
            } else if series.touched.load(Relaxed) <= oldest
                && !(keep(&labels.source) && keep(&labels.destination))
            {
                gone.push(labels.clone());
            }
        }
        let mut table = self.series.write();
        for labels in gone {
            if let Entry::Occupied(entry) = table.entry(labels)
                && Arc::strong_count(entry.get()) == 1
            {
                entry.remove();
                self.evicted.fetch_add(1, Relaxed);
            }
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn snapshot(&self) -> Vec<Arc<RequestSeries>> {
        let overflow = Some(&self.overflow).filter(|s| s.requests.load(Relaxed) > 0);
        let table = self.series.read();
        table.values().chain(overflow).cloned().collect()
    }
}

impl SeriesCache {
    /// Lets go of everything, so that a sweep can drop what nobody uses.
    pub fn forget(&self) {
        self.0.borrow_mut().clear();
    }
}

/// To be registered below the prefix `istio`.
#[derive(Debug)]
pub struct RequestCollector(pub Arc<RequestMetrics>);

impl Collector for RequestCollector {
    /// Holds no lock while it writes.
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let all = self.0.snapshot();
        type Count = fn(&RequestSeries) -> &AtomicU64;
        let counters: [(Metric, &str, &str, Count); 3] = [
            (
                Metric::RequestCount,
                "requests",
                "The total number of requests",
                |s| &s.requests,
            ),
            (
                Metric::RequestMessages,
                "request_messages",
                "The total number of gRPC messages from clients",
                |s| &s.request_messages,
            ),
            (
                Metric::ResponseMessages,
                "response_messages",
                "The total number of gRPC messages to clients",
                |s| &s.response_messages,
            ),
        ];
        for (metric, name, help, read) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in all.iter().filter(|series| series.shows(metric)) {
                let value = read(series).load(Relaxed);
                let grpc = series.labels.request_protocol == "grpc";
                if metric == Metric::RequestCount || grpc {
                    let labels = Shown(&series.labels, metric);
                    ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        type Observed = fn(&RequestSeries) -> &Histogram;
        let histograms: [(Metric, &str, &str, Observed); 3] = [
            (
                Metric::RequestDuration,
                "request_duration_milliseconds",
                "Duration of requests",
                |s| &s.duration,
            ),
            (
                Metric::RequestSize,
                "request_bytes",
                "Sizes of request bodies",
                |s| &s.request_bytes,
            ),
            (
                Metric::ResponseSize,
                "response_bytes",
                "Sizes of response bodies",
                |s| &s.response_bytes,
            ),
        ];
        for (metric, name, help, read) in histograms {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for series in all.iter().filter(|series| series.shows(metric)) {
                let histogram = read(series);
                let counts = histogram.buckets.each_ref().map(|b| b.load(Relaxed));
                let sum = histogram.sum.load(Relaxed) as f64 / 1e6;
                let bounds = BOUNDS.into_iter().chain([f64::INFINITY]);
                let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
                let labels = Shown(&series.labels, metric);
                family
                    .encode_family(&labels)?
                    .encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)?;
            }
        }
        Ok(())
    }
}

/// How large the table is; to be registered below the prefix `adit`.
#[derive(Debug)]
pub struct RequestTableHealth(pub Arc<RequestMetrics>);

impl Collector for RequestTableHealth {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let size = i64::try_from(self.0.series.read().len()).unwrap_or(i64::MAX);
        let help = "The current number of request label sets";
        let name = "telemetry_request_series";
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(size).encode(metric)?;
        for (name, help, value) in [
            (
                "telemetry_request_series_evicted",
                "The total number of request label sets dropped because their workloads were gone",
                &self.0.evicted,
            ),
            (
                "telemetry_request_series_overflowed",
                "The total number of times that a request found no room for its label set",
                &self.0.overflowed,
            ),
        ] {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value.load(Relaxed)).encode(metric)?;
        }
        Ok(())
    }
}

/// Istio's labels of one metric, in Istio's order.
#[derive(Debug)]
struct Shown<'a>(&'a Labels, Metric);

impl EncodeLabelSet for Shown<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let Self(labels, metric) = *self;
        let view = labels.view.as_ref();
        let mut put = |tag: &str, value: &str| {
            let shown = match view.map_or(Tag::AsIs, |view| view.tag(metric, tag)) {
                Tag::AsIs if value.is_empty() => "unknown",
                Tag::AsIs => value,
                Tag::Removed => return Ok(()),
                Tag::Value(at) => labels.added.get(at).map_or("unknown", |value| &**value),
            };
            (tag, shown).encode(encoder.encode_label())
        };
        put("reporter", "waypoint")?;
        let principal = |w: &WorkloadLabels| w.principal.as_ref().map(ToString::to_string);
        let source = &labels.source;
        put("source_workload", &source.workload)?;
        put("source_canonical_service", &source.canonical_service)?;
        put("source_canonical_revision", &source.canonical_revision)?;
        put("source_workload_namespace", &source.namespace)?;
        put("source_principal", &principal(source).unwrap_or_default())?;
        put("source_app", &source.canonical_service)?;
        put("source_version", &source.canonical_revision)?;
        put("source_cluster", &source.cluster)?;
        let destination = &labels.destination;
        put("destination_workload", &destination.workload)?;
        put("destination_workload_namespace", &destination.namespace)?;
        let to = principal(destination).unwrap_or_default();
        put("destination_principal", &to)?;
        put("destination_app", &destination.canonical_service)?;
        put("destination_version", &destination.canonical_revision)?;
        let service = labels.service.as_ref();
        put("destination_service", service.map_or("", |s| &s.hostname))?;
        let canonical = &destination.canonical_service;
        put("destination_canonical_service", canonical)?;
        let revision = &destination.canonical_revision;
        put("destination_canonical_revision", revision)?;
        put("destination_service_name", service.map_or("", |s| &s.name))?;
        let namespace = service.map_or("", |s| &s.namespace);
        put("destination_service_namespace", namespace)?;
        put("destination_cluster", &destination.cluster)?;
        put("request_protocol", labels.request_protocol)?;
        put("response_code", itoa::Buffer::new().format(labels.status))?;
        match (labels.request_protocol, labels.grpc_status) {
            // Istio leaves it empty, not unknown, where there is none.
            ("grpc", Some(status)) => {
                put("grpc_response_status", itoa::Buffer::new().format(status))?;
            }
            _ => ("grpc_response_status", "").encode(encoder.encode_label())?,
        }
        let mut put = |tag: &str, value: &str| {
            let shown = match view.map_or(Tag::AsIs, |view| view.tag(metric, tag)) {
                Tag::AsIs => value,
                Tag::Removed => return Ok(()),
                Tag::Value(at) => labels.added.get(at).map_or("unknown", |value| &**value),
            };
            (tag, shown).encode(encoder.encode_label())
        };
        put("response_flags", &labels.flags.to_string())?;
        // What reaches a waypoint came through HBONE.
        put("connection_security_policy", "mutual_tls")?;
        for (name, at) in view.iter().flat_map(|view| view.new_tags(metric)) {
            let value = labels.added.get(at).map_or("unknown", |value| &**value);
            (name, value).encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
