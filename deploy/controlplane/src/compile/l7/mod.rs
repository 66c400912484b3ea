//! What waypoints are sent: Gateway API and Istio's L7 resources in the waypoint's form
//! (`shared/proto/waypoint.proto`).
//!
//! The namespace is the unit, as for node proxies: [`compile_namespace`] is a pure function of
//! its objects, of the waypoints, and of whatever other namespaces its references lead
//! to. Those are noted as they are looked at ([`View`]), so that the compiler knows when
//! to do it again. A resource goes to each waypoint that needs it and to no other.

mod attachment;
mod authorization;
mod backend_tls;
mod backends;
mod binding;
mod canary;
mod coverage;
mod destination_rules;
mod gateways;
mod reach;
mod request_authentication;
mod resource;
mod routes;
mod rules;
mod served;
mod services;
mod settings;
mod targets;
mod telemetry;
mod view;
mod waypoints;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub use backends::check_backend;
pub use binding::{
    Bindable, Binding, Outcome, USE_WAYPOINT, USE_WAYPOINT_NAMESPACE, WAYPOINT_BOUND, bind,
};
pub use canary::Canary;
pub use gateways::class_statuses;
pub use resource::{Resource, ResourceKey};
pub use settings::{MeshSettings, SETTINGS_NAME};
pub use view::{Consulted, View};
pub use waypoints::{
    CONTROLLER, GATEWAY_NAME, NotReady, WAYPOINT_CLASS, WAYPOINT_FOR, Waypoint, WaypointName,
    Waypoints, gateway_of_pod,
};

pub(super) use binding::ingress_uses;
pub(crate) use destination_rules::resolved_host;
pub(super) use served::{Served, served};

use crate::model::{NamespaceObjects, ObjectRef};
use crate::status::ObjectStatus;

/// What a namespace gives to waypoints, and what is to be told about its objects.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// Resources, each with the waypoint that gets it.
    pub resources: BTreeMap<ResourceKey, Arc<Resource>>,
    /// Status of objects.
    pub statuses: BTreeMap<ObjectRef, ObjectStatus>,
    /// Waypoints with the services, by namespace and name, that they send to.
    reached: BTreeSet<(WaypointName, Arc<str>, Arc<str>)>,
}

impl Part {
    /// Gives a resource to a waypoint.
    fn give(&mut self, waypoint: &WaypointName, resource: &Arc<Resource>) {
        let key = ResourceKey::of(waypoint.clone(), resource);
        self.resources.insert(key, resource.clone());
    }

    /// The status of an object, to add to.
    fn status(&mut self, object: ObjectRef) -> &mut ObjectStatus {
        self.statuses.entry(object).or_default()
    }
}

/// Compiles the namespace that `view` is of.
pub fn compile_namespace(objects: &NamespaceObjects, view: &View<'_>) -> Part {
    let mut part = Part::default();
    gateways::compile(objects, view, &mut part);
    services::compile(objects, view, &mut part);
    routes::compile(objects, view, &mut part);
    backend_tls::compile(objects, view, &mut part);
    authorization::compile(objects, view, &mut part);
    request_authentication::compile(objects, view, &mut part);
    telemetry::compile(objects, view, &mut part);
    part
}
