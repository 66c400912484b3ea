//! Helm in place of `adit install` and `adit uninstall`: the same charts, the same mesh.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams};

use super::uninstall::{nodes_are_clean, objects};
use crate::e2e::case::{Case, Skip, cases};
use crate::e2e::cluster::SYSTEM;
use crate::e2e::helm::Helm;
use crate::e2e::test::{incarnation, remove_namespace};
use crate::e2e::{App, SOON, Test, eventually};

pub(super) const TESTS: &[Case] = cases![Last: [helm_installs_and_removes_the_same_mesh]];

// What follows is in `deploy/charts/README.md`, word for word.
const INSTALL: [&str; 4] = [
    "install istio-base deploy/charts/base -n istio-system --create-namespace",
    "install istiod deploy/charts/istiod -n istio-system --wait",
    "install istio-cni deploy/charts/cni -n istio-system",
    "install ztunnel deploy/charts/ztunnel -n istio-system --wait",
];
const UNINSTALL: [&str; 4] = [
    "uninstall istio-cni -n istio-system",
    "uninstall ztunnel -n istio-system",
    "uninstall istiod -n istio-system",
    "uninstall istio-base -n istio-system",
];
const INSTALL_AMBIENT: [&str; 2] = [
    "dependency build deploy/charts/ambient",
    "install mesh deploy/charts/ambient -n istio-system --create-namespace --wait",
];
/// Resource definitions that another release has left.
const TAKE_OWNERSHIP: &str = "--take-ownership";
const UNINSTALL_AMBIENT: &str = "uninstall mesh -n istio-system";
const PRIVILEGED: &str = "pod-security.kubernetes.io/enforce";

async fn helm_installs_and_removes_the_same_mesh(t: Test) -> anyhow::Result<()> {
    if t.environment().stays() {
        return Err(Skip("takes Adit away, which is to stay".into()).into());
    }
    t.needs_nodes(2)?;
    let helm = Helm::new(t.environment()).await?;
    t.environment().uninstall().await?;
    let outcome = parts_and_umbrella(&t, &helm).await;
    // Whatever came of it: the cluster is without a mesh again.
    let removed = helm.remove_all().await;
    let purged = purge(&t).await;
    outcome.and(removed).and(purged)
}

async fn parts_and_umbrella(t: &Test, helm: &Helm<'_>) -> anyhow::Result<()> {
    // Older than the mesh, and not made anew for it.
    t.run(&[App::server("web").on(1), App::server("client").on(0)])
        .await?;
    let pods = pods(t).await?;
    for line in INSTALL {
        helm.run_with_images(line).await?;
        t.cluster()
            .label_namespace(SYSTEM, PRIVILEGED, Some("privileged"))
            .await?;
    }
    t.ambient(true).await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    an_upgrade_to_the_same_changes_nothing(t, helm).await?;
    for line in UNINSTALL {
        helm.run(line).await?;
        // Some time may pass between them.
        eventually("what it installed has ended", SOON, async || {
            let left = mesh_pods(t, line).await?;
            ensure!(left == 0, "{left} pods");
            Ok(())
        })
        .await?;
    }
    what_helm_made_is_gone(t).await?;

    let [dependencies, install] = INSTALL_AMBIENT;
    helm.run(dependencies).await?;
    let install = format!("{install} {TAKE_OWNERSHIP}");
    helm.run_with_images(&install).await?;
    t.is_mtls("client", "web", t.node(1)).await?;
    helm.run(UNINSTALL_AMBIENT).await?;
    what_helm_made_is_gone(t).await?;

    // They live on, without a mesh, and so do new ones.
    t.reaches("client", "http://web/").await?;
    ensure!(self::pods(t).await? == pods, "a pod was made anew");
    t.run(&[App::server("late").on(0)]).await
}

/// Pods of the mesh that the command is to end.
async fn mesh_pods(t: &Test, command: &str) -> anyhow::Result<usize> {
    let app = match command.split_whitespace().nth(1) {
        Some("istio-cni") => "k8s-app=istio-cni-node",
        Some("ztunnel") => "app=ztunnel",
        Some("istiod") => "app=istiod",
        _ => return Ok(0),
    };
    Ok(t.cluster().pods(SYSTEM, app).await?.len())
}

async fn an_upgrade_to_the_same_changes_nothing(t: &Test, helm: &Helm<'_>) -> anyhow::Result<()> {
    let pace = Duration::from_millis(20);
    let load = t.caller("load", 0, "http://web/", pace).await?;
    let before = written(t).await?;
    for line in INSTALL {
        let line = line.replacen("install", "upgrade", 1);
        helm.run_with_images(&line.replace(" --create-namespace", ""))
            .await?;
    }
    let after = written(t).await?;
    let changed: Vec<_> = after.symmetric_difference(&before).collect();
    ensure!(changed.is_empty(), "changed by an upgrade: {changed:#?}");
    load.more(20).await?;
    load.without_failure().await?;
    Ok(())
}

/// The mesh's own pods; what an API server has made of definitions; and the webhook, with what
/// the control plane has written into it.
async fn written(t: &Test) -> anyhow::Result<BTreeSet<String>> {
    let pods = t.cluster().pods(SYSTEM, "").await?;
    let mut found: BTreeSet<_> = pods.iter().map(incarnation).collect();
    let definitions = Api::<CustomResourceDefinition>::all(t.cluster().client());
    for definition in definitions.list(&ListParams::default()).await? {
        if definition.spec.group.ends_with(".istio.io") {
            let metadata = definition.metadata;
            let version = metadata.resource_version.unwrap_or_default();
            found.insert(format!(
                "{} at {version}",
                metadata.name.unwrap_or_default()
            ));
        }
    }
    let webhook = t
        .cluster()
        .get(
            "",
            "admissionregistration.k8s.io/v1",
            "ValidatingWebhookConfiguration",
            "istio-validator-istio-system",
        )
        .await?;
    let webhook = webhook.context("there is no webhook")?;
    found.insert(webhook["webhooks"].to_string());
    Ok(found)
}

/// What is left is not Helm's: the namespace, definitions (`helm.sh/resource-policy: keep`),
/// and what the control plane has written.
async fn what_helm_made_is_gone(t: &Test) -> anyhow::Result<()> {
    match nodes_are_clean(t).await {
        // Without a shell there nobody knows.
        Err(error) if error.is::<Skip>() => {}
        done => done?,
    }
    let mut left = BTreeSet::from_iter(objects(t).await?);
    for expected in [
        "Namespace istio-system",
        "resource definitions of extensions.istio.io",
        "resource definitions of networking.istio.io",
        "resource definitions of security.istio.io",
        "resource definitions of telemetry.istio.io",
        "GatewayClass istio-waypoint",
        "ConfigMap istio-ca-root-cert",
    ] {
        ensure!(left.remove(expected), "not left: {expected}");
    }
    ensure!(left.is_empty(), "left in the cluster: {left:?}");
    let key = t.cluster().get(SYSTEM, "v1", "Secret", "istio-ca-secret");
    key.await?.context("the authority's key is gone").map(drop)
}

/// `adit uninstall --purge` takes what Helm leaves; the namespace was not made by `adit`.
async fn purge(t: &Test) -> anyhow::Result<()> {
    t.environment().uninstall().await?;
    remove_namespace(t.cluster(), SYSTEM).await?;
    eventually("nothing is left in the cluster", SOON, async || {
        let left = objects(t).await?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

async fn pods(t: &Test) -> anyhow::Result<Vec<String>> {
    let selector = "app in (web, client)";
    let pods = t.cluster().pods(t.namespace(), selector).await?;
    Ok(pods.iter().map(incarnation).collect())
}

#[cfg(test)]
mod readme {
    use super::*;

    #[test]
    fn the_commands_are_those_of_the_readme() {
        let path = crate::e2e::environment::root().join("deploy/charts/README.md");
        let text = std::fs::read_to_string(path).expect("the README of the charts");
        let lines: BTreeSet<_> = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let all = INSTALL.iter().chain(&UNINSTALL).chain(&INSTALL_AMBIENT);
        for line in all.chain([&UNINSTALL_AMBIENT]) {
            let line = format!("helm {line}");
            assert!(lines.contains(&line), "{line} is not there");
        }
        assert!(text.contains(TAKE_OWNERSHIP));
        assert!(text.contains(&format!("{PRIVILEGED}=privileged")));
    }
}
