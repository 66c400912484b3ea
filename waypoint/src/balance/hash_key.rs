//! What of a request decides its endpoint under consistent hashing.

use std::net::IpAddr;

use http::{HeaderMap, HeaderValue, Uri, header};
use rand::Rng;
use xxhash_rust::xxh64::{Xxh64, xxh64};

use super::settings::{HashCookie, HashKey};

/// The hash of a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hashed {
    /// `None`: the request has not got what is hashed, and goes anywhere.
    pub hash: Option<u64>,
    /// A `Set-Cookie` for the response, with which the client will come back here.
    pub set_cookie: Option<HeaderValue>,
}

impl HashKey {
    /// Hashes the request's part that counts. `source` is the client's address.
    pub fn hash<R: Rng + ?Sized>(
        &self,
        headers: &HeaderMap,
        uri: &Uri,
        source: IpAddr,
        rng: &mut R,
    ) -> Hashed {
        let hash = match self {
            Self::Header(name) => {
                let mut values = headers.get_all(name).iter();
                match (values.next(), values.next()) {
                    (None, _) => None,
                    (Some(only), None) => Some(xxh64(only.as_bytes(), 0)),
                    // Several count in any order (Envoy sorts them too).
                    _ => Some(hash_values(headers.get_all(name).iter())),
                }
            }
            Self::Cookie(cookie) => return cookie.hash(headers, rng),
            Self::SourceIp => Some(match source.to_canonical() {
                IpAddr::V4(address) => xxh64(&address.octets(), 0),
                IpAddr::V6(address) => xxh64(&address.octets(), 0),
            }),
            Self::QueryParameter(name) => {
                let value = query_parameter(uri.query().unwrap_or(""), name);
                value.map(|value| xxh64(value.as_bytes(), 0))
            }
        };
        Hashed {
            hash,
            set_cookie: None,
        }
    }
}

impl HashCookie {
    fn hash<R: Rng + ?Sized>(&self, headers: &HeaderMap, rng: &mut R) -> Hashed {
        if let Some(value) = cookie(headers, &self.name) {
            return Hashed {
                hash: Some(xxh64(value, 0)),
                set_cookie: None,
            };
        }
        let Some(ttl) = self.ttl else {
            return Hashed::default();
        };
        let value = format!("{:016x}", rng.next_u64());
        let mut text = format!("{}=\"{value}\"", self.name);
        if !ttl.is_zero() {
            text += &format!("; Max-Age={}", ttl.as_secs().max(1));
        }
        if !self.path.is_empty() {
            text += &format!("; Path={}", self.path);
        }
        text += "; HttpOnly";
        Hashed {
            hash: Some(xxh64(value.as_bytes(), 0)),
            set_cookie: HeaderValue::from_str(&text).ok(),
        }
    }
}

/// The value of the first cookie of that name, without its quotes.
fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    let fields = headers.get_all(header::COOKIE).iter();
    let mut pairs = fields.flat_map(|field| field.as_bytes().split(|byte| *byte == b';'));
    pairs.find_map(|pair| {
        let pair = pair.trim_ascii();
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        if pair[..equals].trim_ascii_end() != name.as_bytes() {
            return None;
        }
        let value = pair[equals + 1..].trim_ascii_start();
        let quoted = value.strip_prefix(b"\"");
        Some(
            quoted
                .and_then(|value| value.strip_suffix(b"\""))
                .unwrap_or(value),
        )
    })
}

fn query_parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

fn hash_values<'a>(values: impl Iterator<Item = &'a HeaderValue>) -> u64 {
    let mut values: Vec<&[u8]> = values.map(HeaderValue::as_bytes).collect();
    values.sort_unstable();
    let mut hasher = Xxh64::new(0);
    for value in values {
        hasher.update(value);
        // Lest "ab", "c" be "a", "bc"; no header value contains it.
        hasher.update(b"\0");
    }
    hasher.digest()
}
