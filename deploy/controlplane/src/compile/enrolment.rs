//! Whether a pod belongs to the mesh (reference: Istio's CNI agent and its label
//! `istio.io/dataplane-mode`).

use std::fmt;

use adit_shared::proto::enrolment::Enrolment;

use super::mesh::MeshConfig;
use super::wire::ip_bytes;
use crate::model::{Namespace, Pod};

/// The opt-in label, on namespaces and pods. The pod's has precedence.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

/// The decision about one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Its traffic is captured.
    Enrol,
    /// It is left alone.
    Leave(Reason),
}

/// Why a pod is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Neither the pod nor its namespace asks for it.
    NotLabelled,
    /// The pod's label says `none`.
    OptedOut,
    /// It uses its node's network.
    HostNetwork,
    /// A sidecar was injected, which does the same work.
    Sidecar,
    /// Its namespace is excluded.
    ExcludedNamespace,
    /// It is part of the mesh's own data plane.
    DataPlane,
    /// It has ended.
    Ended,
    /// It has no address yet.
    NoAddress,
    /// It is not on a node yet.
    NotScheduled,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotLabelled => {
                "neither the pod nor its namespace has the label istio.io/dataplane-mode=ambient"
            }
            Self::OptedOut => "the pod has the label istio.io/dataplane-mode=none",
            Self::HostNetwork => "the pod uses its node's network",
            Self::Sidecar => "the pod has a sidecar",
            Self::ExcludedNamespace => "the namespace is excluded from the mesh",
            Self::DataPlane => "the pod is part of the mesh's data plane",
            Self::Ended => "the pod has ended",
            Self::NoAddress => "the pod has no address yet",
            Self::NotScheduled => "the pod is not on a node yet",
        })
    }
}

/// Decides about `pod`. `namespace` may be unknown.
pub fn decide(pod: &Pod, namespace: Option<&Namespace>, mesh: &MeshConfig) -> Decision {
    use Decision::{Enrol, Leave};
    let meta = &pod.meta;
    if pod.host_network {
        return Leave(Reason::HostNetwork);
    }
    if meta.annotations.contains_key("sidecar.istio.io/status") {
        return Leave(Reason::Sidecar);
    }
    if mesh.excluded_namespaces.contains(&meta.namespace) {
        return Leave(Reason::ExcludedNamespace);
    }
    if is_data_plane(pod, mesh) {
        return Leave(Reason::DataPlane);
    }
    if pod.phase.is_terminal() {
        return Leave(Reason::Ended);
    }
    let inherited = namespace.and_then(|namespace| namespace.meta.label(DATAPLANE_MODE));
    match (meta.label(DATAPLANE_MODE), inherited) {
        (Some("none"), _) => return Leave(Reason::OptedOut),
        (Some("ambient"), _) | (_, Some("ambient")) => {}
        _ => return Leave(Reason::NotLabelled),
    }
    if pod.addresses.is_empty() {
        return Leave(Reason::NoAddress);
    }
    if pod.node.is_empty() {
        return Leave(Reason::NotScheduled);
    }
    Enrol
}

/// Waypoints and gateways speak HBONE themselves; node proxies and node agents are what
/// captures.
fn is_data_plane(pod: &Pod, mesh: &MeshConfig) -> bool {
    let meta = &pod.meta;
    let app = meta
        .label("app.kubernetes.io/name")
        .or_else(|| meta.label("app"));
    let node_program = meta.namespace == mesh.root_namespace
        && [app, meta.label("k8s-app"), meta.label("app")]
            .into_iter()
            .flatten()
            .any(|app| matches!(app, "ztunnel" | "adit-cni" | "istio-cni-node"));
    node_program || meta.label("gateway.istio.io/managed").is_some()
}

/// The resource that tells a node to capture `pod`.
pub(super) fn resource(pod: &Pod) -> Enrolment {
    Enrolment {
        uid: pod.meta.uid.to_string(),
        name: pod.meta.name.to_string(),
        namespace: pod.meta.namespace.to_string(),
        service_account: pod.service_account.to_string(),
        addresses: pod.addresses.iter().map(ip_bytes).collect(),
        outbound_only: pod
            .meta
            .annotation("ambient.istio.io/bypass-inbound-capture")
            .and_then(go_bool)
            .unwrap_or_default(),
    }
}

/// A boolean as Go reads it (`strconv.ParseBool`).
pub(crate) fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::testing::{namespace, pod};

    #[test]
    fn every_row_of_the_decision() {
        use Decision::{Enrol, Leave};
        let mesh = MeshConfig::default();
        let ambient = "labels: {istio.io/dataplane-mode: ambient}";
        let none = "labels: {istio.io/dataplane-mode: none}";
        let mut table = vec![
            // (namespace, its metadata, pod's metadata, pod's spec, pod's status, decision)
            ("a", ambient, "", "", "", Enrol),
            ("a", "", "", "", "", Leave(Reason::NotLabelled)),
            ("a", none, "", "", "", Leave(Reason::NotLabelled)),
            ("a", "", ambient, "", "", Enrol),
            ("a", none, ambient, "", "", Enrol),
            ("a", ambient, none, "", "", Leave(Reason::OptedOut)),
            ("a", "", none, "", "", Leave(Reason::OptedOut)),
            (
                "a",
                ambient,
                "labels: {istio.io/dataplane-mode: yes-please}",
                "",
                "",
                Enrol,
            ),
            (
                "a",
                "labels: {istio.io/dataplane-mode: Ambient}",
                "",
                "",
                "",
                Leave(Reason::NotLabelled),
            ),
            (
                "a",
                ambient,
                "",
                "hostNetwork: true",
                "",
                Leave(Reason::HostNetwork),
            ),
            (
                "a",
                ambient,
                ambient,
                "hostNetwork: true",
                "",
                Leave(Reason::HostNetwork),
            ),
            (
                "a",
                ambient,
                "annotations: {sidecar.istio.io/status: '{}'}",
                "",
                "",
                Leave(Reason::Sidecar),
            ),
            (
                "kube-system",
                ambient,
                ambient,
                "",
                "",
                Leave(Reason::ExcludedNamespace),
            ),
            (
                "istio-system",
                ambient,
                "labels: {app: ztunnel}",
                "",
                "",
                Leave(Reason::DataPlane),
            ),
            ("a", ambient, "labels: {app: ztunnel}", "", "", Enrol),
            (
                "istio-system",
                ambient,
                "labels: {k8s-app: istio-cni-node}",
                "",
                "",
                Leave(Reason::DataPlane),
            ),
            (
                "a",
                ambient,
                "labels: {gateway.istio.io/managed: istio.io-mesh-controller}",
                "",
                "",
                Leave(Reason::DataPlane),
            ),
            (
                "a",
                ambient,
                "",
                "",
                "phase: Succeeded, podIP: 10.0.0.1",
                Leave(Reason::Ended),
            ),
            (
                "a",
                ambient,
                "",
                "",
                "phase: Failed, podIP: 10.0.0.1",
                Leave(Reason::Ended),
            ),
            (
                "a",
                ambient,
                "",
                "",
                "phase: Pending, podIP: 10.0.0.1",
                Enrol,
            ),
            (
                "a",
                ambient,
                "",
                "",
                "phase: Running",
                Leave(Reason::NoAddress),
            ),
            (
                "a",
                ambient,
                "",
                "nodeName: ''",
                "",
                Leave(Reason::NotScheduled),
            ),
            (
                "a",
                ambient,
                "labels: {istio.io/dataplane-mode: none}",
                "nodeName: ''",
                "",
                Leave(Reason::OptedOut),
            ),
        ];
        for (ns, ns_meta, pod_meta, spec, status, expected) in table.drain(..) {
            let namespace = namespace(ns, ns_meta);
            let spec = if spec.is_empty() {
                "nodeName: n1"
            } else {
                spec
            };
            let status = if status.is_empty() {
                "phase: Running, podIP: 10.0.0.1"
            } else {
                status
            };
            let pod = pod(ns, "p", pod_meta, spec, status);
            let decided = decide(&pod, Some(&namespace), &mesh);
            assert_eq!(
                decided, expected,
                "{ns} | {ns_meta} | {pod_meta} | {spec} | {status}"
            );
        }
        let pod = pod("a", "p", ambient, "nodeName: n1", "podIP: 10.0.0.1");
        assert_eq!(decide(&pod, None, &mesh), Enrol, "unknown namespace");
    }
}
