//! The second half of the tour: a waypoint, what it does to requests, and what is left
//! when it is gone.

use std::time::Duration;

use adit_integration::{Counted, SAMPLE_TOKEN, TestMesh, pod, sample_waypoint};
use anyhow::{Context, ensure};
use serde_json::Value;

use super::{Tour, processes};

const URL: &str = "http://reviews.shop/";
const GRPC: &str = "http://reviews.shop:9000";
const HOST: &str = "reviews.shop.svc.cluster.local";
const WAYPOINT: &str = "waypoint.shop";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const REVIEWS: &str = "spiffe://cluster.local/ns/shop/sa/reviews";
/// A request through a waypoint that is not there ends by then.
const FAILS_WITHIN: Duration = Duration::from_secs(5);

pub(super) fn walk(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    enrol(tour, mesh)?;
    split(tour, mesh)?;
    split_grpc(tour, mesh)?;
    readers_only(tour, mesh)?;
    token(tour, mesh)?;
    retry(tour, mesh)?;
    watch(tour, mesh)?;
    die_and_return(tour, mesh)?;
    remove(tour, mesh)
}

/// The client's answer of one request: status, or why there was none.
fn status(mesh: &TestMesh, from: &str, options: &[&str]) -> anyhow::Result<String> {
    let argv = [&["call", URL], options].concat();
    let line = mesh.first_line(pod(from), &argv)?;
    Ok(match &line["status"] {
        Value::Null => line["error"].as_str().unwrap_or("no answer").to_owned(),
        status => status.to_string(),
    })
}

fn shares(counted: &Counted) -> String {
    let (one, two) = (counted.version("v1"), counted.version("v2"));
    format!("{one} v1, {two} v2, {} failed", counted.failures)
}

fn enrol(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("7. A waypoint for the namespace, while clients go on");
    mesh.apply_objects(sample_waypoint("reviews.yaml"))?;
    mesh.apply_objects(sample_waypoint("telemetry.yaml"))?;
    mesh.wait_pods_ready(adit_integration::mesh::DEADLINE)?;
    mesh.wait_enrolled()?;
    mesh.wait_bound(HOST, false)?;
    let before = mesh.eventually("an answer", || mesh.seen(pod("shop/client"), URL, &[]))?;
    let own = mesh.address(pod("shop/client"))?;
    let peer = before["peer"].as_str().unwrap_or_default().to_owned();
    tour.check(
        format!("reviews.shop answers the client itself ({peer})"),
        peer.starts_with(&format!("{own}:")),
    );
    let pods = processes(mesh)?;
    let caller = mesh.caller(pod("shop/client"), URL, 5)?;
    let told = mesh.enrol_waypoint("shop")?;
    println!("       $ adit waypoint apply -n shop --enroll-namespace --wait");
    for line in told.lines() {
        println!("       {line}");
    }
    mesh.wait_bound(HOST, true)?;
    caller.wait_more(50)?;
    let calls = caller.stop();
    let failed = calls.iter().filter(|call| call.ok().is_none()).count();
    tour.check(
        format!("{} calls meanwhile, {failed} failed", calls.len()),
        failed == 0,
    );
    let after = processes(mesh)?;
    tour.check(
        "no pod was restarted",
        pods.iter().all(|process| after.contains(process)),
    );
    let seen = mesh.seen(pod("shop/client"), URL, &[])?;
    let identity = seen["identity"].as_str().unwrap_or("nobody");
    tour.check(
        format!("the request came by the waypoint, which vouches for {identity}"),
        identity == CLIENT,
    );
    Ok(())
}

fn split(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("8. An HTTPRoute splits reviews 90/10");
    mesh.apply_accepted(sample_waypoint("route.yaml"))?;
    let client = pod("shop/client");
    let jason = ["-n", "100", "-H", "end-user: jason"];
    let in_force = mesh.eventually("the route", || {
        let counted = mesh.requests(client, URL, &jason)?;
        ensure!(counted.version("v2") == 100, "{counted:?}");
        let counted = mesh.requests(client, URL, &["-n", "100"])?;
        ensure!(counted.version("v1") > 60, "{counted:?}");
        Ok(())
    });
    tour.check("it is accepted, and in force", in_force.is_ok());
    let counted = mesh.requests(client, URL, &["-n", "1000", "-c", "4"])?;
    tour.check(
        format!(
            "1000 requests over 4 kept connections: {}",
            shares(&counted)
        ),
        // More than five standard deviations to either side.
        (50..=150).contains(&counted.version("v2"))
            && counted.status("200") == 1000
            && counted.connections_opened == 4,
    );
    let counted = mesh.requests(client, URL, &jason)?;
    tour.check(
        format!("100 with the header end-user: jason: {}", shares(&counted)),
        counted.version("v2") == 100,
    );
    Ok(())
}

fn split_grpc(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("9. A GRPCRoute does the same for gRPC");
    mesh.apply_accepted(sample_waypoint("grpc-route.yaml"))?;
    let client = pod("shop/client");
    let jason = ["--grpc", "-n", "50", "-H", "end-user: jason"];
    let jasons = mesh.eventually("the route", || {
        let counted = mesh.requests(client, GRPC, &jason)?;
        ensure!(counted.version("v2") == 50, "{counted:?}");
        let counted = mesh.requests(client, GRPC, &["--grpc", "-n", "100"])?;
        ensure!(counted.version("v1") > 60, "{counted:?}");
        Ok(counted)
    });
    let counted = mesh.requests(client, GRPC, &["--grpc", "-n", "1000", "-c", "4"])?;
    tour.check(
        format!("1000 calls: {}", shares(&counted)),
        (50..=150).contains(&counted.version("v2")) && counted.status("0") == 1000,
    );
    tour.check(
        "with the metadata end-user: jason all of 50 calls are v2's",
        jasons.is_ok(),
    );
    let argv = ["grpc", GRPC, "--kind", "bidi", "--messages", "20"];
    let lines = mesh.sample_lines(client, &argv)?;
    let answers = lines
        .first()
        .map_or(0, |l| l["answers"].as_u64().unwrap_or(0));
    tour.check(
        format!("a stream in both directions carries 20 messages: {answers} answers"),
        answers == 20,
    );
    Ok(())
}

fn readers_only(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("10. An AuthorizationPolicy: GET for the account client, nothing else");
    mesh.apply_objects(sample_waypoint("readers.yaml"))?;
    let denied = mesh.eventually("the policy", || {
        let status = status(mesh, "shop/visitor", &[])?;
        ensure!(status == "403", "{status}");
        Ok(())
    });
    tour.check("GET as visitor: 403", denied.is_ok());
    let get = status(mesh, "shop/client", &[])?;
    tour.check(format!("GET as client: {get}"), get == "200");
    let post = status(mesh, "shop/client", &["-X", "POST"])?;
    tour.check(format!("POST as client: {post}"), post == "403");
    Ok(())
}

fn token(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("11. A token opens what was closed");
    mesh.apply_objects(sample_waypoint("jwt.yaml"))?;
    let bearer = format!("authorization: Bearer {}", SAMPLE_TOKEN.trim());
    let with_token = ["-X", "POST", "-H", &bearer];
    let opened = mesh.eventually("the token", || {
        let status = status(mesh, "shop/client", &with_token)?;
        ensure!(status == "200", "{status}");
        Ok(())
    });
    tour.check(
        "POST as client with a token of demo@adit.local: 200",
        opened.is_ok(),
    );
    let without = status(mesh, "shop/client", &["-X", "POST"])?;
    tour.check(format!("without: {without}"), without == "403");
    let broken = format!("{}x", &bearer[..bearer.len() - 4]);
    let broken = status(mesh, "shop/client", &["-H", &broken])?;
    tour.check(
        format!("with one that somebody has changed: {broken}"),
        broken == "401",
    );
    mesh.delete_objects(sample_waypoint("jwt.yaml"))?;
    mesh.delete_objects(sample_waypoint("readers.yaml"))?;
    Ok(())
}

fn retry(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("12. A request that meets a 503 is tried again elsewhere");
    let client = pod("shop/client");
    let fault = ["-n", "100", "-H", "x-adit-fault: status=503,only=v1"];
    let before = mesh.eventually("the policies are gone", || {
        let counted = mesh.requests(client, URL, &fault)?;
        ensure!(counted.status("403") == 0, "{counted:?}");
        Ok(counted)
    })?;
    tour.check(
        format!(
            "v1 is broken: {} of 100 requests are answered 503",
            before.status("503")
        ),
        before.status("503") > 50,
    );
    mesh.apply_accepted(sample_waypoint("retry.yaml"))?;
    let after = mesh.eventually("the retries", || {
        let counted = mesh.requests(client, URL, &fault)?;
        ensure!(counted.status("200") == 100, "{counted:?}");
        Ok(counted)
    });
    tour.check(
        format!(
            "with retries none is: {}",
            after.as_ref().map_or_else(|e| e.to_string(), shares)
        ),
        after.is_ok(),
    );
    Ok(())
}

fn watch(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("13. The same request in metrics, access log and trace");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("traceparent: 00-{trace}-00f067aa0ba902b7-01");
    mesh.seen(
        pod("shop/client"),
        "http://reviews.shop/watched",
        &["-H", &parent],
    )?;
    let labels = [
        ("reporter", "waypoint"),
        ("source_principal", CLIENT),
        ("destination_service_name", "reviews"),
        ("destination_principal", REVIEWS),
        ("response_code", "200"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let count = mesh.eventually("the metric", || {
        let count = mesh
            .waypoint_metrics(WAYPOINT)?
            .sum("istio_requests_total", &labels);
        ensure!(count > 0.0, "no istio_requests_total with {labels:?}");
        Ok(count)
    });
    tour.check(
        format!(
            "istio_requests_total: {} requests of {CLIENT} answered 200 by {REVIEWS}",
            count.as_ref().copied().unwrap_or_default()
        ),
        count.is_ok(),
    );
    let line = mesh.eventually("the access log", || {
        let lines = mesh.waypoint_access_log(WAYPOINT)?;
        let mut lines = lines.into_iter().filter(|line| line["path"] == "/watched");
        lines.next().context("no line for /watched")
    });
    tour.check(
        match &line {
            Ok(line) => format!(
                "access log: {} {} {} {} by {}",
                line["method"],
                line["path"],
                line["response_code"],
                line["route_name"],
                line["upstream_host"]
            ),
            Err(error) => format!("access log: {error}"),
        },
        line.as_ref().is_ok_and(|line| line["response_code"] == 200),
    );
    let collector = format!(
        "http://{}:4317/spans",
        mesh.address(pod("observe/collector"))?
    );
    let span = mesh.eventually("the span", || {
        let lines = mesh.sample_lines(
            pod("legacy/client"),
            &["call", &collector, "--json", "--timeout", "10000"],
        )?;
        let spans = lines.first().context("no answer")?["answer"].clone();
        let mut spans = spans.as_array().cloned().unwrap_or_default().into_iter();
        let span = spans.find(|span| span["trace"] == trace);
        span.context("no span of the trace has come")
    });
    tour.check(
        match &span {
            Ok(span) => format!(
                "trace {trace}: span {} of {} -> {}",
                span["name"],
                span["attributes"]["source.principal"],
                span["attributes"]["destination.principal"]
            ),
            Err(error) => format!("trace: {error}"),
        },
        span.as_ref().is_ok_and(|span| {
            let text = span["attributes"].to_string();
            text.contains(CLIENT) && text.contains(REVIEWS)
        }),
    );
    Ok(())
}

fn die_and_return(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("14. kill -9 of the waypoint");
    let client = pod("shop/client");
    mesh.kill_component(WAYPOINT)?;
    let answer = mesh.eventually("the failure", || {
        let begin = std::time::Instant::now();
        let counted = mesh.requests(client, URL, &["-n", "20"])?;
        ensure!(counted.status("503") == 20, "{counted:?}");
        ensure!(begin.elapsed() < 20 * FAILS_WITHIN, "{:?}", begin.elapsed());
        Ok(counted)
    });
    tour.check(
        match &answer {
            Ok(counted) => format!(
                "20 requests, none past it: {} are answered 503",
                counted.status("503")
            ),
            Err(error) => format!("requests: {error}"),
        },
        answer.is_ok(),
    );
    let line = mesh.access_line(&mesh.node_of(client)?, |line| {
        line.get("direction") == "outbound"
            && line.get("dst.service") == HOST
            && !line.get("error").is_empty()
    });
    tour.check(
        format!(
            "the client's node says why: {}",
            line.as_ref().map_or("-", |line| line.get("error"))
        ),
        line.is_ok(),
    );
    mesh.start_component(WAYPOINT)?;
    let back = mesh.eventually("answers", || {
        let counted = mesh.requests(client, URL, &["-n", "20"])?;
        ensure!(counted.status("200") == 20, "{counted:?}");
        Ok(())
    });
    tour.check("started again: requests are answered", back.is_ok());
    Ok(())
}

fn remove(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("15. The waypoint is removed: L4 again");
    mesh.adit(&[
        "local",
        "label",
        "namespace",
        "shop",
        "istio.io/use-waypoint-",
    ])?;
    mesh.wait_bound(HOST, false)?;
    mesh.adit(&["waypoint", "delete", "-n", "shop"])?;
    let own = mesh.address(pod("shop/client"))?;
    let direct = mesh.eventually("direct requests", || {
        let seen = mesh.seen(pod("shop/client"), URL, &[])?;
        let peer = seen["peer"].as_str().unwrap_or_default();
        ensure!(peer.starts_with(&format!("{own}:")), "{peer}");
        ensure!(seen["identity"].is_null(), "{}", seen["identity"]);
        Ok(())
    });
    tour.check("the client's requests are its own again", direct.is_ok());
    let gone = mesh.eventually("the waypoint's end", || {
        let status = mesh.status()?;
        let left = status
            .pods
            .iter()
            .filter(|pod| pod.name.starts_with("waypoint-"));
        ensure!(
            left.count() == 0 && status.component(WAYPOINT).is_none(),
            "still there"
        );
        Ok(())
    });
    tour.check("nothing is left of it", gone.is_ok());
    Ok(())
}
