//! One token: its parts (RFC 7519, compact form), signature and lifetime.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::Reason;
use super::keys::{Algorithm, KeySet, Verdict};

/// Longer ones are refused before anything is decoded; half of what all headers may have.
pub(super) const MAX_TOKEN: usize = 32 * 1024;
/// How far the clocks of issuer and waypoint may be apart, as in Envoy.
const LEEWAY_SECONDS: f64 = 60.0;

/// A token that was taken apart, of which nothing has been checked.
#[derive(Debug)]
pub(super) struct Token<'a> {
    signed: &'a [u8],
    signature: Vec<u8>,
    algorithm: Algorithm,
    key_id: Option<String>,
    /// As it stands in the token, base64url without padding.
    pub(super) payload_text: &'a str,
    pub(super) payload: Map<String, Value>,
    pub(super) lifetime: Lifetime,
}

/// `nbf` and `exp`, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Lifetime {
    not_before: Option<f64>,
    expires: Option<f64>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

impl<'a> Token<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, Reason> {
        if text.len() > MAX_TOKEN {
            return Err(Reason::Malformed);
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(Reason::Malformed)?;
        let (header, payload_text) = signed.split_once('.').ok_or(Reason::Malformed)?;
        if payload_text.contains('.') {
            return Err(Reason::Malformed);
        }
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| Reason::Malformed);
        let header: Header =
            serde_json::from_slice(&decode(header)?).map_err(|_| Reason::Malformed)?;
        // RFC 7515 4.1.11: an extension that must be understood, and none is.
        if header.crit.is_some() {
            return Err(Reason::Malformed);
        }
        let algorithm = Algorithm::parse(&header.alg).ok_or(Reason::Algorithm)?;
        let payload: Map<String, Value> =
            serde_json::from_slice(&decode(payload_text)?).map_err(|_| Reason::Malformed)?;
        let lifetime = Lifetime::of(&payload)?;
        Ok(Self {
            signed: signed.as_bytes(),
            signature: decode(signature)?,
            algorithm,
            key_id: header.kid.filter(|id| !id.is_empty()),
            payload_text,
            payload,
            lifetime,
        })
    }

    pub(super) fn issuer(&self) -> Option<&str> {
        self.payload.get("iss")?.as_str()
    }

    pub(super) fn has_audience(&self, wanted: &[Box<str>]) -> bool {
        // As Envoy: a trailing slash does not make another audience.
        let known = |text: &str| {
            let text = text.trim_end_matches('/');
            wanted.iter().any(|own| own.trim_end_matches('/') == text)
        };
        match self.payload.get("aud") {
            Some(Value::String(one)) => known(one),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(known),
            _ => false,
        }
    }

    pub(super) fn verify(&self, keys: &KeySet) -> Verdict {
        let id = self.key_id.as_deref();
        keys.verify(id, self.algorithm, self.signed, &self.signature)
    }
}

impl Lifetime {
    fn of(payload: &Map<String, Value>) -> Result<Self, Reason> {
        let time = |name| match payload.get(name) {
            None => Ok(None),
            // RFC 7519 2: a NumericDate, with or without a fraction.
            Some(value) => value.as_f64().map(Some).ok_or(Reason::Malformed),
        };
        Ok(Self {
            not_before: time("nbf")?,
            expires: time("exp")?,
        })
    }

    /// `now` in seconds since 1970.
    pub(super) fn check(&self, now: f64) -> Result<(), Reason> {
        if self
            .not_before
            .is_some_and(|start| now + LEEWAY_SECONDS < start)
        {
            return Err(Reason::NotYetValid);
        }
        if self.expires.is_some_and(|end| now > end + LEEWAY_SECONDS) {
            return Err(Reason::Expired);
        }
        Ok(())
    }
}
