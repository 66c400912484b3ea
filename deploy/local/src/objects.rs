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
