//! Metrics, access log and traces of requests, from one typed event.
//!
//! A request makes one [`RequestEvent`] when it has ended. [`RequestTelemetry::record`] counts
//! it, writes its line and hands its span to the exporter; none of them sees anything else, so
//! they cannot disagree. What holds for a service ([`TelemetrySettings`]) is merged from the
//! Telemetry API when the configuration changes.

pub mod access_log;
mod event;
mod export;
mod expression;
mod follow;
mod metrics;
mod overrides;
mod settings;
mod span;
mod tap;
#[cfg(test)]
mod testing;
mod trace;

pub use event::{Peer, Protocol, RequestEvent, ResponseFlags, Traffic};
pub use export::{ExportCounters, ExportTarget, SpanExporter, SpanQueue};
pub use expression::{Expression, ExpressionError};
pub use follow::{Candidate, Filter, Followed, Following, NotFollowed};
pub use metrics::{MAX_SERIES, RequestCollector, RequestMetrics, RequestTableHealth, SeriesCache};
pub use overrides::{Metric, MetricView, OverrideError};
pub use settings::{
    AccessLogSettings, SettingsError, TagValue, TelemetrySettings, TracingSettings,
};
pub use span::Span;
pub use tap::{Tap, Tapped};
pub use trace::{EVERY_REQUEST, REQUEST_ID, TraceContext, ensure_request_id};

use std::collections::HashMap;
use std::sync::Arc;

use adit_shared::telemetry::LogWriter;

/// Where one worker's requests are recorded.
pub struct RequestTelemetry {
    metrics: Arc<RequestMetrics>,
    series: SeriesCache,
    log: Option<LogWriter>,
    queues: HashMap<Arc<str>, SpanQueue>,
}

impl RequestTelemetry {
    /// Counts in `metrics` and writes lines to `log`.
    pub fn new(metrics: Arc<RequestMetrics>, log: Option<LogWriter>) -> Self {
        Self {
            metrics,
            series: SeriesCache::default(),
            log,
            queues: HashMap::new(),
        }
    }

    /// Spans for the provider `name` go into `queue` from now on; `None`: nowhere.
    pub fn set_exporter(&mut self, name: Arc<str>, queue: Option<SpanQueue>) {
        match queue {
            Some(queue) => self.queues.insert(name, queue),
            None => self.queues.remove(&name),
        };
    }

    /// The request has ended.
    pub fn record(&self, event: &RequestEvent<'_>, settings: &TelemetrySettings) {
        self.metrics
            .count(&self.series, event, settings.metrics.as_ref());
        self.metrics.tap().offer(event);
        if let Some(log) = &self.log {
            for wanted in &settings.access_logs {
                if wanted.filter.as_ref().is_none_or(|f| f.is_true(event)) {
                    access_log::write(log, &wanted.format, event);
                }
            }
        }
        if !event.trace.sampled {
            return;
        }
        for provider in &settings.tracing.providers {
            if let Some(queue) = self.queues.get(provider) {
                queue.push(Span::new(event, &settings.tracing.tags));
            }
        }
    }

    /// To be called about once a minute, so that series of workloads that are gone can go.
    pub fn forget_series(&self) {
        self.series.forget();
    }
}
