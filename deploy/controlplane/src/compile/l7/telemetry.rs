//! Telemetry as waypoints carry it out.
//!
//! One of a namespace holds for the services of that namespace, wherever their waypoint
//! is, and for all that passes the waypoints of the namespace itself.

use std::sync::Arc;

use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::telemetry::Scope;

use super::Part;
use super::coverage::cover;
use super::resource::{Resource, object};
use super::view::View;
use crate::model::{Kind, NamespaceObjects, PolicyScope};

pub(super) fn compile(objects: &NamespaceObjects, view: &View<'_>, part: &mut Part) {
    for telemetry in objects.telemetries.values() {
        if !view.mesh.owns(&telemetry.meta) {
            continue;
        }
        let errors: Vec<_> = telemetry.errors.iter().map(ToString::to_string).collect();
        let invalid = errors.join("; ");
        let scope = match &telemetry.scope {
            PolicyScope::Namespace if *view.namespace == view.mesh.root_namespace => Scope::Root,
            PolicyScope::Namespace => Scope::Namespace,
            PolicyScope::Selector(_) | PolicyScope::Targets(_) => Scope::Target,
        };
        let mut covered = cover(&telemetry.meta, &telemetry.scope, view);
        if scope == Scope::Namespace {
            let own = view.waypoints.iter().map(|(name, _)| name);
            for waypoint in own.filter(|name| name.namespace == *view.namespace) {
                covered.add(waypoint, None);
            }
        }
        for (waypoint, targets) in &covered.waypoints {
            let resource = wire::Telemetry {
                object: Some(object(&telemetry.meta, Kind::Telemetry)),
                targets: targets.clone(),
                scope: scope.into(),
                tracing: telemetry.tracing.clone(),
                metrics: telemetry.metrics.clone(),
                access_logging: telemetry.access_logging.clone(),
                invalid: invalid.clone(),
            };
            part.give(waypoint, &Arc::new(Resource::Telemetry(resource)));
        }
        if matches!(telemetry.scope, PolicyScope::Targets(_)) || !invalid.is_empty() {
            let status = covered.status(Some(invalid.as_str()).filter(|of| !of.is_empty()));
            part.status(telemetry.meta.reference(Kind::Telemetry))
                .merge(status);
        }
    }
}
