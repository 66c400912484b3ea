//! What comes before a response (1xx).

use std::future::poll_fn;
use std::rc::Rc;

use adit_shared::hbone::Tunnel;
use adit_shared::proto::waypoint::service_port::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::time::timeout;

use bytes::Bytes;
use h2::client::ResponseFuture;
use http::{Request, Response, StatusCode};

use crate::support::{App, DEADLINE, Http2, Mesh, Raw, downgrade, run};

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

/// The same in HTTP/2.
fn hinting2(go: Rc<Notify>) -> impl App {
    Http2(move |_, mut respond: h2::server::SendResponse<Bytes>| {
        let go = go.clone();
        async move {
            // 101 means nothing in HTTP/2 (RFC 9113 8.6).
            for status in [100, 101, 102, 103] {
                let mut before = Response::builder().status(status);
                if status == 103 {
                    before = before.header("link", "</a.css>; rel=preload");
                }
                let before = before.body(()).unwrap();
                respond.send_informational(before).unwrap();
            }
            go.notified().await;
            let mut stream = respond.send_response(Response::new(()), false).unwrap();
            stream.send_data("ok".into(), true).unwrap();
        }
    })
}

/// What comes next before a response; `None`: the response does.
async fn before(response: &mut ResponseFuture) -> Option<(u16, String)> {
    let next = timeout(DEADLINE, poll_fn(|cx| response.poll_informational(cx)));
    let next = next.await.expect("in time")?.expect("no error");
    let link = next.headers().get("link");
    let link = link.map_or("", |link| link.to_str().unwrap());
    assert!(next.headers().keys().all(|name| name == "link"), "{next:?}");
    Some((next.status().as_u16(), link.to_owned()))
}

#[test]
fn informational_responses_pass_from_either_version_to_either() {
    for (endpoint2, client2) in [(true, true), (true, false), (false, true)] {
        run(async {
            let mesh = Mesh::new().await;
            let go = Rc::new(Notify::new());
            let web = if endpoint2 {
                mesh.service("web", Protocol::Http2)
            } else {
                let web = mesh.service("web", Protocol::Http);
                downgrade(&mesh, &web);
                web
            };
            let _pod = match endpoint2 {
                true => mesh.pod(&web, "web-a", hinting2(go.clone())).await,
                false => mesh.pod(&web, "web-a", hinting(go.clone())).await,
            };
            let client = mesh.client("default", "curl").await;
            let link = "</a.css>; rel=preload";
            if client2 {
                let mut sender = client.frames(&web).await;
                for _ in 0..3 {
                    let request = Request::get("http://web.shop/").body(()).unwrap();
                    let (mut response, _) = sender.send_request(request, true).unwrap();
                    for (status, link) in [(100, ""), (102, ""), (103, link)] {
                        let got = before(&mut response).await;
                        assert_eq!(got, Some((status, link.to_owned())));
                    }
                    go.notify_one();
                    assert_eq!(before(&mut response).await, None);
                    let answer = timeout(DEADLINE, response).await.unwrap().unwrap();
                    assert_eq!(answer.status(), StatusCode::OK);
                    let mut body = answer.into_body();
                    assert_eq!(body.data().await.unwrap().unwrap(), "ok");
                }
            } else {
                let mut io = client.tunnel(web.address).await.unwrap().into_io();
                for _ in 0..3 {
                    io.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
                        .await
                        .unwrap();
                    for expected in [
                        "100 Continue\r\n\r\n".to_owned(),
                        "102 Processing\r\n\r\n".to_owned(),
                        format!("103 Early Hints\r\nlink: {link}\r\n\r\n"),
                    ] {
                        assert_eq!(head(&mut io).await, format!("HTTP/1.1 {expected}"));
                    }
                    go.notify_one();
                    let answer = head(&mut io).await;
                    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
                    // In one chunk, as its length was not said.
                    let mut body = [0; 12];
                    io.read_exact(&mut body).await.unwrap();
                    assert_eq!(&body, b"2\r\nok\r\n0\r\n\r\n");
                }
            }
        });
    }
}

/// Over HTTP/2, too, the body is asked for by us, whatever the endpoint says of it.
#[test]
fn a_client_of_http2_that_expects_100_gets_it_once() {
    for continues in [false, true] {
        run(async {
            let mesh = Mesh::new().await;
            let web = mesh.service("web", Protocol::Http2);
            let app = Http2(
                move |request: Request<h2::RecvStream>,
                      mut respond: h2::server::SendResponse<Bytes>| async move {
                    assert_eq!(request.headers()["expect"], "100-continue");
                    let before = |status| Response::builder().status(status).body(()).unwrap();
                    if continues {
                        respond.send_informational(before(100)).unwrap();
                    }
                    let mut body = request.into_body();
                    assert_eq!(body.data().await.unwrap().unwrap(), "body");
                    respond.send_informational(before(103)).unwrap();
                    respond.send_response(before(204), true).unwrap();
                },
            );
            let _pod = mesh.pod(&web, "web-a", app).await;
            let client = mesh.client("default", "curl").await;
            let mut sender = client.frames(&web).await;
            let request = Request::post("http://web.shop/")
                .header("expect", "100-continue")
                .body(())
                .unwrap();
            let (mut response, mut stream) = sender.send_request(request, false).unwrap();
            assert_eq!(before(&mut response).await, Some((100, String::new())));
            stream.send_data("body".into(), true).unwrap();
            assert_eq!(before(&mut response).await, Some((103, String::new())));
            assert_eq!(before(&mut response).await, None);
            let answer = timeout(DEADLINE, response).await.unwrap().unwrap();
            assert_eq!(answer.status(), StatusCode::NO_CONTENT);
        });
    }
}

#[test]
fn more_than_anybody_needs_before_a_response_is_dropped() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let app = Http2(
            move |_, mut respond: h2::server::SendResponse<Bytes>| async move {
                for _ in 0..2000 {
                    let before = Response::builder()
                        .status(103)
                        .header("link", "x".repeat(200));
                    respond
                        .send_informational(before.body(()).unwrap())
                        .unwrap();
                }
                respond.send_response(Response::new(()), true).unwrap();
            },
        );
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.frames(&web).await;
        let request = Request::get("http://web.shop/").body(()).unwrap();
        let (mut response, _) = sender.send_request(request, true).unwrap();
        let mut count = 0;
        while before(&mut response).await.is_some() {
            count += 1;
        }
        // 32 KiB.
        assert!(count > 50 && count * 200 < 32 << 10, "{count}");
        let answer = timeout(DEADLINE, response).await.unwrap().unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
    });
}
