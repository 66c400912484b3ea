//! Routes, filters, retries and timeouts on the way.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use adit_shared::model::TunnelProtocol;
use adit_shared::model::Update;
use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::policies::{allow, policy, put};
use crate::support::{Body, Http, Mesh, Vip, body, echo, eventually, get, run, send, workload};

pub fn reference(vip: &Vip) -> pb::ServiceRef {
    pb::ServiceRef {
        namespace: vip.key.namespace.to_string(),
        hostname: vip.key.hostname.to_string(),
    }
}

pub fn backend(vip: &Vip, weight: u32) -> pb::Backend {
    pb::Backend {
        weight,
        to: Some(pb::backend::To::Service(pb::BackendService {
            service: Some(reference(vip)),
            port: 80,
            subset: String::new(),
        })),
        filters: Vec::new(),
    }
}

fn prefix(path: &str) -> pb::HttpMatch {
    pb::HttpMatch {
        path: Some(pb::http_match::Path::Prefix(path.into())),
        ..Default::default()
    }
}

pub fn route(mesh: &Mesh, parent: &Vip, namespace: &str, rules: Vec<pb::HttpRule>) {
    let route = pb::Route {
        object: Some(pb::ObjectRef {
            kind: "HTTPRoute".into(),
            namespace: namespace.into(),
            name: "r".into(),
            created: 1,
        }),
        parents: vec![pb::RouteParent {
            service: Some(reference(parent)),
            port: 0,
            rejected: String::new(),
        }],
        hostnames: Vec::new(),
        kind: Some(pb::route::Kind::Http(pb::HttpRules { rules })),
    };
    mesh.put(pb::ROUTE_TYPE, &format!("HTTPRoute/{namespace}/r"), &route);
}

#[test]
fn weights_and_matches_choose_the_backend() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let v1 = mesh.service("web-v1", Protocol::Http);
        let v2 = mesh.service("web-v2", Protocol::Http);
        let (one, _) = echo("one");
        let (two, _) = echo("two");
        let _one = mesh.pod(&v1, "v1", one).await;
        let _two = mesh.pod(&v2, "v2", two).await;
        let matched = pb::HttpRule {
            matches: vec![pb::HttpMatch {
                headers: vec![pb::NameMatch {
                    name: "user".into(),
                    value: Some(pb::StringMatch {
                        kind: Some(pb::string_match::Kind::Exact("jason".into())),
                    }),
                    invert: false,
                }],
                ..prefix("/")
            }],
            backends: vec![backend(&v2, 1)],
            ..Default::default()
        };
        let split = pb::HttpRule {
            matches: vec![prefix("/shop")],
            backends: vec![backend(&v1, 9), backend(&v2, 1)],
            ..Default::default()
        };
        route(&mesh, &web, "shop", vec![matched, split]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let mut counts = [0; 2];
        for _ in 0..1000 {
            let answer = send(&mut sender, get("/shop/x")).await;
            counts[usize::from(answer.text() == "two")] += 1;
        }
        assert!((60..=140).contains(&counts[1]), "{counts:?}");
        for _ in 0..10 {
            let mut request = get("/any");
            request
                .headers_mut()
                .insert("user", "jason".parse().unwrap());
            assert_eq!(send(&mut sender, request).await.text(), "two");
        }
        let nowhere = send(&mut sender, get("/other")).await;
        assert_eq!(nowhere.status, 404);
        assert_eq!(nowhere.header("x-adit-reason"), "no_route");
    });
}

#[test]
fn the_callers_namespace_decides_between_producer_and_consumer_routes() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("plain");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let rule = |value: &str| pb::HttpRule {
            filters: vec![pb::Filter {
                kind: Some(pb::filter::Kind::ResponseHeaders(pb::HeaderModifier {
                    set: vec![pb::Header {
                        name: "x-route".into(),
                        value: value.into(),
                    }],
                    ..Default::default()
                })),
            }],
            backends: vec![backend(&web, 1)],
            ..Default::default()
        };
        route(&mesh, &web, "shop", vec![rule("producer")]);
        route(&mesh, &web, "buyers", vec![rule("consumer")]);
        let stranger = mesh.client("default", "curl").await;
        let buyer = mesh.client("buyers", "curl").await;
        let answer = stranger.get(&web, "/").await;
        assert_eq!(answer.header("x-route"), "producer");
        assert_eq!(buyer.get(&web, "/").await.header("x-route"), "consumer");
    });
}

#[test]
fn filters_redirect_rewrite_and_change_headers() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let redirect = pb::HttpRule {
            matches: vec![prefix("/old")],
            filters: vec![pb::Filter {
                kind: Some(pb::filter::Kind::Redirect(pb::Redirect {
                    scheme: "https".into(),
                    status: 301,
                    ..Default::default()
                })),
            }],
            ..Default::default()
        };
        let rewrite = pb::HttpRule {
            matches: vec![prefix("/in")],
            filters: vec![
                pb::Filter {
                    kind: Some(pb::filter::Kind::Rewrite(pb::UrlRewrite {
                        hostname: "inner.example".into(),
                        path: Some(pb::PathModifier {
                            kind: Some(pb::path_modifier::Kind::Prefix("/out".into())),
                        }),
                    })),
                },
                pb::Filter {
                    kind: Some(pb::filter::Kind::RequestHeaders(pb::HeaderModifier {
                        add: vec![pb::Header {
                            name: "x-added".into(),
                            value: "1".into(),
                        }],
                        remove: vec!["x-gone".into()],
                        ..Default::default()
                    })),
                },
            ],
            backends: vec![backend(&web, 1)],
            ..Default::default()
        };
        route(&mesh, &web, "shop", vec![redirect, rewrite]);
        let client = mesh.client("default", "curl").await;
        let answer = client.get(&web, "/old/x?q").await;
        assert_eq!(answer.status, 301);
        assert_eq!(answer.header("location"), "https://web.shop/old/x?q");
        let mut sender = client.http1(&web).await;
        let mut request = get("/in/x?q=1");
        request.headers_mut().insert("x-gone", "1".parse().unwrap());
        assert_eq!(send(&mut sender, request).await.status, 200);
        let seen = seen.lock().unwrap();
        assert_eq!(seen[0].uri, "/out/x?q=1");
        assert_eq!(seen[0].headers["host"], "inner.example");
        assert_eq!(seen[0].headers["x-added"], "1");
        assert!(!seen[0].headers.contains_key("x-gone"));
    });
}

/// An app that fails so many times and then answers with what it got.
fn flaky(failures: usize) -> (impl crate::support::App, Rc<Cell<usize>>) {
    let calls = Rc::new(Cell::new(0));
    let count = calls.clone();
    let app = Http(move |request: Request<Incoming>| {
        let count = count.clone();
        async move {
            let sent = request.into_body().collect().await.unwrap().to_bytes();
            count.set(count.get() + 1);
            let mut response = Response::<Body>::new(body(sent));
            if count.get() <= failures {
                *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            }
            response
        }
    });
    (app, calls)
}

#[test]
fn a_listed_code_is_retried_with_the_same_body_and_zero_attempts_are_none() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, calls) = flaky(2);
        let _pod = mesh.pod(&web, "web-a", app).await;
        let rule = |attempts| pb::HttpRule {
            backends: vec![backend(&web, 1)],
            retry: Some(pb::Retry {
                attempts,
                codes: vec![503],
                ..Default::default()
            }),
            ..Default::default()
        };
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let post = || {
            Request::post("/")
                .header("host", "w")
                .body(body("again"))
                .unwrap()
        };
        route(&mesh, &web, "shop", vec![rule(0)]);
        assert_eq!(send(&mut sender, post()).await.status, 503);
        assert_eq!(calls.get(), 1);
        route(&mesh, &web, "shop", vec![rule(1)]);
        let answer = send(&mut sender, post()).await;
        assert_eq!((answer.status, answer.text()), (200, "again"));
        assert_eq!(calls.get(), 3);
    });
}

#[test]
fn an_endpoint_that_refuses_is_left_for_another() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("alive");
        let _pod = mesh.pod(&web, "web-a", app).await;
        // Nobody listens there.
        let ip = "127.63.255.1".parse().unwrap();
        let dead = workload("web-dead", ip, &[&web.key], TunnelProtocol::None);
        mesh.state.apply_addresses([Update::UpsertWorkload(dead)]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        for _ in 0..20 {
            let answer = send(&mut sender, get("/")).await;
            assert_eq!((answer.status, answer.text()), (200, "alive"));
        }
    });
}

#[test]
fn timeouts_end_tries_and_requests() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let never = Http(|_| std::future::pending::<Response<Body>>());
        let _pod = mesh.pod(&web, "web-a", never).await;
        let duration = |millis: i32| prost_types::Duration {
            seconds: 0,
            nanos: millis * 1_000_000,
        };
        let client = mesh.client("default", "curl").await;
        for (rule, reason) in [
            (
                pb::HttpRule {
                    request_timeout: Some(duration(100)),
                    ..Default::default()
                },
                "request_timeout",
            ),
            (
                pb::HttpRule {
                    backend_request_timeout: Some(duration(50)),
                    ..Default::default()
                },
                "per_try_timeout",
            ),
        ] {
            let rule = pb::HttpRule {
                backends: vec![backend(&web, 1)],
                ..rule
            };
            route(&mesh, &web, "shop", vec![rule]);
            let begun = Instant::now();
            let answer = client.get(&web, "/").await;
            assert_eq!(
                (answer.status, answer.header("x-adit-reason")),
                (504, reason)
            );
            assert!(begun.elapsed() < Duration::from_secs(5));
        }
    });
}

#[test]
fn a_mirror_gets_a_copy_with_the_body() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let shadow = mesh.service("shadow", Protocol::Http);
        let (app, _) = echo("main");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let got = Rc::new(std::cell::RefCell::new(Vec::new()));
        let kept = got.clone();
        let copy = Http(move |request: Request<Incoming>| {
            let kept = kept.clone();
            async move {
                let (head, incoming) = request.into_parts();
                let sent = incoming.collect().await.unwrap().to_bytes();
                kept.borrow_mut().push((head.uri.to_string(), sent));
                Response::<Body>::new(body("ignored"))
            }
        });
        let _shadow = mesh.pod(&shadow, "shadow-a", copy).await;
        let mirror = pb::Filter {
            kind: Some(pb::filter::Kind::Mirror(pb::Mirror {
                backend: Some(backend(&shadow, 1)),
                per_million: 1_000_000,
            })),
        };
        let rule = pb::HttpRule {
            filters: vec![mirror],
            backends: vec![backend(&web, 1)],
            ..Default::default()
        };
        route(&mesh, &web, "shop", vec![rule]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let post = Request::post("/p?q=1")
            .header("host", "w")
            .body(body("copied"))
            .unwrap();
        assert_eq!(send(&mut sender, post).await.text(), "maincopied");
        assert_eq!(send(&mut sender, get("/g")).await.text(), "main");
        eventually("two copies", || async { got.borrow().len() == 2 }).await;
        let mut got = got.borrow().clone();
        got.sort();
        assert_eq!(got[0], ("/g".into(), "".into()));
        assert_eq!(got[1], ("/p?q=1".into(), "copied".into()));
    });
}

#[test]
fn a_copy_passes_the_policies_of_its_endpoint_or_is_not_sent() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let shadow = mesh.service("shadow", Protocol::Http);
        let (app, _) = echo("main");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let (copy, seen) = echo("ignored");
        let _shadow = mesh.pod(&shadow, "shadow-a", copy).await;
        let target = pb::Target {
            kind: Some(pb::target::Kind::Workload(
                "Kubernetes//Pod/shop/shadow-a".into(),
            )),
        };
        let mut deny = policy("d", 1, target);
        deny.rules = vec![allow("*", &[], &["/secret"])];
        put(&mesh, &deny);
        let mirror = pb::Filter {
            kind: Some(pb::filter::Kind::Mirror(pb::Mirror {
                backend: Some(backend(&shadow, 1)),
                per_million: 1_000_000,
            })),
        };
        let rule = pb::HttpRule {
            filters: vec![mirror],
            backends: vec![backend(&web, 1)],
            ..Default::default()
        };
        route(&mesh, &web, "shop", vec![rule]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        assert_eq!(send(&mut sender, get("/secret")).await.text(), "main");
        assert_eq!(send(&mut sender, get("/open")).await.text(), "main");
        let arrived = || async { !seen.lock().unwrap().is_empty() };
        eventually("the copy that is allowed", arrived).await;
        let seen = seen.lock().unwrap();
        assert!(seen.iter().all(|head| head.uri == "/open"), "{seen:?}");
    });
}

#[test]
fn a_session_stays_at_its_endpoint() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (a, _) = echo("a");
        let (b, _) = echo("b");
        let (c, _) = echo("c");
        let _a = mesh.pod(&web, "web-a", a).await;
        let _b = mesh.pod(&web, "web-b", b).await;
        let _c = mesh.pod(&web, "web-c", c).await;
        let rule = pb::HttpRule {
            backends: vec![backend(&web, 1)],
            session_persistence: Some(pb::SessionPersistence {
                name: "sid".into(),
                session_cookie: true,
                ..Default::default()
            }),
            ..Default::default()
        };
        route(&mesh, &web, "shop", vec![rule]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let first = send(&mut sender, get("/")).await;
        let cookie = first.header("set-cookie").split(';').next().unwrap();
        assert!(cookie.starts_with("sid="), "{first:?}");
        for _ in 0..20 {
            let mut request = get("/");
            request
                .headers_mut()
                .insert("cookie", cookie.parse().unwrap());
            let answer = send(&mut sender, request).await;
            assert_eq!(answer.text(), first.text());
        }
    });
}
