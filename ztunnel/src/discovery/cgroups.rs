//! The cgroups of pods in a node's cgroup v2 tree.
//!
//! Kubelets name them in two ways and put them in places of their own: `kubepods/burstable/
//! pod<uid>` (cgroupfs), `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-
//! pod<uid with _>.slice` (systemd), the same below `kubelet.slice` with prefixed names
//! (kind), without the middle level for pods with guaranteed resources. So the tree is
//! searched once for the directories that hold pods, and a pod is then looked up in those by
//! its name. A miss searches again, but not for every pod and every time.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Directories that are looked at in one search: beyond, a node has something very odd.
const MAX_SEARCHED: usize = 8192;
/// How deep pods may be.
const MAX_DEPTH: usize = 6;
/// The least time between two searches.
const SEARCH_PAUSE: Duration = Duration::from_millis(500);

/// The pods' cgroups below a directory.
#[derive(Debug)]
pub struct PodCgroups {
    root: PathBuf,
    parents: Mutex<Parents>,
}

/// The directories that held pods in the last search.
#[derive(Debug, Default)]
struct Parents {
    paths: Vec<PathBuf>,
    searched: Option<Instant>,
}

impl PodCgroups {
    /// Pods below `root`.
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            parents: Mutex::default(),
        }
    }

    /// Where pods are looked for.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The cgroup of the pod with this uid.
    pub fn of_pod(&self, uid: &str) -> Option<PathBuf> {
        let mut parents = self.parents.lock();
        let look = |paths: &[PathBuf]| {
            paths
                .iter()
                .flat_map(|parent| names_in(parent, uid))
                .find(|path| path.is_dir())
        };
        if let Some(found) = look(&parents.paths) {
            return Some(found);
        }
        if !parents.search(&self.root) {
            return None;
        }
        look(&parents.paths)
    }

    /// The cgroups of pods whose uid is none of the API server's.
    pub fn of_static_pods(&self) -> Vec<PathBuf> {
        let mut parents = self.parents.lock();
        if parents.searched.is_none() {
            parents.search(&self.root);
        }
        let is_static = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.and_then(pod_uid)
                .is_some_and(|uid| uid.len() == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit()))
        };
        let children = parents.paths.iter().flat_map(|parent| directories(parent));
        children.filter(is_static).collect()
    }
}

impl Parents {
    /// Searches the tree unless that has just been done; whether it has been done now.
    fn search(&mut self, root: &Path) -> bool {
        if self
            .searched
            .is_some_and(|last| last.elapsed() < SEARCH_PAUSE)
        {
            return false;
        }
        self.paths = search(root);
        self.searched = Some(Instant::now());
        true
    }
}

/// The directories below `root` that hold pods, and those that will: a kubelet makes the
/// directories of the classes of service before the first pod of the class.
fn search(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = VecDeque::from([(root.to_owned(), 0)]);
    let mut searched = 0;
    while let Some((directory, depth)) = open.pop_front() {
        searched += 1;
        if searched > MAX_SEARCHED {
            tracing::warn!(root = %root.display(), "the cgroup tree is too large; pods may not be found");
            break;
        }
        let mut holds_pods = is_kubepods(&directory);
        for child in directories(&directory) {
            let name = child.file_name().and_then(|name| name.to_str());
            if name.and_then(pod_uid).is_some() {
                holds_pods = true;
            } else if depth < MAX_DEPTH {
                open.push_back((child, depth + 1));
            }
        }
        if holds_pods {
            found.push(directory);
        }
    }
    found
}

/// The node's kubepods cgroup, below which all its pods run.
pub fn kubepods(hierarchy: &Path) -> Option<PathBuf> {
    let is_top = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| {
            let name = name.strip_suffix(".slice").unwrap_or(name);
            name == "kubepods" || name.ends_with("-kubepods")
        })
    };
    // At the root, or where `--cgroup-root` has put it: nowhere deep.
    let mut level = vec![hierarchy.to_owned()];
    for _ in 0..3 {
        let children: Vec<PathBuf> = level.iter().flat_map(|path| directories(path)).collect();
        if let Some(found) = children.iter().find(|path| is_top(path)) {
            return Some(found.clone());
        }
        level = children;
    }
    None
}

/// A directory that the kubelet makes for pods, or for a class of them.
fn is_kubepods(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.contains("kubepods") || matches!(name, "burstable" | "besteffort"))
}

/// The two names that the pod's cgroup may have in `parent`.
fn names_in(parent: &Path, uid: &str) -> impl Iterator<Item = PathBuf> {
    let plain = parent.join(format!("pod{uid}"));
    let slice = parent
        .file_name()
        .and_then(|name| name.to_str()?.strip_suffix(".slice"))
        .map(|prefix| parent.join(format!("{prefix}-pod{}.slice", uid.replace('-', "_"))));
    [Some(plain), slice].into_iter().flatten()
}

/// The uid in the name of a pod's cgroup.
pub(super) fn pod_uid(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        None => name.strip_prefix("pod")?.to_owned(),
        Some(name) => {
            let (before, uid) = name.rsplit_once("-pod")?;
            if before.is_empty() {
                return None;
            }
            uid.replace('_', "-")
        }
    };
    let legal = |b: u8| b.is_ascii_hexdigit() || b == b'-';
    (uid.len() >= 32 && uid.bytes().all(legal)).then_some(uid)
}

/// The directories in `path`; none if it is gone.
pub(super) fn directories(path: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b2c5f3e-7c1a-4d0e-9f53-0f6b0c6d5a11";
    const UID_: &str = "0b2c5f3e_7c1a_4d0e_9f53_0f6b0c6d5a11";
    const HASH: &str = "0123456789abcdef0123456789abcdef";

    fn tree(paths: &[String]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for path in paths {
            std::fs::create_dir_all(root.path().join(path)).expect("made");
        }
        root
    }

    #[test]
    fn pods_are_found_however_the_kubelet_names_them() {
        for path in [
            format!("kubepods/burstable/pod{UID}"),
            format!("kubepods/pod{UID}"),
            format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice"),
            format!("kubepods.slice/kubepods-pod{UID_}.slice"),
            format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                 kubelet-kubepods-burstable-pod{UID_}.slice"
            ),
            format!("kubelet/kubepods/besteffort/pod{UID}"),
        ] {
            let root = tree(&[
                path.clone(),
                "system.slice/containerd.service".into(),
                format!("{path}/cri-containerd-1.scope"),
            ]);
            let cgroups = PodCgroups::new(root.path().to_owned());
            assert_eq!(cgroups.of_pod(UID), Some(root.path().join(&path)));
            assert_eq!(cgroups.of_pod(HASH), None);
            assert!(cgroups.of_static_pods().is_empty());
            let top = kubepods(root.path()).expect("a kubepods cgroup");
            assert!(root.path().join(&path).starts_with(&top), "{path}");
        }
        let root = tree(&["system.slice/a.service".into()]);
        assert_eq!(kubepods(root.path()), None);
    }

    #[test]
    fn a_pod_that_comes_later_is_found_without_a_search() {
        let root = tree(&["kubepods/burstable".into()]);
        let cgroups = PodCgroups::new(root.path().to_owned());
        assert_eq!(cgroups.of_pod(UID), None);
        let path = root.path().join(format!("kubepods/burstable/pod{UID}"));
        std::fs::create_dir(&path).expect("made");
        assert_eq!(cgroups.of_pod(UID), Some(path));
    }

    #[test]
    fn static_pods_are_those_with_a_hash() {
        let root = tree(&[
            format!("kubepods/burstable/pod{UID}"),
            format!("kubepods/burstable/pod{HASH}"),
        ]);
        let cgroups = PodCgroups::new(root.path().to_owned());
        let found = cgroups.of_static_pods();
        assert_eq!(
            found,
            [root.path().join(format!("kubepods/burstable/pod{HASH}"))]
        );
    }

    #[test]
    fn only_names_of_pods_are_names_of_pods() {
        for name in ["pod", "podman", "kubepods", "user-pod1.slice", "-pod.slice"] {
            assert_eq!(pod_uid(name), None, "{name}");
        }
        assert_eq!(pod_uid(&format!("pod{UID}")).as_deref(), Some(UID));
        let slice = format!("kubepods-burstable-pod{UID_}.slice");
        assert_eq!(pod_uid(&slice).as_deref(), Some(UID));
    }
}
