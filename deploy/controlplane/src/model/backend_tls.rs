//! BackendTLSPolicies: TLS towards backends.

use serde_json::Value;

use super::field::FieldError;
use super::meta::Meta;

/// A BackendTLSPolicy.
#[derive(Debug, Clone, PartialEq)]
pub struct BackendTlsPolicy {
    /// Metadata.
    pub meta: Meta,
    /// What is wrong with it.
    pub errors: Vec<FieldError>,
}

impl BackendTlsPolicy {
    /// Reads `spec`.
    pub fn parse(meta: Meta, _spec: &Value) -> Self {
        Self {
            meta,
            errors: Vec::new(),
        }
    }
}
