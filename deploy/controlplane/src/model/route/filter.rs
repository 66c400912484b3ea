//! Filters of HTTPRoutes and GRPCRoutes.

use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::filter::Kind;
use adit_shared::proto::waypoint::path_modifier;
use serde::Deserialize;
use serde_json::Value;

use super::super::field::{At, FieldError};
use super::super::raw::{Map, nullable};
use super::backend::{BackendRef, RawBackend};
use super::external_auth::{RawExternalAuth, external_auth};
use super::matching::{check_header_name, check_path};
use super::read_port;

/// Most filters of a rule or a backend (CRD).
pub(super) const MAX_FILTERS: usize = 16;
/// Most headers of a modifier, and most entries of a list of CORS (CRD: 16 and 64).
pub(super) const MAX_ENTRIES: usize = 64;
/// The default of `cors.maxAge`, seconds (CRD).
const CORS_MAX_AGE: i64 = 5;

/// A filter, in its order.
#[derive(Debug, Clone, PartialEq)]
pub enum Filter {
    /// One that refers to nothing.
    Plain(wire::Filter),
    /// A copy of the request goes to a backend.
    Mirror {
        /// The backend.
        backend: BackendRef,
        /// Of the requests, in parts per million.
        per_million: u32,
    },
    /// A service is asked whether the request may pass.
    ExternalAuth {
        /// The service.
        backend: BackendRef,
        /// How, without the service.
        auth: wire::ExternalAuth,
    },
}

/// Where a filter stands decides what it may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// Of a backend.
    pub(super) of_backend: bool,
    /// Of a GRPCRoute.
    pub(super) grpc: bool,
    /// The rule's matches, for a prefix to replace.
    pub(super) matches: &'a [wire::HttpMatch],
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawFilter {
    #[serde(deserialize_with = "nullable")]
    r#type: String,
    request_header_modifier: Option<Map<RawHeaders>>,
    response_header_modifier: Option<Map<RawHeaders>>,
    request_mirror: Option<Map<RawMirror>>,
    request_redirect: Option<Map<RawRedirect>>,
    url_rewrite: Option<Map<RawRewrite>>,
    cors: Option<Map<RawCors>>,
    external_auth: Option<Map<RawExternalAuth>>,
    extension_ref: Option<Value>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawHeaders {
    #[serde(deserialize_with = "nullable")]
    set: Vec<Map<RawHeader>>,
    #[serde(deserialize_with = "nullable")]
    add: Vec<Map<RawHeader>>,
    #[serde(deserialize_with = "nullable")]
    remove: Vec<String>,
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
struct RawMirror {
    backend_ref: Option<Map<RawBackend>>,
    percent: Option<i64>,
    fraction: Option<Map<RawFraction>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawFraction {
    numerator: i64,
    denominator: Option<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawRedirect {
    scheme: Option<String>,
    hostname: Option<String>,
    path: Option<Map<RawPath>>,
    port: Option<i64>,
    status_code: Option<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawRewrite {
    hostname: Option<String>,
    path: Option<Map<RawPath>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawPath {
    #[serde(deserialize_with = "nullable")]
    r#type: String,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawCors {
    #[serde(deserialize_with = "nullable")]
    allow_origins: Vec<String>,
    allow_credentials: Option<bool>,
    #[serde(deserialize_with = "nullable")]
    allow_methods: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    allow_headers: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    expose_headers: Vec<String>,
    max_age: Option<i64>,
}

/// Reads filters in their order.
pub(super) fn filters(
    raw: &[Map<RawFilter>],
    place: Place<'_>,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Vec<Filter> {
    if raw.len() > MAX_FILTERS {
        errors.push(at.error(format!("has more than {MAX_FILTERS} entries")));
    }
    let mut found = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    for (index, raw) in raw.iter().take(MAX_FILTERS).enumerate() {
        let at = at.index(index);
        let kind = raw.r#type.as_str();
        if kind != "RequestMirror" && seen.contains(&kind) {
            errors.push(at.key("type").error(format!("{kind} cannot be repeated")));
        }
        seen.push(kind);
        found.extend(filter(raw, place, at, errors));
    }
    if seen.contains(&"RequestRedirect") && seen.contains(&"URLRewrite") {
        errors.push(at.error("RequestRedirect and URLRewrite exclude each other"));
    }
    found
}

fn filter(
    raw: &RawFilter,
    place: Place<'_>,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<Filter> {
    let members: [(&str, &str, bool); 8] = [
        (
            "RequestHeaderModifier",
            "requestHeaderModifier",
            raw.request_header_modifier.is_some(),
        ),
        (
            "ResponseHeaderModifier",
            "responseHeaderModifier",
            raw.response_header_modifier.is_some(),
        ),
        (
            "RequestMirror",
            "requestMirror",
            raw.request_mirror.is_some(),
        ),
        (
            "RequestRedirect",
            "requestRedirect",
            raw.request_redirect.is_some(),
        ),
        ("URLRewrite", "urlRewrite", raw.url_rewrite.is_some()),
        ("CORS", "cors", raw.cors.is_some()),
        ("ExternalAuth", "externalAuth", raw.external_auth.is_some()),
        ("ExtensionRef", "extensionRef", raw.extension_ref.is_some()),
    ];
    let kind = raw.r#type.as_str();
    for (of, key, present) in members {
        if of == kind && !present {
            errors.push(at.key(key).error(format!("is required with type: {kind}")));
        } else if of != kind && present {
            errors.push(at.key(key).error(format!("is for type: {of}")));
        }
    }
    let http_only = place.grpc
        && matches!(
            kind,
            "RequestRedirect" | "URLRewrite" | "CORS" | "ExternalAuth"
        );
    // Of ExternalAuth the API knows rules only (`HTTPRouteFilterExternalAuth`).
    let rule_only = place.of_backend && matches!(kind, "RequestRedirect" | "CORS" | "ExternalAuth");
    if http_only || rule_only {
        let message = format!("{kind} is not supported here");
        errors.push(at.key("type").error(message));
        return None;
    }
    let plain = match kind {
        "RequestHeaderModifier" => {
            let raw = raw.request_header_modifier.as_deref()?;
            Kind::RequestHeaders(headers(raw, at.key("requestHeaderModifier"), errors))
        }
        "ResponseHeaderModifier" => {
            let raw = raw.response_header_modifier.as_deref()?;
            Kind::ResponseHeaders(headers(raw, at.key("responseHeaderModifier"), errors))
        }
        "RequestMirror" => {
            return mirror(
                raw.request_mirror.as_deref()?,
                at.key("requestMirror"),
                errors,
            );
        }
        "RequestRedirect" => {
            let raw = raw.request_redirect.as_deref()?;
            Kind::Redirect(redirect(raw, place, at.key("requestRedirect"), errors))
        }
        "URLRewrite" => {
            let raw = raw.url_rewrite.as_deref()?;
            let at = at.key("urlRewrite");
            let hostname = raw.hostname.clone().unwrap_or_default();
            check_hostname(&hostname, at.key("hostname"), errors);
            let path = raw.path.as_deref();
            Kind::Rewrite(wire::UrlRewrite {
                hostname,
                path: path.and_then(|raw| path_modifier(raw, place, at.key("path"), errors)),
            })
        }
        "CORS" => Kind::Cors(cors(raw.cors.as_deref()?, at.key("cors"), errors)),
        "ExternalAuth" => {
            let raw = raw.external_auth.as_deref()?;
            return external_auth(raw, at.key("externalAuth"), errors);
        }
        "ExtensionRef" => {
            errors.push(at.key("type").error(
                "ExtensionRef is not supported: waypoints know no resource that defines a filter",
            ));
            return None;
        }
        "" => {
            errors.push(at.key("type").error("is required"));
            return None;
        }
        other => {
            let message = format!("{other:?} is not a filter");
            errors.push(at.key("type").error(message));
            return None;
        }
    };
    Some(Filter::Plain(wire::Filter { kind: Some(plain) }))
}

fn headers(raw: &RawHeaders, at: At<'_>, errors: &mut Vec<FieldError>) -> wire::HeaderModifier {
    let mut list = |raw: &[Map<RawHeader>], key: &'static str| {
        let at = at.key(key);
        if raw.len() > MAX_ENTRIES {
            errors.push(at.error(format!("has more than {MAX_ENTRIES} entries")));
        }
        let mut found = Vec::new();
        for (index, header) in raw.iter().take(MAX_ENTRIES).enumerate() {
            let at = at.index(index);
            if header.name.is_empty() {
                errors.push(at.key("name").error("is required"));
            }
            check_header_name(&header.name, at.key("name"), errors);
            if http::HeaderValue::from_str(&header.value).is_err() {
                errors.push(at.key("value").error("is not the value of a header"));
            }
            found.push(wire::Header {
                name: header.name.clone(),
                value: header.value.clone(),
            });
        }
        found
    };
    let (set, add) = (list(&raw.set, "set"), list(&raw.add, "add"));
    let at = at.key("remove");
    if raw.remove.len() > MAX_ENTRIES {
        errors.push(at.error(format!("has more than {MAX_ENTRIES} entries")));
    }
    for (index, name) in raw.remove.iter().enumerate() {
        check_header_name(name, at.index(index), errors);
    }
    wire::HeaderModifier {
        set,
        add,
        remove: raw.remove.iter().take(MAX_ENTRIES).cloned().collect(),
    }
}

fn mirror(raw: &RawMirror, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<Filter> {
    const MILLION: i64 = 1_000_000;
    let Some(backend) = raw.backend_ref.as_deref() else {
        errors.push(at.key("backendRef").error("is required"));
        return None;
    };
    if backend.weight.is_some() {
        let at = at.key("backendRef");
        errors.push(at.key("weight").error("unknown field"));
    }
    let per_million = match (raw.percent, raw.fraction.as_deref()) {
        (Some(_), Some(_)) => {
            errors.push(at.error("percent and fraction exclude each other"));
            0
        }
        (None, None) => MILLION,
        (Some(percent @ 0..=100), None) => percent * (MILLION / 100),
        (Some(percent), None) => {
            let message = format!("{percent} is not 0 to 100");
            errors.push(at.key("percent").error(message));
            0
        }
        (None, Some(fraction)) => {
            let denominator = fraction.denominator.unwrap_or(100);
            let bounded = i32::try_from(denominator).is_ok();
            if denominator < 1 || !bounded || !(0..=denominator).contains(&fraction.numerator) {
                let message = format!("{}/{denominator} is not 0 to 1", fraction.numerator);
                errors.push(at.key("fraction").error(message));
                0
            } else {
                fraction.numerator * MILLION / denominator
            }
        }
    };
    Some(Filter::Mirror {
        backend: BackendRef::read(backend, at.key("backendRef"), errors),
        per_million: u32::try_from(per_million).unwrap_or_default(),
    })
}

fn redirect(
    raw: &RawRedirect,
    place: Place<'_>,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::Redirect {
    let scheme = raw.scheme.clone().unwrap_or_default();
    if !matches!(scheme.as_str(), "" | "http" | "https") {
        let message = format!("{scheme:?} is not http or https");
        errors.push(at.key("scheme").error(message));
    }
    let hostname = raw.hostname.clone().unwrap_or_default();
    check_hostname(&hostname, at.key("hostname"), errors);
    let status = raw.status_code.unwrap_or(302);
    if !matches!(status, 301 | 302 | 303 | 307 | 308) {
        let message = format!("{status} is not 301, 302, 303, 307 or 308");
        errors.push(at.key("statusCode").error(message));
    }
    let port = raw
        .port
        .and_then(|port| read_port(port, at.key("port"), errors));
    let path = raw.path.as_deref();
    wire::Redirect {
        scheme,
        hostname,
        port: port.map(u32::from).unwrap_or_default(),
        path: path.and_then(|raw| path_modifier(raw, place, at.key("path"), errors)),
        status: u32::try_from(status).unwrap_or_default(),
    }
}

fn path_modifier(
    raw: &RawPath,
    place: Place<'_>,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<wire::PathModifier> {
    use wire::http_match::Path;
    let (value, key) = match raw.r#type.as_str() {
        "ReplaceFullPath" => (&raw.replace_full_path, "replaceFullPath"),
        "ReplacePrefixMatch" => (&raw.replace_prefix_match, "replacePrefixMatch"),
        other => {
            let message = format!("{other:?} is not ReplaceFullPath or ReplacePrefixMatch");
            errors.push(at.key("type").error(message));
            return None;
        }
    };
    if raw.replace_full_path.is_some() && raw.replace_prefix_match.is_some() {
        errors.push(at.error("replaceFullPath and replacePrefixMatch exclude each other"));
    }
    let Some(value) = value.clone() else {
        errors.push(at.key(key).error("is required with this type"));
        return None;
    };
    if key == "replaceFullPath" {
        if value.starts_with('/') {
            check_path(&value, at.key(key), errors);
        }
        return Some(wire::PathModifier {
            kind: Some(path_modifier::Kind::Full(value)),
        });
    }
    // Which prefix it is must be plain (CRD).
    let single = matches!(place.matches, [only] if matches!(only.path, Some(Path::Prefix(_))));
    if !single {
        errors.push(
            at.key("type")
                .error("ReplacePrefixMatch needs exactly one match, with a PathPrefix"),
        );
    }
    Some(wire::PathModifier {
        kind: Some(path_modifier::Kind::Prefix(value)),
    })
}

fn cors(raw: &RawCors, at: At<'_>, errors: &mut Vec<FieldError>) -> wire::Cors {
    for (key, list) in [
        ("allowOrigins", &raw.allow_origins),
        ("allowMethods", &raw.allow_methods),
        ("allowHeaders", &raw.allow_headers),
        ("exposeHeaders", &raw.expose_headers),
    ] {
        let at = at.key(key);
        if list.len() > MAX_ENTRIES {
            errors.push(at.error(format!("has more than {MAX_ENTRIES} entries")));
        }
        if list.len() > 1 && list.iter().any(|entry| entry == "*") {
            errors.push(at.error("\"*\" stands alone"));
        }
    }
    let list = at.key("allowOrigins");
    for (index, origin) in raw.allow_origins.iter().enumerate() {
        let is_origin = origin == "*"
            || origin.split_once("://").is_some_and(|(scheme, host)| {
                !scheme.is_empty() && !host.is_empty() && !host.contains('/')
            });
        if !is_origin {
            let message = format!("{origin:?} is not an origin: scheme://host[:port], or *");
            errors.push(list.index(index).error(message));
        }
    }
    for (key, names) in [
        ("allowHeaders", &raw.allow_headers),
        ("exposeHeaders", &raw.expose_headers),
    ] {
        let list = at.key(key);
        for (index, name) in names.iter().enumerate().filter(|(_, name)| *name != "*") {
            check_header_name(name, list.index(index), errors);
        }
    }
    let max_age = raw.max_age.unwrap_or(CORS_MAX_AGE);
    let max_age = match u32::try_from(max_age) {
        Ok(age) if age > 0 => age,
        _ => {
            errors.push(
                at.key("maxAge")
                    .error(format!("{max_age} is not a number of seconds")),
            );
            0
        }
    };
    wire::Cors {
        allow_origins: raw.allow_origins.clone(),
        allow_credentials: raw.allow_credentials.unwrap_or_default(),
        allow_methods: raw.allow_methods.clone(),
        allow_headers: raw.allow_headers.clone(),
        expose_headers: raw.expose_headers.clone(),
        max_age,
        ..wire::Cors::default()
    }
}

/// A host name without wildcard and port, or nothing.
fn check_hostname(name: &str, at: At<'_>, errors: &mut Vec<FieldError>) {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    if !name.is_empty() && (name.len() > 253 || !name.split('.').all(label)) {
        errors.push(at.error(format!("{name:?} is not a host name")));
    }
}
