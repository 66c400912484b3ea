//! Rules with the filter ExternalAuth: a service of the mesh, behind HBONE like any other,
//! decides whether what they match goes on.

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use adit_shared::hbone::Tunnel;
use adit_shared::proto::ext_authz::authorization_server::{Authorization, AuthorizationServer};
use adit_shared::proto::ext_authz::{self as wire, check_response::HttpResponse};
use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::external_auth::Protocol as Auth;
use adit_shared::proto::waypoint::service_port::Protocol;
use adit_waypoint::client::LocalExecutor;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::external::{custom, guard, provider};
use crate::policies::{policy, put, service};
use crate::routes::{backend, route};
use crate::support::{
    App, Body, DEADLINE, Http, Mesh, Raw, Vip, body, echo, eventually, get, run, send,
};

/// What a service was asked: head and body.
type Asked = Arc<Mutex<Vec<(http::request::Parts, Bytes)>>>;

/// A service that lets pass what has `x-token: good`, as `alice`.
fn doorkeeper() -> (impl App, Asked) {
    let asked = Asked::default();
    let kept = asked.clone();
    let app = Http(move |request: Request<Incoming>| {
        let kept = kept.clone();
        async move {
            let (head, incoming) = request.into_parts();
            let sent = incoming.collect().await.unwrap().to_bytes();
            let token = head.headers.get("x-token").cloned();
            kept.lock().unwrap().push((head, sent));
            let answer = Response::builder().header("content-type", "text/plain");
            match token.as_ref().map(|token| token.as_bytes()) {
                Some(b"good") => answer.header("x-user", "alice").body(body("welcome")),
                Some(b"broken") => answer.status(503).body(body("")),
                _ => answer
                    .status(401)
                    .header("www-authenticate", "Basic")
                    .body(body("who are you?")),
            }
            .unwrap()
        }
    });
    (app, asked)
}

fn asks(service: &Vip, protocol: Auth, body_max_bytes: u32) -> pb::Filter {
    pb::Filter {
        kind: Some(pb::filter::Kind::ExternalAuth(pb::ExternalAuth {
            backend: Some(backend(service, 1)),
            body_max_bytes,
            protocol: Some(protocol),
        })),
    }
}

/// By HTTP, with the token.
fn by_http() -> Auth {
    Auth::Http(pb::ExternalAuthHttp {
        allowed_headers: vec!["X-Token".into()],
        ..Default::default()
    })
}

fn rule(filters: Vec<pb::Filter>, to: &Vip) -> pb::HttpRule {
    pb::HttpRule {
        filters,
        backends: vec![backend(to, 1)],
        ..Default::default()
    }
}

fn with(token: &str, mut request: Request<Body>) -> Request<Body> {
    let token = token.parse().unwrap();
    request.headers_mut().insert("x-token", token);
    request
}

fn post(path: &str, text: &'static str) -> Request<Body> {
    Request::post(path)
        .header("host", "web.shop")
        .header("content-type", "application/json")
        .body(body(text))
        .unwrap()
}

#[test]
fn a_service_that_speaks_http_is_asked_before_anything_is_changed() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let (app, seen) = echo("got ");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (app, asked) = doorkeeper();
        let keeper = mesh.pod(&authz, "authz-a", app).await;
        let rewrite = pb::Filter {
            kind: Some(pb::filter::Kind::Rewrite(pb::UrlRewrite {
                path: Some(pb::PathModifier {
                    kind: Some(pb::path_modifier::Kind::Full("/inner".into())),
                }),
                ..Default::default()
            })),
        };
        let protocol = Auth::Http(pb::ExternalAuthHttp {
            path_prefix: "/check/".into(),
            allowed_headers: vec!["X-Token".into()],
            ..Default::default()
        });
        let filters = vec![rewrite, asks(&authz, protocol, 8)];
        route(&mesh, &web, "shop", vec![rule(filters, &web)]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;

        let mut request = get("/p?q=1");
        let headers = request.headers_mut();
        headers.insert("x-secret", "1".parse().unwrap());
        headers.insert("authorization", "Bearer t".parse().unwrap());
        let denied = send(&mut sender, request).await;
        assert_eq!((denied.status, denied.text()), (401, "who are you?"));
        assert_eq!(denied.header("www-authenticate"), "Basic");
        assert_eq!(denied.header("x-adit-reason"), "ext_authz_denied");
        assert!(seen.lock().unwrap().is_empty());
        {
            let asked = asked.lock().unwrap();
            let (head, _) = asked.last().unwrap();
            assert_eq!((head.method.as_str(), head.uri.path()), ("GET", "/check/p"));
            assert_eq!(head.uri.query(), Some("q=1"));
            assert_eq!(head.headers["host"], "web.shop");
            assert_eq!(head.headers["content-length"], "0");
            assert_eq!(head.headers["authorization"], "Bearer t");
            assert_eq!(head.headers.len(), 3, "{:?}", head.headers);
        }
        // To its last byte, and no longer.
        let answer = send(&mut sender, with("good", post("/p", "all of i"))).await;
        assert_eq!((answer.status, answer.text()), (200, "got all of i"));
        assert_eq!(asked.lock().unwrap().last().unwrap().1, "all of i");
        {
            let seen = seen.lock().unwrap();
            let head = seen.last().unwrap();
            assert_eq!(head.uri, "/inner");
            assert_eq!(head.headers["x-user"], "alice");
            // The body is still the client's.
            assert_eq!(head.headers["content-type"], "application/json");
            assert_eq!(head.headers["content-length"], "8");
        }
        let before = asked.lock().unwrap().len();
        let longer = send(&mut sender, with("good", post("/p", "all of it"))).await;
        assert_eq!(longer.status, 413);
        assert_eq!(asked.lock().unwrap().len(), before);
        assert!(keeper.tunnels.get() > 0, "it was reached by HBONE");
    });
}

#[test]
fn what_the_request_gets_of_the_answer_can_be_chosen() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let (app, seen) = echo("");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (app, asked) = doorkeeper();
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        for (chosen, user) in [("x-other", false), ("X-User", true)] {
            let protocol = Auth::Http(pb::ExternalAuthHttp {
                allowed_headers: vec!["x-token".into()],
                allowed_response_headers: vec![chosen.into()],
                ..Default::default()
            });
            let filters = vec![asks(&authz, protocol, 0)];
            route(&mesh, &web, "shop", vec![rule(filters, &web)]);
            let client = mesh.client("default", "curl").await;
            let mut sender = client.http1(&web).await;
            let answer = send(&mut sender, with("good", post("/", "body"))).await;
            assert_eq!((answer.status, answer.text()), (200, "body"));
            let seen = seen.lock().unwrap();
            let headers = &seen.last().unwrap().headers;
            assert_eq!(headers.contains_key("x-user"), user);
            // No body was to go along.
            let asked = asked.lock().unwrap();
            let (head, sent) = asked.last().unwrap();
            assert_eq!(head.headers["content-length"], "0");
            assert!(sent.is_empty());
        }
    });
}

/// Decides by `x-ask`, and keeps what it was asked.
#[derive(Clone, Default)]
struct Service(Arc<Mutex<Vec<wire::attribute_context::HttpRequest>>>);

#[tonic::async_trait]
impl Authorization for Service {
    async fn check(
        &self,
        request: tonic::Request<wire::CheckRequest>,
    ) -> Result<tonic::Response<wire::CheckResponse>, tonic::Status> {
        let attributes = request.into_inner().attributes.unwrap_or_default();
        let http = attributes.request.and_then(|r| r.http).unwrap_or_default();
        let ask = http.headers.get("x-ask").cloned();
        self.0.lock().unwrap().push(http);
        let status = |code| {
            Some(wire::Status {
                code,
                message: String::new(),
            })
        };
        let option = |key: &str, value: &str| wire::HeaderValueOption {
            header: Some(wire::HeaderValue {
                key: key.into(),
                value: value.into(),
                raw_value: Vec::new(),
            }),
            append: None,
            append_action: 0,
        };
        Ok(tonic::Response::new(match ask.as_deref() {
            Some("allow") => wire::CheckResponse {
                status: status(0),
                http_response: Some(HttpResponse::OkResponse(wire::OkHttpResponse {
                    headers: vec![option("x-user", "ann")],
                    response_headers_to_add: vec![option("x-checked", "yes")],
                    ..Default::default()
                })),
            },
            Some("error") => return Err(tonic::Status::internal("broken")),
            _ => wire::CheckResponse {
                status: status(7),
                http_response: Some(HttpResponse::DeniedResponse(wire::DeniedHttpResponse {
                    status: Some(wire::HttpStatus { code: 402 }),
                    headers: vec![option("x-price", "7")],
                    body: "pay first".into(),
                })),
            },
        }))
    }
}

#[test]
fn a_service_that_speaks_envoys_protocol_decides() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Grpc);
        let (app, seen) = echo("got ");
        let _web = mesh.pod(&web, "web-a", app).await;
        let kept = Service::default();
        let server = AuthorizationServer::new(kept.clone());
        let app = Raw(move |tunnel: Tunnel| {
            let service = TowerToHyperService::new(server.clone());
            async move {
                let io = TokioIo::new(tunnel.into_io());
                let server = http2::Builder::new(LocalExecutor);
                let _ = server.serve_connection(io, service).await;
            }
        });
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        for (allowed, all) in [(vec![], true), (vec!["X-Ask".to_owned()], false)] {
            let protocol = Auth::Grpc(pb::ExternalAuthGrpc {
                allowed_headers: allowed,
            });
            let filters = vec![asks(&authz, protocol, 100)];
            route(&mesh, &web, "shop", vec![rule(filters, &web)]);
            let client = mesh.client("default", "curl").await;
            let mut sender = client.http1(&web).await;
            let mut asking = async |ask: &str| {
                let mut request = post("/p?q=1", "hello");
                let headers = request.headers_mut();
                headers.insert("x-ask", ask.parse().unwrap());
                headers.insert("x-secret", "1".parse().unwrap());
                send(&mut sender, request).await
            };
            let denied = asking("deny").await;
            assert_eq!((denied.status, denied.text()), (402, "pay first"));
            assert_eq!(denied.header("x-price"), "7");
            assert_eq!(asking("error").await.status, 403);
            let passed = asking("allow").await;
            assert_eq!((passed.status, passed.text()), (200, "got hello"));
            assert_eq!(passed.header("x-checked"), "yes");
            assert_eq!(
                seen.lock().unwrap().last().unwrap().headers["x-user"],
                "ann"
            );
            let kept = kept.0.lock().unwrap();
            let http = kept.last().unwrap();
            assert_eq!((&*http.method, &*http.path), ("POST", "/p?q=1"));
            assert_eq!((&*http.host, &*http.body), ("web.shop", "hello"));
            let names: Vec<&str> = http.headers.keys().map(|name| &**name).collect();
            match all {
                true => assert!(names.contains(&"x-secret") && names.contains(&":path")),
                false => assert_eq!(names, ["x-ask"]),
            }
        }
        // Only the tries that were allowed have come through.
        assert_eq!(seen.lock().unwrap().len(), 2);
    });
}

#[test]
fn preflights_are_answered_first_and_redirects_are_not() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let (app, asked) = doorkeeper();
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        let cors = pb::Filter {
            kind: Some(pb::filter::Kind::Cors(pb::Cors {
                allow_origins: vec!["https://shop.example".into()],
                allow_methods: vec!["GET".into()],
                ..Default::default()
            })),
        };
        let redirect = pb::Filter {
            kind: Some(pb::filter::Kind::Redirect(pb::Redirect {
                hostname: "elsewhere.example".into(),
                ..Default::default()
            })),
        };
        // Their order in the object means nothing.
        let rule = pb::HttpRule {
            filters: vec![redirect, asks(&authz, by_http(), 0), cors],
            ..Default::default()
        };
        route(&mesh, &web, "shop", vec![rule]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let of_origin = |mut request: Request<Body>| {
            let origin = "https://shop.example".parse().unwrap();
            request.headers_mut().insert("origin", origin);
            request
        };
        let mut preflight = of_origin(get("/p"));
        *preflight.method_mut() = http::Method::OPTIONS;
        let method = "GET".parse().unwrap();
        let headers = preflight.headers_mut();
        headers.insert("access-control-request-method", method);
        let answer = send(&mut sender, preflight).await;
        assert_eq!(answer.status, 204);
        assert!(asked.lock().unwrap().is_empty());
        let denied = send(&mut sender, of_origin(get("/p"))).await;
        assert_eq!(denied.status, 401);
        let allowed = denied.header("access-control-allow-origin");
        assert_eq!(allowed, "https://shop.example");
        let moved = send(&mut sender, with("good", of_origin(get("/p")))).await;
        assert_eq!(moved.status, 302);
        assert_eq!(moved.header("location"), "http://elsewhere.example/p");
        let allowed = moved.header("access-control-allow-origin");
        assert_eq!(allowed, "https://shop.example");
    });
}

#[test]
fn nothing_passes_where_nobody_can_be_asked() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let empty = mesh.service("empty", Protocol::Http);
        let (app, seen) = echo("");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (app, _) = doorkeeper();
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let gone = Vip {
            key: crate::support::service_name("gone"),
            address: web.address,
        };
        let mut invalid = asks(&authz, by_http(), 0);
        if let Some(pb::filter::Kind::ExternalAuth(auth)) = &mut invalid.kind {
            let reason = "there is no Service shop/nobody".into();
            auth.backend.as_mut().unwrap().to = Some(pb::backend::To::Invalid(reason));
        }
        for (filter, token, status, reason) in [
            // It does not know.
            (asks(&authz, by_http(), 0), "broken", 403, "ext_authz_error"),
            // It has no endpoints, or is not known to the mesh.
            (asks(&empty, by_http(), 0), "good", 403, "ext_authz_error"),
            (asks(&gone, by_http(), 0), "good", 403, "ext_authz_error"),
            // It does not speak that.
            (
                asks(&authz, Auth::Grpc(Default::default()), 0),
                "good",
                403,
                "ext_authz_error",
            ),
            // Nobody knows whom to ask.
            (invalid, "good", 500, "invalid_route"),
        ] {
            route(&mesh, &web, "shop", vec![rule(vec![filter.clone()], &web)]);
            let answer = send(&mut sender, with(token, get("/p"))).await;
            let got = (answer.status, answer.header("x-adit-reason"));
            assert_eq!(got, (status, reason), "{filter:?}");
        }
        assert!(seen.lock().unwrap().is_empty());
    });
}

#[test]
fn it_is_asked_once_for_all_tries_and_within_the_requests_time() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let tries = Rc::new(std::cell::Cell::new(0));
        let made = tries.clone();
        let app = Http(move |_: Request<Incoming>| {
            made.set(made.get() + 1);
            let status = match made.get() {
                3 => StatusCode::OK,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            async move {
                let mut response = Response::new(body(""));
                *response.status_mut() = status;
                response
            }
        });
        let _web = mesh.pod(&web, "web-a", app).await;
        let asked = Rc::new(std::cell::Cell::new(0));
        let counted = asked.clone();
        let app = Http(move |request: Request<Incoming>| {
            counted.set(counted.get() + 1);
            async move {
                if request.uri().path() == "/never" {
                    std::future::pending::<()>().await;
                }
                Response::<Body>::new(body(""))
            }
        });
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        let again = pb::HttpRule {
            retry: Some(pb::Retry {
                attempts: 5,
                codes: vec![503],
                ..Default::default()
            }),
            ..rule(vec![asks(&authz, by_http(), 16)], &web)
        };
        route(&mesh, &web, "shop", vec![again]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        assert_eq!(send(&mut sender, post("/", "sent")).await.status, 200);
        assert_eq!((tries.get(), asked.get()), (3, 1));
        let short = pb::HttpRule {
            request_timeout: Some(prost_types::Duration {
                seconds: 0,
                nanos: 300_000_000,
            }),
            ..rule(vec![asks(&authz, by_http(), 0)], &web)
        };
        route(&mesh, &web, "shop", vec![short]);
        let late = send(&mut sender, get("/never")).await;
        assert_eq!(late.status, 504);
        assert_eq!(late.header("x-adit-reason"), "request_timeout");
        assert_eq!(tries.get(), 3);
    });
}

/// What the service has seen of a body has been read already when the copy is made.
#[test]
fn a_copy_has_the_body_that_the_service_was_shown() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let shadow = mesh.service("shadow", Protocol::Http);
        let (app, _) = echo("");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (app, asked) = doorkeeper();
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        let got = Asked::default();
        let kept = got.clone();
        let copy = Http(move |request: Request<Incoming>| {
            let kept = kept.clone();
            async move {
                let (head, incoming) = request.into_parts();
                if let Ok(sent) = incoming.collect().await {
                    kept.lock().unwrap().push((head, sent.to_bytes()));
                }
                Response::<Body>::new(body(""))
            }
        });
        let _shadow = mesh.pod(&shadow, "shadow-a", copy).await;
        let mirror = pb::Filter {
            kind: Some(pb::filter::Kind::Mirror(pb::Mirror {
                backend: Some(backend(&shadow, 1)),
                per_million: 1_000_000,
            })),
        };
        const LONG: usize = 1 << 20;
        let filters = vec![mirror, asks(&authz, by_http(), LONG as u32)];
        route(&mesh, &web, "shop", vec![rule(filters, &web)]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let long: &'static str = Box::leak("x".repeat(LONG).into_boxed_str());
        for sent in ["all of it", long] {
            let answer = send(&mut sender, with("good", post("/", sent))).await;
            assert_eq!((answer.status, answer.text() == sent), (200, true));
            assert_eq!(asked.lock().unwrap().last().unwrap().1, sent);
            let arrived = || async { got.lock().unwrap().len() == 1 };
            eventually("the copy, whole", arrived).await;
            let (head, copy) = got.lock().unwrap().pop().unwrap();
            assert_eq!(copy, sent);
            assert_eq!(head.headers["x-user"], "alice");
        }
    });
}

/// CUSTOM policies and filters are both asked, the policies first.
#[test]
fn a_policys_provider_and_a_rules_service_have_both_to_agree() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let (app, seen) = echo("got ");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (app, asked) = doorkeeper();
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        let (address, shown) = guard().await;
        provider(&mesh, address);
        let name = "AuthorizationPolicy/shop/ask";
        mesh.put(pb::AUTHORIZATION_POLICY_TYPE, name, &custom(&web, "guard"));
        let filters = vec![asks(&authz, by_http(), 100)];
        route(&mesh, &web, "shop", vec![rule(filters, &web)]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        // The policy is about that path.
        assert_eq!(send(&mut sender, post("/guarded", "x")).await.status, 401);
        assert!(asked.lock().unwrap().is_empty());
        assert_eq!(send(&mut sender, post("/open", "x")).await.status, 401);
        assert_eq!(asked.lock().unwrap().len(), 1);
        // Each has seen as much of the body as it wants, and all of it arrives.
        let request = with("good", post("/guarded", "all of it"));
        let answer = send(&mut sender, request).await;
        assert_eq!((answer.status, answer.text()), (200, "got all of it"));
        assert_eq!(shown.lock().unwrap().last().unwrap(), "all ");
        assert_eq!(asked.lock().unwrap().last().unwrap().1, "all of it");
        assert_eq!(seen.lock().unwrap().len(), 1);
    });
}

/// Who writes a route for a service of others cannot have more said in its name by asking a
/// service of his own first.
#[test]
fn what_a_consumers_service_adds_is_judged_like_the_rest_of_the_request() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let (app, seen) = echo("");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (app, _) = doorkeeper();
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        let deny = pb::authorization_policy::Action::Deny.into();
        let mut alice = policy("alice", deny, service(&web));
        alice.rules = vec![pb::AuthorizationRule {
            when: vec![pb::Condition {
                key: "request.headers[x-user]".into(),
                values: vec!["alice".into()],
                ..Default::default()
            }],
            ..Default::default()
        }];
        put(&mesh, &alice);
        let filters = || vec![asks(&authz, by_http(), 0)];
        route(&mesh, &web, "buyers", vec![rule(filters(), &web)]);
        let client = mesh.client("buyers", "curl").await;
        let mut sender = client.http1(&web).await;
        let denied = send(&mut sender, with("good", get("/"))).await;
        assert_eq!(denied.status, 403);
        assert!(seen.lock().unwrap().is_empty());
        // The owner of the service may: the policies are about what came.
        mesh.remove(pb::ROUTE_TYPE, "HTTPRoute/buyers/r");
        route(&mesh, &web, "shop", vec![rule(filters(), &web)]);
        let passed = send(&mut sender, with("good", get("/"))).await;
        assert_eq!(passed.status, 200);
        assert_eq!(
            seen.lock().unwrap().last().unwrap().headers["x-user"],
            "alice"
        );
    });
}

#[test]
fn a_policy_that_comes_while_the_service_is_asked_is_obeyed() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Http);
        let (app, seen) = echo("");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (asked, release) = (Rc::new(Semaphore::new(0)), Rc::new(Semaphore::new(0)));
        let (tell, wait) = (asked.clone(), release.clone());
        let app = Http(move |_: Request<Incoming>| {
            tell.add_permits(1);
            let wait = wait.clone();
            async move {
                wait.acquire().await.unwrap().forget();
                Response::<Body>::new(body(""))
            }
        });
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        let filters = vec![asks(&authz, by_http(), 0)];
        route(&mesh, &web, "shop", vec![rule(filters, &web)]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let deciding = async {
            eventually("asked", || async { asked.available_permits() == 1 }).await;
            let deny = pb::authorization_policy::Action::Deny.into();
            let mut closed = policy("closed", deny, service(&web));
            closed.rules = vec![pb::AuthorizationRule::default()];
            put(&mesh, &closed);
            release.add_permits(1);
        };
        let (answer, ()) = tokio::join!(send(&mut sender, get("/")), deciding);
        assert_eq!(answer.status, 403);
        assert_eq!(answer.header("x-adit-reason"), "rbac_denied");
        assert!(seen.lock().unwrap().is_empty());
    });
}

/// Who is silent for a moment on a port that declares nothing counts as no HTTP, and must not
/// get around the service by that; nor who was already connected.
#[test]
fn a_service_cannot_be_avoided_by_not_speaking_http_at_first() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Undeclared);
        let authz = mesh.service("authz", Protocol::Http);
        let (app, seen) = echo("");
        let pod = mesh.pod(&web, "web-a", app).await;
        let (app, _) = doorkeeper();
        let _keeper = mesh.pod(&authz, "authz-a", app).await;
        route(&mesh, &web, "shop", vec![rule(Vec::new(), &web)]);
        let client = mesh.client("default", "curl").await;
        let mut before = client
            .tunnel(web.address)
            .await
            .expect("accepted")
            .into_io();
        let request = b"GET / HTTP/1.1\r\nhost: w\r\n\r\n";
        let taken = || async { pod.tunnels.get() == 1 };
        eventually("it counts as a connection", taken).await;
        before.write_all(request).await.unwrap();
        let first = timeout(DEADLINE, before.read_u8()).await.expect("answered");
        assert_eq!(first.unwrap(), b'H');
        assert_eq!(seen.lock().unwrap().len(), 1);

        let filters = vec![asks(&authz, by_http(), 0)];
        route(&mesh, &web, "shop", vec![rule(filters, &web)]);
        assert_eq!(client.get(&web, "/").await.status, 401);
        let mut rest = Vec::new();
        let ended = timeout(DEADLINE, before.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "what was open ends");
        let mut io = client
            .tunnel(web.address)
            .await
            .expect("accepted")
            .into_io();
        // Nothing is said until the waypoint has made up its mind.
        let ended = timeout(DEADLINE, io.read_u8()).await.expect("it ends");
        assert!(ended.is_err(), "{ended:?}");
        let _ = io.write_all(request).await;
        assert_eq!(seen.lock().unwrap().len(), 1);
    });
}
