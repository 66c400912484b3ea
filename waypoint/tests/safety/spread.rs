//! One node's calls load all workers, however few connections it would like to have.

use std::rc::Rc;

use adit_shared::hbone::{ConnectRequest, Connection, Pool, PoolSettings, Tunnel};
use adit_shared::proto::waypoint::service_port::Protocol;
use futures_util::future::join_all;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::task::spawn_local;
use tokio::time::{Duration, Instant, sleep};

use crate::support::{Body, DEADLINE, Mesh, Vip, echo, get, hbone, identity, run, send};

const CALLS: usize = 64;
const REQUESTS: usize = 20;

async fn http1(tunnel: Tunnel) -> http1::SendRequest<Body> {
    let io = TokioIo::new(tunnel.into_io());
    let (sender, connection) = http1::handshake(io).await.expect("HTTP/1");
    spawn_local(connection);
    sender
}

/// The workers' shares of what they did.
async fn shares(mesh: &Mesh, connections: usize) {
    let counts = mesh.counts().await;
    assert_eq!(counts.len(), 2);
    let total: usize = counts.iter().map(|count| count.connections).sum();
    assert_eq!(total, connections, "{counts:?}");
    for count in &counts {
        // Even within a connection's streams.
        let share = count.requests as f64 / (CALLS * REQUESTS) as f64;
        assert!((0.35..=0.65).contains(&share), "{counts:?}");
    }
}

/// A pool as our ztunnel has it, one for each of its workers, with its own idea of how many
/// streams a connection takes.
async fn pooled(mesh: &Mesh, web: &Vip, pools: usize) -> usize {
    let certificate = mesh.certificate(&identity("default", "curl")).await;
    let settings = PoolSettings::default();
    assert!(settings.max_streams > CALLS);
    let pools: Vec<_> = (0..pools)
        .map(|_| Rc::new(Pool::<(), String>::new(settings)))
        .collect();
    let calls = (0..CALLS).map(|n| {
        let pool = pools[n % pools.len()].clone();
        let certificate = certificate.clone();
        async move {
            let address = mesh.address;
            let request = ConnectRequest::new(web.address);
            let deadline = Instant::now() + DEADLINE;
            // As calls come: not all of them in the same moment.
            sleep(Duration::from_millis(n as u64 * 5)).await;
            let connect =
                async move || Ok::<Connection, String>(hbone(address, &certificate).await);
            let opened = pool.checkout(&(), &request, deadline, connect).await;
            let mut sender = http1(opened.expect("a tunnel").0).await;
            for _ in 0..REQUESTS {
                assert_eq!(send(&mut sender, get("/")).await.status, 200);
            }
            sender
        }
    });
    let open = join_all(calls).await;
    let connections = pools.iter().map(|pool| pool.counts().connections).sum();
    shares(mesh, connections).await;
    drop(open);
    connections
}

#[test]
fn a_node_with_one_worker_opens_as_many_connections_as_it_is_told_to() {
    run(async {
        let mesh = Mesh::with(|config| config.workers = 2).await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        // 16 streams each.
        let connections = pooled(&mesh, &web, 1).await;
        assert!((4..=6).contains(&connections), "{connections}");
    });
}

#[test]
fn a_node_with_many_workers_loads_all_of_ours() {
    run(async {
        let mesh = Mesh::with(|config| config.workers = 2).await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        assert!(pooled(&mesh, &web, 8).await >= 8);
    });
}

/// Who wants 64 streams on one connection is told to have 16, and gets no more.
#[test]
fn one_connection_never_has_the_load_of_many() {
    run(async {
        let mesh = Mesh::with(|config| config.workers = 2).await;
        let web = mesh.service("web", Protocol::Http);
        let (app, _) = echo("a");
        let _pod = mesh.pod(&web, "web-a", app).await;
        let client = mesh.client("default", "curl").await;
        let mut tunnels = Vec::new();
        for _ in 0..16 {
            tunnels.push(client.tunnel(web.address).await.expect("accepted"));
        }
        assert_eq!(client.connection.peer_max_streams(), 16);
        let request = ConnectRequest::new(web.address);
        let soon = Instant::now() + Duration::from_millis(200);
        assert!(client.connection.open(&request, soon).await.is_err());
    });
}
