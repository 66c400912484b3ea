//! How pods start while parts of the mesh are not there: the CNI plugin's promises.

use std::time::Duration;

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Event;
use kube::api::ListParams;
use serde_json::json;

use crate::e2e::case::{Case, cases};
use crate::e2e::cluster::SYSTEM;
use crate::e2e::{App, SOON, Test, eventually};

pub(super) const TESTS: &[Case] = cases![Alone: [
    without_ztunnel_enrolled_pods_wait_and_others_start,
    the_plugin_puts_itself_back_and_pods_outlive_the_node_agent,
    pods_come_and_go_without_leaving_anything,
]];

/// Keeps a DaemonSet's pods off every node, by a label that no node has; `None` brings
/// them back.
async fn banish(t: &Test, name: &str, away: bool) -> anyhow::Result<()> {
    let value = away.then_some("nowhere");
    let api = t
        .cluster()
        .api::<k8s_openapi::api::apps::v1::DaemonSet>(SYSTEM);
    let patch = json!({"spec": {"template": {"spec": {"nodeSelector": {"e2e.adit/away": value}}}}});
    api.patch(
        name,
        &kube::api::PatchParams::default(),
        &kube::api::Patch::Merge(&patch),
    )
    .await
    .with_context(|| format!("DaemonSet {name}"))?;
    if !away {
        return t.cluster().rolled_out(SYSTEM, "DaemonSet", name).await;
    }
    eventually(&format!("the pods of {name} are gone"), SOON, async || {
        let found = api.get(name).await?;
        let labels = found.spec.and_then(|spec| spec.selector.match_labels);
        let selector: Vec<_> = labels
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let pods = t.cluster().pods(SYSTEM, &selector.join(",")).await?;
        ensure!(pods.is_empty(), "{} pods", pods.len());
        Ok(())
    })
    .await
}

async fn without_ztunnel_enrolled_pods_wait_and_others_start(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    let plain = t.beside("plain").await?;
    banish(&t, "ztunnel", true).await?;
    let outcome = async {
        // In the mesh: it has to wait, and its events say for what.
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "waits", "labels": {"app": "waits"}},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "app",
                "image": t.environment().app_image(), "imagePullPolicy": "IfNotPresent",
                "args": ["serve"]}]}});
        t.apply(&pod.to_string()).await?;
        let events = t.cluster().api::<Event>(t.namespace());
        eventually("an event says why", SOON, async || {
            let list = events
                .list(&ListParams::default().fields("type=Warning"))
                .await?;
            let messages: Vec<_> = list.items.into_iter().filter_map(|e| e.message).collect();
            ensure!(
                messages.iter().any(|m| m.contains("ztunnel")),
                "{messages:?}"
            );
            Ok(())
        })
        .await?;
        // Not in the mesh: it starts as ever.
        plain.run(&[App::server("starts").on(0)]).await
    }
    .await;
    banish(&t, "ztunnel", false).await?;
    outcome?;
    t.ready("app=waits", 1).await?;
    t.run(&[App::server("client").on(0)]).await?;
    let node = t.cluster().pods(t.namespace(), "app=waits").await?;
    let node = node.into_iter().next().and_then(|pod| pod.spec?.node_name);
    t.is_mtls("client", "waits", &node.context("it has no node")?)
        .await?;
    Ok(())
}

async fn the_plugin_puts_itself_back_and_pods_outlive_the_node_agent(
    t: Test,
) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    let find = "grep -l adit-cni /etc/cni/net.d/*.conflist";
    let node = t.node(1);
    let file = t
        .cluster()
        .on_node(node, &["sh", "-c", find])
        .await?
        .output()?;
    let file = file
        .lines()
        .next()
        .context("no configuration names the plugin")?;
    // As the CNI's own agent does when it rewrites its configuration.
    let rewrite = format!(
        "jq '.plugins |= map(select(.type != \"adit-cni\"))' {file} > /tmp/e2e-cni && cat /tmp/e2e-cni > {file}; \
         rm /tmp/e2e-cni; ! grep -q adit-cni {file}"
    );
    let done = t.cluster().on_node(node, &["sh", "-c", &rewrite]).await?;
    done.output()
        .context("the plugin put itself back too soon to be seen")?;
    eventually(
        "the plugin is in the configuration again",
        SOON,
        async || {
            t.cluster()
                .on_node(node, &["sh", "-c", find])
                .await?
                .output()
                .map(drop)
        },
    )
    .await?;

    let load = t
        .caller("load", 0, "http://web/", Duration::from_millis(20))
        .await?;
    banish(&t, "istio-cni-node", true).await?;
    let outcome = load.more(50).await;
    banish(&t, "istio-cni-node", false).await?;
    outcome?;
    t.run(&[App::server("late").on(1)]).await?;
    t.is_mtls("client", "late", t.node(1)).await?;
    load.without_failure().await?;
    Ok(())
}

/// Pods come and go; what ztunnel and the nodes hold for them goes with them.
async fn pods_come_and_go_without_leaving_anything(t: Test) -> anyhow::Result<()> {
    const ROUNDS: usize = 10;
    const PODS: usize = 20;
    const ACTIVE: &str = "workload_manager_active_proxy_count";
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1)]).await?;
    let measure = async || {
        let mut found = Vec::new();
        for node in t.cluster().nodes() {
            let metrics = t.cluster().metrics(node).await?;
            let count = "ip -o link | wc -l; ls /run/netns | wc -l; ls /sys/fs/bpf -R | wc -l";
            let held = t
                .cluster()
                .on_node(node, &["sh", "-c", count])
                .await?
                .output()?;
            found.push((
                metrics.sum(ACTIVE, &[]),
                metrics.sum("process_open_fds", &[]),
                held.split_whitespace()
                    .map(str::to_owned)
                    .collect::<Vec<_>>(),
            ));
        }
        anyhow::Ok(found)
    };
    let before = measure().await?;
    for round in 0..ROUNDS {
        let crowd = App::server("crowd").replicas(PODS);
        t.run(&[crowd])
            .await
            .with_context(|| format!("round {round}"))?;
        t.reaches("web", "http://crowd/").await?;
        t.cluster()
            .delete(
                t.namespace(),
                "{apiVersion: apps/v1, kind: Deployment, metadata: {name: crowd}}",
            )
            .await?;
        eventually("the crowd is gone", SOON, async || {
            let pods = t.cluster().pods(t.namespace(), "app=crowd").await?;
            ensure!(pods.is_empty(), "{} pods", pods.len());
            Ok(())
        })
        .await?;
    }
    eventually("nothing is left of them", SOON, async || {
        let after = measure().await?;
        for ((had, fds, held), (has, open, holds)) in before.iter().zip(&after) {
            ensure!(had == has && held == holds, "{before:?} became {after:?}");
            // Pools and timers come and go.
            ensure!(*open <= fds + 16.0, "{before:?} became {after:?}");
        }
        Ok(())
    })
    .await
}
