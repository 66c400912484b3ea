//! Which ztunnels a command is about, and how they are reached: a local mesh's through
//! their node's network namespace, any other by address.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use adit_local::{MeshStatus, Running};
use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, StatusCode};

use super::admin;
use crate::output::UsageError;

/// Name of a node's ztunnel, before the node's name.
const COMPONENT_PREFIX: &str = "ztunnel-";

/// Flags that choose ztunnels.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Which ztunnels")]
pub struct TargetArgs {
    /// Local mesh [default: the only one that runs]
    #[arg(long, value_name = "NAME")]
    pub mesh: Option<String>,
    /// Node of the mesh [default: all, merged]
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
    /// Admin endpoint of a ztunnel, for one that is in no local mesh
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["mesh", "node"])]
    pub admin_address: Option<String>,
    /// Port of the admin endpoint on each node
    #[arg(long, value_name = "PORT", default_value_t = 15000)]
    pub proxy_admin_port: u16,
}

/// A ztunnel that can be asked.
#[derive(Debug, Clone)]
pub struct Ztunnel {
    /// `ztunnel-<node>`, or its address.
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
}

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
        };
        let (status, body) = answer.with_context(|| format!("{} does not answer", self.name))?;
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

/// The ztunnels that the flags choose. `positional` is `ztunnel-<node>`, or a pod whose
/// node's ztunnel is meant, as `[pod/]name[.namespace]`.
///
/// # Errors
/// When there is none, with the ways to name one.
pub fn targets(args: &TargetArgs, positional: Option<&str>) -> anyhow::Result<Targets> {
    if let Some(address) = &args.admin_address {
        if positional.is_some() {
            let text = "a pod is looked up in a local mesh: name it without --admin-address";
            return Err(UsageError(text.into()).into());
        }
        return Ok(Targets::at(address));
    }
    let mesh = match &args.mesh {
        Some(name) => Running::open(name)?,
        None => match the_running_mesh()? {
            Some(mesh) => mesh,
            None if positional.is_none() && args.node.is_none() => {
                return this_machine(args.proxy_admin_port);
            }
            None => return Err(no_mesh()),
        },
    };
    let status = mesh.status()?;
    if !status.data_plane {
        bail!("mesh {} was made without ztunnels", status.name);
    }
    let (node, pod) = match positional {
        None => (args.node.clone(), None),
        Some(_) if args.node.is_some() => {
            let text = "at most one of --file, --node and a pod can be given";
            return Err(UsageError(text.into()).into());
        }
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
            port: args.proxy_admin_port,
        },
    };
    Ok(Targets {
        ztunnels: chosen.into_iter().map(ztunnel).collect(),
        pod,
    })
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

/// The local mesh `name`, or the only one that runs.
///
/// # Errors
/// When there is none, or there are several.
pub fn mesh(name: Option<&str>) -> anyhow::Result<Running> {
    match name {
        Some(name) => Ok(Running::open(name)?),
        None => the_running_mesh()?.ok_or_else(no_mesh),
    }
}

/// Every local mesh whose supervisor runs. Meshes of tests have to be named.
pub fn running_meshes() -> anyhow::Result<Vec<Running>> {
    let names = Running::list().context("cannot list the local meshes")?;
    // One that goes while we look is as good as gone.
    let open = names.iter().filter_map(|name| Running::open(name).ok());
    let kept = |mesh: &Running| mesh.status().is_ok_and(|status| !status.ephemeral);
    Ok(open.filter(Running::is_supervised).filter(kept).collect())
}

fn the_running_mesh() -> anyhow::Result<Option<Running>> {
    let mut meshes = running_meshes()?;
    if meshes.len() > 1 {
        let names: Vec<&str> = meshes.iter().map(Running::name).collect();
        let text = format!(
            "{} local meshes run ({}): choose one with --mesh",
            names.len(),
            names.join(", ")
        );
        return Err(UsageError(text).into());
    }
    Ok(meshes.pop())
}

fn no_mesh() -> anyhow::Error {
    anyhow::anyhow!("no local mesh runs; `adit local up` makes one")
}

/// Without a mesh, there may be a ztunnel on the machine itself.
fn this_machine(port: u16) -> anyhow::Result<Targets> {
    let targets = Targets::at(&format!("127.0.0.1:{port}"));
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
        Ok(_) => Ok(targets),
        Err(error) => bail!(
            "no local mesh runs, and no ztunnel answers on 127.0.0.1:{port} ({error}): make a mesh \
             with `adit local up`, or name a ztunnel with --admin-address or a dump with --file"
        ),
    }
}

fn resolve(status: &MeshStatus, text: &str) -> anyhow::Result<(String, Option<PodName>)> {
    let name = text.split_once('/').map_or(text, |(_, name)| name);
    if let Some(node) = name.strip_prefix(COMPONENT_PREFIX)
        && status.node(node).is_some()
    {
        return Ok((node.to_owned(), None));
    }
    let found: Vec<_> = status
        .pods
        .iter()
        .filter(|pod| !pod.terminating)
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
