//! Which workloads of a namespace each waypoint serves: those of services that are bound
//! to it, and those that are bound to it themselves.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::binding::{Bindable, bind};
use super::waypoints::{WaypointName, Waypoints};
use crate::compile::mesh::MeshConfig;
use crate::compile::selectors::SelectorIndex;
use crate::compile::workloads::{assigned, endpoint_uid, pod_uid, slices_with_services};
use crate::model::{Labels, NamespaceObjects, Service};

/// A workload that a waypoint serves.
#[derive(Debug, Clone, Copy)]
pub(in crate::compile) struct ServedWorkload<'a> {
    /// Its labels; an endpoint that is no pod has none.
    pub(in crate::compile) labels: Option<&'a Labels>,
    /// It is bound itself, so that also who dials its address passes the waypoint.
    pub(in crate::compile) bound: bool,
}

/// The workloads that each waypoint serves, by uid.
pub(in crate::compile) type Served<'a> =
    BTreeMap<WaypointName, BTreeMap<String, ServedWorkload<'a>>>;

/// Collects those of a namespace.
pub(in crate::compile) fn served<'a>(
    objects: &'a NamespaceObjects,
    waypoints: &Waypoints,
    mesh: &MeshConfig,
) -> Served<'a> {
    if waypoints.is_empty() {
        return Served::new();
    }
    let namespace = objects.namespace.as_deref();
    let of_service = |service: &Service| {
        let binding = bind(Bindable::Service, &service.meta, namespace, waypoints);
        binding.map_or_else(Vec::new, |binding| binding.serving(waypoints))
    };
    let bound: BTreeMap<&Arc<str>, Vec<WaypointName>> = objects
        .services
        .iter()
        .filter(|(_, service)| !service.external_name)
        .map(|(name, service)| (name, of_service(service)))
        .collect();
    let selecting = bound.iter().filter_map(|(name, waypoints)| {
        let selector = &objects.services.get(*name)?.selector;
        (!selector.is_empty() && !waypoints.is_empty()).then_some((selector, waypoints))
    });
    let selecting = SelectorIndex::new(selecting.collect());
    let assigned = assigned(objects);
    let mut found = Served::new();
    for pod in objects.pods.values() {
        let meta = &pod.meta;
        if pod.phase.is_terminal() || pod.addresses.is_empty() {
            continue;
        }
        let uid = pod_uid(pod, mesh);
        let mut add = |waypoint: &WaypointName, bound: bool| {
            let of = found.entry(waypoint.clone()).or_default();
            let workload = of.entry(uid.clone()).or_insert(ServedWorkload {
                labels: Some(&meta.labels),
                bound,
            });
            workload.bound |= bound;
        };
        for waypoint in selecting.matching(&meta.labels).copied().flatten() {
            add(waypoint, false);
        }
        for (service, _) in assigned.get(&*meta.name).into_iter().flatten() {
            for waypoint in bound.get(&service.meta.name).into_iter().flatten() {
                add(waypoint, false);
            }
        }
        let own = bind(Bindable::Workload, meta, namespace, waypoints);
        for waypoint in own.iter().flat_map(|own| own.serving(waypoints)) {
            add(&waypoint, true);
        }
    }
    for (slice, service) in slices_with_services(objects) {
        for waypoint in bound.get(&service.meta.name).into_iter().flatten() {
            let others = slice.endpoints.iter().filter(|of| of.pod.is_none());
            for ip in others.flat_map(|endpoint| &endpoint.addresses) {
                let of = found.entry(waypoint.clone()).or_default();
                of.entry(endpoint_uid(slice, ip, mesh))
                    .or_insert(ServedWorkload {
                        labels: None,
                        bound: false,
                    });
            }
        }
    }
    found
}
