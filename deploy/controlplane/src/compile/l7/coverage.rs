//! Where a RequestAuthentication or a Telemetry goes that says whom it covers without
//! `targetRefs`: by a selector, for its namespace, or from the root namespace for the mesh.
//!
//! Both matter before an endpoint is picked: tokens open routes, and a request is logged
//! and traced whether it reaches an endpoint or not. So a selector stands for the services
//! all of whose pods it picks. Of other services it stands for the pods that it picks, and
//! holds from where one of them is chosen.

use std::sync::Arc;

use adit_shared::proto::waypoint::target::Kind as Wire;

use super::served::{Served, ServedWorkload, served};
use super::services::{reference, serving};
use super::targets::{Resolved, every_service, resolve};
use super::view::View;
use crate::compile::mesh::MeshConfig;
use crate::model::{Labels, Meta, NamespaceObjects, PolicyScope, Service, selects};

/// Resolves the scope of the object `meta`, which is of the namespace that `view` is of.
pub(super) fn cover(meta: &Meta, scope: &PolicyScope, view: &View<'_>) -> Resolved {
    let is_root = meta.namespace == view.mesh.root_namespace;
    let mut resolved = Resolved::default();
    match scope {
        PolicyScope::Targets(targets) => return resolve(meta, targets, view),
        PolicyScope::Namespace if is_root => {
            for (waypoint, _) in view.waypoints.iter() {
                resolved.add(waypoint, None);
            }
        }
        PolicyScope::Namespace => {
            every_service(view, &mut resolved);
            bound(&Labels::new(), view.namespace, view, &mut resolved);
        }
        PolicyScope::Selector(selector) => {
            let all = is_root && view.waypoints.iter().next().is_some();
            let namespaces = all.then(|| view.namespaces()).into_iter().flatten();
            let names: Vec<&Arc<str>> = match all {
                true => namespaces.map(|(name, _)| name).collect(),
                false => vec![view.namespace],
            };
            for namespace in names {
                selected(selector, namespace, view, &mut resolved);
            }
        }
    }
    resolved
}

/// What `selector` picks of a namespace.
fn selected(selector: &Labels, namespace: &str, view: &View<'_>, resolved: &mut Resolved) {
    let Some(of) = view.namespace(namespace) else {
        return;
    };
    for service in of.services.values().filter(|of| !of.external_name) {
        let waypoints = serving(service, view);
        if waypoints.is_empty() {
            continue;
        }
        let pods = pods(service, of);
        let meta = &service.meta;
        let implied = !selector.is_empty()
            && !service.selector.is_empty()
            && selects(selector, &service.selector);
        let whole = selector.is_empty()
            || implied
            || (!pods.is_empty() && pods.iter().all(|(_, labels)| selects(selector, labels)));
        let targets: Vec<_> = if whole {
            let target = reference(&meta.namespace, &meta.name, view.mesh);
            vec![Wire::Service(target)]
        } else {
            let picked = pods.iter().filter(|(_, labels)| selects(selector, labels));
            picked
                .map(|(name, _)| Wire::Workload(uid(namespace, name, view.mesh)))
                .collect()
        };
        for waypoint in &waypoints {
            for target in &targets {
                resolved.add(waypoint, Some(target.clone()));
            }
        }
    }
    bound(selector, namespace, view, resolved);
}

/// The pods of a service with their labels.
fn pods<'a>(service: &Service, of: &'a NamespaceObjects) -> Vec<(&'a Arc<str>, &'a Labels)> {
    if service.selector.is_empty() {
        return Vec::new();
    }
    let pods = of.pods.iter();
    let live = pods.filter(|(_, pod)| !pod.phase.is_terminal() && !pod.addresses.is_empty());
    live.map(|(name, pod)| (name, &pod.meta.labels))
        .filter(|(_, labels)| selects(&service.selector, labels))
        .collect()
}

/// Workloads that are bound to a waypoint themselves: who dials them names no service.
fn bound(selector: &Labels, namespace: &str, view: &View<'_>, resolved: &mut Resolved) {
    let Some(of) = view.namespace(namespace) else {
        return;
    };
    let all: Served<'_> = served(of, view.waypoints, view.mesh);
    let picks = |of: &ServedWorkload<'_>| {
        of.bound && of.labels.is_some_and(|labels| selects(selector, labels))
    };
    for (waypoint, workloads) in &all {
        for (uid, _) in workloads.iter().filter(|(_, of)| picks(of)) {
            resolved.add(waypoint, Some(Wire::Workload(uid.clone())));
        }
    }
}

fn uid(namespace: &str, name: &str, mesh: &MeshConfig) -> String {
    format!("{}//Pod/{namespace}/{name}", mesh.cluster_id)
}
