//! What every waypoint is run with.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::auth::TrustedAccounts;

/// What every waypoint is run with, unless its Gateway or an overlay says otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct WaypointSettings {
    /// The image.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub pull_policy: String,
    /// Names of Secrets with credentials for the registry.
    pub pull_secrets: Vec<String>,
    /// Resources and placement.
    pub defaults: PodDefaults,
    /// Where the control plane is, for configuration and certificates: a URL.
    pub control_plane: String,
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// The cluster's name.
    pub cluster_id: String,
    /// Suffix of service names.
    pub cluster_domain: String,
    /// The network that pods are on; empty is the default.
    pub network: String,
    /// The revision: Gateways of another one are another control plane's.
    pub revision: String,
    /// Where ConfigMaps with overlays for all Gateways of a class are.
    pub root_namespace: String,
    /// Whom node proxies are known by: no waypoint runs as one of them.
    pub node_accounts: TrustedAccounts,
}

/// Resources and placement of pods, as the chart's `global.waypoint` has them.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodDefaults {
    /// Of the container.
    pub resources: Map<String, Value>,
    /// Of the pod.
    pub affinity: Map<String, Value>,
    /// Of the pod.
    pub topology_spread_constraints: Vec<Value>,
    /// Of the pod.
    pub node_selector: BTreeMap<String, String>,
    /// Of the pod.
    pub tolerations: Vec<Value>,
}

impl WaypointSettings {
    /// The image of a hub and a tag.
    pub fn image_of(hub: &str, tag: &str) -> String {
        format!("{}/waypoint:{tag}", hub.trim_end_matches('/'))
    }
}

impl std::str::FromStr for PodDefaults {
    type Err = serde_json::Error;

    /// Reads JSON; nothing at all is no defaults.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        serde_json::from_str(text)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Those of the usual mesh.
    pub(in crate::provision) fn settings() -> WaypointSettings {
        WaypointSettings {
            image: WaypointSettings::image_of("docker.io/adit", "0.1.0"),
            pull_policy: "IfNotPresent".into(),
            pull_secrets: vec!["registry".into()],
            defaults: r#"{"resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}}"#
                .parse()
                .expect("JSON"),
            control_plane: "https://istiod.istio-system.svc:15012".into(),
            trust_domain: "cluster.local".into(),
            cluster_id: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            network: String::new(),
            revision: "default".into(),
            root_namespace: "istio-system".into(),
            node_accounts: TrustedAccounts::default(),
        }
    }
}
