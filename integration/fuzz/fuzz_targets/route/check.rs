//! What a waypoint promises of routes, whatever they hold. The fuzz target and the replay of its
//! corpus in plain tests both call [`check`].
//!
//! The input is a line `METHOD target`, then a `Route` of `waypoint.proto` as it comes from the
//! control plane. What is no request and what is no message never gets to the compiler and is
//! skipped.

use adit_shared::proto::waypoint as proto;
use adit_waypoint::route::{
    BackendError, HttpTable, L4Table, Lookup, NoClaims, RequestView, Route, RouteKind, Rule,
};
use http::{HeaderMap, Method, Uri};
use prost::Message as _;

/// Compiles a route and asks it about a request. Panics if a promise is broken.
pub fn check(input: &[u8]) {
    let Some(end) = input.iter().position(|b| *b == b'\n') else {
        return;
    };
    let (line, message) = (&input[..end], &input[end + 1..]);
    let Some(space) = line.iter().position(|b| *b == b' ') else {
        return;
    };
    let (Ok(method), Ok(target)) = (
        Method::from_bytes(&line[..space]),
        Uri::try_from(&line[space + 1..]),
    ) else {
        return;
    };
    let Ok(wire) = proto::Route::decode(message) else {
        return;
    };
    let route = Route::from_proto(&wire);
    for problem in route.problems() {
        assert!(!problem.to_string().is_empty(), "a problem says what it is");
    }
    let again = Route::from_proto(&wire);
    assert_eq!(route.problems().len(), again.problems().len(), "the same");
    for rule in route.rules() {
        backends(rule);
    }
    match route.kind() {
        RouteKind::Http | RouteKind::Grpc => {
            http(&route, &method, &target);
        }
        RouteKind::Tcp | RouteKind::Tls => {
            if let Some(table) = L4Table::new([&route]) {
                for name in [None, Some("c"), Some("x.a.b")] {
                    if let Some(rule) = table.find(name) {
                        assert_eq!(rule.route(), route.id(), "nobody else's rule");
                    }
                }
            }
        }
    }
}

fn http(route: &Route, method: &Method, target: &Uri) {
    let table = HttpTable::new([route]);
    let headers = HeaderMap::new();
    let view = RequestView {
        method,
        authority: "echo",
        path: target.path(),
        query: target.query(),
        headers: &headers,
        claims: &NoClaims,
        is_grpc: false,
    };
    let (Lookup::Matched(first), Lookup::Matched(second)) = (table.find(&view), table.find(&view))
    else {
        assert!(
            matches!(table.find(&view), Lookup::NoMatch),
            "the same answer each time"
        );
        return;
    };
    assert_eq!(first.rule.index(), second.rule.index(), "the same rule");
    assert_eq!(first.rule.route(), route.id(), "nobody else's rule");
    assert!(
        route
            .rules()
            .iter()
            .any(|rule| std::sync::Arc::ptr_eq(rule, first.rule)),
        "a rule of the route"
    );
}

/// Weights are shares of all there are: each draw comes to one of them, or says why not.
fn backends(rule: &Rule) {
    for random in [0, 1, u64::MAX / 2, u64::MAX] {
        match rule.choose(random) {
            Ok(backend) => assert!(
                rule.backends().valid().any(|b| std::ptr::eq(b, backend)),
                "one of the rule's"
            ),
            Err(BackendError::Invalid(why)) => assert!(!why.is_empty(), "it says why"),
            Err(BackendError::None | BackendError::ZeroWeight) => {
                assert!(
                    (0..64).all(|bit| rule.choose(1 << bit).is_err()),
                    "none has a share"
                );
            }
        }
    }
}
