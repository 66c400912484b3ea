//! `:authority` of a CONNECT: `10.0.0.5:8080`, `[fd00::5]:8080` or `host:80`
//! (RFC 9113 8.5: host and port, both required).

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use super::excerpt;

/// Where an app connection goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address. IPv4-mapped IPv6 addresses are IPv4 here, so that comparing is safe.
    Address(SocketAddr),
    /// A service's host name, as gateways between networks use it.
    Host {
        /// The name.
        name: Hostname,
        /// The service's port, not 0.
        port: u16,
    },
}

/// Why an authority is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// Longer than any host name with a port.
    #[error("{0} bytes long, more than 261")]
    TooLong(usize),
    /// There is no port.
    #[error("no port in \"{0}\"")]
    NoPort(String),
    /// The port is not a number from 1 to 65535.
    #[error("illegal port in \"{0}\"")]
    Port(String),
    /// There are brackets, but no IPv6 address in them.
    #[error("illegal IPv6 address in \"{0}\"")]
    Ipv6(String),
    /// The host is neither an address nor a name.
    #[error(transparent)]
    Host(#[from] HostnameError),
}

impl Authority {
    /// 253 bytes of name, a colon, a port, and room for brackets.
    const MAX_LEN: usize = 261;

    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }

    pub(super) fn to_http(&self) -> Result<http::uri::Authority, http::uri::InvalidUri> {
        http::uri::Authority::from_maybe_shared(bytes::Bytes::from(self.to_string()))
    }
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Self {
        Self::Address(SocketAddr::new(address.ip().to_canonical(), address.port()))
    }
}

impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Self, AuthorityError> {
        if text.len() > Self::MAX_LEN {
            return Err(AuthorityError::TooLong(text.len()));
        }
        let quoted = || excerpt(text.as_bytes());
        if let Some(rest) = text.strip_prefix('[') {
            let (ip, port) = rest
                .split_once(']')
                .ok_or_else(|| AuthorityError::Ipv6(quoted()))?;
            let ip = ip.parse().map_err(|_| AuthorityError::Ipv6(quoted()))?;
            let port = port
                .strip_prefix(':')
                .ok_or_else(|| AuthorityError::NoPort(quoted()))?;
            let port = parse_port(port).ok_or_else(|| AuthorityError::Port(quoted()))?;
            return Ok(SocketAddr::new(IpAddr::V6(ip), port).into());
        }
        let (host, port) = text
            .split_once(':')
            .ok_or_else(|| AuthorityError::NoPort(quoted()))?;
        let port = parse_port(port).ok_or_else(|| AuthorityError::Port(quoted()))?;
        if let Ok(ip) = host.parse() {
            return Ok(Self::Address(SocketAddr::new(IpAddr::V4(ip), port)));
        }
        Ok(Self::Host {
            name: host.parse()?,
            port,
        })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

/// Digits only: `u16::from_str` would take a sign.
fn parse_port(text: &str) -> Option<u16> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|port| *port != 0)
}

/// A DNS name in lower case, without a final dot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hostname(Arc<str>);

/// Why a text is no host name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostnameError {
    /// Empty, or longer than 253 bytes (RFC 1035 2.3.4).
    #[error("host name of {0} bytes")]
    Length(usize),
    /// A label is empty, longer than 63 bytes, or has other characters than letters, digits,
    /// `-` and `_`.
    #[error("illegal host name \"{0}\"")]
    Label(String),
    /// The last label is a number, which makes it a malformed address (RFC 3696 2).
    #[error("\"{0}\" is no address")]
    Numeric(String),
}

impl Hostname {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Hostname {
    type Err = HostnameError;

    fn from_str(text: &str) -> Result<Self, HostnameError> {
        if text.is_empty() || text.len() > 253 {
            return Err(HostnameError::Length(text.len()));
        }
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        let mut numeric = false;
        for label in text.split('.') {
            if label.is_empty() || label.len() > 63 || !label.bytes().all(legal) {
                return Err(HostnameError::Label(excerpt(text.as_bytes())));
            }
            numeric = label.bytes().all(|b| b.is_ascii_digit());
        }
        if numeric {
            return Err(HostnameError::Numeric(excerpt(text.as_bytes())));
        }
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Ok(Self(text.to_ascii_lowercase().into()));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
