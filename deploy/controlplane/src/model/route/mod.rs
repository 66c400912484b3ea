//! Routes.

use serde_json::Value;

use super::field::FieldError;
use super::meta::Meta;

macro_rules! routes { ($($name:ident)*) => { $(
/// A route.
#[derive(Debug, Clone, PartialEq)]
pub struct $name {
    /// Metadata.
    pub meta: Meta,
    /// What is wrong with it.
    pub errors: Vec<FieldError>,
}
impl $name {
    /// Reads `spec`.
    pub fn parse(meta: Meta, _spec: &Value) -> Self { Self { meta, errors: Vec::new() } }
}
)* } }
routes! { HttpRoute GrpcRoute TcpRoute TlsRoute }
