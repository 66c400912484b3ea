//! Sends spans to where the user keeps them: OTLP over gRPC or HTTP, or Zipkin's JSON.
//!
//! Spans wait in a bounded queue; when it is full they are dropped and counted, for a slow
//! collector must not slow requests. One task per worker and provider takes them in batches,
//! over one connection that it makes anew when it breaks. A batch that was refused is dropped:
//! collectors that want it again do not exist, those that cannot take more do.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use adit_shared::proto::otlp;
use adit_shared::proto::waypoint as proto;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, TE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Version};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn;
use hyper_util::rt::TokioIo;
use prost::Message;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::span::{Attribute, Span};
use super::trace::hex;

/// Spans that may wait.
const QUEUE: usize = 4_096;
/// Spans in one message.
const BATCH: usize = 512;
/// A span waits at most so long for others.
const LINGER: Duration = Duration::from_secs(1);
/// For the connection and for an answer, where the provider says nothing.
const DEADLINE: Duration = Duration::from_secs(10);
/// After a failure nothing is tried for so long.
const PAUSE: Duration = Duration::from_secs(1);
/// Of an answer.
const MAX_ANSWER: usize = 64 << 10;
/// The same complaint is not repeated before.
const COMPLAIN: Duration = Duration::from_secs(60);

/// How the exporter reaches a collector: the data path's own way, so that a collector in the
/// mesh is spoken to over HBONE.
pub trait Dial {
    /// The stream.
    type Io: AsyncRead + AsyncWrite + Unpin + 'static;

    /// Connects to a provider's service.
    fn dial(&self, to: &proto::ProviderService) -> impl Future<Output = io::Result<Self::Io>>;
}

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

    fn deadline(&self) -> Duration {
        let stated = self.service.timeout.as_ref();
        let stated = stated.and_then(|timeout| Duration::try_from(*timeout).ok());
        stated.filter(|t| !t.is_zero()).unwrap_or(DEADLINE)
    }

    fn name(&self) -> &str {
        let service = self.resource.iter().find(|a| a.key == "service.name");
        let value = service.and_then(|a| a.value.as_ref()?.value.as_ref());
        match value {
            Some(otlp::any_value::Value::StringValue(name)) => name,
            _ => "waypoint",
        }
    }

    fn body(&self, spans: &[Span]) -> Bytes {
        match &self.form {
            Form::OtlpGrpc => {
                let message = self.otlp(spans);
                let mut framed = BytesMut::with_capacity(5 + message.encoded_len());
                framed.put_u8(0);
                framed.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
                // There is room: the buffer grows.
                let _ = message.encode(&mut framed);
                framed.freeze()
            }
            Form::OtlpHttp(_) => self.otlp(spans).encode_to_vec().into(),
            Form::Zipkin(_) => {
                let spans: Vec<_> = spans.iter().map(|span| self.zipkin(span)).collect();
                serde_json::Value::Array(spans).to_string().into()
            }
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

    fn request(&self, spans: &[Span]) -> Result<Request<Full<Bytes>>, http::Error> {
        let authority = format!("{}:{}", self.service.hostname, self.service.port);
        let (path, content_type) = match &self.form {
            Form::OtlpGrpc => (
                "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
                "application/grpc",
            ),
            Form::OtlpHttp(path) => (path.as_str(), "application/x-protobuf"),
            Form::Zipkin(path) => (path.as_str(), "application/json"),
        };
        let request = Request::builder()
            .method(Method::POST)
            .header(CONTENT_TYPE, content_type);
        let request = match self.form {
            Form::OtlpGrpc => request
                .version(Version::HTTP_2)
                .uri(format!("http://{authority}{path}"))
                .header(TE, "trailers"),
            _ => request.uri(path).header(HOST, authority),
        };
        let mut request = request.body(Full::new(self.body(spans)))?;
        request.headers_mut().extend(self.headers.clone());
        Ok(request)
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
pub struct SpanExporter<D: Dial> {
    /// Where they wait.
    pub queue: SpanQueue,
    /// Where they go.
    pub target: ExportTarget,
    /// How to get there.
    pub dial: D,
}

/// Why a batch was lost.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("connect: {0}")]
    Connect(io::Error),
    #[error("{0}")]
    Hyper(#[from] hyper::Error),
    #[error("the request cannot be made: {0}")]
    Request(#[from] http::Error),
    #[error("no answer in time")]
    Timeout,
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("answered with gRPC status {0}")]
    Grpc(String),
}

enum Sender {
    Http1(conn::http1::SendRequest<Full<Bytes>>),
    Http2(conn::http2::SendRequest<Full<Bytes>>),
}

impl<D: Dial> SpanExporter<D> {
    /// Runs on the worker's thread.
    pub async fn run(self) {
        let mut sender = None;
        let mut complained: Option<Instant> = None;
        loop {
            let batch = self.batch().await;
            let count = batch.len() as u64;
            let counters = &self.queue.0.counters;
            let sending = self.send(&mut sender, &batch);
            let sent = timeout(self.target.deadline(), sending).await;
            match sent.unwrap_or(Err(ExportError::Timeout)) {
                Ok(()) => {
                    counters.exported.fetch_add(count, Relaxed);
                }
                Err(error) => {
                    sender = None;
                    counters.failed.fetch_add(count, Relaxed);
                    if complained.is_none_or(|at| at.elapsed() >= COMPLAIN) {
                        complained = Some(Instant::now());
                        let service = &self.target.service;
                        warn!(
                            collector = %format_args!("{}:{}", service.hostname, service.port),
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

    async fn send(&self, kept: &mut Option<Sender>, batch: &[Span]) -> Result<(), ExportError> {
        let request = self.target.request(batch)?;
        let usable = match kept {
            Some(Sender::Http1(sender)) => sender.ready().await.is_ok(),
            Some(Sender::Http2(sender)) => sender.ready().await.is_ok(),
            None => false,
        };
        if !usable {
            *kept = Some(self.connect().await?);
        }
        let response = match kept {
            Some(Sender::Http1(sender)) => sender.send_request(request).await?,
            Some(Sender::Http2(sender)) => sender.send_request(request).await?,
            None => return Err(ExportError::Timeout),
        };
        let (head, body) = response.into_parts();
        let answer = Limited::new(body, MAX_ANSWER).collect().await;
        if !head.status.is_success() {
            return Err(ExportError::Status(head.status));
        }
        if self.target.form == Form::OtlpGrpc {
            let trailers = answer.ok().and_then(|answer| answer.trailers().cloned());
            let trailers = trailers.unwrap_or(head.headers);
            let status = trailers.get("grpc-status");
            let status = status.map_or("missing", |s| s.to_str().unwrap_or("malformed"));
            if status != "0" {
                return Err(ExportError::Grpc(status.to_owned()));
            }
        }
        Ok(())
    }

    async fn connect(&self) -> Result<Sender, ExportError> {
        let io = self.dial.dial(&self.target.service).await;
        let io = TokioIo::new(io.map_err(ExportError::Connect)?);
        Ok(match self.target.form {
            Form::OtlpGrpc => {
                let (sender, connection) = conn::http2::handshake(LocalExecutor, io).await?;
                spawn_local(connection);
                Sender::Http2(sender)
            }
            _ => {
                let (sender, connection) = conn::http1::handshake(io).await?;
                spawn_local(connection);
                Sender::Http1(sender)
            }
        })
    }
}

/// Runs hyper's tasks on this worker's thread.
#[derive(Debug, Clone, Copy)]
struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        spawn_local(future);
    }
}

#[cfg(test)]
mod tests;
