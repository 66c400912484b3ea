//! Which waypoint a command is about, and how it is reached: through its pod's network
//! namespace, or by address.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use adit_local::{MeshStatus, http_request_in};
use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, StatusCode};

use crate::output::UsageError;
use crate::ztunnel::admin;
use crate::ztunnel::target::mesh;

/// As for the dump of a ztunnel.
const DEADLINE: Duration = Duration::from_secs(10);

/// Flags that choose a waypoint.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Which waypoint")]
pub struct TargetArgs {
    /// Local mesh [default: the only one that runs]
    #[arg(long, value_name = "NAME")]
    pub mesh: Option<String>,
    /// Namespace of the waypoint
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Admin endpoint of a waypoint that is in no local mesh
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["mesh", "namespace"])]
    pub admin_address: Option<String>,
    /// Port of the admin endpoint in its pod
    #[arg(long, value_name = "PORT", default_value_t = 15000)]
    pub proxy_admin_port: u16,
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
    Pod { netns: PathBuf, port: u16 },
}

impl Waypoint {
    /// Sends a request to the admin endpoint.
    ///
    /// # Errors
    /// When there is no answer, or one that is no success; the waypoint is named.
    pub fn request(&self, method: &Method, path: &str) -> anyhow::Result<Bytes> {
        let answer = match &self.reach {
            Reach::Address(address) => admin::request(address, method, path),
            Reach::Pod { netns, port } => {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
                http_request_in(netns, address, method.as_str(), path, DEADLINE)
                    .map_err(anyhow::Error::from)
                    .and_then(|answer| {
                        let status = StatusCode::from_u16(answer.status)?;
                        Ok((status, Bytes::from(answer.body)))
                    })
            }
        };
        let (status, body) =
            answer.with_context(|| format!("waypoint {} does not answer", self.name))?;
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
    let status = mesh(args.mesh.as_deref())?.status()?;
    let found = candidates(&status, positional, args.namespace.as_deref());
    let (name, netns) = match found.as_slice() {
        [one] => one.clone(),
        [] => match all(&status).as_slice() {
            [] => bail!(
                "mesh {} has no waypoint; `adit waypoint apply` makes one",
                status.name
            ),
            there => bail!(
                "mesh {} has no waypoint {}; it has {}",
                status.name,
                positional.unwrap_or("there"),
                names(there)
            ),
        },
        several => {
            let text = format!("there are several waypoints, say which: {}", names(several));
            return Err(UsageError(text).into());
        }
    };
    Ok(Waypoint {
        name,
        reach: Reach::Pod {
            netns,
            port: args.proxy_admin_port,
        },
    })
}

/// Every waypoint of a mesh.
pub fn waypoints(status: &MeshStatus) -> Vec<Waypoint> {
    let one = |(name, netns)| Waypoint {
        name,
        reach: Reach::Pod { netns, port: 15000 },
    };
    all(status).into_iter().map(one).collect()
}

fn names(waypoints: &[(String, PathBuf)]) -> String {
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
