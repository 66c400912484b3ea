//! What of a request is hashed.

use std::net::IpAddr;

use http::{HeaderMap, Uri};

use super::*;

fn hash(key: &HashKey, headers: &[(&'static str, &str)], uri: &str, source: &str) -> Hashed {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, value.parse().expect("a value"));
    }
    let uri: Uri = uri.parse().expect("a URI");
    let source: IpAddr = source.parse().expect("an address");
    key.hash(&map, &uri, source, &mut SmallRng::seed_from_u64(3))
}

fn cookie(ttl: Option<u64>, path: &str) -> HashKey {
    HashKey::Cookie(HashCookie {
        name: "user".into(),
        path: path.into(),
        ttl: ttl.map(Duration::from_secs),
    })
}

#[test]
fn the_same_part_gives_the_same_hash() {
    let header = HashKey::Header("x-user".parse().expect("a name"));
    let query = HashKey::QueryParameter("u".into());
    let source = HashKey::SourceIp;
    let none = cookie(None, "");
    type Request<'a> = (&'a [(&'static str, &'a str)], &'a str, &'a str);
    // Two requests, and whether their hashes agree.
    let table: [(&HashKey, Request<'_>, Request<'_>, bool); 14] = [
        (
            &header,
            (&[("x-user", "a")], "/", "::1"),
            (&[("x-user", "a")], "/x", "::2"),
            true,
        ),
        (
            &header,
            (&[("x-user", "a")], "/", "::1"),
            (&[("x-user", "b")], "/", "::1"),
            false,
        ),
        (
            &header,
            (&[("x-user", "a"), ("x-user", "b")], "/", "::1"),
            (&[("x-user", "b"), ("x-user", "a")], "/", "::1"),
            true,
        ),
        (
            &header,
            (&[("x-user", "ab"), ("x-user", "c")], "/", "::1"),
            (&[("x-user", "a"), ("x-user", "bc")], "/", "::1"),
            false,
        ),
        (
            &header,
            (&[("x-user", "")], "/", "::1"),
            (&[("x-user", "a")], "/", "::1"),
            false,
        ),
        (
            &query,
            (&[], "/?u=1&v=2", "::1"),
            (&[], "/y?v=3&u=1", "::1"),
            true,
        ),
        (&query, (&[], "/?u=1", "::1"), (&[], "/?u=2", "::1"), false),
        (&query, (&[], "/?u", "::1"), (&[], "/?u=", "::1"), true),
        (
            &source,
            (&[], "/", "10.0.0.1"),
            (&[("x-user", "a")], "/x", "::ffff:10.0.0.1"),
            true,
        ),
        (
            &source,
            (&[], "/", "10.0.0.1"),
            (&[], "/", "10.0.0.2"),
            false,
        ),
        (
            &none,
            (&[("cookie", "a=b; user=x")], "/", "::1"),
            (&[("cookie", "user=\"x\"")], "/", "::1"),
            true,
        ),
        (
            &none,
            (&[("cookie", "user=x")], "/", "::1"),
            (&[("cookie", "user=y")], "/", "::1"),
            false,
        ),
        (
            &none,
            (&[("cookie", "superuser=y; user=x")], "/", "::1"),
            (&[("cookie", "user=x; user=y")], "/", "::1"),
            true,
        ),
        (
            &none,
            (&[("cookie", "a=1"), ("cookie", "user=x")], "/", "::1"),
            (&[("cookie", "user=x;")], "/", "::1"),
            true,
        ),
    ];
    for (key, first, second, equal) in table {
        let hash = |(headers, uri, source): Request<'_>| hash(key, headers, uri, source).hash;
        let (a, b) = (hash(first), hash(second));
        assert!(a.is_some() && b.is_some(), "{key:?} {first:?} {second:?}");
        assert_eq!(a == b, equal, "{key:?} {first:?} {second:?}");
    }
}

#[test]
fn a_request_without_it_has_no_hash() {
    let header = HashKey::Header("x-user".parse().expect("a name"));
    let query = HashKey::QueryParameter("u".into());
    for key in [header, query, cookie(None, "/")] {
        assert_eq!(
            hash(&key, &[("cookie", "a=b")], "/?uu=1", "::1"),
            Hashed::default()
        );
    }
}

#[test]
fn a_cookie_is_made_so_that_the_client_comes_back() {
    for (ttl, path, attributes) in [
        (60, "/shop", "; Max-Age=60; Path=/shop; HttpOnly"),
        (0, "/", "; Path=/; HttpOnly"),
        (1, "", "; Max-Age=1; HttpOnly"),
    ] {
        let key = cookie(Some(ttl), path);
        let first = hash(&key, &[], "/", "::1");
        let made = first.set_cookie.expect("a cookie");
        let made = made.to_str().expect("ASCII");
        assert!(made.ends_with(attributes), "{made}");
        let (pair, _) = made.split_once(';').expect("attributes");
        let again = hash(&key, &[("cookie", pair)], "/", "::1");
        assert_eq!((again.hash, again.set_cookie), (first.hash, None));
    }
}
