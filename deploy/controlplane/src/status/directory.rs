//! The status directory: one JSON file for each kind, replaced as a whole.
//!
//! Losing it costs a moment in which clients use plaintext for pods whose nodes have not
//! reported again, so it is written before anything that relies on it is published.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::wire::{Item, ItemFile};
use super::{CapturedPod, ObjectStatus, REDIRECTION, StoredStatus, rfc3339};
use crate::model::{Kind, ObjectRef};

/// A status file is at most this long.
const MAX_BYTES: u64 = 256 << 20;

/// A status file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The content is not what was written there.
    #[error("{}: {source}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// The status directory.
#[derive(Debug)]
pub struct StatusStore {
    directory: Option<PathBuf>,
    pods: BTreeMap<Arc<str>, CapturedPod>,
    objects: BTreeMap<ObjectRef, Kept>,
}

/// The status of an object, as it was given and as it is written.
#[derive(Debug, Clone, Default)]
struct Kept {
    /// With the generation that it is of. `None`: read from the file, and not given since.
    status: Option<(ObjectStatus, Option<i64>)>,
    item: Item,
}

#[derive(Serialize, Deserialize)]
struct PodFile {
    items: Vec<PodItem>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodItem {
    namespace: String,
    name: String,
    uid: String,
    node_name: String,
    annotations: BTreeMap<String, String>,
}

const POD_FILE: &str = "Pod.json";

/// The file of a kind.
fn file_of(kind: Kind) -> String {
    format!("{kind}.json")
}

/// Reads what a status directory says about the objects of a kind, pods excepted.
///
/// # Errors
/// A file that cannot be read. One that is not there says nothing.
pub fn read_statuses(directory: &Path, kind: Kind) -> Result<Vec<StoredStatus>, StatusError> {
    let file: Option<ItemFile> = read(&directory.join(file_of(kind)))?;
    Ok(file.map(|file| file.items).unwrap_or_default())
}

impl StatusStore {
    /// Keeps status in memory only.
    pub fn in_memory() -> Self {
        Self {
            directory: None,
            pods: BTreeMap::new(),
            objects: BTreeMap::new(),
        }
    }

    /// Opens the directory, which is made if it is not there, and reads what it holds.
    ///
    /// # Errors
    /// A directory that cannot be made, and a file that cannot be read.
    pub fn open(directory: &Path) -> Result<Self, StatusError> {
        fs::create_dir_all(directory).map_err(|source| StatusError::Io {
            path: directory.into(),
            source,
        })?;
        let mut store = Self {
            directory: Some(directory.into()),
            ..Self::in_memory()
        };
        let pods: Option<PodFile> = read(&directory.join(POD_FILE))?;
        for pod in pods.into_iter().flat_map(|file| file.items) {
            if pod.annotations.get(REDIRECTION).map(String::as_str) == Some("enabled") {
                let captured = CapturedPod {
                    uid: pod.uid.into(),
                    node: pod.node_name.into(),
                    namespace: pod.namespace.into(),
                    name: pod.name.into(),
                };
                store.pods.insert(captured.uid.clone(), captured);
            }
        }
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Pod) {
            for item in read_statuses(directory, kind)? {
                let reference = ObjectRef {
                    kind,
                    namespace: item.namespace.as_str().into(),
                    name: item.name.as_str().into(),
                };
                store.objects.insert(reference, Kept { status: None, item });
            }
        }
        Ok(store)
    }

    /// Pods that were captured when this was last written.
    pub fn captured(&self) -> impl Iterator<Item = &CapturedPod> {
        self.pods.values()
    }

    /// Replaces the captured pods. Writes only if something changed.
    ///
    /// # Errors
    /// The file system's. The new state is kept in memory, and written with the next call.
    pub fn set_captured(
        &mut self,
        pods: impl IntoIterator<Item = CapturedPod>,
    ) -> Result<(), StatusError> {
        let pods: BTreeMap<_, _> = pods.into_iter().map(|pod| (pod.uid.clone(), pod)).collect();
        if pods == self.pods {
            return Ok(());
        }
        let items = pods.values().map(|pod| PodItem {
            namespace: pod.namespace.to_string(),
            name: pod.name.to_string(),
            uid: pod.uid.to_string(),
            node_name: pod.node.to_string(),
            annotations: [(REDIRECTION.to_owned(), "enabled".to_owned())].into(),
        });
        let file = PodFile {
            items: items.collect(),
        };
        self.write(POD_FILE, &file)?;
        self.pods = pods;
        Ok(())
    }

    /// Replaces the status of all objects. Writes the kinds in which something changed; a
    /// condition whose status stays the same keeps its time. `generation` says which version
    /// of an object was looked at, where that is known.
    ///
    /// # Errors
    /// The file system's. What could not be written is written with the next call.
    pub fn set_statuses<'a>(
        &mut self,
        statuses: impl IntoIterator<Item = (&'a ObjectRef, &'a ObjectStatus)>,
        generation: impl Fn(&ObjectRef) -> Option<i64>,
        now: SystemTime,
    ) -> Result<(), StatusError> {
        let now = rfc3339(now);
        let mut changed = BTreeSet::new();
        let mut objects = BTreeMap::new();
        for (reference, status) in statuses {
            let before = self.objects.get(reference);
            let generation = generation(reference);
            let is_same = |kept: &Kept| {
                let known = kept.status.as_ref();
                known.is_some_and(|(known, of)| known == status && *of == generation)
            };
            let kept = match before {
                Some(kept) if is_same(kept) => kept.clone(),
                before => {
                    let known = before.map(|kept| &kept.item);
                    let item = Item::new(reference, status, generation, known, &now);
                    if before.is_none_or(|kept| kept.item != item) {
                        changed.insert(reference.kind);
                    }
                    let status = Some((status.clone(), generation));
                    Kept { status, item }
                }
            };
            objects.insert(reference.clone(), kept);
        }
        let gone = self
            .objects
            .keys()
            .filter(|key| !objects.contains_key(*key));
        changed.extend(gone.map(|key| key.kind));
        for kind in &changed {
            let of_kind = objects.iter().filter(|(key, _)| key.kind == *kind);
            let file = ItemFile {
                items: of_kind.map(|(_, kept)| kept.item.clone()).collect(),
            };
            self.write(&file_of(*kind), &file)?;
        }
        self.objects = objects;
        Ok(())
    }

    /// Readers see the old file or the new one, also after a crash.
    fn write(&self, name: &str, content: &impl Serialize) -> Result<(), StatusError> {
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        let path = directory.join(name);
        let text = serde_json::to_vec_pretty(content).map_err(|source| StatusError::Content {
            path: path.clone(),
            source,
        })?;
        let temporary = directory.join(format!(".{name}.new"));
        let replaced = File::create(&temporary).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(directory)?.sync_all()
        });
        replaced.map_err(|source| StatusError::Io { path, source })
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, StatusError> {
    let failed = |source| StatusError::Io {
        path: path.into(),
        source,
    };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if metadata.len() > MAX_BYTES => {
            return Err(failed(io::Error::other("is too large")));
        }
        Ok(_) => {}
    }
    let text = fs::read(path).map_err(failed)?;
    let content = serde_json::from_slice(&text).map_err(|source| StatusError::Content {
        path: path.into(),
        source,
    })?;
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use super::super::Condition;
    use super::*;

    #[test]
    fn survives_a_restart() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("status");
        let pod = CapturedPod {
            uid: "u".into(),
            node: "n".into(),
            namespace: "a".into(),
            name: "p".into(),
        };
        let mut store = StatusStore::open(&path).expect("opens");
        assert_eq!(store.captured().count(), 0);
        store.set_captured([pod.clone()]).expect("writes");
        let text = fs::read_to_string(path.join(POD_FILE)).expect("a file");
        assert!(
            text.contains(r#""ambient.istio.io/redirection": "enabled""#),
            "{text}"
        );
        let store = StatusStore::open(&path).expect("opens again");
        assert_eq!(store.captured().collect::<Vec<_>>(), [&pod]);
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let directory = tempfile::tempdir().expect("a directory");
        let reference = ObjectRef {
            kind: Kind::AuthorizationPolicy,
            namespace: "a".into(),
            name: "p".into(),
        };
        let condition = |status, message: &str| ObjectStatus {
            conditions: vec![Condition::new("ZtunnelAccepted", status, "R", message)],
            ..ObjectStatus::default()
        };
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let text = || {
            fs::read_to_string(directory.path().join("AuthorizationPolicy.json")).expect("a file")
        };
        let mut store = StatusStore::open(directory.path()).expect("opens");
        store
            .set_statuses([(&reference, &condition(false, "one"))], |_| Some(1), at(0))
            .expect("writes");
        assert!(text().contains("1970-01-01T00:00:00Z"));
        let mut store = StatusStore::open(directory.path()).expect("opens again");
        store
            .set_statuses(
                [(&reference, &condition(false, "two"))],
                |_| Some(2),
                at(60),
            )
            .expect("writes");
        assert!(text().contains("1970-01-01T00:00:00Z") && text().contains("two"));
        assert!(text().contains(r#""observedGeneration": 2"#), "{}", text());
        store
            .set_statuses([(&reference, &condition(true, "two"))], |_| Some(2), at(60))
            .expect("writes");
        assert!(text().contains("1970-01-01T00:01:00Z"), "{}", text());
    }

    #[test]
    fn a_damaged_file_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join(POD_FILE), "{").expect("writes");
        let error = StatusStore::open(directory.path()).expect_err("not JSON");
        assert!(error.to_string().contains(POD_FILE), "{error}");
    }
}
