//! What all watches have seen, as one state. No I/O.
//!
//! What is wrong never takes away what was right: an object whose new version cannot be
//! used keeps its last good one, and what a relist does not mention is removed only when
//! the list is complete.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::object::Seen;
use crate::model::{Code, FieldError, Finding, Kind, Object, ObjectRef, ObjectTable, Severity};
use crate::source::SourceState;
use crate::source::decode::Decoded;

/// What a watch has to tell.
#[derive(Debug)]
pub(super) enum Event {
    /// An object is there, or is another than before.
    Applied(Seen),
    /// An object is gone.
    Deleted(ObjectRef),
    /// All objects of a kind have been named since the watch (re)started.
    Listed {
        kind: Kind,
        present: HashSet<ObjectRef>,
    },
    /// The API server does not have this kind.
    Absent(Kind),
    /// The kind cannot be followed now, for this reason.
    Failing { kind: Kind, reason: String },
    /// We may not follow the kind, and need not: as good as absent.
    Unpermitted { kind: Kind, reason: String },
    /// It can be followed again.
    Works(Kind),
}

impl Event {
    /// The kind that it is about.
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Applied(seen) => seen.reference.kind,
            Self::Deleted(reference) => reference.kind,
            Self::Listed { kind, .. }
            | Self::Failing { kind, .. }
            | Self::Unpermitted { kind, .. } => *kind,
            Self::Absent(kind) | Self::Works(kind) => *kind,
        }
    }
}

/// All objects, and what is wrong.
#[derive(Debug)]
pub(super) struct Merged {
    table: ObjectTable,
    /// Which object it is, by name.
    uids: HashMap<ObjectRef, Arc<str>>,
    /// Objects whose latest version is not in force as written.
    wrong: BTreeMap<ObjectRef, Wrong>,
    failing: BTreeMap<Kind, Finding>,
    awaited: BTreeSet<Kind>,
}

#[derive(Debug)]
struct Wrong {
    findings: Vec<Finding>,
    /// The object in force is an earlier version, which was right.
    good_in_force: bool,
}

impl Merged {
    /// Nothing yet; `kinds` have to be listed before the state is complete.
    pub(super) fn new(kinds: impl IntoIterator<Item = Kind>) -> Self {
        Self {
            table: ObjectTable::default(),
            uids: HashMap::new(),
            wrong: BTreeMap::new(),
            failing: BTreeMap::new(),
            awaited: kinds.into_iter().collect(),
        }
    }

    /// The kinds that have not been listed yet.
    pub(super) fn awaited(&self) -> &BTreeSet<Kind> {
        &self.awaited
    }

    /// All of it at this moment.
    pub(super) fn state(&self) -> SourceState {
        let wrong = self.wrong.values().flat_map(|wrong| &wrong.findings);
        SourceState {
            objects: self.table.objects().clone(),
            findings: Arc::new(self.failing.values().chain(wrong).cloned().collect()),
            synced: self.awaited.is_empty(),
        }
    }

    /// Takes an event in.
    pub(super) fn take(&mut self, event: Event) {
        match event {
            Event::Applied(seen) => self.applied(seen),
            Event::Deleted(reference) => self.remove(&reference),
            Event::Listed { kind, present } => {
                for reference in self.of_kind(kind) {
                    if !present.contains(&reference) {
                        self.remove(&reference);
                    }
                }
                self.failing.remove(&kind);
                self.awaited.remove(&kind);
            }
            Event::Absent(kind) => {
                for reference in self.of_kind(kind) {
                    self.remove(&reference);
                }
                self.failing.remove(&kind);
                self.awaited.remove(&kind);
            }
            Event::Failing { kind, reason } => self.is_failing(
                kind,
                Severity::Error,
                format!("{kind} objects cannot be followed, what is known of them stays in force: {reason}"),
            ),
            Event::Unpermitted { kind, reason } => {
                self.awaited.remove(&kind);
                self.is_failing(
                    kind,
                    Severity::Info,
                    format!("{kind} objects are not read, so what refers to one does not find it: {reason}"),
                );
            }
            Event::Works(kind) => {
                self.failing.remove(&kind);
            }
        }
    }

    fn is_failing(&mut self, kind: Kind, severity: Severity, message: String) {
        let finding = Finding {
            severity,
            code: Code::Unreadable,
            object: None,
            file: None,
            line: 0,
            field: String::new(),
            message,
        };
        self.failing.insert(kind, finding);
    }

    /// Names of a kind are seen once per relist; an index by kind would cost more.
    fn of_kind(&self, kind: Kind) -> Vec<ObjectRef> {
        self.uids
            .keys()
            .filter(|reference| reference.kind == kind)
            .cloned()
            .collect()
    }

    fn remove(&mut self, reference: &ObjectRef) {
        self.uids.remove(reference);
        self.wrong.remove(reference);
        self.table.set(reference.clone(), None);
    }

    fn applied(&mut self, seen: Seen) {
        let Seen {
            reference,
            uid,
            decoded,
        } = seen;
        let known = self.uids.insert(reference.clone(), uid.clone());
        // Another object of the same name has nothing to do with what was right.
        let same = known.is_some_and(|known| known == uid);
        let good_in_force = same
            && match self.wrong.get(&reference) {
                Some(wrong) => wrong.good_in_force,
                None => self.table.get(&reference).is_some(),
            };
        match decoded {
            Decoded::Object { object, errors } if errors.is_empty() => {
                self.wrong.remove(&reference);
                self.put(reference, object);
            }
            Decoded::Object { object, errors } => {
                let consequence = match good_in_force {
                    true => "; the last good version stays in force",
                    false => "; it fails closed until it is mended",
                };
                self.is_wrong(&reference, &errors, consequence, good_in_force);
                if !good_in_force {
                    self.put(reference, object);
                }
            }
            Decoded::Invalid { errors, .. } => {
                let consequence = match good_in_force {
                    true => "; the last good version stays in force",
                    false => "; the object is ignored",
                };
                self.is_wrong(&reference, &errors, consequence, good_in_force);
                if !good_in_force {
                    self.table.set(reference, None);
                }
            }
            // Kinds and versions are our own choice.
            Decoded::NotOurs | Decoded::Unknown { .. } => {}
        }
    }

    /// The same `Arc` tells everyone that nothing changed.
    fn put(&mut self, reference: ObjectRef, object: Object) {
        if self.table.get(&reference) != Some(&object) {
            self.table.set(reference, Some(object));
        }
    }

    fn is_wrong(
        &mut self,
        reference: &ObjectRef,
        errors: &[FieldError],
        consequence: &str,
        good_in_force: bool,
    ) {
        let findings = errors
            .iter()
            .map(|error| Finding {
                severity: Severity::Error,
                code: Code::SchemaValidationError,
                object: Some(reference.clone()),
                file: None,
                line: 0,
                field: error.path.to_string(),
                message: format!("{}{consequence}", error.message),
            })
            .collect();
        let wrong = Wrong {
            findings,
            good_in_force,
        };
        self.wrong.insert(reference.clone(), wrong);
    }
}
