//! DestinationRules: how connections to a host are spread and bounded.

use serde_json::Value;

use super::field::FieldError;
use super::meta::Meta;

/// A DestinationRule.
#[derive(Debug, Clone, PartialEq)]
pub struct DestinationRule {
    /// Metadata.
    pub meta: Meta,
    /// What it says, as it was written.
    pub spec: Value,
    /// What is wrong with it.
    pub errors: Vec<FieldError>,
}

impl DestinationRule {
    /// Keeps `spec`.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        Self {
            meta,
            spec: spec.clone(),
            errors: Vec::new(),
        }
    }
}
