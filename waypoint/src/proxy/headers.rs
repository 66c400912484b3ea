//! Heads of requests and responses: what is malformed or ambiguous is refused, what belongs to
//! one connection only is removed, and what the mesh says of a request is put in.
//!
//! What hyper has parsed has one meaning already: one length or chunked, no folded lines, no
//! bare CR. Here the rest: which host is meant (RFC 9112 3.2, RFC 9113 8.3.1), and that nothing
//! passes that the next hop could read as another framing (RFC 9112 6.1, 7).

use std::net::Ipv6Addr;

use adit_shared::policy::http::{HostRejected, request_host};
use http::header::{
    self, CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Uri, Version, request};

use super::http::{MAX_HEADER_LIST, MAX_HEADERS};

/// Set where we answer ourselves: why.
pub const REASON: HeaderName = HeaderName::from_static("x-adit-reason");
/// Who has forwarded the request, and for whom.
pub const CLIENT_CERTIFICATE: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// The scheme that the client used.
pub const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// What proxies tell each other, which is nobody else's business: Istio's of themselves, Envoy
/// of the path before a rewrite, which access logs show in place of the request's own.
const PEER_METADATA: [HeaderName; 3] = [
    HeaderName::from_static("x-envoy-original-path"),
    HeaderName::from_static("x-envoy-peer-metadata"),
    HeaderName::from_static("x-envoy-peer-metadata-id"),
];

/// Names of protocols to upgrade to that are HTTP again.
const HTTP_ITSELF: [&[u8]; 5] = [b"h2c", b"h2", b"http", b"h3", b"tls"];

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// RFC 9112 3.2: a request needs a host.
    #[error("missing_host")]
    MissingHost,
    /// More than one.
    #[error("duplicate_host")]
    DuplicateHost,
    /// RFC 9113 8.3.1: `:authority` and `host` are not the same.
    #[error("different_hosts")]
    DifferentHosts,
    /// Not `host` or `host:port`, or with user information.
    #[error("invalid_host")]
    InvalidHost,
    /// Neither a path nor `*` of an OPTIONS request.
    #[error("invalid_path")]
    InvalidPath,
    /// RFC 9112 6.1: a coding that is not passed on, so nobody could undo it.
    #[error("unsupported_transfer_encoding")]
    TransferEncoding,
    /// RFC 9112 6.3: two lengths.
    #[error("ambiguous_length")]
    AmbiguousLength,
    /// More headers than any request needs.
    #[error("too_many_headers")]
    TooManyHeaders,
    /// Longer ones than any request needs.
    #[error("headers_too_large")]
    HeadersTooLarge,
    /// A tunnel inside of the tunnel.
    #[error("connect_not_supported")]
    Connect,
}

impl From<HostRejected> for Malformed {
    fn from(rejected: HostRejected) -> Self {
        match rejected {
            HostRejected::Duplicate => Self::DuplicateHost,
            HostRejected::Different => Self::DifferentHosts,
            HostRejected::Malformed => Self::InvalidHost,
        }
    }
}

/// Which other protocol a request asks for, by its `upgrade` header.
pub fn wants_upgrade(head: &request::Parts) -> bool {
    if head.version != Version::HTTP_11 || !has_token(&head.headers, &CONNECTION, "upgrade") {
        return false;
    }
    let mut protocols = head.headers.get_all(UPGRADE).iter();
    let (Some(protocol), None) = (protocols.next(), protocols.next()) else {
        return false;
    };
    // One, so that the endpoint has no choice that was not seen here.
    let protocol = protocol.as_bytes().trim_ascii();
    if protocol.is_empty() || protocol.contains(&b',') {
        return false;
    }
    // What carries further requests would lead them around what is decided for each of them;
    // h2c was abandoned besides (RFC 9113 3.1).
    !is_http_itself(protocol)
}

/// Whether a protocol, with or without its version, carries further requests of HTTP.
pub fn is_http_itself(protocol: &[u8]) -> bool {
    let name = protocol.split(|b| *b == b'/').next().unwrap_or_default();
    HTTP_ITSELF
        .iter()
        .any(|other| name.trim_ascii().eq_ignore_ascii_case(other))
}

/// Brings a request's head into one form: path and query in its URI, one valid `host`, no
/// headers of the connection. `upgrade` keeps those that ask for another protocol.
///
/// # Errors
/// [`Malformed`]: the request is not served.
pub fn normalise(head: &mut request::Parts, upgrade: bool) -> Result<(), Malformed> {
    if head.method == Method::CONNECT {
        return Err(Malformed::Connect);
    }
    // HTTP/1's parser has this limit itself.
    if head.headers.len() > MAX_HEADERS {
        return Err(Malformed::TooManyHeaders);
    }
    // So has hyper for HTTP/1; h2's own limit is a little higher, so that it is us who answer.
    if head.version == Version::HTTP_2 && head_size(head) > MAX_HEADER_LIST as usize {
        return Err(Malformed::HeadersTooLarge);
    }
    settle_host(head)?;
    let headers = &mut head.headers;
    if let Some(coding) = headers.get(TRANSFER_ENCODING) {
        if !coding
            .as_bytes()
            .trim_ascii()
            .eq_ignore_ascii_case(b"chunked")
            || headers.get_all(TRANSFER_ENCODING).iter().count() > 1
        {
            return Err(Malformed::TransferEncoding);
        }
        if headers.contains_key(CONTENT_LENGTH) {
            return Err(Malformed::AmbiguousLength);
        }
    }
    let trailers = has_token(headers, &TE, "trailers");
    let protocol = if upgrade {
        headers.get(UPGRADE).cloned()
    } else {
        None
    };
    remove_hop_by_hop(headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = protocol {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
    for name in PEER_METADATA {
        headers.remove(name);
    }
    Ok(())
}

/// Bytes of headers or trailers, as HTTP/2 counts them (RFC 9113 6.5.2).
pub fn list_size(headers: &HeaderMap) -> usize {
    let sizes = headers.iter();
    let sizes = sizes.map(|(name, value)| name.as_str().len() + value.len() + OF_EACH);
    sizes.sum()
}

/// What each header costs beside its name and value.
const OF_EACH: usize = 32;

/// The same of all that a request's head had in HTTP/2.
fn head_size(head: &request::Parts) -> usize {
    let uri = &head.uri;
    let pseudo = [
        (":method", head.method.as_str()),
        (":scheme", uri.scheme_str().unwrap_or_default()),
        (
            ":authority",
            uri.authority().map_or("", |host| host.as_str()),
        ),
        (
            ":path",
            uri.path_and_query().map_or("", |path| path.as_str()),
        ),
    ];
    let pseudo = pseudo.iter();
    let pseudo: usize = pseudo
        .map(|(name, value)| name.len() + value.len() + OF_EACH)
        .sum();
    pseudo + list_size(&head.headers)
}

/// RFC 9112 3.2.2: the authority of the request's target wins over `host`; RFC 9113 8.3.1 says
/// the same of `:authority`.
fn settle_host(head: &mut request::Parts) -> Result<(), Malformed> {
    let http2 = head.version == Version::HTTP_2;
    // Policies mean by host what this finds.
    request_host(head.uri.authority(), &head.headers, http2)?;
    let named = head.headers.get(HOST);
    // The authority-form is for CONNECT alone (RFC 9112 3.2.3). A target without a slash would
    // be taken for one.
    if head.uri.authority().is_some() && head.uri.scheme().is_none() {
        return Err(Malformed::InvalidPath);
    }
    let host = match (head.uri.authority(), named) {
        (Some(authority), _) => {
            let authority = authority.as_str();
            if !is_host(authority.as_bytes()) {
                return Err(Malformed::InvalidHost);
            }
            if named.is_some_and(|named| named.as_bytes() == authority.as_bytes()) {
                None
            } else {
                let value = HeaderValue::from_str(authority);
                Some(value.map_err(|_| Malformed::InvalidHost)?)
            }
        }
        (None, Some(named)) if is_host(named.as_bytes()) => None,
        (None, Some(_)) => return Err(Malformed::InvalidHost),
        // HTTP/1.0 has no host; its only possible meaning is the service that was dialled.
        (None, None) if head.version == Version::HTTP_10 => None,
        (None, None) => return Err(Malformed::MissingHost),
    };
    if let Some(host) = host {
        head.headers.insert(HOST, host);
    }
    let given = head.uri.path_and_query();
    let text = given.map_or("", PathAndQuery::as_str);
    let changed = match text.as_bytes() {
        // An empty one calls itself `/`, but its URI does not.
        [b'/'] => Some(Ok(PathAndQuery::from_static("/"))),
        [b'/', ..] => None,
        [b'*'] if head.method == Method::OPTIONS => None,
        // RFC 9112 3.2.1: an empty path is `/`.
        [] | [b'?', ..] => Some(PathAndQuery::try_from(format!("/{text}"))),
        _ => return Err(Malformed::InvalidPath),
    };
    if changed.is_some() || head.uri.authority().is_some() || head.uri.scheme().is_some() {
        let path = match changed {
            Some(path) => Some(path.map_err(|_| Malformed::InvalidPath)?),
            None => given.cloned(),
        };
        let mut parts = http::uri::Parts::default();
        parts.path_and_query = path;
        // Path and query of a valid URI are one.
        head.uri = Uri::from_parts(parts).map_err(|_| Malformed::InvalidPath)?;
    }
    Ok(())
}

/// `host`, `host:port`, `[v6]`, `[v6]:port`; neither user information nor anything that would
/// end the host early for another reader.
fn is_host(host: &[u8]) -> bool {
    let legal = |b: &u8| {
        b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~' | b':' | b'[' | b']')
    };
    if host.is_empty() || host.len() > 261 || !host.iter().all(legal) {
        return false;
    }
    let (name, port) = match host.iter().rposition(|b| *b == b':') {
        Some(at) if !host.ends_with(b"]") => (&host[..at], &host[at + 1..]),
        _ => (host, &b""[..]),
    };
    let address = name.strip_prefix(b"[").and_then(|n| n.strip_suffix(b"]"));
    let bracketed = address
        .and_then(|address| std::str::from_utf8(address).ok())
        .is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
    !name.is_empty()
        && port.iter().all(u8::is_ascii_digit)
        && port.len() <= 5
        && (bracketed || !name.iter().any(|b| matches!(b, b':' | b'[' | b']')))
}

/// Removes what is about one connection: the headers that RFC 9110 7.6.1 names and those that
/// `connection` names.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            // Nobody may have us drop what says whose request it is or where it goes.
            .filter(|name| *name != HOST && *name != CONTENT_LENGTH && *name != TRAILER)
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in [&KEEP_ALIVE, &PROXY_CONNECTION, &HTTP2_SETTINGS] {
        headers.remove(name);
    }
    for name in [&TE, &TRANSFER_ENCODING, &UPGRADE] {
        headers.remove(name);
    }
}

/// Removes from trailers what has its meaning only before a body (RFC 9110 6.5.1): framing,
/// routing, authentication, how the body is read. A server that joins trailers with headers
/// would else believe there what was taken out here.
pub fn clean_trailers(trailers: &mut HeaderMap) {
    while let Some(name) = trailers.keys().find(|name| !is_trailer(name)).cloned() {
        trailers.remove(name);
    }
}

fn is_trailer(name: &HeaderName) -> bool {
    !matches!(
        *name,
        header::AUTHORIZATION
            | header::CACHE_CONTROL
            | CONNECTION
            | header::CONTENT_ENCODING
            | CONTENT_LENGTH
            | header::CONTENT_RANGE
            | header::CONTENT_TYPE
            | header::COOKIE
            | header::EXPECT
            | header::FORWARDED
            | HOST
            | header::MAX_FORWARDS
            | header::PROXY_AUTHORIZATION
            | header::SET_COOKIE
            | TE
            | TRAILER
            | TRANSFER_ENCODING
            | UPGRADE
    ) && ![&KEEP_ALIVE, &PROXY_CONNECTION, &HTTP2_SETTINGS].contains(&name)
        && !PEER_METADATA.contains(name)
        && !name.as_str().starts_with("x-forwarded-")
}

/// Whether a header is a list that has `token`.
pub fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers.get_all(name).iter().any(|value| {
        value
            .as_bytes()
            .split(|b| *b == b',')
            .any(|part| part.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
    })
}

/// Whether the request is gRPC, by its content type.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value.starts_with(b"application/grpc") && matches!(value.get(16), None | Some(b'+' | b';'))
    })
}

/// The form that a request of HTTP/2 wants: with scheme and authority in its URI.
///
/// # Errors
/// [`Malformed::InvalidHost`] when `host` is not an authority.
pub fn to_absolute(uri: &Uri, headers: &mut HeaderMap, scheme: Scheme) -> Result<Uri, Malformed> {
    let mut parts = http::uri::Parts::default();
    let host = headers.remove(HOST);
    let authority = host.ok_or(Malformed::MissingHost)?;
    let authority = Authority::try_from(authority.as_bytes());
    parts.authority = Some(authority.map_err(|_| Malformed::InvalidHost)?);
    parts.scheme = Some(scheme);
    let path = uri.path_and_query().cloned();
    parts.path_and_query = Some(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    Uri::from_parts(parts).map_err(|_| Malformed::InvalidPath)
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(method: &str, uri: &str, headers: &[(&str, &str)]) -> request::Parts {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("legal").into_parts().0
    }

    #[test]
    fn one_host_is_meant_or_the_request_is_refused() {
        type Case<'a> = (
            &'a str,
            &'a [(&'a str, &'a str)],
            Result<&'a str, Malformed>,
        );
        let cases: &[Case<'_>] = &[
            ("/", &[("host", "a")], Ok("a")),
            ("/", &[("host", "a:80")], Ok("a:80")),
            ("/", &[("host", "[::1]:80")], Ok("[::1]:80")),
            ("/", &[], Err(Malformed::MissingHost)),
            ("/", &[("host", "")], Err(Malformed::InvalidHost)),
            (
                "/",
                &[("host", "a"), ("host", "a")],
                Err(Malformed::DuplicateHost),
            ),
            ("/", &[("host", "u@a")], Err(Malformed::InvalidHost)),
            ("/", &[("host", "a/b")], Err(Malformed::InvalidHost)),
            ("/", &[("host", "a b")], Err(Malformed::InvalidHost)),
            ("/", &[("host", "a,b")], Err(Malformed::InvalidHost)),
            ("/", &[("host", "a:b")], Err(Malformed::InvalidHost)),
            ("/", &[("host", "::1")], Err(Malformed::InvalidHost)),
            ("/", &[("host", "[a]")], Err(Malformed::InvalidHost)),
            ("/", &[("host", "a%2fb")], Err(Malformed::InvalidHost)),
            // The target's authority wins.
            ("http://b/x", &[("host", "a")], Ok("b")),
            ("http://b/x", &[], Ok("b")),
            // Authority-form, or a path that lacks its slash.
            ("b:80", &[("host", "a")], Err(Malformed::InvalidPath)),
            ("b", &[("host", "a")], Err(Malformed::InvalidPath)),
            (
                "http://u:p@b/x",
                &[("host", "a")],
                Err(Malformed::InvalidHost),
            ),
        ];
        for (uri, headers, expected) in cases {
            let mut head = head("GET", uri, headers);
            let done = normalise(&mut head, false);
            let host = head.headers.get(HOST).and_then(|h| h.to_str().ok());
            assert_eq!(
                done.map(|()| host.unwrap_or_default()),
                *expected,
                "{uri} {headers:?}"
            );
            if expected.is_ok() {
                assert!(head.uri.authority().is_none(), "{uri}");
            }
        }
    }

    #[test]
    fn what_belongs_to_one_connection_stays_there() {
        let mut head = head(
            "GET",
            "/",
            &[
                ("host", "a"),
                ("connection", "close, x-mine, host"),
                ("x-mine", "1"),
                ("keep-alive", "timeout=5"),
                ("proxy-connection", "keep-alive"),
                ("te", "gzip, trailers"),
                ("upgrade", "websocket"),
                ("x-envoy-peer-metadata", "x"),
                ("x-envoy-original-path", "/innocent"),
                ("x-other", "2"),
            ],
        );
        normalise(&mut head, false).expect("well-formed");
        let mut left: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["host", "te", "x-other"]);
        assert_eq!(head.headers[TE], "trailers");
    }

    #[test]
    fn headers_are_counted() {
        let with = |n| {
            let mut head = head("GET", "/", &[("host", "a")]);
            for at in 1..n {
                let name = HeaderName::try_from(format!("x-{at}")).expect("legal");
                head.headers.insert(name, HeaderValue::from_static("1"));
            }
            normalise(&mut head, false)
        };
        assert_eq!(with(MAX_HEADERS), Ok(()));
        assert_eq!(with(MAX_HEADERS + 1), Err(Malformed::TooManyHeaders));
    }

    #[test]
    fn trailers_say_nothing_that_belongs_before_the_body() {
        let mut trailers = HeaderMap::new();
        for name in [
            "content-length",
            "host",
            "x-forwarded-client-cert",
            "x-forwarded-for",
            "keep-alive",
            "authorization",
            "grpc-status",
            "x-sum",
        ] {
            trailers.append(name, HeaderValue::from_static("1"));
            trailers.append(name, HeaderValue::from_static("2"));
        }
        clean_trailers(&mut trailers);
        let mut left: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["grpc-status", "x-sum"]);
    }

    #[test]
    fn codings_that_nobody_could_undo_are_refused() {
        for (headers, expected) in [
            (&[("transfer-encoding", "chunked")][..], Ok(())),
            (&[("transfer-encoding", "Chunked")], Ok(())),
            (
                &[("transfer-encoding", "gzip, chunked")],
                Err(Malformed::TransferEncoding),
            ),
            (
                &[
                    ("transfer-encoding", "gzip"),
                    ("transfer-encoding", "chunked"),
                ],
                Err(Malformed::TransferEncoding),
            ),
            (
                &[("transfer-encoding", "chunked"), ("content-length", "3")],
                Err(Malformed::AmbiguousLength),
            ),
        ] {
            let mut all = vec![("host", "a")];
            all.extend_from_slice(headers);
            let mut head = head("POST", "/", &all);
            assert_eq!(normalise(&mut head, false), expected, "{headers:?}");
        }
    }

    #[test]
    fn an_upgrade_keeps_its_protocol() {
        let ask = |protocol| {
            head(
                "GET",
                "/",
                &[
                    ("host", "a"),
                    ("connection", "Upgrade"),
                    ("upgrade", protocol),
                ],
            )
        };
        let mut websocket = ask("websocket");
        assert!(wants_upgrade(&websocket));
        normalise(&mut websocket, true).expect("well-formed");
        assert_eq!(websocket.headers[UPGRADE], "websocket");
        assert_eq!(websocket.headers[CONNECTION], "upgrade");
        for other in [
            "h2c",
            "H2C",
            "h2c/2",
            "HTTP/2.0",
            "TLS/1.2",
            "websocket, h2c",
            "h2c,websocket",
            "",
        ] {
            assert!(!wants_upgrade(&ask(other)), "{other}");
        }
        let mut two = ask("websocket");
        two.headers.append(UPGRADE, HeaderValue::from_static("h2c"));
        assert!(!wants_upgrade(&two));
    }
}
