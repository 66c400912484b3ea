//! What the control plane writes back about objects, and keeps over a restart.
//!
//! With a directory as source there is no API server to hold it, so a status directory
//! does: one JSON file for each kind, replaced as a whole. Losing it costs a moment in
//! which clients use plaintext for pods whose nodes have not reported again, so it is
//! written before anything that relies on it is published.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::model::{Kind, ObjectRef};

/// The annotation that says a pod is captured (Istio `ambient.istio.io/redirection`).
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// A status file is at most this long.
const MAX_BYTES: u64 = 256 << 20;

/// A condition of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Its type, for example `ZtunnelAccepted`.
    pub kind: String,
    /// True or False.
    pub status: bool,
    /// Why, in one word.
    pub reason: String,
    /// Why, for people.
    pub message: String,
}

/// A pod that is captured, as far as clients may rely on it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CapturedPod {
    /// Pod uid.
    pub uid: Arc<str>,
    /// Its node.
    pub node: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

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
    conditions: BTreeMap<ObjectRef, Kept>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Kept {
    condition: Condition,
    since: String,
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

#[derive(Serialize, Deserialize)]
struct ConditionFile {
    items: Vec<ConditionItem>,
}

#[derive(Serialize, Deserialize)]
struct ConditionItem {
    namespace: String,
    name: String,
    conditions: Vec<WireCondition>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
    last_transition_time: String,
}

const POD_FILE: &str = "Pod.json";
const POLICY_FILE: &str = "AuthorizationPolicy.json";

impl StatusStore {
    /// Keeps status in memory only.
    pub fn in_memory() -> Self {
        Self {
            directory: None,
            pods: BTreeMap::new(),
            conditions: BTreeMap::new(),
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
        let policies: Option<ConditionFile> = read(&directory.join(POLICY_FILE))?;
        for item in policies.into_iter().flat_map(|file| file.items) {
            let reference = ObjectRef {
                kind: Kind::AuthorizationPolicy,
                namespace: item.namespace.into(),
                name: item.name.into(),
            };
            for condition in item.conditions {
                let kept = Kept {
                    since: condition.last_transition_time,
                    condition: Condition {
                        kind: condition.kind,
                        status: condition.status == "True",
                        reason: condition.reason,
                        message: condition.message,
                    },
                };
                store.conditions.insert(reference.clone(), kept);
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

    /// Replaces the conditions. Writes only if something changed; a condition whose
    /// status stays the same keeps its time.
    ///
    /// # Errors
    /// The file system's.
    pub fn set_conditions<'a>(
        &mut self,
        conditions: impl IntoIterator<Item = (&'a ObjectRef, &'a Condition)>,
        now: SystemTime,
    ) -> Result<(), StatusError> {
        let now = rfc3339(now);
        let conditions: BTreeMap<ObjectRef, Kept> = conditions
            .into_iter()
            .map(|(reference, condition)| {
                let before = self.conditions.get(reference);
                let since = before
                    .filter(|kept| kept.condition.status == condition.status)
                    .map_or_else(|| now.clone(), |kept| kept.since.clone());
                let condition = condition.clone();
                (reference.clone(), Kept { condition, since })
            })
            .collect();
        if conditions == self.conditions {
            return Ok(());
        }
        let items = conditions.iter().map(|(reference, kept)| ConditionItem {
            namespace: reference.namespace.to_string(),
            name: reference.name.to_string(),
            conditions: vec![WireCondition {
                kind: kept.condition.kind.clone(),
                status: if kept.condition.status {
                    "True"
                } else {
                    "False"
                }
                .into(),
                reason: kept.condition.reason.clone(),
                message: kept.condition.message.clone(),
                last_transition_time: kept.since.clone(),
            }],
        });
        let file = ConditionFile {
            items: items.collect(),
        };
        self.write(POLICY_FILE, &file)?;
        self.conditions = conditions;
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

fn rfc3339(time: SystemTime) -> String {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or_default();
    let time = Timestamp::from_second(seconds).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
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
        let condition = |status, message: &str| Condition {
            kind: "ZtunnelAccepted".into(),
            status,
            reason: "R".into(),
            message: message.into(),
        };
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let text = || fs::read_to_string(directory.path().join(POLICY_FILE)).expect("a file");
        let mut store = StatusStore::open(directory.path()).expect("opens");
        store
            .set_conditions([(&reference, &condition(false, "one"))], at(0))
            .expect("writes");
        assert!(text().contains("1970-01-01T00:00:00Z"));
        let mut store = StatusStore::open(directory.path()).expect("opens again");
        store
            .set_conditions([(&reference, &condition(false, "two"))], at(60))
            .expect("writes");
        assert!(text().contains("1970-01-01T00:00:00Z") && text().contains("two"));
        store
            .set_conditions([(&reference, &condition(true, "two"))], at(60))
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
