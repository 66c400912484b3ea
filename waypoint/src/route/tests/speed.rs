//! A lookup among 5,000 routes of one service takes less than 2 us and allocates nothing.
//! The figure: `cargo test --release -p adit-waypoint --lib route::tests::speed -- --ignored
//! --nocapture`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::*;

/// Routes of one shape, and a request that takes the last of them.
struct Shape {
    name: &'static str,
    table: HttpTable,
    sent: Sent,
    miss: Sent,
}

fn shape(
    count: usize,
    name: &'static str,
    of: impl Fn(usize) -> proto::HttpMatch,
    sent: Sent,
    miss: Sent,
) -> Shape {
    let routes = (0..count).map(|i| {
        let rules = vec![rule(&format!("{i}"), vec![of(i)])];
        understood(&http_route(&format!("r{i:05}"), rules))
    });
    let routes: Vec<_> = routes.collect();
    Shape {
        name,
        table: HttpTable::new(routes.iter().map(|route| &**route)),
        sent: browser(sent),
        miss: browser(miss),
    }
}

/// The headers that a request has anyway.
fn browser(sent: Sent) -> Sent {
    [
        ("host", "echo"),
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64)"),
        ("accept", "*/*"),
        ("accept-encoding", "gzip, deflate, br"),
        ("accept-language", "en"),
        ("cookie", "a=b; c=d"),
        ("x-request-id", "6f1c2a6a-6f0f-4a0c-9c39-0f5a3c2d1e00"),
        (
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ),
        ("x-forwarded-proto", "http"),
        ("x-envoy-attempt-count", "1"),
    ]
    .into_iter()
    .fold(sent, |sent, (name, value)| sent.header(name, value))
}

fn shapes(count: usize) -> Vec<Shape> {
    let last = count - 1;
    let miss = || get("/nowhere/at/all");
    vec![
        shape(
            count,
            "exact path",
            |i| path(&format!("=/api/v1/resource-{i}/items")),
            get(&format!("/api/v1/resource-{last}/items")),
            miss(),
        ),
        shape(
            count,
            "prefix",
            |i| path(&format!("/api/v1/resource-{i}")),
            get(&format!("/api/v1/resource-{last}/items/12")),
            miss(),
        ),
        shape(
            count,
            "header",
            |i| with_headers(path("/"), &[("x-user", &format!("user-{i}"))]),
            get("/any/path").header("x-user", &format!("user-{last}")),
            get("/any/path").header("x-user", "nobody"),
        ),
        shape(
            count,
            "two headers",
            |i| {
                let user = format!("user-{i}");
                with_headers(path("/"), &[("x-tenant", "one"), ("x-user", &user)])
            },
            get("/")
                .header("x-tenant", "one")
                .header("x-user", &format!("user-{last}")),
            get("/")
                .header("x-tenant", "one")
                .header("x-user", "nobody"),
        ),
        shape(
            count,
            "header names",
            |i| with_headers(path("/"), &[(&format!("x-user-{i}"), "1")]),
            get("/").header(&format!("x-user-{last}"), "1"),
            get("/").header("x-user-x", "1"),
        ),
        shape(
            count,
            "query parameter",
            |i| with_query(path("/"), &[("user", &i.to_string())]),
            get(&format!("/?a=b&c=d&user={last}")),
            get("/?a=b&c=d&user=x"),
        ),
        shape(
            count,
            "pattern",
            |i| path(&format!("~/api/v1/resource-{i}/[0-9]+")),
            get(&format!("/api/v1/resource-{last}/12")),
            get(&format!("/api/v1/resource-{last}/x")),
        ),
        shape(
            count,
            "method and path",
            |i| with_method(path(&format!("=/p{i}")), "GET"),
            get(&format!("/p{last}")),
            get(&format!("/p{last}")).method("POST"),
        ),
    ]
}

/// Nanoseconds of one lookup, the best of some rounds.
fn measure(table: &HttpTable, sent: &Sent, rounds: u32) -> u128 {
    const LOOKUPS: u32 = 1_000;
    let round = || {
        let start = Instant::now();
        for _ in 0..LOOKUPS {
            let _ = black_box(table.find(&black_box(sent).view()));
        }
        start.elapsed() / LOOKUPS
    };
    let best = (0..rounds).map(|_| round()).min();
    best.unwrap_or(Duration::MAX).as_nanos()
}

/// Generous, for a debug build on a busy machine: a scan takes ten times as long.
#[test]
fn many_routes_are_not_scanned() {
    for shape in shapes(1_500) {
        let expected = Some("1499".to_owned());
        assert_eq!(takes(&shape.table, &shape.sent), expected, "{}", shape.name);
        assert_eq!(takes(&shape.table, &shape.miss), None, "{}", shape.name);
        for sent in [&shape.sent, &shape.miss] {
            let nanos = measure(&shape.table, sent, 5);
            assert!(nanos < 60_000, "{}: {nanos} ns", shape.name);
        }
    }
}

#[test]
#[ignore = "a measurement: needs a release build"]
fn figures() {
    for shape in shapes(5_000) {
        let found = measure(&shape.table, &shape.sent, 200);
        let missed = measure(&shape.table, &shape.miss, 200);
        println!("{:20} {found:6} ns, no match {missed:6} ns", shape.name);
        assert!(found < 2_000 && missed < 2_000, "{}", shape.name);
    }
}
