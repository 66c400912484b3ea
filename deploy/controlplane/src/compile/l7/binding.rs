//! Which waypoint an object is bound to (Istio: waypoint resolution and precedence).
//!
//! 1. The object's own label; `none` means none. What it names holds, also if it is not
//!    there: there is no falling back to the namespace's label.
//! 2. The namespace's label.
//! 3. What is generated for a gateway has no waypoint.
//!
//! Where the waypoint cannot be used, the object keeps its binding and the address leads
//! nowhere: clients fail until it can. Going around it would skip the policies that it
//! enforces. Istio goes around it; [`MeshConfig::waypoint_fail_open`] does so too.

use adit_shared::proto::workload::{GatewayAddress, WeightedWaypoint};

use super::canary::{self, Canary};
use super::waypoints::{GATEWAY_NAME, WaypointName, Waypoints, is_generated, nowhere};
use crate::compile::enrolment::go_bool;
use crate::compile::mesh::MeshConfig;
use crate::model::{Meta, Namespace};
use crate::status::Condition;

/// Binds an object, or all of a namespace, to a waypoint; or says `none`.
pub const USE_WAYPOINT: &str = "istio.io/use-waypoint";
/// The waypoint's namespace, where it is another.
pub const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
/// Ingress gateways send to the waypoint too.
const INGRESS_USE_WAYPOINT: &str = "istio.io/ingress-use-waypoint";
/// The condition of what is bound.
pub const WAYPOINT_BOUND: &str = "istio.io/WaypointBound";

/// What is bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bindable {
    /// A service.
    Service,
    /// A pod.
    Workload,
}

/// A binding that somebody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The waypoint.
    pub waypoint: WaypointName,
    /// What came of it.
    pub outcome: Outcome,
    /// A second waypoint for a part of the traffic; of services that are bound.
    pub canary: Option<Canary>,
}

/// What came of a binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Traffic takes the waypoint.
    Bound,
    /// There is no such waypoint, or it has no address, for this reason.
    NotReady(String),
    /// The waypoint does not admit the namespace.
    Denied,
    /// The waypoint does not take such traffic, which goes without one.
    UnsupportedTraffic,
}

/// Finds the binding of an object in `namespace`; `None`: none was asked for.
pub fn bind(
    bindable: Bindable,
    object: &Meta,
    namespace: Option<&Namespace>,
    waypoints: &Waypoints,
) -> Option<Binding> {
    if is_generated(object) || belongs_to_waypoint(bindable, object, waypoints) {
        return None;
    }
    let (waypoint, explicit) = match asked(object, &object.namespace) {
        Asked::None => return None,
        Asked::Waypoint(waypoint) => (waypoint, true),
        Asked::Nothing => match namespace.map(|of| asked(&of.meta, &object.namespace))? {
            Asked::Waypoint(waypoint) => (waypoint, false),
            Asked::None | Asked::Nothing => return None,
        },
    };
    let inherited_workload = bindable == Bindable::Workload && !explicit;
    let outcome = match waypoints.get(&waypoint) {
        // Waypoints are for services unless they say otherwise.
        None if inherited_workload => return None,
        None => Outcome::NotReady("there is no such waypoint".into()),
        Some(found) => {
            let takes = match bindable {
                Bindable::Service => found.takes_services(),
                Bindable::Workload => found.takes_workloads(),
            };
            let labels = namespace.map(|of| &of.meta.labels);
            match &found.address {
                _ if !takes && inherited_workload => return None,
                _ if !found.admits(&waypoint.namespace, &object.namespace, labels) => {
                    Outcome::Denied
                }
                _ if !takes => Outcome::UnsupportedTraffic,
                Err(reason) => Outcome::NotReady(reason.to_string()),
                Ok(_) => Outcome::Bound,
            }
        }
    };
    let canary = match (bindable, &outcome) {
        (Bindable::Service, Outcome::Bound) => {
            canary::find(object, explicit, namespace, &waypoint, waypoints)
        }
        _ => None,
    };
    Some(Binding {
        waypoint,
        outcome,
        canary,
    })
}

enum Asked {
    Nothing,
    None,
    Waypoint(WaypointName),
}

fn asked(meta: &Meta, own_namespace: &str) -> Asked {
    match meta.label(USE_WAYPOINT) {
        None => Asked::Nothing,
        Some("none") => Asked::None,
        Some(name) => Asked::Waypoint(WaypointName {
            namespace: meta
                .label(USE_WAYPOINT_NAMESPACE)
                .unwrap_or(own_namespace)
                .into(),
            name: name.into(),
        }),
    }
}

/// A pod of a waypoint that somebody runs by himself.
fn belongs_to_waypoint(bindable: Bindable, object: &Meta, waypoints: &Waypoints) -> bool {
    let Some(gateway) = object.label(GATEWAY_NAME) else {
        return false;
    };
    let name = WaypointName {
        namespace: object.namespace.clone(),
        name: gateway.into(),
    };
    bindable == Bindable::Workload && waypoints.get(&name).is_some()
}

impl Binding {
    /// Where clients have to send; `None`: to the object itself.
    pub fn address(&self, waypoints: &Waypoints, mesh: &MeshConfig) -> Option<GatewayAddress> {
        match &self.outcome {
            Outcome::Bound => waypoints.get(&self.waypoint)?.address.clone().ok(),
            Outcome::UnsupportedTraffic => None,
            Outcome::NotReady(_) | Outcome::Denied if mesh.waypoint_fail_open => None,
            Outcome::NotReady(_) | Outcome::Denied => Some(nowhere(&self.waypoint)),
        }
    }

    /// The shares of both waypoints, where there are two.
    pub fn weighted(&self, waypoints: &Waypoints) -> Vec<WeightedWaypoint> {
        let Some(Canary::Bound { waypoint, weight }) = &self.canary else {
            return Vec::new();
        };
        let share = |name: &WaypointName, weight| {
            let found = waypoints.get(name)?;
            Some(WeightedWaypoint {
                destination: Some(found.address.clone().ok()?),
                weight,
            })
        };
        let both = [
            share(&self.waypoint, 100 - weight),
            share(waypoint, *weight),
        ];
        both.into_iter().flatten().collect()
    }

    /// The waypoints that have to know of the object. They are told before they have an
    /// address, so that they know what to do when the first connection comes.
    pub fn serving(&self, waypoints: &Waypoints) -> Vec<WaypointName> {
        let primary = match &self.outcome {
            Outcome::Bound | Outcome::NotReady(_) => Some(&self.waypoint),
            Outcome::Denied | Outcome::UnsupportedTraffic => None,
        };
        let canary = match &self.canary {
            Some(Canary::Bound { waypoint, .. }) => Some(waypoint),
            _ => None,
        };
        let both = primary.into_iter().chain(canary);
        both.filter(|name| waypoints.get(name).is_some())
            .cloned()
            .collect()
    }

    /// What the object's owner is told.
    pub fn condition(&self, mesh: &MeshConfig) -> Condition {
        let waypoint = &self.waypoint;
        let consequence = if mesh.waypoint_fail_open {
            "traffic goes without a waypoint"
        } else {
            "traffic is refused"
        };
        let (reason, mut message) = match &self.outcome {
            Outcome::Bound => ("WaypointAccepted", format!("bound to waypoint {waypoint}")),
            Outcome::NotReady(why) => (
                "WaypointIsNotReady",
                format!("waypoint {waypoint} is not ready: {why}; {consequence}"),
            ),
            Outcome::Denied => (
                "AttachmentDenied",
                format!(
                    "allowedRoutes of waypoint {waypoint} does not admit this namespace; {consequence}"
                ),
            ),
            Outcome::UnsupportedTraffic => (
                "UnsupportedTrafficType",
                format!(
                    "waypoint {waypoint} does not take this traffic (istio.io/waypoint-for), which goes without a waypoint"
                ),
            ),
        };
        match &self.canary {
            None => {}
            Some(Canary::Bound { waypoint, weight }) => {
                message.push_str(&format!(", {weight} % to canary {waypoint}"));
            }
            Some(Canary::Ignored {
                reason,
                message: why,
            }) => {
                message.push_str(&format!("; no canary: {reason}: {why}"));
            }
        }
        Condition::new(
            WAYPOINT_BOUND,
            self.outcome == Outcome::Bound,
            reason,
            message,
        )
    }
}

/// Whether ingress gateways are to send to the waypoint of `object` (Istio
/// `istio.io/ingress-use-waypoint`).
pub(in crate::compile) fn ingress_uses(object: &Meta, namespace: Option<&Namespace>) -> bool {
    match object.label(INGRESS_USE_WAYPOINT) {
        Some(value) => go_bool(value).unwrap_or_default(),
        None => namespace
            .and_then(|of| of.meta.label(INGRESS_USE_WAYPOINT))
            .is_some_and(|value| value.eq_ignore_ascii_case("true")),
    }
}
