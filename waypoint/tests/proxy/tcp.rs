//! What is not HTTP, and what stops being HTTP.

use adit_shared::hbone::{OpenError, Tunnel};
use adit_shared::proto::waypoint::service_port::Protocol;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use crate::support::{App, Body, DEADLINE, Mesh, Raw, Vip, body, run};

/// Sends back what it gets, and says first who it is.
fn greeter() -> impl App {
    Raw(|mut tunnel: Tunnel| async move {
        let greeting = Bytes::from_static(b"220 hello\r\n");
        if tunnel.write_chunk(greeting).await.is_err() {
            return;
        }
        while let Ok(Some(chunk)) = tunnel.read_chunk().await {
            tunnel.release(chunk.len());
            if tunnel.write_chunk(chunk).await.is_err() {
                return;
            }
        }
        let _ = tunnel.finish();
    })
}

async fn talk(mesh: &Mesh, vip: &Vip, size: usize) {
    let client = mesh.client("default", "curl").await;
    let tunnel = client.tunnel(vip.address).await.expect("accepted");
    let mut io = tunnel.into_io();
    let mut greeting = [0; 11];
    let read = timeout(DEADLINE, io.read_exact(&mut greeting)).await;
    read.expect("in time").expect("greeted");
    assert_eq!(&greeting, b"220 hello\r\n");
    let sent: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    let (mut reader, mut writer) = tokio::io::split(io);
    let expected = sent.clone();
    let writing = async {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let reading = async {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        got
    };
    let (got, ()) = timeout(DEADLINE, async { tokio::join!(reading, writing) })
        .await
        .expect("in time");
    assert!(got == expected, "{} of {}", got.len(), expected.len());
}

#[test]
fn a_server_may_speak_first_on_a_port_that_is_declared_tcp() {
    run(async {
        let mesh = Mesh::new().await;
        let mail = mesh.service("mail", Protocol::Tcp);
        let _pod = mesh.pod(&mail, "mail-a", greeter()).await;
        talk(&mesh, &mail, 3 << 20).await;
    });
}

#[test]
fn a_server_may_speak_first_on_a_port_that_says_nothing() {
    run(async {
        let mesh = Mesh::new().await;
        let mail = mesh.service("mail", Protocol::Undeclared);
        let _pod = mesh.pod(&mail, "mail-a", greeter()).await;
        talk(&mesh, &mail, 1000).await;
    });
}

#[test]
fn a_connection_without_an_endpoint_is_refused() {
    run(async {
        let mesh = Mesh::new().await;
        let mail = mesh.service("mail", Protocol::Tcp);
        let client = mesh.client("default", "curl").await;
        let refused = client.tunnel(mail.address).await;
        let Err(OpenError::Refused { status, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    });
}

#[test]
fn a_reset_is_passed_on() {
    run(async {
        let mesh = Mesh::new().await;
        let mail = mesh.service("mail", Protocol::Tcp);
        let pod = mesh
            .pod(
                &mail,
                "mail-a",
                Raw(|mut tunnel: Tunnel| async move {
                    let _ = tunnel.read_chunk().await;
                    tunnel.reset(adit_shared::hbone::ResetReason::CONNECT_ERROR);
                }),
            )
            .await;
        let client = mesh.client("default", "curl").await;
        let mut tunnel = client.tunnel(mail.address).await.expect("accepted");
        tunnel.write_chunk(Bytes::from_static(b"x")).await.unwrap();
        let read = timeout(DEADLINE, tunnel.read_chunk()).await.unwrap();
        assert!(read.is_err(), "{read:?}");
        drop(pod);
    });
}

/// Accepts every upgrade, then sends back what it gets in capitals.
fn upgrader() -> impl App {
    Raw(|tunnel: Tunnel| async move {
        let mut io = tunnel.into_io();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(io.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        assert!(head.contains("upgrade: websocket"), "{head}");
        assert!(head.contains("connection: upgrade"), "{head}");
        let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                      upgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n> ";
        io.write_all(answer.as_bytes()).await.unwrap();
        let mut buffer = [0; 1000];
        loop {
            let n = io.read(&mut buffer).await.unwrap();
            if n == 0 {
                break;
            }
            let loud = buffer[..n].to_ascii_uppercase();
            io.write_all(&loud).await.unwrap();
        }
        io.shutdown().await.unwrap();
    })
}

#[test]
fn a_websocket_is_carried() {
    run(async {
        let mesh = Mesh::new().await;
        let chat = mesh.service("chat", Protocol::Http);
        let _pod = mesh.pod(&chat, "chat-a", upgrader()).await;
        let client = mesh.client("default", "curl").await;
        let tunnel = client.tunnel(chat.address).await.expect("accepted");
        let mut io = tunnel.into_io();
        // The client does not wait with its first message.
        io.write_all(
            b"GET /chat HTTP/1.1\r\nhost: chat\r\nconnection: Upgrade\r\n\
              upgrade: websocket\r\nsec-websocket-key: x\r\n\r\nearly ",
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
        assert!(head.contains("sec-websocket-accept: x"), "{head}");
        io.write_all(b"and late").await.unwrap();
        io.shutdown().await.unwrap();
        let mut rest = String::new();
        let read = timeout(DEADLINE, io.read_to_string(&mut rest)).await;
        read.unwrap().unwrap();
        assert_eq!(rest, "> EARLY AND LATE");
    });
}

#[test]
fn an_upgrade_that_is_not_wanted_stays_http() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let app = crate::support::Http(|_: Request<Incoming>| async {
            Response::<Body>::new(body("plain"))
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        for _ in 0..2 {
            let request = Request::get("/")
                .header("host", "web")
                .header("connection", "upgrade")
                .header("upgrade", "websocket")
                .body(body(""))
                .unwrap();
            let answer = crate::support::send(&mut sender, request).await;
            assert_eq!((answer.status, answer.text()), (200, "plain"));
        }
    });
}
