//! DestinationRules to the traffic policies of waypoints.
//!
//! For a service one rule is in force at a waypoint: the first found in the waypoint's
//! namespace (Istio: the client's), the service's, the root namespace; among those of a
//! namespace the one with the closest host, then the oldest. The subsets of the others of
//! the same host and namespace are added to it, as Istio merges them. A rule holds where
//! `exportTo` names the waypoint's namespace or the service's.

use std::sync::Arc;

use adit_shared::proto::waypoint as wire;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::Part;
use super::resource::{Resource, object};
use super::view::View;
use super::waypoints::WaypointName;
use crate::compile::mesh::MeshConfig;
use crate::compile::workloads::pod_uid;
use crate::model::{DestinationRule, Kind, Labels, NamespaceObjects, TrafficPolicy, selects};

/// Gives `waypoint` the rule for a service.
pub(super) fn give(
    waypoint: &WaypointName,
    namespace: &str,
    name: &str,
    view: &View<'_>,
    part: &mut Part,
) {
    let hostname = view.mesh.hostname(namespace, name);
    let own: &str = &waypoint.namespace;
    let mut places = vec![own];
    for place in [namespace, &*view.mesh.root_namespace] {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    for place in places {
        let Some(of) = view.namespace(place) else {
            continue;
        };
        let mut rules: Vec<&DestinationRule> = of
            .destination_rules
            .values()
            .map(|rule| &**rule)
            .filter(|rule| view.mesh.owns(&rule.meta) && !rule.for_some_clients)
            .filter(|rule| {
                let to = rule.export_to.as_ref();
                to.is_none_or(|to| to.contains(own) || to.contains(namespace))
            })
            .filter(|rule| covers(&resolved_host(rule, view.mesh), &hostname))
            .collect();
        // An exact host is longer than any that covers it.
        rules.sort_by(|a, b| {
            let rank = |rule: &DestinationRule| {
                let host = resolved_host(rule, view.mesh);
                (host.starts_with('*'), std::cmp::Reverse(host.len()))
            };
            let seniority = a.meta.seniority().cmp(&b.meta.seniority());
            rank(a).cmp(&rank(b)).then(seniority)
        });
        let Some((rule, others)) = rules.split_first() else {
            continue;
        };
        let host = resolved_host(rule, view.mesh);
        let same = others
            .iter()
            .filter(|other| resolved_host(other, view.mesh) == host);
        let policy = convert(rule, same.copied(), &host, of, view);
        part.give(
            waypoint,
            &Arc::new(Resource::TrafficPolicy(Box::new(policy))),
        );
        return;
    }
}

/// The host with a short name made long.
pub(crate) fn resolved_host(rule: &DestinationRule, mesh: &MeshConfig) -> String {
    let host = rule.host.to_ascii_lowercase();
    match host.contains('.') || host.starts_with('*') {
        true => host,
        false => mesh.hostname(&rule.meta.namespace, &host),
    }
}

fn covers(host: &str, hostname: &str) -> bool {
    match host.strip_prefix('*') {
        Some(suffix) => hostname.len() > suffix.len() && hostname.ends_with(suffix),
        None => host == hostname,
    }
}

fn convert<'a>(
    rule: &'a DestinationRule,
    others: impl Iterator<Item = &'a DestinationRule>,
    host: &str,
    of: &NamespaceObjects,
    view: &View<'_>,
) -> wire::TrafficPolicy {
    let errors: Vec<_> = rule.errors.iter().map(ToString::to_string).collect();
    let mut policy = wire::TrafficPolicy {
        object: Some(object(&rule.meta, Kind::DestinationRule)),
        host: host.to_owned(),
        invalid: errors.join("; "),
        ..wire::TrafficPolicy::default()
    };
    if !policy.invalid.is_empty() {
        return policy;
    }
    policy.settings = Some(settings(&rule.policy, of));
    let ports = rule.ports.iter();
    policy.port_settings = ports
        .map(|(port, policy)| (u32::from(*port), settings(policy, of)))
        .collect();
    let others = others.filter(|other| other.errors.is_empty());
    for from in std::iter::once(rule).chain(others) {
        for subset in &from.subsets {
            if policy
                .subsets
                .iter()
                .any(|known| *known.name == *subset.name)
            {
                continue;
            }
            policy.subsets.push(wire::Subset {
                name: subset.name.to_string(),
                settings: subset.policy.as_ref().map(|policy| settings(policy, of)),
                workloads: workloads(&subset.labels, host, rule, view),
            });
        }
    }
    policy
}

/// The pods with these labels in the namespace that the host is of; where the host does
/// not say, in the rule's. The waypoint takes those of them that are endpoints.
fn workloads(labels: &Labels, host: &str, rule: &DestinationRule, view: &View<'_>) -> Vec<String> {
    let suffix = format!(".svc.{}", view.mesh.cluster_domain);
    let namespace = host
        .strip_suffix(&suffix)
        .and_then(|short| short.rsplit_once('.'))
        .map_or(&*rule.meta.namespace, |(_, namespace)| namespace);
    let pods = view.namespace(namespace).into_iter();
    let pods = pods.flat_map(|of| of.pods.values());
    let live = pods.filter(|pod| !pod.phase.is_terminal() && !pod.addresses.is_empty());
    live.filter(|pod| selects(labels, &pod.meta.labels))
        .map(|pod| pod_uid(pod, view.mesh))
        .collect()
}

fn settings(policy: &TrafficPolicy, of: &NamespaceObjects) -> wire::TrafficSettings {
    let mut settings = policy.settings.clone();
    if let (Some(tls), Some(name)) = (&mut settings.tls, &policy.credential) {
        match certificates(name, of) {
            Ok(pem) => tls.ca_certificates = pem,
            Err(reason) => tls.invalid = reason,
        }
    }
    settings
}

/// The authorities in a Secret, or in the one that Istio's users keep them apart in.
fn certificates(name: &Arc<str>, of: &NamespaceObjects) -> Result<String, String> {
    let apart: Arc<str> = format!("{name}-cacert").into();
    let secrets = [of.secrets.get(name), of.secrets.get(&apart)];
    if secrets.iter().all(Option::is_none) {
        return Err(format!("there is no Secret {name:?}"));
    }
    let found = secrets
        .into_iter()
        .flatten()
        .find_map(|secret| secret.certificates.as_ref());
    let pem = found.ok_or_else(|| format!("Secret {name:?} has no ca.crt"))?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(pem.to_string()),
        _ => Err(format!("ca.crt of Secret {name:?} holds no certificate")),
    }
}
