//! The exposition, by Istio's names and labels, and the life of a series.

use super::*;
use crate::hbone::buffer::{BufferPool, SizeClass};
use crate::hbone::pool::PoolCounts;
use crate::telemetry::event::{
    ConnectionInfo, Failure, Rejection, ResponseFlag, TerminationReason, Totals, WorkloadLabels,
};
use crate::telemetry::{EventSink, Telemetry, WorkerPools};
use std::collections::BTreeMap;

/// The samples of an exposition: name -> label -> value.
fn samples(metrics: &Metrics) -> Vec<(String, BTreeMap<String, String>, f64)> {
    let text = metrics.encode();
    assert!(text.ends_with("# EOF\n"));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a value");
        let (name, labels) = match name.split_once('{') {
            None => (name, BTreeMap::new()),
            Some((name, labels)) => {
                let labels = labels.strip_suffix('}').expect("closed");
                let pairs = labels.split("\",").map(|pair| {
                    let (key, value) = pair.split_once("=\"").expect("a pair");
                    (key.to_owned(), value.trim_end_matches('"').to_owned())
                });
                (name, pairs.collect())
            }
        };
        (name.to_owned(), labels, value.parse().expect("a number"))
    };
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(sample).collect()
}

/// The value of the sample of `name` that has all of `labels`; there is but one.
fn value(metrics: &Metrics, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let all = samples(metrics);
    let mut found = all.iter().filter(|(n, l, _)| {
        let has = |(k, v): &(&str, &str)| l.get(*k).is_some_and(|value| value == v);
        n == name && labels.iter().all(has)
    });
    let value = found.next().map(|(_, _, value)| *value);
    assert!(found.next().is_none(), "several {name}{labels:?}");
    value
}

fn info(reporter: Reporter, source: &str) -> ConnectionInfo {
    let mut info = ConnectionInfo::new(
        reporter,
        "10.0.0.1:40000".parse().expect("an address"),
        "10.0.0.2:15008".parse().expect("an address"),
    );
    info.labels.source.workload = source.into();
    info.labels.source.namespace = "shop".into();
    info
}

fn telemetry(limit: usize) -> Telemetry {
    let metrics = Metrics::with_series_limit("ztunnel", "1.2.3", limit);
    Telemetry::new(Arc::new(metrics), None, Vec::new())
}

#[test]
fn a_connection_has_istios_names_and_labels() {
    let telemetry = telemetry(10);
    let mut connection = info(Reporter::Source, "cart");
    connection.labels.destination = WorkloadLabels {
        workload: "till".into(),
        namespace: "bank".into(),
        canonical_service: "till-svc".into(),
        canonical_revision: "v2".into(),
        cluster: "Kubernetes".into(),
        region: "eu".into(),
        zone: "eu-1".into(),
        principal: None,
    };
    let id = |text: &str| text.parse().expect("legal");
    let connection = connection.with_mutual_tls(
        id("spiffe://cluster.local/ns/shop/sa/cart"),
        id("spiffe://cluster.local/ns/bank/sa/till"),
        "10.0.0.2:80".into(),
    );
    let open = telemetry.open(connection);
    open.count_request(100);
    open.count_response(7);
    open.count_request(1);

    let metrics = telemetry.metrics();
    // Bytes are seen while the connection is open.
    let expected: BTreeMap<String, String> = [
        ("reporter", "source"),
        ("source_workload", "cart"),
        ("source_canonical_service", "unknown"),
        ("source_canonical_revision", "unknown"),
        ("source_workload_namespace", "shop"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/cart"),
        ("source_app", "unknown"),
        ("source_version", "unknown"),
        ("source_cluster", "unknown"),
        ("destination_service", "unknown"),
        ("destination_service_namespace", "unknown"),
        ("destination_service_name", "unknown"),
        ("destination_workload", "till"),
        ("destination_canonical_service", "till-svc"),
        ("destination_canonical_revision", "v2"),
        ("destination_workload_namespace", "bank"),
        (
            "destination_principal",
            "spiffe://cluster.local/ns/bank/sa/till",
        ),
        ("destination_app", "till-svc"),
        ("destination_version", "v2"),
        ("destination_cluster", "Kubernetes"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
        ("source_region", "unknown"),
        ("source_zone", "unknown"),
        ("destination_region", "eu"),
        ("destination_zone", "eu-1"),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into();
    assert_eq!(expected.len(), 27);
    let all = samples(metrics);
    for (name, count) in [
        ("istio_tcp_connections_opened_total", 1.0),
        ("istio_tcp_received_bytes_total", 101.0),
        ("istio_tcp_sent_bytes_total", 7.0),
    ] {
        let found: Vec<_> = all.iter().filter(|(n, _, _)| n == name).collect();
        assert_eq!(found, [&(name.to_owned(), expected.clone(), count)]);
    }
    let open_sockets = |reporter| {
        value(metrics, "istio_tcp_sockets_open", &[("reporter", reporter)]).expect("there")
    };
    assert_eq!(
        (open_sockets("source"), open_sockets("destination")),
        (1.0, 0.0)
    );
    assert_eq!(
        value(metrics, "istio_tcp_connections_closed_total", &[]),
        None
    );

    open.close();
    let closed = value(
        metrics,
        "istio_tcp_connections_closed_total",
        &[("response_flags", "-"), ("source_workload", "cart")],
    );
    assert_eq!(closed, Some(1.0));
    assert_eq!(open_sockets("source"), 0.0);
    assert_eq!(
        value(metrics, "istio_tcp_connections_failed_total", &[]),
        None
    );
}

#[test]
fn failures_carry_their_reason() {
    let telemetry = telemetry(10);
    let metrics = telemetry.metrics();
    let refused = info(Reporter::Destination, "cart");
    telemetry.failed(&refused, Duration::ZERO, ResponseFlag::Denied, &"policy");
    let flag = |flag| [("response_flags", flag), ("source_workload", "cart")];
    let failed = |f| value(metrics, "istio_tcp_connections_failed_total", &flag(f));
    let closed = |f| value(metrics, "istio_tcp_connections_closed_total", &flag(f));
    assert_eq!((failed("DENY"), closed("DENY")), (Some(1.0), None));

    // Denied later, by a change of policy.
    telemetry
        .open(refused.clone())
        .fail(ResponseFlag::Denied, &"policy changed");
    assert_eq!((failed("DENY"), closed("DENY")), (Some(2.0), Some(1.0)));

    // Cut off by a drain: closed, but not a failure of the mesh.
    drop(telemetry.open(refused));
    assert_eq!((failed("-"), closed("-")), (None, Some(1.0)));
}

#[test]
fn every_reader_hears_the_same() {
    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);
    impl EventSink for Heard {
        fn on_event(&self, event: &Event<'_>) {
            let text = match event {
                Event::ConnectionOpened { .. } => "opened".into(),
                Event::ConnectionClosed {
                    totals:
                        Totals {
                            request_bytes,
                            response_bytes,
                            ..
                        },
                    failure,
                    ..
                } => format!("closed {request_bytes} {response_bytes} {failure:?}"),
                Event::ConnectionFailed {
                    failure: Failure { error, .. },
                    ..
                } => format!("failed {error}"),
                other => format!("{other:?}"),
            };
            self.0.lock().push(text);
        }
    }
    let heard = Arc::new(Heard::default());
    let metrics = Arc::new(Metrics::new("ztunnel", "test"));
    let telemetry = Telemetry::new(metrics, None, vec![heard.clone()]);
    let open = telemetry.open(info(Reporter::Source, "a"));
    open.count_request(3);
    assert_eq!(open.counters().totals().request_bytes, 3);
    open.fail(ResponseFlag::Connect, &"reset");
    let other = info(Reporter::Source, "b");
    telemetry.failed(&other, Duration::ZERO, ResponseFlag::Connect, &"refused");
    drop(telemetry.open(other));
    let heard = heard.0.lock();
    assert_eq!(
        heard[..4],
        [
            "opened",
            "closed 3 0 Some(CONNECT: reset)",
            "failed refused",
            "opened"
        ]
    );
    assert!(heard[4].contains("released it"), "{}", heard[4]);
}

#[test]
fn series_of_the_gone_are_dropped_and_of_the_living_are_kept() {
    let telemetry = telemetry(10);
    let metrics = telemetry.metrics();
    let open = telemetry.open(info(Reporter::Source, "open"));
    telemetry.open(info(Reporter::Source, "kept")).close();
    telemetry.open(info(Reporter::Source, "gone")).close();
    let has = |name| {
        let labels = [("source_workload", name)];
        value(metrics, "istio_tcp_connections_opened_total", &labels).is_some()
    };

    metrics.sweep(Duration::from_secs(3600), &|_| false);
    assert!(has("gone"), "not idle for long enough");

    metrics.sweep(Duration::ZERO, &|labels| &*labels.source.workload == "kept");
    assert_eq!((has("open"), has("kept"), has("gone")), (true, true, false));
    let evicted = value(metrics, "adit_telemetry_tcp_series_evicted_total", &[]);
    assert_eq!(evicted, Some(1.0));

    // What is open is still counted in the series that is shown.
    open.count_request(5);
    let bytes = value(
        metrics,
        "istio_tcp_received_bytes_total",
        &[("source_workload", "open")],
    );
    assert_eq!(bytes, Some(5.0));
}

#[test]
fn the_number_of_series_is_bounded_and_nothing_is_lost() {
    let telemetry = telemetry(3);
    let metrics = telemetry.metrics();
    for n in 0..10 {
        let open = telemetry.open(info(Reporter::Source, &format!("w{n}")));
        open.count_response(1);
        open.close();
    }
    let count = |name: &str| -> f64 {
        let all = samples(metrics);
        all.iter()
            .filter(|(n, _, _)| n == name)
            .map(|(_, _, v)| v)
            .sum()
    };
    assert_eq!(count("istio_tcp_connections_opened_total"), 10.0);
    assert_eq!(count("istio_tcp_sent_bytes_total"), 10.0);
    assert_eq!(count("adit_telemetry_tcp_series"), 3.0);
    assert_eq!(count("adit_telemetry_tcp_series_overflowed_total"), 7.0);
    let overflow = value(
        metrics,
        "istio_tcp_connections_opened_total",
        &[("source_workload", "unknown"), ("reporter", "source")],
    );
    assert_eq!(overflow, Some(7.0));
}

#[test]
fn other_events_are_counted() {
    let telemetry = telemetry(3);
    let metrics = telemetry.metrics();
    let source = Reporter::Source;
    for event in [
        Event::HandshakeCompleted {
            reporter: source,
            duration: Duration::from_millis(3),
        },
        Event::HandshakeFailed { reporter: source },
        Event::TunnelOpened { reporter: source },
        Event::TunnelOpened { reporter: source },
        Event::TunnelClosed {
            reporter: source,
            streams: 4,
        },
        Event::InboundRejected {
            peer: "10.0.0.9:1".parse().expect("an address"),
            reason: Rejection::ForeignAuthority,
        },
        Event::EndpointRetried,
        Event::WaypointFailed {
            reason: "no_healthy_waypoint",
            told: "http1",
        },
        Event::XdsMessage {
            type_url: "type.googleapis.com/istio.workload.Address",
            bytes: 42,
        },
        Event::XdsTerminated {
            reason: TerminationReason::Complete,
        },
        Event::RedirectionRepaired { kind: "route" },
        Event::ListenerFull,
        Event::ReportFailed { refused: true },
        Event::ProxyStarted,
        Event::ProxyStarted,
        Event::ProxyStopped,
    ] {
        telemetry.emit(&event);
    }
    metrics.set_pending_proxies(2);
    // Two workers, one of which has a buffer out.
    let (busy, idle) = (BufferPool::new(1 << 20), BufferPool::new(1 << 20));
    let _buffer = busy.take(SizeClass::Kib16);
    let in_use = busy.stats().bytes_in_use() as f64;
    assert!(in_use >= 16_384.0);
    for (buffers, connections) in [(&busy, 2), (&idle, 3)] {
        let pools = WorkerPools::new(buffers.stats());
        pools.set_tunnels(PoolCounts {
            connections,
            reused: connections as u64 + 3,
            ..PoolCounts::default()
        });
        metrics.watch_pools(pools);
    }
    let url = ("url", "type.googleapis.com/istio.workload.Address");
    let reporter = ("reporter", "source");
    for (name, labels, wanted) in [
        (
            "adit_tls_handshake_duration_seconds_count",
            &[reporter][..],
            1.0,
        ),
        ("adit_tls_handshake_failures_total", &[reporter], 1.0),
        ("adit_tunnels_open", &[reporter], 1.0),
        ("adit_tunnel_streams_sum", &[reporter], 4.0),
        (
            "adit_inbound_rejections_total",
            &[("reason", "foreign_authority")],
            1.0,
        ),
        ("adit_endpoint_retries_total", &[], 1.0),
        (
            "adit_waypoint_failures_total",
            &[("reason", "no_healthy_waypoint"), ("told", "http1")],
            1.0,
        ),
        ("istio_xds_message_total", &[url], 1.0),
        ("istio_xds_message_bytes_total", &[url], 42.0),
        (
            "istio_xds_connection_terminations_total",
            &[("reason", "Complete")],
            1.0,
        ),
        ("adit_redirection_repairs_total", &[("kind", "route")], 1.0),
        ("adit_tunnel_pool_connections", &[], 5.0),
        ("adit_tunnel_pool_streams", &[], 0.0),
        ("adit_tunnel_pool_attempts", &[], 0.0),
        ("adit_tunnel_pool_reused_total", &[], 11.0),
        ("adit_tunnel_pool_connected_total", &[], 0.0),
        ("adit_tunnel_pool_failed_total", &[], 0.0),
        ("adit_tunnel_pool_released_total", &[], 0.0),
        ("adit_tunnel_pool_evicted_total", &[], 0.0),
        ("adit_buffer_pool_bytes", &[("state", "free")], 0.0),
        ("adit_buffer_pool_bytes", &[("state", "in_use")], in_use),
        ("adit_buffer_pool_misses_total", &[], 1.0),
        ("adit_buffer_pool_overflows_total", &[], 0.0),
        ("adit_listener_saturations_total", &[], 1.0),
        (
            "adit_enrolment_report_failures_total",
            &[("reason", "refused")],
            1.0,
        ),
        ("workload_manager_active_proxy_count", &[], 1.0),
        ("workload_manager_pending_proxy_count", &[], 2.0),
        ("workload_manager_proxies_started_total", &[], 2.0),
        ("workload_manager_proxies_stopped_total", &[], 1.0),
        (
            "istio_build",
            &[("component", "ztunnel"), ("tag", "1.2.3")],
            1.0,
        ),
    ] {
        assert_eq!(value(metrics, name, labels), Some(wanted), "{name}");
    }
    assert!(value(metrics, "process_open_fds", &[]).expect("there") > 2.0);
    assert!(value(metrics, "process_max_fds", &[]).expect("there") > 2.0);
}

#[tokio::test]
async fn runtimes_certificates_and_the_log_are_watched() {
    use crate::identity::{CacheOptions, LocalCa, TrustDomain};
    let metrics = Metrics::new("ztunnel", "test");
    let ca = LocalCa::generate(&TrustDomain::default()).expect("a CA");
    let cache = CertificateCache::new(Arc::new(ca), CacheOptions::default());
    let identity = "spiffe://cluster.local/ns/shop/sa/cart";
    cache
        .get(&identity.parse().expect("legal"))
        .await
        .expect("a certificate");
    metrics.watch_certificates(cache);
    metrics.watch_runtime(tokio::runtime::Handle::current());
    metrics.watch_log(LogWriter::start(std::io::sink()).expect("thread"));
    let left = value(
        &metrics,
        "adit_certificate_expiry_seconds",
        &[("identity", identity)],
    );
    assert!(
        (86_000.0..=86_400.0).contains(&left.expect("there")),
        "{left:?}"
    );
    assert_eq!(value(&metrics, "tokio_num_workers", &[]), Some(1.0));
    let busy = "tokio_worker_total_busy_duration_seconds_total";
    assert!(value(&metrics, busy, &[("worker", "0")]).is_some());
    assert_eq!(
        value(&metrics, "adit_log_lines_dropped_total", &[]),
        Some(0.0)
    );
}

#[test]
fn hostile_label_values_stay_values() {
    let telemetry = telemetry(3);
    let hostile = "a\"} 1\nistio_fake_total 9\\";
    telemetry.open(info(Reporter::Source, hostile)).close();
    let text = telemetry.metrics().encode();
    assert!(
        !text.lines().any(|line| line.starts_with("istio_fake")),
        "{text}"
    );
}
