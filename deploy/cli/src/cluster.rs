//! Where the objects are that a command reads and changes. Today that is a local mesh;
//! a Kubernetes API server can stand at the same place.

use std::collections::BTreeMap;

use adit_local::{Applied, ApplyOutcome, Labels, Request, Running};
use anyhow::Context as _;
use serde_json::Value;

use crate::local::the_mesh;

/// Flags that choose the cluster.
#[derive(Debug, Clone, clap::Args)]
pub struct ClusterArgs {
    /// Local mesh [default: the only one that runs]
    #[arg(long, value_name = "NAME", global = true)]
    pub mesh: Option<String>,
}

impl ClusterArgs {
    /// The cluster that the flags choose.
    ///
    /// # Errors
    /// When there is none, or several.
    pub fn open(&self) -> anyhow::Result<Cluster> {
        Ok(Cluster::Local(the_mesh(self.mesh.as_deref())?))
    }
}

/// A store of objects.
#[derive(Debug, Clone)]
pub enum Cluster {
    /// A mesh of network namespaces on this machine.
    Local(Running),
}

impl Cluster {
    /// Every object of a kind, in one namespace or in all, with its status.
    pub fn list(&self, kind: &str, namespace: Option<&str>) -> anyhow::Result<Vec<Value>> {
        let Self::Local(mesh) = self;
        let mut all = mesh.objects(kind)?;
        if let Some(wanted) = namespace {
            all.retain(|object| namespace_of(object) == wanted);
        }
        Ok(all)
    }

    /// One object with its status.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<Option<Value>> {
        let all = self.list(kind, None)?;
        let mut named = all.into_iter().filter(|o| o["metadata"]["name"] == name);
        Ok(named.find(|o| {
            // Namespaces, nodes and classes have none.
            o["metadata"]["namespace"].is_null() || namespace_of(o) == namespace
        }))
    }

    /// Creates or changes objects; what became of each.
    pub fn apply(&self, objects: Vec<Value>) -> anyhow::Result<Vec<ApplyOutcome>> {
        let Self::Local(mesh) = self;
        Ok(mesh.request_for(&Request::Apply { objects })?)
    }

    /// Removes an object.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<()> {
        let Self::Local(mesh) = self;
        Ok(mesh.request(&Request::Delete {
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        })?)
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
        let Self::Local(mesh) = self;
        Ok(mesh.request_for(&Request::Label {
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
            labels,
            overwrite,
        })?)
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
