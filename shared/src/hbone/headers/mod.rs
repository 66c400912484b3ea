//! What a CONNECT request and its response say, in the exact forms that Istio's ztunnel writes.
//!
//! Only `:authority` decides anything, so only a bad `:authority` fails a request. The other
//! headers inform (telemetry, tracing): a bad one is dropped, named, and the request goes on.
//! Everything is bounded and nothing here can panic.

mod authority;
mod baggage;
mod forwarded;
mod traceparent;

pub use authority::{Authority, AuthorityError, Hostname, HostnameError};
pub use baggage::{Baggage, BaggageError, BaggageFields};
pub use forwarded::{Forwarded, ForwardedError};
pub use traceparent::{Traceparent, TraceparentError};

use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Uri};

/// Name of the header that describes a workload (W3C Baggage).
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// Name of the trace header (W3C Trace Context).
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Name of the header in which a proxy says why it refused (RFC 9209).
pub(super) const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// The header by which a refusal names its `error`, an error type of RFC 9209 2.3.
pub(super) fn proxy_status(error: &'static str) -> Option<HeaderValue> {
    let token = error.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    if error.is_empty() || !token {
        return None;
    }
    HeaderValue::from_maybe_shared(bytes::Bytes::from(format!("adit; error={error}"))).ok()
}

/// The error type that a `proxy-status` header names.
pub(super) fn proxy_status_error(value: &HeaderValue) -> Option<Box<str>> {
    const LEN: usize = 64;
    let (_, rest) = value.to_str().ok()?.split_once("error=")?;
    let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_');
    let error = &rest[..end.unwrap_or(rest.len())];
    (1..=LEN).contains(&error.len()).then(|| error.into())
}

/// Why a header was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The request has no `:authority`.
    #[error(":authority is missing")]
    AuthorityMissing,
    /// The `:authority` is not an address or host with a port.
    #[error(":authority: {0}")]
    Authority(#[from] AuthorityError),
    /// `baggage` is malformed.
    #[error("baggage: {0}")]
    Baggage(#[from] BaggageError),
    /// `forwarded` is malformed.
    #[error("forwarded: {0}")]
    Forwarded(#[from] ForwardedError),
    /// `traceparent` is malformed.
    #[error("traceparent: {0}")]
    Traceparent(#[from] TraceparentError),
    /// The header stands there more than once.
    #[error("{0}: more than one")]
    Repeated(HeaderName),
}

/// A request to carry one app connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Where the app connection goes.
    pub authority: Authority,
    /// Where it comes from, and which service the app addressed.
    pub forwarded: Option<Forwarded>,
    /// The source workload.
    pub baggage: Option<Baggage>,
    /// The trace it belongs to.
    pub traceparent: Option<Traceparent>,
}

impl ConnectRequest {
    /// A request with nothing but its destination.
    pub fn new(authority: impl Into<Authority>) -> Self {
        Self {
            authority: authority.into(),
            forwarded: None,
            baggage: None,
            traceparent: None,
        }
    }

    /// The request in the form that goes on the wire.
    pub(super) fn to_http(&self) -> Result<Request<()>, http::Error> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        let mut target = http::uri::Parts::default();
        target.authority = Some(self.authority.to_http()?);
        *request.uri_mut() = Uri::from_parts(target)?;
        let headers = request.headers_mut();
        if let Some(baggage) = &self.baggage {
            headers.insert(BAGGAGE, baggage.header().clone());
        }
        if let Some(forwarded) = &self.forwarded {
            headers.insert(FORWARDED, forwarded.to_header());
        }
        if let Some(traceparent) = &self.traceparent {
            headers.insert(TRACEPARENT, traceparent.to_header());
        }
        Ok(request)
    }

    /// Reads a request. `known` is the baggage that the same peer sent last: a peer repeats
    /// itself, and parsing it once saves its strings.
    ///
    /// Returns the request and what was wrong with headers that only inform.
    ///
    /// # Errors
    /// When the `:authority` is missing or malformed.
    pub(super) fn from_http(
        uri: &Uri,
        headers: &HeaderMap,
        known: Option<&Baggage>,
    ) -> Result<(Self, Vec<HeaderError>), HeaderError> {
        let authority = uri.authority().ok_or(HeaderError::AuthorityMissing)?;
        let authority = authority.as_str().parse::<Authority>()?;
        let mut ignored = Vec::new();
        let request = Self {
            authority,
            forwarded: informative(Forwarded::from_headers(headers), &mut ignored),
            baggage: informative(Baggage::from_headers(headers, known), &mut ignored),
            traceparent: informative(Traceparent::from_headers(headers), &mut ignored),
        };
        Ok((request, ignored))
    }
}

/// A header that decides nothing: an error is noted, and the header is as if it were absent.
fn informative<T>(
    parsed: Result<Option<T>, HeaderError>,
    ignored: &mut Vec<HeaderError>,
) -> Option<T> {
    parsed.unwrap_or_else(|error| {
        ignored.push(error);
        None
    })
}

/// The one value of a header that must not be repeated.
fn single<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h [u8]>, HeaderError> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    if values.next().is_some() {
        return Err(HeaderError::Repeated(name.clone()));
    }
    Ok(first.map(|value| value.as_bytes()))
}

/// The start of a peer's text, for an error message.
fn excerpt(text: &[u8]) -> String {
    const LEN: usize = 64;
    let mut excerpt = text[..text.len().min(LEN)].escape_ascii().to_string();
    if text.len() > LEN {
        excerpt.push_str("...");
    }
    excerpt
}

#[cfg(test)]
mod tests;
