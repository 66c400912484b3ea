//! Rules of HTTPRoutes.

use adit_shared::proto::waypoint as wire;
use serde::Deserialize;
use serde_json::Value;

use super::super::field::{At, FieldError};
use super::super::raw::{Map, nullable};
use super::backend::{BackendRef, MAX_BACKENDS, RawBackend};
use super::filter::{Filter, Place, RawFilter, filters};
use super::matching::{self, MAX_MATCHES, RawHttpMatch};
use super::options::{self, RawRetry, RawSession, RawTimeouts};
use super::{RouteRule, read_at};

/// A rule.
#[derive(Debug, Clone, PartialEq)]
pub struct HttpRule {
    /// Its name; empty: none.
    pub name: String,
    /// What it is for; never empty.
    pub matches: Vec<wire::HttpMatch>,
    /// Filters in their order.
    pub filters: Vec<Filter>,
    /// Backends, each with its own filters.
    pub backends: Vec<(BackendRef, Vec<Filter>)>,
    /// `timeouts.request`.
    pub request_timeout: Option<prost_types::Duration>,
    /// `timeouts.backendRequest`.
    pub backend_request_timeout: Option<prost_types::Duration>,
    /// Retries.
    pub retry: Option<wire::Retry>,
    /// Session persistence.
    pub session: Option<wire::SessionPersistence>,
    /// Why requests fail.
    pub invalid: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawRule {
    #[serde(deserialize_with = "nullable")]
    name: String,
    #[serde(deserialize_with = "nullable")]
    matches: Vec<Map<RawHttpMatch>>,
    #[serde(deserialize_with = "nullable")]
    filters: Vec<Map<RawFilter>>,
    #[serde(deserialize_with = "nullable")]
    backend_refs: Vec<Map<RawHttpBackend>>,
    timeouts: Option<Map<RawTimeouts>>,
    retry: Option<Map<RawRetry>>,
    session_persistence: Option<Map<RawSession>>,
}

/// Flattening would let unknown fields through.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawHttpBackend {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    #[serde(deserialize_with = "nullable")]
    name: String,
    port: Option<i64>,
    weight: Option<i64>,
    #[serde(deserialize_with = "nullable")]
    filters: Vec<Map<RawFilter>>,
}

impl RouteRule for HttpRule {
    fn read(value: &Value, at: At<'_>, errors: &mut Vec<FieldError>) -> Self {
        let raw = read_at::<Map<RawRule>>(value, at, errors);
        // Of a rule that cannot be read, what it is for may be readable.
        let raw = raw.map_or_else(|| salvage(value), Map::into_inner);
        let matches = matches(&raw.matches, at.key("matches"), errors);
        let place = Place {
            of_backend: false,
            grpc: false,
            matches: &matches,
        };
        let list = at.key("filters");
        let filters = filters(&raw.filters, place, list, errors);
        let list = at.key("backendRefs");
        let backends = backends(&raw.backend_refs, place, list, errors);
        let redirects = filters.iter().any(|filter| {
            matches!(filter, Filter::Plain(filter) if matches!(filter.kind, Some(wire::filter::Kind::Redirect(_))))
        });
        if redirects && !backends.is_empty() {
            errors.push(list.error("a rule with RequestRedirect has no backends"));
        }
        let timeouts = raw.timeouts.as_deref();
        let (request_timeout, backend_request_timeout) = timeouts
            .map(|raw| options::timeouts(raw, at.key("timeouts"), errors))
            .unwrap_or_default();
        let retry = raw.retry.as_deref();
        let session = raw.session_persistence.as_deref();
        Self {
            retry: retry.map(|raw| options::retry(raw, at.key("retry"), errors)),
            session: session.map(|raw| options::session(raw, at.key("sessionPersistence"), errors)),
            name: raw.name,
            matches,
            filters,
            backends,
            request_timeout,
            backend_request_timeout,
            invalid: None,
        }
    }

    fn invalidate(&mut self, reason: String) {
        self.invalid = Some(reason);
    }

    fn invalid(&self) -> Option<&str> {
        self.invalid.as_deref()
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn backends(&self) -> Vec<&BackendRef> {
        all_backends(&self.filters, &self.backends)
    }
}

fn salvage(value: &Value) -> RawRule {
    let matches = value.get("matches").and_then(|matches| {
        let read = Vec::<Map<RawHttpMatch>>::deserialize(matches);
        read.ok()
    });
    RawRule {
        matches: matches.unwrap_or_default(),
        ..RawRule::default()
    }
}

fn matches(
    raw: &[Map<RawHttpMatch>],
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Vec<wire::HttpMatch> {
    if raw.len() > MAX_MATCHES {
        errors.push(at.error(format!("has more than {MAX_MATCHES} entries")));
    }
    if raw.is_empty() {
        return vec![matching::everything()];
    }
    let raw = raw.iter().take(MAX_MATCHES).enumerate();
    raw.map(|(index, raw)| matching::http(raw, at.index(index), errors))
        .collect()
}

/// Reads backends with filters of their own; GRPCRoutes have the same.
pub(super) fn backends(
    raw: &[Map<RawHttpBackend>],
    place: Place<'_>,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Vec<(BackendRef, Vec<Filter>)> {
    if raw.len() > MAX_BACKENDS {
        errors.push(at.error(format!("has more than {MAX_BACKENDS} entries")));
    }
    let place = Place {
        of_backend: true,
        ..place
    };
    let mut found = Vec::new();
    for (index, raw) in raw.iter().take(MAX_BACKENDS).enumerate() {
        let at = at.index(index);
        let reference = RawBackend {
            group: raw.group.clone(),
            kind: raw.kind.clone(),
            namespace: raw.namespace.clone(),
            name: raw.name.clone(),
            port: raw.port,
            weight: raw.weight,
        };
        let reference = BackendRef::read(&reference, at, errors);
        let filters = filters(&raw.filters, place, at.key("filters"), errors);
        found.push((reference, filters));
    }
    found
}

/// Backends, and services that filters refer to.
pub(super) fn all_backends<'a>(
    filters: &'a [Filter],
    backends: &'a [(BackendRef, Vec<Filter>)],
) -> Vec<&'a BackendRef> {
    fn referred(filter: &Filter) -> Option<&BackendRef> {
        match filter {
            Filter::Mirror { backend, .. } | Filter::ExternalAuth { backend, .. } => Some(backend),
            Filter::Plain(_) => None,
        }
    }
    let of_backends = backends.iter().flat_map(|(backend, filters)| {
        std::iter::once(backend).chain(filters.iter().filter_map(referred))
    });
    of_backends
        .chain(filters.iter().filter_map(referred))
        .collect()
}
