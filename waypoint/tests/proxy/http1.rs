//! HTTP/1.1 through the waypoint.

use adit_shared::hbone::OpenError;
use adit_shared::proto::waypoint::service_port::Protocol;
use http::{Request, StatusCode};

use crate::support::{Mesh, body, echo, eventually, get, run, send};

#[test]
fn a_request_reaches_an_endpoint_and_says_who_sent_it() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("a");
        let pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        for n in 0..3 {
            let path = format!("/{n}?q=1");
            let mut request = get(&path);
            let headers = request.headers_mut();
            headers.insert(
                "x-forwarded-client-cert",
                "URI=spiffe://forged".parse().unwrap(),
            );
            headers.insert("connection", "keep-alive, x-hop".parse().unwrap());
            headers.insert("x-hop", "1".parse().unwrap());
            let answer = send(&mut sender, request).await;
            assert_eq!((answer.status, answer.text()), (200, "a"));
        }
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[2].uri, "/2?q=1");
        assert_eq!(seen[0].headers["host"], "web.shop");
        assert_eq!(
            seen[0].headers["x-forwarded-client-cert"],
            "By=spiffe://cluster.local/ns/shop/sa/waypoint;\
             URI=spiffe://cluster.local/ns/default/sa/curl"
        );
        assert!(!seen[0].headers.contains_key("x-hop"));
        assert!(seen[0].headers.contains_key("x-request-id"));
        // One connection carried them all.
        assert_eq!((pod.connections.get(), pod.tunnels.get()), (1, 1));
    });
}

#[test]
fn bodies_go_both_ways() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        for size in [1, 1000, 3 << 20] {
            let sent = vec![b'x'; size];
            let request = Request::post("/")
                .header("host", "web")
                .body(body(sent.clone()))
                .unwrap();
            let answer = send(&mut sender, request).await;
            assert!(answer.body == sent, "{size}: {}", answer.body.len());
        }
    });
}

#[test]
fn what_is_not_known_or_not_ours_is_refused() {
    run(async {
        let mesh = Mesh::new().await;
        let client = mesh.client("default", "curl").await;
        let refused = client.tunnel("10.96.9.9:80".parse().unwrap()).await;
        let Err(OpenError::Refused { status, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    });
}

#[test]
fn without_an_endpoint_the_answer_says_so() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let client = mesh.client("default", "curl").await;
        let answer = client.get(&web, "/").await;
        assert_eq!(answer.status, 503);
        assert_eq!(answer.header("x-adit-reason"), "no_endpoints");
    });
}

#[test]
fn an_endpoint_that_dies_is_said_to_and_one_that_comes_is_used() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        assert_eq!(send(&mut sender, get("/")).await.status, 200);
        pod.kill();
        eventually("its node is gone", || async {
            tokio::net::TcpStream::connect((pod.ip, 15008))
                .await
                .is_err()
        })
        .await;
        let answer = send(&mut sender, get("/")).await;
        assert_eq!(answer.status, 503);
        assert_eq!(answer.header("x-adit-reason"), "upstream_connect_refused");
        let (app, _) = echo("b");
        let _next = mesh.pod(&web, "web-b", app).await;
        for _ in 0..10 {
            let answer = send(&mut sender, get("/")).await;
            assert_eq!((answer.status, answer.text()), (200, "b"));
        }
    });
}
