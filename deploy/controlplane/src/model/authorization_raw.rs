//! The wire form of `AuthorizationPolicy.spec`: every field, and no others.

use serde::Deserialize;
use serde_json::Value;

use super::authorization::{PolicyAction, PolicyScope, TargetRef};
use super::field::FieldError;
use super::raw::{Map, Selector, nullable, read_spec};

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct Spec {
    pub(super) selector: Option<Map<Selector>>,
    pub(super) target_ref: Option<Map<Target>>,
    #[serde(deserialize_with = "nullable")]
    pub(super) target_refs: Vec<Map<Target>>,
    #[serde(deserialize_with = "nullable")]
    pub(super) rules: Vec<Map<Rule>>,
    pub(super) action: Option<String>,
    pub(super) provider: Option<Map<Provider>>,
}

impl Spec {
    pub(super) fn read(spec: &Value) -> Result<Self, FieldError> {
        match spec {
            Value::Null => Ok(Self::default()),
            spec => read_spec(spec),
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct Target {
    #[serde(deserialize_with = "nullable")]
    pub(super) group: String,
    #[serde(deserialize_with = "nullable")]
    pub(super) kind: String,
    #[serde(deserialize_with = "nullable")]
    pub(super) name: String,
    pub(super) namespace: Option<String>,
}

impl Target {
    pub(super) fn read(&self) -> TargetRef {
        TargetRef {
            group: self.group.clone(),
            kind: self.kind.clone(),
            name: self.name.clone(),
            namespace: self.namespace.clone(),
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Provider {
    pub(super) name: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Rule {
    #[serde(deserialize_with = "nullable")]
    pub(super) from: Vec<Map<From>>,
    #[serde(deserialize_with = "nullable")]
    pub(super) to: Vec<Map<To>>,
    #[serde(deserialize_with = "nullable")]
    pub(super) when: Vec<Map<When>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct From {
    pub(super) source: Option<Map<Source>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct To {
    pub(super) operation: Option<Map<Operation>>,
}

type Texts = Vec<String>;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct Source {
    #[serde(deserialize_with = "nullable")]
    pub(super) principals: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_principals: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) request_principals: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_request_principals: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) namespaces: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_namespaces: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) service_accounts: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_service_accounts: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) trust_domains: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_trust_domains: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) ip_blocks: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_ip_blocks: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) remote_ip_blocks: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_remote_ip_blocks: Texts,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct Operation {
    #[serde(deserialize_with = "nullable")]
    pub(super) hosts: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_hosts: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) ports: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_ports: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) methods: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_methods: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) paths: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_paths: Texts,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct When {
    #[serde(deserialize_with = "nullable")]
    pub(super) key: String,
    #[serde(deserialize_with = "nullable")]
    pub(super) values: Texts,
    #[serde(deserialize_with = "nullable")]
    pub(super) not_values: Texts,
}

/// Whom an unreadable spec covers. What cannot be read covers the whole namespace, and
/// where a selector and targets contradict each other the selector holds, so that the
/// node proxies enforce it.
pub(super) fn salvage_scope(spec: &Value) -> PolicyScope {
    let present = |key: &str| match spec.get(key) {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    if present("selector") {
        let selector = spec.get("selector").map(Map::<Selector>::deserialize);
        match selector {
            Some(Ok(selector)) if selector.match_labels.values().all(|v| !v.contains('*')) => {
                PolicyScope::Selector(selector.into_inner().match_labels)
            }
            _ => PolicyScope::Namespace,
        }
    } else if present("targetRef") || present("targetRefs") {
        PolicyScope::Targets(salvage_targets(spec))
    } else {
        PolicyScope::Namespace
    }
}

/// The targets that can be read; none where any of them cannot, which then stands for
/// everything that the policy could be meant for.
fn salvage_targets(spec: &Value) -> Vec<TargetRef> {
    let single = spec.get("targetRef").filter(|target| !target.is_null());
    let listed = spec.get("targetRefs").and_then(Value::as_array);
    let all = single.into_iter().chain(listed.into_iter().flatten());
    let read: Result<Vec<_>, _> = all
        .map(|target| Map::<Target>::deserialize(target).map(|target| target.read()))
        .collect();
    let whole = listed.is_some() || spec.get("targetRefs").is_none_or(Value::is_null);
    read.ok().filter(|_| whole).unwrap_or_default()
}

/// What an unreadable spec does: an action that cannot be read might be a DENY.
pub(super) fn salvage_action(spec: &Value) -> PolicyAction {
    match spec.get("action") {
        None | Some(Value::Null) if spec.is_object() || spec.is_null() => PolicyAction::Allow,
        Some(Value::String(action)) => match action.as_str() {
            "" | "ALLOW" => PolicyAction::Allow,
            "AUDIT" => PolicyAction::Audit,
            "CUSTOM" => PolicyAction::Custom,
            _ => PolicyAction::Deny,
        },
        _ => PolicyAction::Deny,
    }
}
