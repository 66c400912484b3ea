//! The Gateway API: whether it is there, and the class of waypoints.

use std::fmt;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::compile::l7::{CONTROLLER, WAYPOINT_CLASS};
use crate::kubernetes::GATEWAY_MANAGER;
use crate::kubernetes::apply::{Failure, RequestError, request};
use crate::model::{ClassParameters, Code, Finding, Severity};
use crate::status::Condition;

/// The oldest bundle of the Gateway API that has what a mesh needs: GRPCRoute as `v1`, and
/// routes that attach to Services in the standard channel.
pub const MINIMUM: (u32, u32) = (1, 1);

/// Which version of its bundle a CRD of the Gateway API is of.
const BUNDLE_VERSION: &str = "gateway.networking.k8s.io/bundle-version";
const GATEWAYS: &str = "gateways.gateway.networking.k8s.io";
/// Every user of the Gateway API installs it as its own documentation says.
const INSTALL: &str = "kubectl apply --server-side -f https://github.com/kubernetes-sigs/gateway-api/releases/latest/download/standard-install.yaml";

/// Features of the Gateway API by its own names, in the order that it asks for
/// (`GatewayClass.status.supportedFeatures`): those that the conformance report claims.
const FEATURES: [&str; 12] = [
    "GRPCRoute",
    "HTTPRoute",
    "Mesh",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
];

/// What there is of the Gateway API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GatewayApi {
    /// Its CRDs are not there, or serve no `v1`.
    Absent,
    /// They are older than [`MINIMUM`], which this version says.
    TooOld(String),
    /// They are there. The version, where they tell it.
    Present(String),
}

impl GatewayApi {
    /// Asks for the CRD of Gateways.
    ///
    /// # Errors
    /// A request's.
    pub async fn look(client: &Client) -> Result<Self, RequestError> {
        let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
        let crd = request(crds.get_opt(GATEWAYS)).await?;
        Ok(crd.map_or(Self::Absent, |crd| Self::of(&crd)))
    }

    fn of(crd: &CustomResourceDefinition) -> Self {
        let serves = crd
            .spec
            .versions
            .iter()
            .any(|of| of.name == "v1" && of.served);
        let annotations = crd.metadata.annotations.as_ref();
        let version = annotations.and_then(|all| all.get(BUNDLE_VERSION));
        let version = version.cloned().unwrap_or_default();
        match parse(&version) {
            _ if !serves && version.is_empty() => Self::Absent,
            Some(number) if number < MINIMUM => Self::TooOld(version),
            _ if !serves => Self::TooOld(version),
            _ => Self::Present(version),
        }
    }

    /// What a user has to be told.
    pub(super) fn finding(&self) -> Option<Finding> {
        if matches!(self, Self::Present(_)) {
            return None;
        }
        Some(Finding {
            severity: Severity::Warning,
            code: Code::ReferencedResourceNotFound,
            object: None,
            file: None,
            line: 0,
            field: String::new(),
            message: self.to_string(),
        })
    }

    /// What stands at the class of waypoints (GatewayClass `SupportedVersion`).
    pub(super) fn condition(&self) -> Condition {
        let kind = "SupportedVersion";
        match self {
            Self::Present(_) => Condition::new(kind, true, "SupportedVersion", self),
            _ => Condition::new(kind, false, "UnsupportedVersion", self),
        }
    }
}

impl fmt::Display for GatewayApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = MINIMUM;
        match self {
            Self::Absent => write!(
                f,
                "the CRDs of the Gateway API are not installed: there are no waypoints and no routes until they are: {INSTALL}"
            ),
            Self::TooOld(version) => write!(
                f,
                "the CRDs of the Gateway API are of {version}, older than v{major}.{minor}: waypoints and routes may not work: {INSTALL}"
            ),
            Self::Present(version) if version.is_empty() => {
                f.write_str("the CRDs of the Gateway API do not tell their version")
            }
            Self::Present(version) => write!(f, "the Gateway API is of {version}"),
        }
    }
}

/// `v1.4.0` or `v1.5.0-rc.1`.
fn parse(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.strip_prefix('v')?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The API of GatewayClasses.
pub(super) fn classes(client: &Client) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &resource("GatewayClass", "gatewayclasses"))
}

/// The API of a kind of this group in `v1`.
pub(super) fn resource(kind: &str, plural: &str) -> ApiResource {
    let gvk = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", kind);
    ApiResource::from_gvk_with_plural(&gvk, plural)
}

/// A GatewayClass, as far as making waypoints needs it.
#[derive(Debug, Default)]
pub(super) struct Class {
    controller: String,
    /// `spec.parametersRef`, or why it cannot be read.
    pub(super) parameters: Option<Result<ClassParameters, String>>,
}

impl Class {
    /// Looks at a class; `None`: there is none of that name.
    ///
    /// # Errors
    /// A request's.
    pub(super) async fn look(client: &Client, name: &str) -> Result<Option<Self>, RequestError> {
        let class = request(classes(client).get_opt(name)).await?;
        Ok(class.map(|class| Self::of(&class.data["spec"])))
    }

    fn of(spec: &Value) -> Self {
        let parameters = &spec["parametersRef"];
        let read = || {
            let read = serde_json::from_value(parameters.clone());
            read.map_err(|error| format!("spec.parametersRef cannot be read: {error}"))
        };
        Self {
            controller: spec["controllerName"].as_str().unwrap_or_default().into(),
            parameters: (!parameters.is_null()).then(read),
        }
    }

    /// Whether its Gateways are waypoints of ours.
    pub(super) fn is_ours(&self) -> bool {
        self.controller == CONTROLLER
    }
}

/// Makes the class of waypoints, if there is none, and tells what it can. The specification of
/// one that is there is left as it is.
///
/// # Errors
/// A request's.
pub(super) async fn ensure(client: &Client) -> Result<(), RequestError> {
    match Class::look(client, WAYPOINT_CLASS).await? {
        Some(class) if class.is_ours() => return tell_features(client).await,
        Some(class) => {
            tracing::warn!(
                "GatewayClass {WAYPOINT_CLASS} is served by {:?}, not by {CONTROLLER:?}: its Gateways are not ours",
                class.controller
            );
            return Ok(());
        }
        None => {}
    }
    let class = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": {"name": WAYPOINT_CLASS},
        "spec": {
            "controllerName": CONTROLLER,
            "description": "Waypoints: L7 policy and routing for workloads of the mesh",
        },
    });
    let params = PatchParams::apply(GATEWAY_MANAGER).force();
    let (classes, patch) = (classes(client), Patch::Apply(class));
    match request(classes.patch(WAYPOINT_CLASS, &params, &patch)).await {
        Ok(_) => {
            tracing::info!("GatewayClass {WAYPOINT_CLASS} made");
            tell_features(client).await
        }
        // Somebody else has made it meanwhile.
        Err(error) if error.failure() == Failure::Conflict => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes down the features. A Gateway API that is too old to have a field for them drops it,
/// or refuses, which is no trouble.
async fn tell_features(client: &Client) -> Result<(), RequestError> {
    let classes = classes(client);
    let Some(class) = request(classes.get_opt(WAYPOINT_CLASS)).await? else {
        return Ok(());
    };
    let features = FEATURES.map(|name| json!({ "name": name }));
    if class.data.pointer("/status/supportedFeatures") == Some(&json!(features)) {
        return Ok(());
    }
    let patch = Patch::Merge(json!({"status": {"supportedFeatures": features}}));
    let params = PatchParams {
        field_manager: Some(GATEWAY_MANAGER.into()),
        ..PatchParams::default()
    };
    match request(classes.patch_status(WAYPOINT_CLASS, &params, &patch)).await {
        Err(error) if matches!(error.failure(), Failure::Refused | Failure::Gone) => {
            tracing::debug!("the features of GatewayClass {WAYPOINT_CLASS} are not told: {error}");
            Ok(())
        }
        result => result.map(|_| ()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        let crd = |version: &str, served: bool| {
            let crd = json!({
                "metadata": {"name": GATEWAYS, "annotations": {BUNDLE_VERSION: version}},
                "spec": {"group": "gateway.networking.k8s.io", "scope": "Namespaced",
                    "names": {"kind": "Gateway", "plural": "gateways"},
                    "versions": [{"name": "v1", "served": served, "storage": true}]},
            });
            GatewayApi::of(&serde_json::from_value(crd).expect("a CRD"))
        };
        assert_eq!(crd("v1.7.0", true), GatewayApi::Present("v1.7.0".into()));
        assert_eq!(
            crd("v1.1.0-rc.1", true),
            GatewayApi::Present("v1.1.0-rc.1".into())
        );
        assert_eq!(crd("v1.0.0", true), GatewayApi::TooOld("v1.0.0".into()));
        assert_eq!(crd("v0.8.1", false), GatewayApi::TooOld("v0.8.1".into()));
        assert_eq!(crd("", false), GatewayApi::Absent);
        assert_eq!(crd("weird", true), GatewayApi::Present("weird".into()));
    }

    #[test]
    fn a_class_names_a_config_map_with_its_namespace() {
        let table = [
            (json!({}), Ok(None)),
            (json!({"parametersRef": null}), Ok(None)),
            (
                json!({"parametersRef": {"group": "", "kind": "ConfigMap", "name": "p", "namespace": "a"}}),
                Ok(Some("a/p".to_owned())),
            ),
            (
                json!({"parametersRef": {"group": "", "kind": "ConfigMap", "name": "p"}}),
                Err("names no namespace"),
            ),
            (
                json!({"parametersRef": {"group": "x", "kind": "Y", "name": "p", "namespace": "a"}}),
                Err("names a Y of group \"x\""),
            ),
            (json!({"parametersRef": 5}), Err("cannot be read")),
            (
                json!({"parametersRef": {"nmae": "p"}}),
                Err("cannot be read"),
            ),
        ];
        for (spec, expected) in table {
            let class = Class::of(&spec);
            let found = class.parameters.map(|of| {
                let (namespace, name) = of.as_ref().map_err(Clone::clone)?.config_map()?;
                Ok::<_, String>(format!("{namespace}/{name}"))
            });
            match (found.transpose(), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{spec}"),
                (Err(why), Err(expected)) => assert!(why.contains(expected), "{spec}: {why}"),
                (found, _) => panic!("{spec}: {found:?}"),
            }
        }
    }

    #[test]
    fn what_is_missing_is_told_with_the_way_out() {
        let finding = GatewayApi::Absent.finding().expect("a finding");
        assert!(finding.message.contains("kubectl apply"), "{finding}");
        assert!(GatewayApi::Present("v1.7.0".into()).finding().is_none());
        assert!(!GatewayApi::TooOld("v1.0.0".into()).condition().status);
    }

    #[test]
    fn the_features_are_those_of_the_report() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../integration/conformance/report.yaml"
        );
        let report = std::fs::read_to_string(path).expect("the report");
        let report: serde_json::Value = serde_yaml_ng::from_str(&report).expect("YAML");
        let mut claimed = std::collections::BTreeSet::from(["Mesh"]);
        for profile in report["profiles"].as_array().expect("profiles") {
            claimed.insert(match profile["name"].as_str() {
                Some("MESH-HTTP") => "HTTPRoute",
                Some("MESH-GRPC") => "GRPCRoute",
                other => panic!("{other:?}"),
            });
            assert_eq!(profile["core"]["result"], "success");
            let extended = profile["extended"]["supportedFeatures"].as_array();
            claimed.extend(extended.into_iter().flatten().filter_map(|of| of.as_str()));
        }
        // In the order of their names, as the API asks for.
        assert_eq!(FEATURES.to_vec(), claimed.into_iter().collect::<Vec<_>>());
    }
}
