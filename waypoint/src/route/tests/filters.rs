//! What a matched rule does, filters together.

use std::time::Duration;

use proto::external_auth::Protocol;
use proto::filter::Kind;

use super::*;

const LISTENER: Listener = Listener {
    tls: false,
    port: 80,
};

fn filters(kinds: Vec<Kind>) -> Filters {
    let rule = proto::HttpRule {
        filters: kinds.into_iter().map(filter).collect(),
        ..rule("r", vec![])
    };
    let route = understood(&http_route("r", vec![rule]));
    route.rules()[0].filters().clone()
}

fn inspect(filters: &Filters, sent: &Sent, random: u64) -> Inspection {
    filters.inspect(&sent.parts(), MatchedPath::Prefix(0), LISTENER, || random)
}

fn lines<'h>(headers: &'h HeaderMap, name: &str) -> Vec<&'h str> {
    let lines = headers.get_all(name).iter();
    lines.map(|line| line.to_str().expect("text")).collect()
}

/// HTTPHeaderFilter, on responses: `Set-Cookie` is the header that cannot be joined.
#[test]
fn response_headers() {
    let filters = filters(vec![Kind::ResponseHeaders(header_modifier(
        &[
            ("X-Set", "new"),
            ("x-set", "ignored: the first of equal names counts"),
        ],
        &[("X-Add", "added"), ("Set-Cookie", "b=2"), ("x-empty", "1")],
        &["X-Remove"],
    ))]);
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("x-set", "old"),
        ("x-set", "older"),
        ("x-add", "first"),
        ("x-add", "second"),
        ("set-cookie", "a=1"),
        ("x-empty", ""),
        ("x-remove", "1"),
        ("x-remove", "2"),
    ] {
        headers.append(name, HeaderValue::from_static(value));
    }
    filters.apply_response(&CorsGrant::default(), &mut headers);
    assert_eq!(lines(&headers, "x-set"), ["new"]);
    assert_eq!(lines(&headers, "x-add"), ["first", "second,added"]);
    assert_eq!(lines(&headers, "set-cookie"), ["a=1", "b=2"]);
    assert_eq!(lines(&headers, "x-empty"), ["", "1"]);
    assert!(lines(&headers, "x-remove").is_empty());
}

/// The rule's request headers first, then the backend's; the backend's URL in place of the
/// rule's, part by part, and by the path as it was matched (HTTPRouteBackendURLRewrite).
#[test]
fn a_backends_filters_come_after_the_rules() {
    let modifier = Kind::RequestHeaders;
    let rewrite = |hostname: &str, prefix: &str| {
        let kind = Some(proto::path_modifier::Kind::Prefix(prefix.into()));
        Kind::Rewrite(proto::UrlRewrite {
            hostname: hostname.into(),
            path: (!prefix.is_empty()).then_some(proto::PathModifier { kind }),
        })
    };
    let of_rule = filters(vec![
        modifier(header_modifier(&[("x-a", "rule")], &[("x-b", "rule")], &[])),
        rewrite("rule.example", "/rule"),
    ]);
    let of_backend = filters(vec![
        modifier(header_modifier(
            &[("x-a", "backend")],
            &[("x-b", "backend")],
            &[],
        )),
        rewrite("", "/backend"),
    ]);
    let mut parts = get("/app/x?q").parts();
    of_rule
        .apply_request(&mut parts, MatchedPath::Prefix(4), &of_backend)
        .expect("applied");
    assert_eq!(parts.uri, "/backend/x?q");
    assert_eq!(lines(&parts.headers, "host"), ["rule.example"]);
    assert_eq!(lines(&parts.headers, "x-a"), ["backend"]);
    assert_eq!(lines(&parts.headers, "x-b"), ["rule,backend"]);
}

/// Istio's `headers.request.set` of the host.
#[test]
fn setting_the_host_header_sets_the_authority() {
    let filters = filters(vec![Kind::RequestHeaders(header_modifier(
        &[("Host", "other.example:81")],
        &[],
        &[],
    ))]);
    let request = http::Request::get("http://echo/a")
        .body(())
        .expect("request");
    let (mut parts, ()) = request.into_parts();
    let nothing = Filters::default();
    filters
        .apply_request(&mut parts, MatchedPath::Whole, &nothing)
        .expect("applied");
    assert_eq!(parts.uri, "http://other.example:81/a");
}

/// The waypoint's own answers carry the rule's response headers too.
#[test]
fn own_answers() {
    let mark = || Kind::ResponseHeaders(header_modifier(&[("x-mark", "1")], &[], &[]));
    let redirect = filters(vec![Kind::Redirect(proto::Redirect::default()), mark()]);
    let answer = inspect(&redirect, &get("/a"), 0).answer.expect("answer");
    assert_eq!(
        (answer.status.as_u16(), &answer.reason),
        (302, &AnswerReason::Redirect)
    );
    assert_eq!(lines(&answer.headers, "location"), ["http://echo/a"]);
    assert_eq!(lines(&answer.headers, "x-mark"), ["1"]);

    let direct = filters(vec![Kind::DirectResponse(proto::DirectResponse {
        status: 418,
        body: b"tea".to_vec(),
    })]);
    let answer = inspect(&direct, &get("/a"), 0).answer.expect("answer");
    assert_eq!(
        (answer.status.as_u16(), &answer.body[..]),
        (418, &b"tea"[..])
    );
}

/// What is not understood asks nobody, and lets nothing pass: at a rule, and at a backend, which
/// is chosen too late.
#[test]
fn external_auth_that_cannot_be_used_answers_itself() {
    let good = || proto::ExternalAuth {
        backend: Some(backend("authz", 1)),
        body_max_bytes: 9,
        protocol: Some(Protocol::Http(proto::ExternalAuthHttp {
            path_prefix: "/check/".into(),
            allowed_headers: vec!["X-A".into()],
            ..Default::default()
        })),
    };
    let http = |path: &str, header: &str| {
        Some(Protocol::Http(proto::ExternalAuthHttp {
            path_prefix: path.into(),
            allowed_response_headers: vec![header.into()],
            ..Default::default()
        }))
    };
    let grpc = Some(Protocol::Grpc(proto::ExternalAuthGrpc {
        allowed_headers: vec!["a b".into()],
    }));
    let read = |auth| {
        let rule = proto::HttpRule {
            filters: vec![filter(Kind::ExternalAuth(auth))],
            ..rule("r", vec![])
        };
        let route = Route::from_proto(&http_route("r", vec![rule]));
        route.rules()[0].filters().clone()
    };
    let understood = read(good());
    let auth = understood.external_auth().expect("asked");
    assert_eq!((auth.body_limit, auth.target.port), (9, 8080));
    let AuthProtocol::Http { path_prefix, .. } = &auth.protocol else {
        panic!("{auth:?}");
    };
    assert_eq!(&**path_prefix, "/check");
    assert!(understood.invalid().is_none() && !understood.is_empty());
    for protocol in [
        None,
        http("check", "x"),
        http("/check?a=", "x"),
        http("/check", "a b"),
        grpc,
    ] {
        let bad = read(proto::ExternalAuth { protocol, ..good() });
        assert!(bad.invalid().is_some() && bad.external_auth().is_none());
        let answer = inspect(&bad, &get("/a"), 0).answer.expect("answer");
        assert_eq!(answer.status, 500);
    }
    let nobody = read(proto::ExternalAuth {
        backend: None,
        ..good()
    });
    assert!(nobody.invalid().is_some());
    let twice = filter(Kind::ExternalAuth(good()));
    let rule = |filters, backends| proto::HttpRule {
        filters,
        backends,
        ..rule("r", vec![])
    };
    let late = proto::Backend {
        filters: vec![twice.clone()],
        ..backend("v1", 1)
    };
    let route = Route::from_proto(&http_route(
        "r",
        vec![
            rule(vec![twice.clone(), twice], vec![]),
            rule(vec![], vec![late]),
        ],
    ));
    assert!(route.rules()[0].filters().invalid().is_some());
    let chosen = route.rules()[1].choose(0);
    assert!(
        matches!(chosen, Err(BackendError::Invalid(_))),
        "{chosen:?}"
    );
}

/// A redirect waits for who is asked; a preflight does not.
#[test]
fn who_is_asked_comes_before_a_redirect() {
    let cors = Kind::Cors(proto::Cors {
        allow_origins: vec!["https://a.org".into()],
        ..Default::default()
    });
    let auth = Kind::ExternalAuth(proto::ExternalAuth {
        backend: Some(backend("authz", 1)),
        protocol: Some(Protocol::Grpc(proto::ExternalAuthGrpc::default())),
        ..Default::default()
    });
    let filters = filters(vec![Kind::Redirect(proto::Redirect::default()), auth, cors]);
    let sent = get("/a").header("origin", "https://a.org");
    let inspected = inspect(&filters, &sent, 0);
    assert_eq!(inspected.answer, None);
    let path = MatchedPath::Prefix(0);
    let answer = filters
        .answer_authorized(&sent.parts(), path, LISTENER, &inspected.cors)
        .expect("answer");
    assert_eq!(answer.reason, AnswerReason::Redirect);
    let allowed = lines(&answer.headers, "access-control-allow-origin");
    assert_eq!(allowed, ["https://a.org"]);
    let preflight = sent
        .method("OPTIONS")
        .header("access-control-request-method", "GET");
    let answer = inspect(&filters, &preflight, 0).answer.expect("answer");
    assert_eq!(answer.reason, AnswerReason::CorsPreflight);
}

/// Preflights are answered before anything else; the answer to a later fault or redirect still
/// carries what the origin may know.
#[test]
fn cors_comes_first() {
    let cors = Kind::Cors(proto::Cors {
        allow_origins: vec!["https://a.org".into()],
        allow_methods: vec!["PUT".into()],
        ..Default::default()
    });
    let filters = filters(vec![Kind::Redirect(proto::Redirect::default()), cors]);
    let sent = get("/a").header("origin", "https://a.org");
    let preflight = sent
        .clone()
        .method("OPTIONS")
        .header("access-control-request-method", "PUT");
    let answer = inspect(&filters, &preflight, 0).answer.expect("answer");
    assert_eq!(answer.reason, AnswerReason::CorsPreflight);
    assert_eq!(
        lines(&answer.headers, "access-control-allow-methods"),
        ["PUT"]
    );
    let answer = inspect(&filters, &sent, 0).answer.expect("answer");
    assert_eq!(answer.reason, AnswerReason::Redirect);
    assert_eq!(
        lines(&answer.headers, "access-control-allow-origin"),
        ["https://a.org"]
    );
    // OPTIONS without the question is a request like any other.
    let answer = inspect(&filters, &sent.method("OPTIONS"), 0).answer;
    assert_eq!(answer.expect("answer").reason, AnswerReason::Redirect);
}

/// HTTPRouteRequestPercentageMirror: shares are exact, and drawn mirror by mirror.
#[test]
fn mirrors() {
    let mirror = |name: &str, per_million| {
        Kind::Mirror(proto::Mirror {
            backend: Some(backend(name, 0)),
            per_million,
        })
    };
    let filters = filters(vec![
        mirror("all", 1_000_000),
        mirror("fifth", 200_000),
        mirror("none", 0),
        mirror("more than all", u32::MAX),
    ]);
    let counts = filters.mirrors().iter().map(|mirror| {
        let draws = (0..1000_u64).map(|step| u64::MAX / 2000 * (2 * step + 1));
        draws.filter(|random| mirror.takes(*random)).count()
    });
    assert_eq!(counts.collect::<Vec<_>>(), [1000, 200, 0, 1000]);
    let hostname = &filters.mirrors()[0].target().service.hostname;
    assert_eq!(&**hostname, "all.mesh.svc.cluster.local");
}

/// HTTPFaultInjection: delay and abort have shares of their own.
#[test]
fn faults() {
    let fault = |delay_share, abort_share, grpc| {
        filters(vec![Kind::Fault(proto::Fault {
            delay: Some(prost_types::Duration {
                seconds: 3,
                nanos: 0,
            }),
            delay_per_million: delay_share,
            abort_status: 503,
            abort_grpc_status: 14,
            abort_grpc: grpc,
            abort_per_million: abort_share,
        })])
    };
    let all = 1_000_000;
    let both = inspect(&fault(all, all, false), &get("/"), 0);
    assert_eq!(both.delay, Some(Duration::from_secs(3)));
    let answer = both.answer.expect("answer");
    assert_eq!(
        (answer.status.as_u16(), answer.reason),
        (503, AnswerReason::Fault)
    );
    let grpc = inspect(&fault(0, all, true), &get("/"), 0);
    assert_eq!(grpc.delay, None);
    assert_eq!(grpc.answer.expect("answer").grpc_status, Some(14));
    let half = fault(0, all / 2, false);
    assert!(inspect(&half, &get("/"), u64::MAX / 2 - 1).answer.is_some());
    assert!(inspect(&half, &get("/"), u64::MAX / 2 + 2).answer.is_none());
}

#[test]
fn what_does_nothing() {
    assert!(Filters::default().is_empty());
    assert!(
        !filters(vec![Kind::Mirror(proto::Mirror {
            backend: Some(backend("m", 0)),
            per_million: 1,
        })])
        .is_empty()
    );
    let inspection = inspect(&Filters::default(), &get("/"), 0);
    assert!(inspection.answer.is_none() && inspection.delay.is_none());
}
