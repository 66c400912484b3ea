//! The pods of a cluster as commands name them: ztunnels, waypoints, the control plane, and
//! the user's own.

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::Kubernetes;
use super::forward::PodPort;
use crate::cluster::{label_of, name_of, namespace_of};
use crate::output::UsageError;

/// The Gateway that a pod was made for.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Who made it, on the pods of waypoints.
const WAYPOINTS: &str = "gateway.istio.io/managed=istio.io-mesh-controller";

/// A part of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The control plane.
    ControlPlane,
    /// The node proxies.
    Ztunnel,
    /// The agents that enrol pods.
    Cni,
}

impl Role {
    fn selector(self) -> &'static str {
        match self {
            Self::ControlPlane => "app=istiod",
            Self::Ztunnel => "app=ztunnel",
            Self::Cni => "k8s-app=istio-cni-node",
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::ControlPlane => "control plane",
            Self::Ztunnel => "ztunnel",
            Self::Cni => "CNI agent",
        }
    }
}

/// What commands need of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodView {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Node, empty until it is scheduled.
    pub node: String,
    /// Gateway that it was made for.
    pub gateway: Option<String>,
    /// Why it cannot be asked; `None` if it runs.
    pub trouble: Option<String>,
    /// Whether it is ready.
    pub ready: bool,
}

impl PodView {
    fn of(pod: &Value) -> Self {
        let status = &pod["status"];
        let phase = status["phase"].as_str().unwrap_or("Unknown");
        let conditions = status["conditions"].as_array();
        let ready = conditions
            .into_iter()
            .flatten()
            .any(|c| c["type"] == "Ready" && c["status"] == "True");
        let trouble = match phase {
            _ if !pod["metadata"]["deletionTimestamp"].is_null() => {
                Some("it is terminating".into())
            }
            "Running" if ready => None,
            "Running" => waiting(status),
            phase => Some(match waiting(status) {
                Some(reason) => format!("{phase}: {reason}"),
                None => phase.to_owned(),
            }),
        };
        Self {
            namespace: namespace_of(pod).to_owned(),
            name: name_of(pod).to_owned(),
            node: pod["spec"]["nodeName"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            gateway: label_of(pod, GATEWAY_NAME).map(str::to_owned),
            trouble,
            ready,
        }
    }

    /// A port of it.
    pub fn port(&self, port: u16) -> PodPort {
        PodPort {
            namespace: self.namespace.clone(),
            pod: self.name.clone(),
            port,
        }
    }

    /// `name.namespace`.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }
}

/// Why a container does not run: `CrashLoopBackOff`.
fn waiting(status: &Value) -> Option<String> {
    let of = |key: &str| status[key].as_array().cloned().unwrap_or_default();
    let all = [of("initContainerStatuses"), of("containerStatuses")].concat();
    all.iter().find_map(|container| {
        let state = &container["state"];
        let reason = state["waiting"]["reason"].as_str();
        let ended = || {
            // An init container ends well.
            let ended = &state["terminated"];
            ended["reason"].as_str().filter(|_| ended["exitCode"] != 0)
        };
        let name = container["name"].as_str().unwrap_or_default();
        Some(format!("container {name}: {}", reason.or_else(ended)?))
    })
}

impl Kubernetes {
    /// The pods of a part of the mesh, by name.
    ///
    /// # Errors
    /// When there is no right to list pods, or no answer.
    pub fn mesh_pods(&self, role: Role) -> anyhow::Result<Vec<PodView>> {
        let namespace = Some(self.istio_namespace());
        self.pods(namespace, Some(role.selector()))
    }

    /// [`Self::mesh_pods`] that can be asked.
    ///
    /// # Errors
    /// Also when there is none.
    pub fn running_mesh_pods(&self, role: Role) -> anyhow::Result<Vec<PodView>> {
        let all = self.mesh_pods(role)?;
        if all.is_empty() {
            bail!(
                "{} has no {} in namespace {}: `adit install` makes one",
                self.name(),
                role.name(),
                self.istio_namespace()
            );
        }
        Ok(all)
    }

    /// The pods of every waypoint, by name.
    ///
    /// # Errors
    /// As [`Self::mesh_pods`].
    pub fn waypoint_pods(&self, namespace: Option<&str>) -> anyhow::Result<Vec<PodView>> {
        self.pods(namespace, Some(WAYPOINTS))
    }

    /// Pods, by namespace and name.
    ///
    /// # Errors
    /// As [`Self::mesh_pods`].
    pub fn pods(
        &self,
        namespace: Option<&str>,
        labels: Option<&str>,
    ) -> anyhow::Result<Vec<PodView>> {
        let found = match labels {
            Some(labels) => self.list_labelled("pods", namespace, labels)?,
            None => self.list("pods", namespace)?,
        };
        let mut pods: Vec<PodView> = found.iter().map(PodView::of).collect();
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Ok(pods)
    }

    /// The pod that a user means: `[pod/]name[.namespace]`, `namespace/name`, or
    /// `kind/name[.namespace]` of what selects pods, whose first running one is taken.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, text: &str, namespace: Option<&str>) -> anyhow::Result<PodView> {
        let own = namespace.unwrap_or_else(|| self.default_namespace());
        let (kind, rest) = match text.split_once('/') {
            Some((kind, rest)) => (kind, rest),
            None => ("pod", text),
        };
        let (name, namespace) = match rest.split_once('.') {
            Some((name, namespace)) => (name, namespace),
            None => (rest, own),
        };
        if matches!(kind, "pod" | "pods" | "po") {
            let found = self.get("pods", namespace, name)?;
            // A pod's name may have dots.
            let found = match found {
                None if rest != name => self.get("pods", own, rest)?,
                found => found,
            };
            let found =
                found.with_context(|| format!("{} has no pod {namespace}/{name}", self.name()))?;
            return Ok(PodView::of(&found));
        }
        let object = self.get(kind, namespace, name)?;
        let object =
            object.with_context(|| format!("{} has no {kind} {namespace}/{name}", self.name()))?;
        let selector = selector(&object)
            .ok_or_else(|| UsageError(format!("{kind} {namespace}/{name} does not select pods")))?;
        let pods = self.pods(Some(namespace), Some(&selector))?;
        let running = pods.iter().find(|pod| pod.trouble.is_none());
        running
            .or(pods.first())
            .cloned()
            .with_context(|| format!("{kind} {namespace}/{name} has no pods"))
    }
}

/// The labels that an object selects pods by.
fn selector(object: &Value) -> Option<String> {
    let selector = &object["spec"]["selector"];
    let labels = match &selector["matchLabels"] {
        Value::Object(labels) => labels,
        _ => selector.as_object()?,
    };
    let pairs: Option<Vec<String>> = labels
        .iter()
        .map(|(key, value)| Some(format!("{key}={}", value.as_str()?)))
        .collect();
    pairs.filter(|pairs| !pairs.is_empty()).map(|p| p.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_that_does_not_run_says_why() {
        let pod = |status: Value| {
            let metadata = json!({"name": "z", "namespace": "istio-system"});
            PodView::of(&json!({"metadata": metadata, "spec": {}, "status": status})).trouble
        };
        let crash =
            json!([{"name": "istio-proxy", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]);
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let table = [
            (json!({"phase": "Running", "conditions": ready}), None),
            (json!({"phase": "Running"}), None),
            (
                json!({"phase": "Running", "containerStatuses": crash}),
                Some("container istio-proxy: CrashLoopBackOff"),
            ),
            (json!({"phase": "Pending"}), Some("Pending")),
            (
                json!({"phase": "Pending", "containerStatuses": crash}),
                Some("Pending: container istio-proxy: CrashLoopBackOff"),
            ),
        ];
        for (status, expected) in table {
            assert_eq!(pod(status.clone()).as_deref(), expected, "{status}");
        }
    }

    #[test]
    fn what_selects_pods() {
        let deployment = json!({"spec": {"selector": {"matchLabels": {"a": "1", "b": "2"}}}});
        let service = json!({"spec": {"selector": {"a": "1"}}});
        assert_eq!(selector(&deployment).as_deref(), Some("a=1,b=2"));
        assert_eq!(selector(&service).as_deref(), Some("a=1"));
        assert_eq!(selector(&json!({"spec": {}})), None);
    }
}
