//! What a CONNECT request says (Istio's HBONE): the authority, who asked for what
//! (`forwarded`, RFC 7239), what the client's workload is (`baggage`), and a trace id
//! (`traceparent`, W3C Trace Context).
//!
//! Only the authority decides anything. The rest comes from the peer's proxy, is bounded, and
//! is used for logs and metrics alone.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Uri};
use rand::Rng;

/// No header value that is longer is looked at.
const MAX_VALUE: usize = 4096;
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Where a CONNECT leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// `10.0.0.5:8080` or `[fd00::5]:8080`.
    Address(SocketAddr),
    /// `web.shop.svc.cluster.local:80`: a service, at a gateway.
    Host(String, u16),
}

/// A text is no authority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither address:port nor host:port")]
pub struct AuthorityInvalid(String);

impl FromStr for Authority {
    type Err = AuthorityInvalid;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let invalid = || AuthorityInvalid(text.chars().take(300).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'*');
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        if host.is_empty() || host.len() > 253 || !host.bytes().all(legal) || !digits {
            return Err(invalid());
        }
        Ok(Self::Host(
            host.to_ascii_lowercase(),
            port.parse().map_err(|_| invalid())?,
        ))
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// For whom a connection is made: the client's address, and the host name of the service that
/// it dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    /// The app's address.
    pub client: SocketAddr,
    /// Set when the app addressed a service.
    pub host: Option<String>,
}

impl Forwarded {
    fn parse(value: &str) -> Option<Self> {
        let mut client = None;
        let mut host = None;
        for pair in value.split(';') {
            let (name, value) = pair.split_once('=')?;
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "for" => client = value.parse().ok(),
                "host" => host = Some(value.to_owned()),
                _ => {}
            }
        }
        Some(Self {
            client: client?,
            host,
        })
    }
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for=\"{}\"", self.client)?;
        match &self.host {
            Some(host) => write!(f, ";host={host}"),
            None => Ok(()),
        }
    }
}

/// What the client's workload is, in OpenTelemetry's words. Empty is unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: String,
    /// `k8s.namespace.name`.
    pub namespace: String,
    /// `deployment`, `cronjob`, `pod` or `job`: which `k8s.<kind>.name` holds `workload`.
    pub kind: String,
    /// Name of the owning workload.
    pub workload: String,
    /// `service.name`: canonical service.
    pub service: String,
    /// `service.version`: canonical revision.
    pub version: String,
    /// `cloud.region`.
    pub region: String,
    /// `cloud.availability_zone`.
    pub zone: String,
}

impl Baggage {
    /// Reads a header value; parts that are not known are passed over.
    pub fn parse(value: &str) -> Self {
        let mut baggage = Self::default();
        for member in value.split(',') {
            let Some((key, value)) = member.split_once('=') else {
                continue;
            };
            // Properties of a member (`;`) mean nothing here.
            let value = value
                .split(';')
                .next()
                .unwrap_or_default()
                .trim()
                .to_owned();
            match key.trim() {
                "k8s.cluster.name" => baggage.cluster = value,
                "k8s.namespace.name" => baggage.namespace = value,
                "service.name" => baggage.service = value,
                "service.version" => baggage.version = value,
                "cloud.region" => baggage.region = value,
                "cloud.availability_zone" => baggage.zone = value,
                key => {
                    let kind = key
                        .strip_prefix("k8s.")
                        .and_then(|k| k.strip_suffix(".name"));
                    if let Some(kind @ ("deployment" | "cronjob" | "pod" | "job")) = kind {
                        baggage.kind = kind.to_owned();
                        baggage.workload = value;
                    }
                }
            }
        }
        baggage
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = format_args!("k8s.{}.name", self.kind).to_string();
        let parts = [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (kind.as_str(), &self.workload),
            ("service.name", &self.service),
            ("service.version", &self.version),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ];
        let mut first = true;
        for (key, value) in parts.into_iter().filter(|(_, value)| !value.is_empty()) {
            if !std::mem::take(&mut first) {
                f.write_str(",")?;
            }
            write!(f, "{key}={value}")?;
        }
        Ok(())
    }
}

/// A W3C trace context, version 00.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traceparent {
    /// Never zero.
    pub trace_id: u128,
    /// Never zero.
    pub parent_id: u64,
    /// Bit 0: sampled.
    pub flags: u8,
}

impl Traceparent {
    /// A new trace, not sampled.
    pub fn random(rng: &mut impl Rng) -> Self {
        Self {
            trace_id: rng.random_range(1..=u128::MAX),
            parent_id: rng.random_range(1..=u64::MAX),
            flags: 0,
        }
    }

    fn parse(value: &str) -> Option<Self> {
        let mut parts = value.split('-');
        let (version, trace, parent, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lower_hex = |text: &str| {
            text.bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let lengths = [version.len(), trace.len(), parent.len(), flags.len()];
        let last = parts.next().is_none();
        // Version ff is invalid, later ones may have more parts (W3C Trace Context 3.2.2).
        if lengths != [2, 32, 16, 2] || version == "ff" || (version == "00" && !last) {
            return None;
        }
        if ![version, trace, parent, flags].into_iter().all(lower_hex) {
            return None;
        }
        let context = Self {
            trace_id: u128::from_str_radix(trace, 16).ok()?,
            parent_id: u64::from_str_radix(parent, 16).ok()?,
            flags: u8::from_str_radix(flags, 16).ok()?,
        };
        (context.trace_id != 0 && context.parent_id != 0).then_some(context)
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "00-{:032x}-{:016x}-{:02x}",
            self.trace_id, self.parent_id, self.flags
        )
    }
}

/// A CONNECT request as a client sends it.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// Where to.
    pub authority: Authority,
    /// For whom.
    pub forwarded: Option<Forwarded>,
    /// What the client is; rendered, since it is the same for every connection of a workload.
    pub baggage: Option<HeaderValue>,
    /// The trace.
    pub traceparent: Option<Traceparent>,
}

impl ConnectRequest {
    pub(super) fn to_http(&self) -> Result<Request<()>, http::Error> {
        let uri = Uri::builder()
            .authority(self.authority.to_string())
            .build()?;
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(uri)
            .body(())?;
        let headers = request.headers_mut();
        if let Some(baggage) = &self.baggage {
            headers.insert(BAGGAGE, baggage.clone());
        }
        if let Some(forwarded) = &self.forwarded {
            headers.insert(FORWARDED, HeaderValue::try_from(forwarded.to_string())?);
        }
        if let Some(traceparent) = &self.traceparent {
            headers.insert(TRACEPARENT, HeaderValue::try_from(traceparent.to_string())?);
        }
        Ok(request)
    }
}

/// The headers of a CONNECT request as a server received them. What does not parse is as if
/// it were not there.
#[derive(Debug, Clone, Default)]
pub struct PeerHeaders {
    /// For whom.
    pub forwarded: Option<Forwarded>,
    /// What the client is.
    pub baggage: Option<Baggage>,
    /// The trace.
    pub traceparent: Option<Traceparent>,
}

impl PeerHeaders {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let text = |name: HeaderName| {
            headers
                .get(name)?
                .to_str()
                .ok()
                .filter(|value| value.len() <= MAX_VALUE)
        };
        Self {
            forwarded: text(FORWARDED).and_then(Forwarded::parse),
            baggage: text(BAGGAGE).map(Baggage::parse),
            traceparent: text(TRACEPARENT).and_then(Traceparent::parse),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn authorities() {
        for text in [
            "10.0.0.5:8080",
            "[fd00::5]:8080",
            "web.shop.svc.cluster.local:80",
        ] {
            assert_eq!(text.parse::<Authority>().expect(text).to_string(), text);
        }
        for text in [
            "",
            ":",
            ":80",
            "web",
            "web:",
            "web:+80",
            "web:65536",
            "fd00::5:8080",
            "[fd00::5]",
            "we b:80",
            "web:80/x",
            "user@web:80",
            "10.0.0.5:",
            "\u{e4}:1",
        ] {
            assert!(text.parse::<Authority>().is_err(), "{text}");
        }
    }

    #[test]
    fn forwarded_as_istio_writes_it() {
        let text = "for=\"10.0.0.5:41000\";host=web.shop.svc.cluster.local";
        let forwarded = Forwarded::parse(text).expect("valid");
        assert_eq!(forwarded.client, "10.0.0.5:41000".parse().expect("address"));
        assert_eq!(forwarded.to_string(), text);
        assert_eq!(Forwarded::parse("host=web"), None);
        assert_eq!(Forwarded::parse("for=unknown"), None);
    }

    #[test]
    fn baggage_as_istio_writes_it() {
        let text = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,\
                    k8s.deployment.name=web,service.name=web,service.version=v1";
        let baggage = Baggage::parse(text);
        assert_eq!(
            (baggage.kind.as_str(), baggage.workload.as_str()),
            ("deployment", "web")
        );
        assert_eq!(baggage.to_string(), text);
    }

    #[test]
    fn traceparents() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(Traceparent::parse(text).expect("valid").to_string(), text);
        for text in [
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00",
        ] {
            assert_eq!(Traceparent::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".{0,200}") {
            let _ = text.parse::<Authority>();
            let _ = Forwarded::parse(&text);
            let _ = Baggage::parse(&text);
            let _ = Traceparent::parse(&text);
        }
    }
}
