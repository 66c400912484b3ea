//! AuthorizationPolicies as waypoints enforce them.
//!
//! There are two points of enforcement, as in Istio, and a request has to pass both:
//!
//! * **The waypoint**, by policies with `targetRefs`: a Service, the Gateway, the class.
//! * **The workload** that the request goes to, by all others, as its node proxy does:
//!   those with a selector, those of the whole namespace, and the root namespace's. Where
//!   a waypoint serves the workload it applies them itself, with every field and to the
//!   caller, and the node proxy admits it (`compile/admission.rs`). Istio is silent here;
//!   its waypoints ignore them. They are given as the uids of the workloads, so that they
//!   are ORed and ANDed among each other exactly as the node proxy does it.
//!
//! An ALLOW rule that names the waypoint's own identity is how Istio's users let it
//! through. At the workload's point it stands for all callers of that waypoint.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use adit_shared::identity::TrustDomain;
use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::authorization_policy::Action;
use adit_shared::proto::waypoint::target::Kind as Wire;

use super::Part;
use super::resource::{Resource, object};
use super::served::{Served, ServedWorkload, served};
use super::targets::{WAYPOINT_ACCEPTED, resolve};
use super::view::View;
use super::waypoints::WaypointName;
use crate::compile::admission::accounts_of;
use crate::compile::mesh::MeshConfig;
use crate::model::{
    AccountMatch, AuthorizationPolicy, Condition as When, Kind, Labels, NamespaceObjects,
    Operation, PolicyAction, PolicyScope, Rule, Source, StringMatch, Values, selects,
};
use crate::status::Condition;

pub(super) fn compile(objects: &NamespaceObjects, view: &View<'_>, part: &mut Part) {
    let policies = objects.authorization_policies.values();
    let own: Vec<_> = policies
        .filter(|policy| view.mesh.owns(&policy.meta))
        .collect();
    let is_classic =
        |policy: &&Arc<AuthorizationPolicy>| !matches!(policy.scope(), PolicyScope::Targets(_));
    let workloads = own
        .iter()
        .any(is_classic)
        .then(|| Workloads::of(objects, view));
    for policy in own {
        match policy.scope() {
            PolicyScope::Targets(targets) => targeted(policy, targets, view, part),
            scope => {
                let selector = match scope {
                    PolicyScope::Selector(selector) => selector,
                    PolicyScope::Namespace | PolicyScope::Targets(_) => &Labels::new(),
                };
                if let Some(workloads) = &workloads {
                    at_workloads(policy, selector, workloads, view, part);
                }
            }
        }
    }
}

/// The workloads that policies of a namespace can be for, with the waypoints that serve
/// them.
struct Workloads<'a> {
    served: Vec<Served<'a>>,
}

impl<'a> Workloads<'a> {
    /// Those of the namespace; for policies of the root namespace, all.
    fn of(objects: &'a NamespaceObjects, view: &View<'a>) -> Self {
        let mut found = Vec::new();
        if view.waypoints.iter().next().is_none() {
            return Self { served: found };
        }
        if *view.namespace == view.mesh.root_namespace {
            let all = view.namespaces();
            found.extend(all.map(|(_, of)| served(of, view.waypoints, view.mesh)));
        } else {
            found.push(served(objects, view.waypoints, view.mesh));
        }
        Self { served: found }
    }

    /// The uids that `selector` picks, by waypoint. An endpoint that is no pod has no
    /// labels, and only policies without a selector are for it.
    fn selected(&self, selector: &Labels) -> BTreeMap<&WaypointName, BTreeSet<&str>> {
        let mut found: BTreeMap<_, BTreeSet<&str>> = BTreeMap::new();
        let picks = |workload: &ServedWorkload<'_>| match workload.labels {
            Some(labels) => selects(selector, labels),
            None => selector.is_empty(),
        };
        for (waypoint, workloads) in self.served.iter().flatten() {
            for (uid, _) in workloads.iter().filter(|(_, of)| picks(of)) {
                found.entry(waypoint).or_default().insert(uid);
            }
        }
        found
    }
}

fn targeted(
    policy: &AuthorizationPolicy,
    targets: &[crate::model::TargetRef],
    view: &View<'_>,
    part: &mut Part,
) {
    let resolved = resolve(&policy.meta, targets, view);
    for (waypoint, targets) in &resolved.waypoints {
        let resource = convert(policy, targets.clone(), None);
        part.give(waypoint, &Arc::new(Resource::AuthorizationPolicy(resource)));
    }
    let invalid = invalid(policy);
    let status = resolved.status(Some(invalid.as_str()).filter(|invalid| !invalid.is_empty()));
    part.status(policy.meta.reference(Kind::AuthorizationPolicy))
        .merge(status);
}

fn at_workloads(
    policy: &AuthorizationPolicy,
    selector: &Labels,
    workloads: &Workloads<'_>,
    view: &View<'_>,
    part: &mut Part,
) {
    let selected = workloads.selected(selector);
    if selected.is_empty() {
        return;
    }
    let mut names = Vec::new();
    for (waypoint, uids) in selected {
        let targets = uids.into_iter().map(|uid| wire::Target {
            kind: Some(Wire::Workload(uid.to_owned())),
        });
        let identity = Identity::of(waypoint, view);
        let resource = convert(policy, targets.collect(), Some(&identity));
        part.give(waypoint, &Arc::new(Resource::AuthorizationPolicy(resource)));
        names.push(waypoint.to_string());
    }
    let invalid = invalid(policy);
    let condition = if invalid.is_empty() {
        let message = format!(
            "traffic that passes {} is judged there, by all fields and the caller's identity",
            names.join(", ")
        );
        Condition::new(WAYPOINT_ACCEPTED, true, "Accepted", message)
    } else {
        let message = format!("the policy is invalid and fails closed: {invalid}");
        Condition::new(WAYPOINT_ACCEPTED, false, "Invalid", message)
    };
    let status = part.status(policy.meta.reference(Kind::AuthorizationPolicy));
    status.conditions.push(condition);
}

fn invalid(policy: &AuthorizationPolicy) -> String {
    let errors: Vec<_> = policy.errors().iter().map(ToString::to_string).collect();
    errors.join("; ")
}

/// The policy as a waypoint gets it. `waypoint`: at the workload's point of enforcement.
fn convert(
    policy: &AuthorizationPolicy,
    targets: Vec<wire::Target>,
    waypoint: Option<&Identity<'_>>,
) -> wire::AuthorizationPolicy {
    let (action, dry_run) = match &policy.spec {
        Ok(spec) => (spec.action, spec.dry_run),
        Err(invalid) => (invalid.action, invalid.dry_run),
    };
    let mut converted = wire::AuthorizationPolicy {
        object: Some(object(&policy.meta, Kind::AuthorizationPolicy)),
        action: match action {
            PolicyAction::Allow => Action::Allow,
            PolicyAction::Deny => Action::Deny,
            PolicyAction::Audit => Action::Audit,
            PolicyAction::Custom => Action::Custom,
        }
        .into(),
        dry_run,
        targets,
        invalid: invalid(policy),
        ..wire::AuthorizationPolicy::default()
    };
    if let Ok(spec) = &policy.spec {
        converted.provider = spec.provider.to_string();
        let waypoint = waypoint.filter(|_| action == PolicyAction::Allow);
        converted.rules = spec.rules.iter().map(|of| rule(of, waypoint)).collect();
    }
    converted
}

fn rule(rule: &Rule, waypoint: Option<&Identity<'_>>) -> wire::AuthorizationRule {
    let lets_through = |source: &Source| waypoint.is_some_and(|of| of.is_named_by(source));
    let from = match rule.from.iter().any(lets_through) {
        true => Vec::new(),
        false => rule.from.iter().map(source).collect(),
    };
    let is_about_waypoint = |condition: &When| match condition {
        When::SourcePrincipal(values) => waypoint.is_some_and(|of| of.is_principal(values)),
        When::SourceServiceAccount(values) => waypoint.is_some_and(|of| of.is_account(values)),
        _ => false,
    };
    let when = rule.when.iter().filter(|when| !is_about_waypoint(when));
    wire::AuthorizationRule {
        from,
        to: rule.to.iter().map(operation).collect(),
        when: when.map(condition).collect(),
    }
}

/// Who a waypoint is.
struct Identity<'a> {
    waypoint: &'a WaypointName,
    accounts: BTreeSet<Arc<str>>,
    mesh: &'a MeshConfig,
}

impl<'a> Identity<'a> {
    fn of(waypoint: &'a WaypointName, view: &View<'a>) -> Self {
        let of = view.namespace(&waypoint.namespace);
        Self {
            waypoint,
            accounts: of.map(|of| accounts_of(waypoint, of)).unwrap_or_default(),
            mesh: view.mesh,
        }
    }

    /// Whether a source names it, and asks for nothing else.
    fn is_named_by(&self, source: &Source) -> bool {
        let Source {
            principals,
            namespaces,
            service_accounts,
            trust_domains,
            ip_blocks,
            remote_ip_blocks,
            request_principals,
        } = source;
        let others = namespaces.is_empty()
            && trust_domains.is_empty()
            && ip_blocks.is_empty()
            && remote_ip_blocks.is_empty()
            && request_principals.is_empty();
        let by_principal = self.is_principal(principals) && service_accounts.is_empty();
        let by_account = self.is_account(service_accounts) && principals.is_empty();
        others && (by_principal || by_account)
    }

    fn is_principal(&self, values: &Values<StringMatch>) -> bool {
        let is_ours = |value: &StringMatch| {
            let StringMatch::Exact(text) = value else {
                return false;
            };
            let Some((domain, rest)) = text.split_once('/') else {
                return false;
            };
            let mut ours = std::iter::once(&self.mesh.trust_domain)
                .chain(&self.mesh.trust_domain_aliases)
                .map(TrustDomain::as_str)
                .chain([TrustDomain::DEFAULT]);
            let prefix = format!("ns/{}/sa/", self.waypoint.namespace);
            let account = rest.strip_prefix(&prefix);
            ours.any(|known| known == domain)
                && account.is_some_and(|account| self.accounts.contains(account))
        };
        values.none.is_empty() && values.any.iter().any(is_ours)
    }

    fn is_account(&self, values: &Values<AccountMatch>) -> bool {
        let is_ours = |account: &AccountMatch| {
            account.namespace == self.waypoint.namespace && self.accounts.contains(&account.name)
        };
        values.none.is_empty() && values.any.iter().any(is_ours)
    }
}

fn source(source: &Source) -> wire::Source {
    let Source {
        principals,
        namespaces,
        service_accounts,
        trust_domains,
        ip_blocks,
        remote_ip_blocks,
        request_principals,
    } = source;
    wire::Source {
        principals: patterns(&principals.any),
        not_principals: patterns(&principals.none),
        request_principals: request_principals.any.clone(),
        not_request_principals: request_principals.none.clone(),
        namespaces: patterns(&namespaces.any),
        not_namespaces: patterns(&namespaces.none),
        ip_blocks: texts(&ip_blocks.any),
        not_ip_blocks: texts(&ip_blocks.none),
        remote_ip_blocks: texts(&remote_ip_blocks.any),
        not_remote_ip_blocks: texts(&remote_ip_blocks.none),
        service_accounts: accounts(&service_accounts.any),
        not_service_accounts: accounts(&service_accounts.none),
        trust_domains: patterns(&trust_domains.any),
        not_trust_domains: patterns(&trust_domains.none),
    }
}

fn operation(operation: &Operation) -> wire::Operation {
    let Operation {
        ports,
        hosts,
        methods,
        paths,
    } = operation;
    let numbers = |ports: &[u16]| ports.iter().map(|port| u32::from(*port)).collect();
    wire::Operation {
        hosts: hosts.any.clone(),
        not_hosts: hosts.none.clone(),
        ports: numbers(&ports.any),
        not_ports: numbers(&ports.none),
        methods: methods.any.clone(),
        not_methods: methods.none.clone(),
        paths: paths.any.clone(),
        not_paths: paths.none.clone(),
    }
}

fn condition(condition: &When) -> wire::Condition {
    let make = |key: &str, values: Vec<String>, not_values: Vec<String>| wire::Condition {
        key: key.into(),
        values,
        not_values,
    };
    let matched = |key, of: &Values<StringMatch>| make(key, patterns(&of.any), patterns(&of.none));
    match condition {
        When::SourceIp(of) => make("source.ip", texts(&of.any), texts(&of.none)),
        When::RemoteIp(of) => make("remote.ip", texts(&of.any), texts(&of.none)),
        When::DestinationIp(of) => make("destination.ip", texts(&of.any), texts(&of.none)),
        When::DestinationPort(of) => make("destination.port", texts(&of.any), texts(&of.none)),
        When::SourceNamespace(of) => matched("source.namespace", of),
        When::SourcePrincipal(of) => matched("source.principal", of),
        When::SourceTrustDomain(of) => matched("source.trustDomain", of),
        When::SourceServiceAccount(of) => make(
            "source.serviceAccount",
            accounts(&of.any),
            accounts(&of.none),
        ),
        When::L7 { key, values } => make(key, values.any.clone(), values.none.clone()),
    }
}

fn texts(values: &[impl ToString]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

/// As the user wrote them.
fn patterns(values: &[StringMatch]) -> Vec<String> {
    let text = |value: &StringMatch| match value {
        StringMatch::Exact(text) => text.clone(),
        StringMatch::Prefix(text) => format!("{text}*"),
        StringMatch::Suffix(text) => format!("*{text}"),
        StringMatch::Presence => "*".into(),
    };
    values.iter().map(text).collect()
}

fn accounts(values: &[AccountMatch]) -> Vec<String> {
    let text = |of: &AccountMatch| format!("{}/{}", of.namespace, of.name);
    values.iter().map(text).collect()
}
