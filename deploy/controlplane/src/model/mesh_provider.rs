//! Providers of Istio's mesh configuration (`extensionProviders`).

use std::collections::BTreeMap;

use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::provider::Kind;
use serde::Deserialize;
use serde_json::Value;

use super::duration::duration;
use super::field::{At, FieldError, FieldPath};
use super::raw::{Map, nullable};

/// Reads the provider `name`.
pub(super) fn provider(
    name: &str,
    raw: &Value,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::Provider {
    let before = errors.len();
    let kinds: Vec<_> = raw.as_object().into_iter().flatten().collect();
    let mut kinds = kinds.into_iter().filter(|(key, _)| *key != "name");
    let kind = match (kinds.next(), kinds.next()) {
        (Some((key, raw)), None) => kind(key, raw, at.key(key), errors),
        (None, _) => {
            errors.push(at.error("says nothing but its name"));
            None
        }
        (Some(_), Some(_)) => {
            errors.push(at.error("is of more than one kind"));
            None
        }
    };
    let invalid: Vec<_> = errors
        .iter()
        .skip(before)
        .map(ToString::to_string)
        .collect();
    let kind = match kind {
        Some(kind) if invalid.is_empty() => kind,
        _ => Kind::Invalid(invalid.join("; ")),
    };
    wire::Provider {
        name: name.into(),
        kind: Some(kind),
    }
}

fn kind(key: &str, raw: &Value, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<Kind> {
    Some(match key {
        "envoyExtAuthzHttp" => Kind::ExtAuthzHttp(ext_authz_http(raw, at, errors)?),
        "envoyExtAuthzGrpc" => {
            let raw: RawExtAuthz = read(raw, at, errors)?;
            Kind::ExtAuthzGrpc(wire::ExtAuthzGrpc {
                common: Some(common(&raw, at, errors)),
            })
        }
        "opentelemetry" => Kind::Opentelemetry(opentelemetry(raw, at, errors)?),
        "zipkin" => {
            let raw: RawZipkin = read(raw, at, errors)?;
            Kind::Zipkin(wire::Zipkin {
                service: Some(service(&raw.service, raw.port, None, at, errors)),
                path: raw.path,
                enable_64bit_trace_id: raw.enable_64bit_trace_id,
            })
        }
        "envoyFileAccessLog" => {
            let raw: RawFile = read(raw, at, errors)?;
            let format = raw.log_format.map(Map::into_inner).unwrap_or_default();
            let json = format.labels.as_ref().map(Value::to_string);
            Kind::FileAccessLog(wire::FileAccessLog {
                path: match raw.path.as_str() {
                    "" => "/dev/stdout".into(),
                    path => path.into(),
                },
                json: json.is_some(),
                format: json.unwrap_or(format.text),
            })
        }
        "prometheus" => Kind::Prometheus(true),
        other => {
            errors.push(at.error(format!(
                "{other:?} is not supported: envoyExtAuthzHttp, envoyExtAuthzGrpc, opentelemetry, zipkin, envoyFileAccessLog or prometheus"
            )));
            return None;
        }
    })
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawExtAuthz {
    #[serde(deserialize_with = "nullable")]
    service: String,
    #[serde(deserialize_with = "nullable")]
    port: u32,
    timeout: Option<String>,
    #[serde(deserialize_with = "nullable")]
    path_prefix: String,
    #[serde(deserialize_with = "nullable")]
    fail_open: bool,
    #[serde(deserialize_with = "nullable")]
    clear_route_cache: bool,
    #[serde(deserialize_with = "nullable")]
    status_on_error: String,
    // The older name of the next.
    #[serde(deserialize_with = "nullable")]
    include_headers_in_check: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    include_request_headers_in_check: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    include_additional_headers_in_check: BTreeMap<String, String>,
    include_request_body_in_check: Option<Map<RawBody>>,
    #[serde(deserialize_with = "nullable")]
    headers_to_upstream_on_allow: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    headers_to_downstream_on_allow: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    headers_to_downstream_on_deny: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawBody {
    #[serde(deserialize_with = "nullable")]
    max_request_bytes: u32,
    #[serde(deserialize_with = "nullable")]
    allow_partial_message: bool,
    #[serde(deserialize_with = "nullable")]
    pack_as_bytes: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawOpenTelemetry {
    #[serde(deserialize_with = "nullable")]
    service: String,
    #[serde(deserialize_with = "nullable")]
    port: u32,
    #[serde(deserialize_with = "nullable")]
    max_tag_length: u32,
    http: Option<Map<RawHttp>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawHttp {
    #[serde(deserialize_with = "nullable")]
    path: String,
    timeout: Option<String>,
    #[serde(deserialize_with = "nullable")]
    headers: Vec<Map<RawHeader>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawHeader {
    #[serde(deserialize_with = "nullable")]
    name: String,
    #[serde(deserialize_with = "nullable")]
    value: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawZipkin {
    #[serde(deserialize_with = "nullable")]
    service: String,
    #[serde(deserialize_with = "nullable")]
    port: u32,
    #[serde(rename = "maxTagLength")]
    _max_tag_length: Option<u32>,
    #[serde(rename = "enable64bitTraceId", deserialize_with = "nullable")]
    enable_64bit_trace_id: bool,
    #[serde(deserialize_with = "nullable")]
    path: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawFile {
    #[serde(deserialize_with = "nullable")]
    path: String,
    log_format: Option<Map<RawFormat>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawFormat {
    #[serde(deserialize_with = "nullable")]
    text: String,
    labels: Option<Value>,
}

fn read<T: for<'de> Deserialize<'de>>(
    raw: &Value,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<T> {
    let read: Result<Map<T>, _> = serde_path_to_error::deserialize(raw);
    match read {
        Ok(read) => Some(read.into_inner()),
        Err(error) => {
            errors.push(FieldError {
                path: FieldPath::from_serde(error.path()).below(&at.path().0),
                message: error.inner().to_string(),
            });
            None
        }
    }
}

/// `service` is a host name, or with its namespace before it `namespace/host`.
fn service(
    name: &str,
    port: u32,
    timeout: Option<&str>,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::ProviderService {
    let hostname = name.split_once('/').map_or(name, |(_, hostname)| hostname);
    if hostname.is_empty() {
        errors.push(at.key("service").error("is required"));
    }
    if !(1..=65_535).contains(&port) {
        errors.push(at.key("port").error("is not a port: 1 to 65535"));
    }
    wire::ProviderService {
        hostname: hostname.into(),
        port,
        timeout: timeout.and_then(|text| duration(text, at.key("timeout"), errors)),
    }
}

fn common(raw: &RawExtAuthz, at: At<'_>, errors: &mut Vec<FieldError>) -> wire::ExtAuthzCommon {
    let body = raw.include_request_body_in_check.as_deref();
    let status = match raw.status_on_error.as_str() {
        "" => 0,
        text => match text.parse::<u32>() {
            Ok(code) if (100..600).contains(&code) => code,
            _ => {
                let message = format!("{text:?} is not a status code");
                errors.push(at.key("statusOnError").error(message));
                0
            }
        },
    };
    if body.is_some_and(|body| body.max_request_bytes == 0) {
        let at = at.key("includeRequestBodyInCheck");
        errors.push(at.key("maxRequestBytes").error("is required"));
    }
    wire::ExtAuthzCommon {
        service: Some(service(
            &raw.service,
            raw.port,
            raw.timeout.as_deref(),
            at,
            errors,
        )),
        fail_open: raw.fail_open,
        status_on_error: status,
        clear_route_cache: raw.clear_route_cache,
        body_max_bytes: body.map_or(0, |body| body.max_request_bytes),
        body_allow_partial: body.is_some_and(|body| body.allow_partial_message),
        body_pack_as_bytes: body.is_some_and(|body| body.pack_as_bytes),
    }
}

fn ext_authz_http(
    raw: &Value,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<wire::ExtAuthzHttp> {
    let raw: RawExtAuthz = read(raw, at, errors)?;
    if !raw.path_prefix.is_empty() && !raw.path_prefix.starts_with('/') {
        errors.push(at.key("pathPrefix").error("does not begin with /"));
    }
    let additional = raw.include_additional_headers_in_check.iter();
    let additional = additional.map(|(name, value)| wire::Header {
        name: name.clone(),
        value: value.clone(),
    });
    let included = raw.include_headers_in_check.iter();
    let included = included.chain(&raw.include_request_headers_in_check);
    Some(wire::ExtAuthzHttp {
        common: Some(common(&raw, at, errors)),
        path_prefix: raw.path_prefix.clone(),
        include_request_headers: included.cloned().collect(),
        include_additional_headers: additional.collect(),
        headers_to_upstream_on_allow: raw.headers_to_upstream_on_allow.clone(),
        headers_to_downstream_on_allow: raw.headers_to_downstream_on_allow.clone(),
        headers_to_downstream_on_deny: raw.headers_to_downstream_on_deny.clone(),
    })
}

fn opentelemetry(
    raw: &Value,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<wire::OpenTelemetry> {
    let raw: RawOpenTelemetry = read(raw, at, errors)?;
    let http = raw.http.as_deref();
    let timeout = http.and_then(|http| http.timeout.as_deref());
    let headers = http.into_iter().flat_map(|http| &http.headers);
    let headers = headers.map(|header| wire::Header {
        name: header.name.clone(),
        value: header.value.clone(),
    });
    if http.is_some_and(|http| !http.path.starts_with('/')) {
        let at = at.key("http");
        errors.push(at.key("path").error("does not begin with /"));
    }
    Some(wire::OpenTelemetry {
        service: Some(service(&raw.service, raw.port, timeout, at, errors)),
        http_path: http.map(|http| http.path.clone()).unwrap_or_default(),
        headers: headers.collect(),
        resource_attributes: Vec::new(),
        max_tag_length: raw.max_tag_length,
    })
}
