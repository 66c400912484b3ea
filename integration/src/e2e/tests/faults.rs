//! Parts of the mesh and of the cluster fail, restart and are replaced.

use std::time::Duration;

use anyhow::{Context, ensure};

use crate::e2e::case::{Case, cases};
use crate::e2e::cluster::SYSTEM;
use crate::e2e::{App, Test};

pub(super) const TESTS: &[Case] = cases![Alone: [
    ztunnel_is_rolled_out_without_a_failed_call,
    a_killed_ztunnel_comes_back_and_lets_no_plaintext_through,
    servers_are_rolled_out_without_a_failed_call,
    kubelet_and_containerd_restart_unnoticed,
    the_mesh_works_on_while_the_api_server_is_away,
    the_mesh_works_on_while_the_control_plane_is_away,
]];

/// Between two calls of a client under load.
const PACE: Duration = Duration::from_millis(20);

/// A server on the second node that takes mutual TLS only, a client on the first.
pub(super) async fn strict_pair(t: &Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )
    .await?;
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    Ok(())
}

/// Istio's TestZtunnelRestart asks for nine calls of ten; here it is all.
async fn ztunnel_is_rolled_out_without_a_failed_call(t: Test) -> anyhow::Result<()> {
    strict_pair(&t).await?;
    let near = t.caller("near", 1, "http://web/", PACE).await?;
    let far = t.caller("far", 0, "http://web/", PACE).await?;
    let pods = t.incarnations().await?;
    t.cluster()
        .rollout_restart(SYSTEM, "DaemonSet", "ztunnel")
        .await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    near.more(50).await?;
    far.more(50).await?;
    ensure!(t.incarnations().await? == pods, "a pod was restarted");
    near.without_failure().await?;
    far.without_failure().await?;
    Ok(())
}

async fn a_killed_ztunnel_comes_back_and_lets_no_plaintext_through(t: Test) -> anyhow::Result<()> {
    strict_pair(&t).await?;
    let outside = t.beside("outside").await?;
    let url = format!("http://web.{}/", t.namespace());
    let intruder = outside.caller_that_fails("intruder", 0, &url, PACE).await?;
    let load = t.caller("load", 0, "http://web/", PACE).await?;
    for node in [0, 1] {
        kill(&t, t.node(node), "ztunnel").await?;
        // From the ashes: whatever is not answered now may be so for a while only.
        t.reaches("client", "http://web/").await?;
        t.is_mtls("client", "web", t.node(1)).await?;
        let calls = load.more(20).await?;
        let last = calls.last().context("no call")?;
        ensure!(last.ok().is_some(), "{last:?}");
    }
    let calls = load.stop().await?;
    let failed = calls.iter().filter(|call| call.ok().is_none()).count();
    println!(
        "ztunnel killed twice: {failed} of {} calls failed",
        calls.len()
    );
    let through = intruder.stop().await?;
    let through: Vec<_> = through.iter().filter(|call| call.ok().is_some()).collect();
    ensure!(
        through.is_empty(),
        "plaintext came through: {:?}",
        through[0]
    );
    Ok(())
}

async fn servers_are_rolled_out_without_a_failed_call(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("web").replicas(2), App::server("client").on(0)])
        .await?;
    t.reaches("client", "http://web/").await?;
    let load = t.caller("load", 0, "http://web/", PACE).await?;
    t.cluster()
        .rollout_restart(t.namespace(), "Deployment", "web")
        .await?;
    load.more(50).await?;
    load.without_failure().await?;
    Ok(())
}

/// A kubelet that starts may call its pods not ready for a moment, and a Service whose only
/// pod is not ready refuses, with a mesh and without: there are two, and one node at a time.
async fn kubelet_and_containerd_restart_unnoticed(t: Test) -> anyhow::Result<()> {
    t.needs_nodes(2)?;
    t.ambient(true).await?;
    t.run(&[
        App::server("web-a").on(0).label("tier", "web"),
        App::server("web-b").on(1).label("tier", "web"),
        App::server("client").on(0),
    ])
    .await?;
    t.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {tier: web}\n  \
         ports: [{name: http, port: 80, targetPort: 8080}]\n---\n\
         apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )
    .await?;
    t.is_mtls("client", "web-a", t.node(0)).await?;
    t.is_mtls("client", "web-b", t.node(1)).await?;
    let load = t.caller("load", 0, "http://web/", PACE).await?;
    let pods = t.incarnations().await?;
    for component in ["kubelet", "containerd"] {
        for node in [0, 1] {
            kill(&t, t.node(node), component).await?;
            // What starts now is captured as ever; and when it is ready, all that the kubelet
            // has to say of the others is said.
            let late = format!("late-{component}-{node}");
            t.run(&[App::server(&late).on(node)]).await?;
            t.is_mtls("client", &late, t.node(node)).await?;
            t.ready("tier=web", 2).await?;
            // Logs come from the kubelet, which reads containerd's.
            load.more(50).await?;
        }
    }
    let now = t.incarnations().await?;
    ensure!(
        pods.iter().all(|pod| now.contains(pod)),
        "{pods:?} became {now:?}"
    );
    load.without_failure().await?;
    Ok(())
}

async fn the_mesh_works_on_while_the_api_server_is_away(t: Test) -> anyhow::Result<()> {
    strict_pair(&t).await?;
    let load = t.caller("load", 0, "http://web/", PACE).await?;
    let node = t.node(0);
    let stopped = "/run/adit-node/apiserver.stopped";
    t.cluster()
        .on_node(node, &["touch", stopped])
        .await?
        .output()?;
    let killed = kill(&t, node, "apiserver").await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    t.cluster()
        .on_node(node, &["rm", stopped])
        .await?
        .output()?;
    killed?;
    load.more(50).await?;
    let before = load.calls().await?;
    let failed: Vec<_> = before.iter().filter(|call| call.ok().is_none()).collect();
    ensure!(
        failed.is_empty(),
        "{} of {} calls failed, for example: {:?}",
        failed.len(),
        before.len(),
        failed[0]
    );
    t.ambient(false).await?;
    t.is_plaintext("client", "web").await?;
    t.ambient(true).await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    let mut calls = load.stop().await?;
    let calls = calls.split_off(before.len().min(calls.len()));
    // STRICT holds, and one of both is withdrawn before the other: calls of that moment
    // may be refused.
    let failed = calls.iter().filter(|call| call.ok().is_none()).count();
    ensure!(
        failed * 4 < calls.len(),
        "{failed} of {} calls failed",
        calls.len()
    );
    // Nodes were not heard of for a while, and names were not to be had of those who run there.
    // The next test shall not meet the rest of that.
    for name in ["coredns", "kube-dns"] {
        if t.cluster()
            .get("kube-system", "apps/v1", "Deployment", name)
            .await?
            .is_some()
        {
            t.cluster()
                .rolled_out("kube-system", "Deployment", name)
                .await?;
        }
    }
    // A kubelet asks an API server that was away for its pods again after up to a minute (twice
    // the 30 s that a reflector of client-go backs off to).
    if t.run(&[App::server("next").on(0)]).await.is_err() {
        t.ready("app=next", 1).await?;
    }
    t.reaches("next", "http://web/").await?;
    Ok(())
}

async fn the_mesh_works_on_while_the_control_plane_is_away(t: Test) -> anyhow::Result<()> {
    strict_pair(&t).await?;
    let load = t.caller("load", 0, "http://web/", PACE).await?;
    scale_istiod(&t, 0).await?;
    let outcome = async {
        load.more(200).await?;
        // A pod that the mesh knew goes; the Service's others answer.
        t.reaches("client", "http://web/").await
    }
    .await;
    scale_istiod(&t, 1).await?;
    t.cluster()
        .rolled_out(SYSTEM, "Deployment", "istiod")
        .await?;
    outcome?;
    t.run(&[App::server("late").on(1)]).await?;
    t.is_mtls("client", "late", t.node(1)).await?;
    load.without_failure().await?;
    Ok(())
}

pub(super) async fn scale_istiod(t: &Test, replicas: u32) -> anyhow::Result<()> {
    let api = t
        .cluster()
        .api::<k8s_openapi::api::apps::v1::Deployment>(SYSTEM);
    let patch = serde_json::json!({"spec": {"replicas": replicas}});
    api.patch_scale(
        "istiod",
        &kube::api::PatchParams::default(),
        &kube::api::Patch::Merge(&patch),
    )
    .await
    .context("scale istiod")?;
    if replicas == 0 {
        crate::e2e::eventually("istiod is gone", crate::e2e::SOON, async || {
            let pods = t.cluster().pods(SYSTEM, "app=istiod").await?;
            ensure!(pods.is_empty(), "{} pods", pods.len());
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// `kill -9` of a node's component or of its ztunnel.
async fn kill(t: &Test, node: &str, component: &str) -> anyhow::Result<()> {
    let find = match component {
        "ztunnel" => "pgrep -x ztunnel".to_owned(),
        _ => format!("cat /run/adit-node/{component}.pid"),
    };
    let script = format!("kill -9 $({find})");
    let done = t.cluster().on_node(node, &["sh", "-c", &script]).await?;
    done.output()
        .with_context(|| format!("kill {component} of {node}"))
        .map(drop)
}
