//! A mesh that a test owns.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use adit_local::{DataPlane, Mesh, MeshConfig, Place, Request};
use anyhow::{Context, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::manifest::Manifest;
use crate::socket::SocketStock;

/// The sample mesh of the README: namespace `shop` in the mesh, `legacy` outside.
pub const SAMPLE_MESH: &[(&str, &str)] = &[
    (
        "nodes.yaml",
        include_str!("../../deploy/samples/mesh/nodes.yaml"),
    ),
    (
        "shop.yaml",
        include_str!("../../deploy/samples/mesh/shop.yaml"),
    ),
    (
        "legacy.yaml",
        include_str!("../../deploy/samples/mesh/legacy.yaml"),
    ),
];

/// Conditions are waited for so long unless a test says otherwise: far longer than what is
/// promised, since test machines are slow and shared.
pub const DEADLINE: Duration = Duration::from_secs(30);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Which pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pod<'a> {
    /// Namespace.
    pub namespace: &'a str,
    /// Name.
    pub name: &'a str,
}

/// `namespace/name`.
///
/// # Panics
/// Without a slash.
pub fn pod(path: &str) -> Pod<'_> {
    let (namespace, name) = path.split_once('/').expect("a pod is named namespace/name");
    Pod { namespace, name }
}

type Change = Box<dyn FnOnce(&mut MeshConfig)>;

/// How a [`TestMesh`] is made.
pub struct MeshBuilder {
    files: Vec<(String, String)>,
    change: Vec<Change>,
    wait_for_pods: bool,
}

impl Default for MeshBuilder {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            change: Vec::new(),
            wait_for_pods: true,
        }
    }
}

impl MeshBuilder {
    /// Adds manifests by file name.
    pub fn files(mut self, files: &[(&str, &str)]) -> Self {
        self.files.extend(
            files
                .iter()
                .map(|(n, y)| ((*n).to_owned(), (*y).to_owned())),
        );
        self
    }

    /// Changes the configuration.
    pub fn config(mut self, change: impl FnOnce(&mut MeshConfig) + 'static) -> Self {
        self.change.push(Box::new(change));
        self
    }

    /// Sets a variable of every ztunnel's environment.
    pub fn ztunnel_env(self, name: &str, value: &str) -> Self {
        let (name, value) = (name.to_owned(), value.to_owned());
        self.config(move |config| {
            config.ztunnel_env.insert(name, value);
        })
    }

    /// Without `aditd` and ztunnels.
    pub fn without_mesh(self) -> Self {
        self.config(|config| config.data_plane = DataPlane::Off)
    }

    /// Does not wait for the pods to be ready and enrolled.
    pub fn do_not_wait(mut self) -> Self {
        self.wait_for_pods = false;
        self
    }

    /// Brings the mesh up; returns when its pods are ready, and enrolled where they should be.
    ///
    /// # Errors
    /// Whatever did not come up, with the last lines of its log.
    pub fn up(self) -> anyhow::Result<TestMesh> {
        let directory = tempfile::Builder::new().prefix("adit-test-").tempdir()?;
        for (name, yaml) in &self.files {
            std::fs::write(directory.path().join(name), yaml)?;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("t{}-{number}", std::process::id());
        let mut config = MeshConfig::new(name, directory.path());
        config.ephemeral = true;
        config.ztunnel_env.insert("RUST_LOG".into(), "info".into());
        for change in self.change {
            change(&mut config);
        }
        let meshed = config.data_plane == DataPlane::On;
        let mesh = TestMesh {
            mesh: Mesh::up(config)?,
            directory,
            stock: SocketStock::default(),
        };
        if self.wait_for_pods {
            mesh.mesh.wait_pods_ready(DEADLINE)?;
            if meshed {
                mesh.wait_enrolled()?;
            }
        }
        Ok(mesh)
    }
}

/// A mesh; removed when it is dropped.
pub struct TestMesh {
    mesh: Mesh,
    directory: TempDir,
    pub(crate) stock: SocketStock,
}

impl std::ops::Deref for TestMesh {
    type Target = Mesh;

    fn deref(&self) -> &Mesh {
        &self.mesh
    }
}

impl TestMesh {
    /// [`SAMPLE_MESH`], up and enrolled.
    ///
    /// # Errors
    /// As [`MeshBuilder::up`].
    pub fn sample() -> anyhow::Result<Self> {
        MeshBuilder::default().files(SAMPLE_MESH).up()
    }

    /// Where the manifests are.
    pub fn manifests(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// Writes a manifest; the mesh follows by itself.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn apply(&self, file: &str, yaml: &str) -> anyhow::Result<()> {
        let path = self.directory.path().join(file);
        let temporary = self.directory.path().join(format!(".{file}.tmp"));
        std::fs::write(&temporary, yaml)?;
        std::fs::rename(&temporary, &path).with_context(|| format!("write {file}"))
    }

    /// Removes a manifest.
    ///
    /// # Errors
    /// There is no such file.
    pub fn delete(&self, file: &str) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.directory.path().join(file))?)
    }

    /// Sets (or, without a value, removes) `istio.io/dataplane-mode` in the manifest that
    /// holds the namespace.
    ///
    /// # Errors
    /// No manifest has the namespace.
    pub fn label_namespace(&self, namespace: &str, mode: Option<&str>) -> anyhow::Result<()> {
        let label = mode.map_or_else(
            || "  labels: {}".to_owned(),
            |mode| format!("  labels: {{ istio.io/dataplane-mode: {mode} }}"),
        );
        let yaml =
            format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n{label}\n");
        for entry in std::fs::read_dir(self.directory.path())? {
            let path = entry?.path();
            let text = std::fs::read_to_string(&path)?;
            let documents: Vec<&str> = text.split("\n---\n").collect();
            let is_it = |d: &&str| {
                d.contains("kind: Namespace")
                    && d.lines().any(|l| l.trim() == format!("name: {namespace}"))
            };
            if documents.iter().any(is_it) {
                let changed: Vec<&str> = documents
                    .iter()
                    .map(|d| if is_it(d) { yaml.trim_end() } else { d })
                    .collect();
                let name = path
                    .file_name()
                    .and_then(|n| n.to_str())
                    .context("file name")?;
                return self.apply(name, &changed.join("\n---\n"));
            }
        }
        bail!("no manifest has namespace {namespace}")
    }

    /// Replaces the manifest `policies.yaml` by these policies and waits until every ztunnel
    /// has them, and has forgotten those that were there before: a policy and a Service go
    /// with them as a mark, which arrive after all else.
    ///
    /// # Errors
    /// As [`Self::eventually`].
    pub fn set_policies(&self, policies: Manifest) -> anyhow::Result<()> {
        let mark = format!("mark-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let marked = policies
            .policy("AuthorizationPolicy", "mark", &mark, "", "{ rules: [{}] }")
            .service(
                Pod {
                    namespace: "mark",
                    name: &mark,
                },
                "none",
                "",
            );
        self.apply("policies.yaml", marked.yaml())?;
        self.eventually("policies at the ztunnels", || {
            for node in self.mesh.status()?.nodes {
                let dump = self.config_dump(&node.name)?;
                for kind in ["policies", "services"] {
                    let all = dump[kind].as_array().context("a list")?;
                    let mut marks = all.iter().filter(|o| o["namespace"] == "mark");
                    let here = marks.next().is_some_and(|o| o["name"] == *mark);
                    if !here || marks.next().is_some() {
                        bail!("{kind} of {} have no {mark} yet", node.name);
                    }
                }
            }
            Ok(())
        })
    }

    /// Waits until `probe` has a value.
    ///
    /// # Errors
    /// `what` did not happen by the deadline; with what the probe said last.
    pub fn eventually<T>(
        &self,
        what: &str,
        mut probe: impl FnMut() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let until = Instant::now() + DEADLINE;
        loop {
            match probe() {
                Ok(value) => return Ok(value),
                Err(error) if Instant::now() >= until => {
                    return Err(error.context(format!("{what}: not within {DEADLINE:?}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Waits until the pods of labelled namespaces are enrolled and every ztunnel has been
    /// told so, and no others are.
    ///
    /// # Errors
    /// As [`Self::eventually`].
    pub fn wait_enrolled(&self) -> anyhow::Result<()> {
        self.eventually("enrolment", || {
            let wanted = self.enrolled_by_label()?;
            for node in self.mesh.status()?.nodes {
                let dump = self.config_dump(&node.name)?;
                for workload in dump["workloads"].as_array().context("workloads")? {
                    let (namespace, name) = (&workload["namespace"], &workload["name"]);
                    let path = format!(
                        "{}/{}",
                        namespace.as_str().unwrap_or(""),
                        name.as_str().unwrap_or("")
                    );
                    let expected = if wanted.contains(&path) {
                        "HBONE"
                    } else {
                        "TCP"
                    };
                    if workload["protocol"] != expected {
                        bail!(
                            "{path} is {} at {}, expected {expected}",
                            workload["protocol"],
                            node.name
                        );
                    }
                }
                for path in &wanted {
                    if !self.knows(&dump, path) {
                        bail!("{path} is unknown at {}", node.name);
                    }
                }
            }
            Ok(())
        })
    }

    fn knows(&self, dump: &Value, path: &str) -> bool {
        let Pod { namespace, name } = pod(path);
        dump["workloads"].as_array().is_some_and(|all| {
            all.iter()
                .any(|w| w["namespace"] == namespace && w["name"] == name)
        })
    }

    /// The pods that the labels in the manifests put into the mesh.
    fn enrolled_by_label(&self) -> anyhow::Result<Vec<String>> {
        let mut namespaces = Vec::new();
        let mut pod_modes = std::collections::BTreeMap::new();
        for entry in std::fs::read_dir(self.directory.path())? {
            let text = std::fs::read_to_string(entry?.path())?;
            for document in serde_yaml_ng::Deserializer::from_str(&text) {
                use serde::Deserialize;
                // What does not parse is a test's business.
                let Ok(object) = Value::deserialize(document) else {
                    continue;
                };
                let metadata = &object["metadata"];
                let mode = metadata["labels"]["istio.io/dataplane-mode"].as_str();
                let name = metadata["name"].as_str().unwrap_or_default().to_owned();
                match object["kind"].as_str() {
                    Some("Namespace") if mode == Some("ambient") => namespaces.push(name),
                    Some("Pod") => {
                        let namespace = metadata["namespace"].as_str().unwrap_or("default");
                        if let Some(mode) = mode {
                            pod_modes.insert(format!("{namespace}/{name}"), mode.to_owned());
                        }
                    }
                    _ => {}
                }
            }
        }
        let status = self.mesh.status()?;
        // A waypoint's pod opts out, in labels that are in no manifest.
        let waypoints = status.components.iter().filter_map(|c| c.pod.clone());
        let waypoints: Vec<String> = waypoints.collect();
        let pods = status.pods.into_iter();
        Ok(pods
            .filter(|p| !waypoints.contains(&p.uid))
            .filter(|p| {
                let path = format!("{}/{}", p.namespace, p.name);
                match pod_modes.get(&path).map(String::as_str) {
                    Some(mode) => mode == "ambient",
                    None => namespaces.contains(&p.namespace),
                }
            })
            .map(|p| format!("{}/{}", p.namespace, p.name))
            .collect())
    }

    /// Where a pod is.
    pub fn place(&self, pod: Pod<'_>) -> Place {
        Place::pod(pod.namespace, pod.name)
    }

    /// The pod's first address.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn address(&self, pod: Pod<'_>) -> anyhow::Result<String> {
        let status = self.mesh.status()?;
        let found = status.pod(pod.namespace, pod.name).context("no such pod")?;
        found
            .addresses
            .first()
            .cloned()
            .context("the pod has no address")
    }

    /// The node that a pod runs on.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn node_of(&self, pod: Pod<'_>) -> anyhow::Result<String> {
        let status = self.mesh.status()?;
        Ok(status
            .pod(pod.namespace, pod.name)
            .context("no such pod")?
            .node
            .clone())
    }

    /// `kill -9` of a node's ztunnel; it stays away until [`Self::start_ztunnel`].
    ///
    /// # Errors
    /// The supervisor's.
    pub fn kill_ztunnel(&self, node: &str) -> anyhow::Result<()> {
        Ok(self.mesh.request(&Request::Kill {
            component: format!("ztunnel-{node}"),
        })?)
    }

    /// Starts a node's ztunnel again; returns when it is ready.
    ///
    /// # Errors
    /// The supervisor's.
    pub fn start_ztunnel(&self, node: &str) -> anyhow::Result<()> {
        let component = format!("ztunnel-{node}");
        self.mesh.request(&Request::Start {
            component: component.clone(),
        })?;
        self.mesh
            .wait_for("readiness of ztunnel", DEADLINE, |status| {
                status
                    .component(&component)
                    .is_some_and(|c| c.ready)
                    .then_some(())
            })?;
        Ok(())
    }

    /// The process id of a component (`aditd`, `ztunnel-<node>`).
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self, component: &str) -> anyhow::Result<u32> {
        let status = self.mesh.status()?;
        let found = status.component(component).context("no such component")?;
        Ok(found.process.as_ref().context("it does not run")?.pid)
    }
}
