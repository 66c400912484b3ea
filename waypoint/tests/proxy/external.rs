//! Whom the waypoint asks itself: external authorization, and end users' tokens.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::spawn_local;
use tokio::time::timeout;

use crate::support::{DEADLINE, Http, Mesh, Vip, body, echo, get, run, send};

pub fn custom(vip: &Vip, provider: &str) -> pb::AuthorizationPolicy {
    pb::AuthorizationPolicy {
        object: Some(pb::ObjectRef {
            kind: "AuthorizationPolicy".into(),
            namespace: "shop".into(),
            name: "ask".into(),
            created: 1,
        }),
        action: pb::authorization_policy::Action::Custom.into(),
        provider: provider.into(),
        targets: vec![service(vip)],
        rules: vec![pb::AuthorizationRule {
            to: vec![pb::Operation {
                paths: vec!["/guarded*".into()],
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn service(vip: &Vip) -> pb::Target {
    pb::Target {
        kind: Some(pb::target::Kind::Service(pb::ServiceRef {
            namespace: vip.key.namespace.to_string(),
            hostname: vip.key.hostname.to_string(),
        })),
    }
}

/// Allows what has `x-token: good`, and keeps the bodies that it was shown.
pub async fn guard() -> (SocketAddr, Arc<Mutex<Vec<Bytes>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shown = Arc::<Mutex<Vec<Bytes>>>::default();
    let kept = shown.clone();
    spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let kept = kept.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let kept = kept.clone();
                async move {
                    let (head, incoming) = request.into_parts();
                    let good = head.headers.get("x-token").is_some_and(|t| t == "good");
                    let sent = incoming.collect().await?.to_bytes();
                    kept.lock().unwrap().push(sent);
                    let mut response = Response::new(Full::new(Bytes::new()));
                    if good {
                        let user = "alice".parse().unwrap();
                        response.headers_mut().insert("x-user", user);
                    } else {
                        *response.status_mut() = http::StatusCode::UNAUTHORIZED;
                        *response.body_mut() = Full::new(Bytes::from_static(b"who are you?"));
                    }
                    Ok::<_, hyper::Error>(response)
                }
            });
            let server = hyper::server::conn::http1::Builder::new();
            spawn_local(server.serve_connection(TokioIo::new(stream), service));
        }
    });
    (address, shown)
}

/// The provider `guard` at that address, which sees four bytes of a body.
pub fn provider(mesh: &Mesh, address: SocketAddr) {
    let provider = pb::Provider {
        name: "guard".into(),
        kind: Some(pb::provider::Kind::ExtAuthzHttp(pb::ExtAuthzHttp {
            common: Some(pb::ExtAuthzCommon {
                service: Some(pb::ProviderService {
                    hostname: address.ip().to_string(),
                    port: address.port().into(),
                    timeout: None,
                }),
                body_max_bytes: 4,
                body_allow_partial: true,
                ..Default::default()
            }),
            include_request_headers: vec!["x-token".into()],
            headers_to_upstream_on_allow: vec!["x-user".into()],
            ..Default::default()
        })),
    };
    mesh.put(pb::PROVIDER_TYPE, "guard", &provider);
}

/// A CUSTOM policy without `targetRefs`, the usual form, is one of the workloads that it selects.
#[test]
fn a_provider_is_asked_for_policies_that_select_workloads() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("got ");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let (address, shown) = guard().await;
        provider(&mesh, address);
        let mut policy = custom(&web, "guard");
        policy.targets = vec![pb::Target {
            kind: Some(pb::target::Kind::Workload(
                "Kubernetes//Pod/shop/web-a".into(),
            )),
        }];
        let name = "AuthorizationPolicy/shop/ask";
        mesh.put(pb::AUTHORIZATION_POLICY_TYPE, name, &policy);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        assert_eq!(send(&mut sender, get("/open")).await.status, 200);
        let denied = send(&mut sender, get("/guarded")).await;
        assert_eq!((denied.status, denied.text()), (401, "who are you?"));
        let post = Request::post("/guarded/x")
            .header("host", "w")
            .header("x-token", "good")
            .body(body("all of it"))
            .unwrap();
        let allowed = send(&mut sender, post).await;
        assert_eq!((allowed.status, allowed.text()), (200, "got all of it"));
        let seen = seen.lock().unwrap();
        assert_eq!(seen.last().unwrap().headers["x-user"], "alice");
        assert_eq!(shown.lock().unwrap().last().unwrap(), "all ");
    });
}

/// Who is silent for a moment on a port that declares nothing counts as no HTTP, and must not
/// get around a provider by that.
#[test]
fn a_provider_cannot_be_avoided_by_not_speaking_http_at_first() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Undeclared);
        let (app, seen) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let (address, _) = guard().await;
        provider(&mesh, address);
        for target in [
            service(&web),
            pb::Target {
                kind: Some(pb::target::Kind::Workload(
                    "Kubernetes//Pod/shop/web-a".into(),
                )),
            },
        ] {
            let mut policy = custom(&web, "guard");
            policy.targets = vec![target];
            let name = "AuthorizationPolicy/shop/ask";
            mesh.put(pb::AUTHORIZATION_POLICY_TYPE, name, &policy);
            let client = mesh.client("default", "curl").await;
            assert_eq!(client.get(&web, "/guarded").await.status, 401);
            let tunnel = client.tunnel(web.address).await.expect("accepted");
            let mut io = tunnel.into_io();
            // Nothing is said until the waypoint has made up its mind.
            let ended = timeout(DEADLINE, io.read_u8()).await.expect("it ends");
            assert!(ended.is_err(), "{ended:?}");
            let request = b"GET /guarded HTTP/1.1\r\nhost: w\r\n\r\n";
            let _ = io.write_all(request).await;
            assert!(seen.lock().unwrap().is_empty());
        }
    });
}

#[test]
fn a_provider_decides_sees_the_body_and_adds_headers() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("got ");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let (address, shown) = guard().await;
        provider(&mesh, address);
        let policy = custom(&web, "guard");
        mesh.put(
            pb::AUTHORIZATION_POLICY_TYPE,
            "AuthorizationPolicy/shop/ask",
            &policy,
        );
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        assert_eq!(send(&mut sender, get("/open")).await.status, 200);
        let denied = send(&mut sender, get("/guarded")).await;
        assert_eq!((denied.status, denied.text()), (401, "who are you?"));
        assert_eq!(denied.header("x-adit-reason"), "ext_authz_denied");
        let post = Request::post("/guarded/x")
            .header("host", "w")
            .header("x-token", "good")
            .body(body("all of it"))
            .unwrap();
        let allowed = send(&mut sender, post).await;
        assert_eq!((allowed.status, allowed.text()), (200, "got all of it"));
        let seen = seen.lock().unwrap();
        assert_eq!(seen.last().unwrap().headers["x-user"], "alice");
        assert_eq!(shown.lock().unwrap().last().unwrap(), "all ");
    });
}

#[test]
fn a_provider_that_is_not_there_denies() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let policy = custom(&web, "nobody");
        mesh.put(
            pb::AUTHORIZATION_POLICY_TYPE,
            "AuthorizationPolicy/shop/ask",
            &policy,
        );
        let client = mesh.client("default", "curl").await;
        assert_eq!(client.get(&web, "/guarded").await.status, 403);
        assert_eq!(client.get(&web, "/open").await.status, 200);
    });
}

#[test]
fn a_token_that_is_no_good_is_refused_and_none_is_not() {
    let selected = pb::Target {
        kind: Some(pb::target::Kind::Workload(
            "Kubernetes//Pod/shop/web-a".into(),
        )),
    };
    for by_selector in [None, Some(selected)] {
        run(async {
            let mesh = Mesh::new().await;
            let web = mesh.service("web", Protocol::Http);
            let (app, _) = echo("a");
            let _pod = mesh.pod(&web, "web-a", app).await;
            let target = by_selector.unwrap_or_else(|| service(&web));
            let authentication = pb::RequestAuthentication {
                object: Some(pb::ObjectRef {
                    kind: "RequestAuthentication".into(),
                    namespace: "shop".into(),
                    name: "jwt".into(),
                    created: 1,
                }),
                targets: vec![target],
                invalid: "rules[0].jwks: malformed".into(),
                ..Default::default()
            };
            mesh.put(
                pb::REQUEST_AUTHENTICATION_TYPE,
                "RequestAuthentication/shop/jwt",
                &authentication,
            );
            let client = mesh.client("default", "curl").await;
            let mut sender = client.http1(&web).await;
            assert_eq!(send(&mut sender, get("/")).await.status, 200);
            let mut request = get("/");
            let token = "Bearer aaaa.bbbb.cccc".parse().unwrap();
            request.headers_mut().insert("authorization", token);
            let refused = send(&mut sender, request).await;
            assert_eq!(refused.status, 401);
            assert!(refused.header("www-authenticate").starts_with("Bearer"));
        });
    }
}

/// What a client has not sent to its end must not reach an endpoint as if it had.
#[test]
fn a_body_that_breaks_off_while_a_provider_is_shown_it_is_not_complete() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let whole = Arc::<Mutex<Vec<Bytes>>>::default();
        let kept = whole.clone();
        let app = Http(move |request: Request<Incoming>| {
            let kept = kept.clone();
            async move {
                if let Ok(read) = request.into_body().collect().await {
                    kept.lock().unwrap().push(read.to_bytes());
                }
                Response::new(body("taken"))
            }
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let (address, _) = guard().await;
        provider(&mesh, address);
        let policy = custom(&web, "guard");
        let name = "AuthorizationPolicy/shop/ask";
        mesh.put(pb::AUTHORIZATION_POLICY_TYPE, name, &policy);
        let client = mesh.client("default", "curl").await;
        let mut io = client.tunnel(web.address).await.unwrap().into_io();
        let request = b"POST /guarded HTTP/1.1\r\nhost: w\r\nx-token: good\r\n\
            transfer-encoding: chunked\r\n\r\n3\r\nabc\r\nnonsense\r\n";
        io.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let read = timeout(DEADLINE, io.read_to_end(&mut answer)).await;
        let _ = read.expect("it ends");
        let text = String::from_utf8_lossy(&answer);
        assert!(!text.starts_with("HTTP/1.1 200"), "{text}");
        // What is complete arrives.
        let post = Request::post("/guarded")
            .header("host", "w")
            .header("x-token", "good")
            .body(body("all"))
            .unwrap();
        let answer = send(&mut client.http1(&web).await, post).await;
        assert_eq!(answer.text(), "taken");
        assert_eq!(*whole.lock().unwrap(), ["all"]);
    });
}

/// An edit that breaks a rule must not let clients write what only the rule may.
#[test]
fn headers_of_a_rule_that_cannot_be_used_are_written_by_nobody() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let authentication = pb::RequestAuthentication {
            object: Some(pb::ObjectRef {
                kind: "RequestAuthentication".into(),
                namespace: "shop".into(),
                name: "jwt".into(),
                created: 1,
            }),
            targets: vec![service(&web)],
            rules: vec![pb::JwtRule {
                issuer: "https://issuer.example".into(),
                jwks: "no keys".into(),
                output_payload_to_header: "x-payload".into(),
                output_claim_to_headers: vec![pb::ClaimToHeader {
                    header: "x-role".into(),
                    claim: "role".into(),
                }],
                ..Default::default()
            }],
            // As the control plane says it, which has found it before.
            invalid: "jwtRules[0].jwks: is no key set".into(),
        };
        let name = "RequestAuthentication/shop/jwt";
        mesh.put(pb::REQUEST_AUTHENTICATION_TYPE, name, &authentication);
        let client = mesh.client("default", "curl").await;
        let mut request = get("/");
        for name in ["x-role", "x-payload", "x-other"] {
            request.headers_mut().insert(name, "admin".parse().unwrap());
        }
        let mut sender = client.http1(&web).await;
        assert_eq!(send(&mut sender, request).await.status, 200);
        let seen = seen.lock().unwrap();
        let headers = &seen.last().unwrap().headers;
        assert_eq!(headers["x-other"], "admin");
        assert!(headers.get("x-role").is_none());
        assert!(headers.get("x-payload").is_none());
    });
}
