//! HTTPRoutes and GRPCRoutes at a real waypoint: shares, headers, methods, rewrites, answers
//! of the waypoint's own; and a route that is changed under way loses no request.

use std::time::Duration;

use adit_integration::{Counted, TestMesh, pod, reviews_mesh, sample_waypoint};
use anyhow::ensure;
use serde_json::Value;

const URL: &str = "http://reviews.shop/";
const GRPC: &str = "http://reviews.shop:9000";

/// Waits until `n` requests with these options are all answered as `right` says.
fn settles(
    mesh: &TestMesh,
    url: &str,
    options: &[&str],
    right: impl Fn(&Counted) -> bool,
) -> anyhow::Result<Counted> {
    mesh.eventually("the route", || {
        let counted = mesh.requests(pod("shop/client"), url, options)?;
        ensure!(right(&counted), "{counted:?}");
        Ok(counted)
    })
}

fn call(mesh: &TestMesh, url: &str, options: &[&str]) -> anyhow::Result<Value> {
    let argv = [&["call", url, "--json"], options].concat();
    mesh.first_line(pod("shop/client"), &argv)
}

#[test]
fn traffic_is_split_by_weight_and_by_header() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    mesh.apply_accepted(sample_waypoint("route.yaml"))?;
    settles(&mesh, URL, &["-n", "100"], |counted| {
        (60..100).contains(&counted.version("v1"))
    })?;
    let counted = mesh.requests(pod("shop/client"), URL, &["-n", "1000", "-c", "8"])?;
    // More than five standard deviations to either side.
    assert!((50..=150).contains(&counted.version("v2")), "{counted:?}");
    assert_eq!(counted.status("200"), 1000, "{counted:?}");
    assert_eq!(counted.connections_opened, 8, "{counted:?}");
    let jason = ["-n", "100", "-H", "end-user: jason"];
    for more in [&[][..], &["--http2"][..]] {
        let options = [&jason[..], more].concat();
        let counted = mesh.requests(pod("shop/client"), URL, &options)?;
        assert_eq!(counted.version("v2"), 100, "{counted:?}");
    }

    mesh.apply_accepted(sample_waypoint("grpc-route.yaml"))?;
    settles(&mesh, GRPC, &["--grpc", "-n", "100"], |counted| {
        (60..100).contains(&counted.version("v1"))
    })?;
    let grpc = ["--grpc", "-n", "100", "-H", "end-user: jason"];
    let counted = mesh.requests(pod("shop/client"), GRPC, &grpc)?;
    assert_eq!(counted.version("v2"), 100, "{counted:?}");
    // The last rule: every other method of the service.
    for kind in ["client", "server", "bidi"] {
        let argv = ["grpc", GRPC, "--kind", kind, "--count", "10"];
        let lines = mesh.sample_lines(pod("shop/client"), &argv)?;
        assert!(
            lines.iter().all(|line| line["version"] == "v1"),
            "{kind}: {lines:?}"
        );
    }
    Ok(())
}

const FILTERS: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: reviews, namespace: shop }
spec:
  parentRefs: [{ kind: Service, group: '', name: reviews, port: 80 }]
  rules:
    - matches: [{ path: { type: PathPrefix, value: /old } }]
      filters:
        - type: URLRewrite
          urlRewrite: { path: { type: ReplacePrefixMatch, replacePrefixMatch: /new } }
        - type: RequestHeaderModifier
          requestHeaderModifier: { set: [{ name: x-by, value: waypoint }], remove: [x-secret] }
        - type: ResponseHeaderModifier
          responseHeaderModifier: { add: [{ name: x-seen, value: 'yes' }] }
      backendRefs: [{ name: reviews-v1, port: 80 }]
    - matches: [{ path: { type: Exact, value: /away } }]
      filters:
        - type: RequestRedirect
          requestRedirect: { hostname: elsewhere.example, statusCode: 301 }
    - matches: [{ path: { type: PathPrefix, value: /post }, method: POST }]
      backendRefs: [{ name: reviews-v2, port: 80 }]
    - matches: [{ path: { type: PathPrefix, value: /nowhere } }]
      backendRefs: [{ name: not-there, port: 80 }]
    - matches: [{ path: { type: PathPrefix, value: /slow } }]
      timeouts: { request: 200ms }
      backendRefs: [{ name: reviews-v1, port: 80 }]
";

#[test]
fn filters_change_requests_and_what_no_rule_takes_is_answered_with_404() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    mesh.apply_objects(FILTERS)?;
    mesh.eventually("the route", || {
        let line = call(&mesh, "http://reviews.shop/other", &[])?;
        ensure!(line["status"] == 404, "{line}");
        Ok(())
    })?;
    let line = call(
        &mesh,
        "http://reviews.shop/old/a?b=c",
        &["-H", "x-secret: 1"],
    )?;
    let seen = &line["answer"];
    assert_eq!(seen["path"], "/new/a?b=c", "{line}");
    assert_eq!(seen["version"], "v1", "{line}");
    assert_eq!(seen["headers"]["x-by"][0], "waypoint", "{line}");
    assert!(seen["headers"]["x-secret"].is_null(), "{line}");
    assert_eq!(line["headers"]["x-seen"][0], "yes", "{line}");
    let line = call(&mesh, "http://reviews.shop/away", &[])?;
    assert_eq!(line["status"], 301, "{line}");
    let location = line["headers"]["location"][0].as_str().unwrap_or_default();
    assert!(location.starts_with("http://elsewhere.example"), "{line}");
    assert_eq!(call(&mesh, "http://reviews.shop/post", &[])?["status"], 404);
    let line = call(
        &mesh,
        "http://reviews.shop/post",
        &["-X", "POST", "-d", "x"],
    )?;
    assert_eq!(line["version"], "v2", "{line}");
    assert_eq!(
        call(&mesh, "http://reviews.shop/nowhere", &[])?["status"],
        500
    );
    let line = call(&mesh, "http://reviews.shop/slow?delay=3000", &[])?;
    assert_eq!(line["status"], 504, "{line}");
    Ok(())
}

#[test]
fn a_route_that_changes_all_the_time_loses_no_request() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    let route = |weight: u32| {
        sample_waypoint("route.yaml").replace("weight: 90", &format!("weight: {weight}"))
    };
    mesh.apply_accepted(&route(90))?;
    let caller = mesh.caller(pod("shop/client"), URL, 1)?;
    for round in 0..30 {
        mesh.apply_objects(&route(1 + round * 7))?;
        caller.wait_more(10)?;
    }
    let calls = caller.stop();
    let failed: Vec<_> = calls.iter().filter(|call| call.ok().is_none()).collect();
    assert!(
        failed.is_empty(),
        "{} of {}: {:?}",
        failed.len(),
        calls.len(),
        failed.first()
    );
    Ok(())
}

#[test]
fn a_request_that_fails_is_tried_again_elsewhere_and_only_when_asked_for() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    let broken = ["-n", "50", "-H", "x-adit-fault: status=503,only=v1"];
    let counted = mesh.requests(pod("shop/client"), URL, &broken)?;
    assert_eq!(counted.failures, 0, "{counted:?}");
    mesh.apply_accepted(sample_waypoint("retry.yaml"))?;
    settles(&mesh, URL, &broken, |counted| counted.status("200") == 50)?;
    // A status that the route does not name is passed on.
    let other = ["-n", "50", "-H", "x-adit-fault: status=500,only=v1"];
    let counted = settles(&mesh, URL, &other, |counted| counted.status("500") > 0)?;
    assert_eq!(
        counted.status("500") + counted.status("200"),
        50,
        "{counted:?}"
    );
    // And the time for all tries together holds.
    let begin = std::time::Instant::now();
    let slow = [
        "-n",
        "1",
        "-H",
        "x-adit-fault: status=503,delay=60000",
        "--timeout",
        "30000",
    ];
    let counted = mesh.requests(pod("shop/client"), URL, &slow)?;
    assert_eq!(counted.status("504"), 1, "{counted:?}");
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "{:?}",
        begin.elapsed()
    );
    Ok(())
}
