//! The source follows what really happens.

use adit_controlplane::source::{KubernetesOptions, KubernetesSource, SourceState};
use k8s_openapi::api::core::v1::{Pod, Service, ServiceAccount};
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ObjectMeta, Patch,
    PatchParams, PostParams,
};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::cluster::{Cluster, PATIENCE, from_json};

async fn until(
    state: &mut watch::Receiver<SourceState>,
    what: &str,
    done: impl Fn(&SourceState) -> bool,
) -> SourceState {
    let mut waiting = state.clone();
    let found = timeout(PATIENCE, waiting.wait_for(|state| done(state))).await;
    match found {
        Ok(found) => found.expect("followed").clone(),
        Err(_) => panic!("not in time: {what}; {:?}", state.borrow().findings),
    }
}

#[tokio::test]
async fn pods_services_and_namespaces_are_followed() {
    let Some(mut cluster) = Cluster::open("follow").await else {
        return;
    };
    let node = cluster.make_node("n").await;
    let source = KubernetesSource::start(cluster.handle(), KubernetesOptions::default());
    let mut state = source.subscribe();
    let synced = until(&mut state, "synced", |state| state.synced).await;
    assert!(synced.findings.is_empty(), "{:?}", synced.findings);
    assert!(synced.objects.nodes.contains_key(node.as_str()));
    let name = cluster.namespace.clone();
    let namespace = |state: &SourceState| state.objects.namespaces.get(name.as_str()).cloned();
    assert!(namespace(&synced).is_some_and(|of| of.namespace.is_some()));

    let pod = cluster.make_pod("cart", &node).await;
    let service: Service = from_json(json!({
        "metadata": {"name": "s"},
        "spec": {"selector": {"app": "cart"}, "ports": [{"port": 80, "name": "http"}]},
    }));
    cluster
        .api()
        .create(&PostParams::default(), &service)
        .await
        .expect("a service");
    let seen = until(&mut state, "pod and service", |state| {
        namespace(state)
            .is_some_and(|of| of.pods.contains_key("cart") && of.services.contains_key("s"))
    })
    .await;
    let of = namespace(&seen).expect("there");
    assert_eq!(
        Some(&*of.pods["cart"].meta.uid),
        pod.metadata.uid.as_deref()
    );
    assert_eq!(&*of.pods["cart"].node, node.as_str());
    assert!(!of.services["s"].addresses.is_empty());

    // kubelet's part.
    let pods: Api<Pod> = cluster.api();
    let status = json!({"status": {"phase": "Running", "podIP": "10.0.0.9",
        "podIPs": [{"ip": "10.0.0.9"}]}});
    pods.patch_status("cart", &PatchParams::default(), &Patch::Merge(&status))
        .await
        .expect("a status");
    until(&mut state, "the address", |state| {
        namespace(state).is_some_and(|of| !of.pods["cart"].addresses.is_empty())
    })
    .await;

    let now = DeleteParams::default().grace_period(0);
    pods.delete("cart", &now).await.expect("deleted");
    until(&mut state, "no pod", |state| {
        namespace(state).is_some_and(|of| of.pods.is_empty())
    })
    .await;
    cluster.close().await;
}

/// One kind whose CRD nobody else brings along.
#[tokio::test]
async fn a_kind_is_followed_as_soon_as_its_crd_is_there() {
    let Some(cluster) = Cluster::open("crd").await else {
        return;
    };
    let kind = GroupVersionKind::gvk("telemetry.istio.io", "v1", "Telemetry");
    let kind = ApiResource::from_gvk_with_plural(&kind, "telemetries");
    let source = KubernetesSource::start(cluster.handle(), KubernetesOptions::default());
    let mut state = source.subscribe();
    until(&mut state, "synced", |state| state.synced).await;

    if !cluster.make_crd(&kind).await {
        eprintln!("SKIPPED crd: {} is installed already", kind.plural);
        return cluster.close().await;
    }
    let api: Api<DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), &cluster.namespace, &kind);
    let object = DynamicObject::new("t", &kind).data(json!({"spec": {}}));
    api.create(&PostParams::default(), &object)
        .await
        .expect("an object");
    let namespace = cluster.namespace.clone();
    let count = |state: &SourceState| {
        let of = state.objects.namespaces.get(namespace.as_str());
        of.map_or(0, |of| of.telemetries.len())
    };
    let started = tokio::time::Instant::now();
    until(&mut state, "the object", |state| count(state) == 1).await;
    println!("followed {:?} after it was made", started.elapsed());

    cluster.remove_crd(&kind).await;
    until(&mut state, "nothing", |state| count(state) == 0).await;
    cluster.close().await;
}

/// Somebody who may nothing.
#[tokio::test]
async fn what_is_not_permitted_is_named() {
    let Some(cluster) = Cluster::open("rbac").await else {
        return;
    };
    let account = ServiceAccount {
        metadata: ObjectMeta {
            name: Some("nobody".into()),
            ..ObjectMeta::default()
        },
        ..ServiceAccount::default()
    };
    let accounts: Api<ServiceAccount> = cluster.api();
    accounts
        .create(&PostParams::default(), &account)
        .await
        .expect("an account");
    let token = accounts
        .create_token_request("nobody", &PostParams::default(), &Default::default())
        .await
        .expect("a token");
    let read = kube::config::Kubeconfig::read_from(&cluster.kubeconfig).expect("readable");
    let mut config = kube::Config::from_custom_kubeconfig(read, &Default::default())
        .await
        .expect("complete");
    config.auth_info = Default::default();
    config.auth_info.token = Some(token.status.expect("a status").token.into());
    let mut handle = cluster.handle();
    handle.client = kube::Client::try_from(config).expect("usable");

    let source = KubernetesSource::start(handle, KubernetesOptions::default());
    let mut state = source.subscribe();
    let state = until(&mut state, "findings", |state| state.findings.len() >= 7).await;
    assert!(!state.synced);
    for resource in ["pods", "secrets", "endpointslices.discovery.k8s.io"] {
        let wanted = format!("{resource}: grant it");
        let told = |finding: &adit_controlplane::model::Finding| finding.message.contains(&wanted);
        assert!(
            state.findings.iter().any(told),
            "{resource}: {:?}",
            state.findings
        );
    }
    cluster.close().await;
}
