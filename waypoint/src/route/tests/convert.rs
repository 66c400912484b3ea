//! What cannot be understood answers 500 where it stands, and is listed with its field.

use super::*;

const LISTENER: Listener = Listener {
    tls: false,
    port: 80,
};

/// What `sent` gets from `route`: a rule's name, or why it is answered with 500.
fn gets(route: &Route, sent: &Sent) -> Result<String, String> {
    let table = HttpTable::new([route]);
    let Lookup::Matched(matched) = table.find(&sent.view()) else {
        return Ok("404".to_owned());
    };
    if let Some(reason) = matched.invalid() {
        return Err(reason.to_string());
    }
    let filters = matched.rule.filters();
    let inspection = filters.inspect(&sent.parts(), matched.path, LISTENER, || 0);
    if let Some(answer) = inspection.answer
        && let AnswerReason::Invalid(reason) = answer.reason
    {
        assert_eq!(answer.status, 500);
        return Err(reason.to_string());
    }
    match matched.rule.choose(0) {
        Ok(_) => Ok(matched.rule.name().unwrap_or_default().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn problems(route: &Route) -> Vec<String> {
    route.problems().iter().map(ToString::to_string).collect()
}

/// A rule with one thing wrong next to a good one, and what is told.
#[test]
fn one_thing_wrong() {
    use proto::filter::Kind;
    let matching = |of: proto::HttpMatch| rule("bad", vec![of]);
    let filtering = |kind: Option<Kind>| proto::HttpRule {
        filters: vec![proto::Filter { kind }],
        ..rule("bad", vec![path("/bad")])
    };
    let to = |to: Option<proto::backend::To>| proto::HttpRule {
        backends: vec![proto::Backend {
            weight: 1,
            to,
            filters: vec![],
        }],
        ..rule("bad", vec![path("/bad")])
    };
    let headers = |set: &[(&str, &str)], remove: &[&str]| {
        filtering(Some(Kind::RequestHeaders(header_modifier(
            set,
            &[],
            remove,
        ))))
    };
    let rewrite = |text: &str| {
        let kind = Some(proto::path_modifier::Kind::Full(text.into()));
        filtering(Some(Kind::Rewrite(proto::UrlRewrite {
            hostname: String::new(),
            path: Some(proto::PathModifier { kind }),
        })))
    };
    let redirect = |redirect| filtering(Some(Kind::Redirect(redirect)));
    let negative = || {
        Some(prost_types::Duration {
            seconds: -1,
            nanos: 0,
        })
    };
    let bad_backend = {
        let mut rule = rule("bad", vec![path("/bad")]);
        rule.backends[0].filters = vec![proto::Filter { kind: None }];
        rule
    };
    let answering_backend = {
        let mut rule = rule("bad", vec![path("/bad")]);
        rule.backends[0].filters = vec![filter(Kind::Redirect(Default::default()))];
        rule
    };
    let no_value = proto::HttpMatch {
        headers: vec![proto::NameMatch {
            name: "x".into(),
            value: None,
            invert: true,
        }],
        ..path("/bad")
    };
    for (rule, field) in [
        (matching(path("~/bad[")), "matches[0].path_regex"),
        (
            matching(with_method(path("/bad"), "G T")),
            "matches[0].method",
        ),
        (matching(path("=bad")), "matches[0].exact"),
        (matching(path("bad")), "matches[0].prefix"),
        (
            matching(with_headers(path("/bad"), &[("a b", "1")])),
            "matches[0].headers[0].name",
        ),
        (matching(no_value), "matches[0].headers[0].value"),
        (
            matching(with_query(path("/bad"), &[("", "1")])),
            "matches[0].query_params[0]",
        ),
        (filtering(None), "filters[0]"),
        (headers(&[("a b", "1")], &[]), "filters[0].set"),
        (headers(&[("a", "1\n2")], &[]), "filters[0].set"),
        (headers(&[("Content-Length", "1")], &[]), "filters[0].set"),
        (headers(&[], &["Transfer-Encoding"]), "filters[0].remove"),
        (headers(&[], &["host"]), "filters[0].remove"),
        (headers(&[("host", "a b")], &[]), "filters[0].set.hostname"),
        (rewrite("no-slash"), "filters[0].path"),
        (rewrite("/a b"), "filters[0].path"),
        (rewrite("/a?b"), "filters[0].path"),
        (
            redirect(proto::Redirect {
                status: 200,
                ..Default::default()
            }),
            "filters[0].status",
        ),
        (
            redirect(proto::Redirect {
                scheme: "ftp".into(),
                ..Default::default()
            }),
            "filters[0].scheme",
        ),
        (
            redirect(proto::Redirect {
                port: 65_536,
                ..Default::default()
            }),
            "filters[0].port",
        ),
        (
            redirect(proto::Redirect {
                hostname: "a/b".into(),
                ..Default::default()
            }),
            "filters[0].hostname",
        ),
        (
            filtering(Some(Kind::DirectResponse(proto::DirectResponse {
                status: 101,
                body: vec![],
            }))),
            "filters[0].status",
        ),
        (
            filtering(Some(Kind::Cors(proto::Cors {
                allow_origins: vec!["nowhere".into()],
                ..Default::default()
            }))),
            "filters[0].allow_origins",
        ),
        (to(None), "backends[0]"),
        (
            to(Some(proto::backend::To::Service(Default::default()))),
            "backends[0]",
        ),
        (bad_backend, "backends[0].filters[0]"),
        (answering_backend, "backends[0].filters"),
        (
            proto::HttpRule {
                request_timeout: negative(),
                ..rule("bad", vec![path("/bad")])
            },
            "request_timeout",
        ),
    ] {
        let good = self::rule("good", vec![path("/good")]);
        let route = Route::from_proto(&http_route("r", vec![rule, good]));
        let found = problems(&route);
        assert_eq!(found.len(), 1, "{found:?}");
        let field = format!("http.rules[0].{field}: ");
        assert!(found[0].starts_with(&field), "{found:?} {field}");
        let reason = gets(&route, &get("/bad")).expect_err(&field);
        assert!(reason.contains(&found[0]), "{reason} {found:?}");
        assert_eq!(gets(&route, &get("/good")).as_deref(), Ok("good"));
    }
}

/// What the control plane sends as invalid answers 500 likewise, and is no problem to tell it.
#[test]
fn what_is_sent_as_invalid() {
    let gone = || "gone".to_owned();
    let of_filter = proto::HttpRule {
        filters: vec![filter(proto::filter::Kind::Invalid(gone()))],
        ..rule("r", vec![])
    };
    let of_backend = proto::HttpRule {
        backends: vec![proto::Backend {
            weight: 1,
            to: Some(proto::backend::To::Invalid(gone())),
            filters: vec![],
        }],
        ..rule("r", vec![])
    };
    let of_rule = proto::HttpRule {
        invalid: gone(),
        ..rule("r", vec![])
    };
    for (rule, expected) in [
        (of_filter, "http.rules[0].filters[0]: gone"),
        (
            of_backend,
            "invalid backend: http.rules[0].backends[0]: gone",
        ),
        (of_rule, "http.rules[0]: gone"),
    ] {
        let route = understood(&http_route("r", vec![rule]));
        assert_eq!(gets(&route, &get("/")), Err(expected.to_owned()));
    }
}

/// A bad pattern answers for what it can have meant, not for the whole service.
#[test]
fn a_bad_pattern_narrows_by_its_beginning() {
    let rules = vec![
        rule("bad", vec![path("~/api/v1/["), path("/also")]),
        rule("good", vec![path("/")]),
    ];
    let route = Route::from_proto(&http_route("r", rules));
    assert!(gets(&route, &get("/api/v1/users")).is_err());
    assert_eq!(gets(&route, &get("/api/v2")).as_deref(), Ok("good"));
    // The rule's other match is as good as it was.
    assert_eq!(gets(&route, &get("/also")).as_deref(), Ok("bad"));
}

/// Filters that exclude each other, or stand twice.
#[test]
fn incompatible_filters() {
    use proto::filter::Kind;
    let redirect = || filter(Kind::Redirect(Default::default()));
    let rewrite = || filter(Kind::Rewrite(Default::default()));
    let direct = || {
        filter(Kind::DirectResponse(proto::DirectResponse {
            status: 200,
            body: vec![],
        }))
    };
    for filters in [
        vec![redirect(), rewrite()],
        vec![redirect(), direct()],
        vec![rewrite(), direct()],
        vec![redirect(), redirect()],
        vec![rewrite(), rewrite()],
    ] {
        let rule = proto::HttpRule {
            filters,
            ..rule("r", vec![])
        };
        let route = Route::from_proto(&http_route("r", vec![rule]));
        assert_eq!(route.problems().len(), 1);
        assert!(gets(&route, &get("/")).is_err());
    }
}

/// HTTPRequestMirrorFilter: an invalid backend "must be dropped", the requests go on.
#[test]
fn a_mirror_without_backend_is_left_out() {
    let mirror = proto::Mirror {
        backend: None,
        per_million: 1_000_000,
    };
    let rule = proto::HttpRule {
        filters: vec![filter(proto::filter::Kind::Mirror(mirror))],
        ..rule("r", vec![])
    };
    let route = Route::from_proto(&http_route("r", vec![rule]));
    assert_eq!(
        problems(&route),
        ["http.rules[0].filters[0]: names nothing"]
    );
    assert_eq!(gets(&route, &get("/")).as_deref(), Ok("r"));
    assert!(route.rules()[0].filters().mirrors().is_empty());
}

/// HTTPRouteNoBackendRefs: 500, and no problem of the route's.
#[test]
fn no_backends() {
    let rule = proto::HttpRule {
        backends: vec![],
        ..rule("r", vec![])
    };
    let route = Route::from_proto(&http_route("r", vec![rule]));
    assert!(route.problems().is_empty());
    assert_eq!(
        gets(&route, &get("/")),
        Err("the rule has no backends".to_owned())
    );
}

/// A route of no known type closes or answers what its kind was meant for.
#[test]
fn a_route_of_no_type() {
    for (kind, expected) in [
        ("HTTPRoute", RouteKind::Http),
        ("GRPCRoute", RouteKind::Grpc),
        ("TLSRoute", RouteKind::Tls),
        ("TCPRoute", RouteKind::Tcp),
        ("", RouteKind::Http),
    ] {
        let mut route = http_route("r", vec![]);
        route.object = object(kind, "mesh", "r");
        route.kind = None;
        let route = Arc::new(Route::from_proto(&route));
        assert_eq!(route.kind(), expected);
        assert_eq!(problems(&route), ["kind: not known"]);
        let routes = ServiceRoutes::build(&echo(), [Arc::clone(&route)]);
        match routes.for_port(80, "mesh") {
            PortRoutes::Http(_) => assert!(gets(&route, &get("/")).is_err()),
            PortRoutes::Tls(table) | PortRoutes::Tcp(table) => {
                let refused = table.rule().choose(0).expect_err("refused");
                assert_eq!(refused, BackendError::Invalid("kind: not known".into()));
            }
            PortRoutes::None => panic!("nothing is attached"),
        }
    }
    // Without rules a TCPRoute is not the same as none.
    let mut route = http_route("r", vec![]);
    route.kind = Some(proto::route::Kind::Tcp(proto::L4Rules::default()));
    let routes = ServiceRoutes::build(&echo(), [Arc::new(Route::from_proto(&route))]);
    assert!(
        matches!(routes.for_port(80, "mesh"), PortRoutes::Tcp(table) if table.rule().choose(0).is_err())
    );
}

/// timeouts: "0s" disables.
#[test]
fn zero_is_no_timeout() {
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let rule = proto::HttpRule {
        request_timeout: seconds(0),
        backend_request_timeout: seconds(2),
        ..rule("r", vec![])
    };
    let route = understood(&http_route("r", vec![rule]));
    let timeouts = route.rules()[0].timeouts();
    assert_eq!(timeouts.request, None);
    assert_eq!(
        timeouts.backend_request,
        Some(std::time::Duration::from_secs(2))
    );
}
