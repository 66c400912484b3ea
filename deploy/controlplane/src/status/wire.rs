//! Status as it is written: Kubernetes' own form, without what an API server adds.

use serde::{Deserialize, Serialize};

use super::object::{Condition, ObjectStatus, ParentStatus, RefStatus};
use crate::compile::l7::CONTROLLER;
use crate::model::ObjectRef;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ItemFile {
    pub(super) items: Vec<Item>,
}

/// The status of an object as it stands in the file of its kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Its namespace; empty: none.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Of the object itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<StoredCondition>,
    /// Of a Gateway.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<StoredAddress>,
    /// Of a Gateway.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listeners: Vec<StoredListener>,
    /// Of a route.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<StoredParent>,
    /// Of a policy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ancestors: Vec<StoredAncestor>,
}

/// A condition with the time of its last change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredCondition {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True` or `False`.
    pub status: String,
    /// Why, in one word.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// RFC 3339.
    pub last_transition_time: String,
    /// `metadata.generation` of the version that was looked at, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// An address of a Gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredAddress {
    /// `Hostname` or `IPAddress`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The address.
    pub value: String,
}

/// A listener of a Gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredListener {
    /// Its name.
    pub name: String,
    /// Routes attach to Services, never to a waypoint's listener.
    pub attached_routes: u32,
    /// Hence none.
    pub supported_kinds: Vec<String>,
    /// Its conditions.
    pub conditions: Vec<StoredCondition>,
}

/// A thing that something is attached to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredRef {
    /// API group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Namespace, where it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// Section, where it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
    /// Port, where it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// A route at one of its parents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredParent {
    /// The parent.
    pub parent_ref: StoredRef,
    /// Who says so.
    pub controller_name: String,
    /// Conditions there.
    pub conditions: Vec<StoredCondition>,
}

/// A policy at one of its targets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredAncestor {
    /// The target.
    pub ancestor_ref: StoredRef,
    /// Who says so.
    pub controller_name: String,
    /// Conditions there.
    pub conditions: Vec<StoredCondition>,
}

impl Item {
    /// Writes `status`, which is of the object's version `generation`. A condition that was
    /// so `before` keeps its time.
    pub(super) fn new(
        object: &ObjectRef,
        status: &ObjectStatus,
        generation: Option<i64>,
        before: Option<&Self>,
        now: &str,
    ) -> Self {
        let stamp = |conditions: &[Condition], before: Option<&[StoredCondition]>| {
            stamp(conditions, before.unwrap_or_default(), generation, now)
        };
        let addresses = status.addresses.iter().map(|address| StoredAddress {
            kind: address.kind.into(),
            value: address.value.clone(),
        });
        let listeners = status.listeners.iter().map(|listener| {
            let known = before.and_then(|item| {
                let mut known = item.listeners.iter();
                known.find(|known| known.name == listener.name)
            });
            StoredListener {
                name: listener.name.clone(),
                attached_routes: 0,
                supported_kinds: Vec::new(),
                conditions: stamp(&listener.conditions, known.map(|known| &*known.conditions)),
            }
        });
        let parents = status.parents.iter().map(|parent| {
            let parent_ref = stored(&parent.reference);
            let known = before.and_then(|item| {
                let mut known = item.parents.iter();
                known.find(|known| known.parent_ref == parent_ref)
            });
            StoredParent {
                conditions: stamp(&parent.conditions, known.map(|known| &*known.conditions)),
                controller_name: CONTROLLER.into(),
                parent_ref,
            }
        });
        let ancestor = |ancestor: &ParentStatus| {
            let ancestor_ref = stored(&ancestor.reference);
            let known = before.and_then(|item| {
                let mut known = item.ancestors.iter();
                known.find(|known| known.ancestor_ref == ancestor_ref)
            });
            StoredAncestor {
                conditions: stamp(&ancestor.conditions, known.map(|known| &*known.conditions)),
                controller_name: CONTROLLER.into(),
                ancestor_ref,
            }
        };
        let own = before.map(|item| item.conditions.as_slice());
        Self {
            namespace: object.namespace.to_string(),
            name: object.name.to_string(),
            conditions: stamp(&status.conditions, own),
            addresses: addresses.collect(),
            listeners: listeners.collect(),
            parents: parents.collect(),
            ancestors: status.ancestors.iter().map(ancestor).collect(),
        }
    }
}

/// A reference as it is written.
pub(super) fn stored(reference: &RefStatus) -> StoredRef {
    StoredRef {
        group: reference.group.clone(),
        kind: reference.kind.clone(),
        namespace: reference.namespace.clone(),
        name: reference.name.clone(),
        section_name: reference.section.clone(),
        port: reference.port,
    }
}

/// Conditions as they are written: one whose status is as it was `before` keeps its time.
pub(super) fn stamp(
    conditions: &[Condition],
    before: &[StoredCondition],
    generation: Option<i64>,
    now: &str,
) -> Vec<StoredCondition> {
    let stamp = |condition: &Condition| {
        let status = if condition.status { "True" } else { "False" };
        let since = before
            .iter()
            .find(|before| before.kind == condition.kind && before.status == status)
            .map_or(now, |before| &before.last_transition_time);
        StoredCondition {
            kind: condition.kind.clone(),
            status: status.into(),
            reason: condition.reason.clone(),
            message: condition.message.clone(),
            last_transition_time: since.into(),
            observed_generation: generation,
        }
    };
    conditions.iter().map(stamp).collect()
}
