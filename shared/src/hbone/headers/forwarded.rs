//! `forwarded`: `for="<source address>";host=<service host name>` (RFC 7239, one element), and
//! from a waypoint `principal="<SPIFFE id>"`, an extension (RFC 7239 5.5): who the source is.

use std::net::SocketAddr;

use http::HeaderValue;
use http::header::{FORWARDED, HeaderMap};

use super::authority::{Hostname, HostnameError};
use super::{HeaderError, excerpt, single};
use crate::identity::{SpiffeId, SpiffeIdError};

/// Two addresses, a host name and a few parameters that we do not use.
const MAX_BYTES: usize = 1024;

/// Where an app connection comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    /// `for`: the client's address.
    pub source: SocketAddr,
    /// `host`: the service that the client addressed, if it addressed one.
    pub host: Option<Hostname>,
    /// `principal`: who a waypoint speaks for.
    pub principal: Option<SpiffeId>,
}

/// Why a `forwarded` header is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardedError {
    /// Longer than 1024 bytes.
    #[error("more than {MAX_BYTES} bytes")]
    TooLong,
    /// Several elements: the request passed further proxies, which HBONE does not do.
    #[error("more than one element")]
    Elements,
    /// A parameter is not `token=value`.
    #[error("malformed parameter in \"{0}\"")]
    Parameter(String),
    /// A parameter stands there twice.
    #[error("{0} stands there twice")]
    Repeated(&'static str),
    /// There is no `for`.
    #[error("no \"for\" in \"{0}\"")]
    NoSource(String),
    /// `for` is not an address with a port.
    #[error("\"{0}\" is not an address with a port")]
    Source(String),
    /// `host` is no host name.
    #[error("host: {0}")]
    Host(#[from] HostnameError),
    /// `principal` is no SPIFFE id.
    #[error("principal: {0}")]
    Principal(#[from] SpiffeIdError),
}

impl Forwarded {
    /// The header value.
    pub(super) fn to_header(&self) -> HeaderValue {
        let Self {
            source,
            host,
            principal,
        } = self;
        let mut text = format!("for=\"{source}\"");
        if let Some(host) = host {
            text.push_str(";host=");
            text.push_str(host.as_str());
        }
        if let Some(principal) = principal {
            text.push_str(&format!(";principal=\"{principal}\""));
        }
        HeaderValue::from_maybe_shared(bytes::Bytes::from(text))
            // An address, a host name and a SPIFFE id are printable ASCII.
            .unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    pub(super) fn from_headers(headers: &HeaderMap) -> Result<Option<Self>, HeaderError> {
        let Some(value) = single(headers, &FORWARDED)? else {
            return Ok(None);
        };
        Ok(Some(Self::parse(value)?))
    }

    /// Reads the value of a `forwarded` header. Parameters other than these are
    /// checked for form and skipped.
    ///
    /// # Errors
    /// When it is not one element of RFC 7239 with a `for` that has a port.
    pub fn parse(header: &[u8]) -> Result<Self, ForwardedError> {
        if header.len() > MAX_BYTES {
            return Err(ForwardedError::TooLong);
        }
        let malformed = || ForwardedError::Parameter(excerpt(header));
        let (mut source, mut host, mut principal) = (None, None, None);
        let mut rest = header.trim_ascii();
        while !rest.is_empty() {
            let equals = rest.iter().position(|b| *b == b'=').ok_or_else(malformed)?;
            let name = rest[..equals].trim_ascii();
            if name.is_empty() || !name.iter().all(|b| is_token(*b)) {
                return Err(malformed());
            }
            let (value, tail) = parse_value(&rest[equals + 1..]).ok_or_else(malformed)?;
            if name.eq_ignore_ascii_case(b"for") {
                if source.is_some() {
                    return Err(ForwardedError::Repeated("for"));
                }
                let address = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                let address = address.ok_or_else(|| ForwardedError::Source(excerpt(value)))?;
                source = Some(address);
            } else if name.eq_ignore_ascii_case(b"host") {
                if host.is_some() {
                    return Err(ForwardedError::Repeated("host"));
                }
                let text = std::str::from_utf8(value).map_err(|_| malformed())?;
                host = Some(text.parse()?);
            } else if name.eq_ignore_ascii_case(b"principal") {
                if principal.is_some() {
                    return Err(ForwardedError::Repeated("principal"));
                }
                let text = std::str::from_utf8(value).map_err(|_| malformed())?;
                principal = Some(text.parse()?);
            }
            rest = match tail.split_first() {
                None => tail,
                Some((b';', tail)) => tail.trim_ascii_start(),
                Some((b',', _)) => return Err(ForwardedError::Elements),
                Some(_) => return Err(malformed()),
            };
        }
        Ok(Self {
            source: source.ok_or_else(|| ForwardedError::NoSource(excerpt(header)))?,
            host,
            principal,
        })
    }
}

/// A value, quoted or not, and what follows it. Nothing that we read needs a backslash, so a
/// quoted pair counts as malformed. A bare IPv4 address with a port is read too, though RFC 7239
/// wants it quoted.
fn parse_value(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = text.trim_ascii_start();
    if let Some(quoted) = text.strip_prefix(b"\"") {
        let end = quoted.iter().position(|b| *b == b'"')?;
        let legal = |b: &u8| matches!(*b, b' '..=b'~') && *b != b'\\';
        let value = &quoted[..end];
        return value
            .iter()
            .all(legal)
            .then(|| (value, quoted[end + 1..].trim_ascii_start()));
    }
    let end = text
        .iter()
        .position(|b| !is_token(*b) && *b != b':')
        .unwrap_or(text.len());
    (end > 0).then(|| (&text[..end], text[end..].trim_ascii_start()))
}

/// RFC 9110 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
