//! Envoy's command operators.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName};

use super::super::event::RequestEvent;
use super::super::trace::hex;

/// One `%OPERATOR%`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Operator {
    StartTime(TimeFormat),
    Method,
    Path,
    Authority,
    Scheme,
    Protocol,
    ResponseCode,
    ResponseCodeDetails,
    ResponseFlags,
    UpstreamFailure,
    BytesReceived,
    BytesSent,
    Duration,
    UpstreamServiceTime,
    UpstreamHost,
    UpstreamCluster,
    UpstreamLocal,
    DownstreamLocal,
    DownstreamRemote,
    /// One of the addresses, alone.
    WithoutPort(Box<Operator>),
    Port(Box<Operator>),
    RouteName,
    GrpcStatus,
    GrpcStatusNumber,
    DownstreamPeer,
    UpstreamPeer,
    TraceId,
    SpanId,
    Attempts,
    Policy,
    SourceWorkload,
    DestinationWorkload,
    /// The first of these headers that is there.
    Request(Vec<HeaderName>),
    Response(Vec<HeaderName>),
    /// `%REQ(X?Y):Z%`: at most that many characters.
    Limited(Box<Operator>, usize),
    /// The alternative of pseudo-headers and headers.
    Either(Vec<Operator>),
    /// Known before any request, as `%HOSTNAME%`.
    Fixed(String),
    /// What this proxy never has.
    Nothing,
}

/// How `%START_TIME%` is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimeFormat {
    /// RFC 3339 in UTC with milliseconds.
    Rfc3339,
    /// Seconds since 1970.
    Seconds,
    /// Milliseconds since 1970.
    Milliseconds,
}

impl Operator {
    /// Whether it is about headers of the response.
    pub(super) fn reads_response(&self) -> bool {
        match self {
            Self::Response(_) => true,
            Self::Either(operators) => operators.iter().any(Self::reads_response),
            Self::Limited(operator, _) | Self::WithoutPort(operator) | Self::Port(operator) => {
                operator.reads_response()
            }
            _ => false,
        }
    }

    /// The operator that is named `name` with these arguments; `None`: there is none.
    pub(super) fn parse(name: &str, argument: Option<&str>) -> Option<Self> {
        Some(match name {
            "START_TIME" => Self::StartTime(match argument {
                None | Some("") | Some("%Y-%m-%dT%H:%M:%S.%3fZ") => TimeFormat::Rfc3339,
                Some("%s") => TimeFormat::Seconds,
                Some("%s%3f") => TimeFormat::Milliseconds,
                Some(_) => return None,
            }),
            "REQ" => headers(argument?, Self::Request)?,
            "RESP" => match argument? {
                "X-ENVOY-UPSTREAM-SERVICE-TIME" => Self::UpstreamServiceTime,
                other => headers(other, Self::Response)?,
            },
            "TRAILER" => headers(argument?, |_| Self::Nothing)?,
            "METHOD" => Self::Method,
            "PATH" | "PATH_WITH_QUERY" => Self::Path,
            "PROTOCOL" => Self::Protocol,
            "RESPONSE_CODE" => Self::ResponseCode,
            "RESPONSE_CODE_DETAILS" => Self::ResponseCodeDetails,
            "RESPONSE_FLAGS" => Self::ResponseFlags,
            "UPSTREAM_TRANSPORT_FAILURE_REASON" => Self::UpstreamFailure,
            "BYTES_RECEIVED" => Self::BytesReceived,
            "BYTES_SENT" => Self::BytesSent,
            "DURATION" => Self::Duration,
            "RESPONSE_DURATION" => Self::UpstreamServiceTime,
            "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Self::UpstreamHost,
            "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => {
                Self::WithoutPort(Box::new(Self::UpstreamHost))
            }
            "UPSTREAM_REMOTE_PORT" => Self::Port(Box::new(Self::UpstreamHost)),
            "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Self::UpstreamCluster,
            "UPSTREAM_LOCAL_ADDRESS" => Self::UpstreamLocal,
            "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => {
                Self::WithoutPort(Box::new(Self::UpstreamLocal))
            }
            "DOWNSTREAM_LOCAL_ADDRESS" => Self::DownstreamLocal,
            "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => {
                Self::WithoutPort(Box::new(Self::DownstreamLocal))
            }
            "DOWNSTREAM_LOCAL_PORT" => Self::Port(Box::new(Self::DownstreamLocal)),
            "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => {
                Self::DownstreamRemote
            }
            "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT"
            | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
                Self::WithoutPort(Box::new(Self::DownstreamRemote))
            }
            "DOWNSTREAM_REMOTE_PORT" => Self::Port(Box::new(Self::DownstreamRemote)),
            "ROUTE_NAME" => Self::RouteName,
            "GRPC_STATUS" => Self::GrpcStatus,
            "GRPC_STATUS_NUMBER" => Self::GrpcStatusNumber,
            "DOWNSTREAM_PEER_URI_SAN" => Self::DownstreamPeer,
            "UPSTREAM_PEER_URI_SAN" => Self::UpstreamPeer,
            "TRACE_ID" => Self::TraceId,
            "SPAN_ID" => Self::SpanId,
            "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Self::Attempts,
            // Ours: what Istio's access log cannot say.
            "ADIT_POLICY" => Self::Policy,
            "ADIT_SOURCE_WORKLOAD" => Self::SourceWorkload,
            "ADIT_DESTINATION_WORKLOAD" => Self::DestinationWorkload,
            "HOSTNAME" => Self::Fixed(hostname()),
            "ENVIRONMENT" => Self::Fixed(std::env::var(argument?).unwrap_or_default()),
            "CONNECTION_TERMINATION_DETAILS"
            | "REQUESTED_SERVER_NAME"
            | "VIRTUAL_CLUSTER_NAME"
            | "FILTER_STATE"
            | "DYNAMIC_METADATA"
            | "CLUSTER_METADATA"
            | "UPSTREAM_METADATA"
            | "CONNECTION_ID"
            | "UPSTREAM_TLS_VERSION"
            | "DOWNSTREAM_TLS_VERSION"
            | "LOCAL_REPLY_BODY" => Self::Nothing,
            _ => return None,
        })
    }

    /// Whether the value is a number in JSON.
    pub(super) fn is_number(&self) -> bool {
        matches!(
            self,
            Self::ResponseCode
                | Self::BytesReceived
                | Self::BytesSent
                | Self::Duration
                | Self::GrpcStatusNumber
                | Self::Attempts
                | Self::Port(_)
                | Self::UpstreamServiceTime
        )
    }

    /// Appends the value. Says `false`, and appends nothing, if there is none.
    pub(super) fn write(&self, event: &RequestEvent<'_>, out: &mut String) -> bool {
        match self {
            Self::StartTime(format) => time(event.started, *format, out),
            Self::Method => text(event.method.as_str(), out),
            Self::Path => text(event.path, out),
            Self::Authority => text(event.authority, out),
            Self::Scheme => text("http", out),
            Self::Protocol => text(event.protocol.version(), out),
            Self::ResponseCode => number(event.status.into(), out),
            Self::ResponseCodeDetails => text(event.details, out),
            Self::ResponseFlags => {
                let any = !event.flags.is_empty();
                if any {
                    event.flags.write(out);
                }
                any
            }
            Self::UpstreamFailure => text(event.upstream_failure, out),
            Self::BytesReceived => number(event.traffic.request_bytes, out),
            Self::BytesSent => number(event.traffic.response_bytes, out),
            Self::Duration => milliseconds(event.duration, out),
            Self::UpstreamServiceTime => event
                .upstream_time
                .is_some_and(|duration| milliseconds(duration, out)),
            Self::UpstreamHost
            | Self::UpstreamLocal
            | Self::DownstreamLocal
            | Self::DownstreamRemote => {
                let address = self.address(event);
                address.is_some_and(|address| socket_address(address, out))
            }
            Self::WithoutPort(of) => {
                let Some(address) = of.address(event) else {
                    return false;
                };
                let _ = write!(out, "{}", address.ip());
                true
            }
            Self::Port(of) => {
                let port = of.address(event).map(|address| address.port());
                port.is_some_and(|port| number(port.into(), out))
            }
            Self::UpstreamCluster => text(event.upstream_cluster, out),
            Self::RouteName => text(event.route_name, out),
            Self::GrpcStatus => event
                .grpc_status
                .is_some_and(|status| text(grpc_status_name(status), out)),
            Self::GrpcStatusNumber => event
                .grpc_status
                .is_some_and(|status| number(status.into(), out)),
            Self::DownstreamPeer => {
                let Some(principal) = &event.source.principal else {
                    return false;
                };
                let _ = write!(out, "{principal}");
                true
            }
            Self::UpstreamPeer => {
                let Some(principal) = event.destination.and_then(|d| d.principal.as_ref()) else {
                    return false;
                };
                let _ = write!(out, "{principal}");
                true
            }
            Self::TraceId => text(&hex(&event.trace.trace_id), out),
            Self::SpanId => text(&hex(&event.trace.span_id), out),
            Self::Attempts => number(u64::from(event.retries) + 1, out),
            Self::Policy => event.policy.is_some_and(|policy| text(policy, out)),
            Self::SourceWorkload => text(&event.source.workload, out),
            Self::DestinationWorkload => event
                .destination
                .is_some_and(|destination| text(&destination.workload, out)),
            Self::Request(names) => header(event.request_headers, names, out),
            Self::Response(names) => header(event.response_headers, names, out),
            Self::Either(operators) => operators.iter().any(|operator| operator.write(event, out)),
            Self::Limited(operator, limit) => {
                let start = out.len();
                let written = operator.write(event, out);
                if let Some((end, _)) = out[start..].char_indices().nth(*limit) {
                    out.truncate(start + end);
                }
                written
            }
            Self::Fixed(value) => text(value, out),
            Self::Nothing => false,
        }
    }

    fn address(&self, event: &RequestEvent<'_>) -> Option<SocketAddr> {
        match self {
            Self::UpstreamHost => event.upstream_host,
            Self::UpstreamLocal => event.upstream_local,
            Self::DownstreamLocal => event.downstream_local,
            Self::DownstreamRemote => event.downstream_remote,
            _ => None,
        }
    }
}

/// `X`, `X?Y`, of which each may be a pseudo-header.
fn headers(names: &str, make: fn(Vec<HeaderName>) -> Operator) -> Option<Operator> {
    let mut operators = Vec::new();
    for name in names.split('?') {
        operators.push(match name.to_ascii_lowercase().as_str() {
            ":method" => Operator::Method,
            ":path" => Operator::Path,
            ":authority" | "host" => Operator::Authority,
            ":scheme" => Operator::Scheme,
            ":status" => Operator::ResponseCode,
            name => make(vec![HeaderName::try_from(name).ok()?]),
        });
    }
    Some(match operators.len() {
        1 => operators.remove(0),
        _ => Operator::Either(operators),
    })
}

fn text(value: &str, out: &mut String) -> bool {
    out.push_str(value);
    !value.is_empty()
}

fn number(value: u64, out: &mut String) -> bool {
    out.push_str(itoa::Buffer::new().format(value));
    true
}

/// As `Display` writes it; IPv4, of which a line has three, without its machinery.
fn socket_address(address: SocketAddr, out: &mut String) -> bool {
    let SocketAddr::V4(v4) = address else {
        let _ = write!(out, "{address}");
        return true;
    };
    for (n, octet) in v4.ip().octets().into_iter().enumerate() {
        if n > 0 {
            out.push('.');
        }
        number(octet.into(), out);
    }
    out.push(':');
    number(v4.port().into(), out)
}

fn milliseconds(duration: Duration, out: &mut String) -> bool {
    number(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX), out)
}

fn header(headers: &HeaderMap, names: &[HeaderName], out: &mut String) -> bool {
    let Some(value) = names.iter().find_map(|name| headers.get(name)) else {
        return false;
    };
    match value.to_str() {
        Ok(value) => text(value, out),
        Err(_) => text(&String::from_utf8_lossy(value.as_bytes()), out),
    }
}

fn time(at: SystemTime, format: TimeFormat, out: &mut String) -> bool {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    match format {
        TimeFormat::Rfc3339 => {
            let _ = write!(out, "{}", humantime::format_rfc3339_millis(at));
        }
        TimeFormat::Seconds => {
            let _ = write!(out, "{}", since.as_secs());
        }
        TimeFormat::Milliseconds => {
            let _ = write!(out, "{}", since.as_millis());
        }
    }
    true
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

/// As Envoy writes them (`CAMEL_STRING`, its default).
fn grpc_status_name(status: u32) -> &'static str {
    const NAMES: [&str; 17] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    NAMES.get(status as usize).copied().unwrap_or("InvalidCode")
}
