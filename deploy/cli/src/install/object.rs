//! A Kubernetes object as it is applied.

use std::fmt;

use serde_json::Value;

/// Which object: what an error names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// Group and version.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Empty: cluster-wide.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectId {
    /// The group, without the version; empty is the core.
    pub fn group(&self) -> &str {
        self.api_version
            .rsplit_once('/')
            .map_or("", |(group, _)| group)
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// A manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Which.
    pub id: ObjectId,
    /// All of it.
    pub manifest: Value,
}

impl Object {
    /// Reads what every object has.
    ///
    /// # Errors
    /// What is missing.
    pub fn new(manifest: Value) -> Result<Self, String> {
        let text = |value: &Value, field: &str| {
            let text = value.as_str().filter(|text| !text.is_empty());
            text.map(str::to_owned)
                .ok_or_else(|| format!("{field} is missing"))
        };
        let metadata = &manifest["metadata"];
        let id = ObjectId {
            api_version: text(&manifest["apiVersion"], "apiVersion")?,
            kind: text(&manifest["kind"], "kind")?,
            namespace: metadata["namespace"].as_str().unwrap_or_default().into(),
            name: text(&metadata["name"], "metadata.name")?,
        };
        Ok(Self { id, manifest })
    }

    /// What has to be there before what: the order in which objects are applied.
    pub fn order(&self) -> (usize, &ObjectId) {
        const FIRST: [&str; 12] = [
            "Namespace",
            "ResourceQuota",
            "CustomResourceDefinition",
            "ServiceAccount",
            "ClusterRole",
            "ClusterRoleBinding",
            "Role",
            "RoleBinding",
            "ConfigMap",
            "Service",
            "Deployment",
            "DaemonSet",
        ];
        let rank = FIRST.iter().position(|kind| *kind == self.id.kind);
        // The webhook comes last: it must not refuse what is applied with it.
        (rank.unwrap_or(FIRST.len()), &self.id)
    }
}
