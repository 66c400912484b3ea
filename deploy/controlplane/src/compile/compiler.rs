//! Compiles again only what changed, and edits the served snapshot accordingly.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use adit_shared::identity::DerivedSecret;
use adit_shared::proto::waypoint::{PROVIDER_TYPE, SETTINGS_TYPE};
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use prost::Message;

use super::l7::{self, Consulted, MeshSettings, ResourceKey, View};
use super::mesh::MeshConfig;
use super::namespace::{Compiled, Shared, namespace};
use super::peer_authentication::{STATIC_STRICT, static_strict};
use super::redirection::{PodUid, Redirection, Redirections};
use super::workloads::pod_uid;
use crate::model::{ByName, EndpointSlice, NamespaceObjects, ObjectRef, Objects, Pod, differing};
use crate::serve::SnapshotBuilder;
use crate::status::ObjectStatus;

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
    /// Namespaces that the last update compiled, or found to be gone.
    changed: Vec<Arc<str>>,
}

/// A namespace with the inputs that it was compiled from.
#[derive(Debug, Default)]
struct Part {
    objects: Arc<NamespaceObjects>,
    /// Pods that are captured or enrolled.
    redirection: Arc<Redirection>,
    /// For node proxies.
    compiled: Compiled,
    /// For waypoints.
    l7: l7::Part,
    /// Other namespaces that `l7` depends on.
    consulted: Consulted,
    /// Of both.
    statuses: BTreeMap<ObjectRef, ObjectStatus>,
}

/// Pods of a namespace that are to be compiled again.
#[derive(Debug, Default)]
struct ChangedPods {
    /// As they are.
    now: ByName<Pod>,
    /// Their versions before, and those that are gone.
    before: Vec<Arc<Pod>>,
}

impl Part {
    /// The pods that changed, if they are few and nothing else did that workloads depend on.
    /// `None`: the namespace is to be compiled as a whole.
    fn changed_pods(
        &self,
        of: &NamespaceObjects,
        redirection: &Arc<Redirection>,
    ) -> Option<ChangedPods> {
        let same = self.objects.same_besides_endpoints(of)
            && differing(&self.objects.endpoint_slices, &of.endpoint_slices).all(|slices| {
                let slices = [slices.0, slices.1].into_iter().flatten();
                slices.into_iter().all(|slice| adds_nothing(slice, of))
            });
        if !same {
            return None;
        }
        let mut changed = ChangedPods::default();
        let add = |changed: &mut ChangedPods, pods: [Option<&Arc<Pod>>; 2]| {
            let [before, now] = pods;
            changed.before.extend(before.cloned());
            let now = now.map(|pod| (pod.meta.name.clone(), pod.clone()));
            changed.now.extend(now);
        };
        for (before, now) in differing(&self.objects.pods, &of.pods) {
            add(&mut changed, [before, now]);
        }
        if !Arc::ptr_eq(&self.redirection, redirection) {
            let (known, now) = (&self.redirection, redirection);
            for pod in of.pods.values() {
                let uid = &pod.meta.uid;
                if known.hbone.contains(uid) != now.hbone.contains(uid)
                    || known.enrolments.contains(uid) != now.enrolments.contains(uid)
                {
                    add(&mut changed, [Some(pod), Some(pod)]);
                }
            }
        }
        let few = changed.before.len() + changed.now.len() <= of.pods.len();
        // Two of the same uid, as files may have them, depend on each other.
        let uids = changed.before.iter().chain(changed.now.values());
        let uids: BTreeSet<&PodUid> = uids.map(|pod| &pod.meta.uid).collect();
        let all = of.pods.values().filter(|pod| uids.contains(&pod.meta.uid));
        (few && all.count() == changed.now.len()).then_some(changed)
    }

    /// Takes what was compiled of `of`, which has some of the pods only: each of them depends
    /// on no other.
    fn replace_pods(
        &mut self,
        before: &[Arc<Pod>],
        compiled: Compiled,
        mesh: &MeshConfig,
        snapshot: &mut SnapshotBuilder,
    ) {
        let known = &mut self.compiled;
        let mut old = Compiled {
            authorizations: std::mem::take(&mut known.authorizations),
            ..Compiled::default()
        };
        let uids = before.iter().map(|pod| pod_uid(pod, mesh));
        for name in uids.chain(compiled.addresses.keys().cloned()) {
            if let Some(address) = known.addresses.remove(&name) {
                old.addresses.insert(name, address);
            }
        }
        for pod in before {
            let entry = known.enrolments.remove_entry(&*pod.meta.uid);
            old.enrolments.extend(entry);
        }
        edit(snapshot, &old, &compiled);
        known.addresses.extend(compiled.addresses);
        known.enrolments.extend(compiled.enrolments);
        known.authorizations = compiled.authorizations;
        known.statuses = compiled.statuses;
    }
}

/// Whether a slice tells nothing of its pods that they do not tell themselves.
fn adds_nothing(slice: &EndpointSlice, of: &NamespaceObjects) -> bool {
    let service = slice
        .service
        .as_ref()
        .and_then(|name| of.services.get(name));
    service.is_none_or(|service| !service.selector.is_empty())
        && slice
            .endpoints
            .iter()
            .all(|endpoint| endpoint.pod.is_some())
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
            changed: Vec::new(),
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
        redirections: &Redirections,
        snapshot: &mut SnapshotBuilder,
    ) -> usize {
        self.settings.refresh(objects, &self.configured);
        let mesh = self.settings.effective(&self.configured);
        let shared = Shared::of(objects, &mesh);
        let all = self.shared.as_ref() != Some(&shared) || self.mesh != mesh;
        self.mesh = mesh;
        self.changed.clear();
        let gone = self
            .parts
            .keys()
            .filter(|name| !objects.namespaces.contains_key(*name));
        for name in gone.cloned().collect::<Vec<_>>() {
            if let Some(part) = self.parts.remove(&name) {
                edit(snapshot, &part.compiled, &Compiled::default());
                self.edit_l7(snapshot, &part.l7, &l7::Part::default());
                self.changed.push(name);
            }
        }
        let nothing = Arc::default();
        for (name, of) in &objects.namespaces {
            let redirection = redirections.get(name).unwrap_or(&nothing);
            let mut part = self.parts.remove(name).unwrap_or_default();
            let changed = all || !Arc::ptr_eq(&part.objects, of);
            let l4 = changed || part.redirection != *redirection;
            let l7 = changed || !part.consulted.is_current(objects);
            if l4 {
                let mesh = &self.mesh;
                let compiled = |of: &_| namespace(name, of, &shared, redirection, mesh);
                match part.changed_pods(of, redirection).filter(|_| !all) {
                    Some(ChangedPods { now: pods, before }) => {
                        let of = NamespaceObjects {
                            pods,
                            ..NamespaceObjects::clone(of)
                        };
                        part.replace_pods(&before, compiled(&of), mesh, snapshot);
                    }
                    None => {
                        let compiled = compiled(of);
                        edit(snapshot, &part.compiled, &compiled);
                        part.compiled = compiled;
                    }
                }
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
                part.redirection = redirection.clone();
                part.statuses = part.compiled.statuses.clone();
                merge_statuses(&mut part.statuses, part.l7.statuses.clone());
                self.changed.push(name.clone());
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
        self.changed.len()
    }

    /// Status of all objects.
    pub fn statuses(&self) -> impl Iterator<Item = (&ObjectRef, &ObjectStatus)> {
        let parts = self.parts.values().flat_map(|part| &part.statuses);
        parts.chain(&self.classes)
    }

    /// Status of all objects of the namespaces that the last update compiled, and, under
    /// the empty name, of what is in no namespace. A namespace that is gone has none.
    pub fn changed_statuses(
        &self,
    ) -> impl Iterator<Item = (Arc<str>, Option<&BTreeMap<ObjectRef, ObjectStatus>>)> {
        let of = |name: &Arc<str>| Some(&self.parts.get(name)?.statuses);
        let changed = self
            .changed
            .iter()
            .map(move |name| (name.clone(), of(name)));
        changed.chain([(Arc::default(), Some(&self.classes))])
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
