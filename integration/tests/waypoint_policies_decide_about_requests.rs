//! AuthorizationPolicies with HTTP in them, at a real waypoint; and what `adit why`, `adit tap`
//! and `adit proxy-config` say about them.

use adit_integration::{TestMesh, pod, reviews_mesh, sample_waypoint};
use anyhow::{Context, ensure};

const URL: &str = "http://reviews.shop/";

#[test]
fn who_may_do_what_is_decided_for_each_request() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    assert_eq!(mesh.status_of(pod("shop/visitor"), URL, &[])?, 200);
    mesh.apply_accepted(sample_waypoint("readers.yaml"))?;
    mesh.eventually("the policy", || {
        let status = mesh.status_of(pod("shop/visitor"), URL, &[])?;
        ensure!(status == 403, "{status}");
        Ok(())
    })?;
    for (from, options, expected) in [
        ("shop/client", &[][..], 200),
        ("shop/client", &["--http2"][..], 200),
        ("shop/client", &["-X", "POST"][..], 403),
        ("shop/visitor", &[][..], 403),
        // Nobody becomes somebody else by a header.
        (
            "shop/visitor",
            &[
                "-H",
                "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/shop/sa/client",
            ][..],
            403,
        ),
    ] {
        assert_eq!(
            mesh.status_of(pod(from), URL, options)?,
            expected,
            "{from} {options:?}"
        );
    }
    // Over one connection every request is asked for itself.
    let argv = ["call", URL, "--count", "10", "--keepalive"];
    let lines = mesh.sample_lines(pod("shop/client"), &argv)?;
    assert!(lines.iter().all(|line| line["status"] == 200), "{lines:?}");
    // What is not reviews is not meant.
    assert_eq!(
        mesh.status_of(pod("shop/visitor"), "http://web.shop/", &[])?,
        200
    );

    let why = mesh.adit(&["why", "client.shop", "reviews.shop"])?;
    assert!(
        why.contains("allows: rule 0 of AuthorizationPolicy shop/reviews-readers"),
        "{why}"
    );
    let why = mesh.adit_output(&["why", "visitor.shop", "reviews.shop", "GET", "/x"])?;
    assert_eq!(why.status.code(), Some(1));
    assert!(
        why.stdout.contains("=> 403: no ALLOW policy matches"),
        "{}",
        why.stdout
    );
    let policies = mesh.adit(&["proxy-config", "policy"])?;
    assert!(policies.contains("reviews-readers"), "{policies}");
    mesh.delete_objects(sample_waypoint("readers.yaml"))?;
    mesh.eventually("the policy's end", || {
        let status = mesh.status_of(pod("shop/visitor"), URL, &[])?;
        ensure!(status == 200, "{status}");
        Ok(())
    })?;
    Ok(())
}

const DENY_PATHS: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-admin, namespace: shop }
spec:
  targetRefs: [{ kind: Gateway, group: gateway.networking.k8s.io, name: waypoint }]
  action: DENY
  rules:
    - to: [{ operation: { paths: [/admin*] } }]
";

#[test]
fn a_denied_path_is_denied_however_it_is_written() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    mesh.apply_accepted(DENY_PATHS)?;
    let at = |path: &str| format!("http://reviews.shop{path}");
    mesh.eventually("the policy", || {
        let status = mesh.status_of(pod("shop/client"), &at("/admin"), &[])?;
        ensure!(status == 403, "{status}");
        Ok(())
    })?;
    for path in [
        "/admin/x",
        "/./admin",
        "/a/../admin",
        "/%61dmin",
        "/admin%2fx",
    ] {
        let status = mesh.status_of(pod("shop/client"), &at(path), &[])?;
        assert!(matches!(status, 400 | 403), "{path}: {status}");
    }
    assert_eq!(
        mesh.status_of(pod("shop/client"), &at("/public?x=/admin"), &[])?,
        200
    );
    // The whole waypoint is meant.
    assert_eq!(
        mesh.status_of(pod("shop/client"), "http://web.shop/admin", &[])?,
        403
    );
    Ok(())
}

/// Runs `adit` while the test goes on; what it prints.
fn watch(
    mesh: &TestMesh,
    args: &[&str],
) -> anyhow::Result<std::thread::JoinHandle<anyhow::Result<String>>> {
    let status = mesh.status()?;
    let mut dirs = std::env::split_paths(&status.search_path);
    let adit = dirs.find_map(|dir| Some(dir.join("adit")).filter(|path| path.is_file()));
    let mut command = std::process::Command::new(adit.context("no program adit")?);
    command.args(args).args(["--mesh", &status.name]);
    Ok(std::thread::spawn(move || {
        let output = command.output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok(String::from_utf8_lossy(&said).into_owned())
    }))
}

#[test]
fn what_passes_can_be_watched_and_looked_up() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    mesh.apply_accepted(sample_waypoint("route.yaml"))?;
    let watcher = watch(
        &mesh,
        &[
            "tap",
            "--path",
            "/watched",
            "--limit",
            "3",
            "--duration",
            "30s",
        ],
    )?;
    let mut sent = 0;
    while !watcher.is_finished() && sent < 600 {
        let url = "http://reviews.shop/watched?by=test";
        mesh.requests(pod("shop/client"), url, &["-n", "1"])?;
        mesh.requests(pod("shop/client"), URL, &["-n", "1"])?;
        sent += 1;
    }
    let seen = watcher
        .join()
        .map_err(|_| anyhow::anyhow!("the watcher panicked"))??;
    assert_eq!(seen.lines().count(), 3, "{seen}");
    for line in seen.lines() {
        assert!(line.contains("client.shop -> reviews-v"), "{line}");
        assert!(
            line.contains("GET reviews.shop/watched?by=test 200"),
            "{line}"
        );
    }
    let routes = mesh.adit(&["proxy-config", "route", "waypoint.shop"])?;
    assert!(
        routes.contains("/* -> reviews-v1:80 (90), reviews-v2:80 (10)"),
        "{routes}"
    );
    let secrets = mesh.adit(&["proxy-config", "secret"])?;
    assert!(
        secrets.contains("spiffe://cluster.local/ns/shop/sa/waypoint"),
        "{secrets}"
    );
    let proxies = mesh.adit(&["proxy-status"])?;
    for proxy in [
        "ztunnel-node1.istio-system",
        "ztunnel-node2.istio-system",
        "waypoint-",
    ] {
        assert!(proxies.contains(proxy), "{proxies}");
    }
    Ok(())
}

#[test]
fn a_request_is_followed_through_its_stages_and_what_is_open_is_listed() -> anyhow::Result<()> {
    let mesh = reviews_mesh(&[])?;
    mesh.apply_accepted(sample_waypoint("route.yaml"))?;
    let follow = |flags: &[&str]| -> anyhow::Result<String> {
        let why = ["why", "client.shop", "reviews.shop", "GET", "/followed"];
        let watcher = watch(&mesh, &[&why, flags].concat())?;
        let url = "http://reviews.shop/followed/1?by=test";
        let mut sent = 0;
        while !watcher.is_finished() && sent < 600 {
            // Neither another's request nor one for something else is meant.
            mesh.requests(pod("shop/visitor"), url, &["-n", "1"])?;
            mesh.requests(pod("shop/client"), "http://web.shop/followed", &["-n", "1"])?;
            mesh.requests(pod("shop/client"), url, &["-n", "1"])?;
            sent += 1;
        }
        let told = watcher.join();
        told.map_err(|_| anyhow::anyhow!("the watcher panicked"))?
    };
    let told = follow(&["--live"])?;
    let stages = [
        "received:",
        "destination:",
        "route:",
        "endpoint:",
        "attempt:",
        "end:",
    ];
    let mut rest = told.as_str();
    for stage in stages {
        let found = rest.split_once(&format!(" ms {stage}"));
        (_, rest) = found.with_context(|| format!("no {stage} in {told}"))?;
    }
    for part in [
        "1. waypoint waypoint",
        "path=/followed/1",
        "source=spiffe://cluster.local/ns/shop/sa/client",
        "service=shop/reviews.shop.svc.cluster.local",
        "=> 200 from the destination",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let told = follow(&["--live", "--wait", "1s", "-H", "x-nobody: sends this"])?;
    assert!(
        told.contains("no request has matched in that time"),
        "{told}"
    );

    let listed = mesh.eventually("connections", || {
        let listed = mesh.adit(&["proxy-config", "connections", "waypoint.shop"])?;
        ensure!(listed.contains("Tunnel in"), "{listed}");
        ensure!(listed.contains("Outbound"), "{listed}");
        Ok(listed)
    })?;
    assert!(
        listed.contains("spiffe://cluster.local/ns/shop/sa/client"),
        "{listed}"
    );
    assert!(listed.contains("over HBONE"), "{listed}");
    let inbound = ["pc", "conn", "--direction", "inbound"];
    assert!(!mesh.adit(&inbound)?.contains("Outbound"));
    Ok(())
}
