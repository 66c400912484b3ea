//! The objects that users write, as validated values.

mod authorization;
mod authorization_raw;
mod authorization_values;
mod backend_tls;
mod config_map;
mod destination_rule;
mod duration;
mod field;
mod finding;
mod gateway;
mod label_selector;
mod mesh_map;
mod mesh_provider;
mod meta;
mod objects;
mod peer_authentication;
mod pod;
mod raw;
mod reference_grant;
mod request_authentication;
mod route;
mod service;
mod telemetry;
mod traffic_policy;
mod unsupported;

pub use authorization::{
    AccountMatch, AuthorizationPolicy, Condition, InvalidPolicy, MAX_RULES, MAX_SERVICE_ACCOUNTS,
    MAX_TARGETS, Operation, PolicyAction, PolicyScope, PolicySpec, Rule, Source, StringMatch,
    TargetRef, Values,
};
pub use backend_tls::{BackendTlsPolicy, BackendTlsTarget, CaReference};
pub use config_map::{CA_KEY, ClientCertificate, ConfigMap, Secret};
pub use destination_rule::{DestinationRule, RuleSubset, TrafficPolicy};
pub use field::{At, FieldError, FieldPath, Segment};
pub use finding::{Code, Finding, Severity};
pub use gateway::{
    AllowedNamespaces, CertificateRef, ClassParameters, Gateway, GatewayAddress, GatewayClass,
    Listener,
};
pub use label_selector::LabelSelector;
pub use mesh_map::{MESH_KEY, MeshMap};
pub use meta::{Age, Kind, Labels, Meta, ObjectRef, Origin, selects};
pub use objects::{ByName, NamespaceObjects, Object, ObjectTable, Objects, differing};
pub use peer_authentication::{MutualTls, PeerAuthentication};
pub use pod::{NamedPort, Namespace, Node, Phase, Pod, ServiceAccount};
pub use reference_grant::{GrantFrom, GrantTo, ReferenceGrant};
pub use request_authentication::RequestAuthentication;
pub use route::{
    BackendRef, Filter, GrpcRoute, GrpcRule, HttpRoute, HttpRule, L4Rule, ParentRef, Route,
    RouteRule, TcpRoute, TlsRoute,
};
pub use service::{
    DeclaredProtocol, Endpoint, EndpointPort, EndpointSlice, Service, ServicePort, TargetPort,
    TrafficDistribution,
};
pub use telemetry::Telemetry;
pub use unsupported::{ServiceEntry, VirtualService};
