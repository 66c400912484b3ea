//! What is written into an object's status, given what stands there: ours is changed, what
//! other controllers wrote stays as it is.
//!
//! Pure: the object and the time are arguments.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::compile::l7::{CONTROLLER, WAYPOINT_BOUND};
use crate::kubernetes::STATUS_MANAGER;
use crate::model::Kind;
use crate::status::wire::{stamp, stored};
use crate::status::{Condition, ObjectStatus, ParentStatus, StoredCondition};

/// Longest message of a condition (`metav1.Condition.message`).
const MAX_MESSAGE: usize = 32_768;
/// Most entries of a route's `status.parents`.
const MAX_PARENTS: usize = 32;
/// Most entries of a policy's `status.ancestors`.
const MAX_ANCESTORS: usize = 16;

/// What an object's status is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The status.
    pub status: ObjectStatus,
    /// `metadata.generation` of the version that it is of.
    pub generation: Option<i64>,
    /// The object's uid: another object of the same name has another status.
    pub uid: Arc<str>,
}

/// How the status of a kind is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `conditions` alone, a map by type: server-side apply of ours.
    AppliedConditions,
    /// `conditions` alone, a list that is replaced as a whole.
    Conditions,
    /// `conditions`, `addresses`, and `listeners` with conditions of their own.
    Gateway,
    /// `parents`, by controller.
    Parents,
    /// `ancestors`, by controller.
    Ancestors,
}

/// The layout of a kind's status; `None`: nothing is written there.
fn layout(kind: Kind) -> Option<Layout> {
    match kind {
        Kind::Service | Kind::GatewayClass => Some(Layout::AppliedConditions),
        Kind::AuthorizationPolicy | Kind::RequestAuthentication | Kind::Telemetry => {
            Some(Layout::Conditions)
        }
        Kind::Gateway => Some(Layout::Gateway),
        Kind::HttpRoute | Kind::GrpcRoute | Kind::TcpRoute | Kind::TlsRoute => {
            Some(Layout::Parents)
        }
        Kind::BackendTlsPolicy => Some(Layout::Ancestors),
        _ => None,
    }
}

/// The kinds that have a status of ours.
pub fn kinds() -> impl Iterator<Item = Kind> {
    Kind::ALL.into_iter().filter(|kind| layout(*kind).is_some())
}

/// Types of conditions that are taken away when there is nothing to tell any more.
fn removable(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Service => &[WAYPOINT_BOUND],
        Kind::AuthorizationPolicy => &["ZtunnelAccepted", "WaypointAccepted"],
        Kind::RequestAuthentication | Kind::Telemetry => &["WaypointAccepted"],
        // A Gateway or a class that is ours no more is another controller's to describe.
        _ => &[],
    }
}

/// A change of an object's status.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// These fields, by server-side apply: what we applied before and is not among them goes.
    Apply(Value),
    /// The whole status, in place of the version that was read.
    Replace(Value),
}

/// What has to be written; `None`: nothing. `object` is the object as it is, `wanted` what
/// is to be told, if there is anything.
pub fn merge(kind: Kind, object: &Value, wanted: Option<&Wanted>, now: &str) -> Option<Change> {
    let layout = layout(kind)?;
    let empty = Value::Null;
    let status = object.get("status").unwrap_or(&empty);
    match layout {
        Layout::AppliedConditions | Layout::Conditions => {
            conditions_only(kind, layout, object, status, wanted, now)
        }
        Layout::Gateway => gateway(status, wanted?, now),
        Layout::Parents => {
            let entries = wanted.map_or(&[][..], |wanted| &wanted.status.parents);
            by_controller(
                status,
                "parents",
                "parentRef",
                MAX_PARENTS,
                entries,
                wanted,
                now,
            )
        }
        Layout::Ancestors => {
            let entries = wanted.map_or(&[][..], |wanted| &wanted.status.ancestors);
            by_controller(
                status,
                "ancestors",
                "ancestorRef",
                MAX_ANCESTORS,
                entries,
                wanted,
                now,
            )
        }
    }
}

fn conditions_only(
    kind: Kind,
    layout: Layout,
    object: &Value,
    status: &Value,
    wanted: Option<&Wanted>,
    now: &str,
) -> Option<Change> {
    let before = list(status, "conditions");
    let told = wanted.is_some_and(|wanted| !wanted.status.conditions.is_empty());
    // Where we have never written, conditions of these types are somebody else's.
    let removable = if is_ours(object) {
        removable(kind)
    } else {
        &[]
    };
    let none = [];
    let conditions = match wanted {
        Some(wanted) if is_newer(before, wanted) => return None,
        Some(wanted) => &wanted.status.conditions[..],
        None => &none,
    };
    let generation = wanted.and_then(|wanted| wanted.generation);
    let ours = written(conditions, before, generation, now);
    let after = graft(before, &ours, removable);
    if after == before {
        return None;
    }
    if layout == Layout::AppliedConditions {
        return Some(Change::Apply(match told {
            true => json!({ "conditions": ours }),
            false => json!({}),
        }));
    }
    Some(Change::Replace(with(status, "conditions", after)))
}

fn gateway(status: &Value, wanted: &Wanted, now: &str) -> Option<Change> {
    let before = list(status, "conditions");
    if is_newer(before, wanted) {
        return None;
    }
    let generation = wanted.generation;
    let ours = written(&wanted.status.conditions, before, generation, now);
    let mut after = with(status, "conditions", graft(before, &ours, &[]));
    let known = list(status, "listeners");
    let listeners = wanted.status.listeners.iter().map(|listener| {
        let known = known.iter().find(|known| known["name"] == *listener.name);
        let before = known.map_or(&[][..], |known| list(known, "conditions"));
        let ours = written(&listener.conditions, before, generation, now);
        let mut entry = known
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        entry.insert("name".into(), json!(listener.name));
        // Routes attach to Services, never to a waypoint's listener.
        entry.insert("attachedRoutes".into(), json!(0));
        entry.insert("supportedKinds".into(), json!([]));
        entry.insert("conditions".into(), graft(before, &ours, &[]).into());
        Value::Object(entry)
    });
    after = with(&after, "listeners", listeners.collect());
    let addresses = wanted.status.addresses.iter();
    let addresses = addresses.map(|address| json!({"type": address.kind, "value": address.value}));
    after = with(&after, "addresses", addresses.collect());
    (after != *status).then_some(Change::Replace(after))
}

/// Entries of other controllers stay, in their places; ours are these and no others.
fn by_controller(
    status: &Value,
    field: &str,
    reference: &str,
    most: usize,
    entries: &[ParentStatus],
    wanted: Option<&Wanted>,
    now: &str,
) -> Option<Change> {
    let before = list(status, field);
    let is_ours = |entry: &&Value| entry["controllerName"] == CONTROLLER;
    let known: Vec<&Value> = before.iter().filter(is_ours).collect();
    if let Some(wanted) = wanted
        && known
            .iter()
            .any(|entry| is_newer(list(entry, "conditions"), wanted))
    {
        return None;
    }
    let of_object = wanted.map_or(&[][..], |wanted| &wanted.status.conditions);
    let generation = wanted.and_then(|wanted| wanted.generation);
    let ours = entries.iter().map(|entry| {
        let to = to_value(&stored(&entry.reference));
        let known = known.iter().find(|known| known[reference] == to);
        let before = known.map_or(&[][..], |known| list(known, "conditions"));
        // A route has no conditions of its own: what concerns all of it stands at each.
        let conditions: Vec<Condition> =
            entry.conditions.iter().chain(of_object).cloned().collect();
        json!({
            reference: to,
            "controllerName": CONTROLLER,
            "conditions": written(&conditions, before, generation, now),
        })
    });
    let ours: Vec<Value> = ours.collect();
    if known.iter().copied().eq(&ours) {
        return None;
    }
    let mut after: Vec<Value> = before
        .iter()
        .filter(|entry| !is_ours(entry))
        .cloned()
        .collect();
    let room = most.saturating_sub(after.len());
    after.extend(ours.into_iter().take(room));
    (after != before).then(|| Change::Replace(with_kept(status, field, after)))
}

/// Whether we have written into the status of this object.
fn is_ours(object: &Value) -> bool {
    let managers = object["metadata"]["managedFields"].as_array();
    managers
        .into_iter()
        .flatten()
        .any(|entry| entry["manager"] == STATUS_MANAGER)
}

/// Whether what stands there is of a later version of the object than what we know.
fn is_newer(before: &[Value], wanted: &Wanted) -> bool {
    let Some(generation) = wanted.generation else {
        return false;
    };
    let ours = |condition: &&Value| {
        let kinds = wanted.status.conditions.iter().map(|of| &of.kind);
        kinds.into_iter().any(|kind| condition["type"] == **kind)
    };
    before
        .iter()
        .filter(ours)
        .filter_map(|condition| condition["observedGeneration"].as_i64())
        .any(|observed| observed > generation)
}

/// Conditions as they are to stand there.
fn written(
    conditions: &[Condition],
    before: &[Value],
    generation: Option<i64>,
    now: &str,
) -> Vec<Value> {
    // What cannot be read is not ours.
    let before: Vec<StoredCondition> = before
        .iter()
        .filter_map(|condition| serde_json::from_value(condition.clone()).ok())
        .collect();
    let mut written = stamp(conditions, &before, generation, now);
    for condition in &mut written {
        if condition.message.len() > MAX_MESSAGE {
            let mut end = MAX_MESSAGE;
            while !condition.message.is_char_boundary(end) {
                end -= 1;
            }
            condition.message.truncate(end);
        }
    }
    written.iter().map(to_value).collect()
}

/// Puts `ours` among the conditions that there are; those of the types `removable` that are
/// not among ours go.
fn graft(before: &[Value], ours: &[Value], removable: &[&str]) -> Vec<Value> {
    let find = |kind: &Value| ours.iter().find(|of| of["type"] == *kind);
    let kept = before.iter().filter_map(|condition| {
        let kind = &condition["type"];
        match find(kind) {
            Some(new) => Some(new.clone()),
            None if removable.iter().any(|gone| kind == gone) => None,
            None => Some(condition.clone()),
        }
    });
    let mut after: Vec<Value> = kept.collect();
    for new in ours {
        if !before.iter().any(|known| known["type"] == new["type"]) {
            after.push(new.clone());
        }
    }
    after
}

fn list<'a>(of: &'a Value, field: &str) -> &'a [Value] {
    of.get(field)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// `status` with another list; an empty one is left out.
fn with(status: &Value, field: &str, list: Vec<Value>) -> Value {
    let mut status = status.as_object().cloned().unwrap_or_default();
    if list.is_empty() {
        status.remove(field);
    } else {
        status.insert(field.into(), list.into());
    }
    Value::Object(status)
}

/// The same where the schema requires the list.
fn with_kept(status: &Value, field: &str, list: Vec<Value>) -> Value {
    let mut status: Map<String, Value> = status.as_object().cloned().unwrap_or_default();
    status.insert(field.into(), list.into());
    Value::Object(status)
}

fn to_value(of: &impl Serialize) -> Value {
    // Strings, numbers and maps with keys of text: that cannot fail.
    serde_json::to_value(of).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{AddressStatus, ListenerStatus, RefStatus};

    const OLD: &str = "2026-01-01T00:00:00Z";
    const NOW: &str = "2026-02-02T00:00:00Z";

    fn wanted(status: ObjectStatus) -> Wanted {
        Wanted {
            status,
            generation: Some(2),
            uid: "u".into(),
        }
    }

    fn condition(kind: &str, status: &str, generation: i64, time: &str) -> Value {
        json!({"type": kind, "status": status, "reason": "R", "message": "m",
            "lastTransitionTime": time, "observedGeneration": generation})
    }

    fn conditions(all: &[(&str, bool)]) -> Vec<Condition> {
        all.iter()
            .map(|(kind, status)| Condition::new(kind, *status, "R", "m"))
            .collect()
    }

    fn route(parents: &[&str]) -> Wanted {
        let parent = |name: &&str| ParentStatus {
            reference: RefStatus {
                kind: "Service".into(),
                name: (*name).into(),
                ..RefStatus::default()
            },
            conditions: conditions(&[("Accepted", true)]),
        };
        wanted(ObjectStatus {
            parents: parents.iter().map(parent).collect(),
            ..ObjectStatus::default()
        })
    }

    fn entry(name: &str, controller: &str, generation: i64, time: &str) -> Value {
        json!({"parentRef": {"group": "", "kind": "Service", "name": name},
            "controllerName": controller,
            "conditions": [condition("Accepted", "True", generation, time)]})
    }

    fn replaced(change: Option<Change>) -> Value {
        match change {
            Some(Change::Replace(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn entries_of_other_controllers_stay_bit_for_bit() {
        let other = json!({"parentRef": {"name": "a"}, "controllerName": "example.com/other",
            "conditions": [], "more": {"b": [1]}});
        let object = json!({"status": {"parents": [entry("gone", CONTROLLER, 1, OLD), other]}});
        let status = replaced(merge(Kind::HttpRoute, &object, Some(&route(&["a"])), NOW));
        assert_eq!(
            status,
            json!({"parents": [other, entry("a", CONTROLLER, 2, NOW)]})
        );
        let status = replaced(merge(Kind::HttpRoute, &object, None, NOW));
        assert_eq!(status, json!({"parents": [other]}));
    }

    #[test]
    fn a_route_that_is_told_what_it_says_already_is_not_written() {
        let object = json!({"status": {"parents": [entry("a", CONTROLLER, 2, OLD)]}});
        assert_eq!(
            merge(Kind::HttpRoute, &object, Some(&route(&["a"])), NOW),
            None
        );
        let nothing = json!({"status": {"parents": []}});
        assert_eq!(merge(Kind::HttpRoute, &nothing, None, NOW), None);
        assert_eq!(merge(Kind::HttpRoute, &json!({}), None, NOW), None);
    }

    #[test]
    fn a_new_generation_is_told_and_the_time_stays() {
        let object = json!({"status": {"parents": [entry("a", CONTROLLER, 1, OLD)]}});
        let status = replaced(merge(Kind::HttpRoute, &object, Some(&route(&["a"])), NOW));
        assert_eq!(status, json!({"parents": [entry("a", CONTROLLER, 2, OLD)]}));
    }

    #[test]
    fn what_knows_a_newer_generation_is_not_overwritten() {
        let service = json!({"status": {"conditions": [condition("A", "False", 3, OLD)]}});
        let of_gateway = wanted(ObjectStatus {
            conditions: conditions(&[("A", true)]),
            ..ObjectStatus::default()
        });
        assert_eq!(merge(Kind::Gateway, &service, Some(&of_gateway), NOW), None);
    }

    #[test]
    fn what_concerns_all_of_a_route_stands_at_each_parent() {
        let mut told = route(&["a"]);
        told.status.conditions = conditions(&[("ResolvedWaypoints", false)]);
        let status = replaced(merge(Kind::GrpcRoute, &json!({}), Some(&told), NOW));
        let kinds: Vec<_> = list(&status["parents"][0], "conditions")
            .iter()
            .map(|of| of["type"].clone())
            .collect();
        assert_eq!(kinds, ["Accepted", "ResolvedWaypoints"]);
    }

    #[test]
    fn parents_beyond_the_limit_of_the_schema_are_left_out() {
        let names: Vec<String> = (0..40).map(|n| format!("s{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let object = json!({"status": {"parents": [entry("a", "example.com/other", 1, OLD)]}});
        let status = replaced(merge(Kind::HttpRoute, &object, Some(&route(&names)), NOW));
        assert_eq!(list(&status, "parents").len(), MAX_PARENTS);
    }

    #[test]
    fn a_service_gets_our_condition_by_apply_and_loses_it_when_it_is_ours() {
        let other = condition("LoadBalancerPortsError", "True", 1, OLD);
        let bound = wanted(ObjectStatus {
            conditions: conditions(&[(WAYPOINT_BOUND, true)]),
            ..ObjectStatus::default()
        });
        let object = json!({"status": {"conditions": [other]}});
        let ours = condition(WAYPOINT_BOUND, "True", 2, NOW);
        assert_eq!(
            merge(Kind::Service, &object, Some(&bound), NOW),
            Some(Change::Apply(json!({"conditions": [ours]})))
        );
        let both = json!({"status": {"conditions": [other, ours]}});
        assert_eq!(merge(Kind::Service, &both, Some(&bound), OLD), None);
        assert_eq!(
            merge(Kind::Service, &both, None, NOW),
            None,
            "another wrote it"
        );
        let mut managed = both.clone();
        managed["metadata"] = json!({"managedFields": [{"manager": STATUS_MANAGER}]});
        assert_eq!(
            merge(Kind::Service, &managed, None, NOW),
            Some(Change::Apply(json!({})))
        );
    }

    #[test]
    fn a_policy_keeps_conditions_of_other_controllers() {
        let other = condition("example.com/Seen", "True", 1, OLD);
        let mut object = json!({"status": {"conditions": [
            condition("ZtunnelAccepted", "False", 1, OLD), other], "observedGeneration": "1"}});
        object["metadata"] = json!({"managedFields": [{"manager": STATUS_MANAGER}]});
        let told = wanted(ObjectStatus {
            conditions: conditions(&[("WaypointAccepted", true)]),
            ..ObjectStatus::default()
        });
        let status = replaced(merge(Kind::AuthorizationPolicy, &object, Some(&told), NOW));
        let ours = condition("WaypointAccepted", "True", 2, NOW);
        assert_eq!(
            status,
            json!({"conditions": [other, ours], "observedGeneration": "1"})
        );
    }

    #[test]
    fn a_gateway_keeps_foreign_conditions_and_loses_listeners_that_are_gone() {
        let told = wanted(ObjectStatus {
            conditions: conditions(&[("Accepted", true), ("Programmed", true)]),
            addresses: vec![AddressStatus::ip("10.0.0.1")],
            listeners: vec![ListenerStatus {
                name: "mesh".into(),
                conditions: conditions(&[("Accepted", true)]),
            }],
            ..ObjectStatus::default()
        });
        let foreign = condition("example.com/Seen", "True", 1, OLD);
        let object = json!({"status": {
        "conditions": [condition("Accepted", "Unknown", 0, OLD), foreign],
        "listeners": [
            {"name": "old", "attachedRoutes": 0, "conditions": [foreign]},
            {"name": "mesh", "attachedRoutes": 0, "conditions": [foreign]},
        ]}});
        let status = replaced(merge(Kind::Gateway, &object, Some(&told), NOW));
        let accepted = condition("Accepted", "True", 2, NOW);
        let expected = json!({
            "conditions": [accepted, foreign, condition("Programmed", "True", 2, NOW)],
            "addresses": [{"type": "IPAddress", "value": "10.0.0.1"}],
            "listeners": [{"name": "mesh", "attachedRoutes": 0, "supportedKinds": [],
                "conditions": [foreign, accepted]}]});
        assert_eq!(status, expected);
        let object = json!({ "status": status });
        assert_eq!(merge(Kind::Gateway, &object, Some(&told), OLD), None);
        assert_eq!(merge(Kind::Gateway, &object, None, NOW), None);
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let condition = Condition::new("A", true, "R", "ä".repeat(MAX_MESSAGE));
        let cut = written(&[condition], &[], None, NOW);
        let message = cut[0]["message"].as_str().expect("text");
        assert!(message.len() <= MAX_MESSAGE && message.ends_with('ä'));
    }
}
