use std::thread;

use adit_shared::proto::waypoint as proto;
use prometheus_client::registry::Registry;

use super::super::event::Protocol;
use super::super::testing::Sample;
use super::*;

fn scrape(metrics: &Arc<RequestMetrics>) -> String {
    let mut registry = Registry::default();
    let istio = registry.sub_registry_with_prefix("istio");
    istio.register_collector(Box::new(RequestCollector(metrics.clone())));
    let adit = registry.sub_registry_with_prefix("adit");
    adit.register_collector(Box::new(RequestTableHealth(metrics.clone())));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("encodes");
    text
}

fn line<'t>(text: &'t str, start: &str) -> &'t str {
    let found = text.lines().find(|line| line.starts_with(start));
    found.unwrap_or_else(|| panic!("{start} in\n{text}"))
}

fn value(line: &str) -> f64 {
    let (_, value) = line.rsplit_once(' ').expect("a value");
    value.parse().expect("a number")
}

#[test]
fn a_request_counts_with_istios_labels() {
    let metrics = Arc::new(RequestMetrics::new(10));
    let cache = SeriesCache::default();
    let sample = Sample::new();
    metrics.count(&cache, &sample.event(), None);
    metrics.count(&cache, &sample.event(), None);
    let text = scrape(&metrics);
    let total = line(&text, "istio_requests_total{");
    assert_eq!(value(total), 2.0);
    for label in [
        "reporter=\"waypoint\"",
        "source_workload=\"productpage\"",
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/productpage\"",
        "destination_principal=\"spiffe://cluster.local/ns/shop/sa/reviews\"",
        "destination_service=\"reviews.shop.svc.cluster.local\"",
        "destination_service_name=\"reviews\"",
        "destination_service_namespace=\"shop\"",
        "destination_canonical_service=\"reviews\"",
        "request_protocol=\"http\"",
        "response_code=\"200\"",
        "grpc_response_status=\"\"",
        "response_flags=\"-\"",
        "connection_security_policy=\"mutual_tls\"",
    ] {
        assert!(total.contains(label), "{label} in {total}");
    }
    let count = line(&text, "istio_request_duration_milliseconds_count");
    assert_eq!(value(count), 2.0);
    let sum = line(&text, "istio_request_duration_milliseconds_sum");
    assert_eq!(value(sum), 24.0);
    let bucket = |le: &str| {
        let found = text.lines().find(|line| {
            let of = line.starts_with("istio_request_duration_milliseconds_bucket{");
            of && line.contains(&format!("le=\"{le}\""))
        });
        value(found.expect(le))
    };
    assert_eq!(bucket("10.0"), 0.0);
    assert_eq!(bucket("25.0"), 2.0);
    assert_eq!(bucket("+Inf"), 2.0);
    assert!(!text.contains("istio_request_messages_total{"), "not gRPC");
}

#[test]
fn grpc_counts_messages_and_status() {
    let metrics = Arc::new(RequestMetrics::new(10));
    let mut sample = Sample::new();
    sample.protocol = Protocol::Grpc;
    sample.grpc_status = Some(7);
    sample.traffic.request_messages = 3;
    metrics.count(&SeriesCache::default(), &sample.event(), None);
    let text = scrape(&metrics);
    let messages = line(&text, "istio_request_messages_total{");
    assert_eq!(value(messages), 3.0);
    assert!(messages.contains("request_protocol=\"grpc\""), "{messages}");
    assert!(
        messages.contains("grpc_response_status=\"7\""),
        "{messages}"
    );
}

#[test]
fn what_differs_is_counted_apart_and_what_is_equal_together() {
    let metrics = Arc::new(RequestMetrics::new(10));
    let mut sample = Sample::new();
    let cache = SeriesCache::default();
    metrics.count(&cache, &sample.event(), None);
    sample.status = 503;
    sample.flags = ResponseFlags::NO_HEALTHY_UPSTREAM;
    metrics.count(&cache, &sample.event(), None);
    // Equal by value, at another address and from another worker.
    let again = Sample::new();
    thread::scope(|scope| {
        scope.spawn(|| metrics.count(&SeriesCache::default(), &again.event(), None));
    });
    let text = scrape(&metrics);
    let of = |code: &str| {
        let code = format!("response_code=\"{code}\"");
        let lines = text
            .lines()
            .filter(|l| l.starts_with("istio_requests_total{"));
        lines.filter(|l| l.contains(&code)).map(value).sum::<f64>()
    };
    assert_eq!((of("200"), of("503")), (2.0, 1.0));
    assert!(text.contains("response_flags=\"UH\""));
}

#[test]
fn label_sets_are_bounded() {
    let metrics = Arc::new(RequestMetrics::new(2));
    let cache = SeriesCache::default();
    let mut sample = Sample::new();
    for status in 200..210 {
        sample.status = status;
        metrics.count(&cache, &sample.event(), None);
    }
    let text = scrape(&metrics);
    assert_eq!(value(line(&text, "adit_telemetry_request_series ")), 2.0);
    let lines = text
        .lines()
        .filter(|l| l.starts_with("istio_requests_total{"));
    assert_eq!(lines.map(value).sum::<f64>(), 10.0, "none is lost");
    assert!(text.contains("source_workload=\"unknown\""));
}

#[test]
fn a_sweep_drops_what_is_gone_and_idle() {
    let metrics = Arc::new(RequestMetrics::new(10));
    let cache = SeriesCache::default();
    metrics.count(&cache, &Sample::new().event(), None);
    metrics.sweep(Duration::ZERO, &|_| false);
    assert_eq!(metrics.series.read().len(), 1, "a worker holds it");
    cache.forget();
    metrics.sweep(Duration::ZERO, &|_| true);
    assert_eq!(metrics.series.read().len(), 1, "its workloads are there");
    metrics.sweep(Duration::ZERO, &|_| false);
    assert_eq!(metrics.series.read().len(), 0);
}

#[test]
fn the_telemetry_api_changes_metrics_and_tags() {
    let tag = |value: &str| proto::TagOverride {
        remove: value.is_empty(),
        value: value.into(),
    };
    let mut view = MetricView::default();
    view.apply(&proto::MetricOverride {
        metric: "REQUEST_COUNT".into(),
        tags: [
            ("request_host".to_owned(), tag("request.host")),
            ("source_cluster".to_owned(), tag("")),
            ("destination_app".to_owned(), tag("'fixed'")),
        ]
        .into(),
        ..Default::default()
    })
    .expect("valid");
    view.apply(&proto::MetricOverride {
        metric: "REQUEST_SIZE".into(),
        disabled: true,
        disabled_set: true,
        ..Default::default()
    })
    .expect("valid");
    let view = Arc::new(view);
    let metrics = Arc::new(RequestMetrics::new(10));
    metrics.count(&SeriesCache::default(), &Sample::new().event(), Some(&view));
    let text = scrape(&metrics);
    let total = line(&text, "istio_requests_total{");
    assert!(total.contains("request_host=\"reviews.shop\""), "{total}");
    assert!(!total.contains("source_cluster"), "{total}");
    assert!(total.contains("destination_app=\"fixed\""), "{total}");
    let duration = line(&text, "istio_request_duration_milliseconds_count{");
    assert!(!duration.contains("request_host"), "{duration}");
    assert!(duration.contains("source_cluster"), "{duration}");
    assert!(!text.contains("istio_request_bytes_count{"), "disabled");

    let unknown = proto::MetricOverride {
        metric: "NO_SUCH".into(),
        ..Default::default()
    };
    assert!(MetricView::default().apply(&unknown).is_err());
}
