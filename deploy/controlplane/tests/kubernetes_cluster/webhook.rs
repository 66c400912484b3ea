//! The API server asks the webhook, over its own TLS and HTTP.

use std::net::SocketAddr;
use std::sync::Arc;

use adit_controlplane::auth::{ReviewOptions, TokenReviewer, TrustedAccounts};
use adit_controlplane::ca::{CertificateIssuer, PodDirectory, TtlPolicy};
use adit_controlplane::compile::MeshConfig;
use adit_controlplane::serve::{Backends, ResourceSnapshot, ServeConfig, Serving};
use adit_controlplane::source::{KubernetesOptions, KubernetesSource};
use adit_controlplane::webhook::{Admission, CaBundles, PATH, Webhook, WebhookLimits};
use adit_shared::identity::{LocalCa, TrustDomain};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams,
};
use serde_json::json;
use tokio::sync::watch;

use crate::cluster::{Cluster, from_json, until};
use crate::support::Reports;

struct NoPods;

impl PodDirectory for NoPods {
    fn runs_on(&self, _: &str, _: &str, _: &str) -> bool {
        false
    }
}

fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}

#[tokio::test]
async fn the_api_server_is_told_what_is_wrong() {
    let Some(cluster) = Cluster::open("webhook").await else {
        return;
    };
    let kind = GroupVersionKind::gvk("security.istio.io", "v1", "AuthorizationPolicy");
    let kind = ApiResource::from_gvk_with_plural(&kind, "authorizationpolicies");
    let made = cluster.make_crd(&kind).await;
    let ca = Arc::new(LocalCa::generate(&TrustDomain::default()).expect("a CA"));
    let source = KubernetesSource::start(cluster.handle(), KubernetesOptions::default());
    let listen = free_address();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let serving = Serving::start(
        ServeConfig {
            listen: any,
            monitoring: None,
            webhook: Some(Webhook {
                listen,
                admission: Admission::new(source.subscribe(), MeshConfig::default()),
                limits: WebhookLimits::default(),
            }),
            ..ServeConfig::default()
        },
        Backends {
            snapshots: watch::channel(Arc::new(ResourceSnapshot::default())).1,
            authenticator: Arc::new(TokenReviewer::new(
                cluster.client.clone(),
                ReviewOptions::default(),
            )),
            issuer: Arc::new(CertificateIssuer::new(
                ca.clone(),
                Arc::new(NoPods),
                TrustDomain::default(),
                TrustedAccounts::default(),
                TtlPolicy {
                    default: crate::cluster::PATIENCE,
                    max: crate::cluster::PATIENCE,
                },
            )),
            reports: Arc::<Reports>::default(),
        },
    )
    .await
    .expect("serves");

    let name = cluster.namespace.clone();
    let configurations: Api<ValidatingWebhookConfiguration> = Api::all(cluster.client.clone());
    let configuration: ValidatingWebhookConfiguration = from_json(json!({
        "metadata": {"name": name},
        "webhooks": [{
            "name": "rev.validation.istio.io",
            "clientConfig": {
                "url": format!("https://{listen}{PATH}"),
                "caBundle": ByteString(ca.root_pem().into_bytes()),
            },
            "rules": [{"apiGroups": ["security.istio.io"], "apiVersions": ["*"],
                "resources": ["authorizationpolicies"], "operations": ["CREATE", "UPDATE"]}],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}},
            "failurePolicy": "Fail", "sideEffects": "None",
            "admissionReviewVersions": ["v1"], "timeoutSeconds": 10,
        }],
    }));
    configurations
        .create(&PostParams::default(), &configuration)
        .await
        .expect("a configuration");
    let policies: Api<DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), &cluster.namespace, &kind);
    let policy = |ports: &str, name: &str| {
        DynamicObject::new(name, &kind).data(json!({"spec": {"rules": [
            {"to": [{"operation": {"ports": [ports]}}]}]}}))
    };
    // A configuration is in force a moment after it was stored.
    let refused = until("a refusal", || async {
        let bad = policy("eighty", "bad");
        let refused = policies.create(&PostParams::default(), &bad).await.err();
        if refused.is_none() {
            let _ = policies.delete("bad", &DeleteParams::default()).await;
        }
        refused
    })
    .await
    .to_string();
    assert!(
        refused.contains("spec.rules[0].to[0].operation.ports[0]"),
        "{refused}"
    );
    policies
        .create(&PostParams::default(), &policy("80", "good"))
        .await
        .expect("nothing is wrong with it");
    // Without us nothing passes: it was really we who were asked.
    assert!(serving.stop().await);
    let refused = policies
        .create(&PostParams::default(), &policy("80", "late"))
        .await
        .expect_err("nobody answers")
        .to_string();
    assert!(refused.contains("failed calling webhook"), "{refused}");
    let _ = configurations.delete(&name, &DeleteParams::default()).await;
    if made {
        cluster.remove_crd(&kind).await;
    }
    cluster.close().await;
}

#[tokio::test]
async fn the_bundle_of_the_configuration_follows_the_authority() {
    let Some(cluster) = Cluster::open("bundle").await else {
        return;
    };
    let name = format!("istio-validator-{}", cluster.namespace);
    let configurations: Api<ValidatingWebhookConfiguration> = Api::all(cluster.client.clone());
    let configuration: ValidatingWebhookConfiguration = from_json(json!({
        "metadata": {"name": name},
        "webhooks": [{
            "name": "rev.validation.istio.io",
            "clientConfig": {"service": {"name": "istiod", "namespace": cluster.namespace,
                "path": PATH}},
            "rules": [],
            "failurePolicy": "Ignore", "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
        }],
    }));
    let new = || Arc::new(LocalCa::generate(&TrustDomain::default()).expect("a CA"));
    let (first, second) = (new(), new());
    let (publish, current) = watch::channel(first.clone());
    let bundles = CaBundles::start(
        cluster.handle(),
        name.clone(),
        adit_controlplane::ca::CurrentCa::new(current),
    );
    configurations
        .create(&PostParams::default(), &configuration)
        .await
        .expect("a configuration");
    let has = |roots: String| {
        let (configurations, name) = (configurations.clone(), name.clone());
        async move {
            until("the bundle", || async {
                let found = configurations.get(&name).await.expect("there");
                let webhook = found.webhooks?.pop()?;
                assert!(
                    webhook.client_config.service.is_some(),
                    "nothing else changes"
                );
                let bundle = webhook.client_config.ca_bundle?;
                (bundle.0 == roots.as_bytes()).then_some(())
            })
            .await;
        }
    };
    has(first.root_pem()).await;
    publish.send_replace(second.clone());
    has(second.root_pem()).await;
    let emptied = json!({"webhooks": [{"name": "rev.validation.istio.io",
        "clientConfig": {"caBundle": null}}]});
    configurations
        .patch(&name, &PatchParams::default(), &Patch::Strategic(&emptied))
        .await
        .expect("patched");
    has(second.root_pem()).await;
    drop(bundles);
    let _ = configurations.delete(&name, &DeleteParams::default()).await;
    cluster.close().await;
}
