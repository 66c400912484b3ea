//! The Telemetry API, merged: what holds for the requests to one service.
//!
//! The most specific resource that says something about a matter decides it: one that targets
//! the service or the waypoint, then those of the namespace, then those of the root namespace
//! (Istio Telemetry). Tags of several levels add up, the more specific winning.

use std::collections::BTreeMap;
use std::sync::Arc;

use adit_shared::proto::waypoint as proto;

use super::access_log::{Format, FormatError};
use super::expression::{Expression, ExpressionError};
use super::overrides::{MetricView, OverrideError};
use super::trace::EVERY_REQUEST;

/// Istio's default sampling: 1 %.
const DEFAULT_SAMPLING: f64 = 1.0;

/// What holds for the requests to one service. Made when the configuration changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TelemetrySettings {
    /// Metrics; `None`: as Istio's defaults.
    pub metrics: Option<Arc<MetricView>>,
    /// Where lines go and which.
    pub access_logs: Vec<AccessLogSettings>,
    /// Spans.
    pub tracing: TracingSettings,
}

/// One access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLogSettings {
    /// Which requests; `None`: all.
    pub filter: Option<Expression>,
    /// How the line looks.
    pub format: Arc<Format>,
}

/// Spans of requests to one service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TracingSettings {
    /// Names of the providers that get spans; none: none.
    pub providers: Vec<Arc<str>>,
    /// Of requests without a decision, in millionths.
    pub sampling: u32,
    /// Whether trace headers are left alone.
    pub no_propagation: bool,
    /// Further attributes.
    pub tags: Vec<(Arc<str>, TagValue)>,
}

/// The value of an attribute that the user added to spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TagValue {
    /// Always the same; also what came from the environment.
    Literal(Arc<str>),
    /// A request header, or else the default.
    Header {
        /// Its name.
        name: http::HeaderName,
        /// Where the request has none.
        default: Arc<str>,
    },
    /// In the language of the access log.
    Formatter(Arc<Format>),
}

/// Something in a Telemetry resource or provider that is not in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// An override of a metric.
    #[error("metrics.overrides: {0}")]
    Metric(#[from] OverrideError),
    /// A filter.
    #[error("accessLogging.filter: {0}")]
    Filter(ExpressionError),
    /// A format of lines.
    #[error("access log format: {0}")]
    Format(#[from] FormatError),
    /// A provider that is missing, or of another kind.
    #[error("provider {0:?} is not there, or is no {1}")]
    Provider(String, &'static str),
    /// A tag.
    #[error("tracing.customTags[{0}] is malformed")]
    Tag(String),
}

impl TelemetrySettings {
    /// Merges what holds, `resources` in order from the least to the most specific. What is
    /// wrong is told and left out.
    pub fn merge(
        mesh: &proto::Settings,
        providers: &dyn Fn(&str) -> Option<Arc<proto::Provider>>,
        resources: &[Arc<proto::Telemetry>],
    ) -> (Self, Vec<SettingsError>) {
        let mut errors = Vec::new();
        let mut view = MetricView::default();
        for of in resources.iter().flat_map(|resource| &resource.metrics) {
            for change in &of.overrides {
                if let Err(error) = view.apply(change) {
                    errors.push(error.into());
                }
            }
        }
        let settings = Self {
            metrics: (!view.is_empty()).then(|| Arc::new(view)),
            access_logs: access_logs(mesh, providers, resources, &mut errors),
            tracing: tracing(mesh, providers, resources, &mut errors),
        };
        (settings, errors)
    }
}

impl TelemetrySettings {
    /// Whether something of the headers of responses may be logged, traced or counted.
    pub fn reads_response_headers(&self) -> bool {
        // An expression may name any.
        let mut logs = self.access_logs.iter();
        self.metrics.is_some()
            || logs.any(|log| log.filter.is_some() || log.format.reads_response())
            || self.tracing.tags.iter().any(|(_, tag)| match tag {
                TagValue::Formatter(format) => format.reads_response(),
                TagValue::Literal(_) | TagValue::Header { .. } => false,
            })
    }
}

fn access_logs(
    mesh: &proto::Settings,
    providers: &dyn Fn(&str) -> Option<Arc<proto::Provider>>,
    resources: &[Arc<proto::Telemetry>],
    errors: &mut Vec<SettingsError>,
) -> Vec<AccessLogSettings> {
    let specific = resources.iter().rev().map(|r| &r.access_logging);
    let Some(stated) = specific.into_iter().find(|list| !list.is_empty()) else {
        return match mesh.access_log {
            true => vec![AccessLogSettings {
                filter: None,
                format: mesh_format(mesh, errors),
            }],
            false => Vec::new(),
        };
    };
    let mut logs = Vec::new();
    for log in stated.iter().filter(|log| !log.disabled) {
        let filter = match log.filter.as_str() {
            "" => None,
            source => match Expression::parse(source) {
                Ok(filter) => Some(filter),
                // Which lines were meant is not known: rather all than none.
                Err(error) => {
                    errors.push(SettingsError::Filter(error));
                    None
                }
            },
        };
        let named = match log.providers.is_empty() {
            true => &mesh.default_access_log_providers,
            false => &log.providers,
        };
        if named.is_empty() {
            let format = mesh_format(mesh, errors);
            logs.push(AccessLogSettings { filter, format });
            continue;
        }
        for name in named {
            let provider = providers(name);
            let kind = provider.as_ref().and_then(|p| p.kind.as_ref());
            let format = match kind {
                Some(proto::provider::Kind::FileAccessLog(file)) => {
                    format(file.json, &file.format, errors)
                }
                // Istio's name for the mesh's own, which needs no declaration.
                None if name == "envoy" => mesh_format(mesh, errors),
                _ => {
                    let kind = "access log";
                    errors.push(SettingsError::Provider(name.clone(), kind));
                    continue;
                }
            };
            logs.push(AccessLogSettings {
                filter: filter.clone(),
                format,
            });
        }
    }
    logs
}

fn mesh_format(mesh: &proto::Settings, errors: &mut Vec<SettingsError>) -> Arc<Format> {
    let json = mesh.access_log_encoding() == proto::settings::AccessLogEncoding::Json;
    format(json, &mesh.access_log_format, errors)
}

fn format(json: bool, text: &str, errors: &mut Vec<SettingsError>) -> Arc<Format> {
    let default = || match json {
        true => Format::default_json(),
        false => Format::default_text(),
    };
    let parsed = match (text, json) {
        ("", _) => Ok(default()),
        (text, true) => Format::json(text),
        (text, false) => Format::text(text),
    };
    Arc::new(parsed.unwrap_or_else(|error| {
        errors.push(error.into());
        default()
    }))
}

fn tracing(
    mesh: &proto::Settings,
    providers: &dyn Fn(&str) -> Option<Arc<proto::Provider>>,
    resources: &[Arc<proto::Telemetry>],
    errors: &mut Vec<SettingsError>,
) -> TracingSettings {
    let mut sampling = match mesh.trace_sampling_set {
        true => mesh.trace_sampling,
        false => DEFAULT_SAMPLING,
    };
    let mut named = &mesh.default_tracing_providers;
    let mut reporting = true;
    let mut no_propagation = false;
    let mut tags = BTreeMap::new();
    for tracing in resources.iter().flat_map(|resource| &resource.tracing) {
        if !tracing.providers.is_empty() {
            named = &tracing.providers;
        }
        if tracing.random_sampling_percentage_set {
            sampling = tracing.random_sampling_percentage;
        }
        if tracing.disable_span_reporting_set {
            reporting = !tracing.disable_span_reporting;
        }
        no_propagation = tracing.disable_context_propagation;
        for (name, tag) in &tracing.custom_tags {
            match tag_value(tag) {
                Some(value) => {
                    tags.insert(Arc::<str>::from(name.as_str()), value);
                }
                None => errors.push(SettingsError::Tag(name.clone())),
            }
        }
    }
    use proto::provider::Kind;
    let mut usable = Vec::new();
    for name in named.iter().filter(|_| reporting) {
        let provider = providers(name);
        match provider.as_ref().and_then(|p| p.kind.as_ref()) {
            Some(Kind::Opentelemetry(_) | Kind::Zipkin(_)) => usable.push(name.as_str().into()),
            _ => errors.push(SettingsError::Provider(name.clone(), "tracing provider")),
        }
    }
    let share = (sampling.clamp(0.0, 100.0) / 100.0 * f64::from(EVERY_REQUEST)).round();
    TracingSettings {
        providers: usable,
        sampling: share as u32,
        no_propagation,
        tags: tags.into_iter().collect(),
    }
}

fn tag_value(tag: &proto::CustomTag) -> Option<TagValue> {
    use proto::custom_tag::Kind;
    Some(match tag.kind.as_ref()? {
        Kind::Literal(value) => TagValue::Literal(value.as_str().into()),
        Kind::Environment(variable) => {
            let value = std::env::var(&variable.name).ok();
            TagValue::Literal(value.unwrap_or_else(|| variable.value.clone()).into())
        }
        Kind::Header(header) => TagValue::Header {
            name: http::HeaderName::try_from(&header.name).ok()?,
            default: header.value.as_str().into(),
        },
        Kind::Formatter(format) => TagValue::Formatter(Arc::new(Format::text(format).ok()?)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(
        mesh: &proto::Settings,
        resources: Vec<proto::Telemetry>,
    ) -> (TelemetrySettings, Vec<SettingsError>) {
        let providers = |name: &str| {
            use proto::provider::Kind;
            let kind = match name {
                "otel" => Kind::Opentelemetry(proto::OpenTelemetry::default()),
                "zipkin" => Kind::Zipkin(proto::Zipkin::default()),
                "json" => Kind::FileAccessLog(proto::FileAccessLog {
                    json: true,
                    ..Default::default()
                }),
                _ => return None,
            };
            Some(Arc::new(proto::Provider {
                name: name.into(),
                kind: Some(kind),
            }))
        };
        let resources: Vec<_> = resources.into_iter().map(Arc::new).collect();
        TelemetrySettings::merge(mesh, &providers, &resources)
    }

    fn tracing(of: proto::Tracing) -> proto::Telemetry {
        proto::Telemetry {
            tracing: vec![of],
            ..Default::default()
        }
    }

    #[test]
    fn without_anything_there_are_metrics_and_one_percent() {
        let (settings, errors) = merge(&proto::Settings::default(), Vec::new());
        assert_eq!(errors, []);
        assert_eq!(settings.metrics, None);
        assert!(settings.access_logs.is_empty());
        assert_eq!(settings.tracing.sampling, 10_000);
        assert!(settings.tracing.providers.is_empty());
    }

    #[test]
    fn the_most_specific_that_says_something_decides() {
        let mesh = proto::Settings {
            access_log: true,
            trace_sampling: 50.0,
            trace_sampling_set: true,
            default_tracing_providers: vec!["otel".into()],
            ..Default::default()
        };
        let (settings, errors) = merge(
            &mesh,
            vec![
                tracing(proto::Tracing {
                    random_sampling_percentage: 100.0,
                    random_sampling_percentage_set: true,
                    ..Default::default()
                }),
                tracing(proto::Tracing {
                    providers: vec!["zipkin".into()],
                    ..Default::default()
                }),
            ],
        );
        assert_eq!(errors, []);
        assert_eq!(settings.tracing.sampling, EVERY_REQUEST);
        assert_eq!(settings.tracing.providers, ["zipkin".into()]);
        assert_eq!(settings.access_logs.len(), 1);
    }

    #[test]
    fn logs_can_be_off_filtered_and_of_a_provider() {
        let mesh = proto::Settings {
            access_log: true,
            ..Default::default()
        };
        let logging = |log: proto::AccessLogging| proto::Telemetry {
            access_logging: vec![log],
            ..Default::default()
        };
        let off = logging(proto::AccessLogging {
            disabled: true,
            disabled_set: true,
            ..Default::default()
        });
        assert!(merge(&mesh, vec![off.clone()]).0.access_logs.is_empty());
        let filtered = logging(proto::AccessLogging {
            providers: vec!["json".into()],
            filter: "response.code >= 500".into(),
            ..Default::default()
        });
        let (settings, errors) = merge(&mesh, vec![off, filtered]);
        assert_eq!(errors, []);
        let [log] = &settings.access_logs[..] else {
            panic!("{settings:?}");
        };
        assert_eq!(*log.format, Format::default_json());
        assert!(log.filter.is_some());
    }

    #[test]
    fn what_is_wrong_is_told_and_the_rest_holds() {
        let (settings, errors) = merge(
            &proto::Settings::default(),
            vec![proto::Telemetry {
                tracing: vec![proto::Tracing {
                    providers: vec!["nobody".into(), "otel".into()],
                    custom_tags: [("empty".to_owned(), proto::CustomTag::default())].into(),
                    ..Default::default()
                }],
                access_logging: vec![proto::AccessLogging {
                    filter: "response.".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }],
        );
        assert_eq!(errors.len(), 3, "{errors:?}");
        assert_eq!(settings.tracing.providers, ["otel".into()]);
        assert_eq!(settings.access_logs.len(), 1, "rather all lines than none");
    }
}
