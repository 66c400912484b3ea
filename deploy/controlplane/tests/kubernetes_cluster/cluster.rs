//! The cluster under test, and things in it that go away with the test.

use std::path::PathBuf;
use std::time::Duration;

use adit_controlplane::kubernetes::Kubernetes;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Cluster {
    pub client: Client,
    /// A namespace of the test's own.
    pub namespace: String,
    pub kubeconfig: PathBuf,
    nodes: Vec<String>,
}

pub fn from_json<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("well formed")
}

impl Cluster {
    /// `None`, loudly, if there is no cluster to test with.
    pub async fn open(test: &str) -> Option<Self> {
        let Some(kubeconfig) = std::env::var_os("ADIT_TEST_KUBECONFIG") else {
            eprintln!("SKIPPED {test}: ADIT_TEST_KUBECONFIG names no API server to test with");
            return None;
        };
        let kubeconfig = PathBuf::from(kubeconfig);
        let read = Kubeconfig::read_from(&kubeconfig).expect("ADIT_TEST_KUBECONFIG is readable");
        let config = kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
            .await
            .expect("ADIT_TEST_KUBECONFIG is complete");
        let client = Client::try_from(config).expect("ADIT_TEST_KUBECONFIG is usable");
        let namespace = format!("adit-test-{test}-{:08x}", rand::random::<u32>());
        let cluster = Self {
            client,
            namespace,
            kubeconfig,
            nodes: Vec::new(),
        };
        cluster.make_namespace(&cluster.namespace).await;
        Some(cluster)
    }

    pub fn handle(&self) -> Kubernetes {
        Kubernetes {
            client: self.client.clone(),
            namespace: self.namespace.as_str().into(),
            identity: "aditd-test".into(),
        }
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub async fn make_namespace(&self, name: &str) {
        let namespace: Namespace = from_json(json!({"metadata": {"name": name}}));
        Api::all(self.client.clone())
            .create(&PostParams::default(), &namespace)
            .await
            .expect("a namespace");
    }

    /// A node of which nobody hears.
    pub async fn make_node(&mut self, name: &str) -> String {
        let name = format!("{}-{name}", self.namespace);
        let node: Node = from_json(json!({"metadata": {"name": name}}));
        Api::all(self.client.clone())
            .create(&PostParams::default(), &node)
            .await
            .expect("a node");
        self.nodes.push(name.clone());
        name
    }

    /// A pod with a service account of its own name, bound to `node`.
    pub async fn make_pod(&self, name: &str, node: &str) -> Pod {
        let account: ServiceAccount = from_json(json!({"metadata": {"name": name}}));
        self.api()
            .create(&PostParams::default(), &account)
            .await
            .expect("a service account");
        let pod: Pod = from_json(json!({
            "metadata": {"name": name},
            "spec": {
                "nodeName": node, "serviceAccountName": name,
                "automountServiceAccountToken": false,
                "containers": [{"name": "c", "image": "none"}],
            },
        }));
        self.api()
            .create(&PostParams::default(), &pod)
            .await
            .expect("a pod")
    }

    /// The token that kubelet would project into the pod.
    pub async fn token(&self, pod: &Pod, audience: &str) -> String {
        let name = pod.metadata.name.clone().expect("a name");
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![audience.to_owned()],
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: Some(name.clone()),
                    uid: pod.metadata.uid.clone(),
                }),
                expiration_seconds: Some(3600),
            },
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = self.api();
        accounts
            .create_token_request(&name, &PostParams::default(), &request)
            .await
            .expect("a token")
            .status
            .expect("a status")
            .token
    }

    /// A CRD that allows everything; false if there is one already, which is left alone.
    pub async fn make_crd(&self, kind: &ApiResource) -> bool {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let name = format!("{}.{}", kind.plural, kind.group);
        if crds.get_opt(&name).await.expect("an answer").is_some() {
            return false;
        }
        let crd: CustomResourceDefinition = from_json(json!({
            "metadata": {"name": name},
            "spec": {
                "group": kind.group, "scope": "Namespaced",
                "names": {"kind": kind.kind, "plural": kind.plural,
                    "singular": kind.kind.to_lowercase()},
                "versions": [{"name": kind.version, "served": true, "storage": true,
                    "schema": {"openAPIV3Schema": {"type": "object",
                        "x-kubernetes-preserve-unknown-fields": true}}}],
            },
        }));
        crds.create(&PostParams::default(), &crd)
            .await
            .expect("a CRD");
        let objects: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &self.namespace, kind);
        until("the API server serves it", || async {
            objects.list(&ListParams::default()).await.ok()
        })
        .await;
        true
    }

    /// Ends what [`Self::make_crd`] has made.
    pub async fn remove_crd(&self, kind: &ApiResource) {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let name = format!("{}.{}", kind.plural, kind.group);
        crds.delete(&name, &DeleteParams::default())
            .await
            .expect("deleted");
    }

    /// At the end of a test that went well; what another leaves has an unmistakable name.
    pub async fn close(self) {
        let now = DeleteParams::default().grace_period(0);
        let pods: Api<Pod> = self.api();
        let _ = pods.delete_collection(&now, &ListParams::default()).await;
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let _ = namespaces.delete(&self.namespace, &now).await;
        let nodes: Api<Node> = Api::all(self.client.clone());
        for node in &self.nodes {
            let _ = nodes.delete(node, &now).await;
        }
    }
}

/// Waits for an answer that cannot be waited for otherwise.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let start = tokio::time::Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
