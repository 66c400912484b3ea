//! Rules of TCPRoutes and TLSRoutes.

use serde::Deserialize;
use serde_json::Value;

use super::super::field::{At, FieldError};
use super::super::raw::{Map, nullable};
use super::backend::{BackendRef, MAX_BACKENDS, RawBackend};
use super::{RouteRule, read_at};

/// A rule: connections go to these backends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct L4Rule {
    /// Its name; empty: none.
    pub name: String,
    /// Backends.
    pub backends: Vec<BackendRef>,
    /// Why connections fail.
    pub invalid: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawRule {
    #[serde(deserialize_with = "nullable")]
    name: String,
    #[serde(deserialize_with = "nullable")]
    backend_refs: Vec<Map<RawBackend>>,
}

impl RouteRule for L4Rule {
    fn read(value: &Value, at: At<'_>, errors: &mut Vec<FieldError>) -> Self {
        let Some(raw) = read_at::<Map<RawRule>>(value, at, errors) else {
            return Self::default();
        };
        let list = at.key("backendRefs");
        match raw.backend_refs.len() {
            0 => errors.push(list.error("is required")),
            1..=MAX_BACKENDS => {}
            _ => errors.push(list.error(format!("has more than {MAX_BACKENDS} entries"))),
        }
        let backends = raw.backend_refs.iter().take(MAX_BACKENDS).enumerate();
        Self {
            name: raw.name.clone(),
            backends: backends
                .map(|(index, raw)| BackendRef::read(raw, list.index(index), errors))
                .collect(),
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
        self.backends.iter().collect()
    }
}
