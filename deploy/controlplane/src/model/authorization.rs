//! AuthorizationPolicies as validated values, L4 and L7 alike.
//!
//! A policy that cannot be read is a value of its own, [`InvalidPolicy`]: whoever
//! compiles it has to make it fail closed. Rules: Istio `AuthorizationPolicy`.

use std::sync::Arc;

use ipnet::IpNet;
use serde_json::Value;

use super::field::{At, FieldError};
use super::meta::{Labels, Meta};
use super::raw::{Map, Selector};
use super::{authorization_raw as raw, authorization_values as values};

/// Most rules that a policy may have.
pub const MAX_RULES: usize = 512;
/// Most targets that a policy may have.
pub const MAX_TARGETS: usize = 16;
/// Most service accounts that a source may list.
pub const MAX_SERVICE_ACCOUNTS: usize = 16;

/// An AuthorizationPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Metadata.
    pub meta: Meta,
    /// What it says.
    pub spec: Result<PolicySpec, InvalidPolicy>,
}

/// What a policy says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicySpec {
    /// Whom it covers.
    pub scope: PolicyScope,
    /// What a match leads to.
    pub action: PolicyAction,
    /// ORed.
    pub rules: Vec<Rule>,
    /// Evaluated and logged, not enforced (annotation `istio.io/dry-run`).
    pub dry_run: bool,
    /// The provider that action CUSTOM asks; empty with the others.
    pub provider: Arc<str>,
}

/// A policy with errors, and what could be read of it all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidPolicy {
    /// Whom it covers; the whole namespace where that cannot be read.
    pub scope: PolicyScope,
    /// Its action; [`PolicyAction::Deny`] where that cannot be read.
    pub action: PolicyAction,
    /// As in [`PolicySpec::dry_run`].
    pub dry_run: bool,
    /// What is wrong; at least one.
    pub errors: Vec<FieldError>,
}

/// Whom a policy covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyScope {
    /// Its namespace, or the mesh when it lives in the root namespace.
    Namespace,
    /// Workloads with these labels; with none, all.
    Selector(Labels),
    /// Waypoints, gateways and services. Node proxies do not see such a policy.
    Targets(Vec<TargetRef>),
}

/// A `targetRef`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetRef {
    /// API group; empty: core.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Namespace, where it is stated.
    pub namespace: Option<String>,
}

/// What a match leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyAction {
    /// The connection is allowed.
    Allow,
    /// The connection is refused.
    Deny,
    /// The connection is logged.
    Audit,
    /// An external provider decides.
    Custom,
}

/// One rule: `from`, `to` and every `when` must match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// ORed; empty: any.
    pub from: Vec<Source>,
    /// ORed; empty: any.
    pub to: Vec<Operation>,
    /// ANDed.
    pub when: Vec<Condition>,
}

/// A field and its `not` twin: one of `any` (where there are some), and none of `none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Values<T> {
    /// The positive field.
    pub any: Vec<T>,
    /// The negated field.
    pub none: Vec<T>,
}

impl<T> Values<T> {
    /// Neither field says anything.
    pub fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self {
            any: Vec::new(),
            none: Vec::new(),
        }
    }
}

/// A text with a wildcard at its start or end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringMatch {
    /// The text itself.
    Exact(String),
    /// Any text that starts so.
    Prefix(String),
    /// Any text that ends so.
    Suffix(String),
    /// Any text but the empty one.
    Presence,
}

/// A service account, exactly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountMatch {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// Who calls. Fields are ANDed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// SPIFFE ids without scheme.
    pub principals: Values<StringMatch>,
    /// Namespaces.
    pub namespaces: Values<StringMatch>,
    /// Service accounts.
    pub service_accounts: Values<AccountMatch>,
    /// Trust domains.
    pub trust_domains: Values<StringMatch>,
    /// Source addresses of the connection.
    pub ip_blocks: Values<IpNet>,
    /// Client addresses behind proxies (L7).
    pub remote_ip_blocks: Values<IpNet>,
    /// JWT principals (L7).
    pub request_principals: Values<String>,
}

/// What is called. Fields are ANDed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Operation {
    /// Ports of the workload.
    pub ports: Values<u16>,
    /// Host headers (L7).
    pub hosts: Values<String>,
    /// Methods (L7).
    pub methods: Values<String>,
    /// Paths (L7).
    pub paths: Values<String>,
}

/// A `when` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// `source.ip`.
    SourceIp(Values<IpNet>),
    /// `source.namespace`.
    SourceNamespace(Values<StringMatch>),
    /// `source.principal`.
    SourcePrincipal(Values<StringMatch>),
    /// `source.serviceAccount`.
    SourceServiceAccount(Values<AccountMatch>),
    /// `source.trustDomain`.
    SourceTrustDomain(Values<StringMatch>),
    /// `destination.ip`.
    DestinationIp(Values<IpNet>),
    /// `destination.port`.
    DestinationPort(Values<u16>),
    /// `remote.ip` (L7).
    RemoteIp(Values<IpNet>),
    /// Any other known key (L7), for example `request.headers[x-team]`.
    L7 {
        /// The key.
        key: String,
        /// Its values.
        values: Values<String>,
    },
}

impl AuthorizationPolicy {
    /// Reads `spec`. A policy with errors is a policy too.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let dry_run = dry_run(&meta, &mut errors);
        let parsed = match raw::Spec::read(spec) {
            Ok(raw) => Some(read(&raw, &meta, dry_run, &mut errors)),
            Err(error) => {
                errors.push(error);
                None
            }
        };
        let spec = match parsed {
            Some(spec) if errors.is_empty() => Ok(spec),
            _ => Err(InvalidPolicy {
                scope: raw::salvage_scope(spec),
                action: raw::salvage_action(spec),
                dry_run,
                errors,
            }),
        };
        Self { meta, spec }
    }

    /// What is wrong with it.
    pub fn errors(&self) -> &[FieldError] {
        match &self.spec {
            Ok(_) => &[],
            Err(invalid) => &invalid.errors,
        }
    }

    /// Whom it covers.
    pub fn scope(&self) -> &PolicyScope {
        match &self.spec {
            Ok(spec) => &spec.scope,
            Err(invalid) => &invalid.scope,
        }
    }
}

/// A text that is no boolean is an error, and the policy is enforced.
fn dry_run(meta: &Meta, errors: &mut Vec<FieldError>) -> bool {
    match meta.annotation("istio.io/dry-run") {
        None | Some("false" | "False" | "FALSE" | "f" | "F" | "0") => false,
        Some("true" | "True" | "TRUE" | "t" | "T" | "1") => true,
        Some(text) => {
            let metadata = At::ROOT.key("metadata");
            let annotations = metadata.key("annotations");
            let at = annotations.key("istio.io/dry-run");
            errors.push(at.error(format!("{text:?} is neither \"true\" nor \"false\"")));
            false
        }
    }
}

fn read(raw: &raw::Spec, meta: &Meta, dry_run: bool, errors: &mut Vec<FieldError>) -> PolicySpec {
    let at = At::ROOT.key("spec");
    let action = match raw.action.as_deref() {
        None | Some("" | "ALLOW") => PolicyAction::Allow,
        Some("DENY") => PolicyAction::Deny,
        Some("AUDIT") => PolicyAction::Audit,
        Some("CUSTOM") => PolicyAction::Custom,
        Some(other) => {
            errors.push(at.key("action").error(format!(
                "{other:?} is not an action: ALLOW, DENY, AUDIT or CUSTOM"
            )));
            PolicyAction::Deny
        }
    };
    let scope = scope(
        raw.selector.as_deref(),
        raw.target_ref.as_deref(),
        &raw.target_refs,
        at,
        errors,
    );
    let provider = raw.provider.as_ref().and_then(|p| p.name.as_deref());
    match (action, provider) {
        (PolicyAction::Custom, None | Some("")) => errors.push(
            at.key("provider")
                .error("action CUSTOM needs a provider's name"),
        ),
        (PolicyAction::Custom, Some(_)) | (_, None) => {}
        (_, Some(_)) => errors.push(at.key("provider").error("is for action CUSTOM only")),
    }
    let list = at.key("rules");
    if raw.rules.is_empty() && action != PolicyAction::Allow {
        errors.push(
            list.error("is required for every action but ALLOW: without rules nothing matches"),
        );
    }
    if raw.rules.len() > MAX_RULES {
        errors.push(list.error(format!(
            "has {} rules; at most {MAX_RULES}",
            raw.rules.len()
        )));
    }
    let mut rules = Vec::with_capacity(raw.rules.len());
    for (index, rule) in raw.rules.iter().enumerate() {
        rules.push(values::rule(rule, action, meta, list.index(index), errors));
    }
    PolicySpec {
        scope,
        action,
        rules,
        dry_run,
        provider: provider.unwrap_or_default().into(),
    }
}

/// Whom a policy covers: `selector`, `targetRef` or `targetRefs`.
pub(super) fn scope(
    selector: Option<&Selector>,
    target_ref: Option<&raw::Target>,
    target_refs: &[Map<raw::Target>],
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> PolicyScope {
    let targets = target_ref.into_iter().map(|target| (target, None));
    let listed = target_refs.iter().enumerate();
    let targets: Vec<_> = targets
        .chain(listed.map(|(index, target)| (&**target, Some(index))))
        .collect();
    if target_ref.is_some() && !target_refs.is_empty() {
        errors.push(
            at.key("targetRef")
                .error("only one of targetRef and targetRefs may be set"),
        );
    }
    if targets.len() > MAX_TARGETS {
        errors.push(at.key("targetRefs").error(format!(
            "has {} targets; at most {MAX_TARGETS}",
            targets.len()
        )));
    }
    let list = at.key("targetRefs");
    for (target, index) in &targets {
        let single = at.key("targetRef");
        let item = index.map_or(single, |index| list.index(index));
        for (key, value) in [("kind", &target.kind), ("name", &target.name)] {
            if value.is_empty() {
                errors.push(item.key(key).error("is required"));
            }
        }
    }
    let Some(selector) = selector else {
        return if targets.is_empty() {
            PolicyScope::Namespace
        } else {
            PolicyScope::Targets(
                targets
                    .into_iter()
                    .map(|(target, _)| target.read())
                    .collect(),
            )
        };
    };
    if !targets.is_empty() {
        errors.push(
            at.key("selector")
                .error("only one of selector and targetRefs may be set"),
        );
    }
    check_selector(&selector.match_labels, at, errors);
    PolicyScope::Selector(selector.match_labels.clone())
}

/// Istio knows no wildcards in selectors; taken literally they would match nothing.
pub(super) fn check_selector(labels: &Labels, spec: At<'_>, errors: &mut Vec<FieldError>) {
    let at = spec.key("selector");
    let at = at.key("matchLabels");
    for (key, value) in labels {
        let at = at.key(key);
        if key.is_empty() {
            errors.push(at.error("a label has a key"));
        }
        if key.contains('*') || value.contains('*') {
            errors.push(at.error("wildcards are not supported in selectors"));
        }
    }
}
