//! Attempts to come past a policy: each is refused with 400 or denied. The deny form of a
//! rule and the allow form are both tried, under every mode that normalises, for a server
//! may be generous in ways that the waypoint is not.

use ::http::header::{HOST, HeaderMap, HeaderValue};
use ::http::uri::Authority;

use super::support::*;
use crate::policy::http::{HostRejected, PathNormalization, normalize, request_host};
use crate::proto::waypoint as proto;

const MODES: [PathNormalization; 3] = [
    PathNormalization::Base,
    PathNormalization::MergeSlashes,
    PathNormalization::DecodeAndMergeSlashes,
];

/// Every spelling is one that some server takes for `/admin`.
const ADMIN: &[&str] = &[
    "/admin",
    "/admin?x",
    "/admin?/../public",
    "//admin",
    "///admin",
    "/./admin",
    "/.//admin",
    "/public/../admin",
    "/public/%2e%2e/admin",
    "/public/%2E./admin",
    "/public/.%2e/admin",
    "/public/..%2fadmin",
    "/public/..%2Fadmin",
    "/public/%2e%2e%2fadmin",
    "/public/..%5cadmin",
    "/public/..%5Cadmin",
    "/public\\..\\admin",
    "\\admin",
    "/\\admin",
    "/%2fadmin",
    "/%5cadmin",
    "/%61dmin",
    "/%61%64%6d%69%6e",
    "/%41dmin/../admin",
    "/admin;x=1",
    "/admin;",
    "/admin%3bx=1",
    "/;x/admin",
    "/public/..;/admin",
    "/public/..;x=y/admin",
    "/public/..%3b/admin",
    "/../admin",
    "/../../admin",
    "/public/x/../../admin",
    // Refused.
    "/public/%c0%ae%c0%ae/admin",
    "/public/..%c0%afadmin",
    "/public/..%e0%80%afadmin",
    "/public/..%f0%80%80%afadmin",
    "/%00/../admin",
    "/admin%00",
    "/admin%00.css",
    "/admin%0a",
    "/admin\u{1}",
    "/admin#",
    "/%%61dmin",
    "/%6/admin",
    "/%/../admin",
    "/admin%",
    "admin",
    "http://web.srv/admin",
];

#[test]
fn paths_that_a_server_takes_for_another() {
    let denied = [
        vec![deny(vec![paths(&["/admin"])])],
        vec![deny(vec![paths(&["/admin*"])])],
        vec![deny(vec![paths(&["*admin"])])],
        vec![deny(vec![paths(&["/{*}"])])],
        vec![deny(vec![to(proto::Operation {
            not_paths: list(&["/public*"]),
            ..Default::default()
        })])],
        vec![deny(vec![when(
            "request.headers[:path]",
            &["/admin*"],
            &[],
        )])],
        vec![allow(vec![paths(&["/public*"])])],
        vec![allow(vec![paths(&["/public/*"])])],
        vec![allow(vec![paths(&["/public/{**}"])])],
        vec![allow(vec![paths(&["*.css"])])],
        vec![allow(vec![to(proto::Operation {
            not_paths: list(&["/admin"]),
            ..Default::default()
        })])],
        vec![allow(vec![when(
            "request.headers[:path]",
            &["/public*"],
            &[],
        )])],
    ];
    for mode in MODES {
        for target in ADMIN {
            let call = get(target).mode(mode);
            for (at, policies) in denied.iter().enumerate() {
                let set = set(policies);
                let verdict =
                    call.with(|request| set.evaluate_deny_allow(request, &Default::default()));
                let served = verdict.is_ok_and(|evaluation| evaluation.verdict.is_permitted());
                assert!(!served, "{target:?} under {mode:?} passes policy {at}");
            }
        }
    }
}

#[test]
fn an_extension_behind_a_parameter_opens_nothing() {
    let only_css = [allow(vec![paths(&["*.css"])])];
    assert!(get("/style.css").permitted(&only_css));
    for target in [
        "/admin;.css",
        "/admin;x=.css",
        "/admin/;a.css",
        "/admin%3b.css",
    ] {
        assert!(!get(target).permitted(&only_css), "{target}");
    }
}

#[test]
fn ordinary_paths_are_not_caught() {
    let allowed = [allow(vec![paths(&[
        "/files/*",
        "/a%20b",
        "/m;v=1",
        "/caf%C3%A9",
    ])])];
    for target in [
        "/files/a%20b",
        "/files/%E4%B8%AD",
        "/files/caf%e9",
        "/files/100%25",
        "/files/a;b",
        "/files/x/../y",
        "/a%20b",
        "/m;v=1",
        "/caf%C3%A9",
    ] {
        assert!(get(target).permitted(&allowed), "{target}");
    }
    let denied = [deny(vec![paths(&["/admin"])])];
    for target in ["/Admin", "/admin2", "/admin/", "/x/admin", "/%25%61dmin"] {
        // Paths are case-sensitive (RFC 3986 6.2.2.1), and a trailing slash is another path.
        assert!(get(target).permitted(&denied), "{target}");
    }
    // But what is not listed stays closed, whatever the case.
    assert!(!get("/Files/x").permitted(&allowed));
}

#[test]
fn hosts_in_other_words() {
    for host in [
        "web.srv",
        "WEB.SRV",
        "Web.Srv",
        "web.srv.",
        "web.srv:80",
        "web.srv.:80",
        "web.srv:",
        "WEB.SRV.:0080",
    ] {
        for policies in [
            [deny(vec![hosts(&["web.srv"])])],
            [deny(vec![hosts(&["WEB.srv."])])],
            [deny(vec![hosts(&["*.srv"])])],
            [deny(vec![hosts(&["web*"])])],
            [deny(vec![when("request.headers[host]", &["web.srv"], &[])])],
            [allow(vec![to(proto::Operation {
                not_hosts: list(&["web.srv"]),
                ..Default::default()
            })])],
        ] {
            assert!(!get("/").host(host).permitted(&policies), "{host}");
        }
        assert!(
            get("/")
                .host(host)
                .permitted(&[allow(vec![hosts(&["web.srv"])])])
        );
    }
    for host in [
        "web.srv.evil",
        "evil-web.srv",
        "",
        "web",
        "web.srv@evil",
        "[::1]",
    ] {
        let policies = [allow(vec![hosts(&["web.srv"])])];
        assert!(!get("/").host(host).permitted(&policies), "{host}");
    }
    let with_port = [deny(vec![hosts(&["web.srv:8080"])])];
    assert!(!get("/").host("web.srv.:08080").permitted(&with_port));
    assert!(
        !get("/")
            .host("[::1]:80")
            .permitted(&[deny(vec![hosts(&["[::1]"])])])
    );
}

#[test]
fn methods_in_other_words() {
    let no_delete = || [deny(vec![methods(&["DELETE"])])];
    let only_post = || [allow(vec![methods(&["POST"])])];
    let all_but_delete = || {
        [allow(vec![to(proto::Operation {
            not_methods: list(&["DELETE"]),
            ..Default::default()
        })])]
    };
    for call in [
        get("/").method("DELETE"),
        get("/").method("delete"),
        get("/").method("Delete"),
        get("/")
            .method("POST")
            .header("x-http-method-override", "DELETE"),
        get("/")
            .method("POST")
            .header("x-http-method-override", "delete"),
        get("/").method("POST").header("x-http-method", "DELETE"),
        get("/")
            .method("POST")
            .header("x-method-override", "DELETE"),
        // Which of several lines counts is the application's choice.
        get("/")
            .method("POST")
            .header("x-http-method-override", "POST")
            .header("x-http-method-override", "DELETE"),
    ] {
        assert!(!call.permitted(&no_delete()), "{}", call.method);
        assert!(!call.permitted(&only_post()), "{}", call.method);
        assert!(!call.permitted(&all_but_delete()), "{}", call.method);
    }
    assert!(get("/").method("POST").permitted(&only_post()));
    let same = get("/")
        .method("POST")
        .header("x-http-method-override", "POST");
    assert!(same.permitted(&only_post()));
    // Only POST is overridden.
    assert!(
        get("/")
            .header("x-http-method-override", "DELETE")
            .permitted(&no_delete())
    );
}

#[test]
fn repeated_headers() {
    let evil = [deny(vec![when("request.headers[x-user]", &["root"], &[])])];
    let call = get("/").header("x-user", "bob").header("x-user", "root");
    assert!(!call.permitted(&evil));
    let call = get("/").header("x-user", "root").header("x-user", "bob");
    assert!(!call.permitted(&evil));
    // Names are case-insensitive, in the policy as on the wire.
    let upper = [deny(vec![when("request.headers[X-USER]", &["root"], &[])])];
    assert!(!get("/").header("x-user", "root").permitted(&upper));
}

#[test]
fn more_than_one_host() {
    let headers = |lines: &[&str]| {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(HOST, HeaderValue::from_str(line).expect("a value"));
        }
        headers
    };
    let authority = |text: &str| Authority::try_from(text).expect("an authority");
    let two = headers(&["a", "b"]);
    assert_eq!(
        request_host(None, &two, false),
        Err(HostRejected::Duplicate)
    );
    let same = headers(&["a", "a"]);
    assert_eq!(
        request_host(None, &same, false),
        Err(HostRejected::Duplicate)
    );
    // RFC 9112 3.2.2: the absolute form wins, and Host is sent to match it.
    let one = headers(&["a"]);
    let b = authority("b");
    assert_eq!(request_host(Some(&b), &one, false), Ok("b"));
    assert_eq!(
        request_host(Some(&b), &one, true),
        Err(HostRejected::Different)
    );
    assert_eq!(request_host(None, &one, false), Ok("a"));
    assert_eq!(request_host(None, &headers(&[]), false), Ok(""));
    for bad in ["a b", "a/b", "a,b", "user@a", "a#b", "a?b"] {
        let bad = headers(&[bad]);
        assert_eq!(
            request_host(None, &bad, false),
            Err(HostRejected::Malformed),
            "{bad:?}"
        );
    }
}

#[test]
fn what_is_judged_is_what_is_sent() {
    let path = normalize("/public/%2e%2e//%61dmin", PathNormalization::MergeSlashes);
    let path = path.expect("a path");
    assert_eq!(path.as_str(), "/admin");
    assert!(path.is_changed());
    // Whatever a server might have made of it: this is what it gets.
    for raw in ["/public//../admin", "/public/.;/../admin"] {
        let path = normalize(raw, PathNormalization::Base).expect("a path");
        assert_eq!(path.as_str(), "/public/admin");
    }
    let plain = normalize("/a/b", PathNormalization::Base).expect("a path");
    assert!(!plain.is_changed());
    assert_eq!(plain.other_reading(), None);
}
