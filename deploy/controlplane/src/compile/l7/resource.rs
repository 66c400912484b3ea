//! One resource of a waypoint, of whatever type.

use adit_shared::proto::waypoint as wire;
use adit_shared::xds::VersionedResource;

use super::waypoints::WaypointName;
use crate::model::{Kind, Meta};

/// A resource and the waypoint that gets it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ResourceKey {
    /// The waypoint.
    pub waypoint: WaypointName,
    /// The type URL.
    pub type_url: &'static str,
    /// The resource's name.
    pub name: String,
}

/// The types of which each waypoint gets what concerns it.
#[derive(Debug, Clone, PartialEq)]
#[allow(
    missing_docs,
    reason = "the messages are documented where they are defined"
)]
pub enum Resource {
    Waypoint(wire::Waypoint),
    Secret(wire::Secret),
    RequestAuthentication(wire::RequestAuthentication),
    AuthorizationPolicy(wire::AuthorizationPolicy),
    Telemetry(wire::Telemetry),
    Service(wire::Service),
    TrafficPolicy(Box<wire::TrafficPolicy>),
    BackendTls(wire::BackendTls),
    Route(wire::Route),
}

impl ResourceKey {
    /// The key of `resource` at `waypoint`.
    pub fn of(waypoint: WaypointName, resource: &Resource) -> Self {
        Self {
            waypoint,
            type_url: resource.type_url(),
            name: resource.name(),
        }
    }
}

impl Resource {
    /// Its type URL.
    pub fn type_url(&self) -> &'static str {
        match self {
            Self::Waypoint(_) => wire::WAYPOINT_TYPE,
            Self::Secret(_) => wire::SECRET_TYPE,
            Self::RequestAuthentication(_) => wire::REQUEST_AUTHENTICATION_TYPE,
            Self::AuthorizationPolicy(_) => wire::AUTHORIZATION_POLICY_TYPE,
            Self::Telemetry(_) => wire::TELEMETRY_TYPE,
            Self::Service(_) => wire::SERVICE_TYPE,
            Self::TrafficPolicy(_) => wire::TRAFFIC_POLICY_TYPE,
            Self::BackendTls(_) => wire::BACKEND_TLS_TYPE,
            Self::Route(_) => wire::ROUTE_TYPE,
        }
    }

    /// Its name: `Kind/namespace/name` of the user's object.
    pub fn name(&self) -> String {
        match self {
            Self::Waypoint(of) => format!("{}/{}", of.namespace, of.name),
            Self::Secret(of) => of.name.clone(),
            Self::Service(of) => format!("{}/{}", of.namespace, of.hostname),
            Self::RequestAuthentication(of) => name(of.object.as_ref()),
            Self::AuthorizationPolicy(of) => name(of.object.as_ref()),
            Self::Telemetry(of) => name(of.object.as_ref()),
            Self::TrafficPolicy(of) => name(of.object.as_ref()),
            Self::BackendTls(of) => name(of.object.as_ref()),
            Self::Route(of) => name(of.object.as_ref()),
        }
    }

    /// As it is sent.
    pub fn encode(&self) -> VersionedResource {
        match self {
            Self::Waypoint(of) => VersionedResource::encode(of),
            Self::Secret(of) => VersionedResource::encode(of),
            Self::RequestAuthentication(of) => VersionedResource::encode(of),
            Self::AuthorizationPolicy(of) => VersionedResource::encode(of),
            Self::Telemetry(of) => VersionedResource::encode(of),
            Self::Service(of) => VersionedResource::encode(of),
            Self::TrafficPolicy(of) => VersionedResource::encode(&**of),
            Self::BackendTls(of) => VersionedResource::encode(of),
            Self::Route(of) => VersionedResource::encode(of),
        }
    }
}

/// The user's object that a resource is made from.
pub(super) fn object(meta: &Meta, kind: Kind) -> wire::ObjectRef {
    wire::ObjectRef {
        kind: kind.as_str().into(),
        namespace: meta.namespace.to_string(),
        name: meta.name.to_string(),
        created: meta.age.micros(),
    }
}

fn name(object: Option<&wire::ObjectRef>) -> String {
    object.map_or_else(String::new, |of| {
        format!("{}/{}/{}", of.kind, of.namespace, of.name)
    })
}
