//! A span: the request as a trace shows it, with the names that Istio's and Envoy's spans have.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::event::RequestEvent;
use super::settings::TagValue;
use super::trace::REQUEST_ID;

/// What an exporter sends of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Of the whole trace.
    pub trace_id: [u8; 16],
    /// Of this hop.
    pub span_id: [u8; 8],
    /// The caller's.
    pub parent_id: Option<[u8; 8]>,
    /// `host:port/*`, Envoy's operation name for a waypoint.
    pub name: String,
    /// When the request came.
    pub started: SystemTime,
    /// Until the response was done.
    pub duration: Duration,
    /// Whether it failed on the server's side: 5xx, or no answer.
    pub error: bool,
    /// Attributes, in the order in which they are sent.
    pub attributes: Vec<(&'static str, Attribute)>,
    /// Attributes that the user added.
    pub tags: Vec<(Arc<str>, String)>,
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attribute {
    /// Text.
    Text(String),
    /// A number.
    Number(u64),
}

impl Span {
    /// The span of `event`.
    pub(super) fn new(event: &RequestEvent<'_>, tags: &[(Arc<str>, TagValue)]) -> Self {
        let text = |value: &str| Attribute::Text(value.to_owned());
        let header = |name: &str| {
            let value = event.request_headers.get(name);
            value.and_then(|value| value.to_str().ok())
        };
        let mut attributes = vec![
            ("component", text("proxy")),
            ("node_id", text("waypoint")),
            ("http.method", text(event.method.as_str())),
            (
                "http.url",
                Attribute::Text(format!("http://{}{}", event.authority, event.path)),
            ),
            ("http.protocol", text(event.protocol.version())),
            ("http.status_code", Attribute::Number(event.status.into())),
            (
                "request_size",
                Attribute::Number(event.traffic.request_bytes),
            ),
            (
                "response_size",
                Attribute::Number(event.traffic.response_bytes),
            ),
            ("response_flags", Attribute::Text(event.flags.to_string())),
            ("upstream_cluster", text(event.upstream_cluster)),
            ("istio.mesh_id", text("cluster.local")),
        ];
        for (key, value) in [
            ("guid:x-request-id", header(REQUEST_ID.as_str())),
            ("user_agent", header("user-agent")),
            ("adit.policy", event.policy),
            ("adit.route", Some(event.route_name)),
        ] {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                attributes.push((key, text(value)));
            }
        }
        if let Some(status) = event.grpc_status {
            attributes.push(("grpc.status_code", Attribute::Number(status.into())));
        }
        if let Some(address) = event.downstream_remote {
            let peer = Attribute::Text(address.ip().to_string());
            attributes.push(("peer.address", peer));
        }
        if let Some(address) = event.upstream_host {
            let upstream = Attribute::Text(address.to_string());
            attributes.push(("upstream_address", upstream));
        }
        // Istio's `enableIstioTags`.
        let source = event.source;
        for (key, value) in [
            ("istio.source_workload", &source.workload),
            ("istio.source_namespace", &source.namespace),
            ("istio.canonical_service", &source.canonical_service),
            ("istio.canonical_revision", &source.canonical_revision),
        ] {
            if !value.is_empty() {
                attributes.push((key, text(value)));
            }
        }
        if let Some(principal) = &source.principal {
            let principal = Attribute::Text(principal.to_string());
            attributes.push(("source.principal", principal));
        }
        if let Some(destination) = event.destination {
            attributes.push(("istio.destination_workload", text(&destination.workload)));
            attributes.push(("istio.destination_namespace", text(&destination.namespace)));
            if let Some(principal) = &destination.principal {
                let principal = Attribute::Text(principal.to_string());
                attributes.push(("destination.principal", principal));
            }
        }
        if event.retries > 0 {
            attributes.push(("retries", Attribute::Number(event.retries.into())));
        }
        let mut added = Vec::with_capacity(tags.len());
        for (name, value) in tags {
            let value = match value {
                TagValue::Literal(value) => value.to_string(),
                TagValue::Header { name, default } => {
                    header(name.as_str()).map_or_else(|| default.to_string(), ToOwned::to_owned)
                }
                TagValue::Formatter(format) => {
                    let mut text = String::new();
                    format.render(event, &mut text);
                    text
                }
            };
            if !value.is_empty() {
                added.push((name.clone(), value));
            }
        }
        let host = event
            .service
            .map_or(event.authority, |service| &service.hostname);
        let port = event.downstream_local.map_or(80, |address| address.port());
        Self {
            trace_id: event.trace.trace_id,
            span_id: event.trace.span_id,
            parent_id: event.trace.parent_id,
            name: format!("{host}:{port}/*"),
            started: event.started,
            duration: event.duration,
            error: event.status == 0 || event.status >= 500,
            attributes,
            tags: added,
        }
    }
}
