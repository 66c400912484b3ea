//! What is told about one object.

use std::fmt::Display;

/// A condition of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Its type, for example `ZtunnelAccepted`.
    pub kind: String,
    /// True or False.
    pub status: bool,
    /// Why, in one word.
    pub reason: String,
    /// Why, for people.
    pub message: String,
}

impl Condition {
    /// A condition.
    pub fn new(kind: &str, status: bool, reason: &str, message: impl Display) -> Self {
        Self {
            kind: kind.into(),
            status,
            reason: reason.into(),
            message: message.to_string(),
        }
    }
}

/// The status of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObjectStatus {
    /// Of the object itself.
    pub conditions: Vec<Condition>,
    /// Of a Gateway.
    pub addresses: Vec<AddressStatus>,
    /// Of a Gateway.
    pub listeners: Vec<ListenerStatus>,
    /// Of a route: for each parent of ours.
    pub parents: Vec<ParentStatus>,
    /// Of a policy that is attached to something: for each such thing.
    pub ancestors: Vec<ParentStatus>,
}

impl ObjectStatus {
    /// Adds what another part of the compiler has to tell.
    pub fn merge(&mut self, other: Self) {
        self.conditions.extend(other.conditions);
        self.addresses.extend(other.addresses);
        self.listeners.extend(other.listeners);
        self.parents.extend(other.parents);
        self.ancestors.extend(other.ancestors);
    }
}

/// An address of a Gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressStatus {
    /// `Hostname` or `IPAddress`.
    pub kind: &'static str,
    /// The address.
    pub value: String,
}

impl AddressStatus {
    /// An IP address.
    pub fn ip(value: impl Display) -> Self {
        Self {
            kind: "IPAddress",
            value: value.to_string(),
        }
    }

    /// A host name.
    pub fn hostname(value: String) -> Self {
        Self {
            kind: "Hostname",
            value,
        }
    }
}

/// A listener of a Gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerStatus {
    /// Its name.
    pub name: String,
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

/// What an object is attached to, as its author wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RefStatus {
    /// API group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Namespace, where it was written.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// Section, where it was written.
    pub section: Option<String>,
    /// Port, where it was written.
    pub port: Option<u16>,
}

/// The status of an object at one thing that it is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentStatus {
    /// The thing.
    pub reference: RefStatus,
    /// Conditions there.
    pub conditions: Vec<Condition>,
}
