//! HTTP/2, on both sides of a request: [`server`] towards clients, [`client`] towards endpoints.
//!
//! Both stand on the `h2` crate itself, because hyper passes no informational response (1xx) in
//! either direction. Each stream belongs to the one task of its request, which also moves the
//! bodies ([`pipe`]); a connection's own task only reads and writes frames ([`wire`],
//! [`keepalive`]). [`stream`] is what is left of a stream that carries another protocol
//! (RFC 8441).
//!
//! What bounds memory: a frame of a body is read when its other side takes one, and gives its
//! window back then; of what is to be sent, one frame for each stream waits for its window.

pub mod client;
mod interim;
mod keepalive;
mod pipe;
pub mod server;
pub mod stream;
mod wire;

use http::header::{CONNECTION, TE, TRANSFER_ENCODING, UPGRADE};
use http::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue};

pub use interim::Before;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Removes what says something of a connection of HTTP/1, which a route may have added
/// (RFC 9113 8.2.2).
fn remove_connection_headers(headers: &mut HeaderMap) {
    for name in [&KEEP_ALIVE, &PROXY_CONNECTION, &TRANSFER_ENCODING, &UPGRADE] {
        headers.remove(name);
    }
    if headers.get(TE).is_some_and(|te| te != "trailers") {
        headers.remove(TE);
    }
    if let Some(named) = headers.remove(CONNECTION)
        && let Ok(named) = named.to_str()
    {
        for name in named.split(',') {
            headers.remove(name.trim());
        }
    }
}

/// The length that a head states, if it is one.
fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// States the length of a body where nothing is said of it.
fn set_content_length(headers: &mut HeaderMap, length: u64) {
    if !headers.contains_key(CONTENT_LENGTH) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
}
