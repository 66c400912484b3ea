//! What was applied to a running mesh, over the user's manifests: whole objects, and
//! changes of labels. Kept in the mesh's state directory, one file for each object, so
//! that a supervisor that is started again finds them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::LocalError;
use crate::manifest::{self, Identity, SourceFile};
use crate::state::write_atomically;

/// Where applied objects stand among the manifests that `aditd` reads.
const DIRECTORY: &str = "adit-applied";
/// Objects that one mesh keeps.
const MAX_OBJECTS: usize = 10_000;
/// One applied object; what Kubernetes' store takes.
const MAX_OBJECT: usize = 3 << 19;

/// What became of an applied object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Applied {
    /// It was not there.
    Created,
    /// It was there and was another.
    Configured,
    /// It is what it was.
    Unchanged,
}

/// Labels that are set, or with `None` removed.
pub type Labels = BTreeMap<String, Option<String>>;

/// The overlay of one mesh.
#[derive(Debug)]
pub(crate) struct Overlay {
    directory: PathBuf,
    objects: BTreeMap<Identity, Value>,
    labels: BTreeMap<Identity, Labels>,
}

/// The overlay over certain files.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Resolved {
    /// The objects as files, beside the user's.
    pub(crate) files: Vec<SourceFile>,
    /// Documents of the user that they stand for.
    pub(crate) hidden: BTreeSet<Identity>,
}

#[derive(Serialize, Deserialize)]
struct LabelFile {
    /// Of the object, without anything else of it.
    object: Value,
    labels: Labels,
}

impl Overlay {
    /// Reads what `directory` holds; it need not be there.
    pub(crate) fn open(directory: &Path) -> Result<Self, LocalError> {
        let mut overlay = Self {
            directory: directory.into(),
            objects: BTreeMap::new(),
            labels: BTreeMap::new(),
        };
        for (kind, is_object) in [("objects", true), ("labels", false)] {
            let directory = directory.join(kind);
            if !directory.exists() {
                continue;
            }
            let (files, _) = manifest::read_directory(&directory)?;
            for file in files {
                let path = directory.join(&file.relative);
                let failed =
                    |error: serde_json::Error| LocalError::file("understand", &path)(error.into());
                if is_object {
                    let object: Value = serde_json::from_str(&file.text).map_err(failed)?;
                    if let Some(identity) = Identity::of(&object) {
                        overlay.objects.insert(identity, object);
                    }
                } else {
                    let file: LabelFile = serde_json::from_str(&file.text).map_err(failed)?;
                    if let Some(identity) = Identity::of(&file.object) {
                        overlay.labels.insert(identity, file.labels);
                    }
                }
            }
        }
        Ok(overlay)
    }

    /// Names of the applied objects and of those with changed labels, for people.
    pub(crate) fn names(&self) -> Vec<String> {
        let name = |identity: &Identity| format!("{} {}", identity.kind, identity.path());
        let objects = self.objects.keys().map(name);
        let labels = self.labels.iter().map(|(identity, labels)| {
            let one = |(key, value): (&String, &Option<String>)| match value {
                Some(value) => format!("{key}={value}"),
                None => format!("{key}-"),
            };
            let labels: Vec<String> = labels.iter().map(one).collect();
            format!("{} ({})", name(identity), labels.join(", "))
        });
        objects.chain(labels).collect()
    }

    /// Puts the object in, in the place of one with the same identity. `before` is that
    /// of the user's manifests.
    pub(crate) fn apply(
        &mut self,
        mut object: Value,
        before: Option<&Value>,
        now: Timestamp,
    ) -> Result<Applied, LocalError> {
        let identity = Identity::of(&object).ok_or_else(|| {
            LocalError::Manifest("apiVersion, kind and metadata.name are required".into())
        })?;
        if let Value::Object(map) = &mut object {
            // The cluster's to say.
            map.remove("status");
        }
        let effective = match before {
            None => self.objects.get(&identity).cloned(),
            Some(before) => Some(self.effective(&identity, before)),
        };
        // The older of two objects wins in many places: the time stays.
        let created = &mut object["metadata"]["creationTimestamp"];
        if created.is_null() {
            let known = effective
                .as_ref()
                .map(|o| &o["metadata"]["creationTimestamp"]);
            *created = match known {
                Some(Value::String(known)) => known.clone().into(),
                _ if effective.is_some() => Value::Null,
                _ => now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into(),
            };
        }
        if object["metadata"]["creationTimestamp"].is_null()
            && let Some(metadata) = object["metadata"].as_object_mut()
        {
            metadata.remove("creationTimestamp");
        }
        if effective.as_ref() == Some(&object) {
            return Ok(Applied::Unchanged);
        }
        if self.objects.len() >= MAX_OBJECTS && !self.objects.contains_key(&identity) {
            let text = format!("{MAX_OBJECTS} objects have been applied already");
            return Err(LocalError::Manifest(text));
        }
        self.store(identity, object)?;
        Ok(match effective {
            None => Applied::Created,
            Some(_) => Applied::Configured,
        })
    }

    /// Takes an applied object out; says whether it was there.
    pub(crate) fn delete(&mut self, identity: &Identity) -> Result<bool, LocalError> {
        if self.objects.remove(identity).is_none() {
            return Ok(false);
        }
        self.remove_file("objects", identity)?;
        Ok(true)
    }

    /// Changes labels of an applied object, or of one of the user's manifests, which is
    /// `before`. One that is set to something else is changed only with `overwrite`.
    pub(crate) fn label(
        &mut self,
        identity: &Identity,
        before: Option<&Value>,
        labels: &Labels,
        overwrite: bool,
    ) -> Result<Applied, LocalError> {
        let applied = self.objects.get(identity).cloned();
        let was_applied = applied.is_some();
        let unknown = || not_found(identity);
        let object = match (applied, before) {
            (Some(object), _) => object,
            (None, Some(before)) => self.effective(identity, before),
            (None, None) => return Err(unknown()),
        };
        let current = &object["metadata"]["labels"];
        for (key, value) in labels {
            let taken = current[key].as_str();
            if let (Some(taken), Some(value)) = (taken, value)
                && taken != value
                && !overwrite
            {
                return Err(LocalError::Refused(format!(
                    "'{key}' already has a value ({taken}), and --overwrite is false"
                )));
            }
        }
        let changed = labelled(object.clone(), labels);
        if changed == object {
            return Ok(Applied::Unchanged);
        }
        if was_applied {
            self.store(identity.clone(), changed)?;
            return Ok(Applied::Configured);
        }
        let mut all = self.labels.get(identity).cloned().unwrap_or_default();
        all.extend(labels.clone());
        // What the manifest says by itself need not be said again.
        let own = before.map(|before| &before["metadata"]["labels"]);
        all.retain(|key, value| own.and_then(|own| own[key].as_str()) != value.as_deref());
        if all.is_empty() {
            self.labels.remove(identity);
            self.remove_file("labels", identity)?;
            return Ok(Applied::Configured);
        }
        let file = LabelFile {
            object: skeleton(identity),
            labels: all.clone(),
        };
        self.write("labels", identity, &file)?;
        self.labels.insert(identity.clone(), all);
        Ok(Applied::Configured)
    }

    /// What the overlay makes of the user's `files`.
    pub(crate) fn resolve(&self, files: &[SourceFile]) -> Resolved {
        let mut resolved = Resolved::default();
        for (identity, object) in &self.objects {
            resolved.files.push(source_file(identity, object));
            resolved.hidden.insert(identity.clone());
        }
        for identity in self.labels.keys() {
            let before = match find(files, identity) {
                Some(before) => before,
                // It is there as soon as anything is in it.
                None if identity.kind == "Namespace" => skeleton(identity),
                None => continue,
            };
            let object = self.effective(identity, &before);
            resolved.files.push(source_file(identity, &object));
            resolved.hidden.insert(identity.clone());
        }
        resolved
    }

    /// An object of the user's with what was changed about it.
    fn effective(&self, identity: &Identity, before: &Value) -> Value {
        match (self.objects.get(identity), self.labels.get(identity)) {
            (Some(object), _) => object.clone(),
            (None, Some(labels)) => labelled(before.clone(), labels),
            (None, None) => before.clone(),
        }
    }

    fn store(&mut self, identity: Identity, object: Value) -> Result<(), LocalError> {
        if object.to_string().len() > MAX_OBJECT {
            let text = format!("{identity}: larger than {MAX_OBJECT} bytes");
            return Err(LocalError::Manifest(text));
        }
        self.write("objects", &identity, &object)?;
        if self.labels.remove(&identity).is_some() {
            self.remove_file("labels", &identity)?;
        }
        self.objects.insert(identity, object);
        Ok(())
    }

    fn path(&self, kind: &str, identity: &Identity) -> PathBuf {
        let relative = relative(identity).with_extension("json");
        self.directory.join(kind).join(relative)
    }

    fn write(
        &self,
        kind: &str,
        identity: &Identity,
        content: &impl Serialize,
    ) -> Result<(), LocalError> {
        let path = self.path(kind, identity);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(LocalError::file("create", parent))?;
        }
        let text = serde_json::to_vec_pretty(content)
            .map_err(|error| LocalError::file("write", &path)(error.into()))?;
        write_atomically(&path, &text)
    }

    fn remove_file(&self, kind: &str, identity: &Identity) -> Result<(), LocalError> {
        let path = self.path(kind, identity);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(LocalError::file("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }
}

/// The document of an object among the user's files; the last one counts.
pub(crate) fn find(files: &[SourceFile], identity: &Identity) -> Option<Value> {
    place(files, identity).map(|(_, object)| object)
}

/// [`find`], with `file:line`.
pub(crate) fn place(files: &[SourceFile], identity: &Identity) -> Option<(String, Value)> {
    let candidates = files.iter().rev().filter(|file| {
        // Most files need not be understood to know that it is not in them.
        file.text.contains(&identity.name) && file.text.contains(&identity.kind)
    });
    candidates
        .flat_map(|file| {
            let all = manifest::values(file).into_iter().rev();
            all.map(|(line, value)| (format!("{}:{line}", file.relative.display()), value))
        })
        .find(|(_, value)| Identity::of(value).as_ref() == Some(identity))
}

/// The answer of an API server about what is not there.
pub(crate) fn not_found(identity: &Identity) -> LocalError {
    let plural = manifest::plural(&identity.kind.to_ascii_lowercase());
    let group = match identity.group.as_str() {
        "" => String::new(),
        group => format!(".{group}"),
    };
    LocalError::Refused(format!("{plural}{group} {:?} not found", identity.path()))
}

fn labelled(mut object: Value, changes: &Labels) -> Value {
    let Some(metadata) = object["metadata"].as_object_mut() else {
        return object;
    };
    let labels = metadata
        .entry("labels")
        .or_insert_with(|| Value::Object(Map::new()));
    if !labels.is_object() {
        *labels = Value::Object(Map::new());
    }
    if let Value::Object(labels) = labels {
        for (key, value) in changes {
            match value {
                Some(value) => labels.insert(key.clone(), value.clone().into()),
                None => labels.remove(key),
            };
        }
    }
    if metadata["labels"].as_object().is_some_and(Map::is_empty) {
        metadata.remove("labels");
    }
    object
}

fn skeleton(identity: &Identity) -> Value {
    let version = match identity.group.as_str() {
        "" => "v1".to_owned(),
        group => format!("{group}/v1"),
    };
    let mut object = json!({"apiVersion": version, "kind": identity.kind,
        "metadata": {"name": identity.name}});
    if !identity.namespace.is_empty() {
        object["metadata"]["namespace"] = identity.namespace.clone().into();
    }
    object
}

/// Names are object names, and kinds and groups have been checked: none leaves its
/// directory.
fn relative(identity: &Identity) -> PathBuf {
    let kind = match identity.group.as_str() {
        "" => identity.kind.clone(),
        group => format!("{}.{group}", identity.kind),
    };
    let namespace = match identity.namespace.as_str() {
        "" => "_",
        namespace => namespace,
    };
    // Not `with_extension`: names have dots.
    Path::new(&kind)
        .join(namespace)
        .join(format!("{}.yaml", identity.name))
}

fn source_file(identity: &Identity, object: &Value) -> SourceFile {
    SourceFile {
        relative: Path::new(DIRECTORY).join(relative(identity)),
        // Values that came from JSON or YAML have a YAML form.
        text: serde_yaml_ng::to_string(object).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    fn files() -> Vec<SourceFile> {
        let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {a: b}}\n---\n\
                    apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n";
        vec![SourceFile {
            relative: "shop.yaml".into(),
            text: text.into(),
        }]
    }

    fn identity(kind: &str, namespace: &str, name: &str) -> Identity {
        Identity {
            group: String::new(),
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    fn gateway(class: &str) -> Value {
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": "waypoint", "namespace": "shop"},
            "spec": {"gatewayClassName": class}, "status": {"addresses": []}})
    }

    #[test]
    fn objects_come_change_stay_and_go() -> Result<(), LocalError> {
        let directory = tempfile::tempdir().map_err(LocalError::system("tempdir"))?;
        let mut overlay = Overlay::open(directory.path())?;
        assert_eq!(overlay.apply(gateway("a"), None, NOW)?, Applied::Created);
        let later = Timestamp::from_second(60).unwrap_or(NOW);
        assert_eq!(
            overlay.apply(gateway("a"), None, later)?,
            Applied::Unchanged
        );
        assert_eq!(
            overlay.apply(gateway("b"), None, later)?,
            Applied::Configured
        );
        let overlay = Overlay::open(directory.path())?;
        let resolved = overlay.resolve(&files());
        assert_eq!(resolved.files.len(), 1);
        let text = &resolved.files[0].text;
        assert!(text.contains("gatewayClassName: b") && text.contains("1970-01-01T00:00:00Z"));
        assert!(!text.contains("status"), "{text}");
        let mut overlay = overlay;
        let key = Identity::of(&gateway("a")).ok_or(LocalError::Config(String::new()))?;
        assert!(overlay.delete(&key)?);
        assert!(!overlay.delete(&key)?);
        assert_eq!(
            Overlay::open(directory.path())?.resolve(&[]),
            Resolved::default()
        );
        Ok(())
    }

    #[test]
    fn labels_are_a_patch_that_goes_when_it_says_nothing() -> Result<(), LocalError> {
        let directory = tempfile::tempdir().map_err(LocalError::system("tempdir"))?;
        let mut overlay = Overlay::open(directory.path())?;
        let shop = identity("Namespace", "", "shop");
        let before = find(&files(), &shop);
        let set = |value: Option<&str>| Labels::from([("use".into(), value.map(Into::into))]);
        overlay.label(&shop, before.as_ref(), &set(Some("w")), false)?;
        let mut overlay = Overlay::open(directory.path())?;
        let resolved = overlay.resolve(&files());
        assert!(resolved.hidden.contains(&shop));
        let text = &resolved.files[0].text;
        assert!(text.contains("use: w") && text.contains("a: b"), "{text}");
        let refused = overlay.label(&shop, before.as_ref(), &set(Some("x")), false);
        assert!(refused.is_err_and(|e| e.to_string().contains("already has a value (w)")));
        overlay.label(&shop, before.as_ref(), &set(Some("x")), true)?;
        overlay.label(&shop, before.as_ref(), &set(None), false)?;
        assert_eq!(overlay.resolve(&files()), Resolved::default());
        assert_eq!(overlay.names(), Vec::<String>::new());
        Ok(())
    }

    #[test]
    fn what_is_not_there_cannot_be_labelled() -> Result<(), LocalError> {
        let directory = tempfile::tempdir().map_err(LocalError::system("tempdir"))?;
        let mut overlay = Overlay::open(directory.path())?;
        let web = identity("Service", "shop", "api");
        let labels = Labels::from([("a".into(), Some("b".into()))]);
        let error = overlay.label(&web, None, &labels, false);
        let text = error.err().map(|error| error.to_string());
        assert_eq!(text.as_deref(), Some("services \"shop/api\" not found"));
        Ok(())
    }
}
