//! The objects of a waypoint (`reference`: Istio's `waypoint.yaml`).

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::gateway::WaypointGateway;
use super::overlay::{Overlay, OverlayError, merge};
use super::settings::WaypointSettings;
use crate::compile::l7::GATEWAY_NAME;

/// Who manages a generated object; one without it is somebody else's.
pub const MANAGED: &str = "gateway.istio.io/managed";
/// The value of [`MANAGED`] on what belongs to a waypoint.
pub const MESH_CONTROLLER: &str = "istio.io-mesh-controller";

/// The same name as [`GATEWAY_NAME`]'s, where Istio's older tools look.
const ISTIO_GATEWAY_NAME: &str = "istio.io/gateway-name";
const CLASS_NAME: &str = "gateway.networking.k8s.io/gateway-class-name";
const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

const STATUS_PORT: u16 = 15021;
const METRICS_PORT: u16 = 15020;
const HBONE_PORT: u16 = 15008;
/// Nobody in particular, and not root; Istio's proxies have the same.
const USER: u32 = 1337;
/// From SIGTERM to the end, the pause before it included.
const GRACE_SECONDS: u32 = 30;
/// How long a pod that is to end still takes new connections: clients are told about it
/// by their control plane meanwhile, which may itself be replaced in that moment.
const LINGER_SECONDS: u32 = 10;
/// A waypoint becomes ready when it has its configuration and a certificate. Starting it
/// anew brings neither, so it is given time for a control plane that is away.
const START_SECONDS: u32 = 300;
const TOKEN_SECONDS: u32 = 43_200;

/// What is generated for a Gateway. Each is the part of an object that is applied.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The waypoint's identity; `None`: somebody else provides it.
    pub service_account: Option<Value>,
    /// The waypoint's pods.
    pub deployment: Value,
    /// What ztunnels dial.
    pub service: Value,
    /// Where an overlay asks for it.
    pub autoscaler: Option<Value>,
    /// Where an overlay asks for it.
    pub disruption_budget: Option<Value>,
}

/// Makes the objects of a waypoint. Overlays are laid over them in order; what identifies
/// an object is not theirs to change.
///
/// # Errors
/// An overlay that does not fit.
pub fn generate(
    gateway: &WaypointGateway,
    settings: &WaypointSettings,
    overlays: &[Overlay],
) -> Result<Generated, OverlayError> {
    let make = Maker { gateway, settings };
    let lay = |field: &'static str, base: Value| -> Result<Value, OverlayError> {
        let mut object = base.clone();
        for overlay in overlays {
            if let Some(patch) = overlay.get(field) {
                merge(&mut object, patch).map_err(|error| error.of(field))?;
            }
        }
        // One overlay may remove it and the next give it another form.
        if object.get("spec").is_some_and(|spec| !spec.is_object()) {
            return Err(OverlayError::Misfit {
                field: format!("{field}.spec"),
                reason: "is an object, so it needs a map".into(),
            });
        }
        make.identify(&mut object, &base);
        Ok(object)
    };
    let asked = |field: &'static str, base: Value| -> Result<Option<Value>, OverlayError> {
        let is_asked = overlays.iter().any(|overlay| overlay.get(field).is_some());
        is_asked.then(|| lay(field, base)).transpose()
    };
    Ok(Generated {
        service_account: match &gateway.service_account {
            Some(_) => None,
            None => Some(lay("serviceAccount", make.service_account())?),
        },
        deployment: lay("deployment", make.deployment())?,
        service: lay("service", make.service())?,
        autoscaler: asked("horizontalPodAutoscaler", make.autoscaler())?,
        disruption_budget: asked("podDisruptionBudget", make.disruption_budget())?,
    })
}

struct Maker<'a> {
    gateway: &'a WaypointGateway,
    settings: &'a WaypointSettings,
}

impl Maker<'_> {
    /// Labels that say whose an object is.
    fn identity(&self) -> Map<String, Value> {
        let labels = [
            (GATEWAY_NAME, self.gateway.name.as_str()),
            (ISTIO_GATEWAY_NAME, &self.gateway.name),
            (CLASS_NAME, &self.gateway.class),
            (MANAGED, MESH_CONTROLLER),
        ];
        labels
            .map(|(key, value)| (key.to_owned(), value.into()))
            .into_iter()
            .collect()
    }

    fn metadata(&self) -> Value {
        let mut labels = to_map(&self.gateway.labels);
        labels.extend(self.identity());
        let mut metadata = json!({
            "name": self.gateway.name,
            "namespace": self.gateway.namespace,
            "labels": labels,
            "ownerReferences": [{
                "apiVersion": self.gateway.api_version,
                "kind": "Gateway",
                "name": self.gateway.name,
                "uid": self.gateway.uid,
                "controller": true,
                "blockOwnerDeletion": true,
            }],
        });
        if !self.gateway.annotations.is_empty() {
            metadata["annotations"] = to_map(&self.gateway.annotations).into();
        }
        metadata
    }

    /// Puts back what identifies an object and its pods.
    fn identify(&self, object: &mut Value, base: &Value) {
        for field in ["apiVersion", "kind"] {
            object[field] = base[field].clone();
        }
        if !object["metadata"].is_object() {
            object["metadata"] = json!({});
        }
        for field in ["name", "namespace", "ownerReferences"] {
            object["metadata"][field] = base["metadata"][field].clone();
        }
        let put = |labels: &mut Value| {
            if !labels.is_object() {
                *labels = json!({});
            }
            for (key, value) in self.identity() {
                labels[key] = value;
            }
        };
        put(&mut object["metadata"]["labels"]);
        if let Some(template) = object.pointer_mut("/spec/template/metadata/labels") {
            put(template);
        }
        for field in ["selector", "scaleTargetRef"] {
            if let Some(known) = base["spec"].get(field) {
                object["spec"][field] = known.clone();
            }
        }
    }

    fn service_account(&self) -> Value {
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": self.metadata()})
    }

    fn service(&self) -> Value {
        let mut metadata = self.metadata();
        if metadata["annotations"].get(TRAFFIC_DISTRIBUTION).is_none() {
            metadata["annotations"][TRAFFIC_DISTRIBUTION] = "PreferClose".into();
        }
        let port = |name: &str, number: u16, protocol: &str| {
            json!({"name": name, "port": number, "targetPort": number,
                "protocol": "TCP", "appProtocol": protocol})
        };
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "type": self.gateway.service_type.as_deref().unwrap_or("ClusterIP"),
                "ipFamilyPolicy": "PreferDualStack",
                "ports": [
                    port("status-port", STATUS_PORT, "tcp"),
                    port("mesh", HBONE_PORT, "all"),
                ],
                "selector": self.selector(),
            },
        })
    }

    fn selector(&self) -> Value {
        json!({GATEWAY_NAME: self.gateway.name})
    }

    /// Without `replicas`: how many there are is for a person or an autoscaler to say.
    fn deployment(&self) -> Value {
        let mut labels = to_map(&self.gateway.labels);
        labels.extend(self.identity());
        for (key, value) in [
            ("istio.io/dataplane-mode", "none"),
            ("sidecar.istio.io/inject", "false"),
            (
                "service.istio.io/canonical-name",
                self.gateway.name.as_str(),
            ),
            ("service.istio.io/canonical-revision", "latest"),
        ] {
            labels.insert(key.into(), value.into());
        }
        let mut annotations = Map::new();
        for (key, value) in [
            ("prometheus.io/path", "/stats/prometheus"),
            ("prometheus.io/port", "15020"),
            ("prometheus.io/scrape", "true"),
        ] {
            annotations.insert(key.into(), value.into());
        }
        annotations.extend(to_map(&self.gateway.annotations));
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self.metadata(),
            "spec": {
                "selector": {"matchLabels": self.selector()},
                // A pod goes when another has taken its place.
                "strategy": {"rollingUpdate": {"maxSurge": "25%", "maxUnavailable": 0}},
                "template": {
                    "metadata": {"labels": labels, "annotations": annotations},
                    "spec": self.pod(),
                },
            },
        })
    }

    fn pod(&self) -> Value {
        let settings = self.settings;
        let defaults = &settings.defaults;
        let mut pod = json!({
            "serviceAccountName": self.account(),
            // The projected token is all it needs.
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [self.container()],
            "volumes": [
                {
                    "name": "istio-token",
                    "projected": {"sources": [{"serviceAccountToken": {
                        "audience": "istio-ca",
                        "expirationSeconds": TOKEN_SECONDS,
                        "path": "istio-token",
                    }}]},
                },
                {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}},
            ],
        });
        let mut set = |field: &str, value: Value| {
            let is_empty = match &value {
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            };
            if !is_empty {
                pod[field] = value;
            }
        };
        let secrets = settings
            .pull_secrets
            .iter()
            .map(|name| json!({ "name": name }));
        set("imagePullSecrets", secrets.collect());
        set("affinity", defaults.affinity.clone().into());
        set("nodeSelector", to_map(&defaults.node_selector).into());
        set("tolerations", defaults.tolerations.clone().into());
        let spread = defaults.topology_spread_constraints.clone();
        set("topologySpreadConstraints", spread.into());
        pod
    }

    fn account(&self) -> &str {
        self.gateway
            .service_account
            .as_deref()
            .unwrap_or(&self.gateway.name)
    }

    fn container(&self) -> Value {
        let settings = self.settings;
        let port = |name: &str, number: u16| json!({"name": name, "containerPort": number, "protocol": "TCP"});
        let ready = json!({"path": "/healthz/ready", "port": STATUS_PORT, "scheme": "HTTP"});
        let mut container = json!({
            "name": "istio-proxy",
            "image": self.gateway.image.as_ref().unwrap_or(&settings.image),
            "imagePullPolicy": settings.pull_policy,
            "env": self.environment(),
            "ports": [
                port("metrics", METRICS_PORT),
                port("status-port", STATUS_PORT),
                port("mesh", HBONE_PORT),
            ],
            "startupProbe": {
                "httpGet": ready,
                "periodSeconds": 1,
                "timeoutSeconds": 1,
                "failureThreshold": START_SECONDS,
            },
            "readinessProbe": {
                "httpGet": ready,
                "periodSeconds": 15,
                "timeoutSeconds": 1,
                "failureThreshold": 4,
            },
            "lifecycle": {"preStop": {"sleep": {"seconds": LINGER_SECONDS}}},
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": {"drop": ["ALL"]},
                "privileged": false,
                "readOnlyRootFilesystem": true,
                "runAsNonRoot": true,
                "runAsUser": USER,
                "runAsGroup": USER,
            },
            "volumeMounts": [
                {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": true},
                {"name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": true},
            ],
        });
        if !settings.defaults.resources.is_empty() {
            container["resources"] = settings.defaults.resources.clone().into();
        }
        container
    }

    /// What `waypoint/src/config.rs` reads.
    fn environment(&self) -> Vec<Value> {
        let settings = self.settings;
        let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
        let value = |name: &str, value: &str| json!({"name": name, "value": value});
        let root = "/var/run/secrets/istio/root-cert.pem";
        let mut all = vec![
            field("POD_NAME", "metadata.name"),
            field("POD_NAMESPACE", "metadata.namespace"),
            field("INSTANCE_IP", "status.podIP"),
            field("NODE_NAME", "spec.nodeName"),
            field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
            value("GATEWAY_NAME", &self.gateway.name),
            value("XDS_ADDRESS", &settings.control_plane),
            value("CA_ADDRESS", &settings.control_plane),
            value("XDS_ROOT_CA", root),
            value("CA_ROOT_CA", root),
            value("AUTH_TOKEN", "/var/run/secrets/tokens/istio-token"),
            value("TRUST_DOMAIN", &settings.trust_domain),
            value("CLUSTER_DOMAIN", &settings.cluster_domain),
            value("ISTIO_META_CLUSTER_ID", &settings.cluster_id),
            // The pause before SIGTERM counts.
            value(
                "TERMINATION_GRACE_PERIOD_SECONDS",
                &(GRACE_SECONDS - LINGER_SECONDS).to_string(),
            ),
        ];
        if !settings.network.is_empty() {
            all.push(value("NETWORK", &settings.network));
        }
        if let Some(level) = &self.gateway.log_level {
            all.push(value("RUST_LOG", level));
        }
        all
    }

    fn autoscaler(&self) -> Value {
        json!({
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": self.metadata(),
            "spec": {"scaleTargetRef":
                {"apiVersion": "apps/v1", "kind": "Deployment", "name": self.gateway.name}},
        })
    }

    fn disruption_budget(&self) -> Value {
        json!({
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": self.metadata(),
            "spec": {"selector": {"matchLabels": self.selector()}},
        })
    }
}

fn to_map(of: &BTreeMap<String, String>) -> Map<String, Value> {
    of.iter()
        .map(|(key, value)| (key.clone(), value.as_str().into()))
        .collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
    use k8s_openapi::api::core::v1::{Service, ServiceAccount};
    use k8s_openapi::api::policy::v1::PodDisruptionBudget;
    use serde::de::DeserializeOwned;

    use super::*;
    use crate::provision::settings::tests::settings;

    fn gateway() -> WaypointGateway {
        WaypointGateway {
            name: "waypoint".into(),
            namespace: "shop".into(),
            uid: "u1".into(),
            api_version: "gateway.networking.k8s.io/v1".into(),
            class: "istio-waypoint".into(),
            labels: BTreeMap::from([
                ("team".into(), "a".into()),
                (GATEWAY_NAME.into(), "other".into()),
            ]),
            annotations: BTreeMap::from([("note".into(), "b".into())]),
            parameters: None,
            service_account: None,
            service_type: None,
            image: None,
            log_level: None,
        }
    }

    fn overlay(text: &str) -> Overlay {
        let data: BTreeMap<String, String> = serde_yaml_ng::from_str(text).expect("YAML");
        Overlay::read(&data).expect("an overlay")
    }

    /// The API server knows every field: whatever the typed object has not taken up is lost.
    fn typed<T: DeserializeOwned + serde::Serialize>(value: &Value) -> T {
        let typed: T = serde_json::from_value(value.clone()).expect("typed");
        assert_eq!(&serde_json::to_value(&typed).expect("JSON"), value);
        typed
    }

    #[test]
    fn the_objects_are_as_written_down() {
        let overlays = [overlay(
            "horizontalPodAutoscaler: '{spec: {minReplicas: 2, maxReplicas: 5}}'\n\
             podDisruptionBudget: '{spec: {minAvailable: 1}}'",
        )];
        let made = generate(&gateway(), &settings(), &overlays).expect("generates");
        let mut text = String::new();
        for object in [
            made.service_account.as_ref(),
            Some(&made.service),
            Some(&made.deployment),
            made.autoscaler.as_ref(),
            made.disruption_budget.as_ref(),
        ] {
            let object = object.expect("made");
            text.push_str("---\n");
            text.push_str(&serde_yaml_ng::to_string(object).expect("YAML"));
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/waypoint.golden.yaml");
        if std::env::var_os("ADIT_UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &text).expect("written");
        }
        let golden = std::fs::read_to_string(path).expect("the golden file");
        assert_eq!(text, golden, "ADIT_UPDATE_GOLDEN=1 writes it anew");
        typed::<ServiceAccount>(made.service_account.as_ref().expect("made"));
        typed::<Service>(&made.service);
        typed::<Deployment>(&made.deployment);
        typed::<HorizontalPodAutoscaler>(made.autoscaler.as_ref().expect("made"));
        typed::<PodDisruptionBudget>(made.disruption_budget.as_ref().expect("made"));
    }

    #[test]
    fn an_overlay_changes_what_it_may() {
        let overlays = [
            overlay(
                "deployment: |\n  metadata: {name: stolen, labels: {gateway.istio.io/managed: me, more: x}}\n  \
                 spec:\n    replicas: 3\n    selector: {matchLabels: {a: b}}\n    template:\n      \
                 metadata: {labels: {gateway.networking.k8s.io/gateway-name: other}}\n      \
                 spec:\n        containers:\n        - name: istio-proxy\n          resources: {limits: {cpu: '2'}}\n          \
                 env: [{name: NODE_NAME, value: fixed}, {name: MORE, value: y}]\n",
            ),
            overlay("deployment: '{spec: {replicas: 4}}'"),
        ];
        let made = generate(&gateway(), &settings(), &overlays).expect("generates");
        let deployment: Deployment = typed(&made.deployment);
        assert_eq!(deployment.metadata.name.as_deref(), Some("waypoint"));
        let labels = deployment.metadata.labels.expect("labels");
        assert_eq!(
            (labels[MANAGED].as_str(), labels["more"].as_str()),
            (MESH_CONTROLLER, "x")
        );
        let spec = deployment.spec.expect("a spec");
        assert_eq!(spec.replicas, Some(4));
        let selected = spec.selector.match_labels.expect("labels");
        let template = spec
            .template
            .metadata
            .and_then(|of| of.labels)
            .expect("labels");
        assert_eq!(
            selected,
            BTreeMap::from([(GATEWAY_NAME.into(), "waypoint".into())])
        );
        assert_eq!(template[GATEWAY_NAME], "waypoint");
        let containers = spec.template.spec.expect("a spec").containers;
        assert_eq!(containers.len(), 1);
        let env = containers[0].env.as_ref().expect("env");
        let node = env
            .iter()
            .find(|of| of.name == "NODE_NAME")
            .expect("NODE_NAME");
        assert_eq!(
            (node.value.as_deref(), &node.value_from),
            (Some("fixed"), &None)
        );
        assert!(env.iter().any(|of| of.name == "MORE"));
        assert!(env.iter().any(|of| of.name == "GATEWAY_NAME"));
        assert!(made.autoscaler.is_none() && made.disruption_budget.is_none());
    }

    /// What is put back has a place, whatever the overlays are; those that leave none are named.
    #[test]
    fn an_overlay_of_another_form_is_refused() {
        let fields = [
            "deployment",
            "service",
            "serviceAccount",
            "horizontalPodAutoscaler",
            "podDisruptionBudget",
        ];
        let places = ["spec", "metadata", "metadata: {labels", "spec: {template"];
        let forms = ["5", "[]", "[{name: x}]", "text", "true", "null", "{}"];
        for (field, place, form) in fields
            .iter()
            .flat_map(|field| places.map(|place| (field, place)))
            .flat_map(|(field, place)| forms.map(|form| (field, place, form)))
        {
            let end = if place.contains('{') { "}" } else { "" };
            let text = format!("{field}: '{place}: {form}{end}'");
            let direct = generate(&gateway(), &settings(), &[overlay(&text)]);
            let removed = overlay(&format!("{field}: '{{spec: null, metadata: null}}'"));
            let later = generate(&gateway(), &settings(), &[removed, overlay(&text)]);
            match form {
                "null" | "{}" => assert!(direct.is_ok() && later.is_ok(), "{text}"),
                _ if place == "spec" && *field != "serviceAccount" => {
                    let direct = direct.expect_err(&text).to_string();
                    assert!(direct.starts_with(&format!("{field}.spec: ")), "{direct}");
                    assert!(later.is_err(), "{text}");
                }
                // No panic.
                _ => {}
            }
        }
    }

    #[test]
    fn annotations_of_the_gateway_choose_account_type_and_image() {
        let gateway = WaypointGateway {
            service_account: Some("own".into()),
            service_type: Some("LoadBalancer".into()),
            image: Some("registry/waypoint:next".into()),
            ..gateway()
        };
        let made = generate(&gateway, &settings(), &[]).expect("generates");
        assert!(made.service_account.is_none());
        assert_eq!(made.service["spec"]["type"], "LoadBalancer");
        let pod = &made.deployment["spec"]["template"]["spec"];
        assert_eq!(pod["serviceAccountName"], "own");
        assert_eq!(pod["containers"][0]["image"], "registry/waypoint:next");
    }
}
