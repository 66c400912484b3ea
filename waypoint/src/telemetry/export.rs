//! Sends spans to where the user keeps them: OTLP over gRPC or HTTP, or Zipkin's JSON.
//!
//! Spans wait in a bounded queue; when it is full they are dropped and counted, for a slow
//! collector must not slow requests. One task per worker and provider takes them in batches,
//! over one connection that it makes anew when it breaks. A batch that was refused is dropped:
//! collectors that want it again do not exist, those that cannot take more do.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use adit_shared::proto::otlp;
use adit_shared::proto::waypoint as proto;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use http_body_util::Full;
use prost::Message as _;
use serde_json::json;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::span::{Attribute, Span};
use super::trace::hex;
use crate::client::{ClientError, Dial, ServiceClient};

/// Spans that may wait.
const QUEUE: usize = 4_096;
/// Spans in one message.
const BATCH: usize = 512;
/// A span waits at most so long for others.
const LINGER: Duration = Duration::from_secs(1);
/// After a failure nothing is tried for so long.
const PAUSE: Duration = Duration::from_secs(1);
/// The same complaint is not repeated before.
const COMPLAIN: Duration = Duration::from_secs(60);

/// What became of spans.
#[derive(Debug, Default)]
pub struct ExportCounters {
    /// Sent and accepted.
    pub exported: AtomicU64,
    /// No room in the queue.
    pub dropped: AtomicU64,
    /// Lost with a batch that could not be sent or was refused.
    pub failed: AtomicU64,
}

/// Where spans of one provider wait, on one worker.
#[derive(Clone)]
pub struct SpanQueue(Rc<Queue>);

struct Queue {
    spans: RefCell<VecDeque<Span>>,
    filled: Notify,
    counters: Arc<ExportCounters>,
}

impl fmt::Debug for SpanQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = self.0.spans.borrow().len();
        f.debug_tuple("SpanQueue").field(&len).finish()
    }
}

impl SpanQueue {
    /// An empty one, which counts in `counters`.
    pub fn new(counters: Arc<ExportCounters>) -> Self {
        Self(Rc::new(Queue {
            spans: RefCell::default(),
            filled: Notify::new(),
            counters,
        }))
    }

    pub(super) fn push(&self, span: Span) {
        let mut spans = self.0.spans.borrow_mut();
        if spans.len() >= QUEUE {
            self.0.counters.dropped.fetch_add(1, Relaxed);
            return;
        }
        spans.push_back(span);
        if spans.len() == 1 || spans.len() >= BATCH {
            self.0.filled.notify_one();
        }
    }
}

/// What a collector speaks and where it is.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportTarget {
    service: proto::ProviderService,
    form: Form,
    headers: HeaderMap,
    resource: Vec<otlp::KeyValue>,
    max_tag: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Form {
    OtlpGrpc,
    OtlpHttp(String),
    Zipkin(String),
}

impl ExportTarget {
    /// Reads a provider; `None`: it takes no spans. `service_name` is how the waypoint calls
    /// itself in traces.
    pub fn from_provider(provider: &proto::Provider, service_name: &str) -> Option<Self> {
        use proto::provider::Kind;
        let (service, form, headers, resource, max_tag) = match provider.kind.as_ref()? {
            Kind::Opentelemetry(of) => {
                let form = match of.http_path.as_str() {
                    "" => Form::OtlpGrpc,
                    path => Form::OtlpHttp(path.to_owned()),
                };
                let service = of.service.clone()?;
                let attributes = of.resource_attributes.iter();
                let resource = attributes.map(|a| attribute(&a.name, text(&a.value)));
                let max = of.max_tag_length as usize;
                (service, form, &of.headers[..], resource.collect(), max)
            }
            Kind::Zipkin(of) => {
                let path = match of.path.as_str() {
                    "" => "/api/v2/spans",
                    path => path,
                };
                let service = of.service.clone()?;
                (service, Form::Zipkin(path.into()), &[][..], Vec::new(), 0)
            }
            _ => return None,
        };
        let mut resource: Vec<otlp::KeyValue> = resource;
        if !resource.iter().any(|a| a.key == "service.name") {
            resource.push(attribute("service.name", text(service_name)));
        }
        let mut map = HeaderMap::new();
        for header in headers {
            let name = HeaderName::try_from(&header.name);
            // A header that cannot be sent would be refused by the collector, too.
            if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(&header.value)) {
                map.append(name, value);
            }
        }
        Some(Self {
            service,
            form,
            headers: map,
            resource,
            // Envoy's default.
            max_tag: if max_tag == 0 { 256 } else { max_tag },
        })
    }

    fn name(&self) -> &str {
        let service = self.resource.iter().find(|a| a.key == "service.name");
        let value = service.and_then(|a| a.value.as_ref()?.value.as_ref());
        match value {
            Some(otlp::any_value::Value::StringValue(name)) => name,
            _ => "waypoint",
        }
    }

    fn otlp(&self, spans: &[Span]) -> otlp::ExportTraceServiceRequest {
        otlp::ExportTraceServiceRequest {
            resource_spans: vec![otlp::ResourceSpans {
                resource: Some(otlp::Resource {
                    attributes: self.resource.clone(),
                }),
                scope_spans: vec![otlp::ScopeSpans {
                    scope: Some(otlp::InstrumentationScope {
                        name: "adit".into(),
                        version: env!("CARGO_PKG_VERSION").into(),
                    }),
                    spans: spans.iter().map(|span| self.otlp_span(span)).collect(),
                }],
            }],
        }
    }

    fn otlp_span(&self, span: &Span) -> otlp::Span {
        let (start, end) = times(span, 1);
        let known = span.attributes.iter().map(|(key, value)| {
            let value = match value {
                Attribute::Text(value) => text(cut(value, self.max_tag)),
                Attribute::Number(value) => {
                    let value = i64::try_from(*value).unwrap_or(i64::MAX);
                    otlp::any_value::Value::IntValue(value)
                }
            };
            attribute(key, value)
        });
        let added = span.tags.iter();
        let added = added.map(|(key, value)| attribute(key, text(cut(value, self.max_tag))));
        otlp::Span {
            trace_id: span.trace_id.to_vec(),
            span_id: span.span_id.to_vec(),
            parent_span_id: span.parent_id.map(|id| id.to_vec()).unwrap_or_default(),
            name: span.name.clone(),
            kind: otlp::span::SpanKind::Server.into(),
            start_time_unix_nano: start,
            end_time_unix_nano: end,
            attributes: known.chain(added).collect(),
            status: span.error.then(|| otlp::Status {
                message: String::new(),
                code: otlp::status::StatusCode::Error.into(),
            }),
        }
    }

    /// Zipkin's JSON v2.
    fn zipkin(&self, span: &Span) -> serde_json::Value {
        let (start, end) = times(span, 1_000);
        let mut tags = serde_json::Map::new();
        for (key, value) in &span.attributes {
            let value = match value {
                Attribute::Text(value) => cut(value, self.max_tag).to_owned(),
                Attribute::Number(value) => value.to_string(),
            };
            tags.insert((*key).to_owned(), value.into());
        }
        for (key, value) in &span.tags {
            tags.insert(key.to_string(), cut(value, self.max_tag).into());
        }
        if span.error {
            tags.insert("error".into(), "true".into());
        }
        let mut json = json!({
            "traceId": hex(&span.trace_id),
            "id": hex(&span.span_id),
            "kind": "SERVER",
            "name": span.name,
            "timestamp": start,
            "duration": (end - start).max(1),
            "localEndpoint": {"serviceName": self.name()},
            "tags": tags,
        });
        if let Some(parent) = &span.parent_id {
            json["parentId"] = hex(parent).into();
        }
        json
    }
}

/// Start and end in units of `unit` nanoseconds since 1970.
fn times(span: &Span, unit: u128) -> (u64, u64) {
    let since = span.started.duration_since(SystemTime::UNIX_EPOCH);
    let start = since.unwrap_or_default();
    let units = |time: Duration| u64::try_from(time.as_nanos() / unit).unwrap_or(u64::MAX);
    (units(start), units(start + span.duration))
}

fn cut(value: &str, limit: usize) -> &str {
    match value.char_indices().nth(limit) {
        Some((end, _)) => &value[..end],
        None => value,
    }
}

fn text(value: &str) -> otlp::any_value::Value {
    otlp::any_value::Value::StringValue(value.to_owned())
}

fn attribute(key: &str, value: otlp::any_value::Value) -> otlp::KeyValue {
    otlp::KeyValue {
        key: key.to_owned(),
        value: Some(otlp::AnyValue { value: Some(value) }),
    }
}

/// Takes spans from a queue to a collector, until it is dropped.
pub struct SpanExporter<D> {
    queue: SpanQueue,
    target: ExportTarget,
    client: ServiceClient<D>,
}

/// Why a batch was lost.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the request cannot be made: {0}")]
    Request(#[from] http::Error),
    #[error("answered {0}")]
    Status(StatusCode),
}

impl<D: Dial> SpanExporter<D> {
    /// Takes spans of `queue` to `target`, which `dial` reaches.
    pub fn new(queue: SpanQueue, target: ExportTarget, dial: D) -> Self {
        let client = ServiceClient::new(dial, target.service.clone());
        Self {
            queue,
            target,
            client,
        }
    }

    /// Runs on the worker's thread.
    pub async fn run(self) {
        let mut complained: Option<Instant> = None;
        loop {
            let batch = self.batch().await;
            let count = batch.len() as u64;
            let counters = &self.queue.0.counters;
            match self.send(&batch).await {
                Ok(()) => {
                    counters.exported.fetch_add(count, Relaxed);
                }
                Err(error) => {
                    counters.failed.fetch_add(count, Relaxed);
                    if complained.is_none_or(|at| at.elapsed() >= COMPLAIN) {
                        complained = Some(Instant::now());
                        warn!(
                            collector = self.client.authority(),
                            "spans are lost: {error}"
                        );
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// The next spans, at least one.
    async fn batch(&self) -> Vec<Span> {
        let queue = &self.queue.0;
        while queue.spans.borrow().is_empty() {
            queue.filled.notified().await;
        }
        let full = async {
            while queue.spans.borrow().len() < BATCH {
                queue.filled.notified().await;
            }
        };
        // Either way there is something to send.
        let _ = timeout(LINGER, full).await;
        let mut spans = queue.spans.borrow_mut();
        let count = spans.len().min(BATCH);
        spans.drain(..count).collect()
    }

    async fn send(&self, batch: &[Span]) -> Result<(), ExportError> {
        let (path, content_type, body) = match &self.target.form {
            Form::OtlpGrpc => {
                let path = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
                let headers = self.target.headers.clone();
                let message = self.target.otlp(batch);
                let _: otlp::ExportTraceServiceResponse =
                    self.client.unary(path, headers, &message).await?;
                return Ok(());
            }
            Form::OtlpHttp(path) => {
                let body = self.target.otlp(batch).encode_to_vec();
                (path, "application/x-protobuf", body)
            }
            Form::Zipkin(path) => {
                let spans = batch.iter().map(|span| self.target.zipkin(span)).collect();
                let body = serde_json::Value::Array(spans).to_string().into_bytes();
                (path, "application/json", body)
            }
        };
        let mut request = Request::post(path.as_str())
            .header(CONTENT_TYPE, content_type)
            .header(HOST, self.client.authority())
            .body(Full::new(Bytes::from(body)))?;
        request.headers_mut().extend(self.target.headers.clone());
        let answer = self.client.http1(request).await?;
        match answer.head.status {
            status if status.is_success() => Ok(()),
            status => Err(ExportError::Status(status)),
        }
    }
}

#[cfg(test)]
mod tests;
