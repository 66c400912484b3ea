//! Compiles again only what changed, and edits the served snapshot accordingly.

use std::collections::BTreeMap;
use std::sync::Arc;

use adit_shared::identity::DerivedSecret;
use adit_shared::proto::waypoint::{PROVIDER_TYPE, SETTINGS_TYPE};
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use prost::Message;

use super::enrolment::{Decision, decide};
use super::l7::{self, Consulted, MeshSettings, ResourceKey, View};
use super::mesh::MeshConfig;
use super::namespace::{Compiled, Shared, namespace};
use super::peer_authentication::{STATIC_STRICT, static_strict};
use super::redirection::{Desired, Redirection};
use crate::model::{NamespaceObjects, ObjectRef, Objects};
use crate::serve::SnapshotBuilder;
use crate::status::ObjectStatus;

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
    let mesh = &MeshSettings::of(objects, mesh).effective(mesh);
    let shared = Shared::of(objects, mesh);
    let mut all = Compiled::default();
    for (name, of) in &objects.namespaces {
        let part = namespace(name, of, &shared, redirection, mesh);
        all.addresses.extend(part.addresses);
        all.authorizations.extend(part.authorizations);
        all.enrolments.extend(part.enrolments);
        all.statuses.extend(part.statuses);
        let view = View::new(name, objects, &shared.waypoints, mesh);
        let part = l7::compile_namespace(of, &view);
        all.waypoints.extend(part.resources);
        merge_statuses(&mut all.statuses, part.statuses);
    }
    if has_peer_authentication(objects, mesh) {
        all.authorizations
            .insert(static_strict_key(mesh), static_strict(mesh));
    }
    merge_statuses(&mut all.statuses, l7::class_statuses(objects));
    all
}

fn merge_statuses(
    into: &mut BTreeMap<ObjectRef, ObjectStatus>,
    from: BTreeMap<ObjectRef, ObjectStatus>,
) {
    for (object, status) in from {
        into.entry(object).or_default().merge(status);
    }
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
    /// As the control plane was started with.
    configured: MeshConfig,
    settings: MeshSettings,
    /// As it is in force.
    mesh: MeshConfig,
    shared: Option<Shared>,
    parts: BTreeMap<Arc<str>, Part>,
    classes: BTreeMap<ObjectRef, ObjectStatus>,
    /// How many namespaces give a resource to a waypoint: what a service brings along is
    /// given by all that send there.
    givers: BTreeMap<ResourceKey, usize>,
}

/// A namespace with the inputs that it was compiled from.
#[derive(Debug, Default)]
struct Part {
    objects: Arc<NamespaceObjects>,
    /// Pods that are captured or enrolled, as far as they are of this namespace.
    redirection: Redirection,
    /// For node proxies.
    compiled: Compiled,
    /// For waypoints.
    l7: l7::Part,
    /// Other namespaces that `l7` depends on.
    consulted: Consulted,
    /// Of both.
    statuses: BTreeMap<ObjectRef, ObjectStatus>,
}

impl Compiler {
    /// Nothing is compiled yet.
    pub fn new(mesh: MeshConfig) -> Self {
        Self {
            configured: mesh.clone(),
            settings: MeshSettings::default(),
            mesh,
            shared: None,
            parts: BTreeMap::new(),
            classes: BTreeMap::new(),
            givers: BTreeMap::new(),
        }
    }

    /// The settings.
    pub fn mesh(&self) -> &MeshConfig {
        &self.mesh
    }

    /// Replaces [`MeshConfig::shared_secret`].
    pub fn share_secret(&mut self, secret: DerivedSecret) {
        self.configured.shared_secret = Some(secret);
    }

    /// Compiles what changed into `snapshot`. Says how many namespaces that were.
    pub fn update(
        &mut self,
        objects: &Objects,
        redirection: &Redirection,
        snapshot: &mut SnapshotBuilder,
    ) -> usize {
        self.settings.refresh(objects, &self.configured);
        let mesh = self.settings.effective(&self.configured);
        let shared = Shared::of(objects, &mesh);
        let all = self.shared.as_ref() != Some(&shared) || self.mesh != mesh;
        self.mesh = mesh;
        let mut count = 0;
        let gone = self
            .parts
            .keys()
            .filter(|name| !objects.namespaces.contains_key(*name));
        for name in gone.cloned().collect::<Vec<_>>() {
            if let Some(part) = self.parts.remove(&name) {
                edit(snapshot, &part.compiled, &Compiled::default());
                self.edit_l7(snapshot, &part.l7, &l7::Part::default());
                count += 1;
            }
        }
        for (name, of) in &objects.namespaces {
            let redirection = restrict(redirection, of);
            let mut part = self.parts.remove(name).unwrap_or_default();
            let changed = all || !Arc::ptr_eq(&part.objects, of);
            let l4 = changed || part.redirection != redirection;
            let l7 = changed || !part.consulted.is_current(objects);
            if l4 {
                let compiled = namespace(name, of, &shared, &redirection, &self.mesh);
                edit(snapshot, &part.compiled, &compiled);
                part.compiled = compiled;
            }
            if l7 {
                let view = View::new(name, objects, &shared.waypoints, &self.mesh);
                let compiled = l7::compile_namespace(of, &view);
                part.consulted = view.into_consulted();
                self.edit_l7(snapshot, &part.l7, &compiled);
                part.l7 = compiled;
            }
            if l4 || l7 {
                part.objects = of.clone();
                part.redirection = redirection;
                part.statuses = part.compiled.statuses.clone();
                merge_statuses(&mut part.statuses, part.l7.statuses.clone());
                count += 1;
            }
            self.parts.insert(name.clone(), part);
        }
        let key = static_strict_key(&self.mesh);
        if has_peer_authentication(objects, &self.mesh) {
            snapshot.set(AUTHORIZATION_TYPE, &key, &static_strict(&self.mesh));
        } else {
            snapshot.remove(AUTHORIZATION_TYPE, &key);
        }
        let settings = self.settings.resource(&self.mesh);
        snapshot.set(SETTINGS_TYPE, l7::SETTINGS_NAME, &settings);
        let providers = self.settings.providers().iter();
        snapshot.replace(
            PROVIDER_TYPE,
            providers.map(|provider| (provider.name.clone(), provider.clone())),
        );
        self.classes = l7::class_statuses(objects);
        self.shared = Some(shared);
        count
    }

    /// Status of all objects.
    pub fn statuses(&self) -> impl Iterator<Item = (&ObjectRef, &ObjectStatus)> {
        let parts = self.parts.values().flat_map(|part| &part.statuses);
        parts.chain(&self.classes)
    }

    /// Makes the difference between what a namespace gave to waypoints and gives now.
    fn edit_l7(&mut self, snapshot: &mut SnapshotBuilder, old: &l7::Part, new: &l7::Part) {
        for key in old.resources.keys() {
            if new.resources.contains_key(key) {
                continue;
            }
            let givers = self.givers.get_mut(key).map(|givers| {
                *givers = givers.saturating_sub(1);
                *givers
            });
            if givers.unwrap_or_default() == 0 {
                self.givers.remove(key);
                snapshot.remove_for_waypoint(key);
            }
        }
        for (key, resource) in &new.resources {
            let before = old.resources.get(key);
            if before.is_none() {
                *self.givers.entry(key.clone()).or_default() += 1;
            }
            if before != Some(resource) {
                snapshot.set_for_waypoint(key, resource);
            }
        }
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
