//! One user object, understood: what it is attached to and what its rules do.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::model::ServiceName;

use super::backend::{Backend, BackendError, Backends};
use super::filter::Filters;
use super::matching::RequestMatch;
use super::problem::Problem;
use super::retry::RetryPolicy;
use super::session::SessionPersistence;

/// HTTPRoute, GRPCRoute, TLSRoute or TCPRoute. Whatever could not be understood answers 500
/// (closes the connection) where it stands, and is listed in [`Route::problems`].
#[derive(Debug, Clone)]
pub struct Route {
    pub(super) id: Arc<RouteId>,
    pub(super) created: i64,
    pub(super) kind: RouteKind,
    pub(super) parents: Box<[Parent]>,
    /// Of a TLSRoute: in small letters, `*` left out before its dot. Empty: any, and none.
    pub(super) hostnames: Box<[Box<str>]>,
    pub(super) http: Box<[Arc<Rule>]>,
    pub(super) l4: Box<[Arc<L4Rule>]>,
    pub(super) problems: Box<[Problem]>,
}

/// The user's object. Ordered "alphabetically by {namespace}/{name}" (Gateway API).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RouteId {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// `HTTPRoute`, `GRPCRoute`, ...
    pub kind: Arc<str>,
}

impl fmt::Display for RouteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

impl Ord for RouteId {
    fn cmp(&self, other: &Self) -> Ordering {
        // As one text: `-` and `.` sort before the slash.
        let own = self
            .namespace
            .bytes()
            .chain([b'/'])
            .chain(self.name.bytes());
        let others = other
            .namespace
            .bytes()
            .chain([b'/'])
            .chain(other.name.bytes());
        own.cmp(others)
            .then_with(|| self.namespace.cmp(&other.namespace))
            .then_with(|| self.kind.cmp(&other.kind))
    }
}

impl PartialOrd for RouteId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What a route routes; the greatest on a port of a service wins it (Gateway API GAMMA: GRPC,
/// HTTP, TLS, TCP).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    /// Connections.
    Tcp,
    /// Connections that begin with a ClientHello.
    Tls,
    /// HTTP requests.
    Http,
    /// gRPC calls.
    Grpc,
}

/// Where a route is attached. Attachments that are not in force are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parent {
    pub(super) service: ServiceName,
    /// `None`: every port.
    pub(super) port: Option<u16>,
}

/// A rule of an HTTPRoute or a GRPCRoute.
#[derive(Debug, Clone)]
pub struct Rule {
    pub(super) route: Arc<RouteId>,
    /// As telemetry names it.
    pub(super) label: Arc<str>,
    pub(super) index: usize,
    pub(super) name: Option<Box<str>>,
    pub(super) matches: Box<[RequestMatch]>,
    pub(super) filters: Filters,
    pub(super) backends: Backends,
    pub(super) timeouts: Timeouts,
    pub(super) retry: Option<RetryPolicy>,
    pub(super) session: Option<SessionPersistence>,
    pub(super) invalid: Option<Arc<str>>,
}

/// A rule of a TCPRoute or a TLSRoute.
#[derive(Debug, Clone)]
pub struct L4Rule {
    pub(super) route: Arc<RouteId>,
    pub(super) index: usize,
    pub(super) name: Option<Box<str>>,
    pub(super) backends: Backends,
    pub(super) invalid: Option<Arc<str>>,
}

/// `HTTPRouteRule.timeouts`. `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// From the request's arrival to the end of the response, all tries together.
    pub request: Option<Duration>,
    /// One try, from the first byte sent to the backend to the end of its response.
    pub backend_request: Option<Duration>,
}

impl Route {
    /// The user's object.
    pub fn id(&self) -> &Arc<RouteId> {
        &self.id
    }

    /// What it routes.
    pub fn kind(&self) -> RouteKind {
        self.kind
    }

    /// What could not be understood.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The services it is attached to, where the attachment is in force. One stands here as
    /// often as it is named, by port.
    pub fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.parents.iter().map(|parent| &parent.service)
    }

    /// The rules of an HTTPRoute or a GRPCRoute, in order.
    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.http
    }

    /// The rules of a TCPRoute or a TLSRoute, in order.
    pub fn l4_rules(&self) -> &[Arc<L4Rule>] {
        &self.l4
    }
}

impl Rule {
    /// The user's object.
    pub fn route(&self) -> &Arc<RouteId> {
        &self.route
    }

    /// As telemetry names it: `namespace/route.rule`, the rule by its name or else its place.
    pub fn label(&self) -> &Arc<str> {
        &self.label
    }

    pub(super) fn make_label(id: &RouteId, index: usize, name: &str) -> Arc<str> {
        let RouteId {
            namespace,
            name: route,
            ..
        } = id;
        match name {
            "" => format!("{namespace}/{route}.{index}").into(),
            name => format!("{namespace}/{route}.{name}").into(),
        }
    }

    /// Place among the rules of its route, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its name, where it has one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// What is done to requests and responses, whatever the backend.
    pub fn filters(&self) -> &Filters {
        &self.filters
    }

    /// Whether it lets only some requests pass, or cannot be understood.
    pub(super) fn guards(&self) -> bool {
        self.invalid.is_some()
            || self.filters.invalid.is_some()
            || self.filters.external_auth.is_some()
    }

    /// Where requests go.
    pub fn backends(&self) -> &Backends {
        &self.backends
    }

    /// The backend of one request. `random` is uniform over all values.
    ///
    /// # Errors
    ///
    /// The request is to be answered with 500.
    pub fn choose(&self, random: u64) -> Result<&Backend, BackendError> {
        self.backends.choose(random)
    }

    /// How long requests may take.
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// When requests are sent again; `None`: the rule does not say.
    pub fn retry(&self) -> Option<&RetryPolicy> {
        self.retry.as_ref()
    }

    /// Whether the requests of one session go to one endpoint.
    pub fn session(&self) -> Option<&SessionPersistence> {
        self.session.as_ref()
    }
}

impl L4Rule {
    /// The user's object.
    pub fn route(&self) -> &Arc<RouteId> {
        &self.route
    }

    /// Place among the rules of its route, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its name, where it has one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Where connections go.
    pub fn backends(&self) -> &Backends {
        &self.backends
    }

    /// The backend of one connection. `random` is uniform over all values.
    ///
    /// # Errors
    ///
    /// The connection is to be closed.
    pub fn choose(&self, random: u64) -> Result<&Backend, BackendError> {
        match &self.invalid {
            Some(reason) => Err(BackendError::Invalid(Arc::clone(reason))),
            None => self.backends.choose(random),
        }
    }
}
