//! Timeouts, retries, session persistence.

use std::time::Duration;

use adit_shared::proto::waypoint as wire;
use serde::Deserialize;

use super::super::field::{At, FieldError};
use super::super::raw::{Map, nullable};

/// Tries beyond the first that a rule may ask for: more is a storm, not a retry.
const MAX_ATTEMPTS: i64 = 100;
/// Most status codes of a retry.
const MAX_CODES: usize = 64;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawTimeouts {
    request: Option<String>,
    backend_request: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawRetry {
    #[serde(deserialize_with = "nullable")]
    codes: Vec<i64>,
    attempts: Option<i64>,
    backoff: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawSession {
    r#type: Option<String>,
    absolute_timeout: Option<String>,
    idle_timeout: Option<String>,
    cookie: Option<Map<RawCookie>>,
    header: Option<Map<RawHeader>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawCookie {
    name: Option<String>,
    path: Option<String>,
    lifetime_type: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawHeader {
    #[serde(deserialize_with = "nullable")]
    name: String,
}

/// The timeouts of a rule: of the request, and of each try.
pub(super) fn timeouts(
    raw: &RawTimeouts,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> (Option<prost_types::Duration>, Option<prost_types::Duration>) {
    let mut read = |text: Option<&String>, key: &'static str| {
        text.and_then(|text| duration(text, at.key(key), errors))
    };
    let request = read(raw.request.as_ref(), "request");
    let backend = read(raw.backend_request.as_ref(), "backendRequest");
    if let (Some(request), Some(backend)) = (request, backend)
        && !request.is_zero()
        && backend > request
    {
        errors.push(
            at.key("backendRequest")
                .error("must not be longer than request"),
        );
    }
    (request.map(to_wire), backend.map(to_wire))
}

pub(super) fn retry(raw: &RawRetry, at: At<'_>, errors: &mut Vec<FieldError>) -> wire::Retry {
    let list = at.key("codes");
    if raw.codes.len() > MAX_CODES {
        errors.push(list.error(format!("has more than {MAX_CODES} entries")));
    }
    let mut codes = Vec::new();
    for (index, code) in raw.codes.iter().take(MAX_CODES).enumerate() {
        match u32::try_from(*code) {
            Ok(code @ 400..=599) => codes.push(code),
            _ => {
                let message = format!("{code} is not 400 to 599");
                errors.push(list.index(index).error(message));
            }
        }
    }
    let attempts = raw.attempts.unwrap_or(1);
    if !(0..=MAX_ATTEMPTS).contains(&attempts) {
        let message = format!("{attempts} is not 0 to {MAX_ATTEMPTS}");
        errors.push(at.key("attempts").error(message));
    }
    let backoff = raw.backoff.as_ref();
    wire::Retry {
        attempts: u32::try_from(attempts).unwrap_or_default(),
        codes,
        backoff: backoff
            .and_then(|text| duration(text, at.key("backoff"), errors))
            .map(to_wire),
        ..wire::Retry::default()
    }
}

/// A cookie without a name is given one when it is known whose it is.
pub(super) fn session(
    raw: &RawSession,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> wire::SessionPersistence {
    use wire::session_persistence::Type;
    let mut read = |text: Option<&String>, key: &'static str| {
        text.and_then(|text| duration(text, at.key(key), errors))
            .map(to_wire)
    };
    let mut found = wire::SessionPersistence {
        absolute_timeout: read(raw.absolute_timeout.as_ref(), "absoluteTimeout"),
        idle_timeout: read(raw.idle_timeout.as_ref(), "idleTimeout"),
        ..wire::SessionPersistence::default()
    };
    match raw.r#type.as_deref() {
        None | Some("" | "Cookie") => {
            found.set_type(Type::Cookie);
            if raw.header.is_some() {
                errors.push(at.key("header").error("is for type: Header"));
            }
            let at = at.key("cookie");
            let cookie = raw.cookie.as_deref();
            let name = cookie.and_then(|cookie| cookie.name.clone());
            found.name = name.unwrap_or_default();
            let path = cookie.and_then(|cookie| cookie.path.as_deref());
            match path {
                None | Some("") => {}
                Some(path) if is_cookie_path(path) => path.clone_into(&mut found.path),
                Some(path) => {
                    let message = format!("{path:?} is no path of a cookie");
                    errors.push(at.key("path").error(message));
                }
            }
            match cookie.and_then(|cookie| cookie.lifetime_type.as_deref()) {
                None | Some("" | "Session") => found.session_cookie = true,
                Some("Permanent") if found.absolute_timeout.is_some() => {}
                Some("Permanent") => errors.push(
                    at.key("lifetimeType")
                        .error("Permanent needs absoluteTimeout"),
                ),
                Some(other) => {
                    let message = format!("{other:?} is not Session or Permanent");
                    errors.push(at.key("lifetimeType").error(message));
                }
            }
        }
        Some("Header") => {
            found.set_type(Type::Header);
            if raw.cookie.is_some() {
                errors.push(at.key("cookie").error("is for type: Cookie"));
            }
            let header = raw.header.as_deref();
            found.name = header.map(|header| header.name.clone()).unwrap_or_default();
            let at = at.key("header");
            if found.name.is_empty() {
                errors.push(at.key("name").error("is required"));
            }
            super::matching::check_header_name(&found.name, at.key("name"), errors);
        }
        Some(other) => {
            let message = format!("{other:?} is not Cookie or Header");
            errors.push(at.key("type").error(message));
        }
    }
    found
}

/// RFC 6265 4.1.1 and 5.2.4: absolute, and nothing that would end it early.
fn is_cookie_path(path: &str) -> bool {
    let legal = |b: u8| (b' '..=b'~').contains(&b) && b != b';';
    path.starts_with('/') && path.len() <= 1024 && path.bytes().all(legal)
}

fn to_wire(duration: Duration) -> prost_types::Duration {
    // At most four times 99999 hours: far below the limit.
    prost_types::Duration::try_from(duration).unwrap_or_default()
}

fn duration(text: &str, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<Duration> {
    let found = gep_2257(text);
    if found.is_none() {
        let message = format!("{text:?} is not a duration such as 1h, 1m30s, 500ms or 0s");
        errors.push(at.error(message));
    }
    found
}

/// A duration as Gateway API writes it (GEP-2257): up to four numbers of up to five
/// digits, each with its unit.
fn gep_2257(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    for _ in 0..4 {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        if !(1..=5).contains(&digits) {
            return None;
        }
        let number: u32 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let (unit, length) = if rest.starts_with("ms") {
            (Duration::from_millis(1), 2)
        } else if rest.starts_with('h') {
            (Duration::from_secs(3600), 1)
        } else if rest.starts_with('m') {
            (Duration::from_secs(60), 1)
        } else if rest.starts_with('s') {
            (Duration::from_secs(1), 1)
        } else {
            return None;
        };
        rest = &rest[length..];
        total += unit * number;
        if rest.is_empty() {
            return Some(total);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gateway_apis() {
        for (text, millis) in [
            ("0s", Some(0)),
            ("10s", Some(10_000)),
            ("1h", Some(3_600_000)),
            ("1m30s", Some(90_000)),
            ("1h2m3s4ms", Some(3_723_004)),
            ("500ms", Some(500)),
            ("99999h", Some(99_999 * 3_600_000)),
            ("", None),
            ("1", None),
            ("s", None),
            ("1.5s", None),
            ("-1s", None),
            ("100000s", None),
            ("1s1s1s1s1s", None),
            ("1d", None),
            ("1 s", None),
            ("1µs", None),
        ] {
            assert_eq!(gep_2257(text), millis.map(Duration::from_millis), "{text}");
        }
    }
}
