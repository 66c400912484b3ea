//! Where everything of one mesh is: its state directory and its cgroups.

use std::path::{Path, PathBuf};

use super::cgroup;
use crate::error::LocalError;

/// Paths of one mesh.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// `<state root>/<mesh>`.
    pub(crate) root: PathBuf,
    /// `<cgroup2>/adit-local/<mesh>`.
    pub(crate) cgroup: PathBuf,
}

impl Layout {
    pub(crate) fn new(state_root: &Path, mesh: &str) -> Result<Self, LocalError> {
        Ok(Self {
            root: state_root.join(mesh),
            cgroup: cgroup::mount_point()?.join("adit-local").join(mesh),
        })
    }

    /// What `adit local status` reads; rewritten by atomic rename.
    pub(crate) fn state_file(&self) -> PathBuf {
        self.root.join("state.json")
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.root.join("control.sock")
    }

    /// A shared tmpfs with one file per namespace; shared, so that what is unmounted
    /// here also goes from the mount namespaces that were copied meanwhile.
    pub(crate) fn netns_dir(&self) -> PathBuf {
        self.root.join("netns")
    }

    pub(crate) fn fabric_netns(&self) -> PathBuf {
        self.netns_dir().join("fabric")
    }

    pub(crate) fn aditd_netns(&self) -> PathBuf {
        self.netns_dir().join("aditd")
    }

    pub(crate) fn node_netns(&self, node: &str) -> PathBuf {
        self.netns_dir().join("nodes").join(node)
    }

    /// The directory that ztunnel gets as `ADIT_NETNS_DIR`: one file per pod uid.
    pub(crate) fn pod_netns_dir(&self) -> PathBuf {
        self.netns_dir().join("pods")
    }

    pub(crate) fn pod_netns(&self, uid: &str) -> PathBuf {
        self.pod_netns_dir().join(uid)
    }

    /// A bpffs of the mesh's own: unmounting it removes every pin.
    pub(crate) fn bpffs(&self) -> PathBuf {
        self.root.join("bpf")
    }

    /// The manifests that `aditd` reads.
    pub(crate) fn cluster_dir(&self) -> PathBuf {
        self.root.join("cluster")
    }

    /// What was applied over the user's manifests.
    pub(crate) fn overlay_dir(&self) -> PathBuf {
        self.root.join("applied")
    }

    /// What `aditd` writes about pods and policies.
    pub(crate) fn status_dir(&self) -> PathBuf {
        self.root.join("status")
    }

    pub(crate) fn ca_dir(&self) -> PathBuf {
        self.root.join("ca")
    }

    /// Public key that tokens are verified with.
    pub(crate) fn token_public_key(&self) -> PathBuf {
        self.root.join("keys/token.pub.pem")
    }

    /// Private key that tokens are signed with.
    pub(crate) fn token_private_key(&self) -> PathBuf {
        self.root.join("keys/token.key.pem")
    }

    pub(crate) fn node_token(&self, node: &str) -> PathBuf {
        self.root.join("tokens").join(node)
    }

    /// The token of a pod of the mesh's own, by the pod's uid.
    pub(crate) fn pod_token(&self, uid: &str) -> PathBuf {
        self.root.join("tokens/pods").join(uid)
    }

    /// The `/etc/hosts` of the pods of a namespace; `None` is that of nodes.
    pub(crate) fn hosts(&self, namespace: Option<&str>) -> PathBuf {
        let dir = self.root.join("hosts");
        match namespace {
            Some(namespace) => dir.join("namespaces").join(namespace),
            None => dir.join("nodes"),
        }
    }

    pub(crate) fn resolv_conf(&self, namespace: &str) -> PathBuf {
        self.root.join("resolv").join(namespace)
    }

    pub(crate) fn container_log(&self, namespace: &str, pod: &str, container: &str) -> PathBuf {
        let dir = self.root.join("logs/pods").join(namespace).join(pod);
        dir.join(format!("{container}.log"))
    }

    /// Log of `aditd`, or of `ztunnel-<node>`, `kubelet-<node>`, `<gateway>.<namespace>`.
    pub(crate) fn component_log(&self, component: &str) -> PathBuf {
        self.root.join("logs").join(format!("{component}.log"))
    }

    pub(crate) fn logs_dir(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub(crate) fn aditd_cgroup(&self) -> PathBuf {
        self.cgroup.join("aditd")
    }

    /// The cgroup at which a node's eBPF hooks attach.
    pub(crate) fn node_cgroup(&self, node: &str) -> PathBuf {
        self.cgroup.join(node)
    }

    pub(crate) fn ztunnel_cgroup(&self, node: &str) -> PathBuf {
        self.node_cgroup(node).join("ztunnel")
    }

    pub(crate) fn kubelet_cgroup(&self, node: &str) -> PathBuf {
        self.node_cgroup(node).join("kubelet")
    }

    /// Commands that run on the node but in no pod.
    pub(crate) fn host_cgroup(&self, node: &str) -> PathBuf {
        self.node_cgroup(node).join("host")
    }

    pub(crate) fn pod_cgroup(&self, node: &str, uid: &str) -> PathBuf {
        self.node_cgroup(node).join("pods").join(uid)
    }
}
