//! A Gateway, as far as running a waypoint for it needs.

use std::collections::BTreeMap;

use kube::api::DynamicObject;
use serde::Deserialize;

/// The waypoint's service account, where it is not to be generated.
const SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";
/// Type of the generated Service.
const SERVICE_TYPE: &str = "networking.istio.io/service-type";
/// A newer control plane has taken the Gateway over.
const CONTROLLER_VERSION: &str = "gateway.istio.io/controller-version";
/// The newest whose objects are as ours (Istio's numbering).
const KNOWN_VERSION: u32 = 5;
/// Image of this waypoint.
const IMAGE: &str = "sidecar.istio.io/proxyImage";
/// Log filter of this waypoint.
const LOG_LEVEL: &str = "sidecar.istio.io/logLevel";

/// A Gateway for which a waypoint may have to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaypointGateway {
    /// Its name, and that of everything that is generated.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
    /// `apiVersion` that it was read with.
    pub api_version: String,
    /// The class.
    pub class: String,
    /// Labels of everything that is generated.
    pub labels: BTreeMap<String, String>,
    /// Annotations of everything that is generated.
    pub annotations: BTreeMap<String, String>,
    /// The ConfigMap with its overlay.
    pub parameters: Option<Parameters>,
    /// A service account that somebody else provides.
    pub service_account: Option<String>,
    /// Type of the Service, if it is not `ClusterIP`.
    pub service_type: Option<String>,
    /// An image of its own.
    pub image: Option<String>,
    /// A log filter of its own.
    pub log_level: Option<String>,
}

/// `spec.infrastructure.parametersRef`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Parameters {
    /// Its group.
    pub group: String,
    /// Its kind.
    pub kind: String,
    /// Its name, in the Gateway's namespace.
    pub name: String,
}

/// Why nothing is run for a Gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotProvisioned {
    /// It is being deleted.
    Deleting,
    /// `spec.addresses`: somebody else runs it.
    SelfManaged,
    /// Another control plane's, by revision.
    OtherRevision,
    /// A newer control plane has taken it over.
    NewerController,
    /// It cannot be read; compiling says what is wrong with it.
    Unreadable,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    gateway_class_name: String,
    addresses: Option<Vec<serde_json::Value>>,
    infrastructure: Option<Infrastructure>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Infrastructure {
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    parameters_ref: Option<Parameters>,
}

impl WaypointGateway {
    /// Reads a Gateway. Whether its class is a waypoint's is for the caller to know.
    ///
    /// # Errors
    /// Why nothing is to be run for it.
    pub fn read(object: &DynamicObject, revision: &str) -> Result<Self, NotProvisioned> {
        let meta = &object.metadata;
        if meta.deletion_timestamp.is_some() {
            return Err(NotProvisioned::Deleting);
        }
        let label = |key| meta.labels.as_ref().and_then(|all| all.get(key));
        if label("istio.io/rev").is_some_and(|of| of != revision) {
            return Err(NotProvisioned::OtherRevision);
        }
        let annotation = |key| {
            meta.annotations
                .as_ref()
                .and_then(|all| all.get(key))
                .cloned()
        };
        let version = annotation(CONTROLLER_VERSION).and_then(|text| text.parse::<u32>().ok());
        if version.is_some_and(|version| version > KNOWN_VERSION) {
            return Err(NotProvisioned::NewerController);
        }
        let spec = object.data.get("spec").cloned().unwrap_or_default();
        let spec: Spec = serde_json::from_value(spec).map_err(|_| NotProvisioned::Unreadable)?;
        if spec.addresses.is_some_and(|of| !of.is_empty()) {
            return Err(NotProvisioned::SelfManaged);
        }
        let infrastructure = spec.infrastructure.unwrap_or_default();
        let (Some(name), Some(namespace), Some(uid)) = (&meta.name, &meta.namespace, &meta.uid)
        else {
            return Err(NotProvisioned::Unreadable);
        };
        let types = object.types.as_ref();
        Ok(Self {
            name: name.clone(),
            namespace: namespace.clone(),
            uid: uid.clone(),
            api_version: types.map_or_else(
                || "gateway.networking.k8s.io/v1".into(),
                |types| types.api_version.clone(),
            ),
            class: spec.gateway_class_name,
            labels: infrastructure.labels.unwrap_or_default(),
            annotations: infrastructure.annotations.unwrap_or_default(),
            parameters: infrastructure.parameters_ref,
            service_account: annotation(SERVICE_ACCOUNT),
            service_type: annotation(SERVICE_TYPE),
            image: annotation(IMAGE),
            log_level: annotation(LOG_LEVEL),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(metadata: Value, spec: Value) -> Result<WaypointGateway, NotProvisioned> {
        let mut object = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": "w", "namespace": "a", "uid": "u"}, "spec": spec});
        for (key, value) in metadata.as_object().expect("a map") {
            object["metadata"][key] = value.clone();
        }
        let object = serde_json::from_value(object).expect("an object");
        WaypointGateway::read(&object, "default")
    }

    #[test]
    fn what_others_run_is_left_to_them() {
        let spec = || json!({"gatewayClassName": "istio-waypoint"});
        let table = [
            (json!({}), spec(), None),
            (json!({"labels": {"istio.io/rev": "default"}}), spec(), None),
            (
                json!({"labels": {"istio.io/rev": "canary"}}),
                spec(),
                Some(NotProvisioned::OtherRevision),
            ),
            (
                json!({"annotations": {CONTROLLER_VERSION: "6"}}),
                spec(),
                Some(NotProvisioned::NewerController),
            ),
            (
                json!({"annotations": {CONTROLLER_VERSION: "5"}}),
                spec(),
                None,
            ),
            (
                json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}),
                spec(),
                Some(NotProvisioned::Deleting),
            ),
            (
                json!({}),
                json!({"gatewayClassName": "x", "addresses": [{"value": "10.0.0.1"}]}),
                Some(NotProvisioned::SelfManaged),
            ),
            (
                json!({}),
                json!({"gatewayClassName": 5}),
                Some(NotProvisioned::Unreadable),
            ),
        ];
        for (metadata, spec, expected) in table {
            let context = format!("{metadata} {spec}");
            assert_eq!(read(metadata, spec).err(), expected, "{context}");
        }
    }
}
