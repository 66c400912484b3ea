//! Where the objects are that a command reads and changes: a local mesh, or a Kubernetes
//! cluster.

mod choose;

pub use choose::{ClusterArgs, running_meshes};

use std::collections::BTreeMap;
use std::time::Duration;

use adit_local::{Applied, ApplyOutcome, Labels, Request, Running};
use anyhow::Context as _;
use serde_json::Value;

use crate::kubernetes::Kubernetes;

/// A store of objects.
#[derive(Debug, Clone)]
pub enum Cluster {
    /// A mesh of network namespaces on this machine.
    Local(Running),
    /// A Kubernetes API server.
    Kubernetes(Kubernetes),
}

impl Cluster {
    /// Every object of a kind, in one namespace or in all, with its status.
    pub fn list(&self, kind: &str, namespace: Option<&str>) -> anyhow::Result<Vec<Value>> {
        match self {
            Self::Local(mesh) => {
                let mut all = mesh.objects(kind)?;
                if let Some(wanted) = namespace {
                    all.retain(|object| namespace_of(object) == wanted);
                }
                Ok(all)
            }
            Self::Kubernetes(cluster) => cluster.list(kind, namespace),
        }
    }

    /// One object with its status.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<Option<Value>> {
        if let Self::Kubernetes(cluster) = self {
            return cluster.get(kind, namespace, name);
        }
        let all = self.list(kind, None)?;
        let mut named = all.into_iter().filter(|o| o["metadata"]["name"] == name);
        Ok(named.find(|o| {
            // Namespaces, nodes and classes have none.
            o["metadata"]["namespace"].is_null() || namespace_of(o) == namespace
        }))
    }

    /// Creates or changes objects; what became of each.
    pub fn apply(&self, objects: Vec<Value>) -> anyhow::Result<Vec<ApplyOutcome>> {
        match self {
            Self::Local(mesh) => Ok(mesh.request_for(&Request::Apply { objects })?),
            Self::Kubernetes(cluster) => cluster.apply(&objects),
        }
    }

    /// Removes an object.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<()> {
        match self {
            Self::Local(mesh) => Ok(mesh.request(&Request::Delete {
                kind: kind.into(),
                namespace: namespace.into(),
                name: name.into(),
            })?),
            Self::Kubernetes(cluster) => cluster.delete(kind, namespace, name),
        }
    }

    /// Sets labels, and removes those without a value.
    pub fn label(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        labels: Labels,
        overwrite: bool,
    ) -> anyhow::Result<Applied> {
        match self {
            Self::Local(mesh) => Ok(mesh.request_for(&Request::Label {
                kind: kind.into(),
                namespace: namespace.into(),
                name: name.into(),
                labels,
                overwrite,
            })?),
            Self::Kubernetes(cluster) => cluster.label(kind, namespace, name, &labels, overwrite),
        }
    }

    /// Which it is, for people.
    pub fn name(&self) -> String {
        match self {
            Self::Local(mesh) => format!("mesh {}", mesh.name()),
            Self::Kubernetes(cluster) => cluster.name().to_owned(),
        }
    }

    /// How often something that is waited for is looked at.
    pub fn poll_interval(&self) -> Duration {
        match self {
            Self::Local(_) => Duration::from_millis(50),
            Self::Kubernetes(_) => Duration::from_millis(500),
        }
    }

    /// The namespace that is meant where none is named.
    pub fn default_namespace(&self) -> &str {
        match self {
            Self::Local(_) => "default",
            Self::Kubernetes(cluster) => cluster.default_namespace(),
        }
    }

    /// The command that sets a label, for advice.
    pub fn label_command(&self, kind: &str, name: &str, label: &str) -> String {
        match self {
            Self::Local(_) => format!("adit local label {kind} {name} {label}"),
            Self::Kubernetes(_) => format!("kubectl label {kind} {name} {label}"),
        }
    }
}

/// `metadata.namespace`, or `default`.
pub fn namespace_of(object: &Value) -> &str {
    object["metadata"]["namespace"]
        .as_str()
        .unwrap_or("default")
}

/// `metadata.name`.
pub fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// A label.
pub fn label_of<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object["metadata"]["labels"][key].as_str()
}

/// `key=value` sets, `key-` removes.
///
/// # Errors
/// What is neither.
pub fn parse_labels(given: &[String]) -> anyhow::Result<Labels> {
    let parse = |text: &String| {
        if let Some((key, value)) = text.split_once('=') {
            return Ok((key.to_owned(), Some(value.to_owned())));
        }
        let key = text.strip_suffix('-');
        let key = key.with_context(|| format!("{text}: KEY=VALUE or KEY- is expected"))?;
        Ok((key.to_owned(), None))
    };
    given
        .iter()
        .map(parse)
        .collect::<anyhow::Result<BTreeMap<_, _>>>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_set_and_removed() {
        let given = ["a=b".to_owned(), "c-".to_owned(), "d=".to_owned()];
        let labels = parse_labels(&given).unwrap_or_default();
        let expected = BTreeMap::from([
            ("a".to_owned(), Some("b".to_owned())),
            ("c".to_owned(), None),
            ("d".to_owned(), Some(String::new())),
        ]);
        assert_eq!(labels, expected);
        assert!(parse_labels(&["x".to_owned()]).is_err());
    }
}
