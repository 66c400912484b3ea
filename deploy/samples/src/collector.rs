//! A collector of spans for the demo and tests: takes OpenTelemetry's trace protocol over
//! gRPC, and shows the last spans as JSON.

use std::cell::RefCell;
use std::collections::VecDeque;

use serde_json::{Map, Value, json};

/// `/package.Service/Method` of OTLP.
pub(crate) const PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Where the spans are shown.
pub(crate) const SPANS: &str = "/spans";
/// Spans that are kept.
const MAX_SPANS: usize = 10_000;

/// The last spans, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Spans(RefCell<VecDeque<Value>>);

impl Spans {
    /// Keeps the spans of a request.
    pub(crate) fn take(&self, request: ExportRequest) {
        let mut spans = self.0.borrow_mut();
        for resource in request.resource_spans {
            let of = attributes(&resource.resource.unwrap_or_default().attributes);
            for span in resource.scope_spans.into_iter().flat_map(|s| s.spans) {
                if spans.len() == MAX_SPANS {
                    spans.pop_front();
                }
                spans.push_back(json!({
                    "trace": hex(&span.trace_id),
                    "span": hex(&span.span_id),
                    "parent": hex(&span.parent_span_id),
                    "name": span.name,
                    "kind": span.kind,
                    "start": span.start,
                    "end": span.end,
                    "attributes": attributes(&span.attributes),
                    "resource": of,
                }));
            }
        }
    }

    /// As a JSON array.
    pub(crate) fn json(&self) -> Vec<u8> {
        // Values of our own making have a JSON form.
        serde_json::to_vec(&*self.0.borrow()).unwrap_or_default()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(all: &[KeyValue]) -> Value {
    let pairs = all.iter().map(|pair| {
        let value = pair.value.as_ref().and_then(|value| value.value.as_ref());
        let value = match value {
            None => Value::Null,
            Some(any_value::Value::Text(text)) => text.as_str().into(),
            Some(any_value::Value::Bool(value)) => (*value).into(),
            Some(any_value::Value::Int(value)) => (*value).into(),
            Some(any_value::Value::Double(value)) => (*value).into(),
        };
        (pair.key.clone(), value)
    });
    Value::Object(pairs.collect::<Map<_, _>>())
}

/// `ExportTraceServiceRequest` (opentelemetry-proto v1), as far as it is shown.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

/// `ExportTraceServiceResponse` of success.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ExportResponse {}

#[derive(Clone, PartialEq, prost::Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ScopeSpans {
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start: u64,
    #[prost(fixed64, tag = "8")]
    end: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AnyValue {
    #[prost(oneof = "any_value::Value", tags = "1, 2, 3, 4")]
    value: Option<any_value::Value>,
}

mod any_value {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Value {
        #[prost(string, tag = "1")]
        Text(String),
        #[prost(bool, tag = "2")]
        Bool(bool),
        #[prost(int64, tag = "3")]
        Int(i64),
        #[prost(double, tag = "4")]
        Double(f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_shown_as_they_came() {
        let pair = KeyValue {
            key: "http.method".into(),
            value: Some(AnyValue {
                value: Some(any_value::Value::Text("GET".into())),
            }),
        };
        let span = Span {
            trace_id: vec![0xab; 16],
            span_id: vec![1; 8],
            name: "reviews".into(),
            attributes: vec![pair.clone()],
            ..Span::default()
        };
        let scope_spans = vec![ScopeSpans { spans: vec![span] }];
        let resource = Some(Resource {
            attributes: vec![pair],
        });
        let spans = Spans::default();
        spans.take(ExportRequest {
            resource_spans: vec![ResourceSpans {
                resource,
                scope_spans,
            }],
        });
        let shown: Value = serde_json::from_slice(&spans.json()).unwrap_or_default();
        assert_eq!(shown[0]["trace"], "ab".repeat(16));
        assert_eq!(shown[0]["attributes"]["http.method"], "GET");
        assert_eq!(shown[0]["resource"]["http.method"], "GET");
    }
}
