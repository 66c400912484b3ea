//! What a user sees with `adit`: the mesh's state, and why a request goes where it goes.

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::e2e::case::{Case, cases};
use crate::e2e::{App, SOON, Test, eventually};

pub(super) const TESTS: &[Case] = cases![Shared: [
    versions_and_proxies_of_the_cluster_are_shown,
    check_finds_every_part_of_the_mesh_ready,
    ztunnel_config_shows_what_concerns_a_pod,
    why_names_the_hops_of_a_request,
    waypoints_explain_their_decisions_and_show_requests,
    analyze_names_mistakes_in_the_cluster,
    what_is_missing_is_said_in_one_sentence,
]];

/// Standard error of a command that has to fail, which is one line.
async fn failure(t: &Test, arguments: &[&str]) -> anyhow::Result<String> {
    let output = t.environment().adit(arguments)?.output().await?;
    let told = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(!output.status.success(), "adit {arguments:?} succeeded");
    ensure!(told.lines().count() == 1, "adit {arguments:?}: {told}");
    Ok(told)
}

async fn versions_and_proxies_of_the_cluster_are_shown(t: Test) -> anyhow::Result<()> {
    let version: Value = serde_json::from_str(&t.adit(&["version", "-o", "json"]).await?)?;
    let count = |key: &str| version[key].as_array().map_or(0, Vec::len);
    ensure!(count("meshVersion") >= 1, "{version}");
    let nodes = t.cluster().nodes();
    ensure!(count("dataPlaneVersion") >= nodes.len(), "{version}");
    let proxies = t.adit(&["proxy-status"]).await?;
    for node in nodes {
        let ztunnel = t.cluster().ztunnel(node).await?;
        ensure!(
            proxies.contains(&format!("{ztunnel}.istio-system")),
            "{ztunnel} is not in\n{proxies}"
        );
    }
    Ok(())
}

async fn check_finds_every_part_of_the_mesh_ready(t: Test) -> anyhow::Result<()> {
    // Waypoints of other tests come and go; the exit status speaks of them too.
    let output = t.environment().adit(&["check", "-o", "json"])?.output();
    let report: Value = serde_json::from_slice(&output.await?.stdout)?;
    for part in [
        "Kubernetes",
        "nodes",
        "Gateway API",
        "control plane",
        "ztunnel",
        "CNI agent",
    ] {
        let checks = report["checks"].as_array().into_iter().flatten();
        let check = checks.into_iter().find(|check| check["check"] == part);
        let check = check.with_context(|| format!("{part} is not in {report}"))?;
        ensure!(check["status"] == "ok", "{check}");
    }
    Ok(())
}

async fn ztunnel_config_shows_what_concerns_a_pod(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    let web = App::server("web").on(1).account("web");
    t.run(&[web, App::server("client").on(0).account("client")])
        .await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    let pod = format!("web.{}", t.namespace());
    let workloads = t.adit(&["ztunnel-config", "workloads", &pod]).await?;
    ensure!(
        workloads.lines().count() == 2 && workloads.contains("HBONE"),
        "{workloads}"
    );
    let services = t
        .adit(&["zc", "services", "--service-namespace", t.namespace()])
        .await?;
    let line = services.lines().find(|line| line.contains(" web "));
    ensure!(line.is_some_and(|line| line.ends_with("1/1")), "{services}");
    let certificates = t.adit(&["zc", "certificates", &pod]).await?;
    let identity = format!("/ns/{}/sa/web", t.namespace());
    ensure!(certificates.contains(&identity), "{certificates}");
    ensure!(certificates.contains("Available"), "{certificates}");
    // A caller that goes on has connections open.
    let interval = std::time::Duration::from_millis(20);
    let load = t.caller("load", 0, "http://web/", interval).await?;
    eventually("the connection is shown", SOON, async || {
        let connections = t.adit(&["zc", "connections", &pod]).await?;
        ensure!(connections.contains("Inbound"), "{connections}");
        Ok(())
    })
    .await?;
    load.without_failure().await?;
    let log = t.adit(&["zc", "log", "--node", t.node(0)]).await?;
    ensure!(log.contains("current log level"), "{log}");
    Ok(())
}

async fn why_names_the_hops_of_a_request(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    let client = format!("client.{}", t.namespace());
    let told = t.adit(&["why", &client, "web"]).await?;
    for part in [
        "it is in the mesh",
        "no waypoint: ztunnel picks the endpoint",
        "by HBONE to its ztunnel",
    ] {
        ensure!(told.contains(part), "{part} is not in\n{told}");
    }
    let told = failure(&t, &["why", &client, "nobody"]).await?;
    ensure!(
        told.contains("neither a service nor a pod nobody"),
        "{told}"
    );
    Ok(())
}

async fn waypoints_explain_their_decisions_and_show_requests(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    let namespace = t.namespace();
    let apply = [
        "waypoint",
        "apply",
        "--enroll-namespace",
        "--wait",
        "-n",
        namespace,
    ];
    t.adit(&apply).await?;
    t.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: readers}\n\
         spec:\n  targetRefs: [{kind: Service, group: \"\", name: web}]\n  action: ALLOW\n  rules:\n  \
         - to: [{operation: {methods: [GET]}}]\n",
    )
    .await?;
    let client = format!("client.{namespace}");
    let waypoint = format!("waypoint.{namespace}");
    eventually("the waypoint explains", SOON, async || {
        let told = t.adit(&["why", &client, "web", "GET", "/"]).await?;
        let rule = format!("rule 0 of AuthorizationPolicy {namespace}/readers");
        ensure!(told.contains(&format!("waypoint {waypoint}")), "{told}");
        ensure!(told.contains(&rule), "{told}");
        Ok(())
    })
    .await?;
    let denied = ["why", &client, "web", "POST", "/"];
    let output = t.environment().adit(&denied)?.output().await?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.code() == Some(1) && told.contains("=> 403"),
        "{told}"
    );

    let clusters = t.adit(&["proxy-config", "cluster", &waypoint]).await?;
    ensure!(
        clusters.contains(&format!("web.{namespace}.svc.")),
        "{clusters}"
    );
    let policies = t.adit(&["pc", "policy", &waypoint]).await?;
    ensure!(policies.contains("readers"), "{policies}");

    let interval = std::time::Duration::from_millis(50);
    let load = t.caller("load", 0, "http://web/", interval).await?;
    let tap = [
        "tap",
        &waypoint,
        "--limit",
        "3",
        "--duration",
        "60s",
        "-o",
        "json",
    ];
    let seen = t.adit(&tap).await?;
    load.stop().await?;
    let events: Result<Vec<Value>, _> = seen.lines().map(serde_json::from_str).collect();
    let events = events?;
    ensure!(events.len() == 3, "{seen}");
    ensure!(
        events
            .iter()
            .all(|event| event["status"] == 200 && event["source"]["workload"] == "load"),
        "{seen}"
    );
    Ok(())
}

async fn analyze_names_mistakes_in_the_cluster(t: Test) -> anyhow::Result<()> {
    let clean = t.adit(&["analyze", "-n", t.namespace()]).await?;
    ensure!(clean.starts_with("No validation issues"), "{clean}");
    t.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: lost}\n\
         spec:\n  targetRefs: [{kind: Service, group: \"\", name: nobody}]\n  action: DENY\n  rules: [{}]\n",
    )
    .await?;
    // Whether it is an error or a warning is the analyzer's to say.
    let told = match t.adit(&["analyze", "-n", t.namespace()]).await {
        Ok(told) => told,
        Err(error) => error.to_string(),
    };
    ensure!(
        told.contains(&format!("AuthorizationPolicy {}/lost", t.namespace())),
        "{told}"
    );
    Ok(())
}

async fn what_is_missing_is_said_in_one_sentence(t: Test) -> anyhow::Result<()> {
    let namespace = t.namespace();
    for (arguments, expected) in [
        (
            &["zc", "workloads", "nobody", "-n", namespace][..],
            format!("has no pod {namespace}/nobody"),
        ),
        (
            &["zc", "workloads", "-i", namespace],
            format!("has no ztunnel in namespace {namespace}: `adit install`"),
        ),
        (
            &["zc", "workloads", "--context", "nowhere"],
            "has no context \"nowhere\"; it has ".into(),
        ),
        (
            &[
                "waypoint",
                "list",
                "-n",
                namespace,
                "--as",
                "system:serviceaccount:default:nobody",
            ],
            format!("cannot list gateways.gateway.networking.k8s.io in namespace {namespace}"),
        ),
        (
            &["waypoint", "status", "nobody", "-n", namespace],
            "\"nobody\" not found".into(),
        ),
    ] {
        let told = failure(&t, arguments).await?;
        ensure!(told.contains(&expected), "adit {arguments:?}: {told}");
    }
    Ok(())
}
