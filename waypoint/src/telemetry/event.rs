//! What happened to one request. The metrics, the access log and the span are made from this
//! one value, so they cannot disagree.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use adit_shared::telemetry::{ServiceLabels, WorkloadLabels};
use http::{HeaderMap, Method};

use super::trace::TraceContext;

/// What the client spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC over HTTP/2, by its content type.
    Grpc,
}

impl Protocol {
    /// The value of `request_protocol`: Istio has two.
    pub fn label(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http10 | Self::Http11 | Self::Http2 => "http",
        }
    }

    /// Envoy's `%PROTOCOL%`.
    pub fn version(self) -> &'static str {
        match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
            Self::Http2 | Self::Grpc => "HTTP/2",
        }
    }
}

/// Envoy's response flags, as a set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ResponseFlags(u32);

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal $short:literal;)*) => {
        impl ResponseFlags {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*

            /// Every flag with its short name, in Envoy's order.
            pub const ALL: &[(Self, &str)] = &[$((Self::$name, $short)),*];
        }
    };
}

flags! {
    /// No healthy endpoint.
    NO_HEALTHY_UPSTREAM = 0 "UH";
    /// Connecting to the endpoint failed.
    UPSTREAM_CONNECTION_FAILURE = 1 "UF";
    /// A limit of connections, pending requests or requests is reached.
    UPSTREAM_OVERFLOW = 2 "UO";
    /// No route matches.
    NO_ROUTE = 3 "NR";
    /// Every attempt has failed.
    RETRY_LIMIT_EXCEEDED = 4 "URX";
    /// The route's backend does not exist.
    NO_CLUSTER = 5 "NC";
    /// The client went away.
    DOWNSTREAM_TERMINATION = 6 "DC";
    /// We reset the request.
    LOCAL_RESET = 7 "LR";
    /// The endpoint reset the request.
    UPSTREAM_RESET = 8 "UR";
    /// The connection to the endpoint ended.
    UPSTREAM_TERMINATION = 9 "UC";
    /// The request's time was over.
    UPSTREAM_TIMEOUT = 10 "UT";
    /// A configured delay was injected.
    DELAY_INJECTED = 11 "DI";
    /// A configured fault was injected.
    FAULT_INJECTED = 12 "FI";
    /// A rate limit.
    RATE_LIMITED = 13 "RL";
    /// External authorization denied, or could not be asked.
    UNAUTHORIZED_EXTERNAL = 14 "UAEX";
    /// The stream was idle for too long.
    STREAM_IDLE_TIMEOUT = 15 "SI";
    /// The client broke the protocol.
    DOWNSTREAM_PROTOCOL_ERROR = 16 "DPE";
    /// The endpoint broke the protocol.
    UPSTREAM_PROTOCOL_ERROR = 17 "UPE";
    /// The endpoint's answer was the last of `max_stream_duration`.
    MAX_DURATION = 18 "UMSDR";
    /// Too much for this process.
    OVERLOAD = 19 "OM";
}

impl ResponseFlags {
    /// No flag.
    pub const NONE: Self = Self(0);

    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Appends the short names, comma-separated; `-` for none.
    pub fn write(self, out: &mut String) {
        if self.is_empty() {
            out.push('-');
            return;
        }
        let start = out.len();
        for (flag, name) in Self::ALL {
            if self.contains(*flag) {
                if out.len() > start {
                    out.push(',');
                }
                out.push_str(name);
            }
        }
    }
}

impl std::ops::BitOr for ResponseFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for ResponseFlags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl std::fmt::Display for ResponseFlags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = String::new();
        self.write(&mut text);
        f.write_str(&text)
    }
}

/// The caller or the endpoint, as telemetry names it. Made once per tunnel and per endpoint:
/// metrics recognise it by its address.
pub type Peer = Arc<WorkloadLabels>;

/// Sizes and counts of a request and its response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Body bytes from the client.
    pub request_bytes: u64,
    /// Body bytes to the client.
    pub response_bytes: u64,
    /// gRPC messages from the client.
    pub request_messages: u64,
    /// gRPC messages to the client.
    pub response_messages: u64,
}

/// One request that has ended.
#[derive(Debug)]
pub struct RequestEvent<'a> {
    /// When its head was read.
    pub started: SystemTime,
    /// From its head to the last byte of the response.
    pub duration: Duration,
    /// From sending it to the head of the endpoint's answer.
    pub upstream_time: Option<Duration>,
    /// What the client spoke.
    pub protocol: Protocol,
    /// The method.
    pub method: &'a Method,
    /// Host of the request, as the client sent it.
    pub authority: &'a str,
    /// Path with query, as the client sent it.
    pub path: &'a str,
    /// The client's headers, as it sent them.
    pub request_headers: &'a HeaderMap,
    /// The headers of the answer; empty when there was none.
    pub response_headers: &'a HeaderMap,
    /// Status code; 0: no answer was given.
    pub status: u16,
    /// gRPC status of a gRPC request, once it is known.
    pub grpc_status: Option<u32>,
    /// Why it failed.
    pub flags: ResponseFlags,
    /// Envoy's response code details, as `via_upstream` or ours, as `no_healthy_endpoints`.
    pub details: &'a str,
    /// What is known of the failure towards the endpoint.
    pub upstream_failure: &'a str,
    /// What went over it.
    pub traffic: Traffic,
    /// The caller.
    pub source: &'a Peer,
    /// The endpoint; `None`: none was reached.
    pub destination: Option<&'a Peer>,
    /// The service that was addressed.
    pub service: Option<&'a Arc<ServiceLabels>>,
    /// The rule that decided, as `namespace/route.rule`.
    pub route_name: &'a str,
    /// The endpoint's cluster in Envoy's way of naming it.
    pub upstream_cluster: &'a str,
    /// The endpoint's address.
    pub upstream_host: Option<SocketAddr>,
    /// Our address towards the endpoint.
    pub upstream_local: Option<SocketAddr>,
    /// What the client dialled.
    pub downstream_local: Option<SocketAddr>,
    /// The client's address.
    pub downstream_remote: Option<SocketAddr>,
    /// Tries beyond the first.
    pub retries: u32,
    /// The policy that denied, as `namespace/name`.
    pub policy: Option<&'a str>,
    /// Its trace.
    pub trace: &'a TraceContext,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_written_in_envoys_order() {
        let flags =
            ResponseFlags::RETRY_LIMIT_EXCEEDED | ResponseFlags::UPSTREAM_CONNECTION_FAILURE;
        assert_eq!(flags.to_string(), "UF,URX");
        assert_eq!(ResponseFlags::NONE.to_string(), "-");
        assert!(flags.contains(ResponseFlags::RETRY_LIMIT_EXCEEDED));
        assert!(!flags.contains(ResponseFlags::NO_ROUTE));
    }
}
