//! A set of named resources of one type, as a server publishes it.
//!
//! Sets are persistent: a clone is O(1) and shares everything, and two sets of which one
//! was edited from the other are compared in time proportional to the edits, not to their
//! size. So a connection remembers what it has sent by keeping the set, and a small change
//! costs little for every connection, however large the mesh and however long ago that
//! connection looked.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;

/// Bytes of the SHA-256 digest that make a version: 96 bits, 16 characters of text. Long
/// enough that nobody finds two bodies with one version, short enough that a client which
/// claims a hundred thousand of them does so in one message.
const VERSION_BYTES: usize = 12;

/// The encoded body of a resource and its version, which is a hash of that body: equal
/// bodies have equal versions in every replica and after every restart of a server.
#[derive(Clone)]
pub struct VersionedResource {
    version: Box<str>,
    body: Bytes,
}

impl VersionedResource {
    /// Takes the encoded message (the `value` of the `Any` that carries it).
    pub fn new(body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &body);
        Self {
            version: URL_SAFE_NO_PAD
                .encode(&digest.as_ref()[..VERSION_BYTES])
                .into(),
            body,
        }
    }

    /// Encodes `message`. Its type must encode maps in order (ours do: see `build.rs`),
    /// or equal messages would get different versions.
    pub fn encode(message: &impl prost::Message) -> Self {
        Self::new(message.encode_to_vec())
    }

    /// The hash of the body.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The encoded message.
    pub fn body(&self) -> &Bytes {
        &self.body
    }
}

/// Versions are compared, because they stand for the bodies.
impl PartialEq for VersionedResource {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version
    }
}

impl Eq for VersionedResource {}

impl std::fmt::Debug for VersionedResource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.version, self.body.len())
    }
}

/// One difference between two sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// New, or with another body.
    Updated(Arc<str>, Arc<VersionedResource>),
    /// No longer there.
    Removed(Arc<str>),
}

/// Named resources of one type. Cloning is O(1).
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct ResourceSet {
    resources: OrdMap<Arc<str>, Arc<VersionedResource>>,
}

impl ResourceSet {
    /// The resource of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<VersionedResource>> {
        self.resources.get(name)
    }

    /// The name as the set holds it, with its resource.
    pub fn get_key_value(&self, name: &str) -> Option<(&Arc<str>, &Arc<VersionedResource>)> {
        self.resources.get_key_value(name)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.resources.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// All, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<VersionedResource>)> {
        self.resources.iter()
    }

    /// Whether both are the same set in memory; then they are equal at no cost.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        self.resources.ptr_eq(&other.resources)
    }

    /// Sets `name`. Returns whether that changed anything; if not, the set is untouched,
    /// and comparing it with its clones stays free.
    pub fn insert(&mut self, name: &str, resource: VersionedResource) -> bool {
        match self.resources.get(name) {
            Some(old) if **old == resource => false,
            _ => {
                self.resources.insert(name.into(), Arc::new(resource));
                true
            }
        }
    }

    /// Takes `name` out. Returns whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        // Looked for first: removing copies the path to where the name would be.
        self.resources.contains_key(name) && self.resources.remove(name).is_some()
    }

    /// Makes this set hold exactly `resources` (of several with one name the last). What is
    /// equal stays untouched. Returns whether anything changed.
    pub fn replace(
        &mut self,
        resources: impl IntoIterator<Item = (String, VersionedResource)>,
    ) -> bool {
        let mut gone = self.resources.clone();
        let mut changed = false;
        for (name, resource) in resources {
            gone.remove(name.as_str());
            changed |= self.insert(&name, resource);
        }
        for name in gone.keys() {
            changed |= self.remove(name);
        }
        changed
    }

    /// What has to be done to `base` to make it this set, ordered by name.
    pub fn changes_since<'a>(&'a self, base: &'a Self) -> impl Iterator<Item = Change> + 'a {
        base.resources.diff(&self.resources).map(|item| match item {
            DiffItem::Add(name, resource) => Change::Updated(name.clone(), resource.clone()),
            DiffItem::Update {
                new: (name, resource),
                ..
            } => Change::Updated(name.clone(), resource.clone()),
            DiffItem::Remove(name, _) => Change::Removed(name.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str) -> VersionedResource {
        VersionedResource::new(text.to_owned())
    }

    #[test]
    fn the_version_is_a_function_of_the_body() {
        assert_eq!(body("a").version(), body("a").version());
        assert_ne!(body("a").version(), body("b").version());
        assert_eq!(body("").version().len(), 16);
    }

    #[test]
    fn equal_edits_leave_the_set_as_it_was() {
        let mut set = ResourceSet::default();
        assert!(set.insert("x", body("1")));
        let before = set.clone();
        assert!(!set.insert("x", body("1")));
        assert!(!set.remove("y"));
        assert!(!set.replace([("x".to_owned(), body("1"))]));
        assert!(set.ptr_eq(&before));
    }

    #[test]
    fn a_replacement_touches_only_what_differs() {
        let mut set = ResourceSet::default();
        for name in ["gone", "kept", "other"] {
            set.insert(name, body("1"));
        }
        let before = set.clone();
        assert!(set.replace([
            ("kept".to_owned(), body("1")),
            ("new".to_owned(), body("1")),
            ("other".to_owned(), body("2")),
        ]));
        let changes: Vec<_> = set
            .changes_since(&before)
            .map(|change| match change {
                Change::Updated(name, _) => format!("+{name}"),
                Change::Removed(name) => format!("-{name}"),
            })
            .collect();
        assert_eq!(changes, ["-gone", "+new", "+other"]);
    }

    /// The promise in the module's comment, as a ratio that holds on a slow machine too.
    #[test]
    fn a_small_change_in_a_large_set_is_found_without_reading_it_all() {
        let mut set = ResourceSet::default();
        set.replace((0..50_000).map(|i| (format!("{i:05}"), body("1"))));
        let before = set.clone();
        set.insert("25000", body("2"));
        let start = std::time::Instant::now();
        for _ in 0..1000 {
            assert_eq!(set.changes_since(&before).count(), 1);
        }
        let thousand = start.elapsed();
        let start = std::time::Instant::now();
        assert_eq!(set.changes_since(&ResourceSet::default()).count(), 50_000);
        let full = start.elapsed();
        assert!(
            thousand / 1000 < full / 20,
            "{thousand:?} for 1000 small ones, {full:?} for a full one"
        );
    }
}
