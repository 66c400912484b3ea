//! AuthorizationPolicies as a node proxy enforces them: L4 only.
//!
//! What L4 cannot judge makes a policy stricter where that is possible: an ALLOW rule
//! with L7 fields is left out, a DENY rule loses them; only a DENY clause of L7 fields
//! alone never matches, and the condition says so. An invalid policy fails closed
//! (reference: Istio `convertAuthorizationPolicy`, which drops what it cannot read).

use std::collections::BTreeSet;

use adit_shared::proto::security::{
    Action, Authorization, Group, Match, Rules, Scope, ServiceAccountMatch,
};

use super::mesh::MeshConfig;
use super::wire;
use crate::model::{
    AccountMatch, AuthorizationPolicy, Condition as When, InvalidPolicy, Operation, PolicyAction,
    PolicyScope, PolicySpec, Rule, Source, StringMatch, Values,
};
use crate::status::Condition;

/// What becomes of a policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversion {
    /// What node proxies get; `None`: the policy is not for them.
    pub authorization: Option<Authorization>,
    /// `ZtunnelAccepted`; `None`: the policy is not for node proxies.
    pub condition: Option<Condition>,
}

/// Converts `policy`.
pub fn convert(policy: &AuthorizationPolicy, mesh: &MeshConfig) -> Conversion {
    let (scope, action) = match &policy.spec {
        Ok(spec) => (&spec.scope, spec.action),
        Err(invalid) => (&invalid.scope, invalid.action),
    };
    let scope = match scope {
        PolicyScope::Targets(_) => {
            return Conversion {
                authorization: None,
                condition: None,
            };
        }
        PolicyScope::Selector(_) => Scope::WorkloadSelector,
        PolicyScope::Namespace if policy.meta.namespace == mesh.root_namespace => Scope::Global,
        PolicyScope::Namespace => Scope::Namespace,
    };
    let wire_action = match action {
        PolicyAction::Allow => Action::Allow,
        PolicyAction::Deny => Action::Deny,
        PolicyAction::Audit | PolicyAction::Custom => {
            let name = if action == PolicyAction::Audit {
                "AUDIT"
            } else {
                "CUSTOM"
            };
            return Conversion {
                authorization: None,
                condition: Some(rejected(
                    "UnsupportedValue",
                    format!("ztunnel does not support the {name} action"),
                )),
            };
        }
    };
    let mut authorization = Authorization {
        name: policy.meta.name.to_string(),
        namespace: policy.meta.namespace.to_string(),
        scope: scope.into(),
        action: wire_action.into(),
        ..Authorization::default()
    };
    let condition = match &policy.spec {
        Ok(spec) => fill(&mut authorization, spec, mesh),
        Err(invalid) => fail_closed(&mut authorization, invalid),
    };
    Conversion {
        authorization: Some(authorization),
        condition: Some(condition),
    }
}

fn rejected(reason: &str, message: String) -> Condition {
    Condition {
        kind: "ZtunnelAccepted".into(),
        status: false,
        reason: reason.into(),
        message,
    }
}

/// Also a proxy that knows nothing of `invalid_reason` refuses: ALLOW without groups
/// allows nothing, DENY with an empty group denies everything.
fn fail_closed(authorization: &mut Authorization, invalid: &InvalidPolicy) -> Condition {
    if authorization.action() == Action::Deny {
        authorization.groups = vec![Group::default()];
    }
    authorization.dry_run = invalid.dry_run;
    let errors: Vec<String> = invalid.errors.iter().map(ToString::to_string).collect();
    authorization.invalid_reason = errors.join("; ");
    rejected(
        "Invalid",
        format!(
            "the policy is invalid and fails closed: {}",
            errors.join("; ")
        ),
    )
}

fn fill(authorization: &mut Authorization, spec: &PolicySpec, mesh: &MeshConfig) -> Condition {
    authorization.dry_run = spec.dry_run;
    let mut l7 = BTreeSet::new();
    let mut effective = false;
    for rule in &spec.rules {
        let fields = l7_fields(rule);
        // An ALLOW rule with L7 fields would allow more than it says.
        if fields.is_empty() || spec.action == PolicyAction::Deny {
            let group = group(rule, mesh);
            effective |= group.rules.iter().all(can_match);
            authorization.groups.push(group);
        }
        l7.extend(fields);
    }
    if !l7.is_empty() {
        let rules = spec.rules.iter();
        let groups = rules.filter_map(|rule| behind_waypoint(rule, spec.action, mesh));
        authorization.waypoint_groups = groups.collect();
        authorization.has_waypoint_groups = true;
    }
    if l7.is_empty() {
        return Condition {
            kind: "ZtunnelAccepted".into(),
            status: true,
            reason: "Accepted".into(),
            message: "attached to ztunnel".into(),
        };
    }
    let fields = l7.into_iter().collect::<Vec<_>>().join(", ");
    let consequence = match spec.action {
        PolicyAction::Deny if effective => {
            "they are ignored, so the policy denies more than it says; rules with nothing else never match"
        }
        PolicyAction::Deny => "no other rule is left, so the policy has no effect",
        _ if effective => {
            "rules that use them are left out, so the policy allows less than it says"
        }
        _ => "rules that use them are left out, so the policy allows nothing",
    };
    rejected(
        "UnsupportedValue",
        format!(
            "ztunnel does not support HTTP attributes ({fields}): {consequence}. Use a waypoint to enforce them"
        ),
    )
}

/// What L4 can say of a rule for connections whose waypoint enforces all of it: an ALLOW
/// rule loses what L4 does not know, and a DENY rule with that is left to the waypoint.
fn behind_waypoint(rule: &Rule, action: PolicyAction, mesh: &MeshConfig) -> Option<Group> {
    let mut of_rule = group(rule, mesh);
    if !l7_fields(rule).is_empty() {
        if action == PolicyAction::Deny {
            return None;
        }
        // One alternative of which nothing is left stands for everything.
        let known = |clause: &Rules| clause.matches.iter().all(|m| *m != Match::default());
        of_rule.rules.retain(known);
    }
    Some(of_rule)
}

/// A clause of empty matches only never matches.
fn can_match(clause: &Rules) -> bool {
    clause.matches.is_empty() || clause.matches.iter().any(|m| *m != Match::default())
}

fn l7_fields(rule: &Rule) -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    let mut note = |values: &Values<String>, any: &str, none: &str| {
        if !values.any.is_empty() {
            fields.insert(any.to_owned());
        }
        if !values.none.is_empty() {
            fields.insert(none.to_owned());
        }
    };
    for operation in &rule.to {
        note(&operation.hosts, "hosts", "notHosts");
        note(&operation.methods, "methods", "notMethods");
        note(&operation.paths, "paths", "notPaths");
    }
    for source in &rule.from {
        note(
            &source.request_principals,
            "requestPrincipals",
            "notRequestPrincipals",
        );
    }
    for source in &rule.from {
        if !source.remote_ip_blocks.any.is_empty() {
            fields.insert("remoteIpBlocks".into());
        }
        if !source.remote_ip_blocks.none.is_empty() {
            fields.insert("notRemoteIpBlocks".into());
        }
    }
    for condition in &rule.when {
        match condition {
            When::RemoteIp(_) => {
                fields.insert("remote.ip".into());
            }
            When::L7 { key, .. } => {
                fields.insert(key.clone());
            }
            _ => {}
        }
    }
    fields
}

/// One clause for `to`, one for `from`, one for each `when`.
fn group(rule: &Rule, mesh: &MeshConfig) -> Group {
    let mut rules = Vec::new();
    if !rule.to.is_empty() {
        rules.push(Rules {
            matches: rule.to.iter().map(operation).collect(),
        });
    }
    if !rule.from.is_empty() {
        rules.push(Rules {
            matches: rule.from.iter().map(|from| source(from, mesh)).collect(),
        });
    }
    for condition in &rule.when {
        rules.push(Rules {
            matches: vec![when(condition, mesh)],
        });
    }
    Group { rules }
}

fn operation(operation: &Operation) -> Match {
    Match {
        destination_ports: ports(&operation.ports.any),
        not_destination_ports: ports(&operation.ports.none),
        ..Match::default()
    }
}

fn source(source: &Source, mesh: &MeshConfig) -> Match {
    let Source {
        principals,
        namespaces,
        service_accounts,
        trust_domains,
        ip_blocks,
        remote_ip_blocks: _,
        request_principals: _,
    } = source;
    Match {
        principals: identities(&principals.any, mesh),
        not_principals: identities(&principals.none, mesh),
        namespaces: texts(&namespaces.any),
        not_namespaces: texts(&namespaces.none),
        service_accounts: accounts(&service_accounts.any),
        not_service_accounts: accounts(&service_accounts.none),
        trust_domains: identities(&trust_domains.any, mesh),
        not_trust_domains: identities(&trust_domains.none, mesh),
        source_ips: blocks(&ip_blocks.any),
        not_source_ips: blocks(&ip_blocks.none),
        ..Match::default()
    }
}

fn when(condition: &When, mesh: &MeshConfig) -> Match {
    let mut m = Match::default();
    match condition {
        When::SourceIp(values) => {
            m.source_ips = blocks(&values.any);
            m.not_source_ips = blocks(&values.none);
        }
        When::DestinationIp(values) => {
            m.destination_ips = blocks(&values.any);
            m.not_destination_ips = blocks(&values.none);
        }
        When::DestinationPort(values) => {
            m.destination_ports = ports(&values.any);
            m.not_destination_ports = ports(&values.none);
        }
        When::SourceNamespace(values) => {
            m.namespaces = texts(&values.any);
            m.not_namespaces = texts(&values.none);
        }
        When::SourcePrincipal(values) => {
            m.principals = identities(&values.any, mesh);
            m.not_principals = identities(&values.none, mesh);
        }
        When::SourceServiceAccount(values) => {
            m.service_accounts = accounts(&values.any);
            m.not_service_accounts = accounts(&values.none);
        }
        When::SourceTrustDomain(values) => {
            m.trust_domains = identities(&values.any, mesh);
            m.not_trust_domains = identities(&values.none, mesh);
        }
        When::RemoteIp(_) | When::L7 { .. } => {}
    }
    m
}

fn texts(values: &[StringMatch]) -> Vec<adit_shared::proto::security::StringMatch> {
    values.iter().map(wire::string_match).collect()
}

fn ports(values: &[u16]) -> Vec<u32> {
    values.iter().map(|port| u32::from(*port)).collect()
}

fn blocks(values: &[ipnet::IpNet]) -> Vec<adit_shared::proto::security::Address> {
    values.iter().map(wire::block).collect()
}

fn accounts(values: &[AccountMatch]) -> Vec<ServiceAccountMatch> {
    values
        .iter()
        .map(|account| ServiceAccountMatch {
            namespace: account.namespace.to_string(),
            service_account: account.name.to_string(),
        })
        .collect()
}

/// Principals and trust domains, with every name of this mesh's trust domain put for
/// any one of them: `cluster.local` means the mesh's own, whatever that is called.
fn identities(
    values: &[StringMatch],
    mesh: &MeshConfig,
) -> Vec<adit_shared::proto::security::StringMatch> {
    let names: Vec<&str> = std::iter::once(&mesh.trust_domain)
        .chain(&mesh.trust_domain_aliases)
        .map(adit_shared::identity::TrustDomain::as_str)
        .collect();
    let ours = |domain: &str| {
        names.contains(&domain) || domain == adit_shared::identity::TrustDomain::DEFAULT
    };
    let mut expanded: Vec<StringMatch> = Vec::with_capacity(values.len());
    for value in values {
        let (text, make): (_, fn(String) -> StringMatch) = match value {
            StringMatch::Exact(text) => (text, StringMatch::Exact),
            // A prefix names a domain only if the whole of it is there.
            StringMatch::Prefix(text) if text.contains('/') => (text, StringMatch::Prefix),
            other => {
                expanded.push(other.clone());
                continue;
            }
        };
        let (domain, rest) = match text.find('/') {
            Some(end) => text.split_at(end),
            None => (text.as_str(), ""),
        };
        if ours(domain) {
            expanded.extend(names.iter().map(|name| make(format!("{name}{rest}"))));
        } else {
            expanded.push(value.clone());
        }
    }
    texts(&expanded)
}
