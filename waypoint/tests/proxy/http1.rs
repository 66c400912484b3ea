//! HTTP/1.1 through the waypoint.

use std::time::Duration;

use adit_shared::hbone::OpenError;
use adit_shared::model::{TunnelProtocol, Update};
use adit_shared::proto::waypoint::service_port::Protocol;
use http::{Request, StatusCode};

use crate::support::{Mesh, body, echo, eventually, get, run, send, send2, workload};

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

/// The node says GOAWAY and goes on for a while. A request that took a connection within that
/// tunnel would be cut off at the end of it, and one that is not idempotent not be sent again.
#[test]
fn what_comes_while_an_endpoints_node_is_replaced_takes_a_new_tunnel() {
    for protocol in [Protocol::Http, Protocol::Http2] {
        run(async move {
            let mesh = Mesh::new().await;
            let web = mesh.service("web", protocol);
            let (app, _) = echo("a");
            let pod = mesh.pod(&web, "web-a", app).await;
            let client = mesh.client("default", "curl").await;
            let ask = async || {
                let request = Request::post("/").header("host", "web").body(body("x"));
                let request = request.unwrap();
                let answer = match protocol {
                    Protocol::Http2 => send2(&client.http2(&web).await, request).await,
                    _ => send(&mut client.http1(&web).await, request).await,
                };
                assert_eq!((answer.status, answer.text()), (200, "ax"));
            };
            ask().await;
            ask().await;
            assert_eq!((pod.connections.get(), pod.tunnels.get()), (1, 1));
            pod.replace(Duration::from_secs(3600));
            eventually("a request takes a new tunnel", async || {
                ask().await;
                pod.connections.get() == 2
            })
            .await;
            // What lies idle in the old one does not hold it up.
            eventually("one connection is kept", async || {
                let counts = mesh.counts().await;
                let kept: usize = counts
                    .iter()
                    .map(|c| c.idle_upstream + c.http2_upstream)
                    .sum();
                kept == 1
            })
            .await;
            ask().await;
            assert_eq!((pod.connections.get(), pod.tunnels.get()), (2, 2));
        });
    }
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

/// A node may hear of a service that uses the waypoint before the waypoint does.
#[test]
fn a_connect_that_is_ahead_of_the_configuration_waits_for_it() {
    run(async {
        let mesh = std::rc::Rc::new(Mesh::new().await);
        let client = mesh.client("default", "curl").await;
        let later = mesh.clone();
        let told = tokio::task::spawn_local(async move {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            let web = later.service("web", Protocol::Http);
            let (app, _) = echo("a");
            let pod = later.pod(&web, "web-a", app).await;
            (web, pod)
        });
        // The first service of a mesh.
        let tunnel = client.tunnel("10.96.0.1:80".parse().unwrap()).await;
        assert!(tunnel.is_ok(), "{tunnel:?}");
        let (web, _pod) = told.await.unwrap();
        assert_eq!(client.get(&web, "/").await.status, 200);
    });
}

#[test]
fn endpoints_with_names_alone_are_refused_and_said_to_be() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let mut named = workload(
            "web-a",
            [127, 0, 0, 1].into(),
            &[&web.key],
            TunnelProtocol::None,
        );
        named.addresses.clear();
        named.hostname = "web.example".into();
        mesh.state.apply_addresses([Update::UpsertWorkload(named)]);
        let client = mesh.client("default", "curl").await;
        let answer = client.get(&web, "/").await;
        assert_eq!(answer.status, 503);
        assert_eq!(answer.header("x-adit-reason"), "endpoints_without_address");
        // One that can be reached is enough.
        let (app, _) = echo("b");
        let _pod = mesh.pod(&web, "web-b", app).await;
        for _ in 0..10 {
            assert_eq!(client.get(&web, "/").await.text(), "b");
        }
    });
}

/// What hyper answers itself says why, and is counted like other answers.
#[test]
fn requests_that_cannot_be_read_are_refused_with_a_reason_and_counted() {
    run(async {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let large = format!(
            "GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n",
            "x".repeat(90_000)
        );
        let many = format!(
            "GET / HTTP/1.1\r\nhost: a\r\n{}\r\n",
            "x: 1\r\n".repeat(120)
        );
        for (request, status, reason) in [
            (
                "GET / HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
                400,
                "malformed_request",
            ),
            (&*large, 431, "headers_too_large"),
            (&*many, 431, "headers_too_large"),
        ] {
            let ended = |counts: Vec<adit_waypoint::worker::Counts>| counts[0].requests;
            let before = ended(mesh.counts().await);
            let mut io = client.tunnel(web.address).await.unwrap().into_io();
            // After one that is answered: nothing of it may stand in the way.
            io.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                .await
                .unwrap();
            let mut seen = Vec::new();
            while !seen.ends_with(b"\r\n\r\na") {
                seen.push(io.read_u8().await.unwrap());
            }
            let _ = io.write_all(request.as_bytes()).await;
            let mut rest = Vec::new();
            let read = io.read_to_end(&mut rest);
            let _ = tokio::time::timeout(crate::support::DEADLINE, read)
                .await
                .unwrap();
            let rest = String::from_utf8(rest).unwrap();
            assert!(rest.starts_with(&format!("HTTP/1.1 {status} ")), "{rest}");
            assert!(
                rest.contains(&format!("x-adit-reason: {reason}\r\n")),
                "{rest}"
            );
            eventually("both are counted", || async {
                ended(mesh.counts().await) == before + 2
            })
            .await;
        }
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
