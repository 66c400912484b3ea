//! Whether a pod belongs to the mesh, and what is said of one whose containers have not
//! started yet (reference: Istio's CNI agent and its label `istio.io/dataplane-mode`).
//!
//! The control plane and the node agent decide by the one function here: a pod that one
//! of them let in and the other did not would be captured and released again.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The opt-in label, on namespaces and pods. The pod's has precedence.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Annotation of pods whose inbound traffic is left alone.
pub const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";

/// A file beside the sockets of node agent and node tunnel: the agent was removed, not replaced.
/// With that the node is on its way out of the mesh, and a node tunnel that ends takes capture
/// with it, for nobody can be asked then whether it was removed, too.
pub const AGENT_REMOVED: &str = "agent-removed";

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

/// What the decision is made by.
#[derive(Clone, Copy)]
pub struct Candidate<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The namespace's label [`DATAPLANE_MODE`]; `None` also for a namespace that is unknown.
    pub namespace_mode: Option<&'a str>,
    /// A label of the pod.
    pub label: &'a dyn Fn(&str) -> Option<&'a str>,
    /// An annotation of the pod.
    pub annotation: &'a dyn Fn(&str) -> Option<&'a str>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.phase` is Succeeded or Failed.
    pub ended: bool,
    /// It has an address.
    pub has_address: bool,
    /// `spec.nodeName` is set.
    pub scheduled: bool,
}

/// Decides about a pod. `root_namespace` is where the mesh's own programs run; no pod of the
/// `excluded` namespaces is enrolled, whatever its labels say.
pub fn decide<S: AsRef<str>>(pod: Candidate<'_>, root_namespace: &str, excluded: &[S]) -> Decision {
    use Decision::{Enrol, Leave};
    if pod.host_network {
        return Leave(Reason::HostNetwork);
    }
    if (pod.annotation)("sidecar.istio.io/status").is_some() {
        return Leave(Reason::Sidecar);
    }
    if excluded.iter().any(|name| name.as_ref() == pod.namespace) {
        return Leave(Reason::ExcludedNamespace);
    }
    if is_data_plane(pod, root_namespace) {
        return Leave(Reason::DataPlane);
    }
    if pod.ended {
        return Leave(Reason::Ended);
    }
    match ((pod.label)(DATAPLANE_MODE), pod.namespace_mode) {
        (Some("none"), _) => return Leave(Reason::OptedOut),
        (Some("ambient"), _) | (_, Some("ambient")) => {}
        _ => return Leave(Reason::NotLabelled),
    }
    if !pod.has_address {
        return Leave(Reason::NoAddress);
    }
    if !pod.scheduled {
        return Leave(Reason::NotScheduled);
    }
    Enrol
}

/// Waypoints and gateways speak HBONE themselves; node proxies and node agents are what
/// captures.
fn is_data_plane(pod: Candidate<'_>, root_namespace: &str) -> bool {
    let node_program = pod.namespace == root_namespace
        && ["app.kubernetes.io/name", "app", "k8s-app"]
            .into_iter()
            .filter_map(pod.label)
            .any(|app| matches!(app, "ztunnel" | "adit-cni" | "istio-cni-node"));
    node_program || (pod.label)("gateway.istio.io/managed").is_some()
}

/// Whether the annotation [`BYPASS_INBOUND`] of a pod says that only what it sends is
/// captured. What is no boolean says nothing.
pub fn is_outbound_only(annotation: Option<&str>) -> bool {
    annotation.and_then(go_bool).unwrap_or_default()
}

/// A boolean as Go reads it (`strconv.ParseBool`).
pub fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// A pod whose sandbox is being made: the body of the node agent's `POST /pods` to ztunnel.
/// The request carries the sandbox's network namespace as a descriptor (`SCM_RIGHTS`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SandboxPod {
    /// The pod's uid, by which the control plane will name it.
    pub uid: String,
    /// Pod name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Never empty.
    pub service_account: String,
    /// What the CNI plugins before ours gave it; at least one.
    pub addresses: Vec<IpAddr>,
    /// See [`BYPASS_INBOUND`].
    #[serde(default)]
    pub outbound_only: bool,
    /// The sandbox's id (`CNI_CONTAINERID`): one pod may have several, one after the other.
    pub sandbox: String,
}

#[cfg(test)]
mod tests {
    use super::Decision::{Enrol, Leave};
    use super::*;

    const AMBIENT: Option<&str> = Some("ambient");

    fn candidate<'a>(
        namespace_mode: Option<&'a str>,
        label: &'a dyn Fn(&str) -> Option<&'a str>,
    ) -> Candidate<'a> {
        Candidate {
            namespace: "shop",
            namespace_mode,
            label,
            annotation: &|_| None,
            host_network: false,
            ended: false,
            has_address: true,
            scheduled: true,
        }
    }

    fn decided(pod: Candidate<'_>) -> Decision {
        decide(pod, "istio-system", &["kube-system"])
    }

    #[test]
    fn the_pods_label_has_precedence_over_its_namespaces() {
        for (namespace, pod, expected) in [
            (AMBIENT, None, Enrol),
            (None, AMBIENT, Enrol),
            (Some("none"), AMBIENT, Enrol),
            (AMBIENT, Some("none"), Leave(Reason::OptedOut)),
            (None, Some("none"), Leave(Reason::OptedOut)),
            (AMBIENT, Some("yes-please"), Enrol),
            (Some("Ambient"), None, Leave(Reason::NotLabelled)),
            (Some("none"), None, Leave(Reason::NotLabelled)),
            (None, None, Leave(Reason::NotLabelled)),
        ] {
            let label = |key: &str| pod.filter(|_| key == DATAPLANE_MODE);
            let decision = decided(candidate(namespace, &label));
            assert_eq!(decision, expected, "{namespace:?} {pod:?}");
        }
    }

    #[test]
    fn what_never_joins_has_its_reason() {
        let pod = candidate(AMBIENT, &|_| None);
        let sidecar = |key: &str| (key == "sidecar.istio.io/status").then_some("{}");
        let managed = |key: &str| (key == "gateway.istio.io/managed").then_some("x");
        let ztunnel = |key: &str| (key == "app").then_some("ztunnel");
        let agent = |key: &str| match key {
            "k8s-app" => Some("istio-cni-node"),
            "app.kubernetes.io/name" => Some("something"),
            _ => None,
        };
        let rows = [
            (
                Candidate {
                    host_network: true,
                    ..pod
                },
                Leave(Reason::HostNetwork),
            ),
            (
                Candidate {
                    annotation: &sidecar,
                    ..pod
                },
                Leave(Reason::Sidecar),
            ),
            (
                Candidate {
                    namespace: "kube-system",
                    ..pod
                },
                Leave(Reason::ExcludedNamespace),
            ),
            (
                Candidate {
                    label: &managed,
                    ..pod
                },
                Leave(Reason::DataPlane),
            ),
            (
                Candidate {
                    label: &ztunnel,
                    namespace: "istio-system",
                    ..pod
                },
                Leave(Reason::DataPlane),
            ),
            (
                Candidate {
                    label: &agent,
                    namespace: "istio-system",
                    ..pod
                },
                Leave(Reason::DataPlane),
            ),
            (
                Candidate {
                    label: &ztunnel,
                    ..pod
                },
                Enrol,
            ),
            (Candidate { ended: true, ..pod }, Leave(Reason::Ended)),
            (
                Candidate {
                    has_address: false,
                    ..pod
                },
                Leave(Reason::NoAddress),
            ),
            (
                Candidate {
                    scheduled: false,
                    ..pod
                },
                Leave(Reason::NotScheduled),
            ),
        ];
        for (row, (pod, expected)) in rows.into_iter().enumerate() {
            assert_eq!(decided(pod), expected, "row {row}");
        }
    }

    #[test]
    fn booleans_are_gos() {
        assert!(is_outbound_only(Some("T")));
        for text in [Some("yes"), Some("0"), Some(""), None] {
            assert!(!is_outbound_only(text), "{text:?}");
        }
    }
}
