//! What waypoints are told by policies, rules and the mesh configuration, and what of it
//! leads nowhere.

use super::Report;
use crate::compile::MeshConfig;
use crate::compile::l7::{self, MeshSettings, View, Waypoints};
use crate::model::{
    At, Code, DestinationRule, Kind, Meta, NamespaceObjects, ObjectRef, Objects, PolicyScope,
    Severity, selects,
};

pub(super) fn check(objects: &Objects, mesh: &MeshConfig, report: &mut Report) {
    let settings = MeshSettings::of(objects, mesh);
    if let Some((source, map)) = settings.source() {
        for error in &map.errors {
            report.add(
                (Kind::ConfigMap, &source.meta),
                error.path.clone(),
                Severity::Error,
                Code::SchemaValidationError,
                error.message.clone(),
            );
        }
    }
    let mesh = &settings.effective(mesh);
    let waypoints = Waypoints::of(objects, &mesh.network, mesh);
    let known = |name: &str| {
        let mut providers = settings.providers().iter();
        providers.any(|provider| provider.name == name)
    };
    for (name, of) in &objects.namespaces {
        let view = View::new(name, objects, &waypoints, mesh);
        let statuses = l7::compile_namespace(of, &view).statuses;
        for (object, status) in &statuses {
            let Some((meta, scope)) = targeting(object, of) else {
                continue;
            };
            if !matches!(scope, PolicyScope::Targets(_)) {
                continue;
            }
            let conditions = status.conditions.iter();
            // What is invalid was reported where it was read.
            let bad = conditions.filter(|of| {
                of.reason == "PartiallyInvalid" || (!of.status && of.reason != "Invalid")
            });
            for condition in bad {
                let code = match condition.reason.as_str() {
                    "TargetNotFound" => Code::ReferencedResourceNotFound,
                    "AncestorNotBound" => Code::IneffectivePolicy,
                    _ => Code::NegativeConditionStatus,
                };
                let spec = At::ROOT.key("spec");
                report.add(
                    (object.kind, meta),
                    spec.key("targetRefs").path(),
                    Severity::Warning,
                    code,
                    format!("{}: {}", condition.reason, condition.message),
                );
            }
        }
        check_providers(of, &known, report);
        for rule in of.destination_rules.values() {
            check_rule(rule, objects, mesh, report);
        }
    }
}

fn targeting<'a>(
    object: &ObjectRef,
    of: &'a NamespaceObjects,
) -> Option<(&'a Meta, &'a PolicyScope)> {
    Some(match object.kind {
        Kind::AuthorizationPolicy => {
            let policy = of.authorization_policies.get(&object.name)?;
            (&policy.meta, policy.scope())
        }
        Kind::RequestAuthentication => {
            let policy = of.request_authentications.get(&object.name)?;
            (&policy.meta, &policy.scope)
        }
        Kind::Telemetry => {
            let telemetry = of.telemetries.get(&object.name)?;
            (&telemetry.meta, &telemetry.scope)
        }
        _ => return None,
    })
}

fn check_providers(of: &NamespaceObjects, known: &dyn Fn(&str) -> bool, report: &mut Report) {
    let spec_at = At::ROOT.key("spec");
    for policy in of.authorization_policies.values() {
        let Ok(spec) = &policy.spec else {
            continue;
        };
        if !spec.provider.is_empty() && !known(&spec.provider) {
            let at = spec_at.key("provider");
            report.add(
                (Kind::AuthorizationPolicy, &policy.meta),
                at.key("name").path(),
                Severity::Error,
                Code::ReferencedResourceNotFound,
                format!(
                    "the mesh configuration has no provider {:?}: what matches is denied",
                    spec.provider
                ),
            );
        }
    }
    for telemetry in of.telemetries.values() {
        let tracing = telemetry.tracing.iter().flat_map(|of| &of.providers);
        let logging = telemetry.access_logging.iter().flat_map(|of| &of.providers);
        // Istio's names for what needs no declaration.
        let named = tracing
            .map(|name| ("tracing", name))
            .chain(logging.map(|name| ("accessLogging", name)))
            .filter(|(_, name)| !matches!(name.as_str(), "envoy" | "prometheus"));
        for (key, name) in named.filter(|(_, name)| !known(name)) {
            report.add(
                (Kind::Telemetry, &telemetry.meta),
                spec_at.key(key).path(),
                Severity::Warning,
                Code::ReferencedResourceNotFound,
                format!("the mesh configuration has no provider {name:?}"),
            );
        }
    }
}

fn check_rule(rule: &DestinationRule, objects: &Objects, mesh: &MeshConfig, report: &mut Report) {
    let object = (Kind::DestinationRule, &rule.meta);
    let spec = At::ROOT.key("spec");
    if rule.for_some_clients {
        report.add(
            object,
            spec.key("workloadSelector").path(),
            Severity::Warning,
            Code::IneffectivePolicy,
            "is for the sidecars of some clients; there are none in this mesh".into(),
        );
    }
    let host = l7::resolved_host(rule, mesh);
    if host.starts_with('*') || host.is_empty() {
        return;
    }
    let suffix = format!(".svc.{}", mesh.cluster_domain);
    let place = host.strip_suffix(&suffix).and_then(|of| of.split_once('.'));
    let of = place.and_then(|(_, namespace)| objects.namespaces.get(namespace));
    let service = place.and_then(|(name, _)| of?.services.get(name));
    let (Some(of), Some(service)) = (of, service) else {
        report.add(
            object,
            spec.key("host").path(),
            Severity::Warning,
            Code::UnknownDestinationRuleHost,
            format!("there is no service {host:?}; write <name> or <name>.<namespace>{suffix}"),
        );
        return;
    };
    let list = spec.key("subsets");
    for (index, subset) in rule.subsets.iter().enumerate() {
        let mut pods = of.pods.values().map(|pod| &pod.meta.labels);
        let any = pods
            .any(|labels| selects(&service.selector, labels) && selects(&subset.labels, labels));
        if !any {
            report.add(
                object,
                list.index(index).path(),
                Severity::Error,
                Code::DestinationRuleSubsetNotSelectPods,
                format!("subset {:?} selects no pod of the service", subset.name),
            );
        }
    }
}
