//! Waypoints, what is bound to them, and routes that lead nowhere.
//!
//! Manifests hold no generated objects, so that nothing is said of a waypoint without an
//! address.

use super::Report;
use crate::compile::MeshConfig;
use crate::compile::l7::{
    self, Bindable, NotReady, Outcome, USE_WAYPOINT, USE_WAYPOINT_NAMESPACE, View, WaypointName,
    Waypoints, bind,
};
use crate::model::{
    At, BackendRef, Code, FieldPath, Kind, Meta, NamespaceObjects, Objects, ParentRef, Route,
    RouteRule, Severity,
};
use crate::status::{Condition, ObjectStatus};

pub(super) fn check(objects: &Objects, mesh: &MeshConfig, report: &mut Report) {
    let waypoints = Waypoints::of(objects, &mesh.network, mesh);
    for (name, of) in &objects.namespaces {
        let namespace = of.namespace.as_deref();
        if let Some(namespace) = namespace {
            // What it names is checked once, not with each of its services.
            check_labels(Kind::Namespace, &namespace.meta, name, &waypoints, report);
        }
        let services = of
            .services
            .values()
            .filter(|service| !service.external_name);
        for service in services {
            check_bound(
                Bindable::Service,
                &service.meta,
                of,
                &waypoints,
                mesh,
                report,
            );
        }
        for pod in of.pods.values() {
            check_bound(Bindable::Workload, &pod.meta, of, &waypoints, mesh, report);
        }
        for of in of.virtual_services.values() {
            unsupported(
                Kind::VirtualService,
                &of.meta,
                "use HTTPRoute, GRPCRoute, TLSRoute or TCPRoute",
                report,
            );
        }
        for of in of.service_entries.values() {
            unsupported(
                Kind::ServiceEntry,
                &of.meta,
                "its hosts are not known to the mesh",
                report,
            );
        }
        let view = View::new(name, objects, &waypoints, mesh);
        let part = l7::compile_namespace(of, &view);
        for gateway in of.gateways.values() {
            let waypoint = WaypointName {
                namespace: name.clone(),
                name: gateway.meta.name.clone(),
            };
            let refused = waypoints.get(&waypoint).map(|of| &of.address);
            if let Some(Err(NotReady::NotAccepted(why))) = refused
                && gateway.errors.is_empty()
            {
                let message = format!("is not accepted as a waypoint: {why}");
                negative(Kind::Gateway, &gateway.meta, spec(), message, report);
            }
        }
        let status = |kind: Kind, meta: &Meta| part.statuses.get(&meta.reference(kind));
        for route in of.http_routes.values() {
            check_route(
                Kind::HttpRoute,
                route,
                status(Kind::HttpRoute, &route.meta),
                &view,
                report,
            );
        }
        for route in of.grpc_routes.values() {
            check_route(
                Kind::GrpcRoute,
                route,
                status(Kind::GrpcRoute, &route.meta),
                &view,
                report,
            );
        }
        for route in of.tls_routes.values() {
            check_route(
                Kind::TlsRoute,
                route,
                status(Kind::TlsRoute, &route.meta),
                &view,
                report,
            );
        }
        for route in of.tcp_routes.values() {
            check_route(
                Kind::TcpRoute,
                route,
                status(Kind::TcpRoute, &route.meta),
                &view,
                report,
            );
        }
        for policy in of
            .backend_tls_policies
            .values()
            .filter(|of| of.errors.is_empty())
        {
            let found = status(Kind::BackendTlsPolicy, &policy.meta);
            let ancestors = found.into_iter().flat_map(|status| &status.ancestors);
            let conditions = ancestors.flat_map(|ancestor| &ancestor.conditions);
            for condition in conditions.filter(|condition| !condition.status) {
                negative(
                    Kind::BackendTlsPolicy,
                    &policy.meta,
                    spec(),
                    shown(condition),
                    report,
                );
            }
        }
    }
}

fn spec() -> FieldPath {
    At::ROOT.key("spec").path()
}

fn label(key: &str) -> FieldPath {
    let metadata = At::ROOT.key("metadata");
    let labels = metadata.key("labels");
    labels.key(key).path()
}

fn shown(condition: &Condition) -> String {
    format!(
        "{}: {}: {}",
        condition.kind, condition.reason, condition.message
    )
}

fn negative(kind: Kind, meta: &Meta, path: FieldPath, message: String, report: &mut Report) {
    let code = Code::NegativeConditionStatus;
    report.add((kind, meta), path, Severity::Warning, code, message);
}

fn unsupported(kind: Kind, meta: &Meta, instead: &str, report: &mut Report) {
    let message = format!("{kind} is not supported yet and has no effect: {instead}");
    let code = Code::IneffectivePolicy;
    report.add((kind, meta), spec(), Severity::Warning, code, message);
}

/// Whether the labels name a waypoint that is there.
fn check_labels(
    kind: Kind,
    meta: &Meta,
    own_namespace: &str,
    waypoints: &Waypoints,
    report: &mut Report,
) {
    let Some(name) = meta.label(USE_WAYPOINT) else {
        if meta.label(USE_WAYPOINT_NAMESPACE).is_some() {
            report.add(
                (kind, meta),
                label(USE_WAYPOINT_NAMESPACE),
                Severity::Warning,
                Code::InvalidAnnotation,
                format!("has no effect without the label {USE_WAYPOINT}"),
            );
        }
        return;
    };
    let namespace = meta.label(USE_WAYPOINT_NAMESPACE).unwrap_or(own_namespace);
    let waypoint = WaypointName {
        namespace: namespace.into(),
        name: name.into(),
    };
    if name != "none" && waypoints.get(&waypoint).is_none() {
        report.add(
            (kind, meta),
            label(USE_WAYPOINT),
            Severity::Error,
            Code::ReferencedResourceNotFound,
            format!("there is no waypoint {waypoint}; traffic that should pass it is refused"),
        );
    }
}

fn check_bound(
    bindable: Bindable,
    meta: &Meta,
    of: &NamespaceObjects,
    waypoints: &Waypoints,
    mesh: &MeshConfig,
    report: &mut Report,
) {
    let kind = match bindable {
        Bindable::Service => Kind::Service,
        Bindable::Workload => Kind::Pod,
    };
    check_labels(kind, meta, &meta.namespace, waypoints, report);
    let Some(binding) = bind(bindable, meta, of.namespace.as_deref(), waypoints) else {
        return;
    };
    if matches!(
        binding.outcome,
        Outcome::Denied | Outcome::UnsupportedTraffic
    ) {
        let own = meta.label(USE_WAYPOINT).is_some();
        let path = if own {
            label(USE_WAYPOINT)
        } else {
            At::ROOT.key("metadata").path()
        };
        negative(kind, meta, path, shown(&binding.condition(mesh)), report);
    }
}

fn check_route<R: RouteRule>(
    kind: Kind,
    route: &Route<R>,
    status: Option<&ObjectStatus>,
    view: &View<'_>,
    report: &mut Report,
) {
    let Some(status) = status else {
        return;
    };
    let meta = &route.meta;
    for parent in &route.parents {
        let known = matches!(
            (&*parent.group, &*parent.kind),
            ("" | "core", "Service") | ("gateway.networking.k8s.io", _)
        );
        if !known {
            let at = At::ROOT.key("spec");
            let message = format!("{} cannot be the parent of a route here", parent.kind);
            let code = Code::IneffectivePolicy;
            report.add(
                (kind, meta),
                at.key("parentRefs").path(),
                Severity::Warning,
                code,
                message,
            );
        }
    }
    for condition in &status.conditions {
        let at = At::ROOT.key("spec");
        let missing = condition.reason == "NoMatchingParent";
        let (severity, code) = if missing {
            (Severity::Error, Code::ReferencedResourceNotFound)
        } else {
            (Severity::Warning, Code::NegativeConditionStatus)
        };
        let message = shown(condition);
        report.add(
            (kind, meta),
            at.key("parentRefs").path(),
            severity,
            code,
            message,
        );
    }
    // What is wrong with its fields was said where it was read.
    for parent in &status.parents {
        let conditions = parent.conditions.iter();
        let accepted = conditions.filter(|condition| condition.kind == "Accepted");
        for condition in accepted.filter(|of| !of.status && of.reason != "UnsupportedValue") {
            let at = At::ROOT.key("spec");
            let path = at.key("parentRefs").path();
            negative(kind, meta, path, shown(condition), report);
        }
    }
    let backends = route.rules.iter().flat_map(RouteRule::backends);
    for backend in backends {
        check_backend((kind, meta), &route.parents, backend, view, report);
    }
}

fn check_backend(
    object: (Kind, &Meta),
    parents: &[ParentRef],
    backend: &BackendRef,
    view: &View<'_>,
    report: &mut Report,
) {
    let Err((reason, message)) = l7::check_backend(object.0, parents, backend, view) else {
        return;
    };
    let (severity, code) = match reason {
        "BackendNotFound" => (Severity::Error, Code::ReferencedResourceNotFound),
        _ => (Severity::Warning, Code::NegativeConditionStatus),
    };
    report.add(object, backend.path.clone(), severity, code, message);
}
