//! Telemetry: what is logged, counted and traced.

use serde_json::Value;

use super::field::FieldError;
use super::meta::Meta;

/// A Telemetry.
#[derive(Debug, Clone, PartialEq)]
pub struct Telemetry {
    /// Metadata.
    pub meta: Meta,
    /// What it says, as it was written.
    pub spec: Value,
    /// What is wrong with it.
    pub errors: Vec<FieldError>,
}

impl Telemetry {
    /// Keeps `spec`.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        Self {
            meta,
            spec: spec.clone(),
            errors: Vec::new(),
        }
    }
}
