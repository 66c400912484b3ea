//! Extended CONNECT (RFC 8441), and what becomes of it.

use adit_shared::hbone::Tunnel;
use adit_shared::proto::waypoint::service_port::Protocol;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{Method, Request, Response, StatusCode};
use hyper::ext::Protocol as Extended;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::spawn_local;
use tokio::time::timeout;

use adit_waypoint::client::LocalExecutor;

use crate::support::{App, Body, DEADLINE, Mesh, Raw, Vip, body, eventually, run};

/// A WebSocket server of HTTP/1, as far as its head goes; `agree`: or one that does not want to.
fn http1_server(agree: bool) -> impl App {
    Raw(move |tunnel: Tunnel| async move {
        let mut io = tunnel.into_io();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let Ok(byte) = io.read_u8().await else { return };
            head.push(byte);
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("GET /chat?x=1 HTTP/1.1\r\n"), "{head}");
        assert!(head.to_lowercase().contains("host: web.shop\r\n"), "{head}");
        if !agree {
            let _ = io
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno")
                .await;
            // To drop it now would be to take the answer back.
            let _ = io.read_to_end(&mut Vec::new()).await;
            return;
        }
        let key = head
            .lines()
            .find_map(|line| line.strip_prefix("sec-websocket-key: "))
            .expect("a key");
        let text = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
        let sha1 = &aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY;
        let accept = STANDARD.encode(aws_lc_rs::digest::digest(sha1, text.as_bytes()));
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-accept: {accept}\r\nsec-websocket-protocol: chat\r\n\r\n"
        );
        let _ = io.write_all(answer.as_bytes()).await;
        loud(io).await;
    })
}

/// Sends back what it gets, in capitals.
async fn loud<I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut io: I) {
    let mut buffer = [0; 1000];
    while let Ok(n @ 1..) = io.read(&mut buffer).await {
        let loud = buffer[..n].to_ascii_uppercase();
        if io.write_all(&loud).await.is_err() {
            return;
        }
    }
    let _ = io.shutdown().await;
}

/// A WebSocket server of HTTP/2.
fn http2_server() -> impl App {
    Raw(|tunnel: Tunnel| async move {
        let service =
            hyper::service::service_fn(|mut request: Request<hyper::body::Incoming>| async move {
                assert_eq!(request.method(), Method::CONNECT);
                let protocol = request.extensions().get::<Extended>().expect("a protocol");
                assert_eq!(protocol.as_str(), "websocket");
                assert_eq!(request.uri().path(), "/chat");
                assert!(!request.headers().contains_key("sec-websocket-key"));
                let upgrade = hyper::upgrade::on(&mut request);
                spawn_local(async move {
                    loud(TokioIo::new(upgrade.await.unwrap())).await;
                });
                Ok::<_, std::convert::Infallible>(Response::<Body>::new(body("")))
            });
        let mut builder = hyper::server::conn::http2::Builder::new(LocalExecutor);
        builder.enable_connect_protocol();
        let io = TokioIo::new(tunnel.into_io());
        let _ = builder.serve_connection(io, service).await;
    })
}

/// Opens a WebSocket over HTTP/2.
async fn connect(mesh: &Mesh, to: &Vip) -> Response<hyper::body::Incoming> {
    let client = mesh.client("default", "curl").await;
    let tunnel = client.tunnel(to.address).await.expect("accepted");
    let io = TokioIo::new(tunnel.into_io());
    let (mut sender, connection) = hyper::client::conn::http2::handshake(LocalExecutor, io)
        .await
        .expect("HTTP/2");
    let offered = std::rc::Rc::new(std::cell::Cell::new(false));
    let seen = offered.clone();
    spawn_local(async move {
        let _client = client;
        let mut connection = connection;
        // hyper does not say that it has settings.
        let mut often = tokio::time::interval(std::time::Duration::from_millis(5));
        let _ = std::future::poll_fn(|cx| {
            while often.poll_tick(cx).is_ready() {}
            let polled = std::pin::Pin::new(&mut connection).poll(cx);
            seen.set(connection.is_extended_connect_protocol_enabled());
            polled
        })
        .await;
    });
    eventually("it offers extended CONNECT", || async { offered.get() }).await;
    let mut request = Request::connect("http://web.shop/chat?x=1")
        .header("sec-websocket-version", "13")
        .body(body(""))
        .unwrap();
    request
        .extensions_mut()
        .insert(Extended::from_static("websocket"));
    let response = timeout(DEADLINE, sender.send_request(request)).await;
    let response = response.expect("in time").expect("answered");
    // The connection lives with the stream.
    std::mem::forget(sender);
    response
}

async fn talk(mut response: Response<hyper::body::Incoming>) {
    let upgraded = timeout(DEADLINE, hyper::upgrade::on(&mut response)).await;
    let mut io = TokioIo::new(upgraded.expect("in time").expect("a stream"));
    for text in ["hello", "again"] {
        io.write_all(text.as_bytes()).await.unwrap();
        let mut back = [0; 5];
        let read = timeout(DEADLINE, io.read_exact(&mut back)).await;
        read.expect("in time").unwrap();
        assert_eq!(back, *text.to_uppercase().as_bytes());
    }
    io.shutdown().await.unwrap();
    let mut rest = Vec::new();
    let read = timeout(DEADLINE, io.read_to_end(&mut rest)).await;
    read.expect("it ends").unwrap();
    assert!(rest.is_empty());
}

#[test]
fn a_websocket_over_http2_is_an_upgrade_to_a_server_of_http1() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let _pod = mesh.pod(&web, "web-a", http1_server(true)).await;
        let response = connect(&mesh, &web).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["sec-websocket-protocol"], "chat");
        assert!(!response.headers().contains_key("sec-websocket-accept"));
        talk(response).await;
    });
}

#[test]
fn a_websocket_over_http2_stays_one_to_a_server_of_http2() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let _pod = mesh.pod(&web, "web-a", http2_server()).await;
        let response = connect(&mesh, &web).await;
        assert_eq!(response.status(), StatusCode::OK);
        talk(response).await;
    });
}

#[test]
fn a_server_of_http2_that_does_not_offer_it_is_asked_over_http1() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        // Both versions, as such servers do; of HTTP/2 it knows the settings alone.
        let app = Raw(|mut tunnel: Tunnel| async move {
            let first = tunnel.read_chunk().await.unwrap().unwrap();
            tunnel.release(first.len());
            if first.starts_with(b"PRI") {
                let settings = bytes::Bytes::from_static(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
                let _ = tunnel.write_chunk(settings).await;
                while let Ok(Some(chunk)) = tunnel.read_chunk().await {
                    tunnel.release(chunk.len());
                }
                return;
            }
            let head = String::from_utf8(first.to_vec()).unwrap();
            assert!(head.starts_with("GET /chat?x=1 HTTP/1.1\r\n"), "{head}");
            let _ = tunnel
                .write_chunk(bytes::Bytes::from_static(
                    b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n",
                ))
                .await;
            // To drop it now would be to take the answer back.
            while let Ok(Some(chunk)) = tunnel.read_chunk().await {
                tunnel.release(chunk.len());
            }
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        assert_eq!(connect(&mesh, &web).await.status(), 403);
    });
}

#[test]
fn an_answer_that_does_not_agree_is_no_consent() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let _pod = mesh.pod(&web, "web-a", http1_server(false)).await;
        let response = connect(&mesh, &web).await;
        assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    });
}

#[test]
fn a_websocket_over_http1_reaches_a_server_of_http2() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let _pod = mesh.pod(&web, "web-a", http2_server()).await;
        let client = mesh.client("default", "curl").await;
        let mut io = client.tunnel(web.address).await.unwrap().into_io();
        io.write_all(
            b"GET /chat HTTP/1.1\r\nhost: web.shop\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
              sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n",
        )
        .await
        .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = timeout(DEADLINE, io.read_u8()).await.unwrap();
            head.push(byte.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        assert!(head.contains("upgrade: websocket"), "{head}");
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        io.write_all(b"hello").await.unwrap();
        let mut back = [0; 5];
        let read = timeout(DEADLINE, io.read_exact(&mut back)).await;
        read.unwrap().unwrap();
        assert_eq!(&back, b"HELLO");
    });
}
