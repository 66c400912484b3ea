//! What an installation leaves in the cluster about itself: its objects' labels, and what it
//! was asked for.

use kube::ResourceExt as _;
use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::access::{Access, AccessError, id_of};
use super::object::{Object, ObjectId};
use super::spec::Spec;

/// On every object that is applied here; Helm's have `managed-by: Helm`.
pub const OWNED: &str = "app.kubernetes.io/managed-by=adit,app.kubernetes.io/part-of=istio";
/// Which control plane an object belongs to.
const REVISION_LABEL: &str = "istio.io/rev";
/// The labels that [`OWNED`] and the revision are told by.
pub const KEPT_LABELS: [&str; 3] = [
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/part-of",
    REVISION_LABEL,
];
/// What the control plane makes of Gateways carries this.
pub const GENERATED_LABEL: &str = "gateway.istio.io/managed";

/// Kinds that charts render, except definitions; what is deleted first comes first.
pub const KINDS: [(&str, &str); 15] = [
    (
        "admissionregistration.k8s.io/v1",
        "ValidatingWebhookConfiguration",
    ),
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("policy/v1", "PodDisruptionBudget"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "DaemonSet"),
    ("v1", "Service"),
    ("monitoring.coreos.com/v1", "PodMonitor"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("v1", "ConfigMap"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
    ("rbac.authorization.k8s.io/v1", "ClusterRole"),
    ("v1", "ServiceAccount"),
    ("v1", "ResourceQuota"),
];

/// An installation that is there.
#[derive(Debug, Clone, PartialEq)]
pub struct Installed {
    /// What it was asked for.
    pub spec: Spec,
    /// The version of the program that installed it.
    pub version: String,
}

/// The revision as labels have it.
pub fn revision_label(revision: &str) -> &str {
    match revision {
        "" => "default",
        revision => revision,
    }
}

/// Names of records begin with it.
const RECORD: &str = "adit-installed-state";

/// That an installation is there, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The namespace of the mesh's own components.
    pub namespace: String,
    /// The revision, as labels have it.
    pub revision: String,
}

fn state_id(namespace: &str, revision: &str) -> ObjectId {
    ObjectId {
        api_version: "v1".into(),
        kind: "ConfigMap".into(),
        namespace: namespace.into(),
        name: match revision {
            "" => RECORD.into(),
            revision => format!("{RECORD}-{revision}"),
        },
    }
}

/// What is remembered of an installation.
pub fn record(spec: &Spec) -> Object {
    let id = state_id(spec.namespace(), spec.revision());
    let manifest = json!({
        "apiVersion": id.api_version,
        "kind": id.kind,
        "metadata": {
            "name": id.name,
            "namespace": id.namespace,
            "labels": {
                "app.kubernetes.io/managed-by": "adit",
                "app.kubernetes.io/part-of": "istio",
                REVISION_LABEL: revision_label(spec.revision()),
            },
        },
        "data": {
            "spec.yaml": super::template::to_yaml(spec.value()),
            "version": env!("CARGO_PKG_VERSION"),
        },
    });
    Object { id, manifest }
}

/// The installation that `record` has left.
///
/// # Errors
/// [`AccessError`].
pub async fn installed(
    access: &Access,
    namespace: &str,
    revision: &str,
) -> Result<Option<Installed>, AccessError> {
    let Some(state) = access.get_json(&state_id(namespace, revision)).await? else {
        return Ok(None);
    };
    let spec = state["data"]["spec.yaml"].as_str().unwrap_or_default();
    // Somebody has edited it: nothing of it is used.
    let spec: Value = serde_yaml_ng::from_str(spec).unwrap_or_default();
    let spec = match spec.is_object() {
        true => Spec::from_value(spec),
        false => Spec::default(),
    };
    let version = state["data"]["version"].as_str().unwrap_or_default();
    Ok(Some(Installed {
        spec,
        version: version.to_owned(),
    }))
}

/// Every installation in the cluster, of whatever namespace.
///
/// # Errors
/// [`AccessError`].
pub async fn places(access: &Access) -> Result<Vec<Place>, AccessError> {
    let records = access.list("v1", "ConfigMap", "", OWNED).await?;
    let records = records
        .iter()
        .filter(|record| record.name_any().starts_with(RECORD));
    let place = |record: &DynamicObject| Place {
        namespace: record.namespace().unwrap_or_default(),
        revision: revision_of(record).to_owned(),
    };
    Ok(records.map(place).collect())
}

/// The other namespace that a revision is installed in. What is not in a namespace belongs to
/// one of a revision only, so that there can be one.
pub fn elsewhere<'a>(places: &'a [Place], namespace: &str, revision: &str) -> Option<&'a Place> {
    let revision = revision_label(revision);
    let mut others = places.iter();
    others.find(|place| place.revision == revision && place.namespace != namespace)
}

fn revision_of(object: &DynamicObject) -> &str {
    let label = object.labels().get(REVISION_LABEL);
    label.map(String::as_str).unwrap_or_default()
}

/// Every object that installations have applied, in the order of deletion: those of the
/// revisions, as labels have them, that `of` says yes to.
///
/// # Errors
/// [`AccessError`].
pub async fn owned(
    access: &Access,
    of: impl Fn(&str) -> bool,
) -> Result<Vec<ObjectId>, AccessError> {
    let mut found = Vec::new();
    for (api_version, kind) in KINDS {
        for object in access.list(api_version, kind, "", OWNED).await? {
            if of(revision_of(&object)) && !object.labels().contains_key(GENERATED_LABEL) {
                found.push(id_of(&object, api_version, kind));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_in_one_namespace() {
        let place = |namespace: &str, revision: &str| Place {
            namespace: namespace.into(),
            revision: revision.into(),
        };
        let places = [place("istio-system", "default"), place("mesh", "canary")];
        for (namespace, revision, expected) in [
            ("istio-system", "", None),
            ("mesh", "", Some("istio-system")),
            ("mesh", "canary", None),
            ("istio-system", "canary", Some("mesh")),
            ("third", "new", None),
        ] {
            let found = elsewhere(&places, namespace, revision);
            let found = found.map(|place| place.namespace.as_str());
            assert_eq!(found, expected, "{namespace} {revision}");
        }
    }
}
