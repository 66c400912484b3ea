//! One namespace, compiled.

use std::collections::BTreeMap;
use std::sync::Arc;

use adit_shared::model::Locality;
use adit_shared::proto::enrolment::Enrolment;
use adit_shared::proto::security::Authorization;
use adit_shared::proto::workload::{Address, address};

use super::admission::{self, Accounts, Admission};
use super::authorization::convert;
use super::enrolment;
use super::l7::{self, Resource, ResourceKey, Waypoints};
use super::mesh::MeshConfig;
use super::peer_authentication::{effective, inherited};
use super::redirection::Redirection;
use super::selectors::SelectorIndex;
use super::services;
use super::workloads::{self, Surroundings};
use crate::model::{
    AuthorizationPolicy, Kind, Labels, NamespaceObjects, ObjectRef, Objects, PeerAuthentication,
    PolicyAction, PolicyScope,
};
use crate::status::ObjectStatus;

/// Resources by their names, and what is to be told about objects.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Compiled {
    /// Workloads and services, by uid or `namespace/hostname`.
    pub addresses: BTreeMap<String, Address>,
    /// Policies, by `namespace/name`.
    pub authorizations: BTreeMap<String, Authorization>,
    /// Pods to capture by uid, with their nodes.
    pub enrolments: BTreeMap<String, (Arc<str>, Enrolment)>,
    /// Resources of waypoints.
    pub waypoints: BTreeMap<ResourceKey, Arc<Resource>>,
    /// Status of objects.
    pub statuses: BTreeMap<ObjectRef, ObjectStatus>,
}

/// What namespaces share.
#[derive(Debug, Clone, PartialEq)]
pub struct Shared {
    network: Arc<str>,
    pub(super) waypoints: Waypoints,
    localities: BTreeMap<Arc<str>, Locality>,
    /// Selector policies of the root namespace.
    policies: Vec<(Labels, String)>,
    /// Whom policies of the root namespace cover that depend on who calls.
    about_callers: Vec<Labels>,
    accounts: Accounts,
    /// The PeerAuthentication of the mesh.
    peer: Option<Arc<PeerAuthentication>>,
}

impl Shared {
    /// Collects it.
    pub fn of(objects: &Objects, mesh: &MeshConfig) -> Self {
        let root = objects.namespaces.get(&mesh.root_namespace);
        let label = root
            .and_then(|root| root.namespace.as_ref())
            .and_then(|namespace| namespace.meta.label("topology.istio.io/network"));
        let policies = root
            .into_iter()
            .flat_map(|root| selector_policies(root, mesh));
        let network = label.map_or_else(|| mesh.network.clone(), Arc::from);
        let waypoints = Waypoints::of(objects, &network, mesh);
        Self {
            accounts: admission::accounts(objects, &waypoints),
            about_callers: root.map_or_else(Vec::new, |root| admission::about_callers(root, mesh)),
            waypoints,
            network,
            localities: objects
                .nodes
                .iter()
                .map(|(name, node)| (name.clone(), node.locality()))
                .collect(),
            policies: policies
                .map(|(selector, name)| (selector.clone(), name))
                .collect(),
            peer: root.and_then(|root| unselective_peer(root, mesh)).cloned(),
        }
    }
}

/// Compiles the namespace `name`.
pub fn namespace(
    name: &Arc<str>,
    objects: &NamespaceObjects,
    shared: &Shared,
    redirection: &Redirection,
    mesh: &MeshConfig,
) -> Compiled {
    let mut compiled = Compiled::default();
    let is_root = *name == mesh.root_namespace;
    let of_namespace = objects.namespace.as_deref();

    // Selectors in the root namespace do not count for PeerAuthentications, and its
    // unselective one is the mesh's.
    let own_peer = unselective_peer(objects, mesh).filter(|_| !is_root);
    let inherited = inherited(shared.peer.as_deref(), own_peer.map(|peer| &**peer));
    let mut peers: Vec<&PeerAuthentication> = objects
        .peer_authentications
        .values()
        .filter(|peer| mesh.owns(&peer.meta) && !is_root && !peer.selector.is_empty())
        .map(|peer| &**peer)
        .collect();
    peers.sort_by(|a, b| a.meta.seniority().cmp(&b.meta.seniority()));

    for policy in objects.authorization_policies.values() {
        if mesh.owns(&policy.meta) {
            let conversion = convert(policy, mesh);
            if let Some(authorization) = conversion.authorization {
                let key = format!("{name}/{}", policy.meta.name);
                compiled.authorizations.insert(key, authorization);
            }
            if let Some(condition) = conversion.condition {
                let reference = policy.meta.reference(Kind::AuthorizationPolicy);
                let status = compiled.statuses.entry(reference).or_default();
                status.conditions.push(condition);
            }
        }
    }
    for peer in &peers {
        if let Some(body) = effective(Some(peer), inherited).authorization(peer) {
            let key = format!("{name}/{}", body.name);
            compiled.authorizations.insert(key, body);
        }
    }

    let about_callers = admission::about_callers(objects, mesh);
    let of_root = shared.about_callers.iter().filter(|_| !is_root);
    let served = l7::served(objects, &shared.waypoints, mesh);
    let admission = Admission::new(
        &served,
        about_callers.iter().chain(of_root),
        &shared.accounts,
        mesh,
    );

    let services = objects
        .services
        .values()
        .filter(|service| !service.external_name);
    for service in services.clone() {
        let wire = services::convert(
            service,
            of_namespace,
            &shared.network,
            &shared.waypoints,
            mesh,
        );
        compiled.addresses.insert(
            services::key(service, mesh),
            Address {
                r#type: Some(address::Type::Service(wire)),
            },
        );
    }

    let of_root = shared.policies.iter().filter(|_| !is_root);
    let around = Surroundings {
        mesh,
        network: &shared.network,
        namespace: of_namespace,
        waypoints: &shared.waypoints,
        localities: &shared.localities,
        services: SelectorIndex::new(
            services
                .filter(|service| !service.selector.is_empty())
                .map(|service| (&service.selector, &**service))
                .collect(),
        ),
        assigned: workloads::assigned(objects),
        policies: SelectorIndex::new(
            selector_policies(objects, mesh)
                .chain(of_root.map(|(selector, name)| (selector, name.clone())))
                .collect(),
        ),
        peers: SelectorIndex::new(peers.iter().map(|peer| (&peer.selector, *peer)).collect()),
        inherited,
    };
    let mut insert = |uid: String, workload| {
        let address = Address {
            r#type: Some(address::Type::Workload(workload)),
        };
        compiled.addresses.insert(uid, address);
    };
    for pod in objects.pods.values() {
        let captured = redirection.hbone.contains(&pod.meta.uid);
        if let Some(mut workload) = workloads::pod(pod, captured, &around) {
            admission.tell(&mut workload, &pod.meta.labels);
            insert(workload.uid.clone(), workload);
        }
    }
    for (slice, service) in workloads::slices_with_services(objects) {
        for (uid, workload) in workloads::endpoints(slice, service, &around) {
            insert(uid, workload);
        }
    }
    for pod in objects.pods.values() {
        if redirection.enrolments.contains(&pod.meta.uid) {
            let enrolment = (pod.node.clone(), enrolment::resource(pod));
            compiled
                .enrolments
                .insert(pod.meta.uid.to_string(), enrolment);
        }
    }
    compiled
}

/// The oldest PeerAuthentication without a selector.
fn unselective_peer<'a>(
    of: &'a NamespaceObjects,
    mesh: &MeshConfig,
) -> Option<&'a Arc<PeerAuthentication>> {
    of.peer_authentications
        .values()
        .filter(|peer| mesh.owns(&peer.meta) && peer.selector.is_empty())
        .min_by(|a, b| a.meta.seniority().cmp(&b.meta.seniority()))
}

/// Policies that are listed on the workloads they select: only those that are sent,
/// because a proxy refuses everything as long as a listed policy is missing.
fn selector_policies<'a>(
    of: &'a NamespaceObjects,
    mesh: &MeshConfig,
) -> impl Iterator<Item = (&'a Labels, String)> {
    of.authorization_policies
        .values()
        .filter(|policy| mesh.owns(&policy.meta))
        .filter_map(|policy| {
            let PolicyScope::Selector(selector) = policy.scope() else {
                return None;
            };
            is_sent(policy).then(|| {
                let meta = &policy.meta;
                (selector, format!("{}/{}", meta.namespace, meta.name))
            })
        })
}

fn is_sent(policy: &AuthorizationPolicy) -> bool {
    let action = match &policy.spec {
        Ok(spec) => spec.action,
        Err(invalid) => invalid.action,
    };
    matches!(action, PolicyAction::Allow | PolicyAction::Deny)
}
