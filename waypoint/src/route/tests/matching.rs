//! HTTPRouteRule.matches and GRPCRouteRule.matches: what holds, and what goes first.

use super::*;

fn assert_takes(table: &HttpTable, cases: &[(Sent, Option<&str>)]) {
    for (sent, expected) in cases {
        assert_eq!(takes(table, sent).as_deref(), *expected, "{sent:?}");
    }
}

/// HTTPPathMatch: Exact is the whole path, PathPrefix whole elements, both case-sensitive.
#[test]
fn paths() {
    let of = |written: &str, sent: &str| {
        let table = table(&[http_route("r", vec![rule("r", vec![path(written)])])]);
        takes(&table, &get(sent)).is_some()
    };
    for (written, sent, expected) in [
        ("=/one", "/one", true),
        ("=/one", "/one/", false),
        ("=/one", "/One", false),
        ("=/one", "/one/two", false),
        ("=/one/", "/one", false),
        ("/abc", "/abc", true),
        ("/abc", "/abc/", true),
        ("/abc", "/abc/def", true),
        ("/abc", "/abcd", false),
        ("/abc", "/ABC", false),
        ("/abc/", "/abc", true),
        ("/abc/", "/abc/def", true),
        ("/abc/", "/abcd", false),
        ("/", "/anything", true),
        ("/", "/", true),
        ("", "/anything", true),
        ("/a/b", "/a//b", false),
        ("/", "*", true),
        ("~/v[0-9]+/.*", "/v12/x", true),
        ("~/v[0-9]+", "/v12/x", false),
        ("~/v[0-9]+/.*", "/x/v12/x", false),
        ("~.*/b", "/a/b", true),
    ] {
        assert_eq!(of(written, sent), expected, "{written} {sent}");
    }
}

/// HTTPRoutePathMatchOrder: independent of the order of rules.
#[test]
fn exact_then_pattern_then_the_longest_prefix() {
    let mut rules = vec![
        rule("root", vec![path("/")]),
        rule("one", vec![path("/match")]),
        rule("two", vec![path("/match/prefix")]),
        rule("three", vec![path("/match/prefix/one")]),
        rule("exact", vec![path("=/match/exact")]),
        rule("exact deeper", vec![path("=/match/exact/one")]),
        rule("pattern", vec![path("~/match/pre.*/x")]),
        rule("longer pattern", vec![path("~/match/pre.*/one/x")]),
    ];
    let cases = [
        (get("/match/exact/one"), Some("exact deeper")),
        (get("/match/exact"), Some("exact")),
        (get("/match/exact/"), Some("one")),
        (get("/match"), Some("one")),
        (get("/match/prefix/one/any"), Some("three")),
        (get("/match/prefix/any"), Some("two")),
        (get("/match/prefix/x"), Some("pattern")),
        (get("/match/prefix/one/x"), Some("longer pattern")),
        (get("/other"), Some("root")),
    ];
    for _ in 0..rules.len() {
        rules.rotate_left(1);
        assert_takes(&table(&[http_route("r", rules.clone())]), &cases);
    }
}

/// "Method match", "largest number of header matches", "largest number of query param matches",
/// each below the one before.
#[test]
fn method_headers_and_query_in_this_order() {
    let both = [("x-a", "1"), ("x-b", "2")];
    let mut rules = vec![
        rule("path", vec![path("/p")]),
        rule("method", vec![with_method(path("/p"), "GET")]),
        rule("two headers", vec![with_headers(path("/p"), &both)]),
        rule("one header", vec![with_headers(path("/p"), &both[..1])]),
        rule(
            "query",
            vec![with_query(path("/p"), &[("q", "1"), ("r", "1")])],
        ),
        rule("longer path", vec![path("/p/p")]),
    ];
    let post = |target: &str| get(target).method("POST");
    let cases = [
        (get("/p?q=1&r=1").header("x-a", "1"), Some("method")),
        (post("/p?q=1&r=1").header("x-a", "1"), Some("one header")),
        (
            post("/p?q=1").header("X-A", "1").header("X-B", "2"),
            Some("two headers"),
        ),
        (post("/p?r=1&q=1"), Some("query")),
        (post("/p?q=1"), Some("path")),
        (get("/p/p").header("x-a", "1"), Some("longer path")),
    ];
    for _ in 0..rules.len() {
        rules.rotate_left(1);
        assert_takes(&table(&[http_route("r", rules.clone())]), &cases);
    }
}

/// "The oldest Route", then "first in alphabetical order by {namespace}/{name}", then the first
/// rule (HTTPRouteRuleOrder), in whatever order they are told.
#[test]
fn ties() {
    let aged = |namespace: &str, name: &str, created: i64| {
        let mut route = http_route(name, vec![rule(&format!("{namespace}/{name}"), vec![])]);
        route.object = object("HTTPRoute", namespace, name);
        if let Some(object) = &mut route.object {
            object.created = created;
        }
        route
    };
    for (routes, expected) in [
        ([aged("mesh", "b", 5), aged("mesh", "a", 6)], "mesh/b"),
        ([aged("mesh", "b", 5), aged("mesh", "a", 5)], "mesh/a"),
        ([aged("a", "z", 5), aged("b", "a", 5)], "a/z"),
        // One text: "a-b/" sorts before "a/".
        ([aged("a-b", "z", 5), aged("a", "a", 5)], "a-b/z"),
        // An age that is not known is the youngest.
        ([aged("mesh", "a", 0), aged("mesh", "b", 9)], "mesh/b"),
    ] {
        let [one, two] = routes;
        for routes in [[one.clone(), two.clone()], [two, one]] {
            assert_takes(&table(&routes), &[(get("/"), Some(expected))]);
        }
    }
    // Header matches are a set: in whatever order, they are equal.
    let (a, b) = (("x-a", "1"), ("x-b", "2"));
    let table = table(&[http_route(
        "r",
        vec![
            rule("first", vec![with_headers(path(""), &[a, b])]),
            rule("second", vec![with_headers(path(""), &[b, a])]),
        ],
    )]);
    let sent = get("/").header("x-a", "1").header("x-b", "2");
    assert_takes(&table, &[(sent, Some("first"))]);
}

/// HTTPHeaderMatch: names without case, of equal names the first counts, several lines are one
/// value (RFC 9110 5.3).
#[test]
fn headers() {
    use proto::string_match::Kind;
    let kinds = [
        ("exact", Kind::Exact("a,b".into())),
        ("prefix", Kind::Prefix("pre".into())),
        ("suffix", Kind::Suffix("fix".into())),
        ("regex", Kind::Regex("[0-9]+(,[0-9]+)*".into())),
        ("present", Kind::Present(true)),
    ];
    let rules = kinds.map(|(name, kind)| {
        let of = proto::HttpMatch {
            headers: vec![proto::NameMatch {
                name: format!("X-{name}"),
                value: Some(text(kind)),
                invert: false,
            }],
            ..Default::default()
        };
        rule(name, vec![of])
    });
    let held = table(&[http_route("r", rules.into())]);
    assert_takes(
        &held,
        &[
            (get("/").header("x-exact", "a,b"), Some("exact")),
            (
                get("/").header("x-exact", "a").header("x-exact", "b"),
                Some("exact"),
            ),
            (get("/").header("x-exact", "a"), None),
            (get("/").header("x-exact", "b").header("x-exact", "a"), None),
            (get("/").header("x-prefix", "prefix"), Some("prefix")),
            (
                get("/").header("x-prefix", "p").header("x-prefix", "re"),
                None,
            ),
            (
                get("/").header("x-prefix", "pre").header("x-prefix", "x"),
                Some("prefix"),
            ),
            (get("/").header("x-suffix", "suffix"), Some("suffix")),
            (
                get("/").header("x-suffix", "fix").header("x-suffix", "x"),
                None,
            ),
            (get("/").header("x-regex", "12"), Some("regex")),
            (
                get("/").header("x-regex", "12").header("x-regex", "3"),
                Some("regex"),
            ),
            (get("/").header("x-regex", "12x"), None),
            (get("/").header("x-present", ""), Some("present")),
            (get("/"), None),
        ],
    );
    let twice = [("x-a", "1"), ("X-A", "2")];
    let inverted = proto::HttpMatch {
        headers: vec![proto::NameMatch {
            invert: true,
            ..named("x-a", "1")
        }],
        ..Default::default()
    };
    let held = table(&[http_route(
        "r",
        vec![
            rule("first of equal names", vec![with_headers(path(""), &twice)]),
            rule(
                "host",
                vec![with_headers(path("=/host"), &[("Host", "echo")])],
            ),
            rule(
                "authority",
                vec![with_headers(path("=/authority"), &[(":authority", "echo")])],
            ),
            rule("not", vec![inverted]),
        ],
    )]);
    assert_takes(
        &held,
        &[
            (get("/").header("x-a", "1"), Some("first of equal names")),
            (get("/").header("x-a", "2"), Some("not")),
            (get("/host"), Some("host")),
            (get("/authority").header("host", "other"), Some("authority")),
            (get("/"), Some("not")),
        ],
    );
}

/// HTTPQueryParamMatch: names with case, values decoded, the first of several values.
#[test]
fn query_parameters() {
    let table = table(&[http_route(
        "r",
        vec![
            rule(
                "animal",
                vec![with_query(path(""), &[("animal", "wh ale")])],
            ),
            rule("ab", vec![with_query(path(""), &[("a&b", "=")])]),
        ],
    )]);
    assert_takes(
        &table,
        &[
            (get("/?animal=wh+ale"), Some("animal")),
            (get("/?animal=wh%20ale&animal=x"), Some("animal")),
            (get("/?animal=x&animal=wh%20ale"), None),
            (get("/?%61nimal=wh%20al%65"), Some("animal")),
            (get("/?Animal=wh+ale"), None),
            (get("/?a%26b=%3D"), Some("ab")),
            (get("/?a%26b=="), Some("ab")),
            (get("/"), None),
        ],
    );
}

/// Istio's `@request.auth.claims`: they rank as headers do.
#[test]
fn claims() {
    let claim = |name: &str, value: &str| proto::HttpMatch {
        claims: vec![named(name, value)],
        ..Default::default()
    };
    let by_header = |name, value| with_headers(path(""), &[(name, value)]);
    let table = table(&[http_route(
        "r",
        vec![
            rule("any", vec![]),
            rule("group", vec![claim("groups", "admin")]),
            rule(
                "nested",
                vec![by_header("@request.auth.claims.realm.role", "x")],
            ),
            rule(
                "url",
                vec![by_header("@request.auth.claims[https://a.b/c]", "7")],
            ),
        ],
    )]);
    let sent = |json: serde_json::Value| Sent {
        claims: json,
        ..get("/")
    };
    assert_takes(
        &table,
        &[
            (
                sent(serde_json::json!({"groups": ["user", "admin"]})),
                Some("group"),
            ),
            (sent(serde_json::json!({"groups": "admin"})), Some("group")),
            (sent(serde_json::json!({"groups": ["user"]})), Some("any")),
            (
                sent(serde_json::json!({"realm": {"role": "x"}})),
                Some("nested"),
            ),
            (sent(serde_json::json!({"https://a.b/c": 7})), Some("url")),
            (sent(serde_json::json!(null)), Some("any")),
        ],
    );
}

fn call(path: &str) -> Sent {
    get(path)
        .method("POST")
        .header("content-type", "application/grpc")
}

fn grpc(name: &str, service: &str, method: &str, headers: &[(&str, &str)]) -> proto::GrpcRule {
    proto::GrpcRule {
        name: name.into(),
        matches: vec![proto::GrpcMatch {
            service: service.into(),
            method: method.into(),
            regex: false,
            headers: headers.iter().map(|(n, v)| named(n, v)).collect(),
        }],
        backends: vec![backend(name, 1)],
        ..Default::default()
    }
}

/// GRPCRouteRule.matches: characters in the service, then in the method, then headers; exact
/// names before patterns; case matters.
#[test]
fn grpc_calls() {
    let pattern = |name, service, method| {
        let mut rule = grpc(name, service, method, &[]);
        rule.matches[0].regex = true;
        rule
    };
    let mut rules = vec![
        grpc("both", "shop.Cart", "Add", &[]),
        grpc("both and header", "shop.Cart", "Add", &[("x-v", "2")]),
        grpc("service", "shop.Cart", "", &[]),
        grpc("service and header", "shop.Cart", "", &[("x-v", "2")]),
        grpc("method", "", "Add", &[]),
        grpc("header", "", "", &[("x-v", "2")]),
        pattern("pattern", r"shop\.(Cart|Order)", ""),
        pattern("short pattern", ".*", "Ship"),
    ];
    let cases = [
        (call("/shop.Cart/Add"), Some("both")),
        (
            call("/shop.Cart/Add").header("x-v", "2"),
            Some("both and header"),
        ),
        (call("/shop.Cart/Get"), Some("service")),
        (
            call("/shop.Cart/Get").header("x-v", "2"),
            Some("service and header"),
        ),
        (call("/shop.Order/Get"), Some("pattern")),
        (call("/shop.Order/Ship"), Some("pattern")),
        (call("/x.Y/Ship"), Some("short pattern")),
        (call("/x.Y/Add").header("x-v", "2"), Some("method")),
        (call("/x.Y/Get").header("x-v", "2"), Some("header")),
        (call("/x.Y/Get"), None),
        (call("/shop.cart/add"), None),
        (call("/shop.Cart/Get/More"), None),
        (call("/shop.Cart"), None),
    ];
    for _ in 0..rules.len() {
        rules.rotate_left(1);
        assert_takes(&table(&[grpc_route("r", rules.clone())]), &cases);
    }
    // GRPCRouteRule.matches: without any, every call.
    let all = proto::GrpcRule {
        name: "all".into(),
        ..Default::default()
    };
    let table = table(&[grpc_route("r", vec![all])]);
    assert_takes(&table, &[(call("/x.Y/Get"), Some("all"))]);
}
