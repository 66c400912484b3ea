//! The objects that users write, as validated values.

mod authorization;
mod authorization_raw;
mod authorization_values;
mod field;
mod finding;
mod meta;
mod objects;
mod peer_authentication;
mod pod;
mod service;

pub use authorization::{
    AccountMatch, AuthorizationPolicy, Condition, InvalidPolicy, MAX_RULES, MAX_SERVICE_ACCOUNTS,
    MAX_TARGETS, Operation, PolicyAction, PolicyScope, PolicySpec, Rule, Source, StringMatch,
    TargetRef, Values,
};
pub use field::{At, FieldError, FieldPath, Segment};
pub use finding::{Code, Finding, Severity};
pub use meta::{Age, Kind, Labels, Meta, ObjectRef, Origin, selects};
pub use objects::{ByName, NamespaceObjects, Object, ObjectTable, Objects};
pub use peer_authentication::{MutualTls, PeerAuthentication};
pub use pod::{NamedPort, Namespace, Node, Phase, Pod, ServiceAccount};
pub use service::{
    Endpoint, EndpointPort, EndpointSlice, Service, ServicePort, TargetPort, TrafficDistribution,
};
