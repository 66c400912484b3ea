//! HBONE over the mesh's own TLS streams, as it runs in production.

#[path = "support/hbone.rs"]
mod support;
#[allow(dead_code)]
#[path = "support/tls.rs"]
mod tls;

use std::sync::Arc;

use adit_shared::hbone::buffer::BufferPool;
use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::{Connection, ConnectionError, Settings, TunnelError, serve};
use adit_shared::net::copy::{CopySettings, through_tunnel};
use adit_shared::net::drain;
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, spawn_local};

type Served = JoinHandle<Result<adit_shared::hbone::server::Served, ConnectionError>>;

/// A connection over TLS to a server that joins each stream to an echoing app.
async fn secured() -> (Connection, Served, drain::DrainTrigger) {
    let pki = tls::Pki::new();
    let suite = tls::SUITES[0];
    let (client, server) = sockets().await;
    let (client_config, server_config) = (pki.client(suite), pki.server(suite));
    let (trigger, watcher) = drain::channel();
    let server = spawn_local(async move {
        let config = Arc::new(server_config);
        let tls = TlsStream::accept(server, config, tls::HANDSHAKE)
            .await
            .expect("TLS");
        serve(tls, &Settings::DEFAULT, watcher, async |incoming| {
            let (app, mut echoing) = sockets().await;
            spawn_local(async move {
                let (mut read, mut write) = echoing.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
            let tunnel = incoming.respond.accept(None).expect("accept");
            through_tunnel(app, tunnel, (), CopySettings::default()).await;
        })
        .await
    });
    let config = Arc::new(client_config);
    let tls = TlsStream::connect(client, config, tls::name(), tls::HANDSHAKE)
        .await
        .expect("TLS");
    let connection = Connection::handshake(tls, &Settings::DEFAULT)
        .await
        .expect("h2");
    (connection, server, trigger)
}

async fn app(connection: &Connection) -> TcpStream {
    let (app, near) = sockets().await;
    let tunnel = open(connection).await;
    spawn_local(through_tunnel(near, tunnel, (), CopySettings::default()));
    app
}

#[test]
fn small_and_bulk_connections_share_a_tls_connection() {
    const TOTAL: usize = 16 << 20;
    run(async {
        let (connection, server, _trigger) = secured().await;
        let mut tasks = Vec::new();
        for salt in 0..4_u8 {
            let app = app(&connection).await;
            tasks.push(spawn_local(async move {
                let (mut read, mut write) = app.into_split();
                let block: Vec<u8> = (0..65_521_usize).map(|i| (i % 251) as u8 ^ salt).collect();
                let expected = block.clone();
                let writing = async move {
                    let mut sent = 0;
                    while sent < TOTAL {
                        let n = block.len().min(TOTAL - sent);
                        write.write_all(&block[..n]).await.expect("write");
                        sent += n;
                    }
                };
                let reading = async move {
                    let mut buffer = vec![0; 1 << 18];
                    let mut got = 0;
                    loop {
                        let n = read.read(&mut buffer).await.expect("read");
                        if n == 0 {
                            break;
                        }
                        for (i, byte) in buffer[..n].iter().enumerate() {
                            assert_eq!(*byte, expected[(got + i) % 65_521], "at {}", got + i);
                        }
                        got += n;
                    }
                    assert_eq!(got, TOTAL);
                };
                tokio::join!(writing, reading);
            }));
        }
        let mut small = app(&connection).await;
        for i in 0..200_u8 {
            small.write_all(&[i]).await.expect("write");
            assert_eq!(soon("echo", small.read_u8()).await.expect("read"), i);
        }
        for task in tasks {
            soon("bulk", task).await.expect("task");
        }
        drop(small);
        drop(connection);
        soon("the end", server)
            .await
            .expect("join")
            .expect("orderly");
        let stats = BufferPool::local().stats();
        eventually("no buffer is in use", || stats.bytes_in_use() == 0).await;
    });
}

#[test]
fn an_idle_tls_connection_with_idle_streams_holds_no_buffer() {
    run(async {
        let (connection, _server, _trigger) = secured().await;
        let mut apps = Vec::new();
        for _ in 0..50 {
            let mut app = app(&connection).await;
            app.write_all(b"ping").await.expect("write");
            soon("echo", app.read_exact(&mut [0; 4]))
                .await
                .expect("read");
            apps.push(app);
        }
        let stats = BufferPool::local().stats();
        eventually("no buffer is in use", || stats.bytes_in_use() == 0).await;
    });
}

#[test]
fn a_connection_that_ends_without_close_notify_fails_its_tunnels() {
    run(async {
        let (connection, server, _trigger) = secured().await;
        let mut tunnel = open(&connection).await;
        server.abort();
        let end = soon("the end", tunnel.read_chunk()).await;
        assert!(matches!(end, Err(TunnelError::Connection(_))), "{end:?}");
        let end = soon("the end", connection.closed()).await;
        assert!(!end.is_orderly(), "{end}");
    });
}
