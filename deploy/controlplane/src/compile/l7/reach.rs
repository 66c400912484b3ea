//! What a service brings along to each waypoint that sends to it: how connections to it
//! are made.

use super::view::View;
use super::waypoints::WaypointName;
use super::{Part, backend_tls, destination_rules};

/// Gives `waypoint` what is set for the service `namespace/name`, which it sends to.
pub(super) fn compile(
    waypoint: &WaypointName,
    namespace: &str,
    name: &str,
    view: &View<'_>,
    part: &mut Part,
) {
    let key = (waypoint.clone(), namespace.into(), name.into());
    if part.reached.insert(key) {
        backend_tls::give(waypoint, namespace, name, view, part);
        destination_rules::give(waypoint, namespace, name, view, part);
    }
}
