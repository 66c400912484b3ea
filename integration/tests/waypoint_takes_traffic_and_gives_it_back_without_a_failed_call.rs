//! A namespace gets a waypoint, and loses it again, while its clients go on calling: no call
//! fails, no pod is restarted, and what was applied is gone when it is deleted.

use adit_integration::mesh::{DEADLINE, MeshBuilder, SAMPLE_MESH};
use adit_integration::{TestMesh, pod, sample_waypoint};
use anyhow::{Context, ensure};

const URL: &str = "http://reviews.shop/";
const HOST: &str = "reviews.shop.svc.cluster.local";

fn mesh() -> anyhow::Result<TestMesh> {
    let reviews = ("reviews.yaml", sample_waypoint("reviews.yaml"));
    MeshBuilder::default()
        .files(SAMPLE_MESH)
        .files(&[reviews])
        .up()
}

fn peer(mesh: &TestMesh) -> anyhow::Result<String> {
    let seen = mesh.seen(pod("shop/client"), URL, &[])?;
    let peer = seen["peer"].as_str().context("no peer")?;
    let (ip, _) = peer.rsplit_once(':').context("no port")?;
    Ok(ip.to_owned())
}

#[test]
fn a_namespace_joins_a_waypoint_and_leaves_it() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let own = mesh.address(pod("shop/client"))?;
    mesh.wait_bound(HOST, false)?;
    assert_eq!(peer(&mesh)?, own);
    let pods = |mesh: &TestMesh| -> anyhow::Result<Vec<_>> {
        let all = mesh.status()?.pods.into_iter();
        let all = all.filter(|pod| !pod.name.starts_with("waypoint-"));
        Ok(all
            .map(|pod| (pod.uid, pod.containers[0].process))
            .collect())
    };
    let before = pods(&mesh)?;
    let caller = mesh.caller(pod("shop/client"), URL, 2)?;
    caller.wait_more(50)?;

    let told = mesh.enrol_waypoint("shop")?;
    for line in [
        "✅ waypoint shop/waypoint applied",
        "✅ waypoint shop/waypoint is ready!",
        "✅ namespace shop labeled with \"istio.io/use-waypoint: waypoint\"",
    ] {
        assert!(told.contains(line), "{told}");
    }
    mesh.wait_bound(HOST, true)?;
    let seen = mesh.seen(pod("shop/client"), URL, &[])?;
    assert_eq!(seen["identity"], "spiffe://cluster.local/ns/shop/sa/client");
    assert_ne!(peer(&mesh)?, own);
    caller.wait_more(200)?;

    mesh.adit(&[
        "local",
        "label",
        "namespace",
        "shop",
        "istio.io/use-waypoint-",
    ])?;
    mesh.wait_bound(HOST, false)?;
    caller.wait_more(50)?;
    let told = mesh.adit(&["waypoint", "delete", "-n", "shop"])?;
    assert_eq!(told, "waypoint shop/waypoint deleted\n");
    mesh.eventually("direct calls", || {
        ensure!(peer(&mesh)? == own, "still by the waypoint");
        Ok(())
    })?;
    let calls = caller.stop();
    let failed: Vec<_> = calls.iter().filter(|call| call.ok().is_none()).collect();
    assert!(
        failed.is_empty(),
        "{} of {}: {failed:?}",
        failed.len(),
        calls.len()
    );
    mesh.wait_for("the waypoint's end", DEADLINE, |status| {
        let left = status.pods.iter().any(|p| p.name.starts_with("waypoint-"));
        let left = left || status.component("waypoint.shop").is_some();
        (!left && status.applied.is_empty()).then_some(())
    })?;
    assert_eq!(pods(&mesh)?, before);
    Ok(())
}

#[test]
fn a_waypoint_that_is_killed_fails_closed_and_one_that_is_restarted_loses_nothing()
-> anyhow::Result<()> {
    let mesh = mesh()?;
    let client = pod("shop/client");
    mesh.enrol_waypoint("shop")?;
    mesh.wait_bound(HOST, true)?;
    let counted = mesh.requests(client, URL, &["-n", "50"])?;
    assert_eq!(counted.status("200"), 50, "{counted:?}");

    mesh.kill_component("waypoint.shop")?;
    // None reaches a server, whether the node has heard of it already or not.
    let counted = mesh.requests(client, URL, &["-n", "50"])?;
    assert_eq!(counted.status("503"), 50, "{counted:?}");
    let answer = mesh.ask(client, URL, &[])?;
    answer.has_status(503)?;
    let reason = answer.header("x-adit-reason");
    let told = ["waypoint_unreachable", "no_healthy_waypoint"];
    assert!(
        told.map(|t| Some(t.to_owned())).contains(&reason),
        "{answer:?}"
    );
    let counted = mesh.requests(client, "http://reviews.shop:9000", &["--grpc", "-n", "10"])?;
    assert_eq!(counted.status("14"), 10, "{counted:?}");
    let node = mesh.node_of(client)?;
    let failures = mesh.metrics(&node)?;
    let of = |told| failures.sum("adit_waypoint_failures_total", &[("told", told)]);
    assert!(of("http1") >= 51.0, "{}", of("http1"));
    assert!(of("http2") >= 1.0, "{}", of("http2"));
    let status = |mesh: &TestMesh| -> anyhow::Result<String> {
        let dump = mesh.config_dump(&node)?;
        let all = dump["waypoints"].as_array().context("no waypoints")?;
        let shown = all.iter().map(|of| of["status"].as_str().unwrap_or("?"));
        Ok(shown.collect::<Vec<_>>().join(" "))
    };
    assert_eq!(status(&mesh)?, "Unhealthy");
    // What has no waypoint is not touched.
    let direct = format!("http://{}:8080/", mesh.address(pod("shop/web-b"))?);
    let call = mesh.call(client, &direct)?;
    assert_eq!(call.ok(), Some("web-b"), "{call:?}");

    mesh.start_component("waypoint.shop")?;
    mesh.eventually("answers", || {
        let counted = mesh.requests(client, URL, &["-n", "20"])?;
        ensure!(counted.status("200") == 20, "{counted:?}");
        ensure!(status(&mesh)? == "Healthy", "{}", status(&mesh)?);
        Ok(())
    })?;
    Ok(())
}

#[test]
fn a_gateway_in_the_manifests_is_run_and_cannot_be_deleted_from_outside() -> anyhow::Result<()> {
    let mesh = mesh()?;
    mesh.apply(
        "waypoint.yaml",
        include_str!("../../deploy/samples/waypoint/waypoint.yaml"),
    )?;
    mesh.wait_waypoint("waypoint.shop")?;
    let status = mesh.adit(&["waypoint", "status", "-n", "shop"])?;
    assert!(status.contains("Programmed"), "{status}");
    let listed = mesh.adit(&["waypoint", "list", "-A"])?;
    assert_eq!(
        listed,
        "NAMESPACE   NAME       REVISION   TRAFFIC TYPE   PROGRAMMED\n\
         shop        waypoint   default    service        True\n"
    );
    let refused = mesh.adit_output(&["waypoint", "delete", "-n", "shop"])?;
    assert_eq!(refused.status.code(), Some(1));
    let stands = "Gateway shop/waypoint stands in";
    assert!(refused.stderr.contains(stands), "{}", refused.stderr);
    mesh.delete("waypoint.yaml")?;
    mesh.wait_for("the waypoint's end", DEADLINE, |status| {
        status.component("waypoint.shop").is_none().then_some(())
    })?;
    Ok(())
}

/// What `adit waypoint apply --wait` has said is ready is: the first call after it is answered,
/// by way of the waypoint.
#[test]
fn the_first_call_after_apply_is_answered() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let own = mesh.address(pod("shop/client"))?;
    for round in 0..20 {
        let limit = format!("{}s", DEADLINE.as_secs());
        mesh.adit(&[
            "waypoint",
            "apply",
            "-n",
            "shop",
            "--enroll-namespace",
            "--wait",
            "--waypoint-timeout",
            &limit,
        ])?;
        let by = peer(&mesh).with_context(|| format!("round {round}"))?;
        assert_ne!(by, own, "round {round}: past the waypoint");
        mesh.adit(&[
            "local",
            "label",
            "namespace",
            "shop",
            "istio.io/use-waypoint-",
        ])?;
        mesh.wait_bound(HOST, false)?;
        mesh.adit(&["waypoint", "delete", "-n", "shop"])?;
        mesh.wait_for("the waypoint's end", DEADLINE, |status| {
            status.component("waypoint.shop").is_none().then_some(())
        })?;
    }
    Ok(())
}
