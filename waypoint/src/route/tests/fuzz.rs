//! No route and no request can panic, whatever they hold.

use proptest::prelude::*;

use super::*;

const LISTENER: Listener = Listener {
    tls: false,
    port: 80,
};

fn a_text() -> impl Strategy<Value = String> + Clone {
    let nasty = [
        "",
        "/",
        "a",
        "/a",
        "*",
        "(",
        "[",
        "a|b",
        "\u{0}",
        "ä",
        "x y",
        "host",
        ":authority",
        "https://*.a",
        "https://a:99999",
        "@request.auth.claims",
        "@request.auth.claims[",
        "5xx",
        "content-length",
        "/a?b#c",
        "%",
        "\r\n",
        "[::1]",
        "(?i)a",
        "0",
        ".",
        "..",
        "a.b",
        "//",
    ];
    prop_oneof![
        4 => proptest::sample::select(nasty.to_vec()).prop_map(str::to_owned),
        1 => any::<String>(),
    ]
}

fn a_duration() -> impl Strategy<Value = Option<prost_types::Duration>> {
    let odd = proptest::sample::select(vec![0, 1, -1, i64::MAX, i64::MIN]);
    let nanos = proptest::sample::select(vec![0, 1, -1, i32::MAX, i32::MIN, 999_999_999]);
    let duration =
        (odd, nanos).prop_map(|(seconds, nanos)| prost_types::Duration { seconds, nanos });
    prop::option::of(duration)
}

fn a_number() -> impl Strategy<Value = u32> + Clone {
    proptest::sample::select(vec![
        0,
        1,
        80,
        302,
        503,
        65_535,
        65_536,
        1_000_000,
        u32::MAX,
    ])
}

fn name_matches() -> impl Strategy<Value = Vec<proto::NameMatch>> {
    use proto::string_match::Kind;
    let kind = prop_oneof![
        a_text().prop_map(Kind::Exact),
        a_text().prop_map(Kind::Prefix),
        a_text().prop_map(Kind::Suffix),
        a_text().prop_map(Kind::Regex),
        any::<bool>().prop_map(Kind::Present),
    ];
    let value = prop::option::of(prop::option::of(kind))
        .prop_map(|value| value.map(|kind| proto::StringMatch { kind }));
    let of = (a_text(), value, any::<bool>());
    let of = of.prop_map(|(name, value, invert)| proto::NameMatch {
        name,
        value,
        invert,
    });
    prop::collection::vec(of, 0..3)
}

fn http_matches() -> impl Strategy<Value = Vec<proto::HttpMatch>> {
    use proto::http_match::Path;
    let path = prop_oneof![
        a_text().prop_map(Path::Exact),
        a_text().prop_map(Path::Prefix),
        a_text().prop_map(Path::PathRegex),
    ];
    let of = (
        prop::option::of(path),
        name_matches(),
        name_matches(),
        name_matches(),
        a_text(),
    );
    let of = of.prop_map(
        |(path, headers, query_params, claims, method)| proto::HttpMatch {
            path,
            headers,
            query_params,
            method,
            claims,
        },
    );
    prop::collection::vec(of, 0..3)
}

fn a_path_modifier() -> impl Strategy<Value = Option<proto::PathModifier>> {
    use proto::path_modifier::Kind;
    let kind = prop_oneof![
        a_text().prop_map(Kind::Full),
        a_text().prop_map(Kind::Prefix)
    ];
    prop::option::of(prop::option::of(kind).prop_map(|kind| proto::PathModifier { kind }))
}

fn filters() -> impl Strategy<Value = Vec<proto::Filter>> {
    use proto::filter::Kind;
    let texts = || prop::collection::vec(a_text(), 0..3);
    let header = (a_text(), a_text()).prop_map(|(name, value)| proto::Header { name, value });
    let headers = prop::collection::vec(header, 0..3);
    let modifier = (headers.clone(), headers, texts())
        .prop_map(|(set, add, remove)| proto::HeaderModifier { set, add, remove })
        .boxed();
    let redirect = (
        a_text(),
        a_text(),
        a_number(),
        a_path_modifier(),
        a_number(),
    )
        .prop_map(|(scheme, hostname, port, path, status)| proto::Redirect {
            scheme,
            hostname,
            port,
            path,
            status,
        });
    let rewrite = (a_text(), a_path_modifier())
        .prop_map(|(hostname, path)| proto::UrlRewrite { hostname, path });
    let cors = (
        texts(),
        any::<bool>(),
        texts(),
        texts(),
        texts(),
        a_number(),
    )
        .prop_map(
            |(allow_origins, allow_credentials, allow_methods, allow_headers, expose, max_age)| {
                proto::Cors {
                    allow_origins,
                    allow_origin_matches: vec![],
                    allow_credentials,
                    allow_methods,
                    allow_headers,
                    expose_headers: expose,
                    max_age,
                }
            },
        );
    let fault = (a_duration(), a_number(), a_number(), any::<bool>()).prop_map(
        |(delay, per_million, status, grpc)| proto::Fault {
            delay,
            delay_per_million: per_million,
            abort_status: status,
            abort_grpc_status: status,
            abort_grpc: grpc,
            abort_per_million: per_million,
        },
    );
    let mirror = a_number().prop_map(|per_million| proto::Mirror {
        backend: (per_million > 80).then(|| backend("mirror", per_million)),
        per_million,
    });
    let kind = prop_oneof![
        modifier.clone().prop_map(Kind::RequestHeaders),
        modifier.prop_map(Kind::ResponseHeaders),
        redirect.prop_map(Kind::Redirect),
        rewrite.prop_map(Kind::Rewrite),
        mirror.prop_map(Kind::Mirror),
        cors.prop_map(Kind::Cors),
        fault.prop_map(Kind::Fault),
        a_number().prop_map(|status| {
            Kind::DirectResponse(proto::DirectResponse {
                status,
                body: vec![1],
            })
        }),
        a_text().prop_map(Kind::Invalid),
    ];
    let of = prop::option::weighted(0.9, kind).prop_map(|kind| proto::Filter { kind });
    prop::collection::vec(of, 0..3)
}

fn backends() -> impl Strategy<Value = Vec<proto::Backend>> {
    use proto::backend::To;
    let service = (a_text(), a_number(), a_text()).prop_map(|(hostname, port, subset)| {
        let service = proto::ServiceRef {
            namespace: "n".into(),
            hostname,
        };
        To::Service(proto::BackendService {
            service: Some(service),
            port,
            subset,
        })
    });
    let to = prop_oneof![4 => service, 1 => a_text().prop_map(To::Invalid)];
    let of = (a_number(), prop::option::of(to), filters()).prop_map(|(weight, to, filters)| {
        proto::Backend {
            weight,
            to,
            filters,
        }
    });
    prop::collection::vec(of, 0..3)
}

fn a_session() -> impl Strategy<Value = Option<proto::SessionPersistence>> {
    let of = (
        a_text(),
        any::<i32>(),
        a_duration(),
        a_duration(),
        any::<bool>(),
        a_text(),
    )
        .prop_map(
            |(name, kind, absolute_timeout, idle_timeout, session_cookie, path)| {
                proto::SessionPersistence {
                    name,
                    r#type: kind % 3,
                    absolute_timeout,
                    idle_timeout,
                    session_cookie,
                    path,
                }
            },
        );
    prop::option::of(of)
}

fn http_rule() -> impl Strategy<Value = proto::HttpRule> {
    let retry = (
        a_number(),
        prop::collection::vec(a_number(), 0..3),
        a_duration(),
        a_text(),
    )
        .prop_map(|(attempts, codes, backoff, condition)| proto::Retry {
            attempts,
            codes,
            backoff,
            per_try_timeout: backoff,
            conditions: vec![condition],
        });
    let times = (a_duration(), prop::option::of(retry), a_session());
    (
        http_matches(),
        filters(),
        backends(),
        times,
        prop::bool::weighted(0.1),
    )
        .prop_map(
            |(matches, filters, backends, (timeout, retry, session_persistence), invalid)| {
                proto::HttpRule {
                    name: String::new(),
                    matches,
                    filters,
                    backends,
                    request_timeout: timeout,
                    backend_request_timeout: timeout,
                    retry,
                    session_persistence,
                    invalid: if invalid {
                        "invalid".into()
                    } else {
                        String::new()
                    },
                }
            },
        )
}

fn a_route() -> impl Strategy<Value = proto::Route> {
    use proto::route::Kind;
    let grpc_match = (a_text(), a_text(), any::<bool>(), name_matches()).prop_map(
        |(service, method, regex, headers)| proto::GrpcMatch {
            service,
            method,
            regex,
            headers,
        },
    );
    let grpc_matches = prop::collection::vec(grpc_match, 0..3);
    let grpc_rule = (grpc_matches, filters(), backends(), a_session()).prop_map(
        |(matches, filters, backends, session_persistence)| proto::GrpcRule {
            matches,
            filters,
            backends,
            session_persistence,
            ..Default::default()
        },
    );
    let l4_rule = (backends(), a_text()).prop_map(|(backends, invalid)| proto::L4Rule {
        name: String::new(),
        backends,
        invalid,
    });
    let l4 = prop::collection::vec(l4_rule, 0..3).prop_map(|rules| proto::L4Rules { rules });
    let l4 = l4.boxed();
    let kind = prop_oneof![
        4 => prop::collection::vec(http_rule(), 0..3)
            .prop_map(|rules| Kind::Http(proto::HttpRules { rules })),
        2 => prop::collection::vec(grpc_rule, 0..3)
            .prop_map(|rules| Kind::Grpc(proto::GrpcRules { rules })),
        1 => l4.clone().prop_map(Kind::Tcp),
        1 => l4.prop_map(Kind::Tls),
    ];
    let object = prop::option::of((a_text(), a_text(), any::<i64>())).prop_map(|object| {
        object.map(|(kind, name, created)| proto::ObjectRef {
            kind,
            namespace: "mesh".into(),
            name,
            created,
        })
    });
    let service = prop_oneof![
        3 => Just(Some(reference(&echo()))),
        1 => Just(Some(proto::ServiceRef::default())),
        1 => Just(None),
    ];
    let parent = (service, a_number()).prop_map(|(service, port)| proto::RouteParent {
        service,
        port,
        rejected: String::new(),
    });
    let parents = prop::collection::vec(parent, 0..3);
    (object, parents, prop::option::weighted(0.9, kind)).prop_map(|(object, parents, kind)| {
        proto::Route {
            object,
            parents,
            hostnames: vec![],
            kind,
        }
    })
}

/// Everything that can be done with a route.
fn exercise(route: &proto::Route, sent: &Sent, random: u64) {
    let route = Arc::new(Route::from_proto(route));
    for problem in route.problems() {
        assert!(!problem.field.is_empty() && !problem.reason.is_empty());
    }
    let routes = ServiceRoutes::build(&echo(), [Arc::clone(&route)]);
    for port in [80, 0, 65_535] {
        match routes.for_port(port, "mesh") {
            PortRoutes::Http(table) => {
                let _ = table.find(&sent.view());
            }
            PortRoutes::Tls(table) | PortRoutes::Tcp(table) => {
                for name in [None, Some(""), Some("."), Some("a.b.example"), Some("..a")] {
                    let _ = table.find(name).map(|rule| rule.choose(random));
                }
            }
            PortRoutes::None => {}
        }
    }
    let table = HttpTable::new([&*route]);
    for rule in table.rules() {
        let mut parts = sent.parts();
        for path in [
            MatchedPath::Whole,
            MatchedPath::Prefix(2),
            MatchedPath::Prefix(99),
        ] {
            let inspection = rule.filters().inspect(&parts, path, LISTENER, || random);
            let nothing = Filters::default();
            let backend = rule.choose(random).ok();
            let filters = backend.map_or(&nothing, |backend| backend.filters());
            let _ = rule.filters().apply_request(&mut parts, path, filters);
            let mut headers = parts.headers.clone();
            rule.filters()
                .apply_response(&inspection.cors, &mut headers);
        }
        if let Some(retry) = rule.retry() {
            let _ = retry.decide(Attempt::TimedOut, 1, true, None, random);
        }
        if let Some(session) = rule.session() {
            let key = SessionKey::new(&[1; 32]).expect("key");
            let begun = Session::begin("uid", random);
            let _ = session.header(&begun, &key, "s", [0; 12], true);
            let _ = session.find(&sent.headers, &key, "s", random);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn nothing_in_a_route_can_panic(
        route in a_route(),
        target in proptest::sample::select(vec!["/", "/a", "/a/b?q=%zz&q", "/a%20?%", "//", "*"]),
        random in any::<u64>(),
    ) {
        let sent = get(target)
            .method("OPTIONS")
            .header("origin", "https://a.a")
            .header("access-control-request-method", "PUT")
            .header("cookie", "adit-session=AAAA; a=b");
        exercise(&route, &sent, random);
    }

    /// What the wire holds may be anything that decodes.
    #[test]
    fn nothing_on_the_wire_can_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), route in a_route(), at in any::<usize>()) {
        use prost::Message as _;
        let mut encoded = route.encode_to_vec();
        if !encoded.is_empty() && !bytes.is_empty() {
            let at = at % encoded.len();
            encoded[at] ^= bytes[0];
        }
        for wire in [&mut bytes, &mut encoded] {
            if let Ok(route) = proto::Route::decode(&wire[..]) {
                exercise(&route, &get("/a"), 1);
            }
        }
    }
}
