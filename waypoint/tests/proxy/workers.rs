//! Workers: how work is spread over them and how they end.

use std::time::Duration;

use adit_shared::proto::waypoint::service_port::Protocol;
use futures_util::future::join_all;
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::support::{Body, Client, Http, Mesh, body, echo, eventually, get, run, send};

/// As a node's pool does: opens another connection when one has as many streams as its peer
/// allows.
async fn connections(mesh: &Mesh, streams: usize) -> Vec<Client> {
    let mut clients = vec![mesh.client("default", "curl").await];
    let vip = "10.96.0.1:80".parse().unwrap();
    // The server's settings are there with its first answer.
    drop(clients[0].tunnel(vip).await.unwrap());
    let allowed = clients[0].connection.peer_max_streams();
    assert_eq!(allowed, 16);
    for _ in 1..streams.div_ceil(allowed) {
        clients.push(mesh.client("default", "curl").await);
    }
    clients
}

#[test]
fn connections_of_one_node_load_all_workers() {
    run(async {
        let mesh = Mesh::with(|config| config.workers = 2).await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let clients = connections(&mesh, 64).await;
        assert_eq!(clients.len(), 4);
        let calls = (0..64).map(|n| {
            let client = &clients[n / 16];
            let web = &web;
            async move {
                let mut sender = client.http1(web).await;
                for _ in 0..5 {
                    assert_eq!(send(&mut sender, get("/")).await.status, 200);
                }
                sender
            }
        });
        let open = join_all(calls).await;
        let counts = mesh.counts().await;
        for count in &counts {
            assert_eq!(count.connections, 2, "{counts:?}");
            assert_eq!(count.streams, 32, "{counts:?}");
            assert_eq!(count.requests, 160, "{counts:?}");
        }
        drop(open);
    });
}

#[test]
fn a_drain_lets_requests_finish_and_tells_clients() {
    run(async {
        let mesh = Mesh::new().await;
        let web = mesh.service("web", Protocol::Http);
        let (begun, go) = (
            std::rc::Rc::new(Notify::new()),
            std::rc::Rc::new(Notify::new()),
        );
        let (told, wait) = (begun.clone(), go.clone());
        let app = Http(move |_: Request<Incoming>| {
            let (told, wait) = (told.clone(), wait.clone());
            async move {
                told.notify_one();
                wait.notified().await;
                Response::<Body>::new(body("done"))
            }
        });
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut sender = client.http1(&web).await;
        let calling = send(&mut sender, get("/"));
        let draining = async {
            begun.notified().await;
            mesh.drain(Duration::from_secs(10));
            // GOAWAY: no new tunnels on this connection.
            eventually("GOAWAY", || async { !client.connection.is_usable() }).await;
            go.notify_one();
        };
        let (answer, ()) = tokio::join!(calling, draining);
        assert_eq!((answer.status, answer.text()), (200, "done"));
        assert_eq!(answer.header("connection"), "close");
        // With its last stream the worker has ended.
        eventually("the worker ends", || async {
            mesh.workers[0].counts().await.is_err()
        })
        .await;
        sleep(Duration::ZERO).await;
    });
}
