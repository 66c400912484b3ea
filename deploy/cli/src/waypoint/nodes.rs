//! What the nodes have heard of a waypoint. Its Gateway is programmed when the control plane
//! says so; the node proxies are told in the same moment and need another one to take it up.
//! Who calls in between is refused, or goes past the waypoint.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::bail;
use http::Method;

use crate::cluster::Cluster;
use crate::ztunnel::dump::Dump;
use crate::ztunnel::target::{Wanted, Ztunnel, targets_in};

/// The node proxies of a mesh.
pub(super) struct Nodes {
    ztunnels: Vec<Ztunnel>,
    pause: Duration,
}

impl Nodes {
    /// Those of the mesh; none where they may not be asked.
    pub(super) fn of(cluster: &Cluster) -> Self {
        let wanted = Wanted {
            positional: None,
            node: None,
            namespace: None,
            port: 15000,
        };
        let found = targets_in(cluster, wanted);
        Self {
            ztunnels: found.map_or_else(|_| Vec::new(), |found| found.ztunnels),
            pause: cluster.poll_interval(),
        }
    }

    /// Waits until every node can send to the waypoint `namespace/name`, and does so for what
    /// is addressed to `services` of that namespace. A node that does not answer carries
    /// nothing either, and is not waited for.
    ///
    /// # Errors
    /// What has not been heard of in time, and by whom.
    pub(super) fn wait(
        &self,
        namespace: &str,
        name: &str,
        services: &BTreeSet<String>,
        until: Instant,
    ) -> anyhow::Result<()> {
        for node in &self.ztunnels {
            loop {
                let Ok(dump) = node.request(&Method::GET, "/config_dump") else {
                    break;
                };
                let Err(lacking) = knows(&Dump::parse(&dump)?, namespace, name, services) else {
                    break;
                };
                if Instant::now() >= until {
                    bail!("timed out while waiting for {}: {lacking}", node.name);
                }
                sleep(self.pause);
            }
        }
        Ok(())
    }
}

/// What a node has not heard of.
fn knows(
    dump: &Dump,
    namespace: &str,
    name: &str,
    services: &BTreeSet<String>,
) -> Result<(), String> {
    let of_namespace = || {
        let services = dump.services.iter().map(|entry| &entry.view);
        services.filter(|service| service.namespace == namespace)
    };
    let own = of_namespace().find(|service| service.name == name);
    let healthy = own.is_some_and(|service| {
        let mut endpoints = service.endpoints.values();
        endpoints.any(|endpoint| matches!(endpoint.status.as_str(), "" | "Healthy"))
    });
    if !healthy {
        return Err(format!(
            "it knows no ready pod of waypoint {namespace}/{name}"
        ));
    }
    let unbound = of_namespace()
        .filter(|service| services.contains(&service.name))
        .find(|service| service.waypoint.is_none());
    match unbound {
        Some(service) => Err(format!(
            "it does not send to service {namespace}/{} by a waypoint",
            service.name
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_knows_a_waypoint_with_a_ready_pod_and_what_is_bound_to_it() {
        let dump = |status: &str, bound: bool| {
            let mut web = json!({ "name": "web", "namespace": "shop" });
            if bound {
                web["waypoint"] = json!({ "destination": "shop/waypoint.shop.svc" });
            }
            let dump = json!({ "services": [
                { "name": "waypoint", "namespace": "shop",
                  "endpoints": { "w": { "workloadUid": "w", "status": status } } },
                web,
                { "name": "own", "namespace": "shop" },
            ]});
            Dump::parse(dump.to_string().as_bytes()).expect("a dump")
        };
        let web = BTreeSet::from(["web".to_owned()]);
        let none = BTreeSet::new();
        assert!(knows(&dump("Healthy", false), "shop", "waypoint", &none).is_ok());
        assert!(knows(&dump("Unhealthy", true), "shop", "waypoint", &none).is_err());
        assert!(knows(&dump("Healthy", false), "shop", "waypoint", &web).is_err());
        assert!(knows(&dump("Healthy", true), "shop", "waypoint", &web).is_ok());
        assert!(knows(&dump("Healthy", true), "other", "waypoint", &none).is_err());
    }
}
