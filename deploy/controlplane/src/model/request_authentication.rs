//! RequestAuthentications: which tokens requests may carry.

use serde_json::Value;

use super::field::FieldError;
use super::meta::Meta;

/// A RequestAuthentication.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestAuthentication {
    /// Metadata.
    pub meta: Meta,
    /// What it says, as it was written.
    pub spec: Value,
    /// What is wrong with it.
    pub errors: Vec<FieldError>,
}

impl RequestAuthentication {
    /// Keeps `spec`.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        Self {
            meta,
            spec: spec.clone(),
            errors: Vec::new(),
        }
    }
}
