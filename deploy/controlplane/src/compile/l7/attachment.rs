//! What a route is attached to, and which of several kinds has a port.
//!
//! Of routes of different kinds at one port of a service the one of the higher kind is in
//! force: GRPCRoute, HTTPRoute, TLSRoute, TCPRoute (GEP-1426). That is so among the routes
//! of one namespace; those of another are for other callers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::view::View;
use crate::compile::l7::waypoints::WaypointName;
use crate::model::{DeclaredProtocol, Kind, ParentRef, Service};

/// Kinds of routes, the lower first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RouteKind {
    Tcp,
    Tls,
    Http,
    Grpc,
}

impl RouteKind {
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Tcp => Kind::TcpRoute,
            Self::Tls => Kind::TlsRoute,
            Self::Http => Kind::HttpRoute,
            Self::Grpc => Kind::GrpcRoute,
        }
    }

    /// Whether a route that names no port is for one that is declared so.
    fn is_for(self, declared: DeclaredProtocol) -> bool {
        use DeclaredProtocol::{Grpc, Http, Http2, Tcp, Tls, Undeclared};
        match self {
            Self::Grpc | Self::Http => matches!(declared, Undeclared | Http | Http2 | Grpc),
            Self::Tls => matches!(declared, Undeclared | Tls),
            Self::Tcp => matches!(declared, Undeclared | Tcp | Tls),
        }
    }
}

/// What a `parentRef` leads to.
#[derive(Debug)]
pub(super) enum Attachment<'a> {
    /// Something that other programs serve.
    NotOurs,
    /// A service or a waypoint that is not there.
    Missing,
    /// A waypoint's Gateway.
    Waypoint,
    /// A service.
    Service {
        /// The service.
        service: &'a Service,
        /// Whether the route is in force there.
        verdict: Verdict,
    },
}

/// Whether a route is in force at a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// At all its ports, also those that are yet to come.
    EveryPort,
    /// At these.
    Ports(Vec<u16>),
    /// Nowhere.
    Rejected {
        /// The port that was asked for; 0: every port.
        port: u16,
        /// Why, in one word.
        reason: &'static str,
        /// Why, for people.
        message: String,
    },
}

/// The highest kind of route at each port of each service.
#[derive(Debug, Default)]
pub(super) struct Claims(BTreeMap<(Arc<str>, Arc<str>, u16), RouteKind>);

impl Claims {
    /// Counts a `parentRef` of a route.
    pub(super) fn add(&mut self, kind: RouteKind, parent: &ParentRef, view: &View<'_>) {
        let Some(Found::Service(service)) = find(parent, view) else {
            return;
        };
        for port in covered(kind, parent, service).unwrap_or_default() {
            let meta = &service.meta;
            let key = (meta.namespace.clone(), meta.name.clone(), port);
            let highest = self.0.entry(key).or_insert(kind);
            *highest = (*highest).max(kind);
        }
    }

    /// Attaches a route of `kind` to `parent`. Every route has been counted.
    pub(super) fn attach<'a>(
        &self,
        kind: RouteKind,
        parent: &ParentRef,
        view: &View<'a>,
    ) -> Attachment<'a> {
        let service = match find(parent, view) {
            None => return Attachment::NotOurs,
            Some(Found::Nothing) => return Attachment::Missing,
            Some(Found::Waypoint) => return Attachment::Waypoint,
            Some(Found::Service(service)) => service,
        };
        let verdict = match covered(kind, parent, service) {
            Err(message) => Verdict::Rejected {
                port: parent.port.unwrap_or_default(),
                reason: "NoMatchingParent",
                message,
            },
            Ok(ports) => self.decide(kind, parent, service, ports),
        };
        Attachment::Service { service, verdict }
    }

    fn decide(
        &self,
        kind: RouteKind,
        parent: &ParentRef,
        service: &Service,
        ports: Vec<u16>,
    ) -> Verdict {
        let meta = &service.meta;
        let above = |port: &u16| {
            let key = (meta.namespace.clone(), meta.name.clone(), *port);
            self.0.get(&key).copied().filter(|highest| *highest > kind)
        };
        let named = parent.port.is_some() || parent.section.is_some();
        match ports.iter().find_map(above) {
            None if named => Verdict::Ports(ports),
            None => Verdict::EveryPort,
            Some(highest) => {
                let left: Vec<u16> = ports.into_iter().filter(|p| above(p).is_none()).collect();
                if !left.is_empty() {
                    return Verdict::Ports(left);
                }
                Verdict::Rejected {
                    port: parent.port.unwrap_or_default(),
                    reason: "Conflicted",
                    message: format!(
                        "a {} is attached to the same port of Service {}/{}",
                        highest.kind(),
                        meta.namespace,
                        meta.name
                    ),
                }
            }
        }
    }
}

enum Found<'a> {
    Nothing,
    Waypoint,
    Service(&'a Service),
}

/// What a reference leads to; `None`: it is none of ours.
fn find<'a>(parent: &ParentRef, view: &View<'a>) -> Option<Found<'a>> {
    let namespace = parent.namespace.as_ref().unwrap_or(view.namespace);
    match (&*parent.group, &*parent.kind) {
        ("" | "core", "Service") => Some(
            view.service(namespace, &parent.name)
                .map_or(Found::Nothing, Found::Service),
        ),
        ("gateway.networking.k8s.io", "Gateway") => {
            let name = WaypointName {
                namespace: namespace.clone(),
                name: parent.name.clone(),
            };
            view.waypoints.get(&name).map(|_| Found::Waypoint)
        }
        _ => None,
    }
}

/// The ports of `service` that a `parentRef` is for. `sectionName` is a port's name there.
fn covered(kind: RouteKind, parent: &ParentRef, service: &Service) -> Result<Vec<u16>, String> {
    let named = parent.port.is_some() || parent.section.is_some();
    let ports = service.ports.iter().filter(|port| {
        parent.port.is_none_or(|number| number == port.number)
            && parent
                .section
                .as_ref()
                .is_none_or(|name| *name == port.name)
    });
    let ports: Vec<_> = ports.collect();
    if named && ports.is_empty() {
        let wanted = match (parent.port, &parent.section) {
            (Some(port), None) => format!("port {port}"),
            (None, Some(name)) => format!("port {name:?}"),
            (port, name) => format!(
                "port {} with the name {:?}",
                port.unwrap_or_default(),
                name.as_deref().unwrap_or_default()
            ),
        };
        let meta = &service.meta;
        return Err(format!(
            "Service {}/{} has no {wanted}",
            meta.namespace, meta.name
        ));
    }
    let ports = ports.into_iter();
    Ok(ports
        .filter(|port| named || kind.is_for(port.declared))
        .map(|port| port.number)
        .collect())
}
