//! Expressions of the Telemetry API: CEL over Envoy's attributes, evaluated when a request has
//! ended, and only where one is configured.
//!
//! Attributes, after Envoy's list: `request.{method, host, path, url_path, query, headers,
//! protocol, scheme, id, useragent, referer, size, duration}` (milliseconds),
//! `response.{code, size, flags, code_details, grpc_status, headers}`,
//! `source.{address, port, workload, namespace, principal}`, `destination.` the same,
//! `connection.{mtls, uri_san_peer_certificate}`, `upstream.{address, port}`,
//! `xds.{cluster_name, route_name}`.

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use adit_shared::telemetry::WorkloadLabels;
use cel::objects::{Key, Map};
use cel::{Context, Program, Value};
use http::HeaderMap;

use super::event::RequestEvent;
use super::trace::REQUEST_ID;

/// A longer expression is refused.
const MAX_LENGTH: usize = 4 << 10;
/// The attributes' first words.
const ROOTS: [&str; 7] = [
    "request",
    "response",
    "source",
    "destination",
    "connection",
    "upstream",
    "xds",
];

/// A compiled expression. Two of the same text are the same.
#[derive(Clone)]
pub struct Expression {
    source: Arc<str>,
    program: Arc<Program>,
    roots: Vec<&'static str>,
}

/// Why an expression is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpressionError {
    /// More than 4 KiB.
    #[error("longer than {MAX_LENGTH} bytes")]
    TooLong,
    /// It is no CEL.
    #[error("not a CEL expression: {0}")]
    Syntax(String),
    /// It names something that a request does not have.
    #[error("unknown attribute \"{0}\"")]
    Unknown(String),
}

impl Expression {
    /// Compiles `source`.
    ///
    /// # Errors
    /// [`ExpressionError`].
    pub fn parse(source: &str) -> Result<Self, ExpressionError> {
        if source.len() > MAX_LENGTH {
            return Err(ExpressionError::TooLong);
        }
        // The parser is somebody else's, and users' text must not end the process.
        let program = catch_unwind(|| Program::compile(source))
            .map_err(|_| ExpressionError::Syntax("the parser gave up".into()))?
            .map_err(|error| ExpressionError::Syntax(error.to_string()))?;
        let mut roots = Vec::new();
        for name in program.references().variables() {
            match ROOTS.iter().find(|root| **root == name) {
                Some(root) => roots.push(*root),
                None => return Err(ExpressionError::Unknown(name.to_owned())),
            }
        }
        Ok(Self {
            source: source.into(),
            program: Arc::new(program),
            roots,
        })
    }

    /// Its text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The value as text; `None`: it has none for this request.
    pub fn text(&self, event: &RequestEvent<'_>) -> Option<String> {
        match self.value(event)? {
            Value::String(text) => Some(text.to_string()),
            Value::Int(number) => Some(number.to_string()),
            Value::UInt(number) => Some(number.to_string()),
            Value::Float(number) => Some(number.to_string()),
            Value::Bool(truth) => Some(truth.to_string()),
            _ => None,
        }
    }

    /// Whether the expression is true; one without a value is not.
    pub fn is_true(&self, event: &RequestEvent<'_>) -> bool {
        matches!(self.value(event), Some(Value::Bool(true)))
    }

    fn value(&self, event: &RequestEvent<'_>) -> Option<Value> {
        let mut context = Context::default();
        for root in &self.roots {
            context.add_variable_from_value(*root, attributes(root, event));
        }
        let run = AssertUnwindSafe(|| self.program.execute(&context).ok());
        catch_unwind(run).ok().flatten()
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Expression {}

impl Hash for Expression {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.source.hash(state);
    }
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Expression").field(&self.source).finish()
    }
}

fn attributes(root: &str, event: &RequestEvent<'_>) -> Value {
    let mut map = Attributes::default();
    let header = |name: &str| {
        let value = event.request_headers.get(name);
        value.and_then(|value| value.to_str().ok())
    };
    match root {
        "request" => {
            let (path, query) = event.path.split_once('?').unwrap_or((event.path, ""));
            map.put("method", event.method.as_str());
            map.put("host", event.authority);
            map.put("path", event.path);
            map.put("url_path", path);
            map.put("query", query);
            map.put("protocol", event.protocol.version());
            map.put("scheme", "http");
            map.put("id", header(REQUEST_ID.as_str()).unwrap_or_default());
            map.put("useragent", header("user-agent").unwrap_or_default());
            map.put("referer", header("referer").unwrap_or_default());
            map.int("size", event.traffic.request_bytes);
            map.int("duration", event.duration.as_millis() as u64);
            map.value("headers", headers(event.request_headers));
        }
        "response" => {
            map.int("code", event.status.into());
            map.int("size", event.traffic.response_bytes);
            map.put("flags", &event.flags.to_string());
            map.put("code_details", event.details);
            if let Some(status) = event.grpc_status {
                map.int("grpc_status", status.into());
            }
            map.value("headers", headers(event.response_headers));
        }
        "source" => {
            map.address(event.downstream_remote);
            map.workload(event.source);
        }
        "destination" => {
            map.address(event.downstream_local);
            if let Some(destination) = event.destination {
                map.workload(destination);
            }
        }
        "connection" => {
            map.value("mtls", Value::Bool(true));
            let peer = event.source.principal.as_ref();
            let peer = peer.map(ToString::to_string).unwrap_or_default();
            map.put("uri_san_peer_certificate", &peer);
        }
        "upstream" => map.address(event.upstream_host),
        "xds" => {
            map.put("cluster_name", event.upstream_cluster);
            map.put("route_name", event.route_name);
        }
        _ => {}
    }
    map.into_value()
}

#[derive(Default)]
struct Attributes(HashMap<Key, Value>);

impl Attributes {
    fn value(&mut self, key: &'static str, value: Value) {
        self.0.insert(key.to_owned().into(), value);
    }

    fn put(&mut self, key: &'static str, text: &str) {
        self.value(key, Value::String(Arc::new(text.to_owned())));
    }

    fn int(&mut self, key: &'static str, number: u64) {
        let number = i64::try_from(number).unwrap_or(i64::MAX);
        self.value(key, Value::Int(number));
    }

    fn address(&mut self, address: Option<SocketAddr>) {
        if let Some(address) = address {
            self.put("address", &address.to_string());
            self.int("port", address.port().into());
        }
    }

    fn workload(&mut self, labels: &WorkloadLabels) {
        self.put("workload", &labels.workload);
        self.put("namespace", &labels.namespace);
        let principal = labels.principal.as_ref().map(ToString::to_string);
        self.put("principal", &principal.unwrap_or_default());
    }

    fn into_value(self) -> Value {
        Value::Map(Map {
            map: Arc::new(self.0),
        })
    }
}

/// By lower-case name; of several values the first.
fn headers(of: &HeaderMap) -> Value {
    let mut map = HashMap::with_capacity(of.keys_len());
    for name in of.keys() {
        let value = of.get(name).map(|value| value.as_bytes());
        let text = String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
        let key: Key = name.as_str().to_owned().into();
        map.insert(key, Value::String(Arc::new(text)));
    }
    Value::Map(Map { map: Arc::new(map) })
}

#[cfg(test)]
mod tests {
    use super::super::testing::Sample;
    use super::*;

    #[test]
    fn istios_documented_filters_work() {
        let mut sample = Sample::new();
        sample.status = 503;
        sample
            .request_headers
            .insert("user-agent", http::HeaderValue::from_static("curl/8"));
        let cases = [
            ("response.code >= 400", true),
            ("response.code >= 500 && request.method == 'POST'", false),
            ("request.url_path.contains('v1beta3')", false),
            ("request.headers['user-agent'].startsWith('curl')", true),
            ("has(request.headers['x'])", false),
            ("request.headers['absent'] == 'x'", false),
            ("connection.mtls && request.url_path == '/reviews/1'", true),
            ("source.namespace == 'shop'", true),
            ("request.host.matches('^reviews')", true),
        ];
        for (source, expected) in cases {
            // `has` takes a field, not an index: CEL's own rule.
            let Ok(expression) = Expression::parse(source) else {
                assert_eq!(source, "has(request.headers['x'])");
                continue;
            };
            assert_eq!(expression.is_true(&sample.event()), expected, "{source}");
        }
    }

    #[test]
    fn tags_take_the_value_as_text() {
        let sample = Sample::new();
        let text = |source: &str| {
            Expression::parse(source)
                .expect("valid")
                .text(&sample.event())
        };
        assert_eq!(text("request.host").as_deref(), Some("reviews.shop"));
        assert_eq!(text("response.code").as_deref(), Some("200"));
        assert_eq!(text("'fixed'").as_deref(), Some("fixed"));
        assert_eq!(text("request.headers['absent']"), None);
    }

    #[test]
    fn what_is_wrong_is_told() {
        let error = |source: &str| Expression::parse(source).expect_err(source);
        assert!(matches!(
            error("response.code >="),
            ExpressionError::Syntax(_)
        ));
        assert_eq!(
            error("metadata.x == 1"),
            ExpressionError::Unknown("metadata".into())
        );
        assert_eq!(error(&"x".repeat(5000)), ExpressionError::TooLong);
    }
}
