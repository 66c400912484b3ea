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
use crate::model::{DestinationRule, Kind, Labels, Meta, NamespaceObjects, TrafficPolicy, selects};

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
        let same: Vec<&DestinationRule> = same.copied().collect();
        let place = Place {
            of,
            own: place == own,
        };
        let policy = convert(rule, same.iter().copied(), &host, place, view);
        for from in std::iter::once(*rule).chain(same) {
            for secret in client_secrets(from, place) {
                part.give(waypoint, &Arc::new(Resource::Secret(secret)));
            }
        }
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
    place: Place<'_>,
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
    policy.settings = Some(settings(&rule.policy, place));
    let ports = rule.ports.iter();
    policy.port_settings = ports
        .map(|(port, policy)| (u32::from(*port), settings(policy, place)))
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
                settings: subset.policy.as_ref().map(|policy| settings(policy, place)),
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

/// Where a rule is from.
#[derive(Clone, Copy)]
struct Place<'a> {
    of: &'a NamespaceObjects,
    /// It is the waypoint's own namespace.
    own: bool,
}

fn settings(policy: &TrafficPolicy, place: Place<'_>) -> wire::TrafficSettings {
    let mut settings = policy.settings.clone();
    if let (Some(tls), Some(name)) = (&mut settings.tls, &policy.credential) {
        match certificates(name, place.of) {
            Ok(pem) => tls.ca_certificates = pem,
            Err(reason) => tls.invalid = reason,
        }
        if tls.mode() == wire::client_tls::Mode::Mutual {
            match place.of.secrets.get(name) {
                // Whoever runs the waypoint would have the key (Istio, too, reads it from the
                // proxy's namespace alone).
                Some(_) if !place.own => {
                    tls.invalid = format!("Secret {name:?} is not of the waypoint's namespace");
                }
                Some(secret) if secret.client.is_some() => {
                    tls.client_secret = secret_name(&secret.meta);
                }
                Some(_) => {
                    tls.invalid = format!("Secret {name:?} has no tls.crt with a tls.key");
                }
                // Said above.
                None => {}
            }
        }
    }
    settings
}

/// The certificates that connections by a rule show to their servers.
fn client_secrets<'a>(
    rule: &'a DestinationRule,
    place: Place<'a>,
) -> impl Iterator<Item = wire::Secret> + 'a {
    let subsets = rule
        .subsets
        .iter()
        .filter_map(|subset| subset.policy.as_ref());
    let policies = std::iter::once(&rule.policy)
        .chain(rule.ports.values())
        .chain(subsets);
    policies.filter_map(move |policy| {
        let tls = policy.settings.tls.as_ref()?;
        let secret = place.of.secrets.get(policy.credential.as_ref()?)?;
        let client = secret.client.as_ref()?;
        let given = place.own && tls.mode() == wire::client_tls::Mode::Mutual;
        given.then(|| wire::Secret {
            name: secret_name(&secret.meta),
            certificate_chain: client.chain.to_string(),
            private_key: client.key.to_string(),
            ..wire::Secret::default()
        })
    })
}

/// What waypoints call a Secret.
pub(super) fn secret_name(meta: &Meta) -> String {
    format!("{}/{}", meta.namespace, meta.name)
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
