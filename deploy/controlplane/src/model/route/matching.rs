//! What requests a rule is for.

use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::http_match::Path;
use adit_shared::proto::waypoint::string_match;
use serde::Deserialize;

use super::super::field::{At, FieldError};
use super::super::raw::{Map, nullable};

/// Most matches of a rule (CRD).
pub(super) const MAX_MATCHES: usize = 64;
/// Most headers or query parameters of a match (CRD).
const MAX_NAMES: usize = 16;
/// Longest path of a match (CRD).
const MAX_PATH: usize = 1024;
/// Longest value (CRD: 4096 for headers, 1024 for query parameters).
const MAX_VALUE: usize = 4096;
/// Headers that name a claim of the request's JWT (Istio, JWT claim based routing).
const CLAIMS: &str = "@request.auth.claims";

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawHttpMatch {
    path: Option<Map<RawValue>>,
    #[serde(deserialize_with = "nullable")]
    headers: Vec<Map<RawName>>,
    #[serde(deserialize_with = "nullable")]
    query_params: Vec<Map<RawName>>,
    method: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawGrpcMatch {
    method: Option<Map<RawMethod>>,
    #[serde(deserialize_with = "nullable")]
    headers: Vec<Map<RawName>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawValue {
    r#type: Option<String>,
    value: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawName {
    r#type: Option<String>,
    #[serde(deserialize_with = "nullable")]
    name: String,
    #[serde(deserialize_with = "nullable")]
    value: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawMethod {
    r#type: Option<String>,
    service: Option<String>,
    method: Option<String>,
}

/// The match of a rule that lists none.
pub(super) fn everything() -> wire::HttpMatch {
    wire::HttpMatch {
        path: Some(Path::Prefix("/".into())),
        ..wire::HttpMatch::default()
    }
}

pub(super) fn http(
    raw: &RawHttpMatch,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::HttpMatch {
    let path = match &raw.path {
        Some(raw) => path(raw, at.key("path"), errors),
        None => Path::Prefix("/".into()),
    };
    let method = raw.method.as_deref().unwrap_or_default();
    let known = [
        "", "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
    ];
    if !known.contains(&method) {
        let message = format!("{method:?} is not a method: {}", known[1..].join(", "));
        errors.push(at.key("method").error(message));
    }
    let (headers, claims) = headers(&raw.headers, at.key("headers"), errors);
    wire::HttpMatch {
        path: Some(path),
        headers,
        query_params: query_params(&raw.query_params, at.key("queryParams"), errors),
        method: method.into(),
        claims,
    }
}

pub(super) fn grpc(
    raw: &RawGrpcMatch,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::GrpcMatch {
    let mut found = wire::GrpcMatch::default();
    if let Some(method) = &raw.method {
        let at = at.key("method");
        found.regex = is_regex(method.r#type.as_deref(), at, errors);
        found.service = method.service.clone().unwrap_or_default();
        found.method = method.method.clone().unwrap_or_default();
        if found.service.is_empty() && found.method.is_empty() {
            errors.push(at.error("service or method is required"));
        }
        for (key, value) in [("service", &found.service), ("method", &found.method)] {
            check_value(value, at.key(key), errors);
            if found.regex {
                check_regex(value, at.key(key), errors);
            } else if value.contains('/') {
                errors.push(at.key(key).error("must not contain '/'"));
            }
        }
    }
    let list = at.key("headers");
    let (headers, claims) = headers(&raw.headers, list, errors);
    if !claims.is_empty() {
        errors.push(list.error("claims route HTTP only"));
    }
    found.headers = headers;
    found
}

fn path(raw: &RawValue, at: At<'_>, errors: &mut Vec<FieldError>) -> Path {
    let value = raw.value.clone().unwrap_or_else(|| "/".into());
    if value.len() > MAX_PATH {
        let message = format!("is longer than {MAX_PATH} bytes");
        errors.push(at.key("value").error(message));
    }
    match raw.r#type.as_deref() {
        None | Some("" | "PathPrefix") => {
            check_path(&value, at.key("value"), errors);
            Path::Prefix(value)
        }
        Some("Exact") => {
            check_path(&value, at.key("value"), errors);
            Path::Exact(value)
        }
        Some("RegularExpression") => {
            check_regex(&value, at.key("value"), errors);
            Path::PathRegex(value)
        }
        Some(other) => {
            let message = format!("{other:?} is not Exact, PathPrefix or RegularExpression");
            errors.push(at.key("type").error(message));
            Path::Prefix(value)
        }
    }
}

/// What a normalized path never looks like would never match (CRD).
pub(super) fn check_path(value: &str, at: At<'_>, errors: &mut Vec<FieldError>) {
    if !value.starts_with('/') {
        errors.push(at.error(format!("{value:?} does not start with '/'")));
    }
    let never = ["//", "/./", "/../", "%2f", "%2F", "#"];
    let ends = ["/..", "/."];
    let found = never.iter().find(|text| value.contains(**text));
    let found = found.or_else(|| ends.iter().find(|text| value.ends_with(**text)));
    if let Some(found) = found {
        errors.push(at.error(format!("must not contain {found:?}")));
    }
}

fn headers(
    raw: &[Map<RawName>],
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> (Vec<wire::NameMatch>, Vec<wire::NameMatch>) {
    let (mut headers, mut claims) = (Vec::new(), Vec::<wire::NameMatch>::new());
    for found in names(raw, at, errors) {
        match found.name.strip_prefix(CLAIMS) {
            Some(path) if path.starts_with(['.', '[']) => claims.push(wire::NameMatch {
                name: path.strip_prefix('.').unwrap_or(path).into(),
                ..found
            }),
            _ => headers.push(wire::NameMatch {
                name: found.name.to_ascii_lowercase(),
                ..found
            }),
        }
    }
    // Of equal names the first counts.
    dedup(&mut headers);
    for (index, header) in raw.iter().enumerate() {
        if !header.name.starts_with(CLAIMS) {
            let at = at.index(index);
            check_header_name(&header.name, at.key("name"), errors);
        }
    }
    (headers, claims)
}

fn query_params(
    raw: &[Map<RawName>],
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Vec<wire::NameMatch> {
    let mut found = names(raw, at, errors);
    dedup(&mut found);
    found
}

fn dedup(names: &mut Vec<wire::NameMatch>) {
    let mut seen = std::collections::HashSet::new();
    names.retain(|found| seen.insert(found.name.clone()));
}

fn names(raw: &[Map<RawName>], at: At<'_>, errors: &mut Vec<FieldError>) -> Vec<wire::NameMatch> {
    if raw.len() > MAX_NAMES {
        errors.push(at.error(format!("has more than {MAX_NAMES} entries")));
    }
    let mut found = Vec::new();
    for (index, raw) in raw.iter().take(MAX_NAMES).enumerate() {
        let at = at.index(index);
        if raw.name.is_empty() {
            errors.push(at.key("name").error("is required"));
        }
        check_value(&raw.value, at.key("value"), errors);
        let kind = if is_regex(raw.r#type.as_deref(), at, errors) {
            check_regex(&raw.value, at.key("value"), errors);
            string_match::Kind::Regex(raw.value.clone())
        } else {
            string_match::Kind::Exact(raw.value.clone())
        };
        found.push(wire::NameMatch {
            name: raw.name.clone(),
            value: Some(wire::StringMatch { kind: Some(kind) }),
            invert: false,
        });
    }
    found
}

fn is_regex(kind: Option<&str>, at: At<'_>, errors: &mut Vec<FieldError>) -> bool {
    match kind {
        None | Some("" | "Exact") => false,
        Some("RegularExpression") => true,
        Some(other) => {
            let message = format!("{other:?} is not Exact or RegularExpression");
            errors.push(at.key("type").error(message));
            false
        }
    }
}

fn check_value(value: &str, at: At<'_>, errors: &mut Vec<FieldError>) {
    if value.len() > MAX_VALUE {
        errors.push(at.error(format!("is longer than {MAX_VALUE} bytes")));
    }
}

/// A waypoint reads the same syntax: RE2's.
fn check_regex(value: &str, at: At<'_>, errors: &mut Vec<FieldError>) {
    // One that is too long has been reported, and costs time to compile.
    if value.len() > MAX_VALUE {
        return;
    }
    if let Err(error) = regex::Regex::new(value) {
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default();
        errors.push(at.error(format!("{value:?} is not a regular expression: {reason}")));
    }
}

pub(super) fn check_header_name(name: &str, at: At<'_>, errors: &mut Vec<FieldError>) {
    if !name.is_empty() && http::HeaderName::from_bytes(name.as_bytes()).is_err() {
        errors.push(at.error(format!("{name:?} is not the name of a header")));
    }
}
