//! What is known of a request when it is judged, and how its host and its client's address
//! are found.

use std::net::{IpAddr, SocketAddr};

use ::http::header::{HOST, HeaderMap};
use ::http::uri::Authority;

use super::claims::Claims;
use super::normalize::NormalizedPath;
use crate::identity::SpiffeId;

/// What is evaluated: a request, or with [`Self::http`] absent a connection whose bytes
/// are not looked at.
#[derive(Debug, Clone, Copy)]
pub struct HttpRequest<'a> {
    /// Who the caller proved to be, by its certificate; never by a header.
    pub source_identity: Option<&'a SpiffeId>,
    /// The caller's address.
    pub source_ip: IpAddr,
    /// The end user's address; see [`remote_address`].
    pub remote_ip: IpAddr,
    /// The address that the caller dialled, or the endpoint's where the policies of a
    /// workload are asked.
    pub destination_ip: IpAddr,
    /// The port with it.
    pub destination_port: u16,
    /// SNI of a TLS connection that is passed through.
    pub sni: Option<&'a str>,
    /// What HTTP says; `None`: not HTTP.
    pub http: Option<HttpFields<'a>>,
}

/// The HTTP part of a request.
#[derive(Debug, Clone, Copy)]
pub struct HttpFields<'a> {
    /// Method; that of an extended CONNECT (RFC 8441) is presented as GET, so that one
    /// rule holds for both forms of a WebSocket handshake.
    pub method: &'a str,
    /// Path, as it will be sent.
    pub path: &'a NormalizedPath<'a>,
    /// Query without `?`.
    pub query: Option<&'a str>,
    /// `:authority` or Host as it will be sent; see [`request_host`].
    pub host: &'a str,
    /// Headers.
    pub headers: &'a HeaderMap,
    /// The verified token.
    pub claims: Option<&'a Claims>,
}

/// Why a request's host is not known: answered with 400.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostRejected {
    /// RFC 9112 3.2: more than one Host line.
    #[error("more than one Host header")]
    Duplicate,
    /// Not an authority: other bytes, or user information (RFC 9110 4.2.4).
    #[error("the host is not an authority")]
    Malformed,
    /// RFC 9113 8.3.1: `:authority` and Host differ.
    #[error(":authority and Host differ")]
    Different,
}

/// The host of a request, to be judged and sent upstream: the target's authority
/// (absolute-form or `:authority`) before Host (RFC 9112 3.2.2). Empty where neither is
/// there.
///
/// # Errors
/// [`HostRejected`].
pub fn request_host<'a>(
    authority: Option<&'a Authority>,
    headers: &'a HeaderMap,
    http2: bool,
) -> Result<&'a str, HostRejected> {
    let mut lines = headers.get_all(HOST).iter();
    let line = lines.next();
    if lines.next().is_some() {
        return Err(HostRejected::Duplicate);
    }
    let line = match line {
        None => None,
        Some(line) if line.is_empty() => None,
        Some(line) => {
            let text = line.to_str().map_err(|_| HostRejected::Malformed)?;
            Authority::try_from(text).map_err(|_| HostRejected::Malformed)?;
            Some(text)
        }
    };
    let host = match (authority.map(Authority::as_str), line) {
        (Some(authority), Some(line)) if http2 && !authority.eq_ignore_ascii_case(line) => {
            return Err(HostRejected::Different);
        }
        (Some(authority), _) => authority,
        (None, line) => line.unwrap_or_default(),
    };
    // A comma is legal in a name and in none that exists: lines that somebody joined.
    if host.contains(['@', ',']) {
        return Err(HostRejected::Malformed);
    }
    Ok(host)
}

/// The end user's address: with `trusted_proxies` = n > 0 the n-th entry of
/// `x-forwarded-for` from the right, over all its lines, for each trusted proxy appended
/// whom it was called by; what stands further left was written by nobody trusted. With 0,
/// with fewer entries, or where the entry is no address, it is `peer` (Envoy
/// `xff_num_trusted_hops` with `use_remote_address`).
pub fn remote_address(peer: IpAddr, headers: &HeaderMap, trusted_proxies: u32) -> IpAddr {
    let Some(skip) = trusted_proxies.checked_sub(1) else {
        return peer;
    };
    let Ok(skip) = usize::try_from(skip) else {
        return peer;
    };
    let lines = headers.get_all("x-forwarded-for").iter().rev();
    let mut entries = lines.flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b','));
    entries
        .nth(skip)
        .and_then(|entry| std::str::from_utf8(entry).ok())
        .and_then(|entry| address(entry.trim()))
        .unwrap_or(peer)
}

fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
    bare.unwrap_or(text)
        .parse()
        .or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()))
        .ok()
        .map(|address: IpAddr| address.to_canonical())
}

impl HttpRequest<'_> {
    /// The same request with IPv4-mapped addresses as IPv4.
    pub(super) fn canonical(&self) -> Self {
        Self {
            source_ip: self.source_ip.to_canonical(),
            remote_ip: self.remote_ip.to_canonical(),
            destination_ip: self.destination_ip.to_canonical(),
            ..*self
        }
    }
}
