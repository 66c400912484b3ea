//! Sessions over several replicas of a waypoint.

use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;

use crate::routes::{backend, route};
use crate::support::{Mesh, echo, get, run, send};

/// Two replicas, with nothing in common but what the control plane says, each with the same
/// two endpoints by name: a token of one leads to the same endpoint at the other, if the control
/// plane gives both the same key, and means nothing with another.
#[test]
fn replicas_with_the_key_of_their_gateway_understand_each_others_sessions() {
    run(async {
        let mut cookie = String::new();
        let mut endpoint = String::new();
        for (key, same) in [(1, true), (1, true), (2, false)] {
            let mesh = Mesh::new().await;
            let web = mesh.service("web", Protocol::Http);
            let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
            let mut pods = Vec::new();
            for name in names {
                let (app, _) = echo(name);
                pods.push(mesh.pod(&web, &format!("web-{name}"), app).await);
            }
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
            let secret = pb::Secret {
                name: "session-key".into(),
                session_key: vec![key; 32],
                ..Default::default()
            };
            mesh.put(pb::SECRET_TYPE, "session-key", &secret);
            let client = mesh.client("default", "curl").await;
            let mut sender = client.http1(&web).await;
            let ask = || {
                let mut request = get("/");
                if !cookie.is_empty() {
                    let value = cookie.parse().unwrap();
                    request.headers_mut().insert("cookie", value);
                }
                request
            };
            if cookie.is_empty() {
                let first = send(&mut sender, ask()).await;
                let set = first.header("set-cookie").split(';').next().unwrap();
                cookie = set.to_owned();
                endpoint = first.text().to_owned();
                continue;
            }
            let mut elsewhere = 0;
            for _ in 0..20 {
                let answer = send(&mut sender, ask()).await;
                elsewhere += usize::from(answer.text() != endpoint);
            }
            // By chance all twenty stay: once in 8^20.
            assert_eq!(elsewhere == 0, same, "{elsewhere} elsewhere with key {key}");
        }
    });
}
