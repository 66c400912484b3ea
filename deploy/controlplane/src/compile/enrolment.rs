//! Which pods of a node are to be enrolled: the shared decision over the control plane's
//! own objects.

pub(crate) use adit_shared::model::enrolment::go_bool;
use adit_shared::model::enrolment::{self, BYPASS_INBOUND, Candidate, is_outbound_only};
pub use adit_shared::model::enrolment::{DATAPLANE_MODE, Decision, Reason};
use adit_shared::proto::enrolment::Enrolment;

use super::mesh::MeshConfig;
use super::wire::ip_bytes;
use crate::model::{Namespace, Pod};

/// Decides about `pod`. `namespace` may be unknown.
pub fn decide(pod: &Pod, namespace: Option<&Namespace>, mesh: &MeshConfig) -> Decision {
    let meta = &pod.meta;
    let candidate = Candidate {
        namespace: &meta.namespace,
        namespace_mode: namespace.and_then(|namespace| namespace.meta.label(DATAPLANE_MODE)),
        label: &|key| meta.label(key),
        annotation: &|key| meta.annotation(key),
        host_network: pod.host_network,
        ended: pod.phase.is_terminal(),
        has_address: !pod.addresses.is_empty(),
        scheduled: !pod.node.is_empty(),
    };
    enrolment::decide(candidate, &mesh.root_namespace, &mesh.excluded_namespaces)
}

/// The resource that tells a node to capture `pod`.
pub(super) fn resource(pod: &Pod) -> Enrolment {
    Enrolment {
        uid: pod.meta.uid.to_string(),
        name: pod.meta.name.to_string(),
        namespace: pod.meta.namespace.to_string(),
        service_account: pod.service_account.to_string(),
        addresses: pod.addresses.iter().map(ip_bytes).collect(),
        outbound_only: is_outbound_only(pod.meta.annotation(BYPASS_INBOUND)),
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
