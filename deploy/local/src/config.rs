//! What a mesh is made from.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::LocalError;

/// Whether `aditd` and the ztunnels run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataPlane {
    /// Both run: a mesh.
    On,
    /// Neither: plain pods and services. For tests of the ground the mesh stands on,
    /// and for the "without a mesh" half of a benchmark.
    Off,
}

/// Everything that [`crate::Mesh::up`] needs to know.
#[derive(Debug, Clone)]
pub struct MeshConfig {
    /// Name of the mesh; part of its state directory, cgroup and bpffs.
    pub name: String,
    /// Directory of the user's manifests (`*.yaml`, `*.yml`, `*.json`, searched deeply).
    pub manifests: PathBuf,
    /// Names of the virtual nodes. Empty: the Node objects of the manifests, and if
    /// there are none, `node1` and `node2`.
    pub nodes: Vec<String>,
    /// Whether `aditd` and the ztunnels run.
    pub data_plane: DataPlane,
    /// Where the state directories of meshes are.
    pub state_root: PathBuf,
    /// Searched before `PATH` for the programs of pods and of the mesh itself.
    pub binary_dirs: Vec<PathBuf>,
    /// Trust domain of every identity.
    pub trust_domain: String,
    /// Added to the environment of every ztunnel, for example `RUST_LOG`.
    pub ztunnel_env: BTreeMap<String, String>,
    /// Added to the environment of `aditd`.
    pub aditd_env: BTreeMap<String, String>,
    /// Added to the arguments of `aditd`.
    pub aditd_args: Vec<String>,
    /// Added to the environment of every waypoint.
    pub waypoint_env: BTreeMap<String, String>,
    /// Program to run as ztunnel.
    pub ztunnel: String,
    /// Program to run as control plane.
    pub aditd: String,
    /// Program to run as waypoint, for every Gateway of class `istio-waypoint`.
    pub waypoint: String,
    /// The first congestion control of these that the kernel allows is used where the
    /// machine defaults to `bbr`, whose pacing halves every figure on a veth.
    pub congestion_control: Vec<String>,
    /// A mesh of a test: any later `up` on the machine removes it once the process
    /// that made it is gone.
    pub ephemeral: bool,
    /// How long `up` waits for the control plane and the ztunnels to be ready.
    pub ready_timeout: Duration,
    /// Whether an `aditd` or ztunnel that exits by itself is started again. One that
    /// was stopped or killed through the mesh never is.
    pub restart_components: bool,
    /// How long a process has between SIGTERM and SIGKILL.
    pub grace: Duration,
}

impl MeshConfig {
    /// The usual configuration for the mesh `name` from the manifests in `manifests`.
    pub fn new(name: impl Into<String>, manifests: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            manifests: manifests.into(),
            nodes: Vec::new(),
            data_plane: DataPlane::On,
            state_root: default_state_root(),
            binary_dirs: default_binary_dirs(),
            trust_domain: "cluster.local".into(),
            ztunnel_env: BTreeMap::new(),
            aditd_env: BTreeMap::new(),
            aditd_args: Vec::new(),
            waypoint_env: BTreeMap::new(),
            ztunnel: "ztunnel".into(),
            aditd: "aditd".into(),
            waypoint: "waypoint".into(),
            congestion_control: vec!["cubic".into(), "reno".into()],
            ephemeral: false,
            ready_timeout: Duration::from_secs(30),
            restart_components: true,
            grace: Duration::from_secs(5),
        }
    }

    /// # Errors
    /// [`LocalError::Config`] with the sentence for the user.
    pub(crate) fn validate(&self) -> Result<(), LocalError> {
        validate_name("mesh", &self.name)?;
        for (index, node) in self.nodes.iter().enumerate() {
            validate_name("node", node)?;
            if self.nodes[..index].contains(node) {
                return Err(LocalError::Config(format!("node {node} is named twice")));
            }
        }
        if !self.manifests.is_dir() {
            return Err(LocalError::Config(format!(
                "the manifest directory {} does not exist",
                self.manifests.display()
            )));
        }
        Ok(())
    }
}

/// The directory below which every mesh keeps its state.
pub(crate) fn default_state_root() -> PathBuf {
    "/run/adit/local".into()
}

/// Names become directories, cgroups and host names.
pub(crate) fn validate_name(kind: &str, name: &str) -> Result<(), LocalError> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let ends = name.starts_with('-') || name.ends_with('-');
    // `aditd` has its cgroup beside the nodes'.
    let taken = kind == "node" && name == "aditd";
    if name.is_empty() || name.len() > 40 || ends || taken || !name.bytes().all(legal) {
        return Err(LocalError::Config(format!(
            "{name:?} cannot be the name of a {kind}: 1 to 40 lower-case letters, digits \
             and dashes are possible"
        )));
    }
    Ok(())
}

/// Where this program was started from: cargo puts tests one level below the binaries.
fn default_binary_dirs() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = std::env::var_os("ADIT_BIN_DIR")
        .map(PathBuf::from)
        .into_iter()
        .collect();
    if let Ok(exe) = std::env::current_exe() {
        let own = exe.parent().map(PathBuf::from);
        if let Some(own) = own {
            if own.ends_with("deps") || own.ends_with("examples") {
                dirs.extend(own.parent().map(PathBuf::from));
            }
            dirs.push(own);
        }
    }
    dirs
}
