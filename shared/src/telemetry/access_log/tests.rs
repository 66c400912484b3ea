//! The lines, field by field, in both formats.

use super::*;
use crate::telemetry::event::{Reporter, ServiceLabels, WorkloadLabels};
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn workload(name: &str, namespace: &str) -> WorkloadLabels {
    WorkloadLabels {
        workload: name.into(),
        namespace: namespace.into(),
        canonical_service: name.into(),
        cluster: "Kubernetes".into(),
        ..Default::default()
    }
}

fn tunnelled(reporter: Reporter) -> ConnectionInfo {
    let mut info = ConnectionInfo::new(
        reporter,
        "10.0.0.1:40000".parse().expect("an address"),
        "10.0.0.2:15008".parse().expect("an address"),
    );
    info.source_name = "cart-1".into();
    info.labels.source = workload("cart", "shop");
    info.destination_name = "till-1".into();
    info.labels.destination = workload("till", "bank");
    info.labels.service = Some(ServiceLabels {
        hostname: "till.bank.svc.cluster.local".into(),
        name: "till".into(),
        namespace: "bank".into(),
    });
    let id = |text: &str| text.parse().expect("legal");
    info.with_mutual_tls(
        id("spiffe://cluster.local/ns/shop/sa/cart"),
        id("spiffe://cluster.local/ns/bank/sa/till"),
        "10.0.0.2:8080".into(),
    )
}

const TOTALS: Totals = Totals {
    request_bytes: 11,
    response_bytes: 22,
    duration: Duration::from_millis(12),
};

/// The line without its time.
fn line(
    format: LineFormat,
    info: &ConnectionInfo,
    totals: Option<Totals>,
    error: Option<&str>,
) -> String {
    let output = Output::default();
    let writer = LogWriter::start(output.clone()).expect("thread");
    let log = AccessLog::with_format(writer.clone(), format);
    let shown = error.as_ref().map(|e| e as &dyn std::fmt::Display);
    log.line("info", "connection complete", info, totals, shown);
    assert!(writer.flush(Duration::from_secs(10)));
    let text = String::from_utf8(output.0.lock().clone()).expect("UTF-8");
    match format {
        LineFormat::Plain => text.split_once('\t').expect("a time").1.to_owned(),
        LineFormat::Json => text,
    }
}

#[test]
fn plain_has_ztunnels_fields_in_order() {
    assert_eq!(
        line(
            LineFormat::Plain,
            &tunnelled(Reporter::Source),
            Some(TOTALS),
            None
        ),
        "info\taccess\tconnection complete\t\
         src.addr=10.0.0.1:40000 src.workload=\"cart-1\" src.namespace=\"shop\" \
         src.identity=\"spiffe://cluster.local/ns/shop/sa/cart\" src.cluster=\"Kubernetes\" \
         dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:8080 \
         dst.service=\"till.bank.svc.cluster.local\" dst.workload=\"till-1\" \
         dst.namespace=\"bank\" dst.identity=\"spiffe://cluster.local/ns/bank/sa/till\" \
         dst.cluster=\"Kubernetes\" direction=\"outbound\" bytes_sent=11 bytes_recv=22 \
         duration=\"12ms\"\n"
    );
}

#[test]
fn each_side_counts_from_its_own_point_of_view() {
    let inbound = line(
        LineFormat::Plain,
        &tunnelled(Reporter::Destination),
        Some(TOTALS),
        None,
    );
    assert!(
        inbound.contains("direction=\"inbound\" bytes_sent=22 bytes_recv=11"),
        "{inbound}"
    );
}

#[test]
fn unknown_fields_are_left_out() {
    let info = ConnectionInfo::new(
        Reporter::Destination,
        "10.0.0.1:1".parse().expect("an address"),
        "[fd00::2]:80".parse().expect("an address"),
    );
    assert_eq!(
        line(LineFormat::Plain, &info, None, Some("denied by \"ns/p\"\n")),
        "info\taccess\tconnection complete\tsrc.addr=10.0.0.1:1 dst.addr=[fd00::2]:80 \
         direction=\"inbound\" error=\"denied by \\\"ns/p\\\"\\n\"\n"
    );
}

#[test]
fn the_canonical_service_stands_in_for_a_pod_name() {
    let mut info = tunnelled(Reporter::Source);
    info.source_name = Arc::default();
    let line = line(LineFormat::Plain, &info, None, None);
    assert!(line.contains("src.workload=\"cart\""), "{line}");
}

#[test]
fn json_is_one_flat_object() {
    let text = line(
        LineFormat::Json,
        &tunnelled(Reporter::Source),
        Some(TOTALS),
        Some("broken \"pipe\"\u{1}"),
    );
    assert_eq!(text.matches('\n').count(), 1);
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for (key, wanted) in [
        ("level", "info"),
        ("scope", "access"),
        ("message", "connection complete"),
        ("src.addr", "10.0.0.1:40000"),
        ("dst.hbone_addr", "10.0.0.2:8080"),
        ("dst.identity", "spiffe://cluster.local/ns/bank/sa/till"),
        ("duration", "12ms"),
        ("error", "broken \"pipe\"\u{1}"),
    ] {
        assert_eq!(value[key], wanted, "{key}");
    }
    assert_eq!(value["bytes_sent"], 11);
    assert!(value["time"].as_str().expect("text").ends_with('Z'));
}

#[test]
fn a_peer_cannot_break_out_of_its_line() {
    let mut info = tunnelled(Reporter::Source);
    info.hbone_authority = Some("x\ny\u{2028}z".into());
    info.source_name = "a\"b\\c\td".into();
    for format in [LineFormat::Plain, LineFormat::Json] {
        let text = line(format, &info, None, None);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(!text.contains('\u{2028}'), "{text}");
    }
    let plain = line(LineFormat::Plain, &info, None, None);
    assert!(plain.contains(r#"src.workload="a\"b\\c\td""#), "{plain}");
    let json = line(LineFormat::Json, &info, None, None);
    let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(value["src.workload"], "a\"b\\c\td");
    assert_eq!(value["dst.hbone_addr"], "x\ny\u{2028}z");
}

#[test]
fn the_log_filter_decides_which_lines_are_written() {
    use tracing_subscriber::layer::SubscriberExt as _;
    let written = |filter: &str| {
        let output = Output::default();
        let writer = LogWriter::start(output.clone()).expect("thread");
        let log = AccessLog::with_format(writer.clone(), LineFormat::Plain);
        let filter: tracing_subscriber::EnvFilter = filter.parse().expect("a filter");
        let subscriber = tracing_subscriber::registry().with(filter);
        let info = tunnelled(Reporter::Source);
        let failure = Failure {
            flag: crate::telemetry::ResponseFlag::Denied,
            error: &"denied",
        };
        tracing::subscriber::with_default(subscriber, || {
            log.on_event(&Event::ConnectionOpened { connection: &info });
            for failure in [None, Some(failure)] {
                log.on_event(&Event::ConnectionClosed {
                    connection: &info,
                    totals: TOTALS,
                    failure,
                });
            }
            log.on_event(&Event::ConnectionFailed {
                connection: &info,
                duration: Duration::ZERO,
                failure,
            });
        });
        assert!(writer.flush(Duration::from_secs(10)));
        let text = String::from_utf8(output.0.lock().clone()).expect("UTF-8");
        let fields = |line: &str| {
            let mut fields = line.split('\t').skip(1);
            let (level, message) = (fields.next(), fields.nth(1));
            format!("{}: {}", level.expect("level"), message.expect("message"))
        };
        text.lines().map(fields).collect::<Vec<_>>()
    };
    let opened = "debug: connection opened";
    let complete = "info: connection complete";
    let broken = "error: connection complete";
    let failed = "warn: connection failed";
    assert_eq!(written("access=debug"), [opened, complete, broken, failed]);
    assert_eq!(written("info"), [complete, broken, failed]);
    assert_eq!(written("info,access=warn"), [broken, failed]);
    assert_eq!(written("access=error"), [broken]);
    assert!(written("info,access=off").is_empty());
}
