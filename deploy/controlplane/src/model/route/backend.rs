//! `backendRef`s.

use std::sync::Arc;

use serde::Deserialize;

use super::super::field::{At, FieldError, FieldPath};
use super::super::raw::nullable;
use super::read_port;

/// Most backends of a rule (CRD).
pub(super) const MAX_BACKENDS: usize = 16;
/// Largest weight (CRD).
const MAX_WEIGHT: i64 = 1_000_000;

/// A `backendRef`, not looked up yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendRef {
    /// API group; empty: core.
    pub group: Arc<str>,
    /// Kind.
    pub kind: Arc<str>,
    /// Namespace, where it is stated.
    pub namespace: Option<Arc<str>>,
    /// Name.
    pub name: Arc<str>,
    /// Port.
    pub port: Option<u16>,
    /// Share of the requests.
    pub weight: u32,
    /// It is asked whether requests may pass, and gets none of them itself.
    pub authorizes: bool,
    /// Where it stands.
    pub path: FieldPath,
}

/// The fields of a reference with a weight.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawBackend {
    pub(super) group: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) namespace: Option<String>,
    #[serde(deserialize_with = "nullable")]
    pub(super) name: String,
    pub(super) port: Option<i64>,
    pub(super) weight: Option<i64>,
}

impl BackendRef {
    pub(super) fn read(raw: &RawBackend, at: At<'_>, errors: &mut Vec<FieldError>) -> Self {
        if raw.name.is_empty() {
            errors.push(at.key("name").error("is required"));
        }
        let kind = raw.kind.as_deref().unwrap_or("Service");
        let group = raw.group.as_deref().unwrap_or_default();
        let port = raw
            .port
            .and_then(|port| read_port(port, at.key("port"), errors));
        if (group, kind) == ("", "Service") && raw.port.is_none() {
            errors.push(at.key("port").error("is required for a Service"));
        }
        let weight = raw.weight.unwrap_or(1);
        if !(0..=MAX_WEIGHT).contains(&weight) {
            let message = format!("{weight} is not a weight: 0 to {MAX_WEIGHT}");
            errors.push(at.key("weight").error(message));
        }
        Self {
            group: group.into(),
            kind: kind.into(),
            namespace: raw.namespace.as_deref().map(Arc::from),
            name: raw.name.as_str().into(),
            port,
            weight: u32::try_from(weight).unwrap_or_default(),
            authorizes: false,
            path: at.path(),
        }
    }
}
