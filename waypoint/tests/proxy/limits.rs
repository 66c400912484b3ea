//! What a client may send, and what becomes of the rest: limits of HTTP/1 and HTTP/2, requests
//! that two parsers could read in two ways, connections that lie about.

use std::time::Duration;

use adit_shared::hbone::Tunnel;
use adit_shared::hbone::tunnel::TunnelIo;
use adit_shared::proto::waypoint::service_port::Protocol;
use adit_waypoint::proxy::http::{HEADER_DEADLINE, MAX_STREAMS};
use bytes::Bytes;
use http::{Request, Response};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};

use crate::support::{
    Body, Client, DEADLINE, Http, Mesh, Raw, Vip, body, echo, eventually, get, run, send,
};

async fn raw(client: &Client, to: &Vip, request: &[u8]) -> TunnelIo {
    let mut io = client.tunnel(to.address).await.unwrap().into_io();
    io.write_all(request).await.unwrap();
    io
}

/// The head of the answer; empty: the connection was closed without one.
async fn answer(io: &mut TunnelIo) -> String {
    let mut head = Vec::new();
    let reading = async {
        while !head.ends_with(b"\r\n\r\n") {
            match io.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => break,
            }
        }
    };
    timeout(DEADLINE, reading).await.expect("in time");
    String::from_utf8(head).unwrap()
}

#[test]
fn ambiguous_requests_are_refused_or_made_unambiguous() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        for (request, status) in [
            // RFC 9112 6.3: two lengths.
            (
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
                400,
            ),
            (
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +1\r\n\r\na",
                400,
            ),
            (
                "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1, 2\r\n\r\nab",
                400,
            ),
            // A coding that is not the last, unknown, or of HTTP/1.0.
            (
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, gzip\r\n\r\n",
                400,
            ),
            (
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
                501,
            ),
            (
                "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n",
                400,
            ),
            (
                "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
                400,
            ),
            // Folded lines, space before the colon, bare CR in a value (RFC 9112 5).
            ("GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n 2\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nhost: a\r\nx : 1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nhost: a\r\nx: 1\r2\r\n\r\n", 400),
            // Which host?
            ("GET / HTTP/1.1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nhost: a b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nhost: u@a\r\n\r\n", 400),
            ("GET http://u@b/ HTTP/1.1\r\nhost: a\r\n\r\n", 400),
            ("GET http://b/ HTTP/1.1\r\nhost: a\r\n\r\n", 200),
            // Paths that some servers read otherwise.
            ("GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n", 400),
            ("GET /%zz HTTP/1.1\r\nhost: a\r\n\r\n", 400),
            // A tunnel inside of the tunnel.
            ("CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", 405),
            ("GARBAGE\r\n\r\n", 400),
        ] {
            let mut io = raw(&client, &web, request.as_bytes()).await;
            let head = answer(&mut io).await;
            let wanted = format!("HTTP/1.1 {status}");
            let close = request.contains("HTTP/1.0") && head.starts_with("HTTP/1.0");
            assert!(
                head.starts_with(&wanted) || (close && head.contains(&status.to_string())),
                "{request:?}: {head:?}"
            );
        }
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert_eq!(seen[0].headers["host"], "b");
    });
}

#[test]
fn a_length_beside_chunks_does_not_reach_the_endpoint() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, seen) = echo("got ");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        for lines in [
            "transfer-encoding: chunked\r\ncontent-length: 30",
            "content-length: 30\r\ntransfer-encoding: chunked",
        ] {
            // What a parser of lengths would take for the body, another takes for a request.
            let request =
                format!("POST / HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
            let mut io = raw(&client, &web, request.as_bytes()).await;
            assert!(answer(&mut io).await.starts_with("HTTP/1.1 200"));
        }
        for head in &*seen.lock().unwrap() {
            assert!(!head.headers.contains_key("content-length"), "{head:?}");
        }
    });
}

#[test]
fn heads_are_bounded() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let with = |size: usize| {
            let mut request = get("/");
            let value = "x".repeat(size).parse().unwrap();
            request.headers_mut().insert("x-large", value);
            request
        };
        assert_eq!(send(&mut sender, with(60 << 10)).await.status, 200);
        assert_eq!(send(&mut sender, with(70 << 10)).await.status, 431);
        let many: String = (0..200).map(|n| format!("x-{n}: 1\r\n")).collect();
        let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n");
        let mut io = raw(&client, &web, request.as_bytes()).await;
        assert!(answer(&mut io).await.starts_with("HTTP/1.1 431"));

        let http2 = client.http2(&web).await;
        let mut large = Request::get("http://a/").body(body("")).unwrap();
        let value = "x".repeat(70 << 10).parse().unwrap();
        large.headers_mut().insert("x-large", value);
        let refused = http2.clone().send_request(large).await;
        let status = refused.map(|response| response.status().as_u16());
        assert!(
            status.is_err() || status.as_ref().is_ok_and(|s| *s == 431),
            "{status:?}"
        );
    });
}

#[test]
fn streams_of_a_connection_are_bounded() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let never = Http(|_| std::future::pending::<Response<Body>>());
        let _pod = mesh.pod(&web, "web-a", never).await;
        let client = mesh.client("default", "curl").await;
        let tunnel = client.tunnel(web.address).await.unwrap();
        let (sender, connection) = h2::client::handshake(tunnel.into_io()).await.unwrap();
        spawn_local(connection);
        let mut sender = sender.ready().await.unwrap();
        eventually("the server's settings", || {
            let max = sender.current_max_send_streams();
            async move { max == MAX_STREAMS as usize }
        })
        .await;
        let request = Request::get("http://a/").body(()).unwrap();
        let (pending, _) = sender.send_request(request, true).unwrap();
        drop(pending);
    });
}

#[test]
fn a_flood_of_resets_ends_the_connection() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let never = Http(|_| std::future::pending::<Response<Body>>());
        let _pod = mesh.pod(&web, "web-a", never).await;
        let client = mesh.client("default", "curl").await;
        let mut io = client.tunnel(web.address).await.unwrap().into_io();
        // RFC 9113: preface, empty SETTINGS, then HEADERS and RST_STREAM again and again.
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
        for n in 0..2000_u32 {
            let id = (2 * n + 1).to_be_bytes();
            // GET, http, /, and :authority a, all from HPACK's static table but the last.
            let block = [0x82, 0x86, 0x84, 0x41, 0x01, b'a'];
            bytes.extend_from_slice(&[0, 0, block.len() as u8, 1, 0x5]);
            bytes.extend_from_slice(&id);
            bytes.extend_from_slice(&block);
            bytes.extend_from_slice(&[0, 0, 4, 3, 0]);
            bytes.extend_from_slice(&id);
            bytes.extend_from_slice(&8_u32.to_be_bytes());
        }
        // The connection may be over before all of it is sent.
        let _ = io.write_all(&bytes).await;
        let mut rest = Vec::new();
        let read = timeout(DEADLINE, io.read_to_end(&mut rest)).await;
        read.expect("closed").ok();
        // GOAWAY with ENHANCE_YOUR_CALM.
        let calm = rest
            .windows(17)
            .any(|w| w[3] == 7 && w[13..17] == [0, 0, 0, 0xb]);
        assert!(calm, "{rest:?}");
        // Others are served.
        let (app, _) = echo("b");
        let other = mesh.service("other", Protocol::Http);
        let _pod = mesh.pod(&other, "other-a", app).await;
        assert_eq!(client.get(&other, "/").await.status, 200);
    });
}

#[test]
fn a_head_that_does_not_end_is_not_waited_for() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let client = mesh.client("default", "curl").await;
        let begun = Instant::now();
        let mut io = raw(&client, &web, b"GET / HTTP/1.1\r\nhost: a\r\nx-slow").await;
        let mut rest = Vec::new();
        let limit = HEADER_DEADLINE + Duration::from_secs(5);
        let read = timeout(limit, io.read_to_end(&mut rest)).await;
        read.expect("closed").ok();
        assert!(begun.elapsed() >= HEADER_DEADLINE - Duration::from_secs(1));
    });
}

#[test]
fn a_reader_that_stalls_does_not_hold_up_others() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let app = Http(|request: Request<hyper::body::Incoming>| async move {
            let size = match request.uri().path() {
                "/large" => 8 << 20,
                _ => 10,
            };
            Response::<Body>::new(body(vec![b'x'; size]))
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        // As many as one connection to the endpoint takes, but for one; each by a node of its
        // own, for a node's windows are its own affair.
        let mut stalled = Vec::new();
        for n in 0..15 {
            let node = mesh.client("default", &format!("stalled-{n}")).await;
            let mut sender = node.http1(&web).await;
            sender.ready().await.unwrap();
            let response = timeout(DEADLINE, sender.send_request(get("/large"))).await;
            stalled.push((sender, response.unwrap().unwrap()));
        }
        let mut sender = client.http1(&web).await;
        for _ in 0..20 {
            let answer = send(&mut sender, get("/small")).await;
            assert_eq!((answer.status, answer.body.len()), (200, 10));
        }
    });
}

/// Answers one request on each connection, then closes it without a word.
fn closes_after_one() -> impl crate::support::App {
    Raw(|tunnel: Tunnel| async move {
        let mut io = tunnel.into_io();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match io.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        io.write_all(answer).await.unwrap();
        io.shutdown().await.unwrap();
    })
}

#[test]
fn requests_do_not_fail_on_connections_that_were_closed_meanwhile() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let _pod = mesh.pod(&web, "web-a", closes_after_one()).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        for n in 0..50 {
            let answer = send(&mut sender, get("/")).await;
            assert_eq!((answer.status, answer.text()), (200, "ok"), "request {n}");
        }
    });
}

#[test]
fn an_expectation_is_met() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("got ");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let request = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\
                        expect: 100-continue\r\n\r\n";
        let mut io = raw(&client, &web, request).await;
        assert!(answer(&mut io).await.starts_with("HTTP/1.1 100"));
        io.write_all(b"body").await.unwrap();
        assert!(answer(&mut io).await.starts_with("HTTP/1.1 200"));
    });
}

#[test]
fn a_broken_answer_is_not_passed_on_as_a_whole_one() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let app = Raw(|mut tunnel: Tunnel| async move {
            let _ = tunnel.read_chunk().await;
            let part = Bytes::from_static(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf");
            let _ = tunnel.write_chunk(part).await;
            let _ = tunnel.finish();
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut io = raw(&client, &web, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let head = answer(&mut io).await;
        assert!(head.contains("content-length: 10"), "{head}");
        let mut rest = Vec::new();
        let read = timeout(DEADLINE, io.read_to_end(&mut rest)).await.unwrap();
        assert!(read.is_err() || rest.len() < 10, "{rest:?}");
    });
}
