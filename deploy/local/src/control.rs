//! A mesh that runs, seen from any process: its status file, its namespaces, and a
//! socket on which its supervisor takes requests.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::{default_state_root, validate_name};
use crate::error::LocalError;
use crate::mesh::Place;
use crate::overlay::{Applied, Labels};
use crate::state::MeshStatus;
use crate::system::http::{self, HttpAnswer};
use crate::system::layout::Layout;
use crate::system::process::{find_program, is_alive};
use crate::system::sandbox::Sandbox;
use crate::system::{cgroup, teardown};

/// A request takes at most a stop with its grace, and a start.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);
/// The longest answer of a supervisor.
const MAX_ANSWER: u64 = 4 << 20;
/// How often a condition that is waited for is looked at.
const POLL: Duration = Duration::from_millis(10);

/// What a supervisor can be asked for. A component is `aditd`, `ztunnel-<node>`, or
/// `<gateway>.<namespace>` for a waypoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Start a component that was stopped or killed.
    Start {
        /// The component.
        component: String,
    },
    /// End a component with SIGTERM, after the grace with SIGKILL; it stays stopped.
    Stop {
        /// The component.
        component: String,
    },
    /// End a component with SIGKILL; it stays stopped.
    Kill {
        /// The component.
        component: String,
    },
    /// Stop and start a component.
    Restart {
        /// The component.
        component: String,
    },
    /// Start a second instance of a component, and when it is ready, stop the first:
    /// what a rolling update does.
    Replace {
        /// The component.
        component: String,
    },
    /// Make a pod anew, as after `kubectl delete pod`.
    RestartPod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Put objects over the manifests, as `kubectl apply` does. The answer is a list of
    /// [`ApplyOutcome`].
    Apply {
        /// Each with `apiVersion`, `kind` and `metadata.name`.
        objects: Vec<serde_json::Value>,
    },
    /// Take an applied object away.
    Delete {
        /// Its kind, as a user names it.
        kind: String,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Change labels of an object, as `kubectl label` does. The answer is an
    /// [`Applied`].
    Label {
        /// Its kind, as a user names it.
        kind: String,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
        /// What to set, and with `null` to remove.
        labels: Labels,
        /// Whether a label with another value may be changed.
        overwrite: bool,
    },
    /// Read the manifests now; answered when what follows from them has been started.
    Reload,
}

/// What became of one object of [`Request::Apply`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyOutcome {
    /// As `kubectl` names it, for example `gateway.gateway.networking.k8s.io/waypoint`.
    pub object: String,
    /// What became of it.
    pub outcome: Applied,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    pub(crate) error: Option<String>,
    #[serde(default)]
    pub(crate) value: serde_json::Value,
}

/// A handle to a mesh that is up, possibly in another process.
#[derive(Debug, Clone)]
pub struct Running {
    name: String,
    layout: Layout,
}

impl Running {
    /// Finds the mesh `name`.
    ///
    /// # Errors
    /// [`LocalError::Unknown`] when there is none.
    pub fn open(name: &str) -> Result<Self, LocalError> {
        Self::open_at(&default_state_root(), name)
    }

    pub(crate) fn open_at(state_root: &Path, name: &str) -> Result<Self, LocalError> {
        validate_name("mesh", name)?;
        let layout = Layout::new(state_root, name)?;
        if !layout.state_file().exists() {
            return Err(LocalError::Unknown(format!(
                "there is no local mesh {name}; `adit local up` makes one"
            )));
        }
        Ok(Self {
            name: name.into(),
            layout,
        })
    }

    /// Names of all meshes on this machine.
    ///
    /// # Errors
    /// [`LocalError::File`] when the state directory cannot be read.
    pub fn list() -> Result<Vec<String>, LocalError> {
        teardown::meshes(&default_state_root())
    }

    /// The mesh's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the mesh keeps its state.
    pub fn state_directory(&self) -> &Path {
        &self.layout.root
    }

    /// The directory from which `aditd` reads what the mesh is.
    pub fn cluster_directory(&self) -> PathBuf {
        self.layout.cluster_dir()
    }

    /// The directory in which `aditd` writes the status of pods and policies.
    pub fn control_plane_status_directory(&self) -> PathBuf {
        self.layout.status_dir()
    }

    /// The bpffs in which the node's ztunnel pins its programs and maps.
    pub fn bpffs(&self, node: &str) -> PathBuf {
        self.layout.bpffs().join(node)
    }

    /// How the mesh is now.
    ///
    /// # Errors
    /// [`LocalError::File`] when the mesh is gone.
    pub fn status(&self) -> Result<MeshStatus, LocalError> {
        MeshStatus::load(&self.layout.state_file())
    }

    /// Whether its supervisor runs.
    pub fn is_supervised(&self) -> bool {
        self.status()
            .is_ok_and(|status| is_alive(status.supervisor))
    }

    /// Waits until `condition` yields a value.
    ///
    /// # Errors
    /// [`LocalError::Deadline`] with `what` and the last status' problems.
    pub fn wait_for<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut condition: impl FnMut(&MeshStatus) -> Option<T>,
    ) -> Result<T, LocalError> {
        let until = Instant::now() + deadline;
        loop {
            let status = self.status()?;
            if let Some(value) = condition(&status) {
                return Ok(value);
            }
            if Instant::now() >= until {
                return Err(LocalError::Deadline {
                    what: what.into(),
                    seconds: deadline.as_secs_f64(),
                    detail: unready(&status),
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until every pod is ready or has finished, and no pod is on its way out.
    ///
    /// # Errors
    /// [`LocalError::Deadline`] that names the pods that are not.
    pub fn wait_pods_ready(&self, deadline: Duration) -> Result<MeshStatus, LocalError> {
        self.wait_for("readiness of all pods", deadline, |status| {
            let fine = |p: &crate::PodStatus| !p.terminating && (p.ready || p.phase == "Succeeded");
            status.pods.iter().all(fine).then(|| status.clone())
        })
    }

    /// Asks the supervisor for something and waits until it is done.
    ///
    /// # Errors
    /// [`LocalError::Refused`] with the supervisor's reason, or
    /// [`LocalError::SupervisorGone`].
    pub fn request(&self, request: &Request) -> Result<(), LocalError> {
        self.ask(request).map(drop)
    }

    /// [`Self::request`] with the answer of the requests that have one.
    ///
    /// # Errors
    /// As [`Self::request`], and [`LocalError::File`] when the answer is not of that type.
    pub fn request_for<T: serde::de::DeserializeOwned>(
        &self,
        request: &Request,
    ) -> Result<T, LocalError> {
        let value = self.ask(request)?;
        serde_json::from_value(value).map_err(|error| {
            LocalError::file("understand the answer of", &self.layout.control_socket())(
                error.into(),
            )
        })
    }

    fn ask(&self, request: &Request) -> Result<serde_json::Value, LocalError> {
        let path = self.layout.control_socket();
        let mut stream = UnixStream::connect(&path)
            .map_err(|_| LocalError::SupervisorGone(self.name.clone()))?;
        let io = |error| LocalError::file("talk to", &path)(error);
        stream
            .set_read_timeout(Some(REQUEST_DEADLINE))
            .map_err(io)?;
        let mut line = serde_json::to_vec(request).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        stream.write_all(&line).map_err(io)?;
        let mut answer = String::new();
        BufReader::new(stream.take(MAX_ANSWER))
            .read_line(&mut answer)
            .map_err(io)?;
        if answer.is_empty() {
            return Err(LocalError::SupervisorGone(self.name.clone()));
        }
        let reply: Reply = serde_json::from_str(&answer).map_err(|e| io(e.into()))?;
        match reply.error {
            Some(error) => Err(LocalError::Refused(error)),
            None => Ok(reply.value),
        }
    }

    /// A command that runs `program` at `place`, to be given arguments, pipes, and
    /// spawned. In a pod it has the pod's cgroup, network, names and `PATH`.
    ///
    /// # Errors
    /// [`LocalError::Unknown`] when the place or the program does not exist.
    pub fn command(&self, place: &Place, program: &str) -> Result<Command, LocalError> {
        let status = self.status()?;
        let layout = &self.layout;
        let sandbox = match place {
            Place::Pod { namespace, name } => {
                let pod = status.pod(namespace, name).ok_or_else(|| {
                    LocalError::Unknown(format!(
                        "mesh {} has no pod {namespace}/{name}; it has {}",
                        self.name,
                        pod_names(&status)
                    ))
                })?;
                Sandbox::netns_only(&pod.netns)?
                    .cgroup(&pod.cgroup)?
                    .names(
                        name,
                        &layout.hosts(Some(namespace)),
                        Some(&layout.resolv_conf(namespace)),
                        &[layout.netns_dir(), layout.bpffs()],
                    )?
            }
            Place::Node(node) => {
                let found = status.node(node).ok_or_else(|| {
                    let names: Vec<&str> = status.nodes.iter().map(|n| n.name.as_str()).collect();
                    LocalError::Unknown(format!(
                        "mesh {} has no node {node}; it has {}",
                        self.name,
                        names.join(", ")
                    ))
                })?;
                let cgroup = layout.host_cgroup(node);
                cgroup::create(&cgroup)?;
                Sandbox::netns_only(&found.netns)?.cgroup(&cgroup)?.names(
                    node,
                    &layout.hosts(None),
                    None,
                    &[],
                )?
            }
            Place::Fabric => {
                let cgroup = layout.cgroup.join("fabric");
                cgroup::create(&cgroup)?;
                Sandbox::netns_only(&layout.fabric_netns())?
                    .cgroup(&cgroup)?
                    .names("fabric", &layout.hosts(None), None, &[])?
            }
        };
        let dirs: Vec<PathBuf> = status.search_path.split(':').map(PathBuf::from).collect();
        let path = find_program(program, &dirs)
            .ok_or_else(|| LocalError::Unknown(format!("there is no program {program}")))?;
        let mut command = sandbox.command(&path);
        command.env("PATH", &status.search_path);
        Ok(command)
    }

    /// A GET to a port that a component has on its node's loopback: 15000 admin, 15020
    /// metrics, 15021 readiness.
    ///
    /// # Errors
    /// [`LocalError::System`] when nobody answers.
    pub fn get(&self, node: &str, port: u16, path: &str) -> Result<HttpAnswer, LocalError> {
        self.http(node, "GET", port, path)
    }

    /// [`Self::get`] with another method, for example POST to `/logging`.
    ///
    /// # Errors
    /// [`LocalError::System`] when nobody answers.
    pub fn http(
        &self,
        node: &str,
        method: &str,
        port: u16,
        path: &str,
    ) -> Result<HttpAnswer, LocalError> {
        let netns = self.layout.node_netns(node);
        if !netns.exists() {
            return Err(LocalError::Unknown(format!(
                "mesh {} has no node {node}",
                self.name
            )));
        }
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        http::request(&netns, address, method, path, Duration::from_secs(10))
    }

    /// A GET to a port of the control plane.
    ///
    /// # Errors
    /// [`LocalError::System`] when nobody answers.
    pub fn get_control_plane(&self, port: u16, path: &str) -> Result<HttpAnswer, LocalError> {
        let netns = self.layout.aditd_netns();
        let address = SocketAddr::from((crate::address::CONTROL_PLANE.v4, port));
        http::request(&netns, address, "GET", path, Duration::from_secs(10))
    }

    /// The log of a component.
    ///
    /// # Errors
    /// [`LocalError::Unknown`] when there is no such component.
    pub fn component_log(&self, component: &str) -> Result<PathBuf, LocalError> {
        let status = self.status()?;
        let found = status.component(component).ok_or_else(|| {
            let names = status.components.iter().map(|c| c.name.as_str());
            LocalError::Unknown(format!(
                "mesh {} has no component {component}; it has {}",
                self.name,
                names.collect::<Vec<_>>().join(", ")
            ))
        })?;
        Ok(found.log.clone())
    }
}

fn pod_names(status: &MeshStatus) -> String {
    let names = status
        .pods
        .iter()
        .map(|p| format!("{}/{}", p.namespace, p.name));
    let names: Vec<String> = names.collect();
    match names.is_empty() {
        true => "none".into(),
        false => names.join(", "),
    }
}

/// What is not as it should be, for the message of a deadline.
fn unready(status: &MeshStatus) -> String {
    let mut text = String::new();
    for component in status.components.iter().filter(|c| !c.ready) {
        text += &format!("; {} is not ready", component.name);
        if !component.message.is_empty() {
            text += &format!(" ({})", component.message);
        }
    }
    for pod in status.pods.iter().filter(|pod| !pod.ready) {
        text += &format!("; pod {}/{} is {}", pod.namespace, pod.name, pod.phase);
        for container in pod.containers.iter().filter(|c| !c.message.is_empty()) {
            text += &format!(" (container {}: {})", container.name, container.message);
        }
    }
    for problem in &status.problems {
        text += &format!("; {problem}");
    }
    text
}
