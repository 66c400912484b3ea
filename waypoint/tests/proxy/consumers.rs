//! Routes that callers write: what they may make of requests to a service of others.

use adit_shared::hbone::Tunnel;
use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;
use bytes::Bytes;

use crate::policies::{allow, policy, put, service};
use crate::routes::{backend, reference, route};
use crate::support::{Mesh, Raw, Vip, echo, eventually, get, run, send};

fn allowing(mesh: &Mesh, vip: &Vip, name: &str, paths: &[&str]) {
    let action = pb::authorization_policy::Action::Allow.into();
    let mut policy = policy(name, action, service(vip));
    policy.rules = vec![allow("*", &[], paths)];
    put(mesh, &policy);
}

fn rewrite(path: &str) -> pb::Filter {
    pb::Filter {
        kind: Some(pb::filter::Kind::Rewrite(pb::UrlRewrite {
            path: Some(pb::PathModifier {
                kind: Some(pb::path_modifier::Kind::Full(path.into())),
            }),
            ..Default::default()
        })),
    }
}

fn set(name: &str, value: &str) -> pb::Filter {
    pb::Filter {
        kind: Some(pb::filter::Kind::RequestHeaders(pb::HeaderModifier {
            set: vec![pb::Header {
                name: name.into(),
                value: value.into(),
            }],
            ..Default::default()
        })),
    }
}

fn rule(filters: Vec<pb::Filter>, to: &Vip) -> pb::HttpRule {
    pb::HttpRule {
        filters,
        backends: vec![backend(to, 1)],
        ..Default::default()
    }
}

#[test]
fn what_a_callers_route_makes_of_a_request_is_judged_too() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        allowing(&mesh, &web, "public", &["/public*"]);
        let client = mesh.client("buyers", "curl").await;
        let mut sender = client.http1(&web).await;

        route(
            &mesh,
            &web,
            "buyers",
            vec![rule(vec![rewrite("/admin")], &web)],
        );
        let denied = send(&mut sender, get("/public/x")).await;
        assert_eq!(denied.status, 403);
        // By a detour, too: the path is made comparable again.
        let detour = rewrite("/public/../admin");
        route(&mesh, &web, "buyers", vec![rule(vec![detour], &web)]);
        assert_eq!(send(&mut sender, get("/public/x")).await.status, 403);
        assert!(seen.lock().unwrap().is_empty());

        let elsewhere = rewrite("/public/y");
        route(&mesh, &web, "buyers", vec![rule(vec![elsewhere], &web)]);
        assert_eq!(send(&mut sender, get("/public/x")).await.status, 200);
        assert_eq!(seen.lock().unwrap().last().unwrap().uri, "/public/y");
        // The owner of a service may lead where it wants.
        mesh.remove(pb::ROUTE_TYPE, "HTTPRoute/buyers/r");
        route(
            &mesh,
            &web,
            "shop",
            vec![rule(vec![rewrite("/admin")], &web)],
        );
        assert_eq!(send(&mut sender, get("/public/x")).await.status, 200);
        assert_eq!(seen.lock().unwrap().last().unwrap().uri, "/admin");
    });
}

#[test]
fn a_callers_route_does_not_say_who_calls() {
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
                jwks_uri: "http://127.0.0.1:9/keys".into(),
                output_claim_to_headers: vec![pb::ClaimToHeader {
                    header: "x-role".into(),
                    claim: "role".into(),
                }],
                ..Default::default()
            }],
            ..Default::default()
        };
        let name = "RequestAuthentication/shop/jwt";
        mesh.put(pb::REQUEST_AUTHENTICATION_TYPE, name, &authentication);
        let filters = vec![
            set(
                "x-forwarded-client-cert",
                "URI=spiffe://cluster.local/ns/shop/sa/root",
            ),
            set("x-role", "admin"),
            set("authorization", "Bearer aaaa.bbbb.cccc"),
            set("x-mine", "1"),
        ];
        route(&mesh, &web, "buyers", vec![rule(filters, &web)]);
        let client = mesh.client("buyers", "curl").await;
        assert_eq!(client.get(&web, "/").await.status, 200);
        let seen = seen.lock().unwrap();
        let headers = &seen.last().unwrap().headers;
        assert_eq!(headers["x-mine"], "1");
        assert!(headers.get("x-role").is_none());
        assert!(headers.get("authorization").is_none());
        let certificate = headers["x-forwarded-client-cert"].to_str().unwrap();
        assert!(certificate.ends_with("/ns/buyers/sa/curl"), "{certificate}");
    });
}

/// A route may name several services as parents, and send from one to another.
#[test]
fn a_callers_route_leads_past_no_policy_of_another_service() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let admin = mesh.service("admin", Protocol::Http);
        let (app, _) = echo("web");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (app, seen) = echo("admin");
        let _admin = mesh.pod(&admin, "admin-a", app).await;
        allowing(&mesh, &admin, "nobody", &["/nothing"]);
        let client = mesh.client("buyers", "curl").await;
        let mut sender = client.http1(&web).await;
        route(&mesh, &web, "buyers", vec![rule(Vec::new(), &admin)]);
        assert_eq!(send(&mut sender, get("/secret")).await.status, 403);
        // Nor by copies.
        let mirror = pb::Filter {
            kind: Some(pb::filter::Kind::Mirror(pb::Mirror {
                backend: Some(backend(&admin, 1)),
                per_million: 1_000_000,
            })),
        };
        route(&mesh, &web, "buyers", vec![rule(vec![mirror], &web)]);
        assert_eq!(send(&mut sender, get("/secret")).await.text(), "web");
        assert_eq!(send(&mut sender, get("/nothing")).await.text(), "web");
        eventually("the copy that is allowed", || async {
            !seen.lock().unwrap().is_empty()
        })
        .await;
        let seen = seen.lock().unwrap();
        assert!(seen.iter().all(|head| head.uri == "/nothing"), "{seen:?}");
    });
}

#[test]
fn connections_that_a_callers_route_leads_elsewhere_are_judged_there() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Tcp);
        let admin = mesh.service("admin", Protocol::Tcp);
        let greeter = || {
            Raw(|mut tunnel: Tunnel| async move {
                let _ = tunnel.write_chunk(Bytes::from_static(b"hello")).await;
                let _ = tunnel.read_chunk().await;
            })
        };
        let _web = mesh.pod(&web, "web-a", greeter()).await;
        let _admin = mesh.pod(&admin, "admin-a", greeter()).await;
        let action = pb::authorization_policy::Action::Deny.into();
        let mut deny = policy("d", action, service(&admin));
        deny.rules = vec![allow("cluster.local/ns/buyers/*", &["GET"], &[])];
        put(&mesh, &deny);
        let wire = pb::Route {
            object: Some(pb::ObjectRef {
                kind: "TCPRoute".into(),
                namespace: "buyers".into(),
                name: "t".into(),
                created: 1,
            }),
            parents: vec![pb::RouteParent {
                service: Some(reference(&web)),
                port: 0,
                rejected: String::new(),
            }],
            kind: Some(pb::route::Kind::Tcp(pb::L4Rules {
                rules: vec![pb::L4Rule {
                    backends: vec![backend(&admin, 1)],
                    ..Default::default()
                }],
            })),
            ..Default::default()
        };
        mesh.put(pb::ROUTE_TYPE, "TCPRoute/buyers/t", &wire);
        let client = mesh.client("buyers", "curl").await;
        assert!(client.tunnel(web.address).await.is_err());
        let other = mesh.client("default", "curl").await;
        assert!(other.tunnel(web.address).await.is_ok());
    });
}
