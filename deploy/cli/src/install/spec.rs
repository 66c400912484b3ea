//! What the user asks for: profile, IstioOperator files and `--set`, as one tree, and from it
//! the values of every chart.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::charts::Chart;
use super::kubernetes_settings::KubernetesSettings;
use super::schema;
use super::template::merge;

/// Names of profiles, and the components that each installs.
pub const PROFILES: [(&str, &[Component]); 5] = [
    ("ambient", &Component::ALL),
    ("default", &Component::ALL),
    ("demo", &Component::ALL),
    ("minimal", &[Component::Base, Component::Pilot]),
    ("empty", &[]),
];
/// The profile of those who name none.
pub const DEFAULT_PROFILE: &str = "ambient";

/// Fields of `IstioOperator.spec`.
const SPEC_FIELDS: [&str; 8] = [
    "profile",
    "hub",
    "tag",
    "namespace",
    "revision",
    "meshConfig",
    "components",
    "values",
];
/// What may stand in `spec.values`; `--set` and values files may name these without `values.`.
const VALUE_ROOTS: [&str; 8] = [
    "global",
    "base",
    "pilot",
    "cni",
    "ztunnel",
    "defaultRevision",
    "platform",
    "sidecarInjectorWebhook",
];

/// A part of the mesh, under Istio's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    /// Custom resource definitions.
    Base,
    /// The control plane.
    Pilot,
    /// The node agent.
    Cni,
    /// The node tunnel.
    Ztunnel,
}

impl Component {
    /// In the order of their installation.
    pub const ALL: [Self; 4] = [Self::Base, Self::Pilot, Self::Cni, Self::Ztunnel];

    /// Its name in `spec.components` and `spec.values`.
    pub fn key(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Pilot => "pilot",
            Self::Cni => "cni",
            Self::Ztunnel => "ztunnel",
        }
    }

    /// What it is called in progress lines.
    pub fn title(self) -> &'static str {
        match self {
            Self::Base => "Resource definitions",
            Self::Pilot => "Control plane",
            Self::Cni => "Node agent",
            Self::Ztunnel => "Node tunnel",
        }
    }

    /// Its chart.
    pub fn chart(self) -> Chart {
        match self {
            Self::Base => Chart::Base,
            Self::Pilot => Chart::Istiod,
            Self::Cni => Chart::Cni,
            Self::Ztunnel => Chart::Ztunnel,
        }
    }
}

/// What is wrong with what was asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// `--set` without a value, or with a path that cannot be one.
    #[error("--set {0}: PATH=VALUE is expected, as values.global.hub=registry.example/adit")]
    Set(String),
    /// A document that is none of ours.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// A field or value that is not known or cannot be taken.
    #[error("{0}")]
    Field(String),
}

/// `IstioOperator.spec`: what the user gave, merged.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    tree: Value,
    /// Where paths of `components.X.k8s` come from: a file, or `--set`.
    origins: BTreeMap<String, String>,
}

impl Default for Spec {
    fn default() -> Self {
        Self::from_value(json!({}))
    }
}

/// A component that is to be installed.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Which.
    pub component: Component,
    /// Where to.
    pub namespace: String,
    /// Values of its chart.
    pub values: Value,
    /// What changes in the objects that the chart renders.
    pub kubernetes: KubernetesSettings,
}

impl Spec {
    /// One that was kept in the cluster.
    pub fn from_value(tree: Value) -> Self {
        let origins = BTreeMap::new();
        Self { tree, origins }
    }

    /// To be kept.
    pub fn value(&self) -> &Value {
        &self.tree
    }

    /// Lays a file over it: `IstioOperator` documents, or values as for Helm's umbrella.
    ///
    /// # Errors
    /// [`SpecError`].
    pub fn add_file(&mut self, file: &str, text: &str) -> Result<(), SpecError> {
        let error = |reason: String| SpecError::File {
            file: file.to_owned(),
            reason,
        };
        for document in serde_yaml_ng::Deserializer::from_str(text) {
            let document: Value = serde::Deserialize::deserialize(document)
                .map_err(|reason: serde_yaml_ng::Error| error(reason.to_string()))?;
            let tree = match (&document["kind"], &document) {
                (_, Value::Null) => continue,
                (Value::String(kind), _) if kind == "IstioOperator" => document["spec"].clone(),
                (Value::String(kind), _) => {
                    return Err(error(format!(
                        "is a {kind}, and no IstioOperator or values file"
                    )));
                }
                (_, Value::Object(_)) => document,
                _ => return Err(error("is no map".into())),
            };
            for (key, value) in tree.as_object().into_iter().flatten() {
                let path = rooted(vec![key.clone()]).map_err(|reason| error(reason.to_string()))?;
                let tree = below(&path, value.clone());
                self.note(&tree, file);
                merge(&mut self.tree, &tree);
            }
        }
        Ok(())
    }

    /// `--set PATH=VALUE`.
    ///
    /// # Errors
    /// [`SpecError`].
    pub fn set(&mut self, assignment: &str) -> Result<(), SpecError> {
        let wrong = || SpecError::Set(assignment.to_owned());
        let (path, value) = assignment.split_once('=').ok_or_else(wrong)?;
        let path = segments(path);
        if path.iter().any(String::is_empty) {
            return Err(wrong());
        }
        let (path, value) = (rooted(path)?, scalar(value));
        match path.iter().position(|step| place(step).is_some()) {
            None => {
                self.note(&below(&path, value.clone()), "--set");
                self.lay(&path, value);
            }
            Some(list) => {
                self.note(&below(&path[..list], Value::Null), "--set");
                put(&mut self.tree, &path, value)
                    .map_err(|reason| SpecError::Field(format!("--set {assignment}: {reason}")))?;
            }
        }
        Ok(())
    }

    /// A field, over what is there.
    pub fn lay(&mut self, path: &[String], value: Value) {
        merge(&mut self.tree, &below(path, value));
    }

    /// Remembers where settings come from.
    fn note(&mut self, tree: &Value, origin: &str) {
        for (component, own) in tree["components"].as_object().into_iter().flatten() {
            for key in own["k8s"].as_object().into_iter().flatten() {
                let path = format!("components.{component}.k8s.{}", key.0);
                self.origins.insert(path, origin.to_owned());
            }
        }
    }

    /// The profile's name.
    pub fn profile(&self) -> &str {
        let named = self.tree["profile"]
            .as_str()
            .filter(|name| !name.is_empty());
        named.unwrap_or(DEFAULT_PROFILE)
    }

    /// Where the control plane is.
    pub fn namespace(&self) -> &str {
        self.tree["namespace"]
            .as_str()
            .or(self.tree["values"]["global"]["istioNamespace"].as_str())
            .unwrap_or("istio-system")
    }

    /// The revision; empty: the only control plane.
    pub fn revision(&self) -> &str {
        let own = self.tree["revision"].as_str();
        own.unwrap_or_default()
    }

    /// What is to be installed, with what values.
    ///
    /// # Errors
    /// [`SpecError::Field`] names what is not known.
    pub fn plan(&self) -> Result<Vec<Planned>, SpecError> {
        let profile = self.profile();
        let known = PROFILES.iter().find(|(name, _)| *name == profile);
        let Some((_, default_components)) = known else {
            let names: Vec<_> = PROFILES.iter().map(|(name, _)| *name).collect();
            let names = names.join(", ");
            return Err(SpecError::Field(format!(
                "profile {profile} is none of {names}"
            )));
        };
        known_keys(&self.tree, &SPEC_FIELDS, "")?;
        known_keys(&self.tree["values"], &VALUE_ROOTS_WITH_MESH, "values")?;
        let components = &self.tree["components"];
        let names = [
            "base",
            "pilot",
            "cni",
            "ztunnel",
            "ingressGateways",
            "egressGateways",
        ];
        known_keys(components, &names, "components")?;
        for key in ["ingressGateways", "egressGateways"] {
            no_gateways(&components[key], &format!("components.{key}"))?;
        }
        let mut planned = Vec::new();
        for component in Component::ALL {
            let path = format!("components.{}", component.key());
            let own = &components[component.key()];
            known_keys(own, &["enabled", "namespace", "hub", "tag", "k8s"], &path)?;
            let enabled = match &own["enabled"] {
                Value::Null => default_components.contains(&component),
                Value::Bool(enabled) => *enabled,
                other => {
                    return Err(SpecError::Field(format!(
                        "{path}.enabled: {other} is not true or false"
                    )));
                }
            };
            if enabled {
                let namespace = own["namespace"].as_str().unwrap_or(self.namespace());
                let path = format!("{path}.k8s");
                planned.push(Planned {
                    component,
                    namespace: namespace.to_owned(),
                    values: self.values_of(component)?,
                    kubernetes: KubernetesSettings::read(&own["k8s"], &path, &self.origins)?,
                });
            }
        }
        Ok(planned)
    }

    fn values_of(&self, component: Component) -> Result<Value, SpecError> {
        let values = &self.tree["values"];
        let schema = component.chart().schema();
        let own = match component {
            // Its values stand below base in the chart too.
            Component::Base if values["base"].is_object() => json!({"base": values["base"]}),
            _ => values[component.key()].clone(),
        };
        let mut merged = json!({});
        if !own.is_null() {
            let path = match component {
                Component::Base => "values".to_owned(),
                _ => format!("values.{}", component.key()),
            };
            schema::check(&schema, &own, &path).map_err(SpecError::Field)?;
            merge(&mut merged, &own);
        }
        let mut global = json!({"istioNamespace": self.namespace()});
        if values["global"].is_object() {
            let global_schema = &schema["properties"]["global"];
            schema::check(global_schema, &values["global"], "values.global")
                .map_err(SpecError::Field)?;
            merge(&mut global, &values["global"]);
        }
        for key in ["hub", "tag"] {
            if !self.tree[key].is_null() {
                global[key] = self.tree[key].clone();
            }
        }
        merge(
            &mut merged,
            &json!({"global": global, "profile": self.profile()}),
        );
        let mut mesh = values["meshConfig"].clone();
        if self.tree["meshConfig"].is_object() {
            match mesh.is_object() {
                true => merge(&mut mesh, &self.tree["meshConfig"]),
                false => mesh = self.tree["meshConfig"].clone(),
            }
        }
        if mesh.is_object() && schema["properties"]["meshConfig"].is_object() {
            merge(&mut merged, &json!({"meshConfig": mesh}));
        }
        if !self.revision().is_empty() {
            merged["revision"] = self.revision().into();
        }
        for key in ["platform", "defaultRevision"] {
            if !values[key].is_null() && schema["properties"][key].is_object() {
                merged[key] = values[key].clone();
            }
        }
        let settings = &self.tree["components"][component.key()];
        for key in ["hub", "tag"] {
            if !settings[key].is_null() {
                merged[key] = settings[key].clone();
            }
        }
        Ok(merged)
    }
}

/// [`VALUE_ROOTS`], and what the operator's own fields are for as well.
const VALUE_ROOTS_WITH_MESH: [&str; 11] = [
    "global",
    "base",
    "pilot",
    "cni",
    "ztunnel",
    "defaultRevision",
    "platform",
    "sidecarInjectorWebhook",
    "meshConfig",
    "revision",
    "profile",
];

fn known_keys(map: &Value, known: &[&str], path: &str) -> Result<(), SpecError> {
    for key in map.as_object().into_iter().flat_map(|map| map.keys()) {
        if !known.contains(&key.as_str()) {
            let path = if path.is_empty() {
                String::new()
            } else {
                format!("{path}.")
            };
            let hint = match schema::nearest(key, known.iter().copied()) {
                Some(near) => format!("; did you mean {path}{near}?"),
                None => String::new(),
            };
            return Err(SpecError::Field(format!("{path}{key} is not known{hint}")));
        }
    }
    Ok(())
}

/// `components.ingressGateways` and `egressGateways`: those that are off are nothing. One that
/// is on is refused, for what a Gateway can be made of here faces inwards only: it would be
/// installed, and carry nothing.
fn no_gateways(list: &Value, path: &str) -> Result<(), SpecError> {
    let gateways = match list {
        Value::Null => return Ok(()),
        Value::Array(gateways) => gateways,
        other => {
            return Err(SpecError::Field(format!(
                "{path}: {other} is no list of gateways"
            )));
        }
    };
    for (index, gateway) in gateways.iter().enumerate() {
        let path = format!("{path}[{index}]");
        known_keys(
            gateway,
            &["name", "namespace", "enabled", "label", "hub", "tag", "k8s"],
            &path,
        )?;
        match &gateway["enabled"] {
            Value::Bool(false) => {}
            // What says nothing is on, as for Istio.
            Value::Null | Value::Bool(true) => {
                let name = match gateway["name"].as_str() {
                    Some(name) => format!(" ({name})"),
                    None => String::new(),
                };
                return Err(SpecError::Field(format!(
                    "{path}{name}: Adit has no gateway at the edge of the mesh yet, so that this one would be installed and carry nothing. Set enabled: false; for routes and policies inside of the mesh make a Gateway of class istio-waypoint (`adit waypoint apply`, or the chart gateway)"
                )));
            }
            other => {
                return Err(SpecError::Field(format!(
                    "{path}.enabled: {other} is not true or false"
                )));
            }
        }
    }
    Ok(())
}

/// A value at a path.
fn below(path: &[String], value: Value) -> Value {
    let path = path.iter().rev();
    path.fold(value, |inner, key| json!({ key: inner }))
}

/// The place in a list that a step is: `[0]`.
fn place(step: &str) -> Option<usize> {
    step.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}

/// Puts a value where a path with places in lists leads; one behind the last is a new one.
fn put(node: &mut Value, path: &[String], value: Value) -> Result<(), String> {
    let Some((step, rest)) = path.split_first() else {
        merge(node, &value);
        return Ok(());
    };
    match (place(step), &mut *node) {
        (Some(index), Value::Array(list)) if index <= list.len() => {
            if index == list.len() {
                list.push(Value::Null);
            }
            put(&mut list[index], rest, value)
        }
        (Some(_), Value::Array(list)) => Err(format!(
            "the list has {} items, and {step} is not the next one",
            list.len()
        )),
        (Some(0), Value::Null) => {
            *node = json!([null]);
            put(&mut node[0], rest, value)
        }
        (Some(_), _) => Err(format!("there is no list that {step} could be of")),
        (None, Value::Object(map)) => {
            put(map.entry(step.clone()).or_insert(Value::Null), rest, value)
        }
        (None, _) => {
            *node = json!({});
            put(&mut node[step.as_str()], rest, value)
        }
    }
}

/// Where a path begins: `spec.` may be written and `values.` be left out.
fn rooted(mut path: Vec<String>) -> Result<Vec<String>, SpecError> {
    if path.len() > 1 && path[0] == "spec" {
        path.remove(0);
    }
    let first = path[0].as_str();
    if SPEC_FIELDS.contains(&first) {
        return Ok(path);
    }
    if VALUE_ROOTS.contains(&first) {
        path.insert(0, "values".into());
        return Ok(path);
    }
    let known = SPEC_FIELDS.iter().chain(&VALUE_ROOTS).copied();
    let hint = match schema::nearest(first, known) {
        Some(near) => format!("; did you mean {near}?"),
        None => String::new(),
    };
    Err(SpecError::Field(format!(
        "{} is not known{hint}",
        path.join(".")
    )))
}

/// `a.b\.c` is a, b.c, and `a[0].b` is a, [0], b.
fn segments(path: &str) -> Vec<String> {
    let mut segments = vec![String::new()];
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '.' => segments.push(String::new()),
            '[' if segments.last().is_some_and(|last| !last.is_empty()) => {
                segments.push('['.into());
            }
            '\\' => segments
                .last_mut()
                .into_iter()
                .for_each(|s| s.extend(chars.next())),
            c => segments.last_mut().into_iter().for_each(|s| s.push(c)),
        }
    }
    segments
}

/// As in YAML; what is no YAML is text. `{a,b}` is a list, as Helm has it.
fn scalar(text: &str) -> Value {
    if let Some(list) = text
        .strip_prefix('{')
        .and_then(|rest| rest.strip_suffix('}'))
        && !list.contains(':')
    {
        let items = list.split(',').filter(|item| !item.is_empty());
        return items.map(|item| scalar(item.trim())).collect();
    }
    match serde_yaml_ng::from_str(text) {
        Ok(value @ (Value::Null | Value::Bool(_) | Value::Number(_))) => value,
        Ok(value @ (Value::Array(_) | Value::Object(_))) if text.starts_with(['[', '{']) => value,
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(sets: &[&str]) -> Result<Spec, SpecError> {
        let mut spec = Spec::default();
        for set in sets {
            spec.set(set)?;
        }
        Ok(spec)
    }

    fn plan(sets: &[&str]) -> Result<Vec<Planned>, SpecError> {
        spec(sets)?.plan()
    }

    #[test]
    fn profiles_decide_what_is_installed() {
        for (sets, expected) in [
            (&[][..], "base pilot cni ztunnel"),
            (&["profile=ambient"], "base pilot cni ztunnel"),
            (&["profile=demo"], "base pilot cni ztunnel"),
            (&["profile=minimal"], "base pilot"),
            (&["profile=empty"], ""),
            (&["profile=empty", "components.cni.enabled=true"], "cni"),
            (&["components.cni.enabled=false"], "base pilot ztunnel"),
        ] {
            let planned = plan(sets).expect("a plan");
            let names: Vec<_> = planned.iter().map(|p| p.component.key()).collect();
            assert_eq!(names.join(" "), expected, "{sets:?}");
        }
    }

    #[test]
    fn every_profile_renders() {
        for (name, components) in PROFILES {
            let spec = spec(&[&format!("profile={name}")]).expect("a profile");
            let objects = crate::install::objects(&spec);
            let objects = objects.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(objects.len(), components.len(), "{name}");
            assert!(
                objects.iter().all(|(_, objects)| !objects.is_empty()),
                "{name}"
            );
        }
    }

    #[test]
    fn values_reach_their_charts() {
        let planned = plan(&[
            "hub=registry.example/adit",
            "values.global.tag=1.2",
            "global.logging.level=debug",
            "pilot.env.A=b",
            "values.pilot.podAnnotations.example\\.com/x=y",
            "meshConfig.trustDomain=example.org",
            "cni.excludeNamespaces={kube-system,other}",
            "revision=canary",
        ])
        .expect("a plan");
        let [_, pilot, cni, ztunnel] = planned.as_slice() else {
            panic!("{planned:?}");
        };
        assert_eq!(pilot.values["global"]["hub"], "registry.example/adit");
        assert_eq!(pilot.values["global"]["tag"], 1.2);
        assert_eq!(pilot.values["global"]["logging"]["level"], "debug");
        assert_eq!(pilot.values["env"]["A"], "b");
        assert_eq!(pilot.values["podAnnotations"]["example.com/x"], "y");
        assert_eq!(pilot.values["meshConfig"]["trustDomain"], "example.org");
        assert_eq!(pilot.values["revision"], "canary");
        assert_eq!(
            cni.values["excludeNamespaces"],
            json!(["kube-system", "other"])
        );
        assert_eq!(ztunnel.values["meshConfig"]["trustDomain"], "example.org");
    }

    #[test]
    fn files_are_operators_or_values() {
        let mut spec = Spec::default();
        let operator = "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\n\
                        spec:\n  profile: minimal\n  components:\n    cni:\n      enabled: true\n\
                        \x20 values:\n    pilot:\n      replicaCount: 3\n";
        spec.add_file("operator.yaml", operator)
            .expect("an operator");
        spec.add_file("values.yaml", "global:\n  tag: v1\n")
            .expect("values");
        let planned = spec.plan().expect("a plan");
        assert_eq!(planned.len(), 3);
        assert_eq!(planned[1].values["replicaCount"], 3);
        assert_eq!(planned[1].values["global"]["tag"], "v1");
        let error = spec.add_file("pod.yaml", "kind: Pod\n").expect_err("a Pod");
        assert_eq!(
            error.to_string(),
            "pod.yaml: is a Pod, and no IstioOperator or values file"
        );
    }

    /// Nothing that Adit could install would carry what comes from outside.
    #[test]
    fn gateways_at_the_edge_are_refused_unless_they_are_off() {
        let gateways = |list: &str| {
            let mut spec = Spec::default();
            let text = format!("components: {{ingressGateways: {list}}}");
            spec.add_file("f.yaml", &text)?;
            spec.plan().map(|planned| planned.len())
        };
        for off in [
            "null",
            "[]",
            "[{name: istio-ingressgateway, enabled: false}]",
            "[{name: a, enabled: false, k8s: {hpaSpec: {}}}, {enabled: false}]",
        ] {
            assert_eq!(gateways(off), Ok(4), "{off}");
        }
        for on in [
            "[{name: edge}]",
            "[{name: edge, enabled: true}]",
            "[{name: edge, namespace: x, label: {istio: edge}, enabled: true, k8s: {}}]",
        ] {
            let error = gateways(on).expect_err("on").to_string();
            let expected = "components.ingressGateways[0] (edge): Adit has no gateway at the edge";
            assert!(error.starts_with(expected), "{error}");
            assert!(error.contains("enabled: false"), "{error}");
            assert!(error.contains("istio-waypoint"), "{error}");
        }
        // As Istio's own guides switch one off.
        let off = ["components.ingressGateways[0].enabled=false"];
        assert!(plan(&off).is_ok());
    }

    #[test]
    fn mistakes_are_named_with_their_path() {
        for (set, expected) in [
            (
                "hub",
                "--set hub: PATH=VALUE is expected, as values.global.hub=registry.example/adit",
            ),
            (
                "a..b=c",
                "--set a..b=c: PATH=VALUE is expected, as values.global.hub=registry.example/adit",
            ),
            ("profil=demo", "profil is not known; did you mean profile?"),
            (
                "profile=large",
                "profile large is none of ambient, default, demo, minimal, empty",
            ),
            (
                "values.pilto.env.A=b",
                "values.pilto is not known; did you mean values.pilot?",
            ),
            (
                "values.pilot.replicas=2",
                "values.pilot.replicas is not a known value",
            ),
            (
                "values.global.hbu=x",
                "values.global.hbu is not a known value; did you mean values.global.hub?",
            ),
            (
                "values.cni.resources=5",
                "values.cni.resources: 5 is a number, and a map is expected",
            ),
            (
                "components.istiod.enabled=true",
                "components.istiod is not known",
            ),
            (
                "components.cni.enabled=maybe",
                "components.cni.enabled: \"maybe\" is not true or false",
            ),
            (
                "components.pilot.k8s.overlays=x",
                "--set: components.pilot.k8s.overlays: is no list of overlays",
            ),
            (
                "components.pilot.k8s.resource=x",
                "--set: components.pilot.k8s.resource is not known; did you mean resources?",
            ),
            (
                "components.ingressGateways=x",
                "components.ingressGateways: \"x\" is no list of gateways",
            ),
            (
                "components.ingressGateways[0].enabeld=false",
                "components.ingressGateways[0].enabeld is not known; did you mean components.ingressGateways[0].enabled?",
            ),
            (
                "components.egressGateways[1].enabled=false",
                "--set components.egressGateways[1].enabled=false: there is no list that [1] could be of",
            ),
        ] {
            let error = plan(&[set]).map(|_| ()).map_err(|error| error.to_string());
            assert_eq!(error, Err(expected.to_owned()), "{set}");
        }
    }
}
