//! What outlives a ztunnel of the pods that only the CNI plugin has named: a file for each.
//!
//! The next process would otherwise take the capture of a pod away that is just starting,
//! because the control plane does not know its address yet. It finds the pod's namespace by
//! itself; the file says who the pod is.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use adit_shared::identity::TrustDomain;
use adit_shared::model::enrolment::SandboxPod;
use parking_lot::Mutex;
use tracing::warn;

use super::wanted::{EarlyPod, Wanted};
use crate::pod::PodSpec;

/// Files that are read; a node has fewer pods.
const MAX_FILES: usize = 4096;

/// The directory of the files.
#[derive(Debug)]
pub struct EarlyRecords {
    directory: PathBuf,
    trust_domain: TrustDomain,
    cluster: String,
    /// Uid and sandbox of those that this process wrote or has taken up: a file of one that
    /// is not early any more is over.
    seen: Mutex<HashSet<(String, String)>>,
}

impl EarlyRecords {
    /// Files in `directory`, which is made if it is missing. Identities are of
    /// `trust_domain`, workloads of `cluster`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(directory: &Path, trust_domain: TrustDomain, cluster: String) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
        Ok(Self {
            directory: directory.to_owned(),
            trust_domain,
            cluster,
            seen: Mutex::default(),
        })
    }

    /// The pod that a sandbox is made for.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn spec(&self, pod: &SandboxPod) -> Result<PodSpec, crate::pod::PodSpecError> {
        PodSpec::of_sandbox(pod, &self.trust_domain, &self.cluster)
    }

    /// Writes a pod down. `pod.uid` has been checked to be a file name.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, pod: &SandboxPod) -> io::Result<()> {
        self.seen.lock().insert(key(pod));
        let temporary = self.directory.join(format!(".{}", pod.uid));
        fs::write(&temporary, serde_json::to_vec(pod)?)?;
        fs::rename(temporary, self.directory.join(&pod.uid))
    }

    /// Tells `wanted` of the pods that an earlier process wrote down, and removes the files
    /// of pods that are no longer early. An old process may still write while a new one
    /// starts: so this is done again and again.
    pub fn reconcile(&self, wanted: &Wanted) {
        let known = wanted.early();
        for (uid, pod) in self.load() {
            if known.get(uid.as_str()).is_some_and(|s| **s == pod.sandbox) {
                continue;
            }
            if self.seen.lock().insert(key(&pod))
                && let Ok(spec) = self.spec(&pod)
                && *spec.uid == *uid
            {
                let early = EarlyPod {
                    spec,
                    sandbox: pod.sandbox.as_str().into(),
                    netns: None,
                };
                wanted.remember(early);
            }
            let now = wanted.early();
            if now.get(uid.as_str()).is_none_or(|s| **s != pod.sandbox) {
                self.remove(&uid);
                self.seen.lock().remove(&key(&pod));
            }
        }
    }

    /// Removes all of them: no process follows.
    pub fn clear(&self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            warn!(target: "enrolment", directory = %self.directory.display(), "not removed: {error}");
        }
    }

    fn load(&self) -> BTreeMap<String, SandboxPod> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten();
        let mut pods = BTreeMap::new();
        for entry in entries.flatten().take(MAX_FILES) {
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            if name.starts_with('.') {
                continue;
            }
            match fs::read(entry.path()).map(|text| serde_json::from_slice(&text)) {
                Ok(Ok(pod)) => {
                    pods.insert(name, pod);
                }
                // Removed meanwhile.
                Err(_) => {}
                Ok(Err(error)) => {
                    warn!(target: "enrolment", file = %entry.path().display(), "not understood, removed: {error}");
                    self.remove(&name);
                }
            }
        }
        pods
    }

    /// Removes the file of a pod.
    pub fn remove(&self, uid: &str) {
        // It may be gone already.
        let _ = fs::remove_file(self.directory.join(uid));
    }
}

fn key(pod: &SandboxPod) -> (String, String) {
    (pod.uid.clone(), pod.sandbox.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, sandbox: &str) -> SandboxPod {
        SandboxPod {
            uid: uid.into(),
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            addresses: vec![[10, 0, 0, 7].into()],
            outbound_only: false,
            sandbox: sandbox.into(),
        }
    }

    fn open(directory: &Path) -> EarlyRecords {
        EarlyRecords::open(directory, TrustDomain::default(), "Kubernetes".into()).expect("made")
    }

    fn files(directory: &Path) -> usize {
        fs::read_dir(directory).expect("there").count()
    }

    #[tokio::test]
    async fn the_next_process_knows_the_pods_that_are_starting() {
        let directory = tempfile::tempdir().expect("a directory");
        open(directory.path()).save(&pod("a", "s1")).expect("saved");
        fs::write(directory.path().join("b"), "no json").expect("written");

        let (records, wanted) = (open(directory.path()), Wanted::default());
        records.reconcile(&wanted);
        assert_eq!(wanted.early().get("a").map(|s| &**s), Some("s1"));
        assert_eq!(files(directory.path()), 1, "the broken one is gone");
        records.reconcile(&wanted);
        assert_eq!(wanted.early().len(), 1);

        // It ends, and does not come back from its file.
        assert!(wanted.dismiss("s1").is_some());
        records.reconcile(&wanted);
        assert!(wanted.early().is_empty());
        assert_eq!(files(directory.path()), 0);
    }

    #[tokio::test]
    async fn a_pod_that_the_control_plane_names_needs_no_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let (records, wanted) = (open(directory.path()), Wanted::default());
        records.save(&pod("a", "s1")).expect("saved");
        let spec = records.spec(&pod("a", "s1")).expect("valid");
        wanted.update(vec![spec], &[]);
        records.reconcile(&wanted);
        assert!(wanted.early().is_empty());
        assert_eq!(files(directory.path()), 0);
    }
}
