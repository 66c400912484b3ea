//! The cluster, as the tests talk to it: objects, commands in pods, logs, metrics.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{
    Api, ApiResource, AttachParams, DeleteParams, DynamicObject, ListParams, LogParams, Patch,
    PatchParams,
};
use kube::{Client, Config};
use serde::Deserialize as _;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::environment::Flavour;
use super::test::eventually;
use crate::observe::{AccessLine, Metrics};

/// A command in a pod or on a node ends by then.
const COMMAND: Duration = Duration::from_secs(90);
/// Output of a command that is kept.
const MAX_OUTPUT: u64 = 64 * 1024 * 1024;
/// All pods of a DaemonSet, one after another.
const ROLLOUT: Duration = Duration::from_secs(240);
const FIELD_MANAGER: &str = "adit-e2e";
/// Where the mesh is installed.
pub(crate) const SYSTEM: &str = "istio-system";

/// What a command did.
#[derive(Debug, Clone)]
pub struct Executed {
    /// Whether its exit status was 0.
    pub success: bool,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Executed {
    /// The standard output.
    ///
    /// # Errors
    /// The command failed.
    pub fn output(self) -> anyhow::Result<String> {
        match self.success {
            true => Ok(self.stdout),
            false => bail!("{}{}", self.stdout, self.stderr),
        }
    }
}

/// A cluster and how to reach into it.
pub struct Cluster {
    client: Client,
    flavour: Flavour,
    kubeconfig: PathBuf,
    nodes: Vec<String>,
    /// What the API server serves, by `apiVersion` and kind; with whether it is namespaced.
    resources: Mutex<BTreeMap<(String, String), (ApiResource, bool)>>,
}

impl Cluster {
    /// Connects with a kubeconfig.
    ///
    /// # Errors
    /// It cannot be read, or the API server does not answer.
    pub async fn connect(kubeconfig: PathBuf, flavour: Flavour) -> anyhow::Result<Self> {
        let file = kube::config::Kubeconfig::read_from(&kubeconfig)
            .with_context(|| format!("read {}", kubeconfig.display()))?;
        let mut config = Config::from_custom_kubeconfig(file, &Default::default()).await?;
        config.connect_timeout = Some(Duration::from_secs(10));
        let client = Client::try_from(config)?;
        let nodes = Api::<Node>::all(client.clone());
        let nodes = timeout(Duration::from_secs(20), nodes.list(&ListParams::default()))
            .await
            .context("the API server does not answer")?
            .context("list nodes")?;
        let mut nodes: Vec<_> = nodes
            .items
            .into_iter()
            .filter(|node| {
                node.spec
                    .as_ref()
                    .is_none_or(|s| s.unschedulable != Some(true))
            })
            .filter_map(|node| node.metadata.name)
            .collect();
        nodes.sort();
        anyhow::ensure!(!nodes.is_empty(), "the cluster has no node");
        Ok(Self {
            client,
            flavour,
            kubeconfig,
            nodes,
            resources: Mutex::default(),
        })
    }

    /// For what is not offered here.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Objects of a namespace.
    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Names of the nodes, in order.
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// The kubeconfig that the tests use.
    pub fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }

    /// What kind of cluster it is.
    pub fn flavour(&self) -> Flavour {
        self.flavour
    }

    /// How the API server names objects of a kind.
    async fn resource(&self, version: &str, kind: &str) -> anyhow::Result<(ApiResource, bool)> {
        let key = (version.to_owned(), kind.to_owned());
        {
            let known = self.resources.lock().unwrap_or_else(|e| e.into_inner());
            if let Some(found) = known.get(&key) {
                return Ok(found.clone());
            }
        }
        let served = match version.split_once('/') {
            Some(_) => self.client.list_api_group_resources(version).await,
            None => self.client.list_core_api_resources(version).await,
        };
        let served = served.with_context(|| format!("resources of {version}"))?;
        let found = served
            .resources
            .into_iter()
            .find(|r| r.kind == kind && !r.name.contains('/'))
            .with_context(|| format!("the cluster has no {kind} in {version}"))?;
        let (group, api) = version.split_once('/').unwrap_or(("", version));
        let resource = ApiResource {
            group: group.into(),
            version: api.into(),
            api_version: version.into(),
            kind: kind.into(),
            plural: found.name,
        };
        let value = (resource, found.namespaced);
        let mut known = self.resources.lock().unwrap_or_else(|e| e.into_inner());
        known.insert(key, value.clone());
        Ok(value)
    }

    async fn dynamic(
        &self,
        object: &DynamicObject,
        namespace: &str,
    ) -> anyhow::Result<(Api<DynamicObject>, String)> {
        let types = object.types.as_ref().context("an object has no kind")?;
        let name = object.metadata.name.clone();
        let name = name.with_context(|| format!("a {} has no name", types.kind))?;
        let (resource, namespaced) = self.resource(&types.api_version, &types.kind).await?;
        let client = self.client.clone();
        let namespace = object.metadata.namespace.as_deref().unwrap_or(namespace);
        let api = match namespaced {
            true => Api::namespaced_with(client, namespace, &resource),
            false => Api::all_with(client, &resource),
        };
        Ok((api, name))
    }

    /// Server-side apply of YAML documents; those without a namespace go into `namespace`.
    ///
    /// # Errors
    /// One is not accepted; those before it are applied.
    pub async fn apply(&self, namespace: &str, yaml: &str) -> anyhow::Result<()> {
        for object in documents(yaml)? {
            let (api, name) = self.dynamic(&object, namespace).await?;
            let parameters = PatchParams::apply(FIELD_MANAGER).force();
            api.patch(&name, &parameters, &Patch::Apply(&object))
                .await
                .with_context(|| format!("apply {} {name}", kind(&object)))?;
        }
        Ok(())
    }

    /// Deletes what YAML documents name; what is not there is no error.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn delete(&self, namespace: &str, yaml: &str) -> anyhow::Result<()> {
        for object in documents(yaml)? {
            let (api, name) = self.dynamic(&object, namespace).await?;
            match api.delete(&name, &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                done => {
                    done.with_context(|| format!("delete {} {name}", kind(&object)))?;
                }
            }
        }
        Ok(())
    }

    /// An object as JSON; `None` where there is none.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn get(
        &self,
        namespace: &str,
        version: &str,
        kind: &str,
        name: &str,
    ) -> anyhow::Result<Option<Value>> {
        let (resource, namespaced) = self.resource(version, kind).await?;
        let client = self.client.clone();
        let api: Api<DynamicObject> = match namespaced {
            true => Api::namespaced_with(client, namespace, &resource),
            false => Api::all_with(client, &resource),
        };
        let found = api.get_opt(name).await?;
        Ok(found.map(serde_json::to_value).transpose()?)
    }

    /// Sets a label of a namespace, or takes it away.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn label_namespace(
        &self,
        namespace: &str,
        label: &str,
        value: Option<&str>,
    ) -> anyhow::Result<()> {
        let api = Api::<k8s_openapi::api::core::v1::Namespace>::all(self.client.clone());
        let patch = json!({"metadata": {"labels": {label: value}}});
        api.patch(namespace, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .with_context(|| format!("label namespace {namespace}"))?;
        Ok(())
    }

    /// `kubectl rollout restart` of a Deployment or DaemonSet, and `rollout status`.
    ///
    /// # Errors
    /// It is not done in time.
    pub async fn rollout_restart(
        &self,
        namespace: &str,
        kind: &str,
        name: &str,
    ) -> anyhow::Result<()> {
        let (resource, _) = self.resource("apps/v1", kind).await?;
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), namespace, &resource);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let patch = json!({"spec": {"template": {"metadata": {"annotations":
            {"kubectl.kubernetes.io/restartedAt": now.as_nanos().to_string()}}}}});
        api.patch(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .with_context(|| format!("restart {kind} {name}"))?;
        self.rolled_out(namespace, kind, name).await
    }

    /// Waits until every pod of a Deployment or DaemonSet is of its newest template, and
    /// ready.
    ///
    /// # Errors
    /// They are not in time.
    pub async fn rolled_out(&self, namespace: &str, kind: &str, name: &str) -> anyhow::Result<()> {
        eventually(&format!("{kind} {name} rolled out"), ROLLOUT, async || {
            let found = self.get(namespace, "apps/v1", kind, name).await?;
            let found = found.with_context(|| format!("there is no {kind} {name}"))?;
            let status = &found["status"];
            let number = |field: &str| status[field].as_i64().unwrap_or(0);
            let (wanted, updated, ready, all) = match kind {
                "DaemonSet" => (
                    number("desiredNumberScheduled"),
                    number("updatedNumberScheduled"),
                    number("numberAvailable"),
                    number("currentNumberScheduled"),
                ),
                _ => (
                    found["spec"]["replicas"].as_i64().unwrap_or(1),
                    number("updatedReplicas"),
                    number("availableReplicas"),
                    number("replicas"),
                ),
            };
            anyhow::ensure!(
                status["observedGeneration"] == found["metadata"]["generation"]
                    && [updated, ready, all] == [wanted; 3],
                "{wanted} wanted, {updated} updated, {ready} ready, {all} in all"
            );
            Ok(())
        })
        .await
    }

    /// Pods by label selector.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn pods(&self, namespace: &str, selector: &str) -> anyhow::Result<Vec<Pod>> {
        let api: Api<Pod> = self.api(namespace);
        let list = api.list(&ListParams::default().labels(selector)).await?;
        Ok(list.items)
    }

    /// The ztunnel pod of a node that is not being replaced.
    ///
    /// # Errors
    /// There is none.
    pub async fn ztunnel(&self, node: &str) -> anyhow::Result<String> {
        let pods = self.pods(SYSTEM, "app=ztunnel").await?;
        pods.into_iter()
            .filter(|pod| pod.metadata.deletion_timestamp.is_none())
            .filter(|pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node))
            .max_by_key(|pod| pod.metadata.creation_timestamp.clone())
            .and_then(|pod| pod.metadata.name)
            .with_context(|| format!("no ztunnel on {node}"))
    }

    /// Runs a command in a pod's container.
    ///
    /// # Errors
    /// It could not be run to its end in time. An exit status other than 0 is no error.
    pub async fn exec(
        &self,
        namespace: &str,
        pod: &str,
        command: &[&str],
    ) -> anyhow::Result<Executed> {
        let api: Api<Pod> = self.api(namespace);
        let run = async {
            let parameters = AttachParams::default().stdin(false);
            let mut process = api.exec(pod, command.iter().copied(), &parameters).await?;
            let status = process.take_status().context("no status")?;
            let stdout = process.stdout().context("no standard output")?;
            let stderr = process.stderr().context("no standard error")?;
            let (mut out, mut err) = (String::new(), String::new());
            let (mut stdout, mut stderr) = (stdout.take(MAX_OUTPUT), stderr.take(MAX_OUTPUT));
            let (one, two) = tokio::join!(
                stdout.read_to_string(&mut out),
                stderr.read_to_string(&mut err)
            );
            one.and(two)?;
            let status = status.await.context("the connection ended early")?;
            anyhow::Ok(Executed {
                success: status.status.as_deref() == Some("Success"),
                stdout: out,
                stderr: err,
            })
        };
        timeout(COMMAND, run)
            .await
            .unwrap_or_else(|_| bail!("no end within {COMMAND:?}"))
            .with_context(|| format!("in pod {namespace}/{pod}: {}", command.join(" ")))
    }

    /// A pod's log; `previous`: that of the container before its last restart.
    ///
    /// # Errors
    /// The API server or the kubelet refuses.
    pub async fn logs(&self, namespace: &str, pod: &str, previous: bool) -> anyhow::Result<String> {
        let api: Api<Pod> = self.api(namespace);
        let parameters = LogParams {
            previous,
            ..LogParams::default()
        };
        let text = api.logs(pod, &parameters).await;
        text.with_context(|| format!("logs of {namespace}/{pod}"))
    }

    /// The access log of the ztunnel that runs on a node now.
    ///
    /// # Errors
    /// There is none, or its log cannot be read.
    pub async fn access_log(&self, node: &str) -> anyhow::Result<Vec<AccessLine>> {
        let pod = self.ztunnel(node).await?;
        let text = self.logs(SYSTEM, &pod, false).await?;
        Ok(text.lines().filter_map(AccessLine::parse).collect())
    }

    /// What a pod's port answers to GET, through the API server.
    ///
    /// # Errors
    /// It does not answer, or not with success.
    pub async fn pod_get(
        &self,
        namespace: &str,
        pod: &str,
        port: u16,
        path: &str,
    ) -> anyhow::Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy{path}");
        let request = http::Request::get(&path).body(Vec::new())?;
        let answer = timeout(Duration::from_secs(20), self.client.request_text(request)).await;
        answer
            .context("no answer in time")?
            .with_context(|| format!("GET {path}"))
    }

    /// The metrics of a node's ztunnel.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn metrics(&self, node: &str) -> anyhow::Result<Metrics> {
        let pod = self.ztunnel(node).await?;
        let text = self.pod_get(SYSTEM, &pod, 15020, "/metrics").await?;
        Ok(Metrics::from_text(text))
    }

    /// Runs a command on a node, as root in the namespaces of its processes.
    ///
    /// # Errors
    /// [`super::Skip`] where nodes cannot be reached; or it could not be run.
    pub async fn on_node(&self, node: &str, command: &[&str]) -> anyhow::Result<Executed> {
        let mut program = self.flavour.on_node(node)?;
        program.args(command).kill_on_drop(true);
        let output = timeout(COMMAND, program.output())
            .await
            .with_context(|| format!("on {node}: no end of {}", command.join(" ")))??;
        Ok(Executed {
            success: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

fn kind(object: &DynamicObject) -> &str {
    object.types.as_ref().map_or("object", |types| &types.kind)
}

fn documents(yaml: &str) -> anyhow::Result<Vec<DynamicObject>> {
    let mut objects = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(yaml) {
        let value = Value::deserialize(document)?;
        if !value.is_null() {
            objects.push(serde_json::from_value(value)?);
        }
    }
    Ok(objects)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_told_apart() {
        let yaml = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n---\n\
                    apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: b}\nspec: {x: 1}\n";
        let objects = documents(yaml).expect("YAML");
        assert_eq!(objects.len(), 2);
        assert_eq!(kind(&objects[1]), "Deployment");
        assert_eq!(objects[1].data["spec"]["x"], 1);
    }
}
