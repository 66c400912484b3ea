//! What comes before a response (1xx).

use std::rc::Rc;

use adit_shared::hbone::Tunnel;
use adit_shared::proto::waypoint::service_port::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::support::{App, DEADLINE, Mesh, Raw, run};

async fn head<R: tokio::io::AsyncRead + Unpin>(io: &mut R) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = timeout(DEADLINE, io.read_u8()).await.expect("in time");
        match byte {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(head).unwrap()
}

/// Sends the informational responses at once, and the response when it is told to.
fn hinting(go: Rc<Notify>) -> impl App {
    Raw(move |tunnel: Tunnel| {
        let go = go.clone();
        async move {
            let mut io = tunnel.into_io();
            while !head(&mut io).await.is_empty() {
                io.write_all(
                    b"HTTP/1.1 100 Continue\r\n\r\n\
                      HTTP/1.1 102 Processing\r\n\r\n\
                      HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\
                      connection: x-own\r\nx-own: 1\r\ncontent-length: 5\r\n\r\n",
                )
                .await
                .unwrap();
                go.notified().await;
                io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .await
                    .unwrap();
            }
        }
    })
}

#[test]
fn informational_responses_come_before_their_response_and_as_soon_as_they_are_there() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let go = Rc::new(Notify::new());
        let _pod = mesh.pod(&web, "web-a", hinting(go.clone())).await;
        let client = mesh.client("default", "curl").await;
        let mut io = client.tunnel(web.address).await.unwrap().into_io();
        // On one connection: nothing of a request may be left for the next.
        for _ in 0..3 {
            io.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
                .await
                .unwrap();
            let mut seen = Vec::new();
            for _ in 0..3 {
                seen.push(head(&mut io).await);
            }
            assert_eq!(seen[0], "HTTP/1.1 100 Continue\r\n\r\n");
            assert_eq!(seen[1], "HTTP/1.1 102 Processing\r\n\r\n");
            assert_eq!(
                seen[2],
                "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n"
            );
            // Only now the endpoint answers.
            go.notify_one();
            let answer = head(&mut io).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
            let mut body = [0; 2];
            io.read_exact(&mut body).await.unwrap();
            assert_eq!(&body, b"ok");
        }
    });
}

#[test]
fn a_client_that_expects_100_gets_it_once() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let go = Rc::new(Notify::new());
        let app = Raw({
            let go = go.clone();
            move |tunnel: Tunnel| {
                let go = go.clone();
                async move {
                    let mut io = tunnel.into_io();
                    let _ = head(&mut io).await;
                    io.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                        .await
                        .unwrap();
                    let mut body = [0; 4];
                    io.read_exact(&mut body).await.unwrap();
                    go.notify_one();
                    io.write_all(
                        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
                    )
                    .await
                    .unwrap();
                    // Ended before, it would be reset.
                    let _ = io.read_u8().await;
                }
            }
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut io = client.tunnel(web.address).await.unwrap().into_io();
        io.write_all(
            b"POST / HTTP/1.1\r\nhost: web\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n",
        )
        .await
        .unwrap();
        assert_eq!(head(&mut io).await, "HTTP/1.1 100 Continue\r\n\r\n");
        io.write_all(b"body").await.unwrap();
        go.notified().await;
        let next = head(&mut io).await;
        assert_eq!(next, "HTTP/1.1 103 Early Hints\r\n\r\n");
        assert!(head(&mut io).await.starts_with("HTTP/1.1 204"));
    });
}

#[test]
fn http_1_0_knows_none() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let go = Rc::new(Notify::new());
        go.notify_one();
        let _pod = mesh.pod(&web, "web-a", hinting(go)).await;
        let client = mesh.client("default", "curl").await;
        let mut io = client.tunnel(web.address).await.unwrap().into_io();
        io.write_all(b"GET / HTTP/1.0\r\nhost: web\r\n\r\n")
            .await
            .unwrap();
        let answer = head(&mut io).await;
        assert!(answer.contains(" 200 OK"), "{answer}");
    });
}
