//! Where a node's maps and links are pinned: `<bpffs>/adit/<node>/<layout>/`.
//!
//! A pin keeps the capture in force while no ztunnel runs. The directory carries the node's name, for
//! several nodes may share one kernel, and the version of the layout, for an older ztunnel may have left
//! maps that this one cannot read.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::statfs;

use crate::abi::LAYOUT;

/// Where a node's hooks attach and where its pins live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// The node's name: several nodes may share one kernel.
    pub node: String,
    /// The cgroup v2 directory below which the node's pods run. With Kubernetes the kubepods slice, so that
    /// the hooks run before those of a CNI at the root.
    pub cgroup: PathBuf,
    /// A mounted BPF file system, or an empty directory on which one may be mounted. It must be in a mount
    /// namespace that outlives this process, else the pins end with it.
    pub bpffs: PathBuf,
    /// The kubelet's cgroup v2 directory: connections from it reach the pods without the mesh.
    pub kubelet_cgroup: Option<PathBuf>,
    /// The cookie of the kubelet's network namespace: only connections from there count. `None`: all of
    /// the cgroup's do. Needed where the kubelet shares its cgroup with pods, or sits above them.
    pub kubelet_netns: Option<u64>,
}

impl NodeConfig {
    /// The configuration of a node that has the machine for itself: the cgroup v2 root and
    /// `/sys/fs/bpf`.
    ///
    /// # Errors
    /// When `/proc/mounts` cannot be read, or names no cgroup v2 hierarchy (`NotFound`).
    pub fn detect(node: &str) -> io::Result<Self> {
        Ok(Self {
            node: node.to_owned(),
            cgroup: cgroup2_mount()?,
            bpffs: PathBuf::from("/sys/fs/bpf"),
            kubelet_cgroup: None,
            kubelet_netns: None,
        })
    }
}

/// The mount point of the cgroup v2 hierarchy, wherever this machine has it.
pub fn cgroup2_mount() -> io::Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            // Spaces are escaped; a path that has them can be given by hand.
            (kind == "cgroup2" && !path.contains('\\')).then(|| PathBuf::from(path))
        })
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 hierarchy is mounted"))
}

/// Whether a path is on a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

/// Whether a path is in a cgroup v2 hierarchy.
pub(crate) fn is_cgroup2(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
}

/// A node's pin directory.
#[derive(Debug)]
pub(crate) struct Pins {
    node: PathBuf,
    layout: PathBuf,
}

impl Pins {
    /// Opens the node's directory; mounts the bpffs if there is none.
    pub(crate) fn open(bpffs: &Path, node: &str) -> io::Result<Self> {
        std::fs::create_dir_all(bpffs)?;
        if !is_bpffs(bpffs) {
            mount(
                Some("bpf"),
                bpffs,
                Some("bpf"),
                MsFlags::empty(),
                Some("mode=0700"),
            )?;
        }
        let node = bpffs.join("adit").join(encode(node));
        let pins = Self {
            layout: node.join(LAYOUT),
            node,
        };
        pins.create()?;
        Ok(pins)
    }

    /// Makes the directories that are missing.
    pub(crate) fn create(&self) -> io::Result<()> {
        std::fs::create_dir_all(self.layout.join("pods"))
    }

    /// The directory of the maps.
    pub(crate) fn maps(&self) -> &Path {
        &self.layout
    }

    /// The pin of a map or of a link of the node's cgroup.
    pub(crate) fn of(&self, name: &str) -> PathBuf {
        self.layout.join(name)
    }

    /// The pin of a pod's `sk_lookup` link.
    pub(crate) fn of_pod(&self, index: u32) -> PathBuf {
        self.layout.join("pods").join(index.to_string())
    }

    /// Removes everything of this layout, to begin anew.
    pub(crate) fn clear(&self) -> io::Result<()> {
        std::fs::remove_dir_all(&self.layout)?;
        self.create()
    }

    /// Removes everything of the node, and the directory of all nodes if it was the last.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match std::fs::remove_dir_all(&self.node) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Some(nodes) = self.node.parent() {
            // Another node may have its own there.
            let _ = std::fs::remove_dir(nodes);
        }
        Ok(())
    }

    /// Directories that ztunnels of other layouts left.
    pub(crate) fn outdated(&self) -> io::Result<Vec<PathBuf>> {
        let mut outdated = Vec::new();
        for entry in std::fs::read_dir(&self.node)? {
            let path = entry?.path();
            if path != self.layout {
                outdated.push(path);
            }
        }
        Ok(outdated)
    }
}

/// A node's name as a file name: bpffs allows no dots. Distinct names stay distinct.
fn encode(node: &str) -> String {
    node.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => char::from(byte).to_string(),
            _ => format!("~{byte:02x}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nodes_become_file_names_without_dots_and_stay_distinct() {
        assert_eq!(encode("node-1"), "node-1");
        assert_eq!(encode("ip-10-0-0-1.example"), "ip-10-0-0-1~2eexample");
        assert_ne!(encode("a.b"), encode("a~2eb"));
        assert_eq!(encode("../x"), "~2e~2e~2fx");
    }

    #[test]
    fn the_cgroup_hierarchy_is_found_in_the_mounts() {
        assert!(is_cgroup2(&cgroup2_mount().expect("a cgroup v2 hierarchy")));
        assert!(!is_cgroup2(Path::new("/proc")));
    }
}
