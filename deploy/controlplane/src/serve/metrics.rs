//! Counters and gauges by Istio's names where istiod has them, in Prometheus' text format.
//!
//! Written out by hand: istiod's counters have no `_total` suffix, which the OpenMetrics
//! encoder that the proxies use would add.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use adit_shared::net::accept::AcceptCounts;
use parking_lot::Mutex;

/// A number that only grows.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Default, Debug)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Sets it.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts one until the guard is dropped.
    pub fn hold(&self) -> GaugeGuard<'_> {
        self.0.fetch_add(1, Ordering::Relaxed);
        GaugeGuard(self)
    }
}

/// Counts one while it lives.
pub struct GaugeGuard<'a>(&'a Gauge);

impl Drop for GaugeGuard<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counters by the value of one label. Values are ours or bounded before they get here, so that
/// nobody can make this grow.
#[derive(Default, Debug)]
pub struct Counters(Mutex<BTreeMap<String, u64>>);

/// More values than this are counted as `other`.
const MAX_LABEL_VALUES: usize = 64;

impl Counters {
    /// Adds one for a label value.
    pub fn inc(&self, label: &str) {
        let mut counters = self.0.lock();
        if let Some(counter) = counters.get_mut(label) {
            *counter += 1;
            return;
        }
        let label = if counters.len() < MAX_LABEL_VALUES {
            label
        } else {
            "other"
        };
        *counters.entry(label.to_owned()).or_default() += 1;
    }

    /// The count for a label value.
    pub fn get(&self, label: &str) -> u64 {
        self.0.lock().get(label).copied().unwrap_or_default()
    }
}

/// Everything that the server counts.
#[derive(Default, Debug)]
pub struct Metrics {
    /// xDS streams that are open.
    pub streams: Gauge,
    /// TCP connections that are open.
    pub connections: Gauge,
    /// Responses sent, by type.
    pub pushes: Counters,
    /// Responses that a client rejected in part, by type.
    pub rejects: Counters,
    /// Answers to responses that were not outstanding, by type.
    pub stale_nonces: Counters,
    /// xDS streams that were refused or ended by us, by reason.
    pub stream_ends: Counters,
    /// Callers that are not who they should be, by reason.
    pub authentication_failures: Counters,
    /// Requests for certificates.
    pub certificate_requests: Counter,
    /// Certificates issued.
    pub certificates_issued: Counter,
    /// Requests for certificates that were refused, by reason.
    pub certificate_refusals: Counters,
    /// Requests to sign that were malformed.
    pub csr_errors: Counter,
    /// Failures to sign that were our own.
    pub sign_errors: Counter,
    /// When the signing certificate expires, in seconds since 1970.
    pub ca_expiry: Gauge,
    /// When our serving certificate expires, in seconds since 1970.
    pub serving_expiry: Gauge,
    /// Enrolment reports that were taken.
    pub enrolment_reports: Counter,
    /// Connections that ended before they were of use, by reason.
    pub connection_failures: Counters,
    /// What came of accepting, at all ports.
    pub accepts: Arc<AcceptCounts>,
    /// The snapshot that is served.
    pub generation: Gauge,
    /// In a cluster: what is written to the API server.
    pub writes: OnceLock<Arc<WriteMetrics>>,
}

/// What is counted of writing to the API server.
#[derive(Default, Debug)]
pub struct WriteMetrics {
    /// 1 while this replica leads.
    pub leads: Gauge,
    /// Objects whose status is to be looked at.
    pub objects_queued: Gauge,
    /// Pods whose annotation is to be written.
    pub pods_queued: Gauge,
    /// Writes that succeeded, by kind of object.
    pub written: Counters,
    /// Writes that failed and are tried again, by kind of object.
    pub failed: Counters,
}

impl Metrics {
    /// The text for a scrape.
    pub fn render(&self) -> String {
        let mut out = Text(String::with_capacity(4096));
        out.header("istio_build", "gauge", "The build of this component.");
        out.line(
            "istio_build",
            &[("component", "pilot"), ("tag", env!("CARGO_PKG_VERSION"))],
            1,
        );
        out.gauge("pilot_xds", "xDS streams that are open.", &self.streams);
        out.counters(
            "pilot_xds_pushes",
            "xDS responses sent.",
            "type",
            &self.pushes,
        );
        out.counters(
            "pilot_total_xds_rejects",
            "xDS responses that the client rejected in part.",
            "type",
            &self.rejects,
        );
        out.counters(
            "pilot_xds_expired_nonce",
            "Answers to xDS responses that were not outstanding.",
            "type",
            &self.stale_nonces,
        );
        out.counters(
            "adit_xds_streams_ended",
            "xDS streams that were refused or ended by the server.",
            "reason",
            &self.stream_ends,
        );
        out.gauge(
            "adit_snapshot_generation",
            "The snapshot that is served; 0 until the first.",
            &self.generation,
        );
        out.counters(
            "citadel_server_authentication_failure_count",
            "Callers whose token was refused.",
            "reason",
            &self.authentication_failures,
        );
        out.counter(
            "citadel_server_csr_count",
            "Requests for certificates.",
            &self.certificate_requests,
        );
        out.counter(
            "citadel_server_success_cert_issuance_count",
            "Certificates issued.",
            &self.certificates_issued,
        );
        out.counters(
            "adit_ca_refusals",
            "Requests for certificates that were refused.",
            "reason",
            &self.certificate_refusals,
        );
        out.counter(
            "citadel_server_csr_parsing_err_count",
            "Malformed requests to sign.",
            &self.csr_errors,
        );
        out.counter(
            "citadel_server_csr_sign_err_count",
            "Failures to sign.",
            &self.sign_errors,
        );
        out.gauge(
            "citadel_server_root_cert_expiry_timestamp",
            "When the signing certificate expires, in seconds since 1970.",
            &self.ca_expiry,
        );
        out.gauge(
            "adit_serving_cert_expiry_timestamp",
            "When the serving certificate expires, in seconds since 1970.",
            &self.serving_expiry,
        );
        out.counter(
            "adit_enrolment_reports",
            "Enrolment reports that were taken.",
            &self.enrolment_reports,
        );
        out.gauge(
            "adit_connections",
            "TCP connections that are open.",
            &self.connections,
        );
        out.counters(
            "adit_connection_failures",
            "TCP connections that ended before they were of use.",
            "reason",
            &self.connection_failures,
        );
        // Of the same family: connections that we could not even accept.
        let AcceptCounts {
            aborted, exhausted, ..
        } = &*self.accepts;
        let accept = aborted.load(Ordering::Relaxed) + exhausted.load(Ordering::Relaxed);
        out.line("adit_connection_failures", &[("reason", "accept")], accept);
        if let Some(writes) = self.writes.get() {
            writes.render(&mut out);
        }
        out.0
    }
}

impl WriteMetrics {
    fn render(&self, out: &mut Text) {
        out.gauge(
            "adit_leader",
            "Whether this replica writes status and runs the waypoints.",
            &self.leads,
        );
        out.gauge(
            "adit_status_queue",
            "Objects whose status is to be looked at.",
            &self.objects_queued,
        );
        out.gauge(
            "adit_annotation_queue",
            "Pods whose annotation is to be written.",
            &self.pods_queued,
        );
        out.counters(
            "adit_status_writes",
            "Statuses and annotations written.",
            "kind",
            &self.written,
        );
        out.counters(
            "adit_status_write_failures",
            "Statuses and annotations that could not be written and are tried again.",
            "kind",
            &self.failed,
        );
    }
}

struct Text(String);

impl Text {
    fn header(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail, here and below.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let text = text
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let open = if i == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{open}{label}=\"{text}\"");
        }
        let close = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{close} {value}");
    }

    fn counter(&mut self, name: &str, help: &str, counter: &Counter) {
        self.header(name, "counter", help);
        self.line(name, &[], counter.get());
    }

    fn gauge(&mut self, name: &str, help: &str, gauge: &Gauge) {
        self.header(name, "gauge", help);
        self.line(name, &[], gauge.get());
    }

    fn counters(&mut self, name: &str, help: &str, label: &str, counters: &Counters) {
        self.header(name, "counter", help);
        for (value, count) in counters.0.lock().iter() {
            self.line(name, &[(label, value)], count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_prometheus() {
        let metrics = Metrics::default();
        metrics.pushes.inc("a \"type\"");
        metrics.pushes.inc("a \"type\"");
        metrics.certificate_requests.inc();
        let open = metrics.streams.hold();
        let text = metrics.render();
        for line in [
            "# TYPE pilot_xds_pushes counter",
            r#"pilot_xds_pushes{type="a \"type\""} 2"#,
            "citadel_server_csr_count 1",
            "pilot_xds 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        drop(open);
        assert_eq!(metrics.streams.get(), 0);
    }

    #[test]
    fn label_values_are_bounded() {
        let counters = Counters::default();
        for i in 0..1000 {
            counters.inc(&i.to_string());
        }
        assert_eq!(counters.get("0"), 1);
        assert_eq!(counters.get("other"), 1000 - MAX_LABEL_VALUES as u64);
    }
}
