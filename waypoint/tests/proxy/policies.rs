//! Authorization on the way.

use adit_shared::hbone::OpenError;
use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;
use http::{Request, StatusCode};

use crate::support::{Mesh, Vip, body, echo, get, run, send};

pub fn policy(name: &str, action: i32, target: pb::Target) -> pb::AuthorizationPolicy {
    pb::AuthorizationPolicy {
        object: Some(pb::ObjectRef {
            kind: "AuthorizationPolicy".into(),
            namespace: "shop".into(),
            name: name.into(),
            created: 1,
        }),
        action,
        targets: vec![target],
        ..Default::default()
    }
}

pub fn service(vip: &Vip) -> pb::Target {
    pb::Target {
        kind: Some(pb::target::Kind::Service(pb::ServiceRef {
            namespace: vip.key.namespace.to_string(),
            hostname: vip.key.hostname.to_string(),
        })),
    }
}

pub fn allow(from: &str, methods: &[&str], paths: &[&str]) -> pb::AuthorizationRule {
    pb::AuthorizationRule {
        from: vec![pb::Source {
            principals: vec![from.into()],
            ..Default::default()
        }],
        to: vec![pb::Operation {
            methods: methods.iter().map(ToString::to_string).collect(),
            paths: paths.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub fn put(mesh: &Mesh, policy: &pb::AuthorizationPolicy) {
    let name = &policy.object.as_ref().unwrap().name;
    let name = format!("AuthorizationPolicy/shop/{name}");
    mesh.put(pb::AUTHORIZATION_POLICY_TYPE, &name, policy);
}

#[test]
fn who_calls_and_how_decides_and_a_change_is_seen_by_the_next_request() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let curl = mesh.client("default", "curl").await;
        let other = mesh.client("default", "other").await;
        let mut open = curl.http1(&web).await;
        assert_eq!(send(&mut open, get("/ok")).await.status, 200);

        let mut only = policy("only", 0, service(&web));
        let rule = allow("cluster.local/ns/default/sa/curl", &["GET"], &["/ok*"]);
        only.rules.push(rule);
        put(&mesh, &only);
        // On the connection that was open before.
        assert_eq!(send(&mut open, get("/ok")).await.status, 200);
        let denied = send(&mut open, get("/no")).await;
        assert_eq!(denied.status, 403);
        assert_eq!(denied.text(), "RBAC: access denied");
        assert_eq!(denied.header("x-adit-reason"), "rbac_denied");
        let post = Request::post("/ok").header("host", "w").body(body("x"));
        assert_eq!(send(&mut open, post.unwrap()).await.status, 403);
        assert_eq!(other.get(&web, "/ok").await.status, 403);
        // What was judged is what is sent.
        assert_eq!(curl.get(&web, "/no/../ok").await.status, 200);
        assert_eq!(curl.get(&web, "/ok/../no").await.status, 403);
        assert_eq!(seen.lock().unwrap().last().unwrap().uri, "/ok");

        mesh.remove(
            pb::AUTHORIZATION_POLICY_TYPE,
            "AuthorizationPolicy/shop/only",
        );
        assert_eq!(send(&mut open, get("/no")).await.status, 200);
    });
}

#[test]
fn a_policy_for_a_workload_is_asked_when_it_has_been_picked() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let curl = mesh.client("default", "curl").await;
        let workload = pb::Target {
            kind: Some(pb::target::Kind::Workload(
                "Kubernetes//Pod/shop/web-a".into(),
            )),
        };
        let mut deny = policy("deny", 1, workload);
        deny.rules.push(allow("*", &[], &["/secret"]));
        put(&mesh, &deny);
        assert_eq!(curl.get(&web, "/").await.status, 200);
        assert_eq!(curl.get(&web, "/secret").await.status, 403);
    });
}

#[test]
fn what_cannot_be_understood_denies() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let curl = mesh.client("default", "curl").await;
        let mut invalid = policy("broken", 0, service(&web));
        invalid.invalid = "rules[0].from: unknown field".into();
        put(&mesh, &invalid);
        assert_eq!(curl.get(&web, "/").await.status, 403);
    });
}

#[test]
fn a_connection_is_judged_by_what_is_known_of_it() {
    run(async {
        let mesh = Mesh::new().await;
        let db = mesh.service("db", Protocol::Tcp);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&db, "db-a", app).await;
        let curl = mesh.client("default", "curl").await;
        let other = mesh.client("default", "other").await;
        let mut only = policy("only", 0, service(&db));
        only.rules.push(pb::AuthorizationRule {
            from: vec![pb::Source {
                principals: vec!["cluster.local/ns/default/sa/curl".into()],
                ..Default::default()
            }],
            ..Default::default()
        });
        put(&mesh, &only);
        assert!(curl.tunnel(db.address).await.is_ok());
        let refused = other.tunnel(db.address).await;
        let Err(OpenError::Refused { status, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(status, StatusCode::UNAUTHORIZED);
    });
}

/// MeshConfig.defaultConfig.gatewayTopology.numTrustedProxies.
#[test]
fn the_end_users_address_is_what_trusted_proxies_say() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let mut deny = policy(
            "d",
            pb::authorization_policy::Action::Deny.into(),
            service(&web),
        );
        deny.rules = vec![pb::AuthorizationRule {
            from: vec![pb::Source {
                remote_ip_blocks: vec!["203.0.113.0/24".into()],
                ..Default::default()
            }],
            ..Default::default()
        }];
        put(&mesh, &deny);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        for (trusted_proxies, status) in [(0, 200), (1, 403), (2, 200)] {
            let settings = pb::Settings {
                trust_domain: "cluster.local".into(),
                trusted_proxies,
                ..Default::default()
            };
            mesh.put(pb::SETTINGS_TYPE, "mesh", &settings);
            let mut request = get("/");
            let forwarded = "198.51.100.1, 203.0.113.9".parse().unwrap();
            request.headers_mut().insert("x-forwarded-for", forwarded);
            let answer = send(&mut sender, request).await;
            assert_eq!(answer.status, status, "{trusted_proxies}");
        }
    });
}
