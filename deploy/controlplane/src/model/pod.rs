//! Pods, and the objects that only lend them labels: namespaces, nodes, accounts.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;

use super::field::{At, FieldError};
use super::meta::{self, Kind, Meta, Origin};
use adit_shared::model::Locality;

/// A namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Metadata.
    pub meta: Meta,
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Metadata.
    pub meta: Meta,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Metadata.
    pub meta: Meta,
}

impl Node {
    /// Where the node is, from its labels.
    pub fn locality(&self) -> Locality {
        let first = |keys: &[&str]| -> Arc<str> {
            let found = keys.iter().find_map(|key| self.meta.label(key));
            found.unwrap_or_default().into()
        };
        Locality {
            region: first(&[
                "topology.kubernetes.io/region",
                "failure-domain.beta.kubernetes.io/region",
            ]),
            zone: first(&[
                "topology.kubernetes.io/zone",
                "failure-domain.beta.kubernetes.io/zone",
            ]),
            subzone: first(&["topology.istio.io/subzone"]),
        }
    }
}

/// How far a pod is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not all containers have started.
    Pending,
    /// Bound to a node, started.
    Running,
    /// Ended well; its address is free again.
    Succeeded,
    /// Ended badly; its address is free again.
    Failed,
    /// The node does not answer.
    Unknown,
}

impl Phase {
    /// No container will ever run again.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// A TCP port that a container gave a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    /// The name.
    pub name: Arc<str>,
    /// The port.
    pub number: u16,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Metadata.
    pub meta: Meta,
    /// `status.podIPs`, or `status.podIP` where that is all there is.
    pub addresses: Vec<IpAddr>,
    /// `spec.nodeName`; empty: not scheduled.
    pub node: Arc<str>,
    /// `spec.serviceAccountName`, `default` where it is empty.
    pub service_account: Arc<str>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.phase`.
    pub phase: Phase,
    /// The Ready condition is true.
    pub ready: bool,
    /// Named TCP ports of containers and of sidecar init containers.
    pub named_ports: Vec<NamedPort>,
    /// Name of the Deployment or the like that owns it, else its own.
    pub workload_name: Arc<str>,
}

impl Pod {
    /// Checks and keeps a pod.
    ///
    /// # Errors
    /// Every field that is wrong.
    pub fn parse(pod: core::Pod, origin: Origin) -> Result<Self, Vec<FieldError>> {
        let mut errors = Vec::new();
        let workload_name = workload_name(&pod);
        let meta = Meta::parse(Kind::Pod, pod.metadata, origin).map_err(|error| vec![error])?;
        let spec = pod.spec.unwrap_or_default();
        let status = pod.status.unwrap_or_default();
        let addresses = addresses(&status, &mut errors);
        let at = At::ROOT.key("spec");
        let node = spec.node_name.unwrap_or_default();
        let service_account = match spec.service_account_name.filter(|name| !name.is_empty()) {
            Some(account) => account,
            None => "default".into(),
        };
        for (key, value) in [
            ("nodeName", &node),
            ("serviceAccountName", &service_account),
        ] {
            if let Err(reason) = meta::check_name(value)
                && !value.is_empty()
            {
                errors.push(at.key(key).error(reason));
            }
        }
        let phase = match status.phase.as_deref() {
            None | Some("" | "Pending") => Phase::Pending,
            Some("Running") => Phase::Running,
            Some("Succeeded") => Phase::Succeeded,
            Some("Failed") => Phase::Failed,
            Some(_) => Phase::Unknown,
        };
        let is_ready = |condition: &core::PodCondition| {
            condition.type_ == "Ready" && condition.status == "True"
        };
        let sidecars = spec
            .init_containers
            .iter()
            .flatten()
            .filter(|container| container.restart_policy.as_deref() == Some("Always"));
        let named_ports = spec
            .containers
            .iter()
            .chain(sidecars)
            .flat_map(|container| container.ports.iter().flatten())
            .filter(|port| matches!(port.protocol.as_deref(), None | Some("" | "TCP")))
            .filter_map(|port| {
                Some(NamedPort {
                    name: port.name.as_deref()?.into(),
                    number: u16::try_from(port.container_port)
                        .ok()
                        .filter(|p| *p != 0)?,
                })
            })
            .collect();
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self {
            addresses,
            node: node.into(),
            service_account: service_account.into(),
            host_network: spec.host_network.unwrap_or_default(),
            phase,
            ready: status.conditions.iter().flatten().any(is_ready),
            named_ports,
            workload_name,
            meta,
        })
    }
}

fn addresses(status: &core::PodStatus, errors: &mut Vec<FieldError>) -> Vec<IpAddr> {
    let at = At::ROOT.key("status");
    let mut found: Vec<IpAddr> = Vec::new();
    let mut keep = |at: At<'_>, text: &str| match text.parse() {
        _ if text.is_empty() => {}
        Ok(ip) if !found.contains(&ip) => found.push(ip),
        Ok(_) => {}
        Err(_) => errors.push(at.error(format!("{text:?} is not an IP address"))),
    };
    let ips = at.key("podIPs");
    for (index, ip) in status.pod_ips.iter().flatten().enumerate() {
        keep(ips.index(index).key("ip"), &ip.ip);
    }
    if let Some(ip) = &status.pod_ip {
        keep(at.key("podIP"), ip);
    }
    found
}

/// Telemetry calls a pod by what owns it: a ReplicaSet's Deployment, a Job's CronJob
/// (Istio `GetDeployMetaFromPod`).
fn workload_name(pod: &core::Pod) -> Arc<str> {
    let labels = pod.metadata.labels.as_ref();
    let label = |key: &str| {
        labels
            .and_then(|labels| labels.get(key))
            .map(String::as_str)
    };
    if let Some(name) = label("service.istio.io/workload-name").filter(|name| !name.is_empty()) {
        return name.into();
    }
    let own = pod.metadata.name.as_deref().unwrap_or_default();
    let Some(owner) = meta::controller(pod.metadata.owner_references.as_ref()) else {
        return own.into();
    };
    let without_hash = |hash: Option<&str>| {
        let suffix = format!("-{}", hash.filter(|hash| !hash.is_empty())?);
        owner.name.strip_suffix(&suffix)
    };
    let of_owner = match owner.kind.as_str() {
        "ReplicaSet" => without_hash(label("pod-template-hash"))
            .or_else(|| without_hash(label("rollouts-pod-template-hash"))),
        "ReplicationController" => label("deploymentconfig").filter(|name| !name.is_empty()),
        // A CronJob names its Jobs `<name>-<minutes since 1970>`.
        "Job" => owner
            .name
            .rsplit_once('-')
            .filter(|(_, time)| (8..=10).contains(&time.len()))
            .filter(|(_, time)| time.bytes().all(|b| b.is_ascii_digit()))
            .map(|(name, _)| name),
        _ => None,
    };
    of_owner.unwrap_or(&owner.name).into()
}
