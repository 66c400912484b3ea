//! Telemetry: what is logged, counted and traced.

use std::collections::BTreeMap;

use adit_shared::proto::waypoint as wire;
use serde::Deserialize;
use serde_json::Value;

use super::authorization::{PolicyScope, scope};
use super::authorization_raw::{Target, salvage_scope};
use super::field::{At, FieldError};
use super::meta::Meta;
use super::raw::{Map, Selector, nullable, read_spec};

/// Istio's names for its metrics.
const METRICS: &[&str] = &[
    "ALL_METRICS",
    "REQUEST_COUNT",
    "REQUEST_DURATION",
    "REQUEST_SIZE",
    "RESPONSE_SIZE",
    "TCP_OPENED_CONNECTIONS",
    "TCP_CLOSED_CONNECTIONS",
    "TCP_SENT_BYTES",
    "TCP_RECEIVED_BYTES",
    "GRPC_REQUEST_MESSAGES",
    "GRPC_RESPONSE_MESSAGES",
];

/// A Telemetry.
#[derive(Debug, Clone, PartialEq)]
pub struct Telemetry {
    /// Metadata.
    pub meta: Meta,
    /// Whom it covers.
    pub scope: PolicyScope,
    /// What is traced.
    pub tracing: Vec<wire::Tracing>,
    /// What is counted.
    pub metrics: Vec<wire::MetricsOverrides>,
    /// What is logged.
    pub access_logging: Vec<wire::AccessLogging>,
    /// What is wrong with it. It is not in force then.
    pub errors: Vec<FieldError>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawSpec {
    selector: Option<Map<Selector>>,
    target_ref: Option<Map<Target>>,
    #[serde(deserialize_with = "nullable")]
    target_refs: Vec<Map<Target>>,
    #[serde(deserialize_with = "nullable")]
    tracing: Vec<Map<RawTracing>>,
    #[serde(deserialize_with = "nullable")]
    metrics: Vec<Map<RawMetrics>>,
    #[serde(deserialize_with = "nullable")]
    access_logging: Vec<Map<RawLogging>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawProvider {
    #[serde(deserialize_with = "nullable")]
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawMatch {
    mode: Option<String>,
    metric: Option<String>,
    custom_metric: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawTracing {
    r#match: Option<Map<RawMatch>>,
    #[serde(deserialize_with = "nullable")]
    providers: Vec<Map<RawProvider>>,
    random_sampling_percentage: Option<f64>,
    disable_span_reporting: Option<bool>,
    #[serde(deserialize_with = "nullable")]
    custom_tags: BTreeMap<String, Map<RawTag>>,
    // Of Envoy's request ids; the waypoint samples by the trace.
    #[serde(rename = "useRequestIdForTraceSampling")]
    _use_request_id: Option<bool>,
    #[serde(rename = "enableIstioTags")]
    _istio_tags: Option<bool>,
    #[serde(deserialize_with = "nullable")]
    disable_context_propagation: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawTag {
    literal: Option<Map<RawValue>>,
    environment: Option<Map<RawNamed>>,
    header: Option<Map<RawNamed>>,
    formatter: Option<Map<RawValue>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawValue {
    #[serde(deserialize_with = "nullable")]
    value: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawNamed {
    #[serde(deserialize_with = "nullable")]
    name: String,
    #[serde(deserialize_with = "nullable")]
    default_value: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawMetrics {
    #[serde(deserialize_with = "nullable")]
    providers: Vec<Map<RawProvider>>,
    #[serde(deserialize_with = "nullable")]
    overrides: Vec<Map<RawOverride>>,
    // Metrics are read when somebody asks for them.
    #[serde(rename = "reportingInterval")]
    _reporting_interval: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawOverride {
    r#match: Option<Map<RawMatch>>,
    disabled: Option<bool>,
    #[serde(deserialize_with = "nullable")]
    tag_overrides: BTreeMap<String, Map<RawTagOverride>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawTagOverride {
    operation: Option<String>,
    #[serde(deserialize_with = "nullable")]
    value: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawLogging {
    r#match: Option<Map<RawMatch>>,
    #[serde(deserialize_with = "nullable")]
    providers: Vec<Map<RawProvider>>,
    disabled: Option<bool>,
    filter: Option<Map<RawFilter>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawFilter {
    #[serde(deserialize_with = "nullable")]
    expression: String,
}

impl Telemetry {
    /// Reads `spec`.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let raw: RawSpec = match spec {
            Value::Null => RawSpec::default(),
            spec => read_spec(spec).unwrap_or_else(|error| {
                errors.push(error);
                RawSpec::default()
            }),
        };
        let at = At::ROOT.key("spec");
        let mut covered = scope(
            raw.selector.as_deref(),
            raw.target_ref.as_deref(),
            &raw.target_refs,
            at,
            &mut errors,
        );
        let tracing = each(&raw.tracing, at.key("tracing"), &mut errors, tracing);
        let metrics = each(&raw.metrics, at.key("metrics"), &mut errors, metrics);
        let access_logging = each(
            &raw.access_logging,
            at.key("accessLogging"),
            &mut errors,
            logging,
        );
        if !errors.is_empty() {
            covered = salvage_scope(spec);
        }
        Self {
            meta,
            scope: covered,
            tracing,
            metrics,
            access_logging,
            errors,
        }
    }
}

fn each<R, T>(
    raw: &[Map<R>],
    at: At<'_>,
    errors: &mut Vec<FieldError>,
    read: impl Fn(&R, At<'_>, &mut Vec<FieldError>) -> Option<T>,
) -> Vec<T> {
    let items = raw.iter().enumerate();
    items
        .filter_map(|(index, raw)| read(raw, at.index(index), errors))
        .collect()
}

/// Whether it is about the server's side, which is a waypoint's.
fn is_ours(of: Option<&RawMatch>, at: At<'_>, errors: &mut Vec<FieldError>) -> bool {
    match of.and_then(|of| of.mode.as_deref()) {
        None | Some("" | "CLIENT_AND_SERVER" | "SERVER") => true,
        Some("CLIENT") => false,
        Some(other) => {
            let at = at.key("match");
            let message = format!("{other:?} is not CLIENT_AND_SERVER, CLIENT or SERVER");
            errors.push(at.key("mode").error(message));
            true
        }
    }
}

fn providers(raw: &[Map<RawProvider>], at: At<'_>, errors: &mut Vec<FieldError>) -> Vec<String> {
    let list = at.key("providers");
    let named = raw.iter().enumerate().map(|(index, provider)| {
        if provider.name.is_empty() {
            errors.push(list.index(index).key("name").error("is required"));
        }
        provider.name.clone()
    });
    named.collect()
}

fn tracing(raw: &RawTracing, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<wire::Tracing> {
    let ours = is_ours(raw.r#match.as_deref(), at, errors);
    let sampling = raw.random_sampling_percentage;
    if sampling.is_some_and(|share| !(0.0..=100.0).contains(&share)) {
        errors.push(
            at.key("randomSamplingPercentage")
                .error("is not between 0 and 100"),
        );
    }
    let list = at.key("customTags");
    let tags = raw.custom_tags.iter().filter_map(|(name, raw)| {
        let tag = tag(raw, list.key(name), errors)?;
        Some((name.clone(), tag))
    });
    let custom_tags = tags.collect();
    let tracing = wire::Tracing {
        providers: providers(&raw.providers, at, errors),
        random_sampling_percentage: sampling.unwrap_or_default(),
        random_sampling_percentage_set: sampling.is_some(),
        disable_span_reporting: raw.disable_span_reporting.unwrap_or_default(),
        disable_span_reporting_set: raw.disable_span_reporting.is_some(),
        custom_tags,
        disable_context_propagation: raw.disable_context_propagation,
    };
    ours.then_some(tracing)
}

fn tag(raw: &RawTag, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<wire::CustomTag> {
    use wire::custom_tag::Kind;
    let named = |of: &RawNamed| wire::Header {
        name: of.name.clone(),
        value: of.default_value.clone(),
    };
    let environment = raw.environment.as_deref();
    let header = raw.header.as_deref();
    for (key, named) in [("environment", environment), ("header", header)] {
        if named.is_some_and(|of| of.name.is_empty()) {
            let at = at.key(key);
            errors.push(at.key("name").error("is required"));
        }
    }
    let literal = raw.literal.as_ref();
    let formatter = raw.formatter.as_ref();
    let kinds = [
        literal.map(|of| Kind::Literal(of.value.clone())),
        environment.map(|of| Kind::Environment(named(of))),
        header.map(|of| Kind::Header(named(of))),
        formatter.map(|of| Kind::Formatter(of.value.clone())),
    ];
    let mut kinds = kinds.into_iter().flatten();
    let kind = kinds.next();
    if kind.is_none() || kinds.next().is_some() {
        errors.push(at.error("has one of literal, environment, header, formatter"));
    }
    kind.map(|kind| wire::CustomTag { kind: Some(kind) })
}

fn metrics(
    raw: &RawMetrics,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<wire::MetricsOverrides> {
    Some(wire::MetricsOverrides {
        providers: providers(&raw.providers, at, errors),
        overrides: each(&raw.overrides, at.key("overrides"), errors, change),
    })
}

fn change(
    raw: &RawOverride,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<wire::MetricOverride> {
    let of = raw.r#match.as_deref();
    let ours = is_ours(of, at, errors);
    let own = at.key("match");
    let metric = match of.map(|of| (of.metric.as_deref(), of.custom_metric.as_deref())) {
        None | Some((None, None)) => "ALL_METRICS",
        Some((Some(metric), None)) => {
            if !METRICS.contains(&metric) {
                let message = format!("{metric:?} is not one of {}", METRICS.join(", "));
                errors.push(own.key("metric").error(message));
            }
            metric
        }
        Some((None, Some(custom))) => custom,
        Some((Some(metric), Some(_))) => {
            errors.push(own.error("only one of metric and customMetric may be set"));
            metric
        }
    };
    let list = at.key("tagOverrides");
    let tags = raw.tag_overrides.iter().map(|(name, raw)| {
        let at = list.key(name);
        let remove = match raw.operation.as_deref() {
            None | Some("" | "UPSERT") => {
                if raw.value.is_empty() {
                    errors.push(at.key("value").error("is required with UPSERT"));
                }
                false
            }
            Some("REMOVE") => true,
            Some(other) => {
                let message = format!("{other:?} is not UPSERT or REMOVE");
                errors.push(at.key("operation").error(message));
                false
            }
        };
        let tag = wire::TagOverride {
            remove,
            value: raw.value.clone(),
        };
        (name.clone(), tag)
    });
    let change = wire::MetricOverride {
        metric: metric.into(),
        disabled: raw.disabled.unwrap_or_default(),
        disabled_set: raw.disabled.is_some(),
        tags: tags.collect(),
    };
    ours.then_some(change)
}

fn logging(
    raw: &RawLogging,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<wire::AccessLogging> {
    let ours = is_ours(raw.r#match.as_deref(), at, errors);
    let filter = raw.filter.as_ref();
    let logging = wire::AccessLogging {
        providers: providers(&raw.providers, at, errors),
        disabled: raw.disabled.unwrap_or_default(),
        disabled_set: raw.disabled.is_some(),
        filter: filter.map(|of| of.expression.clone()).unwrap_or_default(),
    };
    ours.then_some(logging)
}
