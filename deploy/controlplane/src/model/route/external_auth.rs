//! The filter ExternalAuth (Gateway API `HTTPExternalAuthFilter`, experimental).

use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::external_auth::Protocol;
use serde::Deserialize;

use super::super::field::{At, FieldError};
use super::super::raw::{Map, nullable};
use super::backend::{BackendRef, RawBackend};
use super::filter::{Filter, MAX_ENTRIES};
use super::matching::{check_header_name, check_path};

/// Most bytes of a path (CRD).
const MAX_PATH: usize = 1024;
/// Most bytes of a body: a waypoint keeps no more of one.
const MAX_BODY: i64 = 16 << 20;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawExternalAuth {
    #[serde(deserialize_with = "nullable")]
    protocol: String,
    backend_ref: Option<Map<RawBackend>>,
    grpc: Option<Map<RawGrpc>>,
    http: Option<Map<RawHttp>>,
    forward_body: Option<Map<RawForwardBody>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawGrpc {
    #[serde(deserialize_with = "nullable")]
    allowed_headers: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawHttp {
    #[serde(deserialize_with = "nullable")]
    path: String,
    #[serde(deserialize_with = "nullable")]
    allowed_headers: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    allowed_response_headers: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawForwardBody {
    max_size: Option<i64>,
}

pub(super) fn external_auth(
    raw: &RawExternalAuth,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<Filter> {
    let protocol = protocol(raw, at, errors);
    let body_max_bytes = body(raw, at.key("forwardBody"), errors);
    let at = at.key("backendRef");
    let Some(reference) = raw.backend_ref.as_deref() else {
        errors.push(at.error("is required"));
        return None;
    };
    if reference.weight.is_some() {
        errors.push(at.key("weight").error("unknown field"));
    }
    Some(Filter::ExternalAuth {
        backend: BackendRef {
            authorizes: true,
            ..BackendRef::read(reference, at, errors)
        },
        auth: wire::ExternalAuth {
            backend: None,
            body_max_bytes,
            protocol: Some(protocol?),
        },
    })
}

/// The protocol with the member of its name, which has to be there, and no other (CRD).
fn protocol(raw: &RawExternalAuth, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<Protocol> {
    let members = [
        ("GRPC", "grpc", raw.grpc.is_some()),
        ("HTTP", "http", raw.http.is_some()),
    ];
    let protocol = raw.protocol.as_str();
    if !members.iter().any(|(of, ..)| *of == protocol) {
        let message = match protocol {
            "" => "is required".to_owned(),
            other => format!("{other:?} is not HTTP or GRPC"),
        };
        errors.push(at.key("protocol").error(message));
        return None;
    }
    // Who writes one in place of the other has made one mistake.
    let other = members.iter().find(|(of, _, is)| *of != protocol && *is);
    let own = members.iter().find(|(of, _, is)| *of == protocol && !*is);
    if let Some((of, key, _)) = other {
        errors.push(at.key(key).error(format!("is for protocol: {of}")));
    } else if let Some((of, key, _)) = own {
        let message = format!("is required with protocol: {of}");
        errors.push(at.key(key).error(message));
    }
    match protocol {
        "GRPC" => {
            let raw = raw.grpc.as_deref()?;
            let at = at.key("grpc");
            let list = at.key("allowedHeaders");
            Some(Protocol::Grpc(wire::ExternalAuthGrpc {
                allowed_headers: names(&raw.allowed_headers, list, errors),
            }))
        }
        _ => {
            let raw = raw.http.as_deref()?;
            let at = at.key("http");
            check_prefix(&raw.path, at.key("path"), errors);
            let list = at.key("allowedHeaders");
            let allowed_headers = names(&raw.allowed_headers, list, errors);
            let list = at.key("allowedResponseHeaders");
            Some(Protocol::Http(wire::ExternalAuthHttp {
                path_prefix: raw.path.clone(),
                allowed_headers,
                allowed_response_headers: names(&raw.allowed_response_headers, list, errors),
            }))
        }
    }
}

/// `http.path`: what may stand before the path of a request.
fn check_prefix(path: &str, at: At<'_>, errors: &mut Vec<FieldError>) {
    if path.is_empty() {
        return;
    }
    if path.len() > MAX_PATH {
        errors.push(at.error(format!("is longer than {MAX_PATH} bytes")));
    }
    if let Some(wrong) = first_outside_of_paths(path) {
        errors.push(at.error(format!("{path:?} is not a path: {wrong:?}")));
        return;
    }
    check_path(path, at, errors);
}

/// The first character that the API does not let stand in a path (CRD).
fn first_outside_of_paths(path: &str) -> Option<char> {
    let bytes = path.as_bytes();
    path.char_indices()
        .find(|(at, of)| match of {
            '%' => {
                let digits = bytes.get(at + 1..at + 3);
                !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            }
            of => !of.is_ascii_alphanumeric() && !"-/._~!$&'()*+,;=:@".contains(*of),
        })
        .map(|(_, of)| of)
}

/// Names of headers. A star could stand in one, but whoever writes it means a pattern.
fn names(raw: &[String], at: At<'_>, errors: &mut Vec<FieldError>) -> Vec<String> {
    if raw.len() > MAX_ENTRIES {
        errors.push(at.error(format!("has more than {MAX_ENTRIES} entries")));
    }
    for (index, name) in raw.iter().take(MAX_ENTRIES).enumerate() {
        let at = at.index(index);
        if name.is_empty() {
            errors.push(at.error("is empty"));
        } else if name.contains('*') {
            let message = format!("{name:?} is a pattern, and this is a list of names");
            errors.push(at.error(message));
        } else {
            check_header_name(name, at, errors);
        }
    }
    raw.iter().take(MAX_ENTRIES).cloned().collect()
}

fn body(raw: &RawExternalAuth, at: At<'_>, errors: &mut Vec<FieldError>) -> u32 {
    let max = raw.forward_body.as_deref().and_then(|raw| raw.max_size);
    let max = max.unwrap_or_default();
    match u32::try_from(max) {
        Ok(bytes) if max <= MAX_BODY => bytes,
        _ => {
            let message = format!("{max} is not 0 to {MAX_BODY} bytes");
            errors.push(at.key("maxSize").error(message));
            0
        }
    }
}
