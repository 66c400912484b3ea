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
use std::time::Duration;

use adit_shared::identity::TrustDomain;
use adit_shared::model::enrolment::SandboxPod;
use parking_lot::Mutex;
use tracing::warn;

use super::wanted::{EarlyPod, Wanted};
use crate::pod::PodSpec;

/// Files that are read; a node has fewer pods.
const MAX_FILES: usize = 4096;
/// A file that is being written has another name until it is whole. One that has had it for so
/// long was left by a process that ended before.
const LEFT_BEHIND: Duration = Duration::from_secs(60);

/// The directory of the files.
#[derive(Debug)]
pub struct EarlyRecords {
    directory: PathBuf,
    trust_domain: TrustDomain,
    cluster: String,
    /// Uid and sandbox of those that this process wrote or has taken up: a file of one that
    /// is not early any more is over. Of those that are neither early nor in a file nothing is
    /// remembered. Held while files are read or written, so that the two agree.
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
        let mut seen = self.seen.lock();
        seen.insert(key(pod));
        let temporary = self.directory.join(format!(".{}", pod.uid));
        fs::write(&temporary, serde_json::to_vec(pod)?)?;
        fs::rename(temporary, self.directory.join(&pod.uid))
    }

    /// Tells `wanted` of the pods that an earlier process wrote down, and removes the files
    /// of pods that are no longer early. An old process may still write while a new one
    /// starts: so this is done again and again.
    pub fn reconcile(&self, wanted: &Wanted) {
        let mut seen = self.seen.lock();
        let known = wanted.early();
        for (uid, pod) in self.load() {
            if known.get(uid.as_str()).is_some_and(|s| **s == pod.sandbox) {
                seen.insert(key(&pod));
                continue;
            }
            if seen.insert(key(&pod))
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
                seen.remove(&key(&pod));
            }
        }
        let early = wanted.early();
        seen.retain(|(uid, sandbox)| {
            early
                .get(uid.as_str())
                .is_some_and(|known| **known == **sandbox)
        });
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
                let written = entry.metadata().and_then(|found| found.modified()).ok();
                let age = written.and_then(|written| written.elapsed().ok());
                if age.is_some_and(|age| age >= LEFT_BEHIND) {
                    self.remove(&name);
                }
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

    /// A node sees many pods in its life.
    #[tokio::test]
    async fn nothing_is_remembered_of_pods_that_have_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let (records, wanted) = (open(directory.path()), Wanted::default());
        for number in 0..10 {
            let (uid, sandbox) = (format!("a{number}"), format!("s{number}"));
            let pod = pod(&uid, &sandbox);
            let early = EarlyPod {
                spec: records.spec(&pod).expect("valid"),
                sandbox: sandbox.as_str().into(),
                netns: None,
            };
            let _waiting = wanted.admit(early).expect("room");
            records.save(&pod).expect("saved");
            records.reconcile(&wanted);
            assert_eq!(records.seen.lock().len(), 1, "the one that is early");
            assert!(wanted.dismiss(&sandbox).is_some());
            records.remove(&uid);
            records.reconcile(&wanted);
            assert!(records.seen.lock().is_empty());
        }
    }

    #[tokio::test]
    async fn what_was_left_half_written_is_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let (records, wanted) = (open(directory.path()), Wanted::default());
        for (name, age) in [(".old", LEFT_BEHIND), (".new", Duration::ZERO)] {
            let file = fs::File::create(directory.path().join(name)).expect("made");
            let written = std::time::SystemTime::now() - age;
            file.set_modified(written).expect("ours");
        }
        records.reconcile(&wanted);
        let entries = fs::read_dir(directory.path()).expect("there");
        let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(names, [".new"], "it is being written");
    }
}
