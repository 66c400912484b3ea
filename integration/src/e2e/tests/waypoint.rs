//! Waypoints: made by the command line, run by the control plane.

use anyhow::ensure;
use serde_json::Value;

use crate::e2e::case::{Case, cases};
use crate::e2e::{App, SOON, Test, eventually};

pub(super) const TESTS: &[Case] = cases![Shared: [
    waypoint_apply_puts_a_waypoint_into_the_path,
    a_waypoint_is_replaced_without_a_failed_call,
]];

/// Waits until answers of `web` came through a waypoint: only a waypoint vouches for the
/// caller in `x-forwarded-client-cert`, or sets `x-request-id`.
async fn through_waypoint(t: &Test, client: &str, url: &str) -> anyhow::Result<Value> {
    eventually("calls pass the waypoint", SOON, async || {
        let lines: Vec<Value> = t
            .sample(client, &["call", url, "--json", "--timeout", "3000"])
            .await?;
        let answer = &lines[0];
        ensure!(answer["status"] == 200, "{answer}");
        ensure!(
            !answer["answer"]["headers"]["x-request-id"].is_null(),
            "no x-request-id: {answer}"
        );
        Ok(answer.clone())
    })
    .await
}

async fn waypoint_apply_puts_a_waypoint_into_the_path(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[
        App::server("web-v1")
            .on(0)
            .label("tier", "web")
            .env("VERSION", "v1"),
        App::server("web-v2")
            .on(1)
            .label("tier", "web")
            .env("VERSION", "v2"),
        App::server("client").on(0).account("client"),
    ])
    .await?;
    t.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {tier: web}\n  \
         ports: [{name: http, port: 80, targetPort: 8080}]\n",
    )
    .await?;
    t.reaches("client", "http://web/").await?;
    let pods = t.incarnations().await?;
    t.waypoint().await?;
    through_waypoint(&t, "client", "http://web/").await?;

    t.apply(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  \
         parentRefs: [{group: \"\", kind: Service, name: web}]\n  rules:\n  - matches: \
         [{headers: [{name: x-version, value: v2}]}]\n    backendRefs: [{name: web-v2, port: 80}]\n  \
         - backendRefs: [{name: web-v1, port: 80}]\n",
    )
    .await?;
    eventually("the route decides", SOON, async || {
        for (header, version) in [("x-version: v2", "v2"), ("x-version: v1", "v1")] {
            let lines: Vec<Value> = t
                .sample(
                    "client",
                    &["call", "http://web/", "--count", "4", "-H", header],
                )
                .await?;
            for line in lines {
                ensure!(line["version"] == version, "{header}: {line}");
            }
        }
        Ok(())
    })
    .await?;

    t.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: readers}\n\
         spec:\n  targetRefs: [{kind: Service, group: \"\", name: web}]\n  action: ALLOW\n  rules:\n  \
         - to: [{operation: {methods: [GET]}}]\n",
    )
    .await?;
    eventually("POST is refused, GET is not", SOON, async || {
        for (method, status) in [("POST", 403), ("GET", 200)] {
            let lines: Vec<Value> = t
                .sample("client", &["call", "http://web/", "-X", method])
                .await?;
            ensure!(lines[0]["status"] == status, "{method}: {}", lines[0]);
        }
        Ok(())
    })
    .await?;

    let list = t.adit(&["waypoint", "list", "-n", t.namespace()]).await?;
    ensure!(list.contains("waypoint"), "{list}");
    t.adit(&["waypoint", "delete", "-n", t.namespace(), "waypoint"])
        .await?;
    eventually("the waypoint is gone", SOON, async || {
        let left = t
            .cluster()
            .get(t.namespace(), "apps/v1", "Deployment", "waypoint")
            .await?;
        ensure!(left.is_none(), "its Deployment is still there");
        Ok(())
    })
    .await?;
    let now = t.incarnations().await?;
    ensure!(
        pods.iter().all(|pod| now.contains(pod)),
        "{pods:?} became {now:?}"
    );
    Ok(())
}

async fn a_waypoint_is_replaced_without_a_failed_call(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    t.waypoint().await?;
    through_waypoint(&t, "client", "http://web/").await?;
    let load = t
        .caller(
            "load",
            0,
            "http://web/",
            std::time::Duration::from_millis(20),
        )
        .await?;
    let selector = "gateway.networking.k8s.io/gateway-name=waypoint";
    let before = t.ready(selector, 1).await?;
    // As `kubectl rollout restart`.
    t.apply(&format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: waypoint, annotations: \
         {{e2e: restart}}}}\nspec: {{template: {{metadata: {{annotations: \
         {{kubectl.kubernetes.io/restartedAt: {:?}}}}}}}}}\n",
        "2026-01-01T00:00:00Z"
    ))
    .await?;
    eventually("the waypoint's pod is another", SOON, async || {
        let pods = t.cluster().pods(t.namespace(), selector).await?;
        let same = pods
            .iter()
            .any(|pod| pod.metadata.uid == before[0].metadata.uid);
        ensure!(!same, "it is still there");
        Ok(())
    })
    .await?;
    t.ready(selector, 1).await?;
    load.more(50).await?;
    load.without_failure().await?;
    Ok(())
}
