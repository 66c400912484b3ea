//! Routes of Gateway API to routes of waypoints.
//!
//! A route goes to the waypoint of each service that it is attached to. What is wrong
//! with it goes along and fails there: a rule that cannot be understood, a backend that
//! is not there or not granted. What is wrong with an attachment keeps it out of force.

use std::sync::Arc;

use adit_shared::proto::waypoint as wire;

use super::attachment::{Attachment, Claims, RouteKind, Verdict};
use super::backends::Resolver;
use super::resource::{Resource, object};
use super::services::{reference, serving};
use super::view::View;
use super::{Part, reach, rules};
use crate::compile::l7::waypoints::WaypointName;
use crate::model::{ByName, NamespaceObjects, ParentRef, Route, RouteRule};
use crate::status::{Condition, ObjectStatus, ParentStatus, RefStatus};

/// The condition of a route that no waypoint carries out.
const RESOLVED_WAYPOINTS: &str = "ResolvedWaypoints";

pub(super) fn compile(objects: &NamespaceObjects, view: &View<'_>, part: &mut Part) {
    let mut claims = Claims::default();
    collect(&mut claims, RouteKind::Grpc, &objects.grpc_routes, view);
    collect(&mut claims, RouteKind::Http, &objects.http_routes, view);
    collect(&mut claims, RouteKind::Tls, &objects.tls_routes, view);
    collect(&mut claims, RouteKind::Tcp, &objects.tcp_routes, view);
    let all = Routes {
        claims: &claims,
        view,
    };
    all.compile(RouteKind::Grpc, &objects.grpc_routes, part, rules::grpc);
    all.compile(RouteKind::Http, &objects.http_routes, part, rules::http);
    all.compile(RouteKind::Tls, &objects.tls_routes, part, rules::tls);
    all.compile(RouteKind::Tcp, &objects.tcp_routes, part, rules::tcp);
}

fn collect<R>(claims: &mut Claims, kind: RouteKind, routes: &ByName<Route<R>>, view: &View<'_>) {
    for route in routes.values().filter(|route| view.mesh.owns(&route.meta)) {
        for parent in &route.parents {
            claims.add(kind, parent, view);
        }
    }
}

/// What the routes of a namespace share.
struct Routes<'c, 'v, 'a> {
    claims: &'c Claims,
    view: &'v View<'a>,
}

impl Routes<'_, '_, '_> {
    fn compile<R: RouteRule>(
        &self,
        kind: RouteKind,
        routes: &ByName<Route<R>>,
        part: &mut Part,
        rules: impl Fn(&Route<R>, &Resolver<'_, '_>) -> wire::route::Kind,
    ) {
        let view = self.view;
        for route in routes.values().filter(|route| view.mesh.owns(&route.meta)) {
            let parents = route.parents.iter();
            let attachments: Vec<_> = parents
                .map(|parent| (parent, self.claims.attach(kind, parent, view)))
                .collect();
            let resolver = Resolver::new(kind.kind(), &route.parents, view);
            // Always, for what is wrong with the backends is told in any case.
            let rules = rules(route, &resolver);
            let waypoints = waypoints(&attachments, view);
            if !waypoints.is_empty() {
                let parents = attachments.iter();
                let resource = Arc::new(Resource::Route(wire::Route {
                    object: Some(object(&route.meta, kind.kind())),
                    parents: parents
                        .flat_map(|(_, attachment)| wire_parents(attachment, view))
                        .collect(),
                    hostnames: route.hostnames.clone(),
                    kind: Some(rules),
                }));
                for waypoint in &waypoints {
                    part.give(waypoint, &resource);
                    for (namespace, name) in resolver.reached() {
                        reach::compile(waypoint, &namespace, &name, view, part);
                    }
                }
            }
            let status = status(route, &attachments, &resolver, view);
            *part.status(route.meta.reference(kind.kind())) = status;
        }
    }
}

/// The waypoints of the services that the route is in force at.
fn waypoints(attachments: &[(&ParentRef, Attachment<'_>)], view: &View<'_>) -> Vec<WaypointName> {
    let mut found = Vec::new();
    for (_, attachment) in attachments {
        if let Attachment::Service { service, verdict } = attachment
            && !matches!(verdict, Verdict::Rejected { .. })
        {
            found.extend(serving(service, view));
        }
    }
    found.sort();
    found.dedup();
    found
}

fn wire_parents(attachment: &Attachment<'_>, view: &View<'_>) -> Vec<wire::RouteParent> {
    let Attachment::Service { service, verdict } = attachment else {
        return Vec::new();
    };
    let meta = &service.meta;
    let parent = |port: u16, rejected: &str| wire::RouteParent {
        service: Some(reference(&meta.namespace, &meta.name, view.mesh)),
        port: port.into(),
        rejected: rejected.into(),
    };
    match verdict {
        Verdict::EveryPort => vec![parent(0, "")],
        Verdict::Ports(ports) => ports.iter().map(|port| parent(*port, "")).collect(),
        Verdict::Rejected { port, message, .. } => vec![parent(*port, message)],
    }
}

fn status<R: RouteRule>(
    route: &Route<R>,
    attachments: &[(&ParentRef, Attachment<'_>)],
    resolver: &Resolver<'_, '_>,
    view: &View<'_>,
) -> ObjectStatus {
    let invalid = route.rules.iter().filter(|rule| rule.invalid().is_some());
    let all_invalid = !route.rules.is_empty() && invalid.clone().count() == route.rules.len();
    let first_invalid = invalid.clone().find_map(RouteRule::invalid);
    let resolved = match resolver.first_failure() {
        None => Condition::new(
            "ResolvedRefs",
            true,
            "ResolvedRefs",
            "all backends are there",
        ),
        Some(failure) => Condition::new("ResolvedRefs", false, failure.reason, failure.message),
    };
    let mut status = ObjectStatus::default();
    let mut unbound = None;
    for (parent, attachment) in attachments {
        let accepted = match attachment {
            Attachment::NotOurs => continue,
            Attachment::Missing => {
                unbound.get_or_insert_with(|| {
                    let message = format!("there is no {} {:?}", parent.kind, parent.name);
                    Condition::new(RESOLVED_WAYPOINTS, false, "NoMatchingParent", message)
                });
                continue;
            }
            Attachment::Waypoint => Condition::new(
                "Accepted",
                false,
                "NotAllowedByListeners",
                "routes attach to Services, not to a waypoint's Gateway",
            ),
            Attachment::Service {
                verdict:
                    Verdict::Rejected {
                        reason, message, ..
                    },
                ..
            } => Condition::new("Accepted", false, reason, message),
            Attachment::Service { .. } => match first_invalid {
                Some(why) if all_invalid => {
                    Condition::new("Accepted", false, "UnsupportedValue", why)
                }
                _ => Condition::new("Accepted", true, "Accepted", "is attached"),
            },
        };
        let mut conditions = vec![accepted, resolved.clone()];
        if let Some(why) = first_invalid.filter(|_| !all_invalid) {
            let message = format!("Dropped Rule: what it matches is answered with an error: {why}");
            conditions.push(Condition::new(
                "PartiallyInvalid",
                true,
                "UnsupportedValue",
                message,
            ));
        }
        status.parents.push(ParentStatus {
            reference: parent_status(parent),
            conditions,
        });
        if let Attachment::Service { service, verdict } = attachment
            && !matches!(verdict, Verdict::Rejected { .. })
            && serving(service, view).is_empty()
        {
            let meta = &service.meta;
            unbound.get_or_insert_with(|| {
                Condition::new(
                    RESOLVED_WAYPOINTS,
                    false,
                    "MissingUseWaypointLabel",
                    format!(
                        "no waypoint serves Service {}/{}: neither it nor its namespace has a label {} that leads to one",
                        meta.namespace, meta.name, super::USE_WAYPOINT
                    ),
                )
            });
        }
    }
    status.conditions.extend(unbound);
    status
}

/// The reference as the API server would show it.
fn parent_status(parent: &ParentRef) -> RefStatus {
    RefStatus {
        group: parent.group.to_string(),
        kind: parent.kind.to_string(),
        namespace: parent.namespace.as_deref().map(ToOwned::to_owned),
        name: parent.name.to_string(),
        section: parent.section.as_deref().map(ToOwned::to_owned),
        port: parent.port,
    }
}
