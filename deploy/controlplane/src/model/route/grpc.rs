//! Rules of GRPCRoutes.

use adit_shared::proto::waypoint as wire;
use serde::Deserialize;
use serde_json::Value;

use super::super::field::{At, FieldError};
use super::super::raw::{Map, nullable};
use super::backend::BackendRef;
use super::filter::{Filter, Place, RawFilter, filters};
use super::http::{RawHttpBackend, all_backends, backends};
use super::matching::{self, MAX_MATCHES, RawGrpcMatch};
use super::options::{self, RawSession};
use super::{RouteRule, read_at};

/// A rule.
#[derive(Debug, Clone, PartialEq)]
pub struct GrpcRule {
    /// Its name; empty: none.
    pub name: String,
    /// What it is for; empty: everything.
    pub matches: Vec<wire::GrpcMatch>,
    /// Filters in their order.
    pub filters: Vec<Filter>,
    /// Backends, each with its own filters.
    pub backends: Vec<(BackendRef, Vec<Filter>)>,
    /// Session persistence.
    pub session: Option<wire::SessionPersistence>,
    /// Why calls fail.
    pub invalid: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawRule {
    #[serde(deserialize_with = "nullable")]
    name: String,
    #[serde(deserialize_with = "nullable")]
    matches: Vec<Map<RawGrpcMatch>>,
    #[serde(deserialize_with = "nullable")]
    filters: Vec<Map<RawFilter>>,
    #[serde(deserialize_with = "nullable")]
    backend_refs: Vec<Map<RawHttpBackend>>,
    session_persistence: Option<Map<RawSession>>,
}

impl RouteRule for GrpcRule {
    fn read(value: &Value, at: At<'_>, errors: &mut Vec<FieldError>) -> Self {
        let raw = read_at::<Map<RawRule>>(value, at, errors);
        // Of a rule that cannot be read, what it is for may be readable.
        let raw = raw.map_or_else(|| salvage(value), Map::into_inner);
        let list = at.key("matches");
        if raw.matches.len() > MAX_MATCHES {
            errors.push(list.error(format!("has more than {MAX_MATCHES} entries")));
        }
        let matches = raw.matches.iter().take(MAX_MATCHES).enumerate();
        let matches = matches
            .map(|(index, raw)| matching::grpc(raw, list.index(index), errors))
            .collect();
        let place = Place {
            of_backend: false,
            grpc: true,
            matches: &[],
        };
        let filters = filters(&raw.filters, place, at.key("filters"), errors);
        let list = at.key("backendRefs");
        let session = raw.session_persistence.as_deref();
        Self {
            backends: backends(&raw.backend_refs, place, list, errors),
            session: session.map(|raw| options::session(raw, at.key("sessionPersistence"), errors)),
            name: raw.name,
            matches,
            filters,
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
        let read = Vec::<Map<RawGrpcMatch>>::deserialize(matches);
        read.ok()
    });
    RawRule {
        matches: matches.unwrap_or_default(),
        ..RawRule::default()
    }
}
