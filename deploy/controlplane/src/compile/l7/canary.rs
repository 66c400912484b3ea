//! A second waypoint for a part of the traffic of a service (Istio
//! `istio.io/use-waypoint-canary`): a new version of a waypoint is tried out before it
//! takes over.

use super::waypoints::{WaypointName, Waypoints};
use crate::model::{Meta, Namespace};

/// Names the second waypoint.
const CANARY: &str = "istio.io/use-waypoint-canary";
/// Its namespace, where it is another.
const CANARY_NAMESPACE: &str = "istio.io/use-waypoint-canary-namespace";
/// Its share, in percent; an annotation.
const CANARY_WEIGHT: &str = "istio.io/use-waypoint-canary-weight";

/// What came of a canary that somebody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Canary {
    /// It takes a part of the traffic.
    Bound {
        /// The second waypoint.
        waypoint: WaypointName,
        /// Percent of the connections; 1 to 100.
        weight: u32,
    },
    /// All traffic takes the first waypoint, for this reason.
    Ignored {
        /// In one word.
        reason: &'static str,
        /// For people.
        message: String,
    },
}

/// Finds the canary of a service that is bound to `primary`. The namespace's counts only
/// where the service does not choose its waypoint itself.
pub(super) fn find(
    object: &Meta,
    chooses: bool,
    namespace: Option<&Namespace>,
    primary: &WaypointName,
    waypoints: &Waypoints,
) -> Option<Canary> {
    let of_namespace = namespace.map(|of| &of.meta).filter(|_| !chooses);
    let by = [Some(object), of_namespace]
        .into_iter()
        .flatten()
        .find(|meta| meta.label(CANARY).is_some())?;
    let name = by.label(CANARY).filter(|name| *name != "none")?;
    let waypoint = WaypointName {
        namespace: by
            .label(CANARY_NAMESPACE)
            .unwrap_or(&object.namespace)
            .into(),
        name: name.into(),
    };
    let ignored = |reason, message| Some(Canary::Ignored { reason, message });
    if waypoint == *primary {
        let message = "the canary is the waypoint itself".into();
        return ignored("CanarySameAsPrimary", message);
    }
    let text = by.annotation(CANARY_WEIGHT).unwrap_or("0");
    let weight = match text.parse::<u32>() {
        Ok(0) => return None,
        Ok(weight @ 1..=100) => weight,
        _ => {
            let message = format!("{text:?} is not a weight: 0 to 100");
            return ignored("CanaryInvalidWeight", message);
        }
    };
    let labels = namespace.map(|of| &of.meta.labels);
    let usable = waypoints.get(&waypoint).is_some_and(|found| {
        found.takes_services()
            && found.address.is_ok()
            && found.admits(&waypoint.namespace, &object.namespace, labels)
    });
    if usable {
        Some(Canary::Bound { waypoint, weight })
    } else {
        ignored(
            "CanaryIsNotReady",
            format!("waypoint {waypoint} cannot be used"),
        )
    }
}
