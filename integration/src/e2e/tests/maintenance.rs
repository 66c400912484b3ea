//! What operators do to a mesh that carries traffic: another authority, another leader,
//! another version.

use std::time::Duration;

use adit_shared::identity::{LocalCa, TrustDomain};
use anyhow::{Context, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::DeleteParams;
use serde_json::json;

use crate::e2e::case::{Case, cases};
use crate::e2e::cluster::SYSTEM;
use crate::e2e::{App, SOON, Test, eventually};

use super::faults::{scale_istiod, strict_pair};

pub(super) const TESTS: &[Case] = cases![Alone: [
    another_replica_leads_when_the_leader_is_gone,
    the_authority_is_replaced_without_a_failed_call,
    an_upgrade_from_the_previous_commit_loses_no_call,
]];

/// Between two calls of a client under load.
const PACE: Duration = Duration::from_millis(20);

async fn another_replica_leads_when_the_leader_is_gone(t: Test) -> anyhow::Result<()> {
    strict_pair(&t).await?;
    let load = t.caller("load", 0, "http://web/", PACE).await?;
    scale_istiod(&t, 2).await?;
    let outcome = replace_leader(&t).await;
    scale_istiod(&t, 1).await?;
    t.cluster()
        .rolled_out(SYSTEM, "Deployment", "istiod")
        .await?;
    outcome?;
    load.more(20).await?;
    load.without_failure().await?;
    Ok(())
}

async fn replace_leader(t: &Test) -> anyhow::Result<()> {
    t.cluster()
        .rolled_out(SYSTEM, "Deployment", "istiod")
        .await?;
    // The last that led may be gone, and its time not over.
    let (first, pod) = eventually("a replica leads", SOON, async || {
        let holder = leader(t).await?;
        let pod = leading_pod(t, &holder).await?;
        Ok((holder, pod))
    })
    .await?;
    let now = DeleteParams::default().grace_period(0);
    t.cluster().api::<Pod>(SYSTEM).delete(&pod, &now).await?;
    eventually("another replica leads", SOON, async || {
        let second = leader(t).await?;
        ensure!(second != first, "{second} leads still");
        leading_pod(t, &second).await.map(drop)
    })
    .await?;
    // It does what only leaders do: it runs waypoints, and writes status.
    t.waypoint().await?;
    t.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nobody}\n\
         spec: {action: DENY, rules: [{from: [{source: {namespaces: [none]}}]}]}\n",
    )
    .await?;
    eventually("the new leader writes status", SOON, async || {
        let policy = t
            .cluster()
            .get(
                t.namespace(),
                "security.istio.io/v1",
                "AuthorizationPolicy",
                "nobody",
            )
            .await?
            .context("the policy is gone")?;
        let conditions = policy["status"]["conditions"].as_array().cloned();
        let conditions = conditions.unwrap_or_default();
        ensure!(
            conditions.iter().any(|c| c["type"] == "ZtunnelAccepted"),
            "{conditions:?}"
        );
        Ok(())
    })
    .await
}

/// Who holds the Lease.
async fn leader(t: &Test) -> anyhow::Result<String> {
    let lease = t.cluster().api::<Lease>(SYSTEM).get("adit-leader").await?;
    let holder = lease.spec.and_then(|spec| spec.holder_identity);
    holder
        .filter(|holder| !holder.is_empty())
        .context("nobody leads")
}

async fn leading_pod(t: &Test, holder: &str) -> anyhow::Result<String> {
    let pods = t.cluster().pods(SYSTEM, "app=istiod").await?;
    pods.into_iter()
        .filter_map(|pod| pod.metadata.name)
        .find(|name| holder.starts_with(name.as_str()))
        .with_context(|| format!("no pod is the leader {holder}"))
}

/// An operator plugs in an authority of their own, and takes it out again.
async fn the_authority_is_replaced_without_a_failed_call(t: Test) -> anyhow::Result<()> {
    t.environment().may_reinstall()?;
    // Stages that take hours otherwise, because certificates live for a day.
    let quick = [
        "values.pilot.env.DEFAULT_WORKLOAD_CERT_TTL=40s",
        "values.pilot.env.ADIT_CA_ROTATION_ANNOUNCE=26s",
        "values.pilot.env.ADIT_CA_ROTATION_RETIRE=46s",
        "values.ztunnel.env.SECRET_TTL=40s",
    ];
    t.environment().install_with(&quick).await?;
    let outcome = replace_authority(&t).await;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts"}});
    t.cluster().delete(SYSTEM, &secret.to_string()).await?;
    // Back to the first authority, which everybody has to trust again before the stages
    // are long.
    let back = match &outcome {
        Ok(first) => roots(&t, "the first authority alone", |roots| roots == first).await,
        Err(_) => Ok(()),
    };
    t.environment().install_with(&[]).await?;
    for (kind, name) in [("Deployment", "istiod"), ("DaemonSet", "ztunnel")] {
        t.cluster().rolled_out(SYSTEM, kind, name).await?;
    }
    outcome?;
    back?;
    t.is_mtls("client", "web", t.node(1)).await?;
    Ok(())
}

/// The root of before.
async fn replace_authority(t: &Test) -> anyhow::Result<String> {
    strict_pair(t).await?;
    let load = t.caller("load", 0, "http://web/", PACE).await?;
    let first = root_certificates(t).await?;
    let domain = TrustDomain::new("cluster.local")?;
    let root = LocalCa::generate(&domain)?;
    let plugged = root.intermediate("e2e", Duration::from_secs(24 * 3600))?;
    let files = plugged.to_files();
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cacerts"},
        "stringData": {"ca-cert.pem": files.certificate, "ca-key.pem": files.key,
            "cert-chain.pem": files.chain, "root-cert.pem": files.roots}});
    t.cluster().apply(SYSTEM, &secret.to_string()).await?;
    let second = root.root_pem();
    roots(t, "both authorities", |roots| {
        roots.contains(second.trim()) && roots.contains(first.trim())
    })
    .await?;
    roots(t, "the new authority alone", |roots| {
        roots.contains(second.trim()) && !roots.contains(first.trim())
    })
    .await?;
    // Only who has a certificate of the new one is believed now.
    t.is_mtls("client", "web", t.node(1)).await?;
    t.run(&[App::server("late").on(1)]).await?;
    t.is_mtls("client", "late", t.node(1)).await?;
    load.more(50).await?;
    load.without_failure().await?;
    Ok(first)
}

/// What the namespace's workloads are told to trust.
async fn root_certificates(t: &Test) -> anyhow::Result<String> {
    let map = t.cluster().api::<ConfigMap>(t.namespace());
    let map = map.get("istio-ca-root-cert").await?;
    let roots = map.data.unwrap_or_default().remove("root-cert.pem");
    roots.context("no root-cert.pem")
}

async fn roots(t: &Test, what: &str, fits: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    eventually(what, Duration::from_secs(180), async || {
        let roots = root_certificates(t).await?;
        ensure!(fits(&roots), "{roots}");
        Ok(())
    })
    .await
}

async fn an_upgrade_from_the_previous_commit_loses_no_call(t: Test) -> anyhow::Result<()> {
    let environment = t.environment();
    environment.may_reinstall()?;
    let previous = environment.previous().await?;
    environment.uninstall().await?;
    let outcome = async {
        environment.install_previous(&previous).await?;
        upgrade(&t).await
    }
    .await;
    if outcome.is_err() {
        environment.install_with(&[]).await?;
    }
    outcome
}

async fn upgrade(t: &Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    let routed = t.beside("routed").await?;
    routed.ambient(true).await?;
    for test in [t, &routed] {
        test.run(&[App::server("web").replicas(2), App::server("client").on(0)])
            .await?;
        test.reaches("client", "http://web/").await?;
    }
    let namespace = routed.namespace();
    routed.waypoint().await?;
    routed.reaches("client", "http://web/").await?;
    let near = t.caller("near", 0, "http://web/", PACE).await?;
    let far = t.caller("far", 1, "http://web/", PACE).await?;
    let waypoint = routed.caller("load", 0, "http://web/", PACE).await?;
    let pods = t.incarnations().await?;
    ensure!(
        images(t, SYSTEM).await?.iter().all(|i| !is_current(t, i)),
        "the previous version is not what runs"
    );
    t.environment().upgrade().await?;
    for (kind, name) in [
        ("Deployment", "istiod"),
        ("DaemonSet", "ztunnel"),
        ("DaemonSet", "istio-cni-node"),
    ] {
        t.cluster().rolled_out(SYSTEM, kind, name).await?;
    }
    let kinds = ["aditd", "ztunnel", "adit-cni", "waypoint"];
    eventually("all runs in the new version", SOON, async || {
        let mut running = images(t, SYSTEM).await?;
        running.extend(images(t, namespace).await?);
        let ours: Vec<_> = running
            .iter()
            .filter(|image| kinds.iter().any(|k| image.contains(&format!("/{k}:"))))
            .collect();
        ensure!(
            ours.iter().all(|image| is_current(t, image))
                && kinds
                    .iter()
                    .all(|k| ours.iter().any(|i| i.contains(&format!("/{k}:")))),
            "{running:?}"
        );
        Ok(())
    })
    .await?;
    t.cluster()
        .rolled_out(namespace, "Deployment", "waypoint")
        .await?;
    for caller in [&near, &far, &waypoint] {
        caller.more(50).await?;
    }
    ensure!(t.incarnations().await? == pods, "a pod was restarted");
    for caller in [near, far, waypoint] {
        caller.without_failure().await?;
    }
    Ok(())
}

fn is_current(t: &Test, image: &str) -> bool {
    image.ends_with(t.environment().tag())
}

/// The images of a namespace's pods.
async fn images(t: &Test, namespace: &str) -> anyhow::Result<Vec<String>> {
    let pods = t.cluster().pods(namespace, "").await?;
    Ok(pods
        .into_iter()
        .filter_map(|pod| pod.spec)
        .flat_map(|spec| spec.containers)
        .filter_map(|container| container.image)
        .collect())
}
