//! What is served: one immutable, consistent set of resources of all types.
//!
//! The compiler edits a [`SnapshotBuilder`] and publishes what it builds; everything that did
//! not change is shared with the snapshot before, so publishing is cheap and a connection
//! finds the differences without reading it all.

use std::collections::BTreeMap;
use std::sync::Arc;

use adit_shared::proto::ENROLMENT_TYPE;
use adit_shared::proto::enrolment::Enrolment;
use adit_shared::proto::waypoint::{self, PROVIDER_TYPE, SETTINGS_TYPE};
use adit_shared::xds::{ResourceSet, ResourceSource, VersionedResource};
use imbl::OrdMap;
use prost::Message;

use crate::compile::l7::{Resource, ResourceKey, WaypointName};

/// All resources at one point in time. The default is the snapshot before the first: it is not
/// served.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct ResourceSnapshot {
    generation: u64,
    types: BTreeMap<Arc<str>, ResourceSet>,
    enrolments: OrdMap<Arc<str>, ResourceSet>,
    /// By waypoint and type.
    waypoints: OrdMap<WaypointName, BTreeMap<&'static str, ResourceSet>>,
}

impl ResourceSnapshot {
    /// Counts the snapshots that were published, from 1.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether this may be served: the sources were read once.
    pub fn is_ready(&self) -> bool {
        self.generation > 0
    }

    /// The resources of a type that every node sees.
    pub fn resources(&self, type_url: &str) -> Option<&ResourceSet> {
        self.types.get(type_url)
    }

    /// The pods that a node has to enrol.
    pub fn enrolments(&self, node: &str) -> Option<&ResourceSet> {
        self.enrolments.get(node)
    }

    /// What a waypoint gets of a type.
    pub fn of_waypoint(&self, waypoint: &WaypointName, type_url: &str) -> Option<&ResourceSet> {
        self.waypoints.get(waypoint)?.get(type_url)
    }

    /// The types with how many resources each has, for reports.
    pub fn sizes(&self) -> Vec<(String, usize)> {
        let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
        let enrolments = self.enrolments.values().map(|set| (ENROLMENT_TYPE, set));
        let types = self.types.iter().map(|(type_url, set)| (&**type_url, set));
        let waypoints = self.waypoints.values().flatten();
        let waypoints = waypoints.map(|(type_url, set)| (*type_url, set));
        for (type_url, set) in types.chain(enrolments).chain(waypoints) {
            *sizes.entry(type_url).or_default() += set.len();
        }
        let sizes = sizes.into_iter();
        sizes
            .map(|(type_url, size)| (type_url.to_owned(), size))
            .collect()
    }

    /// A builder that starts with what is in this snapshot.
    pub fn edit(&self) -> SnapshotBuilder {
        SnapshotBuilder {
            snapshot: self.clone(),
            changed: !self.is_ready(),
        }
    }
}

/// Edits a snapshot. Setting what is already so changes nothing.
#[derive(Clone, Debug)]
pub struct SnapshotBuilder {
    snapshot: ResourceSnapshot,
    changed: bool,
}

impl Default for SnapshotBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl SnapshotBuilder {
    /// Starts from nothing.
    pub fn new() -> Self {
        ResourceSnapshot::default().edit()
    }

    /// Sets one resource.
    pub fn set(&mut self, type_url: &str, name: &str, message: &impl Message) -> &mut Self {
        let resource = VersionedResource::encode(message);
        self.changed |= self.set_of(type_url).insert(name, resource);
        self
    }

    /// Takes one resource out.
    pub fn remove(&mut self, type_url: &str, name: &str) -> &mut Self {
        self.changed |= self.set_of(type_url).remove(name);
        self
    }

    /// Makes these all the resources of a type.
    pub fn replace<M: Message>(
        &mut self,
        type_url: &str,
        resources: impl IntoIterator<Item = (String, M)>,
    ) -> &mut Self {
        let resources = resources
            .into_iter()
            .map(|(name, message)| (name, VersionedResource::encode(&message)));
        self.changed |= self.set_of(type_url).replace(resources);
        self
    }

    /// Makes these all the enrolments, each with its node.
    pub fn replace_enrolments(
        &mut self,
        enrolments: impl IntoIterator<Item = (String, Enrolment)>,
    ) -> &mut Self {
        let mut nodes: BTreeMap<String, Vec<(String, VersionedResource)>> = BTreeMap::new();
        for (node, enrolment) in enrolments {
            let resource = VersionedResource::encode(&enrolment);
            nodes
                .entry(node)
                .or_default()
                .push((enrolment.uid, resource));
        }
        let known: Vec<Arc<str>> = self.snapshot.enrolments.keys().cloned().collect();
        for node in known {
            if !nodes.contains_key(&*node) {
                self.changed |= self.snapshot.enrolments.remove(&*node).is_some();
            }
        }
        for (node, resources) in nodes {
            self.edit_enrolments(&node, |set| set.replace(resources));
        }
        self
    }

    /// Sets one enrolment.
    pub fn set_enrolment(&mut self, node: &str, enrolment: &Enrolment) -> &mut Self {
        let resource = VersionedResource::encode(enrolment);
        self.edit_enrolments(node, |set| set.insert(&enrolment.uid, resource));
        self
    }

    /// Takes one enrolment out.
    pub fn remove_enrolment(&mut self, node: &str, uid: &str) -> &mut Self {
        self.edit_enrolments(node, |set| set.remove(uid));
        self
    }

    /// Sets one resource of one waypoint.
    pub fn set_for_waypoint(&mut self, key: &ResourceKey, resource: &Resource) -> &mut Self {
        let types = self
            .snapshot
            .waypoints
            .entry(key.waypoint.clone())
            .or_default();
        let set = types.entry(key.type_url).or_default();
        self.changed |= set.insert(&key.name, resource.encode());
        self
    }

    /// Takes one resource of one waypoint out.
    pub fn remove_for_waypoint(&mut self, key: &ResourceKey) -> &mut Self {
        let Some(types) = self.snapshot.waypoints.get_mut(&key.waypoint) else {
            return self;
        };
        if let Some(set) = types.get_mut(key.type_url) {
            self.changed |= set.remove(&key.name);
            if set.is_empty() {
                types.remove(key.type_url);
            }
        }
        if types.is_empty() {
            self.snapshot.waypoints.remove(&key.waypoint);
        }
        self
    }

    /// Whether anything differs from the snapshot that this started with.
    pub fn is_changed(&self) -> bool {
        self.changed
    }

    /// The snapshot, with the next generation if anything changed.
    pub fn build(mut self) -> ResourceSnapshot {
        if self.changed {
            self.snapshot.generation += 1;
        }
        self.snapshot
    }

    fn set_of(&mut self, type_url: &str) -> &mut ResourceSet {
        self.snapshot.types.entry(type_url.into()).or_default()
    }

    fn edit_enrolments(&mut self, node: &str, edit: impl FnOnce(&mut ResourceSet) -> bool) {
        let mut set = self
            .snapshot
            .enrolments
            .get(node)
            .cloned()
            .unwrap_or_default();
        if !edit(&mut set) {
            return;
        }
        self.changed = true;
        if set.is_empty() {
            self.snapshot.enrolments.remove(node);
        } else {
            self.snapshot.enrolments.insert(node.into(), set);
        }
    }
}

/// Types of which every waypoint gets all.
const FOR_ALL_WAYPOINTS: [&str; 2] = [SETTINGS_TYPE, PROVIDER_TYPE];

/// A snapshot as one client sees it.
#[derive(Clone, Debug)]
pub struct NodeView {
    snapshot: Arc<ResourceSnapshot>,
    node: String,
    waypoint: Option<WaypointName>,
}

impl NodeView {
    /// What the proxy of `node` may see of `snapshot`; no node: what every client may.
    pub fn new(snapshot: Arc<ResourceSnapshot>, node: &str) -> Self {
        Self {
            snapshot,
            node: node.to_owned(),
            waypoint: None,
        }
    }

    /// The same, and what is for `waypoint`.
    #[must_use]
    pub fn with_waypoint(self, waypoint: Option<WaypointName>) -> Self {
        Self { waypoint, ..self }
    }
}

impl ResourceSource for NodeView {
    fn resources(&self, type_url: &str) -> Option<&ResourceSet> {
        if type_url == ENROLMENT_TYPE {
            return self.snapshot.enrolments(&self.node);
        }
        if waypoint::TYPES.contains(&type_url) {
            let own = self.waypoint.as_ref()?;
            if !FOR_ALL_WAYPOINTS.contains(&type_url) {
                return self.snapshot.of_waypoint(own, type_url);
            }
        }
        self.snapshot.resources(type_url)
    }

    fn version(&self) -> String {
        self.snapshot.generation.to_string()
    }
}

#[cfg(test)]
mod tests {
    use adit_shared::proto::ADDRESS_TYPE;
    use adit_shared::proto::workload::Workload;

    use super::*;

    fn enrolment(uid: &str) -> Enrolment {
        Enrolment {
            uid: uid.to_owned(),
            ..Enrolment::default()
        }
    }

    fn workload(name: &str) -> Workload {
        Workload {
            name: name.to_owned(),
            ..Workload::default()
        }
    }

    #[test]
    fn the_empty_first_snapshot_is_ready_and_the_default_is_not() {
        assert!(!ResourceSnapshot::default().is_ready());
        assert!(SnapshotBuilder::new().build().is_ready());
    }

    #[test]
    fn an_edit_without_effect_is_no_new_generation() {
        let mut builder = SnapshotBuilder::new();
        builder
            .set(ADDRESS_TYPE, "a", &workload("a"))
            .set_enrolment("n1", &enrolment("u1"));
        let first = builder.build();
        let mut again = first.edit();
        again
            .replace(ADDRESS_TYPE, [("a".to_owned(), workload("a"))])
            .replace_enrolments([("n1".to_owned(), enrolment("u1"))])
            .remove_enrolment("n2", "u1")
            .remove(ADDRESS_TYPE, "b");
        assert!(!again.is_changed());
        assert_eq!(again.build().generation(), first.generation());
        let mut more = first.edit();
        more.set(ADDRESS_TYPE, "a", &workload("b"));
        assert_eq!(more.build().generation(), first.generation() + 1);
    }

    #[test]
    fn a_node_sees_its_own_enrolments_only() {
        let mut builder = SnapshotBuilder::new();
        builder.replace_enrolments([
            ("n1".to_owned(), enrolment("u1")),
            ("n2".to_owned(), enrolment("u2")),
        ]);
        let first = Arc::new(builder.build());
        let names = |snapshot: &Arc<ResourceSnapshot>, node: &str| -> Vec<String> {
            NodeView::new(snapshot.clone(), node)
                .resources(ENROLMENT_TYPE)
                .map(|set| set.iter().map(|(name, _)| name.to_string()).collect())
                .unwrap_or_default()
        };
        assert_eq!(names(&first, "n1"), ["u1"]);
        assert_eq!(names(&first, "n2"), ["u2"]);
        assert!(names(&first, "n3").is_empty());
        let mut edit = first.edit();
        edit.replace_enrolments([("n2".to_owned(), enrolment("u3"))]);
        let second = Arc::new(edit.build());
        assert!(names(&second, "n1").is_empty());
        assert_eq!(names(&second, "n2"), ["u3"]);
    }
}
