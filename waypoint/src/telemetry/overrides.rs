//! The metrics part of the Telemetry API, compiled: which metrics are off, which tags are
//! removed, replaced or added.

use std::sync::Arc;

use adit_shared::proto::waypoint as proto;

use super::event::RequestEvent;
use super::expression::{Expression, ExpressionError};

/// A metric that a request counts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Metric {
    /// `istio_requests_total`
    RequestCount,
    /// `istio_request_duration_milliseconds`
    RequestDuration,
    /// `istio_request_bytes`
    RequestSize,
    /// `istio_response_bytes`
    ResponseSize,
    /// `istio_request_messages_total`
    RequestMessages,
    /// `istio_response_messages_total`
    ResponseMessages,
}

impl Metric {
    const ALL: [Self; 6] = [
        Self::RequestCount,
        Self::RequestDuration,
        Self::RequestSize,
        Self::ResponseSize,
        Self::RequestMessages,
        Self::ResponseMessages,
    ];

    /// The metrics that the Telemetry API means by `name`; `None`: it knows no such metric.
    /// The TCP metrics and custom names are known, but no request counts in them.
    fn named(name: &str) -> Option<&'static [Self]> {
        Some(match name {
            "" | "ALL_METRICS" => &Self::ALL,
            "REQUEST_COUNT" | "requests_total" => &[Self::RequestCount],
            "REQUEST_DURATION" | "request_duration_milliseconds" => &[Self::RequestDuration],
            "REQUEST_SIZE" | "request_bytes" => &[Self::RequestSize],
            "RESPONSE_SIZE" | "response_bytes" => &[Self::ResponseSize],
            "GRPC_REQUEST_MESSAGES" | "request_messages_total" => &[Self::RequestMessages],
            "GRPC_RESPONSE_MESSAGES" | "response_messages_total" => &[Self::ResponseMessages],
            "TCP_OPENED_CONNECTIONS"
            | "TCP_CLOSED_CONNECTIONS"
            | "TCP_SENT_BYTES"
            | "TCP_RECEIVED_BYTES" => &[],
            _ => return None,
        })
    }
}

/// What becomes of a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// Istio's own value.
    AsIs,
    /// Left out.
    Removed,
    /// That value of [`MetricView::values`].
    Value(usize),
}

/// The overrides that hold for one destination. Two that say the same are the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct MetricView {
    disabled: Vec<Metric>,
    tags: Vec<(Metric, Arc<str>, Option<usize>)>,
    expressions: Vec<Expression>,
}

/// Tags that every request series has.
const STANDARD: [&str; 29] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_service_name",
    "destination_service_namespace",
    "destination_cluster",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];

impl MetricView {
    /// Applies one override over what is there: later ones win.
    ///
    /// # Errors
    /// The override that cannot be understood, by metric and tag; the others hold.
    pub fn apply(&mut self, metric: &proto::MetricOverride) -> Result<(), OverrideError> {
        let Some(metrics) = Metric::named(&metric.metric) else {
            return Err(OverrideError::Metric(metric.metric.clone()));
        };
        if metric.disabled_set {
            self.disabled.retain(|m| !metrics.contains(m));
            if metric.disabled {
                self.disabled.extend(metrics);
            }
        }
        let mut result = Ok(());
        for (tag, change) in &metric.tags {
            let value = match change.remove {
                true => None,
                false => match Expression::parse(&change.value) {
                    Ok(expression) => {
                        self.expressions.push(expression);
                        Some(self.expressions.len() - 1)
                    }
                    Err(error) => {
                        result = Err(OverrideError::Tag(tag.clone(), error));
                        continue;
                    }
                },
            };
            for metric in metrics {
                self.tags.retain(|(m, t, _)| (m, &**t) != (metric, tag));
                self.tags.push((*metric, tag.as_str().into(), value));
            }
        }
        result
    }

    /// Whether nothing is overridden.
    pub fn is_empty(&self) -> bool {
        self.disabled.is_empty() && self.tags.is_empty()
    }

    pub(super) fn is_disabled(&self, metric: Metric) -> bool {
        self.disabled.contains(&metric)
    }

    /// Whether [`Self::values`] are needed.
    pub(super) fn adds_tags(&self) -> bool {
        !self.expressions.is_empty()
    }

    /// The values of the replaced and added tags for one request.
    pub(super) fn values(&self, event: &RequestEvent<'_>) -> Vec<Arc<str>> {
        let value = |expression: &Expression| match expression.text(event) {
            Some(text) => text.into(),
            None => "unknown".into(),
        };
        self.expressions.iter().map(value).collect()
    }

    pub(super) fn tag(&self, metric: Metric, tag: &str) -> Tag {
        let mut tags = self.tags.iter();
        match tags.find(|(m, t, _)| *m == metric && **t == *tag) {
            None => Tag::AsIs,
            Some((_, _, None)) => Tag::Removed,
            Some((_, _, Some(at))) => Tag::Value(*at),
        }
    }

    /// Tags that Istio does not have.
    pub(super) fn new_tags(&self, metric: Metric) -> impl Iterator<Item = (&str, usize)> {
        self.tags.iter().filter_map(move |(of, tag, value)| {
            let new = *of == metric && !STANDARD.contains(&&**tag);
            value.filter(|_| new).map(|at| (&**tag, at))
        })
    }
}

/// An override that is not in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverrideError {
    /// No such metric.
    #[error("match.metric: \"{0}\" is not a metric of Istio's")]
    Metric(String),
    /// The value of a tag.
    #[error("tagOverrides[{0}].value: {1}")]
    Tag(String, ExpressionError),
}
