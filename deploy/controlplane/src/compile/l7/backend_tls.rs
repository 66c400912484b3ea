//! TLS towards backends.
//!
//! Of several policies for a port of a service the oldest is in force; one for a single
//! port goes before one for all, and the two do not contradict each other. A waypoint whose
//! Gateway names a certificate (`tls.backend.clientCertificateRef`) shows it to all of them.

use std::sync::Arc;

use adit_shared::proto::waypoint as wire;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::Part;
use super::destination_rules::secret_name;
use super::resource::{Resource, object};
use super::services::reference;
use super::view::View;
use super::waypoints::WaypointName;
use crate::compile::mesh::MeshConfig;
use crate::model::{
    BackendTlsPolicy, BackendTlsTarget, CA_KEY, CaReference, CertificateRef, Kind, NamespaceObjects,
};
use crate::status::{Condition, ObjectStatus, ParentStatus, RefStatus};

/// Gives `waypoint` the policies for a service.
pub(super) fn give(
    waypoint: &WaypointName,
    namespace: &str,
    name: &str,
    view: &View<'_>,
    part: &mut Part,
) {
    let Some(of) = view.namespace(namespace) else {
        return;
    };
    let client = client_certificate(waypoint, view);
    for policy in of.backend_tls_policies.values() {
        let is_for = policy.targets.iter().any(|target| *target.name == *name);
        if is_for && view.mesh.owns(&policy.meta) {
            let mut policy = convert(policy, of, view.mesh);
            if let (Some(client), Some(tls)) = (&client, &mut policy.tls) {
                match client {
                    Ok(secret) => {
                        tls.mode = wire::client_tls::Mode::Mutual.into();
                        tls.client_secret.clone_from(&secret.name);
                        let secret = Resource::Secret(secret.clone());
                        part.give(waypoint, &Arc::new(secret));
                    }
                    // Without it, servers would take the waypoint for somebody else.
                    Err((_, message)) if tls.invalid.is_empty() => tls.invalid.clone_from(message),
                    Err(_) => {}
                }
            }
            part.give(waypoint, &Arc::new(Resource::BackendTls(policy)));
        }
    }
}

/// What a waypoint shows to its backends, if its Gateway says.
///
/// # Errors
/// Why there is none, in one word (`ResolvedRefs`) and for people.
pub(super) fn client_certificate(
    waypoint: &WaypointName,
    view: &View<'_>,
) -> Option<Result<wire::Secret, Fault>> {
    let of = view.namespace(&waypoint.namespace)?;
    let gateway = of.gateways.get(&waypoint.name)?;
    let reference = gateway.client_certificate.as_ref()?;
    Some(find_client(reference, waypoint, view))
}

fn find_client(
    reference: &CertificateRef,
    waypoint: &WaypointName,
    view: &View<'_>,
) -> Result<wire::Secret, Fault> {
    let CertificateRef {
        group,
        kind,
        name,
        namespace,
    } = reference;
    let wrong = |message| Err(("InvalidClientCertificateRef", message));
    if !matches!((&**group, &**kind), ("" | "core", "Secret")) {
        return wrong(format!(
            "{kind} {name:?} is no certificate: only a Secret is"
        ));
    }
    let namespace = namespace.as_ref().unwrap_or(&waypoint.namespace);
    let of = view.namespace(namespace);
    if *namespace != waypoint.namespace {
        let mut grants = of.into_iter().flat_map(|of| of.reference_grants.values());
        let to = (Kind::Secret, &**name);
        if !grants.any(|grant| grant.admits(Kind::Gateway, &waypoint.namespace, to)) {
            let message = format!(
                "no ReferenceGrant in {namespace} allows a Gateway of {} to refer to Secret {name:?}",
                waypoint.namespace
            );
            return Err(("RefNotPermitted", message));
        }
    }
    let full = format!("Secret {namespace}/{name}");
    let Some(secret) = of.and_then(|of| of.secrets.get(name)) else {
        return wrong(format!("there is no {full}"));
    };
    let Some(client) = &secret.client else {
        return wrong(format!("{full} has no tls.crt with a tls.key"));
    };
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(client.chain.as_bytes()).collect();
    if !chain.is_ok_and(|chain| !chain.is_empty()) {
        return wrong(format!("tls.crt of {full} holds no certificate"));
    }
    if PrivateKeyDer::from_pem_slice(client.key.as_bytes()).is_err() {
        return wrong(format!("tls.key of {full} is no private key"));
    }
    Ok(wire::Secret {
        name: secret_name(&secret.meta),
        certificate_chain: client.chain.to_string(),
        private_key: client.key.to_string(),
        ..wire::Secret::default()
    })
}

/// Says what came of the policies of a namespace.
pub(super) fn compile(objects: &NamespaceObjects, view: &View<'_>, part: &mut Part) {
    for policy in objects.backend_tls_policies.values() {
        if !view.mesh.owns(&policy.meta) {
            continue;
        }
        let (tls, fault) = tls(policy, objects);
        let ancestors = policy.targets.iter().map(|target| {
            let accepted = match decide(policy, target, objects, view.mesh) {
                Err(rejection) => Condition::new("Accepted", false, rejection.0, rejection.1),
                Ok(_) if !tls.invalid.is_empty() => {
                    let reason = match &fault {
                        Some(_) => "NoValidCACertificate",
                        None => "Invalid",
                    };
                    let message = format!("connections fail: {}", tls.invalid);
                    Condition::new("Accepted", false, reason, message)
                }
                Ok(_) => Condition::new("Accepted", true, "Accepted", "is in force"),
            };
            let resolved = match &fault {
                Some(fault) => Condition::new("ResolvedRefs", false, fault.0, &fault.1),
                None => Condition::new("ResolvedRefs", true, "ResolvedRefs", "are there"),
            };
            ParentStatus {
                reference: RefStatus {
                    kind: "Service".into(),
                    name: target.name.to_string(),
                    section: target.section.as_deref().map(ToOwned::to_owned),
                    ..RefStatus::default()
                },
                conditions: vec![accepted, resolved],
            }
        });
        let status = ObjectStatus {
            ancestors: ancestors.collect(),
            ..ObjectStatus::default()
        };
        *part.status(policy.meta.reference(Kind::BackendTlsPolicy)) = status;
    }
}

fn convert(
    policy: &BackendTlsPolicy,
    of: &NamespaceObjects,
    mesh: &MeshConfig,
) -> wire::BackendTls {
    let targets = policy.targets.iter().map(|target| {
        let decided = decide(policy, target, of, mesh);
        wire::BackendTlsTarget {
            service: Some(reference(&policy.meta.namespace, &target.name, mesh)),
            port: decided.as_ref().copied().unwrap_or_default().into(),
            rejected: decided.err().map(|(_, why)| why).unwrap_or_default(),
        }
    });
    wire::BackendTls {
        object: Some(object(&policy.meta, Kind::BackendTlsPolicy)),
        targets: targets.collect(),
        tls: Some(tls(policy, of).0),
    }
}

/// In one word, and for people.
type Fault = (&'static str, String);

/// The port that a policy is in force for at a target; 0: all.
fn decide(
    policy: &BackendTlsPolicy,
    target: &BackendTlsTarget,
    of: &NamespaceObjects,
    mesh: &MeshConfig,
) -> Result<u16, Fault> {
    let name = &target.name;
    let not_found = |message| Err(("TargetNotFound", message));
    let Some(service) = of.services.get(name) else {
        return not_found(format!("there is no Service {name:?}"));
    };
    let port = match &target.section {
        None => 0,
        Some(section) => match service.ports.iter().find(|port| port.name == *section) {
            Some(port) => port.number,
            None => return not_found(format!("Service {name:?} has no port {section:?}")),
        },
    };
    let rivals = of.backend_tls_policies.values().filter(|rival| {
        mesh.owns(&rival.meta) && rival.targets.iter().any(|other| other == target)
    });
    let winner = rivals.min_by(|a, b| a.meta.seniority().cmp(&b.meta.seniority()));
    match winner {
        Some(winner) if winner.meta.name != policy.meta.name => Err((
            "Conflicted",
            format!(
                "BackendTLSPolicy {:?} is older and for the same",
                winner.meta.name
            ),
        )),
        _ => Ok(port),
    }
}

/// The settings, and what is wrong with the certificates that they refer to.
fn tls(policy: &BackendTlsPolicy, of: &NamespaceObjects) -> (wire::ClientTls, Option<Fault>) {
    let mut tls = wire::ClientTls {
        mode: wire::client_tls::Mode::Simple.into(),
        sni: policy.hostname.to_string(),
        subject_alt_names: policy
            .subject_alt_names
            .iter()
            .map(ToString::to_string)
            .collect(),
        system_roots: policy.system_roots,
        ..wire::ClientTls::default()
    };
    if let Some(error) = policy.errors.first() {
        tls.invalid = error.to_string();
        return (tls, None);
    }
    let mut fault = None;
    for reference in &policy.certificates {
        match certificates(reference, of) {
            Ok(pem) => {
                tls.ca_certificates.push_str(&pem);
                if !pem.ends_with('\n') {
                    tls.ca_certificates.push('\n');
                }
            }
            Err(found) => {
                fault.get_or_insert(found);
            }
        }
    }
    // One good reference is enough to verify with.
    if tls.ca_certificates.is_empty() && !policy.system_roots {
        tls.invalid = match &fault {
            Some((_, message)) => message.clone(),
            None => "there is no certificate to verify with".into(),
        };
    }
    (tls, fault)
}

fn certificates(reference: &CaReference, of: &NamespaceObjects) -> Result<Arc<str>, Fault> {
    let CaReference { group, kind, name } = reference;
    let found = match (&**group, &**kind) {
        ("" | "core", "ConfigMap") => of
            .config_maps
            .get(name)
            .map(|map| map.data.get(CA_KEY).cloned()),
        ("" | "core", "Secret") => of
            .secrets
            .get(name)
            .map(|secret| secret.certificates.clone()),
        _ => {
            let message = format!("{kind} {name:?} is neither ConfigMap nor Secret");
            return Err(("InvalidKind", message));
        }
    };
    let wrong = |message| Err(("InvalidCACertificateRef", message));
    let Some(found) = found else {
        return wrong(format!("there is no {kind} {name:?}"));
    };
    let Some(pem) = found else {
        return wrong(format!("{kind} {name:?} has no {CA_KEY}"));
    };
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match read {
        Ok(certificates) if !certificates.is_empty() => Ok(pem),
        _ => wrong(format!("{CA_KEY} of {kind} {name:?} holds no certificate")),
    }
}
