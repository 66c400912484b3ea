//! A cluster to test with, and how to wait for what happens in it.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use adit_controlplane::driver::{ControlPlane, Input, Options};
use adit_controlplane::kubernetes::Kubernetes;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, Config};
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard, watch};
use tokio::time::{Instant, sleep};

pub const PATIENCE: Duration = Duration::from_secs(60);

/// Every control plane looks after the whole cluster, so there is one at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Held until the control plane of a test has ended.
pub type Alone = MutexGuard<'static, ()>;

/// A namespace of a cluster, which is deleted in the end.
pub struct Cluster {
    pub client: Client,
    pub namespace: String,
}

impl Cluster {
    /// `None`: there is no cluster to test with.
    pub async fn connect(test: &str) -> Option<(Alone, Self)> {
        let Some(path) = std::env::var_os("ADIT_TEST_KUBECONFIG") else {
            eprintln!("ADIT_TEST_KUBECONFIG is not set: nothing is tested");
            return None;
        };
        let file = Kubeconfig::read_from(path).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
        let client = Client::try_from(config.expect("a configuration")).expect("a client");
        let namespace = format!("adit-{test}-{:08x}", rand::random::<u32>());
        let cluster = Self { client, namespace };
        let alone = ALONE.lock().await;
        cluster.create_namespace().await;
        Some((alone, cluster))
    }

    async fn create_namespace(&self) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let namespace = json!({"metadata": {"name": self.namespace}});
        let namespace = serde_json::from_value(namespace).expect("a namespace");
        let made = namespaces.create(&PostParams::default(), &namespace).await;
        made.expect("the namespace is made");
    }

    pub async fn label(&self, labels: Value) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
        let patched = namespaces
            .patch(&self.namespace, &PatchParams::default(), &patch)
            .await;
        patched.expect("labelled");
    }

    /// What a test has to call in the end; a failed one leaves its namespace for a look at it.
    pub async fn remove(self) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let params = DeleteParams::background();
        namespaces
            .delete(&self.namespace, &params)
            .await
            .expect("deleted");
    }

    pub fn handle(&self) -> Kubernetes {
        Kubernetes {
            client: self.client.clone(),
            namespace: self.namespace.as_str().into(),
            identity: "test".into(),
        }
    }

    /// A control plane whose replica leads or not.
    pub async fn control_plane(&self, leading: &watch::Sender<bool>) -> ControlPlane {
        let options = Options {
            input: Input::Kubernetes(self.handle()),
            leading: Some(leading.subscribe()),
            ..Options::default()
        };
        ControlPlane::start(options).await.expect("starts")
    }

    pub fn api(&self, api_version: &str, kind: &str) -> Api<DynamicObject> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
    }

    fn api_of(&self, object: &Value) -> Api<DynamicObject> {
        let text = |key: &str| object[key].as_str().expect("text").to_owned();
        self.api(&text("apiVersion"), &text("kind"))
    }

    pub async fn create(&self, object: Value) -> Value {
        let api = self.api_of(&object);
        let object = serde_json::from_value(object).expect("an object");
        let made = api
            .create(&PostParams::default(), &object)
            .await
            .expect("created");
        serde_json::to_value(made).expect("JSON")
    }

    /// Merges `patch` into an object, or into its status.
    pub async fn patch(&self, object: &Value, patch: Value) -> Value {
        let name = object["metadata"]["name"].as_str().expect("a name");
        let (api, params) = (self.api_of(object), PatchParams::default());
        let is_status = patch.get("status").is_some();
        let patch = Patch::Merge(patch);
        let patched = match is_status {
            true => api.patch_status(name, &params, &patch).await,
            false => api.patch(name, &params, &patch).await,
        };
        serde_json::to_value(patched.expect("patched")).expect("JSON")
    }

    pub async fn get(&self, object: &Value) -> Option<Value> {
        let name = object["metadata"]["name"].as_str().expect("a name");
        let found = self.api_of(object).get_opt(name).await.expect("an answer");
        found.map(|found| serde_json::to_value(found).expect("JSON"))
    }

    pub async fn delete(&self, object: &Value) {
        let name = object["metadata"]["name"].as_str().expect("a name");
        let params = DeleteParams::background();
        self.api_of(object)
            .delete(name, &params)
            .await
            .expect("deleted");
    }

    /// Waits until an object is so, and gives it.
    pub async fn until(&self, what: &str, object: &Value, is: impl Fn(&Value) -> bool) -> Value {
        let mut last = None;
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            last = self.get(object).await;
            if let Some(found) = last.as_ref().filter(|found| is(found)) {
                return found.clone();
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("not in time: {what}: {last:#?}");
    }

    pub async fn until_gone(&self, object: &Value) {
        let end = Instant::now() + PATIENCE;
        while self.get(object).await.is_some() {
            assert!(Instant::now() < end, "it is still there: {object}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// What names an object.
    pub fn named(api_version: &str, kind: &str, name: &str) -> Value {
        json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name}})
    }
}

/// Waits for a condition.
pub async fn until<T: Debug>(what: &str, mut look: impl FnMut() -> Result<(), T>) {
    let end = Instant::now() + PATIENCE;
    loop {
        match look() {
            Ok(()) => return,
            Err(state) => assert!(Instant::now() < end, "not in time: {what}: {state:?}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Whether a list of conditions has this one.
pub fn has(conditions: &Value, kind: &str, status: &str, reason: &str) -> bool {
    conditions
        .as_array()
        .into_iter()
        .flatten()
        .any(|condition| {
            condition["type"] == kind
                && condition["status"] == status
                && condition["reason"] == reason
        })
}

/// A term of leadership for tests.
pub fn leadership(leads: bool) -> Arc<watch::Sender<bool>> {
    Arc::new(watch::channel(leads).0)
}
