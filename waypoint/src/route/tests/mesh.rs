//! The mesh tests of the Gateway API v1.7.0 conformance suite, as far as they are decided here.
//! Each test has the name of the suite's.

use super::*;

/// What a request gets, in one word.
fn outcome(routes: PortRoutes<'_>, sent: &Sent, random: u64) -> String {
    let PortRoutes::Http(table) = routes else {
        return "endpoints".to_owned();
    };
    let Lookup::Matched(matched) = table.find(&sent.view()) else {
        return "404".to_owned();
    };
    if matched.invalid().is_some() {
        return "500".to_owned();
    }
    let listener = Listener {
        tls: false,
        port: 80,
    };
    let filters = matched.rule.filters();
    let inspection = filters.inspect(&sent.parts(), matched.path, listener, || 0);
    if let Some(answer) = inspection.answer {
        return answer.status.as_str().to_owned();
    }
    match matched.rule.choose(random) {
        Ok(backend) => {
            let hostname = &backend.target().service.hostname;
            hostname.split('.').next().unwrap_or_default().to_owned()
        }
        Err(_) => "500".to_owned(),
    }
}

fn attached(routes: &[proto::Route]) -> ServiceRoutes {
    ServiceRoutes::build(&echo(), routes.iter().map(understood))
}

fn to(routes: &ServiceRoutes, sent: &Sent) -> String {
    outcome(routes.for_port(80, "mesh"), sent, 0)
}

fn assert_all(routes: &ServiceRoutes, cases: &[(Sent, &str)]) {
    for (sent, expected) in cases {
        assert_eq!(to(routes, sent), *expected, "{sent:?}");
    }
}

/// A rule to the backend `name` for these matches.
fn matched(name: &str, matches: Vec<proto::HttpMatch>) -> proto::HttpRule {
    rule(name, matches)
}

#[test]
fn mesh_basic() {
    assert_eq!(to(&attached(&[]), &get("/")), "endpoints");
}

#[test]
fn mesh_http_route_simple_same_namespace() {
    let routes = attached(&[http_route("r", vec![matched("echo-v1", vec![])])]);
    assert_all(&routes, &[(get("/"), "echo-v1")]);
    let PortRoutes::Http(table) = routes.for_port(80, "other") else {
        panic!("a producer route holds for every caller");
    };
    let Lookup::Matched(found) = table.find(&get("/").view()) else {
        panic!("matches");
    };
    assert_eq!(found.rule.choose(9).expect("backend").target().port, 8080);
}

#[test]
fn mesh_http_route_matching() {
    let version = with_headers(path(""), &[("version", "two")]);
    let routes = attached(&[http_route(
        "r",
        vec![
            matched(
                "echo-v1",
                vec![path("/"), with_headers(path(""), &[("version", "one")])],
            ),
            matched("echo-v2", vec![path("/v2"), version]),
        ],
    )]);
    assert_all(
        &routes,
        &[
            (get("/"), "echo-v1"),
            (get("/example"), "echo-v1"),
            (get("/").header("Version", "one"), "echo-v1"),
            (get("/v2"), "echo-v2"),
            (get("/v2example"), "echo-v1"),
            (get("/foo/v2"), "echo-v1"),
            (get("/").header("version", "two"), "echo-v2"),
            (get("/v2/").header("version", "one"), "echo-v2"),
            (get("/foo/v2/example"), "echo-v1"),
        ],
    );
}

#[test]
fn mesh_traffic_split() {
    let routes = attached(&[http_route(
        "r",
        vec![
            matched("echo-v1", vec![path("=/v1")]),
            matched("echo-v2", vec![path("=/v2")]),
        ],
    )]);
    assert_all(
        &routes,
        &[
            (get("/v1"), "echo-v1"),
            (get("/v2"), "echo-v2"),
            (get("/v2/"), "404"),
        ],
    );
}

/// MeshHTTPRouteWeight and MeshGRPCRouteWeight: 70/30 over 500 requests, 5 points either way.
#[test]
fn mesh_route_weight() {
    let backends = vec![backend("echo-v1", 70), backend("echo-v2", 30)];
    let http = http_route(
        "r",
        vec![proto::HttpRule {
            backends: backends.clone(),
            ..Default::default()
        }],
    );
    let grpc = grpc_route(
        "r",
        vec![proto::GrpcRule {
            backends,
            ..Default::default()
        }],
    );
    for route in [http, grpc] {
        let routes = attached(&[route]);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut first = 0;
        for _ in 0..500 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let chosen = outcome(routes.for_port(7070, "mesh"), &get("/a.B/C"), random);
            first += u32::from(chosen == "echo-v1");
        }
        assert!((325..=375).contains(&first), "{first} of 500");
    }
}

#[test]
fn mesh_http_route_named_rule() {
    let mut named = matched("echo-v1", vec![path("/named")]);
    named.name = "named-rule".into();
    let mut unnamed = matched("echo-v2", vec![path("/unnamed")]);
    unnamed.name = String::new();
    let routes = attached(&[http_route("r", vec![named, unnamed])]);
    assert_all(
        &routes,
        &[(get("/named"), "echo-v1"), (get("/unnamed"), "echo-v2")],
    );
}

#[test]
fn mesh_http_route_query_param_matching() {
    let query = |params: &[(&str, &str)]| with_query(path(""), params);
    let routes = attached(&[http_route(
        "r",
        vec![
            matched("echo-v1", vec![query(&[("animal", "whale")])]),
            matched("echo-v2", vec![query(&[("animal", "dolphin")])]),
            matched(
                "echo-v3",
                vec![
                    query(&[("animal", "dolphin"), ("color", "blue")]),
                    query(&[("ANIMAL", "Whale")]),
                ],
            ),
            matched(
                "echo-v4",
                vec![with_headers(
                    query(&[("animal", "whale")]),
                    &[("version", "one")],
                )],
            ),
            matched(
                "echo-v5",
                vec![with_query(path("/path"), &[("animal", "shark")])],
            ),
        ],
    )]);
    assert_all(
        &routes,
        &[
            (get("/?animal=whale"), "echo-v1"),
            (get("/?animal=dolphin"), "echo-v2"),
            (get("/?animal=dolphin&color=blue"), "echo-v3"),
            (get("/?ANIMAL=Whale"), "echo-v3"),
            (get("/?animal=whale&otherparam=irrelevant"), "echo-v1"),
            (get("/?animal=dolphin&color=yellow"), "echo-v2"),
            (get("/?animal=whale").header("version", "one"), "echo-v4"),
            (get("/path/x?animal=shark"), "echo-v5"),
            (get("/?color=blue"), "404"),
            (get("/?animal=dog"), "404"),
            (get("/?animal=whaledolphin"), "404"),
            (get("/"), "404"),
        ],
    );
}

fn redirect(redirect: proto::Redirect, at: &str) -> proto::HttpRule {
    proto::HttpRule {
        matches: vec![path(at)],
        filters: vec![filter(proto::filter::Kind::Redirect(redirect))],
        ..Default::default()
    }
}

/// MeshHTTPRouteRedirectHostAndStatus, ...RedirectPath, ...RedirectPort, ...SchemeRedirect,
/// MeshHTTPRoute303Redirect, ...307..., ...308...: the status is what these tests look at.
#[test]
fn mesh_http_route_redirects() {
    use proto::path_modifier::Kind;
    let status = |status| proto::Redirect {
        status,
        ..Default::default()
    };
    let replaced = |kind| proto::Redirect {
        path: Some(proto::PathModifier { kind: Some(kind) }),
        ..Default::default()
    };
    let routes = attached(&[http_route(
        "r",
        vec![
            redirect(
                proto::Redirect {
                    hostname: "example.org".into(),
                    ..Default::default()
                },
                "/hostname-redirect",
            ),
            redirect(status(301), "/301"),
            redirect(status(303), "/303"),
            redirect(status(307), "/307"),
            redirect(status(308), "/308"),
            redirect(
                replaced(Kind::Prefix("/replacement".into())),
                "/original-prefix",
            ),
            redirect(replaced(Kind::Full("/full".into())), "/full"),
            redirect(
                proto::Redirect {
                    port: 8083,
                    ..Default::default()
                },
                "/port",
            ),
            redirect(
                proto::Redirect {
                    scheme: "https".into(),
                    ..status(301)
                },
                "/scheme",
            ),
        ],
    )]);
    assert_all(
        &routes,
        &[
            (get("/hostname-redirect"), "302"),
            (get("/301"), "301"),
            (get("/303"), "303"),
            (get("/307"), "307"),
            (get("/308"), "308"),
            (get("/original-prefix/lemon"), "302"),
            (get("/full/path"), "302"),
            (get("/port"), "302"),
            (get("/scheme"), "301"),
            (get("/other"), "404"),
        ],
    );
}

/// The request that a backend of `rule` gets.
fn forwarded(rule: proto::HttpRule, sent: &Sent) -> request::Parts {
    let table = table(&[http_route("r", vec![rule])]);
    let Lookup::Matched(matched) = table.find(&sent.view()) else {
        panic!("matches");
    };
    let backend = matched.rule.choose(0).expect("backend");
    let mut parts = sent.parts();
    let filters = matched.rule.filters();
    filters
        .apply_request(&mut parts, matched.path, backend.filters())
        .expect("applied");
    parts
}

fn values<'p>(parts: &'p request::Parts, name: &str) -> Vec<&'p str> {
    let lines = parts.headers.get_all(name).iter();
    lines.map(|line| line.to_str().expect("text")).collect()
}

/// MeshHTTPRouteRequestHeaderModifier, ...BackendRequestHeaderModifier and
/// MeshGRPCRouteRequestHeaderModifier: set, add (joined by a comma), remove, several, without
/// case; on the rule and on the backend.
#[test]
fn mesh_route_request_header_modifiers() {
    let modifier = header_modifier(
        &[("X-Header-Set", "set-overwrites")],
        &[("X-Header-Add", "add-appends"), ("x-header-new", "new")],
        &["X-Header-Remove"],
    );
    let modify = vec![filter(proto::filter::Kind::RequestHeaders(modifier))];
    let on_rule = proto::HttpRule {
        filters: modify.clone(),
        ..rule("echo-v1", vec![])
    };
    let mut on_backend = rule("echo-v1", vec![]);
    on_backend.backends[0].filters = modify;
    let sent = get("/")
        .header("x-header-set", "one")
        .header("x-header-set", "two")
        .header("x-header-add", "some-other-value")
        .header("x-header-remove", "val")
        .header("x-header-kept", "kept");
    for rule in [on_rule, on_backend] {
        let parts = forwarded(rule, &sent);
        assert_eq!(values(&parts, "x-header-set"), ["set-overwrites"]);
        assert_eq!(
            values(&parts, "x-header-add"),
            ["some-other-value,add-appends"]
        );
        assert_eq!(values(&parts, "x-header-new"), ["new"]);
        assert_eq!(values(&parts, "x-header-kept"), ["kept"]);
        assert!(values(&parts, "x-header-remove").is_empty());
    }
}

#[test]
fn mesh_http_route_rewrite_path() {
    use proto::path_modifier::Kind;
    let rewrite = |at: &str, kind| {
        let rewrite = proto::UrlRewrite {
            hostname: String::new(),
            path: Some(proto::PathModifier { kind: Some(kind) }),
        };
        let modifier = header_modifier(&[("X-Header-Set", "set")], &[], &[]);
        proto::HttpRule {
            filters: vec![
                filter(proto::filter::Kind::Rewrite(rewrite)),
                filter(proto::filter::Kind::RequestHeaders(modifier)),
            ],
            ..rule("echo-v1", vec![path(at)])
        }
    };
    let prefix = || rewrite("/prefix/one", Kind::Prefix("/one".into()));
    for (rule, sent, expected) in [
        (prefix(), "/prefix/one/two", "/one/two"),
        (prefix(), "/prefix/one", "/one"),
        (prefix(), "/prefix/one/", "/one/"),
        (
            rewrite("/strip-prefix", Kind::Prefix("/".into())),
            "/strip-prefix/three",
            "/three",
        ),
        (
            rewrite("/strip-prefix", Kind::Prefix("".into())),
            "/strip-prefix",
            "/",
        ),
        (
            rewrite("/full/one", Kind::Full("/one".into())),
            "/full/one/two?q=1",
            "/one?q=1",
        ),
    ] {
        let parts = forwarded(rule, &get(sent));
        assert_eq!(parts.uri, expected, "{sent}");
        assert_eq!(values(&parts, "x-header-set"), ["set"]);
    }
}

/// A route that only adds a response header, to tell where it holds.
fn marking(mut route: proto::Route, mark: &str, parents: Vec<proto::RouteParent>) -> proto::Route {
    let modifier = header_modifier(&[("X-Header-Set", mark)], &[], &[]);
    if let Some(proto::route::Kind::Http(rules)) = &mut route.kind {
        rules.rules[0].filters = vec![filter(proto::filter::Kind::ResponseHeaders(modifier))];
    }
    route.parents = parents;
    route
}

fn mark(routes: PortRoutes<'_>) -> Option<String> {
    let PortRoutes::Http(table) = routes else {
        return None;
    };
    let sent = get("/");
    let Lookup::Matched(matched) = table.find(&sent.view()) else {
        return None;
    };
    let mut headers = HeaderMap::new();
    let filters = matched.rule.filters();
    filters.apply_response(&CorsGrant::default(), &mut headers);
    let mark = headers.get("x-header-set")?;
    Some(mark.to_str().expect("text").to_owned())
}

fn plain(name: &str) -> proto::Route {
    http_route(name, vec![rule("echo-v1", vec![])])
}

/// A consumer route holds for callers of its namespace only, in place of the producer's.
#[test]
fn mesh_consumer_route() {
    let mut consumer = marking(plain("c"), "consumer", vec![parent(&echo(), 0)]);
    consumer.object = object("HTTPRoute", "consumer", "c");
    let alone = attached(&[consumer.clone()]);
    assert_eq!(
        mark(alone.for_port(80, "consumer")).as_deref(),
        Some("consumer")
    );
    assert!(matches!(alone.for_port(80, "mesh"), PortRoutes::None));

    let producer = marking(plain("p"), "producer", vec![parent(&echo(), 0)]);
    let both = attached(&[producer, consumer]);
    assert_eq!(
        mark(both.for_port(80, "consumer")).as_deref(),
        Some("consumer")
    );
    assert_eq!(mark(both.for_port(80, "mesh")).as_deref(), Some("producer"));
    assert_eq!(
        mark(both.for_port(80, "third")).as_deref(),
        Some("producer")
    );
    assert_eq!(mark(both.for_port(80, "")).as_deref(), Some("producer"));
}

/// MeshFrontend and MeshFrontendHostname: a route holds for the service that was dialled,
/// whatever the Host header or the route's host names say, and for no other.
#[test]
fn mesh_frontend_hostname() {
    let mut route = marking(
        plain("r"),
        "set",
        vec![parent(&service("mesh", "echo-v2"), 0)],
    );
    route.hostnames = vec!["other.example.org".into()];
    let echo_v2 = ServiceRoutes::build(&service("mesh", "echo-v2"), [understood(&route)]);
    assert_eq!(mark(echo_v2.for_port(80, "mesh")).as_deref(), Some("set"));
    let echo_v1 = ServiceRoutes::build(&service("mesh", "echo-v1"), [understood(&route)]);
    assert!(echo_v1.is_empty());
    assert!(matches!(echo_v1.for_port(80, "mesh"), PortRoutes::None));
}

#[test]
fn mesh_ports() {
    let port_80 = marking(plain("v1"), "v1", vec![parent(&echo(), 80)]);
    let routes = attached(&[port_80]);
    assert_eq!(mark(routes.for_port(80, "mesh")).as_deref(), Some("v1"));
    assert!(matches!(routes.for_port(8080, "mesh"), PortRoutes::None));

    let all = marking(plain("v2"), "v2", vec![parent(&echo(), 0)]);
    let routes = attached(&[all]);
    assert_eq!(mark(routes.for_port(80, "mesh")).as_deref(), Some("v2"));
    assert_eq!(mark(routes.for_port(8080, "mesh")).as_deref(), Some("v2"));
}
