//! What should be, what is, and the steps from one to the other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use k8s_openapi::jiff::Timestamp;
use notify::RecommendedWatcher;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::component::Component;
use super::control_socket;
use super::event::{Event, Update};
use super::pod::{PodRun, Stop};
use super::probe::Kubelet;
use super::publish::Published;
use super::waypoint::Waypoint;
use super::{setup, watch as watching};
use crate::address::{self, PodAddresses, ServiceAddresses};
use crate::cluster::{ContainerView, NodeView, PodView};
use crate::config::{DataPlane, MeshConfig, validate_name};
use crate::error::LocalError;
use crate::manifest::{
    self, Desired, DesiredPod, Identity, Key, NodeFacts, Object, ParsedFile, Placement, PodFacts,
    SourceFile,
};
use crate::overlay::Overlay;
use crate::state::{ComponentStatus, ContainerStatus, ProcessId};
use crate::system::layout::Layout;
use crate::system::process::{find_program, identify, search_path};
use crate::system::sandbox::Sandbox;
use crate::system::{cgroup, links};

/// A pod and its task.
pub(super) struct PodEntry {
    pub(super) view: PodView,
    pub(super) containers: Vec<ContainerStatus>,
    fingerprint: String,
    pub(super) stop: watch::Sender<Stop>,
    pub(super) waypoint: Option<Waypoint>,
}

pub(super) struct Reconciler {
    pub(super) config: MeshConfig,
    pub(super) layout: Layout,
    pub(super) supervisor: ProcessId,
    pub(super) nodes: Vec<NodeView>,
    /// By uid.
    pub(super) pods: BTreeMap<String, PodEntry>,
    pub(super) component_status: Vec<ComponentStatus>,
    pub(super) files: BTreeMap<PathBuf, (SourceFile, ParsedFile)>,
    pub(super) desired: Desired,
    pub(super) overlay: Overlay,
    /// The user's files; `files` are those and what was applied.
    pub(super) sources: Vec<SourceFile>,
    /// Objects of the user that something was applied in place of.
    pub(super) hidden: BTreeSet<Identity>,
    /// The overlay changed and has not been followed yet.
    pub(super) overlaid: bool,
    /// About the manifests as such.
    pub(super) file_problems: Vec<String>,
    /// About single pods.
    pod_problems: Vec<String>,
    pub(super) service_addresses: ServiceAddresses,
    pub(super) published: Published,
    pub(super) events: mpsc::Sender<Event>,
    congestion: Option<String>,
    pub(super) ranges: Vec<PodAddresses>,
    pub(super) kubelets: Vec<Kubelet>,
    pub(super) components: BTreeMap<String, Component>,
    watcher: Option<RecommendedWatcher>,
    pub(super) tokens_issued: Instant,
    /// Of the pods.
    pub(super) tasks: JoinSet<()>,
}

impl Reconciler {
    /// Makes the ground of the mesh.
    pub(super) fn create(
        config: MeshConfig,
        layout: Layout,
        events: mpsc::Sender<Event>,
    ) -> Result<Self, LocalError> {
        let supervisor = identify(std::process::id()).ok_or_else(|| {
            LocalError::Config("/proc does not know this process; is it mounted?".into())
        })?;
        if config.data_plane == DataPlane::On {
            for program in [&config.aditd, &config.ztunnel] {
                if find_program(program, &config.binary_dirs).is_none() {
                    return Err(LocalError::Config(format!(
                        "there is no program {program} in {}",
                        search_path(&config.binary_dirs)
                    )));
                }
            }
        }
        let congestion = setup::congestion_control(&config);
        let mut reconciler = Self {
            supervisor,
            nodes: Vec::new(),
            pods: BTreeMap::new(),
            component_status: Vec::new(),
            files: BTreeMap::new(),
            desired: Desired::default(),
            overlay: Overlay::open(&layout.overlay_dir())?,
            sources: Vec::new(),
            hidden: BTreeSet::new(),
            overlaid: false,
            file_problems: Vec::new(),
            pod_problems: Vec::new(),
            service_addresses: ServiceAddresses::default(),
            published: Published::default(),
            events,
            congestion,
            ranges: Vec::new(),
            kubelets: Vec::new(),
            components: BTreeMap::new(),
            watcher: None,
            tokens_issued: Instant::now(),
            tasks: JoinSet::new(),
            config,
            layout,
        };
        reconciler.read_files()?;
        reconciler.nodes = reconciler.choose_nodes()?;
        setup::create(
            &reconciler.config,
            &reconciler.layout,
            &reconciler.nodes,
            reconciler.congestion.as_deref(),
        )?;
        Ok(reconciler)
    }

    /// Starts pods and components.
    pub(super) async fn begin(&mut self) -> Result<(), LocalError> {
        let path = self.layout.control_socket();
        let listener = UnixListener::bind(&path).map_err(LocalError::file("listen on", &path))?;
        tokio::task::spawn_local(control_socket::serve(listener, self.events.clone()));
        for index in 0..self.nodes.len() {
            let node = &self.nodes[index].name;
            let sandbox = Sandbox::netns_only(&self.layout.node_netns(node))?
                .cgroup(&self.layout.kubelet_cgroup(node))?
                .session();
            let dirs = self.config.binary_dirs.clone();
            self.kubelets.push(Kubelet::new(sandbox, dirs));
            // MAX_NODES fits.
            let index = u8::try_from(index).unwrap_or(u8::MAX);
            self.ranges.push(PodAddresses::new(index));
        }
        self.watcher = watching::watch(&self.config.manifests, self.events.clone());
        if self.config.data_plane == DataPlane::On {
            self.announce_components();
        }
        self.publish()?;
        self.follow_manifests()?;
        if self.config.data_plane == DataPlane::On {
            let plan = setup::aditd(&self.config, &self.layout)?;
            let aditd = Component::new(plan, self.events.clone());
            self.components.insert("aditd".into(), aditd);
            let root = setup::root_certificate(&self.layout);
            let events = self.events.clone();
            tokio::task::spawn_local(async move {
                while !root.exists() {
                    sleep(Duration::from_millis(20)).await;
                }
                let _ = events.send(Event::RootCertificate).await;
            });
        }
        Ok(())
    }

    pub(super) fn restart_pod(&mut self, key: Key) -> Result<(), String> {
        let mut live = self.pods.values_mut();
        let entry = live
            .find(|entry| entry.view.key == key && !entry.view.terminating)
            .ok_or_else(|| format!("mesh {} has no pod {}/{}", self.config.name, key.0, key.1))?;
        entry.terminate();
        self.follow_manifests().map_err(|error| error.to_string())
    }

    fn choose_nodes(&self) -> Result<Vec<NodeView>, LocalError> {
        let objects = self.objects();
        let user: BTreeMap<String, _> = objects
            .iter()
            .filter_map(|object| match object {
                Object::Node(node) => Some((node.metadata.name.clone()?, (**node).clone())),
                _ => None,
            })
            .collect();
        let mut names = self.config.nodes.clone();
        if names.is_empty() {
            names = user.keys().cloned().collect();
        }
        if names.is_empty() {
            names = vec!["node1".into(), "node2".into()];
        }
        let node = |(index, name): (usize, String)| {
            validate_name("node", &name)?;
            let index = u8::try_from(index)
                .map_err(|_| LocalError::Config("there are too many nodes".into()))?;
            Ok(NodeView {
                object: user.get(&name).cloned(),
                addresses: address::node(index),
                pod_cidrs: address::pod_cidrs(index),
                name,
            })
        };
        names.into_iter().enumerate().map(node).collect()
    }

    /// Ends the pods that should not be, makes those that should, and passes on what
    /// changed about the others.
    pub(super) fn follow_manifests(&mut self) -> Result<(), LocalError> {
        let facts: Vec<NodeFacts> = self.nodes.iter().map(node_facts).collect();
        let live = self.pods.values().filter(|entry| !entry.view.terminating);
        let running: Placement = live
            .map(|entry| (entry.view.key.clone(), entry.view.node.clone()))
            .collect();
        let mut objects = self.objects();
        if self.config.data_plane == DataPlane::Off {
            objects.retain(|object| !matches!(object, Object::Gateway(_)));
        }
        self.desired = manifest::expand(&objects, &facts, &running);
        for (name, object) in &self.desired.nodes {
            match self.nodes.iter_mut().find(|node| node.name == *name) {
                Some(node) => node.object = Some(object.clone()),
                None => self.desired.problems.push(format!(
                    "Node {name} is no node of this mesh; nodes are fixed when it is made"
                )),
            }
        }
        let mut settled = BTreeSet::new();
        for entry in self.pods.values_mut() {
            if entry.view.terminating {
                continue;
            }
            match self.desired.pods.get(&entry.view.key) {
                Some(wanted) if entry.serves(wanted) => {
                    entry.view.object.metadata = wanted.pod.metadata.clone();
                    settled.insert(entry.view.key.clone());
                }
                _ => entry.terminate(),
            }
        }
        self.pod_problems.clear();
        let wanted: Vec<(Key, DesiredPod)> = self
            .desired
            .pods
            .iter()
            .filter(|(key, _)| !settled.contains(*key))
            .map(|(key, pod)| (key.clone(), pod.clone()))
            .collect();
        let mut begun = Vec::new();
        for (key, pod) in wanted {
            match self.make_pod(key.clone(), pod) {
                Ok(pod) => begun.push(pod),
                Err(error) => {
                    let problem = format!("Pod {}/{}: {error}", key.0, key.1);
                    self.pod_problems.push(problem);
                }
            }
        }
        self.announce_waypoints();
        // Names and service addresses are there before the programs that use them.
        self.publish()?;
        for (pod, stop) in begun {
            self.tasks.spawn_local(Rc::new(pod).run(stop));
        }
        self.start_waypoints();
        Ok(())
    }

    fn make_pod(
        &mut self,
        key: Key,
        wanted: DesiredPod,
    ) -> Result<(PodRun, watch::Receiver<Stop>), LocalError> {
        let spec = wanted.pod.spec.clone().unwrap_or_default();
        let node = spec.node_name.unwrap_or_default();
        let unplaced = || LocalError::Unknown(format!("there is no node {node}"));
        let index = self.node_index(&node).ok_or_else(unplaced)?;
        let addresses = self.ranges[index].allocate().ok_or_else(|| {
            LocalError::Config(format!("the pod addresses of node {node} are used up"))
        })?;
        let uid = random_uid();
        let layout = self.layout.clone();
        // MAX_NODES fits.
        let number = u8::try_from(index).unwrap_or(u8::MAX);
        let congestion = self.congestion.as_deref();
        let cgroup = layout.pod_cgroup(&node, &uid);
        let made = links::create_pod(&layout, (&node, number), &uid, addresses, congestion)
            .and_then(|()| cgroup::create(&cgroup));
        if let Err(error) = made {
            self.ranges[index].release(addresses);
            // The first error is the one to tell.
            let _ = links::remove_pod(&layout, &node, &uid, addresses);
            return Err(error);
        }
        let (namespace, name) = key.clone();
        let host = self.nodes[index].addresses;
        let facts = PodFacts {
            uid: uid.clone(),
            addresses: addresses.both().map(|ip| ip.to_string()).to_vec(),
            host_address: host.v4.to_string(),
            search_path: search_path(&self.config.binary_dirs),
        };
        let sandbox = Sandbox::netns_only(&layout.pod_netns(&uid))?
            .cgroup(&cgroup)?
            .names(
                &name,
                &layout.hosts(Some(&namespace)),
                Some(&layout.resolv_conf(&namespace)),
                &[layout.netns_dir(), layout.bpffs()],
            )?
            .session();
        let component = wanted.waypoint.as_ref();
        let component = component.map(|gateway| setup::waypoint_name(gateway, &namespace));
        let log_of = |container: &str| match &component {
            Some(component) => layout.component_log(component),
            None => layout.container_log(&namespace, &name, container),
        };
        let status = |container: &k8s_openapi::api::core::v1::Container| ContainerStatus {
            name: container.name.clone(),
            process: None,
            ready: false,
            restarts: 0,
            message: String::new(),
            log: log_of(&container.name),
        };
        let (stop, stopped) = watch::channel(Stop::No);
        let entry = PodEntry {
            view: PodView {
                key,
                object: wanted.pod.clone(),
                uid: uid.clone(),
                node: node.clone(),
                host,
                addresses,
                phase: "Pending",
                ready: false,
                terminating: false,
                created: now(),
                containers: Vec::new(),
            },
            containers: spec.containers.iter().map(status).collect(),
            fingerprint: wanted.fingerprint,
            stop,
            waypoint: wanted.waypoint.map(|gateway| Waypoint {
                gateway,
                sandbox: sandbox.clone(),
                component: None,
            }),
        };
        let held = entry.waypoint.is_some();
        if held && let Err(error) = setup::issue_pod_token(&layout, &entry.view) {
            self.ranges[index].release(addresses);
            // The first error is the one to tell.
            let _ = links::remove_pod(&layout, &node, &uid, addresses);
            return Err(error);
        }
        self.pods.insert(uid.clone(), entry);
        let run = PodRun {
            object: wanted.pod,
            uid,
            node,
            addresses,
            facts,
            sandbox,
            layout,
            dirs: self.config.binary_dirs.clone(),
            kubelet: self.kubelets[index].handle(),
            held,
            default_grace: self.config.grace,
            events: self.events.clone(),
        };
        Ok((run, stopped))
    }

    pub(super) fn node_index(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == name)
    }

    fn announce_components(&mut self) {
        let aditd = std::iter::once(("aditd".to_owned(), None));
        let ztunnels = self.nodes.iter().map(|node| {
            let name = node.name.clone();
            (format!("ztunnel-{name}"), Some(name))
        });
        for (name, node) in aditd.chain(ztunnels) {
            self.component_status.push(ComponentStatus {
                log: self.layout.component_log(&name),
                name,
                node,
                pod: None,
                process: None,
                ready: false,
                restarts: 0,
                message: String::new(),
            });
        }
    }

    pub(super) fn start_ztunnels(&mut self) {
        for node in &self.nodes {
            match setup::ztunnel(&self.config, &self.layout, node) {
                Ok(plan) => {
                    let component = Component::new(plan, self.events.clone());
                    let name = format!("ztunnel-{}", node.name);
                    self.components.insert(name, component);
                }
                Err(error) => tracing::error!(node = node.name, %error, "no ztunnel"),
            }
        }
    }

    /// Everything that is wrong at the moment.
    pub(super) fn problems(&self) -> Vec<String> {
        let parsed = self.files.values().flat_map(|(_, p)| p.problems.iter());
        let all = self.file_problems.iter().chain(parsed);
        let all = all.chain(&self.desired.problems).chain(&self.pod_problems);
        all.cloned().collect()
    }
}

impl PodEntry {
    /// Whether the pod is what is wanted, labels and annotations apart.
    fn serves(&self, wanted: &DesiredPod) -> bool {
        let spec = wanted.pod.spec.as_ref();
        let node = spec.and_then(|spec| spec.node_name.as_ref());
        self.fingerprint == wanted.fingerprint && node == Some(&self.view.node)
    }

    fn terminate(&mut self) {
        self.view.terminating = true;
        self.view.ready = false;
        let component = self.waypoint.as_mut().and_then(|w| w.component.take());
        let Some(component) = component else {
            self.stop.send_replace(Stop::End);
            return;
        };
        // The pod stays until its waypoint has drained.
        let stop = self.stop.clone();
        tokio::task::spawn_local(async move {
            component.end().await;
            stop.send_replace(Stop::End);
        });
    }

    pub(super) fn update(&mut self, index: usize, update: Update) {
        let Some(container) = self.containers.get_mut(index) else {
            return;
        };
        match update {
            Update::Started { process, again } => {
                container.process = process;
                container.restarts += u32::from(again);
            }
            Update::Ready(ready) => container.ready = ready,
            Update::Ended(message) => {
                container.process = None;
                container.ready = false;
                container.message = message;
            }
        }
        let view = |c: &ContainerStatus| ContainerView {
            name: c.name.clone(),
            running: c.process.is_some() || c.ready,
            ready: c.ready,
            restarts: c.restarts,
        };
        self.view.containers = self.containers.iter().map(view).collect();
        let ready = self.containers.iter().all(|c| c.ready) && !self.containers.is_empty();
        self.view.ready = ready && !self.view.terminating;
    }
}

fn node_facts(node: &NodeView) -> NodeFacts {
    let labels = node.object.as_ref().and_then(|o| o.metadata.labels.clone());
    NodeFacts {
        name: node.name.clone(),
        labels: labels.unwrap_or_default(),
    }
}

pub(super) fn now() -> Timestamp {
    let since = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    let seconds = i64::try_from(since).unwrap_or_default();
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// RFC 9562, version 4.
fn random_uid() -> String {
    let bits: u128 = rand::random();
    let bits = (bits & !(0xf << 76) | (0x4 << 76)) & !(0x3 << 62) | (0x2 << 62);
    let digits = format!("{bits:032x}");
    let part = |from: usize, to: usize| &digits[from..to];
    format!(
        "{}-{}-{}-{}-{}",
        part(0, 8),
        part(8, 12),
        part(12, 16),
        part(16, 20),
        part(20, 32)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_uids_are_version_four() {
        let uid = random_uid();
        assert_eq!(uid.len(), 36);
        assert_eq!(&uid[14..15], "4");
        assert!(matches!(&uid[19..20], "8" | "9" | "a" | "b"), "{uid}");
        assert_ne!(uid, random_uid());
    }
}
