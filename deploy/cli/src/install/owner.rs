//! Whose the parts of a mesh are: Istio's go by the same names.

use adit_controlplane::kubernetes::{
    FIELD_MANAGER as CONTROL_PLANE, GATEWAY_MANAGER, STATUS_MANAGER,
};
use kube::ResourceExt as _;
use kube::api::DynamicObject;
use serde_json::Value;

use super::access::{Access, AccessError, FIELD_MANAGER, id_of};
use super::object::ObjectId;

/// Workloads of a mesh: kind and the label that Istio's charts give and ours as well.
const PARTS: [(&str, &str); 3] = [
    ("Deployment", "app=istiod"),
    ("DaemonSet", "app=ztunnel"),
    ("DaemonSet", "k8s-app=istio-cni-node"),
];

/// Who has put a workload there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// `adit install`.
    Installer,
    /// It is Adit, but `adit install` has not made it: Helm or somebody's own manifests.
    Elsewhere,
    /// It is not Adit.
    Other,
}

/// The control plane, node tunnel or node agent of some mesh.
#[derive(Debug)]
pub struct Part {
    /// Which.
    pub id: ObjectId,
    /// Whose.
    pub owner: Owner,
    /// The Helm chart and its version; may be empty.
    pub chart: String,
    /// The revision; may be empty.
    pub revision: String,
}

/// The parts of every mesh in a cluster.
///
/// # Errors
/// [`AccessError`].
pub async fn parts(access: &Access) -> Result<Vec<Part>, AccessError> {
    let mut found = Vec::new();
    for (kind, labels) in PARTS {
        for workload in access.list("apps/v1", kind, "", labels).await? {
            let label = |key: &str| workload.labels().get(key).cloned().unwrap_or_default();
            found.push(Part {
                id: id_of(&workload, "apps/v1", kind),
                owner: owner_of(&workload),
                chart: label("helm.sh/chart"),
                revision: label("istio.io/rev"),
            });
        }
    }
    Ok(found)
}

fn owner_of(workload: &DynamicObject) -> Owner {
    let manager = workload.labels().get("app.kubernetes.io/managed-by");
    match manager.map(String::as_str) {
        Some("adit") => Owner::Installer,
        _ if is_adit(&workload.data["spec"]["template"]["spec"]["containers"]) => Owner::Elsewhere,
        _ => Owner::Other,
    }
}

/// Whether containers run Adit, wherever their images come from. Istio's node tunnel has an
/// image of the same name as ours, so the variables that only ours reads count too.
fn is_adit(containers: &Value) -> bool {
    let mut containers = containers.as_array().into_iter().flatten();
    containers.any(|container| {
        let image = container["image"].as_str().unwrap_or_default();
        let mut variables = container["env"].as_array().into_iter().flatten();
        matches!(program(image), "aditd" | "adit-cni")
            || variables.any(|variable| {
                let name = variable["name"].as_str();
                name.is_some_and(|name| name.starts_with("ADIT_"))
            })
    })
}

/// The last part of an image's name, without tag and digest: `aditd` of
/// `registry.example:5000/mesh/aditd@sha256:...`.
fn program(image: &str) -> &str {
    let name = image.split('@').next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default();
    name.split(':').next().unwrap_or_default()
}

/// Whether Adit has written something of an object, by the names under which its programs
/// write. Labels do not say it: Istio's objects carry the same ones.
pub fn is_written_by_adit(object: &DynamicObject) -> bool {
    const OURS: [&str; 4] = [
        FIELD_MANAGER,
        CONTROL_PLANE,
        STATUS_MANAGER,
        GATEWAY_MANAGER,
    ];
    object.managed_fields().iter().any(|entry| {
        let manager = entry.manager.as_deref();
        manager.is_some_and(|manager| OURS.contains(&manager))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn workload(manager: Option<&str>, container: Value) -> DynamicObject {
        let labels = match manager {
            Some(manager) => json!({"app.kubernetes.io/managed-by": manager}),
            None => json!({}),
        };
        serde_json::from_value(json!({
            "metadata": {"name": "w", "labels": labels},
            "spec": {"template": {"spec": {"containers": [container]}}},
        }))
        .expect("an object")
    }

    #[test]
    fn a_workload_is_adits_by_its_label_or_by_what_it_runs() {
        let image = |image: &str| json!({"image": image});
        let digest = "sha256:9b6ae4ff8b54a1d9a9b6c3a5f2a1d0c4e1a7a9b6c3a5f2a1d0c4e1a7a9b6c3a5";
        let pinned = format!("registry.example:5000/mesh/aditd@{digest}");
        let tunnel = json!({"image": "registry.example/ztunnel:1", "env": [
            {"name": "ADIT_POD_DISCOVERY", "value": "cgroup"}]});
        let istios = "docker.io/istio/ztunnel:1.30.0-distroless";
        for (manager, container, owner) in [
            (Some("adit"), image("x"), Owner::Installer),
            (
                Some("Helm"),
                image("docker.io/adit/aditd:0.1.0"),
                Owner::Elsewhere,
            ),
            (None, image("localhost/adit-cni"), Owner::Elsewhere),
            (None, image(&pinned), Owner::Elsewhere),
            (Some("Helm"), tunnel, Owner::Elsewhere),
            (Some("Helm"), image(istios), Owner::Other),
            // istioctl gives no such label.
            (None, image("docker.io/istio/pilot:1.30.0"), Owner::Other),
            (
                None,
                image("docker.io/istio/install-cni@sha256:00"),
                Owner::Other,
            ),
            (None, json!({}), Owner::Other),
        ] {
            let found = owner_of(&workload(manager, container.clone()));
            assert_eq!(found, owner, "{manager:?} {container}");
        }
    }

    #[test]
    fn an_object_is_adits_by_who_wrote_it() {
        let object = |manager: &str| -> DynamicObject {
            serde_json::from_value(json!({"metadata": {"name": "s",
                "managedFields": [{"manager": "kubectl"}, {"manager": manager}]}}))
            .expect("an object")
        };
        for (manager, ours) in [
            ("adit", true),
            ("adit-gateway", true),
            ("adit-status", true),
            ("adit-install", true),
            ("pilot-discovery", false),
            ("istio.io/gateway-controller", false),
        ] {
            assert_eq!(is_written_by_adit(&object(manager)), ours, "{manager}");
        }
    }
}
