//! The objects of a running mesh as its control plane sees them, with the status that
//! it writes back: what `kubectl get -o json` would show.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::control::Running;
use crate::error::LocalError;
use crate::manifest::{self, Identity, SourceFile};

impl Running {
    /// Every object of a kind, as a user names it (`gateway`, `Gateways`, `svc`), sorted
    /// by namespace and name, with `status` where the control plane has written one.
    ///
    /// # Errors
    /// [`LocalError::File`] when the mesh's state cannot be read.
    pub fn objects(&self, kind: &str) -> Result<Vec<Value>, LocalError> {
        let (files, _) = manifest::read_directory(&self.cluster_directory())?;
        let mut found = BTreeMap::new();
        for file in &files {
            for (_, value) in manifest::values(file) {
                if let Some(identity) = Identity::of(&value)
                    && manifest::is_kind(kind, &identity.group, &identity.kind)
                {
                    found.insert(identity, value);
                }
            }
        }
        let status = self.control_plane_status_directory();
        for (identity, object) in &mut found {
            if let Some(item) = status_of(&status, identity)? {
                merge_status(object, item);
            }
        }
        Ok(found.into_values().collect())
    }
}

/// A condition that does not hold, of an object or of one of its attachments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FalseCondition {
    /// Kind, namespace and name, for people.
    pub object: String,
    /// Its type, for example `ResolvedRefs`.
    pub condition: String,
    /// Why, in one word.
    pub reason: String,
    /// Why, for people.
    pub message: String,
}

impl Running {
    /// What the control plane finds wrong with objects.
    ///
    /// # Errors
    /// [`LocalError::File`] when its status directory cannot be read.
    pub fn false_conditions(&self) -> Result<Vec<FalseCondition>, LocalError> {
        let directory = self.control_plane_status_directory();
        let (files, _) = manifest::read_directory(&directory)?;
        let mut all = Vec::new();
        for file in files {
            let path = directory.join(&file.relative);
            let kind = file.relative.with_extension("");
            let status: StatusFile = serde_json::from_str(&file.text)
                .map_err(|error| LocalError::file("understand", &path)(error.into()))?;
            for item in &status.items {
                let text = |key: &str| item[key].as_str().unwrap_or_default();
                let object = match text("namespace") {
                    "" => format!("{} {}", kind.display(), text("name")),
                    namespace => format!("{} {namespace}/{}", kind.display(), text("name")),
                };
                collect_false(item, &object, &mut all);
            }
        }
        Ok(all)
    }
}

/// Conditions stand in the object, its listeners, its parents and its ancestors.
fn collect_false(value: &Value, object: &str, all: &mut Vec<FalseCondition>) {
    match value {
        Value::Object(fields) => {
            let text = |key: &str| fields.get(key).and_then(Value::as_str);
            if let (Some(condition), Some("False")) = (text("type"), text("status")) {
                all.push(FalseCondition {
                    object: object.into(),
                    condition: condition.into(),
                    reason: text("reason").unwrap_or_default().into(),
                    message: text("message").unwrap_or_default().into(),
                });
            }
            for value in fields.values() {
                collect_false(value, object, all);
            }
        }
        Value::Array(items) => {
            for item in items {
                collect_false(item, object, all);
            }
        }
        _ => {}
    }
}

#[derive(Deserialize)]
struct StatusFile {
    items: Vec<Value>,
}

/// `<Kind>.json` of the status directory, one item for each object.
fn status_of(directory: &Path, identity: &Identity) -> Result<Option<Value>, LocalError> {
    let path = directory.join(format!("{}.json", identity.kind));
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LocalError::file("read", &path)(error)),
    };
    let file: StatusFile = serde_json::from_slice(&text)
        .map_err(|error| LocalError::file("understand", &path)(error.into()))?;
    let same = |item: &Value| {
        let namespace = item["namespace"].as_str().unwrap_or_default();
        namespace == identity.namespace && item["name"] == identity.name.as_str()
    };
    Ok(file.items.into_iter().find(same))
}

fn merge_status(object: &mut Value, item: Value) {
    let Value::Object(item) = item else { return };
    for (key, value) in item {
        match key.as_str() {
            "namespace" | "name" | "uid" | "nodeName" => {}
            "annotations" => {
                for (key, value) in value.as_object().into_iter().flatten() {
                    object["metadata"]["annotations"][key] = value.clone();
                }
            }
            "status" => object["status"] = value,
            _ => object["status"][key] = value,
        }
    }
}

/// The objects of manifests in `text`, for `apply`.
///
/// # Errors
/// [`LocalError::Manifest`] with the line of the document that is no YAML, or no object.
pub fn read_manifests(text: &str) -> Result<Vec<Value>, LocalError> {
    let file = SourceFile {
        relative: "-".into(),
        text: text.into(),
    };
    manifest::checked_values(&file).map_err(LocalError::Manifest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_false_is_found_wherever_it_stands() {
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": "R", "message": "m"});
        let item = json!({
            "namespace": "shop", "name": "reviews",
            "conditions": [condition("Accepted", "True")],
            "parents": [{"parentRef": {"name": "reviews"}, "conditions": [
                condition("Accepted", "True"), condition("ResolvedRefs", "False")]}],
        });
        let mut all = Vec::new();
        collect_false(&item, "HTTPRoute shop/reviews", &mut all);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].condition, "ResolvedRefs");
        assert_eq!(all[0].object, "HTTPRoute shop/reviews");
    }

    #[test]
    fn status_becomes_the_objects() {
        let mut object = json!({"metadata": {"name": "w"}});
        let item = json!({"namespace": "shop", "name": "w", "conditions": [1],
            "annotations": {"a": "b"}});
        merge_status(&mut object, item);
        assert_eq!(
            object,
            json!({"metadata": {"name": "w", "annotations": {"a": "b"}},
                "status": {"conditions": [1]}})
        );
    }
}
