//! What a waypoint promises of the heads that it passes on. The fuzz target and the replay of
//! its corpus in plain tests both call [`check`].
//!
//! The input is lines: flags, method and target, then headers (`name: value`). What the types
//! of `http` do not accept never gets past the parsers and is skipped.

use adit_waypoint::proxy::headers::{clean_trailers, normalise, wants_upgrade};
use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING,
    UPGRADE,
};
use http::{Method, Request, Uri, Version, request};

/// Headers that end with a connection (RFC 9110 7.6.1).
const HOP_BY_HOP: [&str; 6] = [
    "keep-alive",
    "proxy-connection",
    "http2-settings",
    "transfer-encoding",
    "x-envoy-peer-metadata",
    "x-envoy-peer-metadata-id",
];

/// Brings one head into its form. Panics if a promise is broken.
pub fn check(input: &[u8]) {
    let Some(mut head) = parse(input) else {
        return;
    };
    let came = head.headers.clone();
    trailers(came.clone());
    let upgrade = wants_upgrade(&head);
    if normalise(&mut head, upgrade).is_err() {
        return;
    }
    let headers = &head.headers;
    // One host, at one place.
    assert_eq!(
        (head.uri.authority(), head.uri.scheme()),
        (None, None),
        "origin form"
    );
    let hosts: Vec<_> = headers.get_all(HOST).iter().collect();
    match hosts[..] {
        [] => assert_eq!(head.version, Version::HTTP_10, "a host"),
        [host] => {
            let host = host.to_str().expect("a host is ASCII");
            let authority = host.parse::<http::uri::Authority>().expect("an authority");
            assert_eq!(authority.as_str(), host, "all of it");
            assert!(
                !host.contains(['@', '/', '?', '#', ',', ' ']),
                "nothing else"
            );
        }
        _ => panic!("more than one host"),
    }
    let path = head.uri.path();
    let asterisk = path == "*" && head.method == Method::OPTIONS;
    assert!(path.starts_with('/') || asterisk, "a path");
    assert_ne!(head.method, Method::CONNECT, "no tunnel");
    // Nothing of the connection.
    for name in HOP_BY_HOP {
        assert!(!headers.contains_key(name), "{name}");
    }
    assert!(headers.get(TE).is_none_or(|te| te == "trailers"), "te");
    match upgrade {
        true => {
            assert_eq!(
                headers.get(CONNECTION).map(HeaderValue::as_bytes),
                Some(&b"upgrade"[..])
            );
            assert_eq!(headers.get(UPGRADE), came.get(UPGRADE), "the protocol");
        }
        false => assert!(
            !headers.contains_key(CONNECTION) && !headers.contains_key(UPGRADE),
            "no upgrade"
        ),
    }
    assert!(
        !(came.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH)),
        "one length"
    );
    assert_eq!(
        came.contains_key(CONTENT_LENGTH),
        headers.contains_key(CONTENT_LENGTH),
        "the length stays"
    );
    // Nothing is invented.
    for name in headers
        .keys()
        .filter(|name| ![HOST, TE, CONNECTION].contains(name))
    {
        assert!(
            headers.get_all(name).iter().eq(came.get_all(name)),
            "{name}"
        );
    }
    // A second hop like ours finds nothing more to do.
    let before = (head.uri.clone(), head.headers.clone());
    let again = wants_upgrade(&head);
    assert_eq!(normalise(&mut head, again), Ok(()), "it is accepted again");
    assert_eq!((head.uri, head.headers), before, "and stays as it is");
}

fn trailers(mut trailers: HeaderMap) {
    let came = trailers.clone();
    clean_trailers(&mut trailers);
    for name in HOP_BY_HOP {
        assert!(!trailers.contains_key(name), "{name}");
    }
    for name in [HOST, CONTENT_LENGTH, CONNECTION, TE, UPGRADE] {
        assert!(!trailers.contains_key(&name), "{name}");
    }
    for name in trailers.keys() {
        assert!(
            trailers.get_all(name).iter().eq(came.get_all(name)),
            "{name}"
        );
    }
}

fn parse(input: &[u8]) -> Option<request::Parts> {
    let (flags, input) = input.split_first()?;
    let mut lines = input.split(|b| *b == b'\n');
    let line = lines.next()?;
    let space = line.iter().position(|b| *b == b' ')?;
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(&line[..space]).ok()?;
    *request.uri_mut() = Uri::try_from(&line[space + 1..]).ok()?;
    *request.version_mut() = match flags % 4 {
        0 => Version::HTTP_10,
        1 => Version::HTTP_2,
        _ => Version::HTTP_11,
    };
    for line in lines {
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            continue;
        };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            request.headers_mut().append(name, value);
        }
    }
    Some(request.into_parts().0)
}
