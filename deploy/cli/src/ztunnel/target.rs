//! Which ztunnels a command is about, and how they are reached: a local mesh's through
//! their node's network namespace, a cluster's through its API server, any other by address.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use adit_local::{MeshStatus, Running};
use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, StatusCode};

use super::admin;
use crate::cluster::{Cluster, ClusterArgs};
use crate::kubernetes::{Kubernetes, PodPort, PodView, Role, no_cluster};
use crate::output::UsageError;

/// Name of a node's ztunnel, before the node's name.
const COMPONENT_PREFIX: &str = "ztunnel-";

/// Flags that choose ztunnels.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Which ztunnels")]
pub struct TargetArgs {
    /// Node of the mesh [default: all, merged]
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
    /// Admin endpoint of a ztunnel, for one that is in no mesh
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["mesh", "node", "kubeconfig", "context"])]
    pub admin_address: Option<String>,
    /// Port of the admin endpoint on each node
    #[arg(long, value_name = "PORT", default_value_t = 15000)]
    pub proxy_admin_port: u16,
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

impl TargetArgs {
    /// What the flags and a positional argument choose.
    pub fn wanted<'a>(&'a self, positional: Option<&'a str>) -> Wanted<'a> {
        Wanted {
            positional,
            node: self.node.as_deref(),
            namespace: self.cluster.namespace.as_deref(),
            port: self.proxy_admin_port,
        }
    }
}

/// Which ztunnels of a cluster.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// A ztunnel or a pod.
    pub positional: Option<&'a str>,
    /// A node.
    pub node: Option<&'a str>,
    /// Namespace of a pod that names none.
    pub namespace: Option<&'a str>,
    /// Port of the admin endpoint.
    pub port: u16,
}

/// A ztunnel that can be asked.
#[derive(Debug, Clone)]
pub struct Ztunnel {
    /// `ztunnel-<node>`, its pod's name, or its address.
    pub name: String,
    reach: Reach,
}

#[derive(Debug, Clone)]
enum Reach {
    Address(String),
    Node {
        mesh: Running,
        node: String,
        port: u16,
    },
    Pod {
        cluster: Kubernetes,
        pod: PodView,
        port: u16,
    },
}

type Answer = anyhow::Result<(StatusCode, Bytes)>;

impl Ztunnel {
    /// Sends a request to the admin endpoint.
    ///
    /// # Errors
    /// When there is no answer, or one that is no success; the ztunnel is named.
    pub fn request(&self, method: &Method, path: &str) -> anyhow::Result<Bytes> {
        let answer = match &self.reach {
            Reach::Address(address) => admin::request(address, method, path),
            Reach::Node { mesh, node, port } => mesh
                .http(node, method.as_str(), *port, path)
                .map_err(anyhow::Error::from)
                .and_then(|answer| {
                    Ok((
                        StatusCode::from_u16(answer.status)?,
                        Bytes::from(answer.body),
                    ))
                }),
            Reach::Pod { cluster, pod, port } => cluster.http(&pod.port(*port), method, path),
        };
        self.judge(answer, method, path)
    }

    fn judge(&self, answer: Answer, method: &Method, path: &str) -> anyhow::Result<Bytes> {
        let (status, body) = answer.map_err(|error| self.does_not_answer(error))?;
        if !status.is_success() {
            let text = String::from_utf8_lossy(&body);
            bail!(
                "{} answers {method} {path} with {status}: {}",
                self.name,
                text.trim_end()
            );
        }
        Ok(body)
    }

    /// The pod's state says more than a connection that failed.
    fn does_not_answer(&self, error: anyhow::Error) -> anyhow::Error {
        if let Reach::Pod { pod, .. } = &self.reach
            && let Some(trouble) = &pod.trouble
        {
            return anyhow::anyhow!("{} of node {} does not run: {trouble}", self.name, pod.node);
        }
        error.context(format!("{} does not answer", self.name))
    }
}

/// Sends the same request to several; those in a cluster at the same time. Answers are in
/// their order.
pub fn request_all(
    ztunnels: &[Ztunnel],
    method: &Method,
    path: &str,
) -> Vec<anyhow::Result<Bytes>> {
    let mut cluster = None;
    let ports: Vec<PodPort> = ztunnels
        .iter()
        .filter_map(|ztunnel| match &ztunnel.reach {
            Reach::Pod {
                cluster: of,
                pod,
                port,
            } => {
                cluster = Some(of);
                Some(pod.port(*port))
            }
            _ => None,
        })
        .collect();
    match cluster {
        Some(cluster) if ports.len() == ztunnels.len() => {
            let answers = cluster.http_to_all(&ports, method, path);
            let each = ztunnels.iter().zip(answers);
            each.map(|(ztunnel, answer)| ztunnel.judge(answer, method, path))
                .collect()
        }
        _ => ztunnels
            .iter()
            .map(|ztunnel| ztunnel.request(method, path))
            .collect(),
    }
}

/// A pod to which the answer is to be confined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.name, self.namespace)
    }
}

/// What a command is about.
#[derive(Debug, Clone)]
pub struct Targets {
    /// At least one.
    pub ztunnels: Vec<Ztunnel>,
    /// Only what concerns this pod.
    pub pod: Option<PodName>,
}

/// The ztunnels that the flags choose. `positional` is `ztunnel-<node>`, the pod of a ztunnel,
/// or a pod whose node's ztunnel is meant, as `[pod/]name[.namespace]`.
///
/// # Errors
/// When there is none, with the ways to name one.
pub fn targets(args: &TargetArgs, positional: Option<&str>) -> anyhow::Result<Targets> {
    if let Some(address) = &args.admin_address {
        if positional.is_some() {
            let text = "a pod is looked up in a mesh: name it without --admin-address";
            return Err(UsageError(text.into()).into());
        }
        return Ok(Targets::at(address));
    }
    if positional.is_some() && args.node.is_some() {
        let text = "at most one of --file, --node and a pod can be given";
        return Err(UsageError(text.into()).into());
    }
    match args.cluster.find()? {
        Some(cluster) => targets_in(&cluster, args.wanted(positional)),
        None if positional.is_none() && args.node.is_none() => this_machine(args.proxy_admin_port),
        None => Err(no_cluster()),
    }
}

/// [`targets`] of a cluster that was chosen already.
///
/// # Errors
/// As there.
pub fn targets_in(cluster: &Cluster, wanted: Wanted<'_>) -> anyhow::Result<Targets> {
    match cluster {
        Cluster::Local(mesh) => in_local_mesh(mesh, wanted),
        Cluster::Kubernetes(cluster) => in_kubernetes(cluster, wanted),
    }
}

fn in_local_mesh(mesh: &Running, wanted: Wanted<'_>) -> anyhow::Result<Targets> {
    let status = mesh.status()?;
    if !status.data_plane {
        bail!("mesh {} was made without ztunnels", status.name);
    }
    let (node, pod) = match wanted.positional {
        None => (wanted.node.map(str::to_owned), None),
        Some(text) => {
            let (node, pod) = resolve(&status, text)?;
            (Some(node), pod)
        }
    };
    let nodes: Vec<&str> = status.nodes.iter().map(|n| n.name.as_str()).collect();
    let chosen: Vec<&str> = match &node {
        None => nodes,
        Some(node) if nodes.contains(&node.as_str()) => vec![node],
        Some(node) => bail!(
            "mesh {} has no node {node}; it has {}",
            status.name,
            nodes.join(", ")
        ),
    };
    if chosen.is_empty() {
        bail!("mesh {} has no nodes", status.name);
    }
    let ztunnel = |node: &str| Ztunnel {
        name: format!("{COMPONENT_PREFIX}{node}"),
        reach: Reach::Node {
            mesh: mesh.clone(),
            node: node.to_owned(),
            port: wanted.port,
        },
    };
    Ok(Targets {
        ztunnels: chosen.into_iter().map(ztunnel).collect(),
        pod,
    })
}

fn in_kubernetes(cluster: &Kubernetes, wanted: Wanted<'_>) -> anyhow::Result<Targets> {
    let all = cluster.running_mesh_pods(Role::Ztunnel)?;
    let (chosen, pod) = match (wanted.positional, wanted.node) {
        (None, None) => (all, None),
        (None, Some(node)) => (vec![of_node(cluster, all, node)?], None),
        (Some(text), _) => match all.iter().find(|ztunnel| is_named(ztunnel, text)) {
            Some(ztunnel) => (vec![ztunnel.clone()], None),
            None => {
                let pod = cluster.pod(text, wanted.namespace)?;
                if pod.node.is_empty() {
                    bail!("pod {}/{} is on no node yet", pod.namespace, pod.name);
                }
                let ztunnel = of_node(cluster, all, &pod.node)?;
                let name = PodName {
                    namespace: pod.namespace,
                    name: pod.name,
                };
                (vec![ztunnel], Some(name))
            }
        },
    };
    let ztunnel = |pod: PodView| Ztunnel {
        name: pod.name.clone(),
        reach: Reach::Pod {
            cluster: cluster.clone(),
            pod,
            port: wanted.port,
        },
    };
    Ok(Targets {
        ztunnels: chosen.into_iter().map(ztunnel).collect(),
        pod,
    })
}

/// While one is replaced by another there are two: the one that runs is meant.
fn of_node(cluster: &Kubernetes, all: Vec<PodView>, node: &str) -> anyhow::Result<PodView> {
    let mut on_it: Vec<PodView> = all.into_iter().filter(|pod| pod.node == node).collect();
    on_it.sort_by_key(|pod| (pod.trouble.is_some(), !pod.ready));
    on_it.into_iter().next().with_context(|| {
        format!(
            "no ztunnel runs on node {node} of {}: it is not in the mesh",
            cluster.name()
        )
    })
}

fn is_named(pod: &PodView, text: &str) -> bool {
    let name = match text.split_once('/') {
        Some(("pod" | "pods" | "po", name)) => name,
        Some(_) => return false,
        None => text,
    };
    name == pod.name || name == pod.full_name()
}

impl Targets {
    fn at(address: &str) -> Self {
        Self {
            ztunnels: vec![Ztunnel {
                name: address.to_owned(),
                reach: Reach::Address(address.to_owned()),
            }],
            pod: None,
        }
    }
}

/// Without a mesh, there may be a ztunnel on the machine itself.
fn this_machine(port: u16) -> anyhow::Result<Targets> {
    let targets = Targets::at(&format!("127.0.0.1:{port}"));
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
        Ok(_) => Ok(targets),
        Err(error) => bail!(
            "there is no kubeconfig, no local mesh runs, and no ztunnel answers on 127.0.0.1:{port} \
             ({error}): name a cluster with --kubeconfig, make a mesh with `adit local up`, or name \
             a ztunnel with --admin-address or a dump with --file"
        ),
    }
}

fn resolve(status: &MeshStatus, text: &str) -> anyhow::Result<(String, Option<PodName>)> {
    let (namespace, name) = match text.split_once('/') {
        Some(("pod" | "pods" | "po", name)) => (None, name),
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, text),
    };
    if let Some(node) = name.strip_prefix(COMPONENT_PREFIX)
        && status.node(node).is_some()
    {
        return Ok((node.to_owned(), None));
    }
    let found: Vec<_> = status
        .pods
        .iter()
        .filter(|pod| !pod.terminating)
        .filter(|pod| namespace.is_none_or(|wanted| wanted == pod.namespace))
        .filter(|pod| pod.name == name || format!("{}.{}", pod.name, pod.namespace) == name)
        .collect();
    let full = |pod: &&adit_local::PodStatus| format!("{}.{}", pod.name, pod.namespace);
    match found.as_slice() {
        [] => bail!(
            "mesh {} has no ztunnel and no pod {text}; its pods are {}",
            status.name,
            status
                .pods
                .iter()
                .filter(|pod| !pod.terminating)
                .map(|pod| full(&pod))
                .collect::<Vec<_>>()
                .join(", ")
        ),
        [pod] => {
            let name = PodName {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
            };
            Ok((pod.node.clone(), Some(name)))
        }
        several => bail!(
            "{text} may be any of {}: name one of them",
            several.iter().map(full).collect::<Vec<_>>().join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn status() -> MeshStatus {
        let node = |name: &str| json!({"name": name, "addresses": [], "netns": "", "cgroup": ""});
        let pod = |namespace: &str, name: &str, node: &str, terminating: bool| -> Value {
            json!({
                "namespace": namespace, "name": name, "uid": "", "node": node, "addresses": [],
                "phase": "Running", "ready": true, "terminating": terminating, "netns": "",
                "cgroup": "", "containers": [],
            })
        };
        serde_json::from_value(json!({
            "name": "m", "supervisor": {"pid": 1, "start_time": 1}, "ephemeral": false,
            "data_plane": true, "manifests": "", "search_path": "", "components": [],
            "problems": [], "nodes": [node("n1"), node("n2")],
            "pods": [
                pod("shop", "client", "n1", false),
                pod("legacy", "client", "n2", false),
                pod("shop", "web", "n1", true),
                pod("shop", "web", "n2", false),
            ],
        }))
        .expect("a status")
    }

    #[test]
    fn a_ztunnel_or_a_pod_leads_to_a_node() {
        let status = status();
        for (text, node, pod) in [
            ("ztunnel-n2", "n2", None),
            ("pod/ztunnel-n1", "n1", None),
            ("web", "n2", Some("web.shop")),
            ("client.legacy", "n2", Some("client.legacy")),
            ("pod/client.shop", "n1", Some("client.shop")),
            ("legacy/client", "n2", Some("client.legacy")),
        ] {
            let found = resolve(&status, text).expect(text);
            let found = (found.0.as_str(), found.1.map(|pod| pod.to_string()));
            assert_eq!(found, (node, pod.map(str::to_owned)), "{text}");
        }
        for (text, expected) in [
            ("client", "client may be any of client.shop, client.legacy"),
            ("ztunnel-n3", "mesh m has no ztunnel and no pod ztunnel-n3"),
            (
                "web.legacy",
                "its pods are client.shop, client.legacy, web.shop",
            ),
        ] {
            let error = resolve(&status, text).expect_err(text).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
