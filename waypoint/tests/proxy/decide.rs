//! What `/debug/decide` says of a request, and what becomes of it.

use std::collections::HashMap;

use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;
use adit_waypoint::admin::decide::Question;
use serde_json::Value;

use crate::policies::{allow, policy, put, service};
use crate::routes::{backend, reference, route};
use crate::support::{Client, Mesh, Vip, echo, get, run, send};

/// What is said of a GET of `path` by `default/curl`, with `x-forwarded-for`.
fn said(mesh: &Mesh, to: &Vip, path: &str, forwarded: &str) -> Value {
    let query = HashMap::from(
        [
            (
                "source",
                "spiffe://cluster.local/ns/default/sa/curl".to_owned(),
            ),
            ("sourceAddress", "127.0.0.1".to_owned()),
            ("destination", to.address.to_string()),
            ("path", path.to_owned()),
            (
                "headers",
                format!("host: web.shop\nx-forwarded-for: {forwarded}"),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    let question = Question::read(&query).expect("a question");
    question.answer(&mesh.state.load_full())
}

/// The status and the one endpoint that an answer stands for.
fn meant(said: &Value) -> (u64, String) {
    let denied = |of: &Value| of["allowed"] == false;
    if denied(&said["authorization"]) {
        return (403, String::new());
    }
    let route = &said["route"];
    if let Some(status) = route["status"].as_u64() {
        return (status, String::new());
    }
    if route["invalid"].is_string() {
        return (500, String::new());
    }
    let to = match route.is_null() {
        true => said,
        false => &route["backends"][0],
    };
    let endpoint = &to["endpoints"][0];
    if denied(&to["authorization"]) || denied(&endpoint["authorization"]) {
        return (403, String::new());
    }
    let uid = endpoint["workload"].as_str().expect("an endpoint");
    (200, uid.rsplit('/').next().unwrap_or_default().to_owned())
}

async fn agrees(mesh: &Mesh, client: &Client, to: &Vip, path: &str, forwarded: &str) -> u64 {
    let said = said(mesh, to, path, forwarded);
    let mut request = get(path);
    let value = forwarded.parse().unwrap();
    request.headers_mut().insert("x-forwarded-for", value);
    let answer = send(&mut client.http1(to).await, request).await;
    let (status, pod) = meant(&said);
    assert_eq!(u64::from(answer.status), status, "{path}: {said:#}");
    if status == 200 {
        assert_eq!(answer.text(), pod, "{path}: {said:#}");
    }
    status
}

fn rule(path: &str, filters: Vec<pb::Filter>, to: Option<&Vip>) -> pb::HttpRule {
    pb::HttpRule {
        matches: vec![pb::HttpMatch {
            path: Some(pb::http_match::Path::Prefix(path.into())),
            ..Default::default()
        }],
        filters,
        backends: to.map(|to| backend(to, 1)).into_iter().collect(),
        ..Default::default()
    }
}

#[test]
fn the_explanation_agrees_with_what_happens() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let v1 = mesh.service("v1", Protocol::Http);
        let bare = mesh.service("bare", Protocol::Http);
        let named = mesh.service("named", Protocol::Http);
        let (app, _) = echo("web-a");
        let _web = mesh.pod(&web, "web-a", app).await;
        let (app, _) = echo("v1-a");
        let _v1 = mesh.pod(&v1, "v1-a", app).await;
        let (app, _) = echo("bare-a");
        let _bare = mesh.pod(&bare, "bare-a", app).await;
        let (app, _) = echo("named-a");
        let _named = mesh.pod(&named, "named-a", app).await;
        let rewrite = pb::Filter {
            kind: Some(pb::filter::Kind::Rewrite(pb::UrlRewrite {
                path: Some(pb::PathModifier {
                    kind: Some(pb::path_modifier::Kind::Full("/inner".into())),
                }),
                ..Default::default()
            })),
        };
        // A rule without backends means what was dialled.
        let rules = vec![
            rule("/self", Vec::new(), None),
            rule("/v1", Vec::new(), Some(&v1)),
            rule("/rewritten", vec![rewrite], Some(&v1)),
        ];
        route(&mesh, &web, "shop", rules);
        // One for connections that name a server, which a request does not.
        let tls = pb::Route {
            object: Some(pb::ObjectRef {
                kind: "TLSRoute".into(),
                namespace: "shop".into(),
                name: "t".into(),
                created: 1,
            }),
            parents: vec![pb::RouteParent {
                service: Some(reference(&named)),
                port: 0,
                rejected: String::new(),
            }],
            hostnames: vec!["a.example".into()],
            kind: Some(pb::route::Kind::Tls(pb::L4Rules {
                rules: vec![pb::L4Rule {
                    backends: vec![backend(&named, 1)],
                    ..Default::default()
                }],
            })),
        };
        mesh.put(pb::ROUTE_TYPE, "TLSRoute/shop/t", &tls);
        let deny = pb::authorization_policy::Action::Deny.into();
        let mut closed = policy("closed", deny, service(&web));
        closed.rules = vec![allow("*", &[], &["/self/closed"])];
        put(&mesh, &closed);
        let mut remote = policy("remote", deny, service(&bare));
        remote.rules = vec![pb::AuthorizationRule {
            from: vec![pb::Source {
                remote_ip_blocks: vec!["203.0.113.0/24".into()],
                ..Default::default()
            }],
            ..Default::default()
        }];
        put(&mesh, &remote);
        let target = pb::Target {
            kind: Some(pb::target::Kind::Workload(
                "Kubernetes//Pod/shop/v1-a".into(),
            )),
        };
        let mut inner = policy("inner", deny, target);
        inner.rules = vec![allow("*", &[], &["/inner"])];
        put(&mesh, &inner);
        let settings = pb::Settings {
            trust_domain: "cluster.local".into(),
            trusted_proxies: 1,
            ..Default::default()
        };
        mesh.put(pb::SETTINGS_TYPE, "mesh", &settings);

        let client = mesh.client("default", "curl").await;
        let (friend, foe) = ("198.51.100.1", "203.0.113.9");
        for (to, path, forwarded, status) in [
            (&web, "/self", friend, 200),
            (&web, "/self/closed", friend, 403),
            (&web, "/self/x/../closed", friend, 403),
            (&web, "/v1", friend, 200),
            (&web, "/rewritten", friend, 403),
            (&web, "/nothing", friend, 404),
            (&bare, "/", friend, 200),
            (&bare, "/", foe, 403),
            (&named, "/", friend, 404),
        ] {
            let got = agrees(&mesh, &client, to, path, forwarded).await;
            assert_eq!(got, status, "{path} {forwarded}");
        }
    });
}

#[test]
fn the_explanation_says_whom_a_rule_has_asked() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let authz = mesh.service("authz", Protocol::Grpc);
        let (app, _) = echo("web-a");
        let _web = mesh.pod(&web, "web-a", app).await;
        let mut auth = pb::ExternalAuth {
            backend: Some(backend(&authz, 1)),
            protocol: Some(pb::external_auth::Protocol::Grpc(Default::default())),
            ..Default::default()
        };
        let filter = |auth: &pb::ExternalAuth| pb::Filter {
            kind: Some(pb::filter::Kind::ExternalAuth(auth.clone())),
        };
        route(
            &mesh,
            &web,
            "shop",
            vec![rule("/", vec![filter(&auth)], None)],
        );
        let asks = &said(&mesh, &web, "/", "198.51.100.1")["route"]["asks"];
        assert_eq!(asks["service"], "authz.shop.svc.cluster.local");
        assert_eq!(
            (&asks["port"], &asks["protocol"]),
            (&80.into(), &"GRPC".into())
        );
        // Where there is nobody, that is the answer.
        let nobody = pb::backend::To::Invalid("there is no Service shop/authz".into());
        auth.backend = Some(pb::Backend {
            to: Some(nobody),
            ..Default::default()
        });
        route(
            &mesh,
            &web,
            "shop",
            vec![rule("/", vec![filter(&auth)], None)],
        );
        let client = mesh.client("default", "curl").await;
        assert_eq!(agrees(&mesh, &client, &web, "/", "198.51.100.1").await, 500);
    });
}
