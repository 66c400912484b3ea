//! The decision about a pod of the API server, whose sandbox is being made.

use std::collections::BTreeMap;

use adit_shared::model::enrolment::{
    BYPASS_INBOUND, Candidate, DATAPLANE_MODE, Decision, SandboxPod, decide as decide_candidate,
    is_outbound_only,
};
use k8s_openapi::api::core::v1::Pod;

use crate::protocol::Sandbox;

/// Annotation of the API server's image of a static pod: the uid by which the kubelet, and
/// so the runtime, knows it.
const STATIC_UID: &str = "kubernetes.io/config.mirror";

/// Decides about a pod which is about to have the sandbox's addresses.
pub(super) fn decide(
    pod: &Pod,
    namespace_labels: Option<&BTreeMap<String, String>>,
    sandbox: &Sandbox,
    root_namespace: &str,
    excluded: &[String],
) -> Decision {
    let spec = pod.spec.as_ref();
    let labels = pod.metadata.labels.as_ref();
    let annotations = pod.metadata.annotations.as_ref();
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let candidate = Candidate {
        namespace: &sandbox.namespace,
        namespace_mode: namespace_labels
            .and_then(|labels| Some(labels.get(DATAPLANE_MODE)?.as_str())),
        label: &|key| Some(labels?.get(key)?.as_str()),
        annotation: &|key| Some(annotations?.get(key)?.as_str()),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or_default(),
        ended: matches!(phase, Some("Succeeded" | "Failed")),
        has_address: !sandbox.addresses.is_empty(),
        // A kubelet is making it.
        scheduled: true,
    };
    decide_candidate(candidate, root_namespace, excluded)
}

/// What ztunnel is told of it. `None` without a uid, which the API server always gives.
pub(super) fn sandbox_pod(pod: &Pod, sandbox: &Sandbox) -> Option<SandboxPod> {
    let spec = pod.spec.as_ref();
    let account = spec.and_then(|spec| spec.service_account_name.clone());
    let annotations = pod.metadata.annotations.as_ref();
    let bypass = annotations.and_then(|all| Some(all.get(BYPASS_INBOUND)?.as_str()));
    Some(SandboxPod {
        uid: pod.metadata.uid.clone()?,
        name: sandbox.name.clone(),
        namespace: sandbox.namespace.clone(),
        service_account: account
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "default".into()),
        addresses: sandbox.addresses.clone(),
        outbound_only: is_outbound_only(bypass),
        sandbox: sandbox.id.clone(),
    })
}

/// Whether this is the pod that the sandbox is made for, and not one of the same name before
/// or after it.
pub(super) fn is_same(pod: &Pod, sandbox: &Sandbox) -> bool {
    let Some(uid) = &sandbox.uid else {
        return true;
    };
    let annotations = pod.metadata.annotations.as_ref();
    let static_uid = annotations.and_then(|all| all.get(STATIC_UID));
    pod.metadata.uid.as_ref() == Some(uid) || static_uid == Some(uid)
}

#[cfg(test)]
mod tests {
    use adit_shared::model::enrolment::Reason;
    use serde_json::json;

    use super::*;

    fn pod(metadata: serde_json::Value, spec: serde_json::Value) -> Pod {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
        serde_json::from_value(pod).expect("a pod")
    }

    fn sandbox() -> Sandbox {
        Sandbox {
            id: "s1".into(),
            namespace: "shop".into(),
            name: "web-1".into(),
            uid: Some("u1".into()),
            addresses: vec![[10, 0, 0, 7].into()],
        }
    }

    fn decided(pod: &Pod, mode: Option<&str>) -> Decision {
        let labels = mode.map(|mode| [(DATAPLANE_MODE.to_owned(), mode.to_owned())].into());
        let excluded = ["kube-system".to_owned()];
        decide(pod, labels.as_ref(), &sandbox(), "istio-system", &excluded)
    }

    #[test]
    fn a_pod_of_the_api_server_is_decided_about() {
        let containers = json!({"containers": []});
        let plain = pod(json!({"uid": "u1"}), containers.clone());
        assert_eq!(decided(&plain, Some("ambient")), Decision::Enrol);
        assert_eq!(decided(&plain, None), Decision::Leave(Reason::NotLabelled));
        let out = pod(
            json!({"uid": "u1", "labels": {DATAPLANE_MODE: "none"}}),
            containers.clone(),
        );
        assert_eq!(
            decided(&out, Some("ambient")),
            Decision::Leave(Reason::OptedOut)
        );
        let sidecar = pod(
            json!({"uid": "u1", "annotations": {"sidecar.istio.io/status": "{}"}}),
            containers,
        );
        assert_eq!(
            decided(&sidecar, Some("ambient")),
            Decision::Leave(Reason::Sidecar)
        );
        let host = pod(
            json!({"uid": "u1"}),
            json!({"containers": [], "hostNetwork": true}),
        );
        assert_eq!(
            decided(&host, Some("ambient")),
            Decision::Leave(Reason::HostNetwork)
        );
    }

    #[test]
    fn ztunnel_hears_what_it_needs() {
        let pod = pod(
            json!({"uid": "u1", "annotations": {BYPASS_INBOUND: "true"}}),
            json!({"containers": [], "serviceAccountName": "web"}),
        );
        let told = sandbox_pod(&pod, &sandbox()).expect("it has a uid");
        assert_eq!(
            (told.uid.as_str(), told.service_account.as_str()),
            ("u1", "web")
        );
        assert!(told.outbound_only);
        assert_eq!(told.sandbox, "s1");
    }

    #[test]
    fn pods_of_one_name_are_told_apart() {
        let containers = json!({"containers": []});
        assert!(is_same(
            &pod(json!({"uid": "u1"}), containers.clone()),
            &sandbox()
        ));
        assert!(!is_same(
            &pod(json!({"uid": "u2"}), containers.clone()),
            &sandbox()
        ));
        let mirror = pod(
            json!({"uid": "u2", "annotations": {STATIC_UID: "u1"}}),
            containers,
        );
        assert!(is_same(&mirror, &sandbox()));
    }
}
