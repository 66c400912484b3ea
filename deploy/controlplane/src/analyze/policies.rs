//! Policies that have no effect, less than they seem to, or another than was meant.

use std::collections::BTreeSet;

use super::Report;
use crate::compile::{MeshConfig, convert_authorization_policy};
use crate::model::{
    AccountMatch, At, AuthorizationPolicy, Code, Kind, Labels, Meta, NamespaceObjects, Objects,
    PeerAuthentication, PolicyScope, PolicySpec, Severity, StringMatch, TargetPort, selects,
};

pub(super) fn check(objects: &Objects, mesh: &MeshConfig, report: &mut Report) {
    for of in objects.namespaces.values() {
        for policy in of.authorization_policies.values() {
            check_authorization(policy, of, objects, mesh, report);
        }
        check_peers(of, objects, mesh, report);
    }
}

/// Says if the policy is for another control plane.
fn is_foreign((kind, meta): (Kind, &Meta), mesh: &MeshConfig, report: &mut Report) -> bool {
    let Some(revision) = meta
        .label("istio.io/rev")
        .filter(|rev| **rev != *mesh.revision)
    else {
        return false;
    };
    let metadata = At::ROOT.key("metadata");
    let labels = metadata.key("labels");
    report.add(
        (kind, meta),
        labels.key("istio.io/rev").path(),
        Severity::Info,
        Code::IneffectivePolicy,
        format!(
            "belongs to revision {revision:?}; this is {:?}",
            mesh.revision
        ),
    );
    true
}

fn selects_any(selector: &Labels, meta: &Meta, objects: &Objects, mesh: &MeshConfig) -> bool {
    let everywhere = meta.namespace == mesh.root_namespace;
    objects
        .namespaces
        .iter()
        .filter(|(name, _)| everywhere || **name == meta.namespace)
        .flat_map(|(_, of)| of.pods.values())
        .any(|pod| selects(selector, &pod.meta.labels))
}

fn no_match((kind, meta): (Kind, &Meta), report: &mut Report) {
    let spec = At::ROOT.key("spec");
    report.add(
        (kind, meta),
        spec.key("selector").path(),
        Severity::Warning,
        Code::NoMatchingWorkloadsFound,
        "selects no pod".into(),
    );
}

fn check_authorization(
    policy: &AuthorizationPolicy,
    of: &NamespaceObjects,
    objects: &Objects,
    mesh: &MeshConfig,
    report: &mut Report,
) {
    let object = (Kind::AuthorizationPolicy, &policy.meta);
    if is_foreign(object, mesh, report) {
        return;
    }
    let spec_at = At::ROOT.key("spec");
    match policy.scope() {
        PolicyScope::Selector(selector) => {
            if !selects_any(selector, &policy.meta, objects, mesh) {
                no_match(object, report);
            }
        }
        PolicyScope::Targets(_) | PolicyScope::Namespace => {}
    }
    // Its errors have been reported where it was read.
    let Ok(spec) = &policy.spec else {
        return;
    };
    let condition = convert_authorization_policy(policy, mesh).condition;
    if let Some(condition) = condition.filter(|condition| !condition.status) {
        report.add(
            object,
            spec_at.path(),
            Severity::Warning,
            Code::NegativeConditionStatus,
            format!(
                "{}: {}: {}",
                condition.kind, condition.reason, condition.message
            ),
        );
    }
    check_references(object, spec, objects, report);
    check_ports(object, spec, of, report);
}

fn check_references(
    object: (Kind, &Meta),
    spec: &PolicySpec,
    objects: &Objects,
    report: &mut Report,
) {
    let spec_at = At::ROOT.key("spec");
    let rules = spec_at.key("rules");
    for (rule_index, rule) in spec.rules.iter().enumerate() {
        let at = rules.index(rule_index);
        let from = at.key("from");
        for (index, source) in rule.from.iter().enumerate() {
            let at = from.index(index);
            let at = at.key("source");
            for (key, list) in [
                ("namespaces", &source.namespaces.any),
                ("notNamespaces", &source.namespaces.none),
            ] {
                let at = at.key(key);
                for (index, namespace) in list.iter().enumerate() {
                    if let StringMatch::Exact(name) = namespace
                        && !objects.namespaces.contains_key(name.as_str())
                    {
                        report.add(
                            object,
                            at.index(index).path(),
                            Severity::Error,
                            Code::ReferencedResourceNotFound,
                            format!("there is no namespace {name:?}"),
                        );
                    }
                }
            }
            for (key, list) in [
                ("serviceAccounts", &source.service_accounts.any),
                ("notServiceAccounts", &source.service_accounts.none),
            ] {
                let at = at.key(key);
                for (index, account) in list.iter().enumerate() {
                    if !exists(account, objects) {
                        report.add(
                            object,
                            at.index(index).path(),
                            Severity::Warning,
                            Code::ReferencedResourceNotFound,
                            format!(
                                "there is no service account \"{}/{}\"",
                                account.namespace, account.name
                            ),
                        );
                    }
                }
            }
        }
    }
}

fn exists(account: &AccountMatch, objects: &Objects) -> bool {
    objects
        .namespaces
        .get(&account.namespace)
        .is_some_and(|of| {
            &*account.name == "default"
                || of.service_accounts.contains_key(&account.name)
                || of
                    .pods
                    .values()
                    .any(|pod| pod.service_account == account.name)
        })
}

/// A policy sees the port that the workload listens on, not the one that clients dial.
fn check_ports(
    object: (Kind, &Meta),
    spec: &PolicySpec,
    of: &NamespaceObjects,
    report: &mut Report,
) {
    let named = of.pods.values().flat_map(|pod| &pod.named_ports);
    let service_ports = || of.services.values().flat_map(|service| &service.ports);
    let listened: BTreeSet<u16> = service_ports()
        .filter_map(|port| match port.target {
            TargetPort::Number(number) => Some(number),
            TargetPort::Name(_) => None,
        })
        .chain(named.map(|port| port.number))
        .collect();
    let spec_at = At::ROOT.key("spec");
    let rules = spec_at.key("rules");
    for (rule_index, rule) in spec.rules.iter().enumerate() {
        let at = rules.index(rule_index);
        let to = at.key("to");
        for (index, operation) in rule.to.iter().enumerate() {
            let at = to.index(index);
            let at = at.key("operation");
            for (key, list) in [
                ("ports", &operation.ports.any),
                ("notPorts", &operation.ports.none),
            ] {
                let at = at.key(key);
                for (index, port) in list.iter().enumerate() {
                    let dialled = service_ports().find(|found| found.number == *port);
                    let Some(dialled) = dialled.filter(|_| !listened.contains(port)) else {
                        continue;
                    };
                    let target = match &dialled.target {
                        TargetPort::Number(number) => number.to_string(),
                        TargetPort::Name(name) => format!("named {name:?}"),
                    };
                    report.add(
                        object,
                        at.index(index).path(),
                        Severity::Warning,
                        Code::ServicePortInPolicy,
                        format!("{port} is a port of a Service; the policy sees the port of the workload, {target}"),
                    );
                }
            }
        }
    }
}

fn check_peers(of: &NamespaceObjects, objects: &Objects, mesh: &MeshConfig, report: &mut Report) {
    let mut peers: Vec<&PeerAuthentication> = Vec::new();
    for peer in of.peer_authentications.values() {
        if !is_foreign((Kind::PeerAuthentication, &peer.meta), mesh, report) {
            peers.push(peer);
        }
    }
    peers.sort_by(|a, b| a.meta.seniority().cmp(&b.meta.seniority()));
    let mut unselective: Option<&PeerAuthentication> = None;
    for (position, peer) in peers.iter().enumerate() {
        let object = (Kind::PeerAuthentication, &peer.meta);
        let spec = At::ROOT.key("spec");
        if peer.selector.is_empty() {
            match unselective {
                None => unselective = Some(peer),
                Some(older) => report.add(
                    object,
                    spec.path(),
                    Severity::Warning,
                    Code::Conflict,
                    format!(
                        "has no effect: {:?} covers the same pods and is older",
                        older.meta.name
                    ),
                ),
            }
            continue;
        }
        if peer.meta.namespace == mesh.root_namespace {
            report.add(
                object,
                spec.key("selector").path(),
                Severity::Warning,
                Code::IneffectivePolicy,
                "has no effect: selectors are ignored in the root namespace".into(),
            );
            continue;
        }
        if !selects_any(&peer.selector, &peer.meta, objects, mesh) {
            no_match(object, report);
            continue;
        }
        let shadowing = peers[..position].iter().find(|older| {
            !older.selector.is_empty()
                && of.pods.values().any(|pod| {
                    selects(&older.selector, &pod.meta.labels)
                        && selects(&peer.selector, &pod.meta.labels)
                })
        });
        if let Some(older) = shadowing {
            report.add(
                object,
                spec.key("selector").path(),
                Severity::Warning,
                Code::Conflict,
                format!(
                    "has no effect on pods that {:?} selects too, which is older",
                    older.meta.name
                ),
            );
        }
    }
}
