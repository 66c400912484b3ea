//! What a mesh looks like at this moment. The same value answers `Mesh::status` and is
//! the file that other processes (`adit local status|exec|logs`) read.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::LocalError;

/// A process that is not mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks after boot.
    pub start_time: u64,
}

/// A whole mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshStatus {
    /// Its name.
    pub name: String,
    /// The process that supervises it.
    pub supervisor: ProcessId,
    /// Whether it goes when its supervisor is gone.
    pub ephemeral: bool,
    /// Whether `aditd` and ztunnels belong to it.
    pub data_plane: bool,
    /// The user's manifests.
    pub manifests: PathBuf,
    /// `PATH` of programs in it.
    pub search_path: String,
    /// Virtual nodes, in the order they were given.
    pub nodes: Vec<NodeStatus>,
    /// Pods by namespace and name.
    pub pods: Vec<PodStatus>,
    /// `aditd`, the ztunnels and the waypoints.
    pub components: Vec<ComponentStatus>,
    /// Objects that were applied over the manifests, for people.
    #[serde(default)]
    pub applied: Vec<String>,
    /// Sentences about manifests that cannot be used.
    pub problems: Vec<String>,
}

/// A virtual node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<String>,
    /// Its namespace, for `nsenter --net=`.
    pub netns: PathBuf,
    /// The cgroup that holds everything on it.
    pub cgroup: PathBuf,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid; a pod that is made anew has another one.
    pub uid: String,
    /// The node it is on.
    pub node: String,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<String>,
    /// Kubernetes' phase: Pending, Running, Succeeded or Failed.
    pub phase: String,
    /// Kubernetes' Ready condition.
    pub ready: bool,
    /// It was removed and is on its way out.
    pub terminating: bool,
    /// Its namespace, for `nsenter --net=`.
    pub netns: PathBuf,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// Its containers.
    pub containers: Vec<ContainerStatus>,
}

/// A container of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its name.
    pub name: String,
    /// Its process, while it runs.
    pub process: Option<ProcessId>,
    /// Whether it passes its readiness probe, or runs if it has none.
    pub ready: bool,
    /// How often it was started again.
    pub restarts: u32,
    /// How it ended last, or why it does not start.
    pub message: String,
    /// Its standard output and error.
    pub log: PathBuf,
}

/// `aditd`, a ztunnel or a waypoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentStatus {
    /// `aditd`, `ztunnel-<node>`, or `<gateway>.<namespace>` for a waypoint.
    pub name: String,
    /// The node, for a ztunnel and a waypoint.
    pub node: Option<String>,
    /// The pod that a waypoint runs in, by its uid.
    #[serde(default)]
    pub pod: Option<String>,
    /// Its process, while it runs.
    pub process: Option<ProcessId>,
    /// Whether it answers on its readiness port.
    pub ready: bool,
    /// How often it was started again.
    pub restarts: u32,
    /// How it ended last, or why it does not start.
    pub message: String,
    /// Its standard output and error.
    pub log: PathBuf,
}

impl MeshStatus {
    /// Reads the file that a supervisor wrote.
    pub(crate) fn load(path: &Path) -> Result<Self, LocalError> {
        let text = fs::read(path).map_err(LocalError::file("read", path))?;
        serde_json::from_slice(&text)
            .map_err(|error| LocalError::file("understand", path)(error.into()))
    }

    pub(crate) fn store(&self, path: &Path) -> Result<(), LocalError> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| LocalError::file("write", path)(error.into()))?;
        write_atomically(path, &text)
    }

    /// The pod, unless it is on its way out.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<&PodStatus> {
        let named = |pod: &&PodStatus| pod.namespace == namespace && pod.name == name;
        self.pods.iter().filter(named).find(|pod| !pod.terminating)
    }

    /// The node.
    pub fn node(&self, name: &str) -> Option<&NodeStatus> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// `aditd`, `ztunnel-<node>` or `<gateway>.<namespace>`.
    pub fn component(&self, name: &str) -> Option<&ComponentStatus> {
        self.components.iter().find(|c| c.name == name)
    }
}

/// Readers see the old content or the new, never a part.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<(), LocalError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    // Hidden, so that those who watch the directory for manifests do not read it.
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(&name);
    let temporary = path.with_file_name(hidden);
    let written = fs::File::create(&temporary).and_then(|mut file| file.write_all(content));
    written.map_err(LocalError::file("write", &temporary))?;
    fs::rename(&temporary, path).map_err(LocalError::file("replace", path))
}
