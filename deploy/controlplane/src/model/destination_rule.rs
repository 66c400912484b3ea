//! DestinationRules: how connections to a host are spread and bounded.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use adit_shared::proto::waypoint as wire;
use serde::Deserialize;
use serde_json::Value;

use super::field::{At, FieldError};
use super::meta::{Labels, Meta};
use super::raw::{Map, nullable, read_spec};
use super::traffic_policy::{RawTrafficPolicy, RawTrafficSettings, settings};

/// A DestinationRule.
#[derive(Debug, Clone, PartialEq)]
pub struct DestinationRule {
    /// Metadata.
    pub meta: Meta,
    /// The host as it was written: a short name is one of the rule's namespace.
    pub host: Arc<str>,
    /// For the whole host.
    pub policy: TrafficPolicy,
    /// For one port each, in place of the above.
    pub ports: BTreeMap<u16, TrafficPolicy>,
    /// Named parts of the endpoints.
    pub subsets: Vec<RuleSubset>,
    /// The namespaces that see it; `None`: all.
    pub export_to: Option<BTreeSet<Arc<str>>>,
    /// It is for some clients only, which a waypoint cannot tell apart.
    pub for_some_clients: bool,
    /// What is wrong with it. Requests to the host fail then.
    pub errors: Vec<FieldError>,
}

/// Settings, and where certificates are that the compiler has to look up.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrafficPolicy {
    /// As waypoints are sent them.
    pub settings: wire::TrafficSettings,
    /// `tls.credentialName`.
    pub credential: Option<Arc<str>>,
}

/// A subset.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleSubset {
    /// Its name.
    pub name: Arc<str>,
    /// Pods of it have these labels.
    pub labels: Labels,
    /// What holds for it in place of the host's.
    pub policy: Option<TrafficPolicy>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawSpec {
    #[serde(deserialize_with = "nullable")]
    host: String,
    traffic_policy: Option<Map<RawTrafficPolicy>>,
    #[serde(deserialize_with = "nullable")]
    subsets: Vec<Map<RawSubset>>,
    #[serde(deserialize_with = "nullable")]
    export_to: Vec<String>,
    workload_selector: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawSubset {
    #[serde(deserialize_with = "nullable")]
    name: String,
    #[serde(deserialize_with = "nullable")]
    labels: Labels,
    traffic_policy: Option<Map<RawTrafficPolicy>>,
}

impl DestinationRule {
    /// Reads `spec`. One with errors is one too.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let raw: RawSpec = read_spec(spec).unwrap_or_else(|error| {
            errors.push(error);
            let host = spec.get("host").and_then(Value::as_str);
            RawSpec {
                host: host.unwrap_or_default().into(),
                ..RawSpec::default()
            }
        });
        let at = At::ROOT.key("spec");
        if raw.host.is_empty() {
            errors.push(at.key("host").error("is required"));
        }
        let whole = raw.traffic_policy.as_deref();
        let below = at.key("trafficPolicy");
        let policy = whole.map(|raw| settings(&raw.settings, below, &mut errors));
        let ports = whole.map(|raw| port_settings(raw, below, &mut errors));
        let mut subsets: Vec<RuleSubset> = Vec::new();
        let list = at.key("subsets");
        for (index, raw) in raw.subsets.iter().enumerate() {
            let at = list.index(index);
            if raw.name.is_empty() || subsets.iter().any(|known| *known.name == *raw.name) {
                let message = "is required, and each name once";
                errors.push(at.key("name").error(message));
                continue;
            }
            let own = raw.traffic_policy.as_deref();
            let at = at.key("trafficPolicy");
            if own.is_some_and(|own| !own.port_level_settings.is_empty()) {
                errors.push(
                    at.key("portLevelSettings")
                        .error("is not supported in a subset: state it for the host"),
                );
            }
            subsets.push(RuleSubset {
                name: raw.name.as_str().into(),
                labels: raw.labels.clone(),
                policy: own.map(|own| settings(&own.settings, at, &mut errors)),
            });
        }
        let all = raw.export_to.is_empty() || raw.export_to.iter().any(|to| to == "*");
        let export_to = raw.export_to.iter().map(|to| match to.as_str() {
            "." => meta.namespace.clone(),
            name => name.into(),
        });
        Self {
            host: raw.host.as_str().into(),
            policy: policy.unwrap_or_default(),
            ports: ports.unwrap_or_default(),
            subsets,
            export_to: (!all).then(|| export_to.collect()),
            for_some_clients: raw.workload_selector.is_some(),
            errors,
            meta,
        }
    }
}

fn port_settings(
    raw: &RawTrafficPolicy,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> BTreeMap<u16, TrafficPolicy> {
    let list = at.key("portLevelSettings");
    let mut found = BTreeMap::new();
    for (index, raw) in raw.port_level_settings.iter().enumerate() {
        let at = list.index(index);
        let policy = settings(&RawTrafficSettings::from(&**raw), at, errors);
        let number = raw.port.as_ref().map_or(0, |port| port.number);
        match u16::try_from(number) {
            Ok(number) if number > 0 && !found.contains_key(&number) => {
                found.insert(number, policy);
            }
            _ => {
                let at = at.key("port");
                errors.push(at.key("number").error("is not a port, or there twice"));
            }
        }
    }
    found
}
