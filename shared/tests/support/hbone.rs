//! Two ends of an HBONE connection in one thread.

#![allow(dead_code)]

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use adit_shared::hbone::server::Served;
use adit_shared::hbone::{
    Authority, ConnectRequest, Connection, ConnectionError, Incoming, Settings, Tunnel, serve,
};
use adit_shared::net::drain::{self, DrainTrigger};
use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{Instant, timeout};

/// More than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test as a worker runs its connections.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        timeout(PATIENCE * 2, test).await.expect("the test ends")
    })
}

/// A deadline that is not meant to be reached.
pub fn patience() -> Instant {
    Instant::now() + PATIENCE
}

/// What must happen soon.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not in time: {what}"),
    }
}

/// Waits until a condition holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = patience();
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A connected pair of sockets over loopback: client, server.
pub async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    let client = client.expect("connect");
    client.set_nodelay(true).expect("nodelay");
    let (server, _) = server.expect("accept");
    server.set_nodelay(true).expect("nodelay");
    (client, server)
}

pub fn destination() -> Authority {
    Authority::from("10.0.0.5:8080".parse::<SocketAddr>().expect("address"))
}

pub fn request() -> ConnectRequest {
    ConnectRequest::new(destination())
}

/// The server's end: its task, and what drains it.
pub struct Server {
    pub task: JoinHandle<Result<Served, ConnectionError>>,
    pub drain: DrainTrigger,
}

/// Serves a socket.
pub fn start(
    io: TcpStream,
    settings: Settings,
    handler: impl AsyncFn(Incoming) + 'static,
) -> Server {
    let (drain, watcher) = drain::channel();
    let task = spawn_local(async move { serve(io, &settings, watcher, handler).await });
    Server { task, drain }
}

/// A connection and its server.
pub async fn connect(
    settings: Settings,
    handler: impl AsyncFn(Incoming) + 'static,
) -> (Connection, Server) {
    let (client, server) = sockets().await;
    let server = start(server, settings, handler);
    let client = Connection::handshake(client, &settings)
        .await
        .expect("handshake");
    (client, server)
}

/// Accepts and sends everything back, END_STREAM included.
pub async fn echo(incoming: Incoming) {
    let Ok(mut tunnel) = incoming.respond.accept(None) else {
        return;
    };
    while let Ok(Some(chunk)) = tunnel.read_chunk().await {
        let n = chunk.len();
        if tunnel.write_chunk(chunk).await.is_err() {
            return;
        }
        tunnel.release(n);
    }
    let _ = tunnel.finish();
    // The peer's end of the stream is reached already: nothing is cut off by dropping it.
}

pub async fn open(connection: &Connection) -> Tunnel {
    let (tunnel, _) = connection
        .open(&request(), patience())
        .await
        .expect("the stream opens");
    tunnel
}

/// Reads `len` bytes, or to the end.
pub async fn read(tunnel: &mut Tunnel, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        match soon("a chunk", tunnel.read_chunk()).await.expect("a chunk") {
            Some(chunk) => {
                tunnel.release(chunk.len());
                bytes.extend_from_slice(&chunk);
            }
            None => break,
        }
    }
    bytes
}

pub async fn write(tunnel: &mut Tunnel, bytes: impl Into<Bytes>) {
    let bytes = bytes.into();
    soon("writing", tunnel.write_chunk(bytes))
        .await
        .expect("the tunnel takes it");
}
