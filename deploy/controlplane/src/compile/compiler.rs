//! Compiles again only what changed, and edits the served snapshot accordingly.

use std::collections::BTreeMap;
use std::sync::Arc;

use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use prost::Message;

use super::enrolment::{Decision, decide};
use super::mesh::MeshConfig;
use super::namespace::{Compiled, Shared, namespace};
use super::peer_authentication::{STATIC_STRICT, static_strict};
use super::redirection::{Desired, Redirection};
use crate::model::{NamespaceObjects, ObjectRef, Objects};
use crate::serve::SnapshotBuilder;
use crate::status::Condition;

/// Which pods ought to be enrolled.
pub fn desired(objects: &Objects, mesh: &MeshConfig) -> Desired {
    let mut desired = Desired::default();
    for of in objects.namespaces.values() {
        for pod in of.pods.values() {
            let uid = pod.meta.uid.clone();
            match decide(pod, of.namespace.as_deref(), mesh) {
                Decision::Enrol => {
                    desired.enrolled.insert(uid, pod.node.clone());
                }
                Decision::Leave(_) if pod.phase.is_terminal() || pod.addresses.is_empty() => {}
                Decision::Leave(_) => {
                    desired.others.insert(uid);
                }
            }
        }
    }
    desired
}

/// Compiles everything at once.
pub fn compile(objects: &Objects, redirection: &Redirection, mesh: &MeshConfig) -> Compiled {
    let shared = Shared::of(objects, mesh);
    let mut all = Compiled::default();
    for (name, of) in &objects.namespaces {
        let part = namespace(name, of, &shared, redirection, mesh);
        all.addresses.extend(part.addresses);
        all.authorizations.extend(part.authorizations);
        all.enrolments.extend(part.enrolments);
        all.conditions.extend(part.conditions);
    }
    if has_peer_authentication(objects, mesh) {
        all.authorizations
            .insert(static_strict_key(mesh), static_strict(mesh));
    }
    all
}

fn static_strict_key(mesh: &MeshConfig) -> String {
    format!("{}/{STATIC_STRICT}", mesh.root_namespace)
}

fn has_peer_authentication(objects: &Objects, mesh: &MeshConfig) -> bool {
    objects
        .namespaces
        .values()
        .flat_map(|of| of.peer_authentications.values())
        .any(|peer| mesh.owns(&peer.meta))
}

/// Remembers what it compiled.
#[derive(Debug)]
pub struct Compiler {
    mesh: MeshConfig,
    shared: Option<Shared>,
    parts: BTreeMap<Arc<str>, Part>,
}

/// A namespace with the inputs that it was compiled from.
#[derive(Debug)]
struct Part {
    objects: Arc<NamespaceObjects>,
    /// Pods that are captured or enrolled, as far as they are of this namespace.
    redirection: Redirection,
    compiled: Compiled,
}

impl Compiler {
    /// Nothing is compiled yet.
    pub fn new(mesh: MeshConfig) -> Self {
        Self {
            mesh,
            shared: None,
            parts: BTreeMap::new(),
        }
    }

    /// The settings.
    pub fn mesh(&self) -> &MeshConfig {
        &self.mesh
    }

    /// Compiles what changed into `snapshot`. Says how many namespaces that were.
    pub fn update(
        &mut self,
        objects: &Objects,
        redirection: &Redirection,
        snapshot: &mut SnapshotBuilder,
    ) -> usize {
        let shared = Shared::of(objects, &self.mesh);
        let all = self.shared.as_ref() != Some(&shared);
        let mut count = 0;
        let gone = self
            .parts
            .keys()
            .filter(|name| !objects.namespaces.contains_key(*name));
        for name in gone.cloned().collect::<Vec<_>>() {
            if let Some(part) = self.parts.remove(&name) {
                edit(snapshot, &part.compiled, &Compiled::default());
                count += 1;
            }
        }
        for (name, of) in &objects.namespaces {
            let redirection = restrict(redirection, of);
            let before = self.parts.get(name);
            let current = before.is_some_and(|part| {
                !all && Arc::ptr_eq(&part.objects, of) && part.redirection == redirection
            });
            if current {
                continue;
            }
            let compiled = namespace(name, of, &shared, &redirection, &self.mesh);
            let nothing = Compiled::default();
            edit(
                snapshot,
                before.map_or(&nothing, |part| &part.compiled),
                &compiled,
            );
            let part = Part {
                objects: of.clone(),
                redirection,
                compiled,
            };
            self.parts.insert(name.clone(), part);
            count += 1;
        }
        let key = static_strict_key(&self.mesh);
        if has_peer_authentication(objects, &self.mesh) {
            snapshot.set(AUTHORIZATION_TYPE, &key, &static_strict(&self.mesh));
        } else {
            snapshot.remove(AUTHORIZATION_TYPE, &key);
        }
        self.shared = Some(shared);
        count
    }

    /// Conditions of all objects.
    pub fn conditions(&self) -> impl Iterator<Item = (&ObjectRef, &Condition)> {
        self.parts
            .values()
            .flat_map(|part| &part.compiled.conditions)
    }
}

fn restrict(redirection: &Redirection, of: &NamespaceObjects) -> Redirection {
    let mut own = Redirection::default();
    for pod in of.pods.values() {
        let uid = &pod.meta.uid;
        if redirection.hbone.contains(uid) {
            own.hbone.insert(uid.clone());
        }
        if redirection.enrolments.contains(uid) {
            own.enrolments.insert(uid.clone());
        }
    }
    own
}

/// Makes the difference between two versions of a namespace.
fn edit(snapshot: &mut SnapshotBuilder, old: &Compiled, new: &Compiled) {
    edit_type(snapshot, ADDRESS_TYPE, &old.addresses, &new.addresses);
    edit_type(
        snapshot,
        AUTHORIZATION_TYPE,
        &old.authorizations,
        &new.authorizations,
    );
    for (uid, (node, _)) in &old.enrolments {
        if new.enrolments.get(uid).is_none_or(|(now, _)| now != node) {
            snapshot.remove_enrolment(node, uid);
        }
    }
    for (uid, enrolment) in &new.enrolments {
        if old.enrolments.get(uid) != Some(enrolment) {
            snapshot.set_enrolment(&enrolment.0, &enrolment.1);
        }
    }
}

fn edit_type<M: Message + PartialEq>(
    snapshot: &mut SnapshotBuilder,
    type_url: &str,
    old: &BTreeMap<String, M>,
    new: &BTreeMap<String, M>,
) {
    for name in old.keys().filter(|name| !new.contains_key(*name)) {
        snapshot.remove(type_url, name);
    }
    for (name, message) in new {
        if old.get(name) != Some(message) {
            snapshot.set(type_url, name, message);
        }
    }
}
