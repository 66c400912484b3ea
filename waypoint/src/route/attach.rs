//! Which routes hold on a port of a service for a caller (Gateway API GAMMA).
//!
//! * A route in the service's namespace (producer route) holds for every caller; one of another
//!   namespace (consumer route) for callers of its own namespace only, and there in place of the
//!   producer's: on a port where it holds, what it does not match has no match.
//! * A parent without port is every port, next to the routes of the port itself.
//! * On a port one type holds: GRPC before HTTP before TLS before TCP.
//! * An attachment that was rejected does not exist.

use std::collections::HashMap;
use std::sync::Arc;

use adit_shared::model::ServiceName;

use super::rule::{Route, RouteKind};
use super::table::{HttpTable, L4Table};

/// Everything that is attached to one service.
#[derive(Debug, Default)]
pub struct ServiceRoutes {
    producer: Scope,
    /// By the callers' namespace.
    consumers: HashMap<Arc<str>, Scope>,
}

/// What holds for a connection or its requests.
#[derive(Debug, Clone, Copy)]
pub enum PortRoutes<'a> {
    /// HTTPRoutes or GRPCRoutes.
    Http(&'a HttpTable),
    /// TLSRoutes.
    Tls(&'a L4Table),
    /// TCPRoutes.
    Tcp(&'a L4Table),
    /// Nothing is attached: traffic is spread over the service's own endpoints.
    None,
}

/// Routes for one set of callers.
#[derive(Debug, Default)]
struct Scope {
    /// Ports that a parent names.
    ports: HashMap<u16, Table>,
    others: Table,
}

#[derive(Debug, Default)]
enum Table {
    Http(HttpTable),
    Tls(L4Table),
    Tcp(L4Table),
    #[default]
    None,
}

impl ServiceRoutes {
    /// Takes those of `routes` that are attached to `service`.
    pub fn build(service: &ServiceName, routes: impl IntoIterator<Item = Arc<Route>>) -> Self {
        let mut producer = Vec::new();
        let mut consumers: HashMap<Arc<str>, Vec<Arc<Route>>> = HashMap::new();
        for route in routes {
            if !route.services().any(|parent| parent == service) {
                continue;
            }
            if route.id.namespace == service.namespace {
                producer.push(route);
            } else {
                let namespace = Arc::clone(&route.id.namespace);
                consumers.entry(namespace).or_default().push(route);
            }
        }
        let consumers = consumers
            .into_iter()
            .map(|(namespace, routes)| (namespace, Scope::new(service, &routes)));
        Self {
            producer: Scope::new(service, &producer),
            consumers: consumers.collect(),
        }
    }

    /// What holds for traffic to `port` of the service from `caller_namespace`: the namespace
    /// of the verified peer, empty where it has none.
    pub fn for_port(&self, port: u16, caller_namespace: &str) -> PortRoutes<'_> {
        let consumer = self.consumers.get(caller_namespace);
        match consumer.map(|scope| scope.for_port(port)) {
            Some(PortRoutes::None) | None => self.producer.for_port(port),
            Some(routes) => routes,
        }
    }

    /// Whether nothing is attached.
    pub fn is_empty(&self) -> bool {
        self.consumers.is_empty() && self.producer.is_empty()
    }
}

impl Scope {
    fn new(service: &ServiceName, routes: &[Arc<Route>]) -> Self {
        let attached = |route: &Route, port: Option<u16>| {
            let mut parents = route.parents.iter();
            parents.any(|p| p.service == *service && (p.port.is_none() || p.port == port))
        };
        let table = |port| {
            let held = routes.iter().filter(|route| attached(route, port));
            Table::new(&held.map(|route| &**route).collect::<Vec<_>>())
        };
        let parents = routes.iter().flat_map(|route| &*route.parents);
        let mut ports: Vec<u16> = parents
            .filter(|parent| parent.service == *service)
            .filter_map(|parent| parent.port)
            .collect();
        ports.sort_unstable();
        ports.dedup();
        Self {
            ports: ports
                .into_iter()
                .map(|port| (port, table(Some(port))))
                .collect(),
            others: table(None),
        }
    }

    fn for_port(&self, port: u16) -> PortRoutes<'_> {
        match self.ports.get(&port).unwrap_or(&self.others) {
            Table::Http(table) => PortRoutes::Http(table),
            Table::Tls(table) => PortRoutes::Tls(table),
            Table::Tcp(table) => PortRoutes::Tcp(table),
            Table::None => PortRoutes::None,
        }
    }

    fn is_empty(&self) -> bool {
        self.ports.is_empty() && matches!(self.others, Table::None)
    }
}

impl Table {
    fn new(routes: &[&Route]) -> Self {
        let Some(kind) = routes.iter().map(|route| route.kind).max() else {
            return Self::None;
        };
        let held = routes.iter().copied().filter(|route| route.kind == kind);
        match kind {
            RouteKind::Grpc | RouteKind::Http => Self::Http(HttpTable::new(held)),
            RouteKind::Tls => L4Table::new(held).map_or(Self::None, Self::Tls),
            RouteKind::Tcp => L4Table::new(held).map_or(Self::None, Self::Tcp),
        }
    }
}
