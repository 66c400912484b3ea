//! Where a pod's network namespace is found.
//!
//! On one machine without Kubernetes the supervisor keeps a directory of handles by pod
//! uid. In a cluster nobody does: the pod's uid leads to its cgroup ([`cgroups`]), that to a
//! process, and that to the namespace ([`process`]), which is believed only when it has the
//! pod's address and is not the node's. Nothing is remembered of a pod, so that a sandbox
//! that was made anew is found like any other. [`kubelet`] finds whose probes pass.
//!
//! Everything here blocks for some system calls, and visits namespaces with its thread.

mod cgroups;
mod kubelet;
mod process;

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

pub use cgroups::{PodCgroups, kubepods};
pub use kubelet::{Kubelet, KubeletError, find_kubelet, follow_kubelet};
pub(crate) use process::has_address;

use crate::pod::{NetnsId, netns_id};
use process::{NodeNamespaces, Processes};

/// Why a pod's namespace is not known.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DiscoveryError {
    /// The directory has no handle for the pod.
    #[error("{path}: {reason}")]
    Handle {
        /// The handle.
        path: PathBuf,
        /// The kernel's reason.
        reason: String,
    },
    /// No cgroup has the pod's uid.
    #[error("no cgroup of the pod below {0}")]
    NoCgroup(PathBuf),
    /// Nothing runs in it.
    #[error("no process runs in {0}")]
    NoProcess(PathBuf),
    /// What runs there is in the node's own namespace.
    #[error("its processes use their node's network")]
    HostNetwork,
    /// None of the namespaces of its processes has one of its addresses.
    #[error("no network namespace of its processes has the address {0}")]
    OtherAddress(IpAddr),
    /// A namespace could not be looked at.
    #[error("{path}: {reason}")]
    Unreadable {
        /// Its file.
        path: PathBuf,
        /// The kernel's reason.
        reason: String,
    },
}

/// How namespaces of pods are found.
#[derive(Debug)]
pub enum Discovery {
    /// A directory with a handle for each pod uid.
    Directory(PathBuf),
    /// The node's cgroup tree.
    Cgroups(CgroupDiscovery),
}

impl Discovery {
    /// Finds the namespace of a pod.
    ///
    /// # Errors
    /// [`DiscoveryError`]. All may pass with time.
    pub fn find(&self, uid: &str, addresses: &[IpAddr]) -> Result<File, DiscoveryError> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(uid);
                File::open(&path).map_err(|e| DiscoveryError::Handle {
                    path,
                    reason: e.to_string(),
                })
            }
            Self::Cgroups(cgroups) => cgroups.find(uid, addresses, None).map(|(file, _)| file),
        }
    }

    /// Which namespace the pod is in now; `None` if that cannot be told. `enrolled` is the
    /// one it was last seen in, which is held open, so that its number cannot mean another.
    pub fn current(&self, uid: &str, addresses: &[IpAddr], enrolled: NetnsId) -> Option<NetnsId> {
        match self {
            Self::Directory(directory) => {
                let found = std::fs::metadata(directory.join(uid)).ok()?;
                Some(netns_id(&found))
            }
            Self::Cgroups(cgroups) => {
                let found = cgroups.find(uid, addresses, Some(enrolled)).ok()?;
                Some(found.1)
            }
        }
    }
}

/// Finds namespaces by the pods' cgroups.
#[derive(Debug)]
pub struct CgroupDiscovery {
    cgroups: PodCgroups,
    node: NodeNamespaces,
}

impl CgroupDiscovery {
    /// Looks for pods below `root`, a cgroup v2 directory of the node.
    ///
    /// # Errors
    /// When this process's own namespace cannot be read.
    pub fn new(root: &Path) -> io::Result<Self> {
        Ok(Self {
            cgroups: PodCgroups::new(root.to_owned()),
            node: NodeNamespaces::read()?,
        })
    }

    /// Whether a namespace is the node's, or this process's own.
    ///
    /// # Errors
    /// As [`CgroupDiscovery::new`].
    pub fn is_the_nodes(netns: NetnsId) -> io::Result<bool> {
        Ok(NodeNamespaces::read()?.have(netns))
    }

    /// Stops at `known` without verifying it again.
    fn find(
        &self,
        uid: &str,
        addresses: &[IpAddr],
        known: Option<NetnsId>,
    ) -> Result<(File, NetnsId), DiscoveryError> {
        let Some(cgroup) = self.cgroups.of_pod(uid) else {
            return self
                .find_static(addresses, known)
                .ok_or_else(|| DiscoveryError::NoCgroup(self.cgroups.root().to_owned()));
        };
        Processes::of(&cgroup).find_netns(&self.node, addresses, known)
    }

    /// The kubelet knows a pod of its own directory by another uid than the API server. Of
    /// such pods there are a few; the address tells which one it is.
    fn find_static(&self, addresses: &[IpAddr], known: Option<NetnsId>) -> Option<(File, NetnsId)> {
        self.cgroups
            .of_static_pods()
            .into_iter()
            .find_map(|cgroup| {
                let processes = Processes::of(&cgroup);
                processes.find_netns(&self.node, addresses, known).ok()
            })
    }
}

#[cfg(test)]
mod tests;
