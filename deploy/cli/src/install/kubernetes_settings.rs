//! `components.X.k8s` of an IstioOperator: what Istio's operator does to the objects of a
//! component after its chart was rendered.
//!
//! Each setting is a strategic merge patch of one object, and `overlays` come after them.

use std::collections::BTreeMap;

use adit_controlplane::provision::merge;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::object::Object;
use super::overlay::Overlay;
use super::schema::nearest;
use super::spec::SpecError;
use super::state::KEPT_LABELS;

/// Istio's `KubernetesResourcesSpec`.
const SETTINGS: [&str; 19] = [
    "affinity",
    "env",
    "hpaSpec",
    "imagePullPolicy",
    "nodeSelector",
    "overlays",
    "podAnnotations",
    "podDisruptionBudget",
    "priorityClassName",
    "readinessProbe",
    "replicaCount",
    "resources",
    "securityContext",
    "service",
    "serviceAnnotations",
    "strategy",
    "tolerations",
    "volumeMounts",
    "volumes",
];

/// What `components.X.k8s` asks for.
#[derive(Debug, Clone, Default)]
pub struct KubernetesSettings {
    settings: Vec<Setting>,
    overlays: Vec<PlacedOverlay>,
}

#[derive(Debug, Clone)]
struct Setting {
    /// What errors begin with: file and field.
    at: String,
    key: &'static str,
    value: Value,
}

#[derive(Debug, Clone)]
struct PlacedOverlay {
    /// What errors begin with: file and entry.
    at: String,
    overlay: Overlay,
}

impl KubernetesSettings {
    /// Reads `components.X.k8s`, which stands at `path`. `origins`: which file gave a path.
    ///
    /// # Errors
    /// [`SpecError::Field`] names what is not known and what cannot be read.
    pub fn read(
        k8s: &Value,
        path: &str,
        origins: &BTreeMap<String, String>,
    ) -> Result<Self, SpecError> {
        let mut read = Self::default();
        for (key, value) in k8s.as_object().into_iter().flatten() {
            let path = format!("{path}.{key}");
            let at = match origins.get(&path) {
                Some(origin) => format!("{origin}: {path}"),
                None => path,
            };
            let Some(known) = SETTINGS.into_iter().find(|known| known == key) else {
                let hint = match nearest(key, SETTINGS.into_iter()) {
                    Some(near) => format!("; did you mean {near}?"),
                    None => String::new(),
                };
                return Err(SpecError::Field(format!("{at} is not known{hint}")));
            };
            match (known, value) {
                (_, Value::Null) => {}
                ("overlays", Value::Array(entries)) => {
                    for (index, entry) in entries.iter().enumerate() {
                        let at = format!("{at}[{index}]");
                        let overlay = Overlay::read(entry)
                            .map_err(|reason| SpecError::Field(format!("{at}{reason}")))?;
                        read.overlays.push(PlacedOverlay { at, overlay });
                    }
                }
                ("overlays", _) => {
                    return Err(SpecError::Field(format!("{at}: is no list of overlays")));
                }
                (key, value) => read.settings.push(Setting {
                    at,
                    key,
                    value: value.clone(),
                }),
            }
        }
        Ok(read)
    }

    /// Changes what the component's chart rendered.
    ///
    /// # Errors
    /// [`SpecError::Field`] names file, field, object and path of what does not fit.
    pub fn apply(&self, objects: &mut [Object]) -> Result<(), SpecError> {
        for Setting { at, key, value } in &self.settings {
            let error = |reason: String| SpecError::Field(format!("{at}: {reason}"));
            // The autoscaler's number is not written over; Istio's charts leave it out too.
            if *key == "replicaCount" && find(objects, &["HorizontalPodAutoscaler"]).is_some() {
                continue;
            }
            let kinds = kinds_of(key);
            let Some(index) = find(objects, kinds) else {
                return Err(error(absent(key, kinds)));
            };
            let object = &mut objects[index];
            let patch = patch(key, value, object).map_err(error)?;
            let name = format!("{} {}", object.id.kind, object.id.name);
            merge(&mut object.manifest, &patch)
                .map_err(|misfit| error(misfit.of(&name).to_string()))?;
            check(object).map_err(error)?;
        }
        for PlacedOverlay { at, overlay } in &self.overlays {
            let Overlay { kind, name, .. } = overlay;
            let error =
                |reason: String| SpecError::Field(format!("{at} ({kind} {name}): {reason}"));
            let is_meant =
                |object: &&mut Object| object.id.kind == *kind && object.id.name == *name;
            let mut meant = objects.iter_mut().filter(is_meant).peekable();
            if meant.peek().is_none() {
                drop(meant);
                return Err(error(format!(
                    "the component has no such object; it has {}",
                    objects_like(objects, kind)
                )));
            }
            for object in meant {
                let labels = object.manifest["metadata"]["labels"].clone();
                overlay.apply(&mut object.manifest).map_err(error)?;
                keep_identity(object, &labels).map_err(error)?;
                check(object).map_err(error)?;
            }
        }
        Ok(())
    }
}

/// The kinds that a setting can be of.
fn kinds_of(key: &str) -> &'static [&'static str] {
    match key {
        "hpaSpec" => &["HorizontalPodAutoscaler"],
        "podDisruptionBudget" => &["PodDisruptionBudget"],
        "service" | "serviceAnnotations" => &["Service"],
        "replicaCount" => &["Deployment"],
        _ => &["Deployment", "DaemonSet"],
    }
}

fn find(objects: &[Object], kinds: &[&str]) -> Option<usize> {
    let is_one = |object: &Object| kinds.contains(&object.id.kind.as_str());
    objects.iter().position(is_one)
}

fn absent(key: &str, kinds: &[&str]) -> String {
    let kinds = kinds.join(" or ");
    let hint = match key {
        "hpaSpec" => "; values.pilot.autoscaleEnabled makes that of the control plane",
        "podDisruptionBudget" => {
            "; values.global.defaultPodDisruptionBudget.enabled makes that of the control plane"
        }
        "replicaCount" => "; a DaemonSet has one pod on each node",
        _ => "",
    };
    format!("the component has no {kinds}{hint}")
}

/// The strategic merge patch of one setting.
fn patch(key: &str, value: &Value, object: &Object) -> Result<Value, String> {
    let container = |field: &str, value: &Value| {
        // Charts render one container, which is the component's.
        let containers = &object.manifest["spec"]["template"]["spec"]["containers"];
        json!([{"name": containers[0]["name"], field: value}])
    };
    let pod = |spec: Value| json!({"spec": {"template": {"spec": spec}}});
    Ok(match key {
        "env" | "imagePullPolicy" | "readinessProbe" | "resources" | "volumeMounts" => {
            pod(json!({"containers": container(key, value)}))
        }
        "podAnnotations" => {
            json!({"spec": {"template": {"metadata": {"annotations": value}}}})
        }
        "strategy" => {
            let field = match object.id.kind.as_str() {
                "DaemonSet" => "updateStrategy",
                _ => "strategy",
            };
            let mut strategy = value.clone();
            // Bounds of a rolling update mean something to one only.
            if let Some(map) = strategy.as_object_mut()
                && map.get("type").is_some_and(|kind| kind != "RollingUpdate")
            {
                map.insert("$patch".into(), "replace".into());
            }
            json!({"spec": {field: strategy}})
        }
        "replicaCount" => json!({"spec": {"replicas": value}}),
        "hpaSpec" | "service" => json!({"spec": value}),
        "podDisruptionBudget" => {
            let mut budget = value.clone();
            // Of the two there may be one.
            for (one, other) in [
                ("minAvailable", "maxUnavailable"),
                ("maxUnavailable", "minAvailable"),
            ] {
                if let Some(map) = budget.as_object_mut()
                    && map.get(one).is_some_and(|given| !given.is_null())
                    && !map.contains_key(other)
                {
                    map.insert(other.into(), Value::Null);
                }
            }
            json!({"spec": budget})
        }
        "serviceAnnotations" => json!({"metadata": {"annotations": value}}),
        field => pod(json!({field: value})),
    })
}

/// What the object is found by stays as it was: its kind and name, and the labels by which
/// `adit uninstall` knows what is its own.
fn keep_identity(object: &mut Object, before: &Value) -> Result<(), String> {
    let changed = Object::new(object.manifest.clone());
    if changed.map(|of| of.id).as_ref() != Ok(&object.id) {
        return Err(
            "apiVersion, kind, name and namespace cannot be changed: what belongs to it finds it by them"
                .into(),
        );
    }
    let labels = &mut object.manifest["metadata"]["labels"];
    if labels.is_null() {
        *labels = json!({});
    }
    let Some(labels) = labels.as_object_mut() else {
        return Err("metadata.labels is no map any more".into());
    };
    for key in KEPT_LABELS {
        if let Some(value) = before.get(key) {
            labels.insert(key.to_owned(), value.clone());
        }
    }
    Ok(())
}

/// Whether the API server could read it. That it has no unknown fields, the API server says.
fn check(object: &Object) -> Result<(), String> {
    fn read<T: DeserializeOwned>(manifest: &Value) -> Result<(), String> {
        let read = serde_json::from_value::<T>(manifest.clone());
        read.map(|_| ()).map_err(|error| error.to_string())
    }
    let manifest = &object.manifest;
    let read = match object.id.kind.as_str() {
        "Deployment" => read::<Deployment>(manifest),
        "DaemonSet" => read::<DaemonSet>(manifest),
        "Service" => read::<Service>(manifest),
        "HorizontalPodAutoscaler" => read::<HorizontalPodAutoscaler>(manifest),
        "PodDisruptionBudget" => read::<PodDisruptionBudget>(manifest),
        _ => Ok(()),
    };
    read.map_err(|reason| format!("{} would be none any more: {reason}", object.id))
}

/// What there is in place of what was named: of its kind, or else everything but definitions.
fn objects_like(objects: &[Object], kind: &str) -> String {
    let of = |wanted: &dyn Fn(&Object) -> bool| {
        let found = objects.iter().filter(|object| wanted(object));
        let found: Vec<_> = found
            .map(|object| format!("{} {}", object.id.kind, object.id.name))
            .collect();
        found.join(", ")
    };
    let same = of(&|object| object.id.kind == kind);
    let all = || of(&|object| object.id.kind != "CustomResourceDefinition");
    match (same.is_empty(), all()) {
        (false, _) => same,
        (true, all) if all.is_empty() => "none that could be meant".into(),
        (true, all) => all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::spec::Spec;

    fn operator(k8s: &str, component: &str, more: &str) -> String {
        format!(
            "kind: IstioOperator\nspec: {{profile: ambient, components: {{{component}: {{k8s: {k8s}}}}}{more}}}"
        )
    }

    /// What a file makes of everything.
    fn render(text: &str) -> Result<Vec<Object>, String> {
        let mut spec = Spec::default();
        let added = spec.add_file("operator.yaml", text);
        added.map_err(|error| error.to_string())?;
        let objects = crate::install::objects(&spec).map_err(|error| error.to_string())?;
        Ok(objects
            .into_iter()
            .flat_map(|(_, objects)| objects)
            .collect())
    }

    fn one<'a>(objects: &'a [Object], kind: &str, name: &str) -> &'a Value {
        let found = objects
            .iter()
            .find(|o| o.id.kind == kind && o.id.name == name);
        &found.unwrap_or_else(|| panic!("{kind} {name}")).manifest
    }

    /// Every setting that Istio has, of each component that can have it.
    #[test]
    fn settings_reach_their_objects() {
        const POD: &str = "/spec/template/spec";
        const CONTAINER: &str = "/spec/template/spec/containers/0";
        let cases = [
            (
                "affinity: {podAffinity: {}}",
                format!("{POD}/affinity/podAffinity"),
                json!({}),
            ),
            (
                "imagePullPolicy: Always",
                format!("{CONTAINER}/imagePullPolicy"),
                json!("Always"),
            ),
            (
                "nodeSelector: {disk: fast}",
                format!("{POD}/nodeSelector/disk"),
                json!("fast"),
            ),
            (
                "podAnnotations: {a: b}",
                "/spec/template/metadata/annotations/a".into(),
                json!("b"),
            ),
            (
                "priorityClassName: high",
                format!("{POD}/priorityClassName"),
                json!("high"),
            ),
            (
                "readinessProbe: {periodSeconds: 9}",
                format!("{CONTAINER}/readinessProbe/periodSeconds"),
                json!(9),
            ),
            (
                "resources: {limits: {memory: 1Gi}}",
                format!("{CONTAINER}/resources/limits/memory"),
                json!("1Gi"),
            ),
            (
                "securityContext: {fsGroup: 7}",
                format!("{POD}/securityContext/fsGroup"),
                json!(7),
            ),
            (
                "tolerations: [{key: a}]",
                format!("{POD}/tolerations"),
                json!([{"key": "a"}]),
            ),
        ];
        let workloads = [
            ("pilot", "Deployment", "istiod"),
            ("cni", "DaemonSet", "istio-cni-node"),
            ("ztunnel", "DaemonSet", "ztunnel"),
        ];
        for (component, kind, name) in workloads {
            for (setting, place, expected) in &cases {
                let text = operator(&format!("{{{setting}}}"), component, "");
                let objects = render(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
                let found = one(&objects, kind, name).pointer(place);
                assert_eq!(found, Some(expected), "{text}");
            }
            // Lists are merged by their items' names.
            let text = "{env: [{name: NODE_NAME, value: fixed}, {name: SECRET, valueFrom: {secretKeyRef: {name: s, key: k}}}], volumes: [{name: extra, emptyDir: {}}], volumeMounts: [{name: extra, mountPath: /extra}]}";
            let objects = render(&operator(text, component, "")).expect("renders");
            let workload = one(&objects, kind, name);
            let items = |place: &str, name: &str| {
                let list = workload.pointer(place).and_then(Value::as_array);
                let list = list.expect("a list").iter().filter(|of| of["name"] == name);
                list.cloned().collect::<Vec<_>>()
            };
            let env = format!("{CONTAINER}/env");
            assert_eq!(
                items(&env, "NODE_NAME"),
                [json!({"name": "NODE_NAME", "value": "fixed"})]
            );
            assert_eq!(items(&env, "SECRET").len(), 1);
            assert_eq!(items(&env, "RUST_LOG").len(), 1, "what was there stays");
            assert_eq!(items(&format!("{POD}/volumes"), "extra").len(), 1);
            assert_eq!(
                items(&format!("{CONTAINER}/volumeMounts"), "extra").len(),
                1
            );
        }

        let text = "{hpaSpec: {minReplicas: 2, maxReplicas: 9, metrics: [{type: Resource, resource: {name: memory, target: {type: Utilization, averageUtilization: 50}}}]}, podDisruptionBudget: {minAvailable: 1}, service: {type: NodePort}, serviceAnnotations: {cloud: x}, strategy: {rollingUpdate: {maxSurge: 1}}, replicaCount: 5}";
        let objects = render(&operator(text, "pilot", "")).expect("renders");
        let scaler = &one(&objects, "HorizontalPodAutoscaler", "istiod")["spec"];
        assert_eq!(
            (&scaler["minReplicas"], &scaler["maxReplicas"]),
            (&json!(2), &json!(9))
        );
        assert_eq!(scaler["metrics"].as_array().map(Vec::len), Some(1));
        assert_eq!(scaler["scaleTargetRef"]["name"], "istiod");
        let budget = &one(&objects, "PodDisruptionBudget", "istiod")["spec"];
        assert_eq!(
            (&budget["minAvailable"], &budget["maxUnavailable"]),
            (&json!(1), &Value::Null)
        );
        let service = one(&objects, "Service", "istiod");
        assert_eq!(service["spec"]["type"], "NodePort");
        assert_eq!(service["metadata"]["annotations"]["cloud"], "x");
        let deployment = &one(&objects, "Deployment", "istiod")["spec"];
        let rolling = json!({"maxSurge": 1, "maxUnavailable": "25%"});
        assert_eq!(deployment["strategy"]["rollingUpdate"], rolling);
        assert_eq!(deployment["replicas"], Value::Null, "the autoscaler's");

        let fixed = ", values: {pilot: {autoscaleEnabled: false}}";
        let text = "{replicaCount: 5, strategy: {type: Recreate}}";
        let objects = render(&operator(text, "pilot", fixed)).expect("renders");
        let deployment = &one(&objects, "Deployment", "istiod")["spec"];
        assert_eq!(deployment["replicas"], 5);
        assert_eq!(deployment["strategy"], json!({"type": "Recreate"}));
        let text = operator("{strategy: {type: OnDelete}}", "ztunnel", "");
        let objects = render(&text).expect("renders");
        let tunnel = &one(&objects, "DaemonSet", "ztunnel")["spec"];
        assert_eq!(tunnel["updateStrategy"], json!({"type": "OnDelete"}));
    }

    #[test]
    fn what_does_not_fit_is_told_with_file_component_object_and_path() {
        for (component, k8s, expected) in [
            (
                "pilot",
                "{resource: 2}",
                "components.pilot.k8s.resource is not known; did you mean resources?",
            ),
            (
                "ztunnel",
                "{replicaCount: 2}",
                "components.ztunnel.k8s.replicaCount: the component has no Deployment; a DaemonSet has one pod on each node",
            ),
            (
                "cni",
                "{serviceAnnotations: {a: b}}",
                "components.cni.k8s.serviceAnnotations: the component has no Service",
            ),
            (
                "base",
                "{resources: {}}",
                "components.base.k8s.resources: the component has no Deployment or DaemonSet",
            ),
            (
                "pilot",
                "{resources: 5}",
                "components.pilot.k8s.resources: Deployment istiod.spec.template.spec.containers.0.resources: is an object, so it needs a map",
            ),
            (
                "pilot",
                "{tolerations: 5}",
                "components.pilot.k8s.tolerations: Deployment istio-system/istiod would be none any more: invalid type: integer `5`, expected",
            ),
            (
                "pilot",
                "{overlays: [{kind: Deployment, name: istoid, patches: [{path: a, value: 1}]}]}",
                "components.pilot.k8s.overlays[0] (Deployment istoid): the component has no such object; it has Deployment istiod",
            ),
            (
                "ztunnel",
                "{overlays: [{kind: Service, name: x, patches: [{path: a, value: 1}]}]}",
                "components.ztunnel.k8s.overlays[0] (Service x): the component has no such object; it has ServiceAccount ztunnel, DaemonSet ztunnel",
            ),
            (
                "pilot",
                "{overlays: [{kind: Service, name: istiod, patches: [{path: 'spec.ports.[name:http].port', value: 1}]}]}",
                "components.pilot.k8s.overlays[0] (Service istiod): path spec.ports.[name:http].port: spec.ports has no [name:http], but https-dns, https-webhook, http-monitoring",
            ),
            (
                "pilot",
                "{overlays: [{kind: Service, name: istiod, patches: [{path: metadata.name, value: x}]}]}",
                "components.pilot.k8s.overlays[0] (Service istiod): apiVersion, kind, name and namespace cannot be changed",
            ),
            (
                "pilot",
                "{overlays: [{kind: Service, name: istiod, patches: [{path: spec.ports, value: {a: b}}, {path: spec.selector, value: 5}]}]}",
                "components.pilot.k8s.overlays[0] (Service istiod): Service istio-system/istiod would be none any more",
            ),
            (
                "pilot",
                "{overlays: [{kind: Service, patches: []}]}",
                "components.pilot.k8s.overlays[0].name: is missing",
            ),
        ] {
            let error = render(&operator(k8s, component, "")).expect_err(k8s);
            let expected = format!("operator.yaml: {expected}");
            assert!(error.starts_with(&expected), "{k8s}: {error}");
        }
    }

    /// What `adit uninstall` finds its objects by cannot be laid off.
    #[test]
    fn an_overlay_keeps_the_labels_of_the_installation() {
        let text = "{overlays: [{apiVersion: policy/v1beta1, kind: PodDisruptionBudget, name: istiod, patches: [{path: metadata.labels}]}]}";
        let objects = render(&operator(text, "pilot", "")).expect("renders");
        let labels = &one(&objects, "PodDisruptionBudget", "istiod")["metadata"]["labels"];
        assert_eq!(
            *labels,
            json!({
                "app.kubernetes.io/managed-by": "adit",
                "app.kubernetes.io/part-of": "istio",
                "istio.io/rev": "default",
            })
        );
    }
}
