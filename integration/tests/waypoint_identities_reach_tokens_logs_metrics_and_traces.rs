//! A token opens what a policy closes; and one request is told alike by the metrics, the access
//! log and its trace, with the identities of both ends.

use adit_integration::{SAMPLE_TOKEN, pod, reviews_mesh, sample_waypoint};
use anyhow::{Context, ensure};
use serde_json::Value;

const URL: &str = "http://reviews.shop/";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const REVIEWS: &str = "spiffe://cluster.local/ns/shop/sa/reviews";

#[test]
fn a_token_opens_what_was_closed_and_a_false_one_is_refused() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[("telemetry.yaml", sample_waypoint("telemetry.yaml"))])?;
    mesh.apply_objects(sample_waypoint("readers.yaml"))?;
    mesh.apply_objects(sample_waypoint("jwt.yaml"))?;
    let bearer = format!("authorization: Bearer {}", SAMPLE_TOKEN.trim());
    let post = ["-X", "POST", "-H", &bearer];
    mesh.eventually("the token", || {
        let visitor = mesh.status_of(pod("shop/visitor"), URL, &[])?;
        let opened = mesh.status_of(pod("shop/visitor"), URL, &post)?;
        ensure!((visitor, opened) == (403, 200), "{visitor} {opened}");
        Ok(())
    })?;
    let token = SAMPLE_TOKEN.trim();
    let (head, signature) = token.rsplit_once('.').context("no signature")?;
    let unsigned = format!("authorization: Bearer {head}.");
    let cut = format!("authorization: Bearer {head}.{}", &signature[4..]);
    for (options, expected) in [
        (&["-X", "POST"][..], 403),
        (&["-X", "DELETE", "-H", &bearer][..], 403),
        (&["-H", &unsigned][..], 401),
        (&["-H", &cut][..], 401),
        (&["-H", "authorization: Bearer nothing"][..], 401),
        (&["-H", &bearer][..], 200),
    ] {
        let got = mesh.status_of(pod("shop/client"), URL, options)?;
        assert_eq!(got, expected, "{:?}", &options[..options.len() - 1]);
    }
    Ok(())
}

#[test]
fn metrics_access_log_and_trace_tell_of_the_same_request() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[("telemetry.yaml", sample_waypoint("telemetry.yaml"))])?;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("traceparent: 00-{trace}-b7ad6b7169203331-01");
    let seen = mesh.seen(
        pod("shop/client"),
        "http://reviews.shop/told",
        &["-H", &parent],
    )?;
    let passed_on = seen["headers"]["traceparent"][0].as_str();
    let passed_on = passed_on.context("the server got no traceparent")?;
    assert!(passed_on.contains(trace), "{passed_on}");
    assert!(!passed_on.contains("b7ad6b7169203331"), "{passed_on}");

    mesh.eventually("the metric", || {
        let labels = [
            ("reporter", "waypoint"),
            ("source_principal", CLIENT),
            ("source_workload", "client"),
            ("destination_principal", REVIEWS),
            ("destination_service", "reviews.shop.svc.cluster.local"),
            ("request_protocol", "http"),
            ("response_code", "200"),
            ("response_flags", "-"),
        ];
        let metrics = mesh.waypoint_metrics("waypoint.shop")?;
        let count = metrics.sum("istio_requests_total", &labels);
        ensure!(count == 1.0, "{count}");
        Ok(())
    })?;
    let line = mesh.eventually("the access log", || {
        let lines = mesh.waypoint_access_log("waypoint.shop")?;
        let mut lines = lines.into_iter().filter(|line| line["path"] == "/told");
        lines.next().context("no line")
    })?;
    assert_eq!(line["method"], "GET", "{line}");
    assert_eq!(line["response_code"], 200, "{line}");
    assert_eq!(line["authority"], "reviews.shop", "{line}");

    let collector = format!(
        "http://{}:4317/spans",
        mesh.address(pod("observe/collector"))?
    );
    let span: Value = mesh.eventually("the span", || {
        let argv = ["call", &collector, "--json", "--timeout", "10000"];
        let lines = mesh.sample_lines(pod("legacy/client"), &argv)?;
        let spans = lines.first().context("no answer")?["answer"].clone();
        let mut spans = spans.as_array().cloned().unwrap_or_default().into_iter();
        spans
            .find(|span| span["trace"] == trace)
            .context("no span of the trace has come")
    })?;
    assert_eq!(span["parent"], "b7ad6b7169203331", "{span}");
    assert_eq!(span["attributes"]["source.principal"], CLIENT, "{span}");
    assert_eq!(
        span["attributes"]["destination.principal"], REVIEWS,
        "{span}"
    );
    assert!(
        passed_on.contains(span["span"].as_str().unwrap_or("?")),
        "{span}"
    );
    Ok(())
}
