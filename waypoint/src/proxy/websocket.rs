//! The two ways to ask for another protocol, and how one becomes the other: `Upgrade` in HTTP/1
//! (RFC 9110 7.8), extended CONNECT in HTTP/2 (RFC 8441). Everything between the two ends sees
//! an upgrade: policies and routes a GET with `upgrade`, as in Envoy.

use std::sync::LazyLock;

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use h2::ext::Protocol;
use http::header::{CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::{Method, Request, Version, request};

use super::headers::is_http_itself;

const KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
/// RFC 6455 1.3.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
static WEBSOCKET: LazyLock<HeaderValue> = LazyLock::new(|| HeaderValue::from_static("websocket"));

/// Makes an extended CONNECT the request for an upgrade that it stands for; `false`: it is none.
pub fn from_extended_connect(head: &mut request::Parts) -> bool {
    if head.version != Version::HTTP_2 || head.method != Method::CONNECT {
        return false;
    }
    let protocol = head.extensions.get::<Protocol>();
    let name = protocol.map(|protocol| HeaderValue::from_str(protocol.as_str()));
    let Some(Ok(name)) = name else {
        return false;
    };
    if name.is_empty() || name.as_bytes().contains(&b',') || is_http_itself(name.as_bytes()) {
        return false;
    }
    head.method = Method::GET;
    // In HTTP/2 there is no key (RFC 8441 5.1); a server of HTTP/1 wants one.
    if name == *WEBSOCKET {
        let key = STANDARD.encode(rand::random::<[u8; 16]>());
        if let Ok(key) = HeaderValue::try_from(key) {
            head.headers.insert(KEY, key);
        }
    }
    head.headers.insert(UPGRADE, name);
    head.headers
        .insert(CONNECTION, HeaderValue::from_static("upgrade"));
    true
}

/// Makes the request for an upgrade an extended CONNECT.
pub fn to_extended_connect<B>(request: &mut Request<B>) {
    let headers = request.headers_mut();
    let protocol = headers.remove(UPGRADE);
    headers.remove(CONNECTION);
    headers.remove(KEY);
    let protocol = protocol.as_ref().and_then(|name| name.to_str().ok());
    let protocol = Protocol::from(protocol.unwrap_or_default());
    request.extensions_mut().insert(protocol);
    *request.method_mut() = Method::CONNECT;
}

/// Makes a request that was meant for HTTP/2 one for HTTP/1.
pub fn to_origin_form<B>(request: &mut Request<B>) {
    let uri = std::mem::take(request.uri_mut()).into_parts();
    let host = uri.authority.as_ref().map(|host| host.as_str());
    if let Some(Ok(host)) = host.map(HeaderValue::from_str) {
        request.headers_mut().insert(HOST, host);
    }
    if let Some(path) = uri.path_and_query {
        *request.uri_mut() = path.into();
    }
}

/// Whether a server has understood what it was asked for: its answer to the key is right
/// (RFC 6455 4.1). Without a key, or for another protocol, there is nothing to be right.
pub fn is_accepted(asked: &HeaderMap, answered: &HeaderMap) -> bool {
    match (accept_of(asked), answered.get(ACCEPT)) {
        (Some(expected), Some(given)) => expected == *given,
        (Some(_), None) => false,
        (None, _) => true,
    }
}

/// What the client of HTTP/1 has to be told that asked with this head, where its server did not
/// have to (HTTP/2).
pub fn accept(asked: &HeaderMap, answer: &mut HeaderMap) {
    if let Some(accept) = accept_of(asked) {
        answer.insert(ACCEPT, accept);
    }
}

/// Takes away what a client of HTTP/2 has not asked for.
pub fn clean(answer: &mut HeaderMap) {
    answer.remove(ACCEPT);
}

fn accept_of(asked: &HeaderMap) -> Option<HeaderValue> {
    let key = asked.get(KEY)?;
    let text = [key.as_bytes(), GUID].concat();
    let accept = STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, &text));
    HeaderValue::try_from(accept).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 6455 1.3.
    #[test]
    fn the_answer_to_a_key_is_known() {
        let mut asked = HeaderMap::new();
        let mut answered = HeaderMap::new();
        assert!(is_accepted(&asked, &answered));
        asked.insert(KEY, HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ=="));
        assert!(!is_accepted(&asked, &answered));
        accept(&asked, &mut answered);
        assert_eq!(answered[ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(is_accepted(&asked, &answered));
        answered.insert(ACCEPT, HeaderValue::from_static("x"));
        assert!(!is_accepted(&asked, &answered));
    }
}
