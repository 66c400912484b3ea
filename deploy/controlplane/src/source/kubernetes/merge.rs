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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::decode_text;

    /// An `Applied` of a policy whose port is right or wrong.
    fn policy(name: &str, uid: &str, port: &str) -> Event {
        let (object, errors) = decode_text(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: {name}, namespace: n}}\n\
             spec: {{rules: [{{to: [{{operation: {{ports: ['{port}']}}}}]}}]}}\n"
        ))
        .remove(0);
        Event::Applied(Seen {
            reference: object.reference(),
            uid: uid.into(),
            decoded: Decoded::Object { object, errors },
        })
    }

    fn named(name: &str) -> ObjectRef {
        ObjectRef {
            kind: Kind::AuthorizationPolicy,
            namespace: "n".into(),
            name: name.into(),
        }
    }

    fn merged(events: impl IntoIterator<Item = Event>) -> Merged {
        let mut merged = Merged::new([Kind::AuthorizationPolicy, Kind::Secret]);
        for event in events {
            merged.take(event);
        }
        merged
    }

    fn names(merged: &Merged) -> Vec<String> {
        let state = merged.state();
        let of = state.objects.namespaces.get("n");
        of.into_iter()
            .flat_map(|of| of.authorization_policies.keys())
            .map(ToString::to_string)
            .collect()
    }

    fn listed(names: &[&str]) -> Event {
        Event::Listed {
            kind: Kind::AuthorizationPolicy,
            present: names.iter().copied().map(named).collect(),
        }
    }

    #[test]
    fn only_a_complete_list_takes_away() {
        let mut merged = merged([policy("a", "1", "80"), policy("b", "2", "80")]);
        merged.take(listed(&["a", "b"]));
        // A relist that names `a` and has not come to its end.
        merged.take(policy("a", "1", "80"));
        assert_eq!(names(&merged), ["a", "b"]);
        merged.take(listed(&["a"]));
        assert_eq!(names(&merged), ["a"]);
        merged.take(Event::Absent(Kind::AuthorizationPolicy));
        assert!(names(&merged).is_empty());
    }

    #[test]
    fn it_is_complete_when_every_kind_is_known() {
        let mut merged = merged([listed(&[])]);
        assert!(!merged.state().synced);
        merged.take(Event::Failing {
            kind: Kind::Secret,
            reason: "no".into(),
        });
        assert!(!merged.state().synced);
        merged.take(Event::Unpermitted {
            kind: Kind::Secret,
            reason: "no".into(),
        });
        let state = merged.state();
        assert!(state.synced);
        assert_eq!(state.findings[0].severity, Severity::Info);
        merged.take(Event::Works(Kind::Secret));
        assert!(merged.state().findings.is_empty());
    }

    #[test]
    fn an_unchanged_object_is_the_same_and_a_wrong_one_is_not_in_force() {
        let mut merged = merged([policy("a", "1", "80"), listed(&["a"])]);
        let before = merged.state();
        merged.take(policy("a", "1", "80"));
        assert!(merged.state().objects.same(&before.objects));
        merged.take(policy("a", "1", "x"));
        let state = merged.state();
        assert!(state.objects.same(&before.objects) && state.findings.len() == 1);
        // Wrong again, in another way: the good one is still known.
        merged.take(policy("a", "1", "y"));
        assert!(merged.state().objects.same(&before.objects));
        // Another object of the name.
        merged.take(policy("a", "2", "y"));
        assert!(!merged.state().objects.same(&before.objects));
        merged.take(policy("a", "2", "81"));
        assert!(merged.state().findings.is_empty());
        merged.take(Event::Deleted(named("a")));
        assert!(names(&merged).is_empty());
    }
}
