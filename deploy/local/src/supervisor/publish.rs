//! Tells everybody how the mesh is: `aditd` by manifests, pods by `/etc/hosts`, the
//! kernel by service addresses, other processes by the status file. Each is written
//! only when it changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::reconcile::Reconciler;
use super::setup;
use crate::cluster::{self, PodView, ServiceView};
use crate::config::DataPlane;
use crate::error::LocalError;
use crate::manifest::Key;
use crate::state::{MeshStatus, NodeStatus, PodStatus, write_atomically};
use crate::system::helper::nft;
use crate::system::process::search_path;
use crate::{hosts, vip};

/// A log that has grown past this is moved aside; the state directory is memory.
const MAX_LOG: u64 = 16 * 1024 * 1024;

/// What was written last.
#[derive(Debug, Default)]
pub(super) struct Published {
    cluster: BTreeMap<PathBuf, String>,
    names: BTreeMap<PathBuf, String>,
    ruleset: String,
    status: Option<MeshStatus>,
}

impl Reconciler {
    /// Brings everything up to date.
    pub(super) fn publish(&mut self) -> Result<(), LocalError> {
        let pods: Vec<PodView> = self.visible_pods();
        let (services, problems) = cluster::services(
            &self.desired.services,
            &self.desired.slices,
            &pods,
            &mut self.service_addresses,
        );
        self.publish_names(&services, &pods)?;
        self.publish_services(&services)?;
        self.publish_cluster(&services, &pods)?;
        self.publish_status(problems)
    }

    /// A pod on its way out is hidden by its successor of the same name.
    fn visible_pods(&self) -> Vec<PodView> {
        let live = self.pods.values().filter(|entry| !entry.view.terminating);
        let taken: BTreeSet<&Key> = live.map(|entry| &entry.view.key).collect();
        let visible = |view: &&PodView| !view.terminating || !taken.contains(&view.key);
        let views = self.pods.values().map(|entry| &entry.view);
        let mut pods: Vec<PodView> = views.filter(visible).cloned().collect();
        pods.sort_by(|a, b| a.key.cmp(&b.key));
        pods
    }

    fn publish_names(
        &mut self,
        services: &[ServiceView],
        pods: &[PodView],
    ) -> Result<(), LocalError> {
        let namespaces: BTreeSet<&str> = pods.iter().map(|pod| pod.key.0.as_str()).collect();
        let mut files = BTreeMap::new();
        for namespace in namespaces {
            let path = self.layout.hosts(Some(namespace));
            files.insert(path, hosts::hosts(Some(namespace), services, pods));
            let path = self.layout.resolv_conf(namespace);
            files.insert(path, hosts::resolv_conf(namespace));
        }
        files.insert(self.layout.hosts(None), hosts::hosts(None, services, pods));
        for (path, text) in &files {
            if self.published.names.get(path) != Some(text) {
                overwrite(path, text)?;
            }
        }
        // Files of namespaces that are gone may still be mounted somewhere.
        self.published.names.extend(files);
        Ok(())
    }

    fn publish_services(&mut self, services: &[ServiceView]) -> Result<(), LocalError> {
        let ruleset = vip::ruleset(services);
        if ruleset == self.published.ruleset {
            return Ok(());
        }
        for node in &self.nodes {
            let what = format!("the service addresses of node {}", node.name);
            nft(&self.layout.node_netns(&node.name), &what, &ruleset)?;
        }
        self.published.ruleset = ruleset;
        Ok(())
    }

    fn publish_cluster(
        &mut self,
        services: &[ServiceView],
        pods: &[PodView],
    ) -> Result<(), LocalError> {
        let dir = self.layout.cluster_dir();
        let mut files = BTreeMap::new();
        for (relative, (_, parsed)) in &self.files {
            files.insert(dir.join(relative), parsed.remainder.clone());
        }
        let mut all = pods.to_vec();
        all.extend(self.ztunnel_pods());
        let mut namespaces: BTreeSet<String> = ["default".to_owned(), "istio-system".into()].into();
        namespaces.extend(pods.iter().map(|pod| pod.key.0.clone()));
        namespaces.extend(services.iter().map(|service| service.key.0.clone()));
        namespaces.retain(|name| !self.desired.namespaces.contains_key(name));
        for (name, text) in {
            let accounts = &self.desired.accounts;
            cluster::publish(&self.nodes, &all, services, &namespaces, accounts)
        } {
            files.insert(dir.join(name), text);
        }
        for (path, text) in &files {
            if self.published.cluster.get(path) != Some(text) {
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent).map_err(LocalError::file("create", parent))?;
                }
                write_atomically(path, text.as_bytes())?;
            }
        }
        for path in self.published.cluster.keys() {
            if !files.contains_key(path) {
                fs::remove_file(path).map_err(LocalError::file("remove", path))?;
            }
        }
        self.published.cluster = files;
        Ok(())
    }

    /// The ztunnels are pods of the host network, as everywhere: the certificate service
    /// looks for the pod that a token names.
    fn ztunnel_pods(&self) -> Vec<PodView> {
        if self.config.data_plane == DataPlane::Off {
            return Vec::new();
        }
        let pod = |node: &cluster::NodeView| {
            let own = setup::ztunnel_pod(&node.name);
            let object = serde_json::json!({
                "metadata": {"name": own.name, "namespace": "istio-system",
                    "labels": {"app": "ztunnel"}},
                "spec": {"nodeName": node.name, "serviceAccountName": "ztunnel",
                    "hostNetwork": true, "containers": [{"name": "istio-proxy"}]},
            });
            let named = format!("ztunnel-{}", node.name);
            let status = self.component_status.iter().find(|c| c.name == named);
            PodView {
                key: ("istio-system".into(), own.name),
                // The value is of our own making.
                object: serde_json::from_value(object).unwrap_or_default(),
                uid: own.uid,
                node: node.name.clone(),
                host: node.addresses,
                addresses: node.addresses,
                phase: "Running",
                ready: status.is_some_and(|status| status.ready),
                terminating: false,
                created: k8s_openapi::jiff::Timestamp::UNIX_EPOCH,
                containers: Vec::new(),
            }
        };
        self.nodes.iter().map(pod).collect()
    }

    fn publish_status(&mut self, service_problems: Vec<String>) -> Result<(), LocalError> {
        let layout = &self.layout;
        let texts = |pair: crate::address::Pair| pair.both().map(|ip| ip.to_string()).to_vec();
        let node = |node: &cluster::NodeView| NodeStatus {
            name: node.name.clone(),
            addresses: texts(node.addresses),
            netns: layout.node_netns(&node.name),
            cgroup: layout.node_cgroup(&node.name),
        };
        let mut pods: Vec<PodStatus> = self
            .pods
            .values()
            .map(|entry| PodStatus {
                namespace: entry.view.key.0.clone(),
                name: entry.view.key.1.clone(),
                uid: entry.view.uid.clone(),
                node: entry.view.node.clone(),
                addresses: texts(entry.view.addresses),
                phase: entry.view.phase.into(),
                ready: entry.view.ready,
                terminating: entry.view.terminating,
                netns: layout.pod_netns(&entry.view.uid),
                cgroup: layout.pod_cgroup(&entry.view.node, &entry.view.uid),
                containers: entry.containers.clone(),
            })
            .collect();
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        let mut problems = self.problems();
        problems.extend(service_problems);
        let status = MeshStatus {
            name: self.config.name.clone(),
            supervisor: self.supervisor,
            ephemeral: self.config.ephemeral,
            data_plane: self.config.data_plane == DataPlane::On,
            manifests: self.config.manifests.clone(),
            search_path: search_path(&self.config.binary_dirs),
            nodes: self.nodes.iter().map(node).collect(),
            pods,
            components: self.component_status.clone(),
            applied: self.overlay.names(),
            problems,
        };
        if self.published.status.as_ref() != Some(&status) {
            status.store(&layout.state_file())?;
            self.published.status = Some(status);
        }
        Ok(())
    }
}

/// Writes into the file that is there: it is bind-mounted into pods, and a new file of
/// the same name would not be.
fn overwrite(path: &Path, text: &str) -> Result<(), LocalError> {
    let written = (|| {
        let mut options = File::options();
        let mut file = options
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        file.write_all(text.as_bytes())?;
        file.set_len(text.len() as u64)
    })();
    written.map_err(LocalError::file("write", path))
}

/// Moves what is in a log that has grown too long to `<log>.1`. Writers append, so they
/// go on at the new beginning.
pub(super) fn cut_logs(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            cut_logs(&path);
        } else if meta.len() > MAX_LOG
            && path.extension().is_some_and(|e| e == "log")
            && let Err(error) = cut(&path)
        {
            tracing::warn!(log = %path.display(), %error, "not cut");
        }
    }
}

fn cut(path: &Path) -> std::io::Result<()> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let mut old = File::create(path.with_extension("log.1"))?;
    file.seek(SeekFrom::Start(0))?;
    std::io::copy(&mut file, &mut old)?;
    file.set_len(0)
}
