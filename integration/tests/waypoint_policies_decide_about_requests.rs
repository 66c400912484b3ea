//! AuthorizationPolicies with HTTP in them, at a real waypoint; and what `adit why`, `adit tap`
//! and `adit proxy-config` say about them.

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::{TestMesh, pod, sample_waypoint};
use anyhow::{Context, ensure};

const URL: &str = "http://reviews.shop/";

fn mesh() -> anyhow::Result<TestMesh> {
    let reviews = ("reviews.yaml", sample_waypoint("reviews.yaml"));
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        .files(&[reviews])
        .up()?;
    mesh.enrol_waypoint("shop")?;
    mesh.wait_bound("reviews.shop.svc.cluster.local", true)?;
    Ok(mesh)
}

fn status(mesh: &TestMesh, from: &str, url: &str, options: &[&str]) -> anyhow::Result<u64> {
    let argv = [&["call", url], options].concat();
    let lines = mesh.sample_lines(pod(from), &argv)?;
    let line = lines.first().context("the client said nothing")?;
    line["status"]
        .as_u64()
        .with_context(|| format!("no answer: {line}"))
}

#[test]
fn who_may_do_what_is_decided_for_each_request() -> anyhow::Result<()> {
    let mesh = mesh()?;
    assert_eq!(status(&mesh, "shop/visitor", URL, &[])?, 200);
    mesh.apply_accepted(sample_waypoint("readers.yaml"))?;
    mesh.eventually("the policy", || {
        let status = status(&mesh, "shop/visitor", URL, &[])?;
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
            status(&mesh, from, URL, options)?,
            expected,
            "{from} {options:?}"
        );
    }
    // Over one connection every request is asked for itself.
    let argv = ["call", URL, "--count", "10", "--keepalive"];
    let lines = mesh.sample_lines(pod("shop/client"), &argv)?;
    assert!(lines.iter().all(|line| line["status"] == 200), "{lines:?}");
    // What is not reviews is not meant.
    assert_eq!(status(&mesh, "shop/visitor", "http://web.shop/", &[])?, 200);

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
        let status = status(&mesh, "shop/visitor", URL, &[])?;
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
    let mesh = mesh()?;
    mesh.apply_accepted(DENY_PATHS)?;
    let at = |path: &str| format!("http://reviews.shop{path}");
    mesh.eventually("the policy", || {
        let status = status(&mesh, "shop/client", &at("/admin"), &[])?;
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
        let status = status(&mesh, "shop/client", &at(path), &[])?;
        assert!(matches!(status, 400 | 403), "{path}: {status}");
    }
    assert_eq!(
        status(&mesh, "shop/client", &at("/public?x=/admin"), &[])?,
        200
    );
    // The whole waypoint is meant.
    assert_eq!(
        status(&mesh, "shop/client", "http://web.shop/admin", &[])?,
        403
    );
    Ok(())
}

#[test]
fn what_passes_can_be_watched_and_looked_up() -> anyhow::Result<()> {
    let mesh = mesh()?;
    mesh.apply_accepted(sample_waypoint("route.yaml"))?;
    let status = mesh.status()?;
    let watcher = std::thread::spawn({
        let name = status.name.clone();
        move || {
            let running = adit_local::Running::open(&name)?;
            let status = running.status()?;
            let mut dirs = std::env::split_paths(&status.search_path);
            let adit = dirs.find_map(|dir| Some(dir.join("adit")).filter(|p| p.is_file()));
            let output = std::process::Command::new(adit.context("no program adit")?)
                .args(["tap", "--mesh", &name, "--path", "/watched", "--limit", "3"])
                .args(["--duration", "30s"])
                .output()?;
            anyhow::Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        }
    });
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
