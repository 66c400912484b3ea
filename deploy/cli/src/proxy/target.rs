//! Which waypoint a command is about, and how it is reached: a local mesh's through its
//! pod's network namespace, a cluster's through its API server, any other by address.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use adit_local::{MeshStatus, http_request_in};
use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, StatusCode};

use crate::cluster::{Cluster, ClusterArgs};
use crate::kubernetes::{Kubernetes, PodView};
use crate::output::UsageError;
use crate::ztunnel::admin;

/// As for the dump of a ztunnel.
const DEADLINE: Duration = Duration::from_secs(10);

/// Flags that choose a waypoint.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Which waypoint")]
pub struct TargetArgs {
    /// Admin endpoint of a waypoint that is in no mesh
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["mesh", "namespace", "kubeconfig", "context"])]
    pub admin_address: Option<String>,
    /// Port of the admin endpoint in its pod
    #[arg(long, value_name = "PORT", default_value_t = 15000)]
    pub proxy_admin_port: u16,
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// A waypoint that can be asked.
#[derive(Debug, Clone)]
pub struct Waypoint {
    /// `<gateway>.<namespace>`, or its address.
    pub name: String,
    reach: Reach,
}

#[derive(Debug, Clone)]
enum Reach {
    Address(String),
    Netns {
        netns: PathBuf,
        port: u16,
    },
    Pod {
        cluster: Kubernetes,
        pod: PodView,
        port: u16,
    },
}

impl Waypoint {
    /// Sends a request to the admin endpoint.
    ///
    /// # Errors
    /// When there is no answer, or one that is no success; the waypoint is named.
    pub fn request(&self, method: &Method, path: &str) -> anyhow::Result<Bytes> {
        self.judge(self.ask(method, path), method, path)
    }

    fn ask(&self, method: &Method, path: &str) -> Answer {
        match &self.reach {
            Reach::Address(address) => admin::request(address, method, path),
            Reach::Netns { netns, port } => request_in(netns, *port, method, path, DEADLINE),
            Reach::Pod { cluster, pod, port } => cluster.http(&pod.port(*port), method, path),
        }
    }

    fn judge(&self, answer: Answer, method: &Method, path: &str) -> anyhow::Result<Bytes> {
        let (status, body) = answer.map_err(|error| self.does_not_answer(error))?;
        if !status.is_success() {
            let text = String::from_utf8_lossy(&body);
            bail!(
                "waypoint {} answers {method} {path} with {status}: {}",
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
            return anyhow::anyhow!(
                "pod {}/{} of waypoint {} does not run: {trouble}",
                pod.namespace,
                pod.name,
                self.name
            );
        }
        error.context(format!("waypoint {} does not answer", self.name))
    }
}

type Answer = anyhow::Result<(StatusCode, Bytes)>;

fn request_in(netns: &Path, port: u16, method: &Method, path: &str, wait: Duration) -> Answer {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let answer = http_request_in(netns, address, method.as_str(), path, wait)?;
    let status = StatusCode::from_u16(answer.status)?;
    Ok((status, Bytes::from(answer.body)))
}

/// Sends each its GET, all at the same time: answers may be long in coming. They are in the
/// order of the waypoints.
pub fn get_all(asked: &[(&Waypoint, String)]) -> Vec<anyhow::Result<Bytes>> {
    let in_cluster = asked
        .iter()
        .find_map(|(waypoint, _)| match &waypoint.reach {
            Reach::Pod { cluster, .. } => Some(cluster),
            _ => None,
        });
    let answers: Vec<Answer> = match in_cluster {
        Some(cluster) => {
            let requests = asked
                .iter()
                .filter_map(|(waypoint, path)| match &waypoint.reach {
                    Reach::Pod { pod, port, .. } => Some((pod.port(*port), path.clone())),
                    _ => None,
                });
            cluster.http_each(&Method::GET, &requests.collect::<Vec<_>>())
        }
        None => thread::scope(|scope| {
            let running: Vec<_> = asked
                .iter()
                .map(|(waypoint, path)| match &waypoint.reach {
                    Reach::Netns { netns, port } => Some((netns, *port, path)),
                    _ => None,
                })
                .map(|to| {
                    let (netns, port, path) = to?;
                    Some(scope.spawn(move || request_in(netns, port, &Method::GET, path, DEADLINE)))
                })
                .collect();
            let each = asked.iter().zip(running);
            each.map(|((waypoint, path), running)| match running {
                Some(running) => running
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("the request broke off"))),
                None => waypoint.ask(&Method::GET, path),
            })
            .collect()
        }),
    };
    let each = asked.iter().zip(answers);
    each.map(|((waypoint, path), answer)| waypoint.judge(answer, &Method::GET, path))
        .collect()
}

/// Sends all the same request at once: the name of whichever answers first with success, and
/// its answer. An answer may take as long as `wait`.
///
/// # Errors
/// None succeeds: what the last says.
pub fn first_answer(
    all: &[Waypoint],
    method: &Method,
    path: &str,
    wait: Duration,
) -> anyhow::Result<(String, Bytes)> {
    // What is waited for there takes all of it; an answer takes its time too.
    let wait = wait + DEADLINE;
    let pods = all.iter().filter_map(|waypoint| match &waypoint.reach {
        Reach::Pod { cluster, pod, port } => Some((cluster, pod.port(*port))),
        _ => None,
    });
    let (clusters, pods): (Vec<_>, Vec<_>) = pods.unzip();
    let first = match clusters.first() {
        // All of a cluster are pods of it.
        Some(cluster) => cluster.http_first(&pods, method, path, wait),
        None => first_here(all, method, path, wait),
    };
    let (index, answer) = first.context("there is nobody to ask")?;
    let waypoint = all.get(index).context("nobody has answered")?;
    let answer = waypoint.judge(answer, method, path)?;
    Ok((waypoint.name.clone(), answer))
}

/// [`first_answer`] of waypoints that this machine reaches by itself.
fn first_here(
    all: &[Waypoint],
    method: &Method,
    path: &str,
    wait: Duration,
) -> Option<(usize, Answer)> {
    let (tell, told) = mpsc::channel();
    for (index, waypoint) in all.iter().enumerate() {
        // Pods of a cluster are asked by its client.
        let Reach::Netns { netns, port } = waypoint.reach.clone() else {
            continue;
        };
        let tell = tell.clone();
        let (method, path) = (method.clone(), path.to_owned());
        // Those that are not the first end with their wait, or with the program.
        thread::spawn(move || {
            let answer = request_in(&netns, port, &method, &path, wait);
            // Nobody may be there any more.
            let _ = tell.send((index, answer));
        });
    }
    drop(tell);
    let mut last = None;
    for answer in told {
        let succeeded = matches!(&answer.1, Ok((status, _)) if status.is_success());
        last = Some(answer);
        if succeeded {
            break;
        }
    }
    last
}

/// Every replica of a waypoint (`<gateway>.<namespace>`) that runs.
///
/// # Errors
/// When the pods cannot be listed.
pub fn replicas_of(cluster: &Cluster, name: &str, port: u16) -> anyhow::Result<Vec<Waypoint>> {
    if let Cluster::Kubernetes(cluster) = cluster {
        let mut pods = cluster.waypoint_pods(None)?;
        pods.retain(|pod| {
            let gateway = pod.gateway.as_deref().unwrap_or_default();
            pod.trouble.is_none() && format!("{gateway}.{}", pod.namespace) == name
        });
        let one = |pod: PodView| Waypoint {
            name: pod.full_name(),
            reach: Reach::Pod {
                cluster: cluster.clone(),
                pod,
                port,
            },
        };
        return Ok(pods.into_iter().map(one).collect());
    }
    let mut all = waypoints(cluster, None, port)?;
    all.retain(|waypoint| waypoint.name == name);
    Ok(all)
}

/// The waypoint that is meant: by name, by name and namespace, by its pod, or the only
/// one there is.
///
/// # Errors
/// When there is none, or several.
pub fn waypoint(args: &TargetArgs, positional: Option<&str>) -> anyhow::Result<Waypoint> {
    if let Some(address) = &args.admin_address {
        return Ok(Waypoint {
            name: address.clone(),
            reach: Reach::Address(address.clone()),
        });
    }
    waypoint_in(
        &args.cluster.open()?,
        positional,
        args.cluster.namespace.as_deref(),
        args.proxy_admin_port,
    )
}

/// [`waypoint`] of a cluster that was chosen already.
///
/// # Errors
/// As there.
pub fn waypoint_in(
    cluster: &Cluster,
    positional: Option<&str>,
    namespace: Option<&str>,
    port: u16,
) -> anyhow::Result<Waypoint> {
    match cluster {
        Cluster::Local(mesh) => {
            let status = mesh.status()?;
            let found = candidates(&status, positional, namespace);
            let chosen = the_one(&cluster.name(), positional, &found, &all(&status))?;
            let (name, netns) = chosen.clone();
            let reach = Reach::Netns { netns, port };
            Ok(Waypoint { name, reach })
        }
        Cluster::Kubernetes(cluster) => {
            let pods = cluster.waypoint_pods(namespace)?;
            let (found, all) = (in_kubernetes(&pods, positional), replicas(&pods));
            let (name, pod) = the_one(cluster.name(), positional, &found, &all)?.clone();
            let cluster = cluster.clone();
            let reach = Reach::Pod { cluster, pod, port };
            Ok(Waypoint { name, reach })
        }
    }
}

/// Every waypoint of a mesh, each replica by itself.
///
/// # Errors
/// When the pods cannot be listed.
pub fn waypoints(
    cluster: &Cluster,
    namespace: Option<&str>,
    port: u16,
) -> anyhow::Result<Vec<Waypoint>> {
    match cluster {
        Cluster::Local(mesh) => {
            let one = |(name, netns)| Waypoint {
                name,
                reach: Reach::Netns { netns, port },
            };
            let found = candidates(&mesh.status()?, None, namespace);
            Ok(found.into_iter().map(one).collect())
        }
        Cluster::Kubernetes(cluster) => {
            let pods = cluster.waypoint_pods(namespace)?;
            let running = pods.into_iter().filter(|pod| pod.trouble.is_none());
            let one = |pod: PodView| Waypoint {
                name: pod.full_name(),
                reach: Reach::Pod {
                    cluster: cluster.clone(),
                    pod,
                    port,
                },
            };
            Ok(running.map(one).collect())
        }
    }
}

/// A waypoint by its name, with what leads to it.
type Named<T> = (String, T);

fn the_one<'a, T>(
    place: &str,
    wanted: Option<&str>,
    found: &'a [Named<T>],
    all: &[Named<T>],
) -> anyhow::Result<&'a Named<T>> {
    match (found, all) {
        ([one], _) => Ok(one),
        ([], []) => bail!("{place} has no waypoint; `adit waypoint apply` makes one"),
        ([], there) => bail!(
            "{place} has no waypoint {}; it has {}",
            wanted.unwrap_or("there"),
            names(there)
        ),
        (several, _) => {
            let text = format!("there are several waypoints, say which: {}", names(several));
            Err(UsageError(text).into())
        }
    }
}

fn in_kubernetes(pods: &[PodView], wanted: Option<&str>) -> Vec<Named<PodView>> {
    let Some(wanted) = wanted else {
        return replicas(pods);
    };
    let wanted = wanted.split_once('/').map_or(wanted, |(_, name)| name);
    let by_pod = pods
        .iter()
        .filter(|pod| wanted == pod.name || wanted == pod.full_name());
    let by_pod: Vec<Named<PodView>> = by_pod.map(|pod| (pod.full_name(), pod.clone())).collect();
    if !by_pod.is_empty() {
        return by_pod;
    }
    let mut by_gateway = replicas(pods);
    by_gateway.retain(|(name, pod)| name == wanted || pod.gateway.as_deref() == Some(wanted));
    by_gateway
}

/// The best pod of each Gateway.
fn replicas(pods: &[PodView]) -> Vec<Named<PodView>> {
    let mut all: Vec<Named<PodView>> = Vec::new();
    let mut best: Vec<&PodView> = pods.iter().collect();
    best.sort_by_key(|pod| (pod.trouble.is_some(), !pod.ready));
    for pod in best {
        let gateway = pod.gateway.as_deref().unwrap_or(&pod.name);
        let name = format!("{gateway}.{}", pod.namespace);
        if all.iter().all(|(known, _)| *known != name) {
            all.push((name, pod.clone()));
        }
    }
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    all
}

fn names<T>(waypoints: &[Named<T>]) -> String {
    let names: Vec<&str> = waypoints.iter().map(|(name, _)| name.as_str()).collect();
    names.join(", ")
}

fn all(status: &MeshStatus) -> Vec<(String, PathBuf)> {
    candidates(status, None, None)
}

fn candidates(
    status: &MeshStatus,
    wanted: Option<&str>,
    namespace: Option<&str>,
) -> Vec<(String, PathBuf)> {
    let wanted = wanted.map(|text| text.split_once('/').map_or(text, |(_, name)| name));
    let with_pods = status.components.iter().filter_map(|component| {
        let pod = status
            .pods
            .iter()
            .find(|p| Some(&p.uid) == component.pod.as_ref())?;
        Some((component, pod))
    });
    with_pods
        .filter(|(_, pod)| namespace.is_none_or(|wanted| pod.namespace == wanted))
        .filter(|(component, pod)| {
            let gateway = component.name.strip_suffix(&pod.namespace);
            let gateway = gateway.and_then(|name| name.strip_suffix('.'));
            wanted.is_none_or(|wanted| {
                wanted == component.name
                    || Some(wanted) == gateway
                    || wanted == pod.name
                    || wanted == format!("{}.{}", pod.name, pod.namespace)
            })
        })
        .map(|(component, pod)| (component.name.clone(), pod.netns.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn status() -> MeshStatus {
        let pod = |namespace: &str, name: &str| -> Value {
            json!({
                "namespace": namespace, "name": name, "uid": format!("{namespace}/{name}"),
                "node": "n1", "addresses": [], "phase": "Running", "ready": true,
                "terminating": false, "netns": format!("/{namespace}"), "cgroup": "",
                "containers": [],
            })
        };
        let waypoint = |namespace: &str| -> Value {
            json!({
                "name": format!("waypoint.{namespace}"), "node": "n1",
                "pod": format!("{namespace}/waypoint-abc-0"), "process": null, "ready": true,
                "restarts": 0, "message": "", "log": "",
            })
        };
        serde_json::from_value(json!({
            "name": "m", "supervisor": {"pid": 1, "start_time": 1}, "ephemeral": false,
            "data_plane": true, "manifests": "", "search_path": "", "nodes": [],
            "components": [waypoint("shop"), waypoint("bank")], "problems": [],
            "pods": [pod("shop", "waypoint-abc-0"), pod("bank", "waypoint-abc-0"),
                pod("shop", "web")],
        }))
        .expect("a status")
    }

    #[test]
    fn a_gateway_stands_for_its_best_replica() {
        let pod = |namespace: &str, name: &str, trouble: Option<&str>| PodView {
            namespace: namespace.into(),
            name: name.into(),
            node: "n1".into(),
            gateway: Some("waypoint".into()),
            trouble: trouble.map(str::to_owned),
            ready: trouble.is_none(),
        };
        let pods = [
            pod("shop", "waypoint-a", Some("Pending")),
            pod("shop", "waypoint-b", None),
            pod("bank", "waypoint-c", None),
        ];
        let table: [(Option<&str>, &[&str]); 6] = [
            (None, &["waypoint-c", "waypoint-b"]),
            (Some("waypoint.shop"), &["waypoint-b"]),
            (Some("waypoint"), &["waypoint-c", "waypoint-b"]),
            (Some("waypoint-a"), &["waypoint-a"]),
            (Some("pod/waypoint-a.shop"), &["waypoint-a"]),
            (Some("web"), &[]),
        ];
        for (wanted, expected) in table {
            let found = in_kubernetes(&pods, wanted);
            let found: Vec<&str> = found.iter().map(|(_, pod)| pod.name.as_str()).collect();
            assert_eq!(found, expected, "{wanted:?}");
        }
    }

    #[test]
    fn a_waypoint_by_any_of_its_names() {
        let status = status();
        let table: [(Option<&str>, Option<&str>, &[&str]); 7] = [
            (None, None, &["/shop", "/bank"]),
            (None, Some("shop"), &["/shop"]),
            (Some("waypoint.bank"), None, &["/bank"]),
            (Some("waypoint"), Some("bank"), &["/bank"]),
            (Some("pod/waypoint-abc-0.shop"), None, &["/shop"]),
            (Some("waypoint"), None, &["/shop", "/bank"]),
            (Some("web"), None, &[]),
        ];
        for (wanted, namespace, expected) in table {
            let found = candidates(&status, wanted, namespace);
            let found: Vec<_> = found.iter().map(|(_, netns)| netns.as_os_str()).collect();
            assert_eq!(found, expected, "{wanted:?} {namespace:?}");
        }
    }
}
