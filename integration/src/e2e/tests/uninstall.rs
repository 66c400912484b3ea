//! What is left of Adit when it is gone: nothing.

use std::collections::BTreeSet;

use anyhow::ensure;

use crate::e2e::case::{Case, Skip, cases};
use crate::e2e::cluster::SYSTEM;
use crate::e2e::{App, SOON, Test, eventually};

pub(super) const TESTS: &[Case] = cases![Last: [uninstall_leaves_nothing_behind]];

/// What of Adit could be found on a node, one thing a line.
const TRACES: &str = r#"
    bpftool -j link show 2>/dev/null | grep -o '"pinned":\[[^]]*adit[^]]*' | sed 's/^/bpf link /'
    find /sys/fs/bpf -mindepth 1 2>/dev/null | grep -i adit | sed 's/^/bpf pin /'
    grep -li adit /etc/cni/net.d/* 2>/dev/null | sed 's/^/cni configuration /'
    ls /opt/cni/bin | grep -i adit | sed 's/^/cni plugin /'
    find /run/adit /var/run/adit -mindepth 1 2>/dev/null | sed 's/^/file /'
    pgrep -xl 'ztunnel|adit-cni|aditd|waypoint' | sed 's/^/process /'
    for ns in /run/netns/cni-*; do
      [ -e "$ns" ] || continue
      nsenter --net="$ns" sh -c 'ip rule; ip -6 rule' 2>/dev/null | grep fwmark | sed 's/^/rule /'
      nsenter --net="$ns" sh -c 'ip route show table all; ip -6 route show table all' 2>/dev/null |
        grep -E '^local (default|::/0)' | sed 's/^/route /'
    done
    true
"#;

async fn uninstall_leaves_nothing_behind(t: Test) -> anyhow::Result<()> {
    if t.environment().stays() {
        return Err(Skip("takes Adit away, which is to stay".into()).into());
    }
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    let found = traces(&t, 0).await?;
    ensure!(
        !found.is_empty(),
        "the search for traces finds none while Adit is installed: it would find none ever"
    );
    let pods = t.incarnations().await?;
    t.environment().uninstall().await?;
    nodes_are_clean(&t).await?;
    // The pods live on, without a mesh.
    t.reaches("client", "http://web/").await?;
    t.run(&[App::server("late").on(0)]).await?;
    ensure!(
        t.incarnations().await?.len() == pods.len() + 1,
        "a pod is gone"
    );
    let left = objects(&t).await?;
    ensure!(left.is_empty(), "left in the cluster: {left:?}");
    Ok(())
}

/// Waits until no node has a trace of Adit.
pub(super) async fn nodes_are_clean(t: &Test) -> anyhow::Result<()> {
    eventually("nothing is left on the nodes", SOON, async || {
        for number in 0..t.cluster().nodes().len() {
            let left = traces(t, number).await?;
            ensure!(left.is_empty(), "{}: {left:?}", t.node(number));
        }
        Ok(())
    })
    .await
}

async fn traces(t: &Test, node: usize) -> anyhow::Result<BTreeSet<String>> {
    let done = t
        .cluster()
        .on_node(t.node(node), &["sh", "-c", TRACES])
        .await?;
    let text = done.output()?;
    Ok(text.lines().map(|line| line.trim().to_owned()).collect())
}

/// Objects of the cluster that an installation makes.
pub(super) async fn objects(t: &Test) -> anyhow::Result<Vec<String>> {
    let mut left = Vec::new();
    if t.cluster()
        .get("", "v1", "Namespace", SYSTEM)
        .await?
        .is_some()
    {
        left.push(format!("Namespace {SYSTEM}"));
    }
    let groups = t.cluster().client().list_api_groups().await?;
    for group in groups.groups {
        if group.name.ends_with(".istio.io") {
            left.push(format!("resource definitions of {}", group.name));
        }
    }
    for (version, kind, name) in [
        (
            "rbac.authorization.k8s.io/v1",
            "ClusterRole",
            "istiod-clusterrole-istio-system",
        ),
        ("rbac.authorization.k8s.io/v1", "ClusterRole", "istio-cni"),
        (
            "gateway.networking.k8s.io/v1",
            "GatewayClass",
            "istio-waypoint",
        ),
        (
            "admissionregistration.k8s.io/v1",
            "ValidatingWebhookConfiguration",
            "istio-validator-istio-system",
        ),
        ("v1", "ConfigMap", "istio-ca-root-cert"),
    ] {
        if t.cluster()
            .get(t.namespace(), version, kind, name)
            .await?
            .is_some()
        {
            left.push(format!("{kind} {name}"));
        }
    }
    Ok(left)
}
