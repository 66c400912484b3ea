//! GAMMA: ports, namespaces, types.

use super::*;

fn l4(kind: &str, name: &str, created: i64) -> proto::Route {
    let rules = proto::L4Rules {
        rules: vec![proto::L4Rule {
            name: name.into(),
            backends: vec![backend(name, 1)],
            invalid: String::new(),
        }],
    };
    let mut route = http_route(name, vec![]);
    route.object = object(kind, "mesh", name);
    if let Some(object) = &mut route.object {
        object.created = created;
    }
    route.kind = Some(match kind {
        "TCPRoute" => proto::route::Kind::Tcp(rules),
        _ => proto::route::Kind::Tls(rules),
    });
    route
}

fn on(mut route: proto::Route, port: u32) -> proto::Route {
    route.parents = vec![parent(&echo(), port)];
    route
}

fn http(name: &str) -> proto::Route {
    http_route(name, vec![rule(name, vec![])])
}

fn grpc(name: &str) -> proto::Route {
    let rule = proto::GrpcRule {
        name: name.into(),
        ..Default::default()
    };
    grpc_route(name, vec![rule])
}

/// What holds on a port: the type and the first rule's name.
fn holds(routes: &[proto::Route], port: u16) -> String {
    let routes = ServiceRoutes::build(&echo(), routes.iter().map(understood));
    match routes.for_port(port, "mesh") {
        PortRoutes::Http(table) => {
            let rule = table.rules().next().expect("a rule");
            format!("http {}", rule.name().unwrap_or_default())
        }
        PortRoutes::Tls(table) => format!("tls {}", table.rule().name().unwrap_or_default()),
        PortRoutes::Tcp(table) => format!("tcp {}", table.rule().name().unwrap_or_default()),
        PortRoutes::None => "none".to_owned(),
    }
}

/// "GRPC, HTTP, TLS, TCP", port by port.
#[test]
fn one_type_holds_on_a_port() {
    let (tcp, tls) = (l4("TCPRoute", "tcp", 1), l4("TLSRoute", "tls", 1));
    assert_eq!(
        holds(&[tcp.clone(), tls.clone(), http("h"), grpc("g")], 80),
        "http g"
    );
    assert_eq!(holds(&[tcp.clone(), tls.clone(), http("h")], 80), "http h");
    assert_eq!(holds(&[tcp.clone(), tls.clone()], 80), "tls tls");
    assert_eq!(holds(std::slice::from_ref(&tcp), 80), "tcp tcp");
    let ports = [on(tcp, 80), on(tls, 443), on(http("h"), 8080)];
    assert_eq!(holds(&ports, 80), "tcp tcp");
    assert_eq!(holds(&ports, 443), "tls tls");
    assert_eq!(holds(&ports, 8080), "http h");
    assert_eq!(holds(&ports, 81), "none");
    // A route for every port is there on a port that another route names.
    let ports = [http("all"), on(l4("TCPRoute", "tcp", 1), 80)];
    assert_eq!(holds(&ports, 80), "http all");
}

/// TLSRoute: the most specific host name, as it is written in the route, then the oldest route.
#[test]
fn the_server_name_chooses_among_tls_routes() {
    let named = |name: &str, created, hostnames: &[&str]| {
        let mut route = l4("TLSRoute", name, created);
        route.hostnames = hostnames.iter().map(ToString::to_string).collect();
        understood(&route)
    };
    let routes = [
        named("any", 1, &[]),
        named("wide", 2, &["*.example"]),
        named("close", 5, &["*.shop.example", "Other.Test"]),
        named("exact", 6, &["a.shop.example"]),
        named(
            "younger",
            7,
            &["a.shop.example", "*.shop.example", "own.test"],
        ),
    ];
    let choose = |routes: &[Arc<Route>], name: Option<&str>| {
        let routes = ServiceRoutes::build(&echo(), routes.iter().cloned());
        let PortRoutes::Tls(table) = routes.for_port(443, "mesh") else {
            panic!("attached");
        };
        let found = table.find(name);
        found.and_then(|rule| rule.name().map(ToOwned::to_owned))
    };
    for (name, expected) in [
        ("a.shop.example", "exact"),
        ("b.shop.example", "close"),
        ("c.b.shop.example", "close"),
        ("shop.example", "wide"),
        ("xshop.example", "wide"),
        ("other.test", "close"),
        ("own.test", "younger"),
        ("example", "any"),
        ("x.test", "any"),
        (".example", "any"),
    ] {
        assert_eq!(
            choose(&routes, Some(name)).as_deref(),
            Some(expected),
            "{name}"
        );
    }
    assert_eq!(choose(&routes, None).as_deref(), Some("any"));
    // Without a route for any name, there is none for others, nor for none.
    assert_eq!(choose(&routes[1..], Some("x.test")), None);
    assert_eq!(choose(&routes[1..], None), None);
    // One that cannot be understood has what nobody else has, and fails there.
    let mut broken = l4("TLSRoute", "broken", 1);
    broken.hostnames = vec!["a/b".into()];
    let broken = Arc::new(Route::from_proto(&broken));
    assert!(!broken.problems().is_empty());
    let routes = ServiceRoutes::build(&echo(), [broken, routes[3].clone()]);
    let PortRoutes::Tls(table) = routes.for_port(443, "mesh") else {
        panic!("attached");
    };
    assert!(
        table
            .find(Some("x"))
            .is_some_and(|rule| rule.choose(0).is_err())
    );
    assert!(
        table
            .find(Some("a.shop.example"))
            .is_some_and(|rule| rule.choose(0).is_ok())
    );
}

/// TCPRouteMultipleRoutesAttachment: only the oldest carries traffic.
#[test]
fn the_oldest_l4_route_has_all_traffic() {
    let routes = [
        l4("TCPRoute", "b", 2),
        l4("TCPRoute", "c", 1),
        l4("TCPRoute", "a", 0),
    ];
    assert_eq!(holds(&routes, 80), "tcp c");
    assert_eq!(
        holds(&[l4("TCPRoute", "b", 2), l4("TCPRoute", "a", 2)], 80),
        "tcp a"
    );
}

#[test]
fn a_rejected_parent_does_not_exist() {
    let mut route = http("h");
    route.parents[0].rejected = "NoMatchingParent".into();
    assert_eq!(holds(&[route.clone()], 80), "none");
    route.parents.push(parent(&echo(), 81));
    assert_eq!(holds(&[route.clone()], 80), "none");
    assert_eq!(holds(&[route], 81), "http h");
}

/// The consumer's routes hold on the ports that they name; elsewhere the producer's do.
#[test]
fn a_consumer_route_replaces_the_producers_on_its_ports_only() {
    let mut consumer = on(http("consumer"), 80);
    consumer.object = object("HTTPRoute", "away", "consumer");
    if let Some(proto::route::Kind::Http(rules)) = &mut consumer.kind {
        rules.rules[0].matches = vec![path("=/only")];
    }
    let routes = [understood(&http("producer")), understood(&consumer)];
    let routes = ServiceRoutes::build(&echo(), routes);
    let name = |port, caller: &str, target: &str| match routes.for_port(port, caller) {
        PortRoutes::Http(table) => takes(table, &get(target)).unwrap_or("404".into()),
        _ => "none".into(),
    };
    assert_eq!(name(80, "away", "/only"), "consumer");
    // No falling through to the producer's.
    assert_eq!(name(80, "away", "/other"), "404");
    assert_eq!(name(81, "away", "/other"), "producer");
    assert_eq!(name(80, "mesh", "/only"), "producer");
}

/// A route of the service's namespace that names the service of the same name elsewhere.
#[test]
fn namespaces_are_part_of_a_parents_name() {
    let mut route = http("h");
    route.parents = vec![proto::RouteParent {
        service: Some(proto::ServiceRef {
            namespace: "other".into(),
            hostname: echo().hostname.to_string(),
        }),
        ..Default::default()
    }];
    assert_eq!(holds(&[route], 80), "none");
}

/// Two parents of one route on one service are one attachment a port.
#[test]
fn a_route_stands_once_in_a_table() {
    let mut route = http("h");
    route.parents = vec![parent(&echo(), 80), parent(&echo(), 0), parent(&echo(), 80)];
    let routes = ServiceRoutes::build(&echo(), [understood(&route)]);
    for port in [80, 81] {
        let PortRoutes::Http(table) = routes.for_port(port, "x") else {
            panic!("attached");
        };
        assert_eq!(table.rules().count(), 1, "{port}");
    }
}
