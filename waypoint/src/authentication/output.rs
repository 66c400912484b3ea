//! What the endpoint is told of a token: headers that only the waypoint writes.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value};

/// Headers that are written when a token of a rule is accepted, and that nobody else may
/// send.
#[derive(Debug, Default)]
pub(super) struct Output {
    /// `outputPayloadToHeader`.
    pub(super) payload: Option<HeaderName>,
    /// `outputClaimToHeaders`.
    pub(super) claims: Vec<(HeaderName, Box<str>)>,
}

impl Output {
    /// Their names.
    pub(super) fn names(&self) -> impl Iterator<Item = &HeaderName> {
        let claims = self.claims.iter().map(|(name, _)| name);
        self.payload.iter().chain(claims)
    }

    pub(super) fn write(
        &self,
        payload_text: &str,
        payload: &Map<String, Value>,
        headers: &mut HeaderMap,
    ) {
        if let Some(name) = &self.payload
            && let Ok(value) = HeaderValue::from_str(payload_text)
        {
            headers.insert(name, value);
        }
        for (name, claim) in &self.claims {
            // A claim that is no legal header value is left out rather than repaired.
            if let Some(value) = find(payload, claim).and_then(header_value) {
                headers.insert(name, value);
            }
        }
    }
}

/// A claim by its name, or by the names of objects and claim with dots between.
fn find<'a>(payload: &'a Map<String, Value>, claim: &str) -> Option<&'a Value> {
    if let Some(value) = payload.get(claim) {
        return Some(value);
    }
    let mut names = claim.split('.');
    let mut value = payload.get(names.next()?)?;
    for name in names {
        value = value.as_object()?.get(name)?;
    }
    Some(value)
}

/// Text, numbers and truth values as they are; lists and objects as base64url of their JSON
/// (Envoy `claim_to_headers`).
fn header_value(claim: &Value) -> Option<HeaderValue> {
    let text = match claim {
        Value::Null => return None,
        Value::String(text) => return HeaderValue::from_bytes(text.as_bytes()).ok(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::Array(_) | Value::Object(_) => URL_SAFE_NO_PAD.encode(claim.to_string()),
    };
    HeaderValue::from_str(&text).ok()
}
