//! Neither a drain nor a change of configuration loses a request.

use std::cell::Cell;
use std::rc::Rc;

use adit_shared::model::{TunnelProtocol, Update};
use adit_shared::proto::waypoint as pb;
use adit_shared::proto::waypoint::service_port::Protocol;
use futures_util::future::join_all;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::time::{Duration, Instant, sleep, timeout};

use crate::support::{
    Answer, App, Body, Client, DEADLINE, Http, Mesh, Pod, Vip, body, eventually, get, run, send,
    workload,
};

/// Takes a moment for each request.
fn slow_app() -> impl App {
    Http(|_: Request<Incoming>| async {
        sleep(Duration::from_millis(3)).await;
        Response::<Body>::new(body("whole"))
    })
}

/// What callers have seen.
#[derive(Default)]
struct Seen {
    answered: Cell<usize>,
    closed: Cell<usize>,
}

/// Calls on one connection of HTTP/1 until `enough` or until it closes; every request that was
/// sent is answered.
async fn http1(client: &Client, web: &Vip, seen: &Seen, enough: &Cell<bool>) {
    let mut sender = client.http1(web).await;
    while !enough.get() {
        if timeout(DEADLINE, sender.ready()).await.unwrap().is_err() {
            break;
        }
        let response = match timeout(DEADLINE, sender.try_send_request(get("/")))
            .await
            .unwrap()
        {
            Ok(response) => response,
            Err(mut error) => {
                // It has closed before it had a byte: that is no loss.
                assert!(error.take_message().is_some(), "lost: {:?}", error.error());
                break;
            }
        };
        let answer = Answer::read(response).await;
        assert_eq!((answer.status, answer.text()), (200, "whole"));
        seen.answered.set(seen.answered.get() + 1);
        if answer.header("connection") == "close" {
            seen.closed.set(seen.closed.get() + 1);
            break;
        }
    }
}

/// The same of HTTP/2, with several requests at once.
async fn http2(client: &Client, web: &Vip, seen: &Seen, enough: &Cell<bool>) {
    let sender = client.http2(web).await;
    let calls = (0..4).map(|_| {
        let mut sender = sender.clone();
        async move {
            while !enough.get() {
                if sender.ready().await.is_err() {
                    break;
                }
                let request = Request::get("http://web.shop/").body(body("")).unwrap();
                let sent = timeout(DEADLINE, sender.try_send_request(request)).await;
                let response = match sent.unwrap() {
                    Ok(response) => response,
                    Err(mut error) => {
                        assert!(error.take_message().is_some(), "lost: {:?}", error.error());
                        break;
                    }
                };
                let answer = Answer::read(response).await;
                assert_eq!((answer.status, answer.text()), (200, "whole"));
                seen.answered.set(seen.answered.get() + 1);
            }
        }
    });
    join_all(calls).await;
}

async fn mesh(protocol: Protocol) -> (Mesh, Vip, Vec<Pod>) {
    let mesh = Mesh::with(|config| config.workers = 2).await;
    let web = mesh.service("web", protocol);
    let mut pods = Vec::new();
    for name in ["web-a", "web-b"] {
        pods.push(mesh.pod(&web, name, slow_app()).await);
    }
    (mesh, web, pods)
}

async fn clients(mesh: &Mesh) -> Vec<Client> {
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(mesh.client("default", "curl").await);
    }
    clients
}

#[test]
fn a_drain_under_load_loses_nothing() {
    run(async {
        let (mesh, web, _pods) = mesh(Protocol::Http).await;
        let clients = clients(&mesh).await;
        let (seen, never) = (Seen::default(), Cell::new(false));
        let first = clients
            .iter()
            .flat_map(|client| (0..6).map(|_| http1(client, &web, &seen, &never)));
        let second = clients
            .iter()
            .map(|client| http2(client, &web, &seen, &never));
        // One that has not said anything yet, and one that has.
        let silent = clients[0].http1(&web).await;
        let mut idle = clients[0].http1(&web).await;
        assert_eq!(send(&mut idle, get("/")).await.status, 200);
        let time = Duration::from_secs(6);
        let draining = async {
            eventually("load", async || seen.answered.get() > 200).await;
            let begun = Instant::now();
            mesh.drain(time);
            for client in &clients {
                eventually("GOAWAY", async || !client.connection.is_usable()).await;
            }
            begun
        };
        let ((begun, _), _) = tokio::join!(
            async { tokio::join!(draining, join_all(first)) },
            join_all(second)
        );
        // Every connection under load was told with a response, and none waited for the end.
        assert_eq!(seen.closed.get(), clients.len() * 6);
        assert!(begun.elapsed() < time / 2, "{:?}", begun.elapsed());
        // Idle ones are closed at half time, and then there is nothing left to wait for.
        eventually("the idle ones are closed", async || {
            idle.is_closed() && silent.is_closed()
        })
        .await;
        for worker in &mesh.workers {
            eventually("the worker ends", async || worker.counts().await.is_err()).await;
        }
        assert!(begun.elapsed() < time, "{:?}", begun.elapsed());
    });
}

/// A policy that permits everything that is done here.
fn permissive(n: u64) -> pb::AuthorizationPolicy {
    pb::AuthorizationPolicy {
        object: Some(pb::ObjectRef {
            kind: "AuthorizationPolicy".into(),
            namespace: "shop".into(),
            name: "permissive".into(),
            created: 1,
        }),
        targets: vec![pb::Target {
            kind: Some(pb::target::Kind::Service(pb::ServiceRef {
                namespace: "shop".into(),
                hostname: "web.shop.svc.cluster.local".into(),
            })),
        }],
        rules: vec![pb::AuthorizationRule {
            to: vec![pb::Operation {
                methods: vec!["GET".into(), format!("M{n}")],
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    }
}

async fn changes(protocol: Protocol) {
    let (mesh, web, pods) = mesh(protocol).await;
    let clients = clients(&mesh).await;
    let (seen, enough) = (Seen::default(), Rc::new(Cell::new(false)));
    let first = clients
        .iter()
        .flat_map(|client| (0..4).map(|_| http1(client, &web, &seen, &enough)));
    let second = clients
        .iter()
        .map(|client| http2(client, &web, &seen, &enough));
    let changing = async {
        let name = "AuthorizationPolicy/shop/permissive";
        for n in 0..200_u64 {
            match n % 4 {
                0 => mesh.put(pb::AUTHORIZATION_POLICY_TYPE, name, &permissive(n)),
                // One of two endpoints goes, with requests under way at it, and comes back.
                1 => {
                    let gone = workload(&pods[1].name, pods[1].ip, &[], TunnelProtocol::Hbone);
                    mesh.state.apply_addresses([Update::UpsertWorkload(gone)]);
                }
                2 => mesh.remove(pb::AUTHORIZATION_POLICY_TYPE, name),
                _ => mesh.join(&web, &pods[1]),
            }
            let before = seen.answered.get();
            eventually("requests go on", async || seen.answered.get() >= before + 5).await;
        }
        enough.set(true);
    };
    tokio::join!(changing, join_all(first), join_all(second));
    assert!(seen.answered.get() >= 1000);
    assert_eq!(seen.closed.get(), 0);
}

#[test]
fn changes_under_load_lose_nothing() {
    run(changes(Protocol::Http));
}

#[test]
fn changes_under_load_lose_nothing_of_http2() {
    run(changes(Protocol::Http2));
}
