//! What is under way when policies change.

use std::convert::Infallible;

use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::server::Incoming as Connect;
use adit_shared::hbone::{Settings, Tunnel};
use adit_shared::model::{TunnelProtocol, Update};
use adit_shared::net::drain;
use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;
use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::{Frame, Incoming};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::spawn_local;
use tokio::time::timeout;

use crate::http2::BoxedLocal;
use crate::policies::{allow, policy, put, service};
use crate::routes::{backend, route};
use crate::support::{App, DEADLINE, Http, Mesh, Raw, identity, new_address, run, workload};

const CURL: &str = "cluster.local/ns/default/sa/curl";
const OTHER: &str = "cluster.local/ns/default/sa/other";

/// Sends back what it gets, piece by piece.
fn mirror() -> impl App {
    Http(|request: Request<Incoming>| async move {
        let frames = stream::unfold(request.into_body(), |mut incoming| async move {
            let frame = incoming.frame().await?.ok()?;
            let data = frame.into_data().unwrap_or_default();
            Some((Ok::<_, Infallible>(Frame::data(data)), incoming))
        });
        Response::new(BoxedLocal::boxed(frames))
    })
}

#[test]
fn a_stream_ends_when_a_policy_denies_it_and_goes_on_when_none_does() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let _pod = mesh.pod(&web, "web-a", mirror()).await;
        let allowing = |name: &str, methods: &[&str]| {
            let mut policy = policy(
                "p",
                pb::authorization_policy::Action::Allow.into(),
                service(&web),
            );
            policy.rules = vec![allow(CURL, methods, &["/s"])];
            if !name.is_empty() {
                policy.rules.push(allow(name, methods, &["/s"]));
            }
            put(&mesh, &policy);
        };
        allowing(OTHER, &["POST"]);
        let mut streams = Vec::new();
        for account in ["curl", "other"] {
            let client = mesh.client("default", account).await;
            let mut sender = client.http2(&web).await;
            let (pieces, inbox) = tokio::sync::mpsc::channel::<Bytes>(1);
            let sent = stream::unfold(inbox, |mut inbox| async move {
                let piece = inbox.recv().await?;
                Some((Ok::<_, Infallible>(Frame::data(piece)), inbox))
            });
            let request = Request::post("http://web.shop/s")
                .body(BoxedLocal::boxed(sent))
                .unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.status(), 200);
            streams.push((pieces, response.into_body(), client, sender));
        }
        let echoed = async |at: usize,
                            streams: &mut Vec<(
            tokio::sync::mpsc::Sender<Bytes>,
            Incoming,
            _,
            _,
        )>| {
            let (pieces, back, _, _) = &mut streams[at];
            pieces.send(Bytes::from_static(b"x")).await.ok()?;
            timeout(DEADLINE, back.frame())
                .await
                .expect("in time")?
                .ok()
        };
        for at in [0, 1] {
            assert!(echoed(at, &mut streams).await.is_some());
        }
        // A change that allows both as before.
        allowing(OTHER, &["POST", "PUT"]);
        for at in [0, 1] {
            assert!(echoed(at, &mut streams).await.is_some(), "stream {at}");
        }
        // Now one of them is denied, whether it moves or not.
        allowing("", &["POST"]);
        let (_, back, _, _) = &mut streams[1];
        let ended = timeout(DEADLINE, back.frame()).await.expect("in time");
        assert!(matches!(ended, Some(Err(_))), "{ended:?}");
        assert!(echoed(0, &mut streams).await.is_some());
    });
}

/// Agrees to an upgrade and sends back what it gets.
fn upgrading() -> impl App {
    Raw(|tunnel: Tunnel| async move {
        let mut io = tunnel.into_io();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let Ok(byte) = io.read_u8().await else { return };
            head.push(byte);
        }
        let _ = io
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\n",
            )
            .await;
        let mut buffer = [0; 100];
        while let Ok(n @ 1..) = io.read(&mut buffer).await {
            if io.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    })
}

#[test]
fn an_upgraded_connection_and_a_waiting_request_end_when_a_policy_denies_them() {
    run(async {
        let mesh = Mesh::new().await;
        let chat = mesh.service("chat", Protocol::Http);
        let slow = mesh.service("slow", Protocol::Http);
        let _chat = mesh.pod(&chat, "chat-a", upgrading()).await;
        // Never answers.
        let silent = Raw(|mut tunnel: Tunnel| async move {
            while let Ok(Some(chunk)) = tunnel.read_chunk().await {
                tunnel.release(chunk.len());
            }
        });
        let _slow = mesh.pod(&slow, "slow-a", silent).await;
        let client = mesh.client("default", "curl").await;
        let mut upgraded = client.tunnel(chat.address).await.unwrap().into_io();
        let request =
            b"GET /chat HTTP/1.1\r\nhost: chat\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\n";
        upgraded.write_all(request).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = timeout(DEADLINE, upgraded.read_u8()).await.unwrap();
            head.push(byte.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101"));
        let mut waiting = client.tunnel(slow.address).await.unwrap().into_io();
        waiting
            .write_all(b"GET /slow HTTP/1.1\r\nhost: slow\r\n\r\n")
            .await
            .unwrap();
        // Somebody else is denied.
        let deny = |vip: &crate::support::Vip, from: &str, name: &str| {
            let action = pb::authorization_policy::Action::Deny.into();
            let mut policy = policy(name, action, service(vip));
            policy.rules = vec![allow(from, &["GET"], &[])];
            put(&mesh, &policy);
        };
        deny(&chat, OTHER, "c");
        deny(&slow, OTHER, "s");
        upgraded.write_all(b"still").await.unwrap();
        let mut back = [0; 5];
        let read = timeout(DEADLINE, upgraded.read_exact(&mut back)).await;
        read.unwrap().unwrap();
        deny(&chat, CURL, "c");
        deny(&slow, CURL, "s");
        let ended = timeout(DEADLINE, upgraded.read_u8())
            .await
            .expect("it ends");
        assert!(ended.is_err(), "{ended:?}");
        let mut answer = [0; 12];
        let read = timeout(DEADLINE, waiting.read_exact(&mut answer)).await;
        read.expect("it ends").unwrap();
        assert_eq!(&answer, b"HTTP/1.1 403");
    });
}

/// A route leads to endpoints of another service than was dialled: what is dialled does not
/// change when a policy for such an endpoint comes.
#[test]
fn a_stream_to_an_endpoint_of_another_service_ends_when_that_denies_it() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http2);
        let v1 = mesh.service("web-v1", Protocol::Http2);
        let _pod = mesh.pod(&v1, "web-v1-a", mirror()).await;
        let rule = pb::HttpRule {
            filters: vec![pb::Filter {
                kind: Some(pb::filter::Kind::Rewrite(pb::UrlRewrite {
                    path: Some(pb::PathModifier {
                        kind: Some(pb::path_modifier::Kind::Full("/inner".into())),
                    }),
                    ..Default::default()
                })),
            }],
            backends: vec![backend(&v1, 1)],
            ..Default::default()
        };
        route(&mesh, &web, "shop", vec![rule]);
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http2(&web).await;
        let (pieces, inbox) = tokio::sync::mpsc::channel::<Bytes>(1);
        let sent = stream::unfold(inbox, |mut inbox| async move {
            let piece = inbox.recv().await?;
            Some((Ok::<_, Infallible>(Frame::data(piece)), inbox))
        });
        let request = Request::post("http://web.shop/s")
            .body(BoxedLocal::boxed(sent))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let mut back = response.into_body();
        let deny = |path: &str| {
            let target = pb::Target {
                kind: Some(pb::target::Kind::Workload(
                    "Kubernetes//Pod/shop/web-v1-a".into(),
                )),
            };
            let action = pb::authorization_policy::Action::Deny.into();
            let mut policy = policy("p", action, target);
            policy.rules = vec![allow("*", &[], &[path])];
            put(&mesh, &policy);
        };
        // The endpoint gets another path than this.
        deny("/s");
        pieces.send(Bytes::from_static(b"x")).await.unwrap();
        let echoed = timeout(DEADLINE, back.frame()).await.expect("in time");
        assert!(matches!(echoed, Some(Ok(_))), "{echoed:?}");
        deny("/inner");
        let ended = timeout(DEADLINE, back.frame()).await.expect("in time");
        assert!(matches!(ended, Some(Err(_))), "{ended:?}");
    });
}

/// The answer to "may it pass" was given before the endpoint was connected to, which takes time.
#[test]
fn a_policy_that_comes_while_an_endpoint_is_connected_to_counts() {
    run(async {
        let mesh = Mesh::new().await;
        let mail = mesh.service("mail", Protocol::Tcp);
        let ip = new_address();
        let listener = TcpListener::bind((ip, 15008)).await.unwrap();
        let workload = workload("mail-a", ip, &[&mail.key], TunnelProtocol::Hbone);
        mesh.state
            .apply_addresses([Update::UpsertWorkload(workload)]);
        let client = mesh.client("default", "curl").await;
        let to = mail.address;
        let opening = spawn_local(async move {
            let opened = client.tunnel(to).await;
            (client, opened)
        });
        let (stream, _) = listener.accept().await.unwrap();
        let action = pb::authorization_policy::Action::Deny.into();
        let mut deny = policy("d", action, service(&mail));
        deny.rules = vec![allow(CURL, &["GET"], &[])];
        put(&mesh, &deny);
        let certificate = mesh.certificate(&identity("shop", "mail-a")).await;
        let config = certificate.server_config().clone();
        let tls = TlsStream::accept(stream, config, DEADLINE).await.unwrap();
        let (_trigger, watcher) = drain::channel();
        spawn_local(async move {
            let handler = async |incoming: Connect| {
                if let Ok(mut tunnel) = incoming.respond.accept(None) {
                    let _ = tunnel.read_chunk().await;
                }
            };
            let settings = Settings::DEFAULT;
            let _ = adit_shared::hbone::serve(tls, &settings, watcher, handler).await;
        });
        let (_client, opened) = opening.await.unwrap();
        if let Ok(mut tunnel) = opened {
            let read = timeout(DEADLINE, tunnel.read_chunk()).await;
            let read = read.expect("it ends");
            assert!(read.is_err(), "{read:?}");
        }
    });
}
