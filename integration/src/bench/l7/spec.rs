//! What the bench tells its own load generator and upstream, and what it hears back: JSON on
//! the command line and on standard output.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// HTTP/1.1, one request at a time on a connection that stays open.
    Http1,
    /// HTTP/2, prior knowledge.
    Http2,
    /// Unary gRPC calls.
    Grpc,
}

/// How a client reaches its target: as a ztunnel does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hbone {
    /// The waypoint.
    pub waypoint: SocketAddr,
    /// Client connections that share an HBONE connection.
    pub share: usize,
    /// Directory of the authority that the client's certificate is from.
    pub ca: PathBuf,
}

/// One load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadSpec {
    /// What the client dials: a proxy, or with `hbone` a service.
    pub target: SocketAddr,
    /// How it gets there; `None`: directly.
    pub hbone: Option<Hbone>,
    /// What it speaks.
    pub protocol: Protocol,
    /// Connections.
    pub connections: usize,
    /// Requests at a time on each, for HTTP/2 and gRPC.
    pub streams: usize,
    /// `Host` of the requests.
    pub host: String,
    /// Requests go to `/r0/` up to `/r<routes - 1>/`.
    pub routes: usize,
    /// Size of the answers, bytes.
    pub body: usize,
    /// How long.
    pub seconds: f64,
    /// Requests per second, whether or not earlier ones have been answered; `None`: each
    /// connection sends when it has its answer.
    pub rate: Option<f64>,
}

/// What a load came to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LoadResult {
    /// Answered with 200 and a whole body.
    pub requests: u64,
    /// Everything else.
    pub failures: u64,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Microseconds; with a rate, from when the request was due.
    pub p50: f64,
    /// 99 of 100 are faster.
    pub p99: f64,
    /// 999 of 1000 are faster.
    pub p999: f64,
    /// The first failure, in words.
    pub failure: Option<String>,
}

/// Where the upstream listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamSpec {
    /// HTTP/1.1 here, HTTP/2 on the next port, both in plaintext.
    pub plain: SocketAddr,
    /// HBONE, as the node of a pod serves it; the port of a CONNECT decides as above.
    pub hbone: SocketAddr,
    /// Directory of the authority.
    pub ca: PathBuf,
}

impl UpstreamSpec {
    /// Port of HTTP/1.1.
    pub const HTTP1: u16 = 8080;
    /// Port of HTTP/2.
    pub const HTTP2: u16 = 8081;
}

/// A request's path: its first segment is what routes match, its last one asks the upstream
/// for a body of that size.
pub fn path(route: usize, body: usize) -> String {
    format!("/r{route}/b{body}")
}

/// Size of the body that a path asks for.
pub fn body_of(path: &[u8]) -> usize {
    let path = path.split(|b| *b == b'?').next().unwrap_or_default();
    let last = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    let digits = last.strip_prefix(b"b").unwrap_or_default();
    let digits = std::str::from_utf8(digits).unwrap_or_default();
    digits.parse::<usize>().unwrap_or(0).min(MAX_BODY)
}

/// The largest body that the upstream sends.
pub const MAX_BODY: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_how_long_the_answer_is() {
        assert_eq!(body_of(path(17, 65_536).as_bytes()), 65_536);
        assert_eq!(body_of(b"/r1/b12?x=1"), 12);
        assert_eq!(body_of(b"/r1/items"), 0);
        assert_eq!(body_of(b"/b99999999999999999999999"), 0);
        assert_eq!(body_of(b"/b99999999"), MAX_BODY);
    }
}
