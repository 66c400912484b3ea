//! The copy loop: app to tunnel to app as two proxies do it, and socket to socket.

#[path = "support/hbone.rs"]
mod support;

use std::cell::{Cell, RefCell};
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::rc::Rc;
use std::time::Duration;

use adit_shared::hbone::buffer::BufferPool;
use adit_shared::hbone::{Connection, ResetReason, Settings, TunnelError};
use adit_shared::net::copy::{
    Copied, CopyEnd, CopySettings, Traffic, through_socket, through_tunnel,
};
use adit_shared::net::socket::reset_on_close;
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, spawn_local};

#[derive(Default)]
struct Count {
    sent: Cell<usize>,
    received: Cell<usize>,
}

impl Traffic for Count {
    fn sent(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes);
    }
    fn received(&self, bytes: usize) {
        self.received.set(self.received.get() + bytes);
    }
}

/// A client app and a server app with something between them.
struct Path {
    client: TcpStream,
    server: TcpStream,
    traffic: Rc<Count>,
    /// Ends of the copies: next to the client, next to the server (the same one for splice).
    near: JoinHandle<Copied>,
    far: Option<JoinHandle<Copied>>,
    _keep: Option<(Connection, Server)>,
}

/// client - proxy - HBONE - proxy - server.
async fn tunnelled(settings: CopySettings) -> Path {
    let (client, near_app) = sockets().await;
    let (far_app, server) = sockets().await;
    let far = Rc::new(RefCell::new(None));
    let (put, far_app) = (far.clone(), RefCell::new(Some(far_app)));
    let (connection, proxy) = connect(Settings::DEFAULT, async move |incoming| {
        let tunnel = incoming.respond.accept(None).expect("accept");
        let app = far_app.take().expect("one stream");
        put.replace(Some(spawn_local(through_tunnel(app, tunnel, (), settings))));
    })
    .await;
    let tunnel = open(&connection).await;
    let traffic = Rc::new(Count::default());
    let near = spawn_local(through_tunnel(near_app, tunnel, traffic.clone(), settings));
    eventually("the far side accepts", || far.borrow().is_some()).await;
    Path {
        client,
        server,
        traffic,
        near,
        far: far.take(),
        _keep: Some((connection, proxy)),
    }
}

/// client - proxy - server.
async fn spliced(settings: CopySettings) -> Path {
    let (client, first) = sockets().await;
    let (second, server) = sockets().await;
    let traffic = Rc::new(Count::default());
    let near = spawn_local(through_socket(first, second, traffic.clone(), settings));
    Path {
        client,
        server,
        traffic,
        near,
        far: None,
        _keep: None,
    }
}

/// Runs a behaviour over both kinds of path.
fn on_both_paths(settings: CopySettings, behaviour: impl AsyncFn(Path)) {
    run(async {
        behaviour(tunnelled(settings).await).await;
        behaviour(spliced(settings).await).await;
    });
}

async fn assert_reset(app: &mut TcpStream) {
    let end = soon("reset", app.read(&mut [0; 16])).await;
    let error = end.expect_err("a reset is not an end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// After a FIN, reading tells nothing new: it is the socket's error that tells of a reset.
async fn assert_reset_after_fin(app: &TcpStream) {
    soon("reset", app.ready(tokio::io::Interest::ERROR))
        .await
        .expect("ready");
    let error = app.take_error().expect("socket").expect("an error");
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE), "{error}");
}

#[test]
fn requests_and_answers_pass_and_are_counted() {
    on_both_paths(CopySettings::default(), async |mut path| {
        for len in [1, 10, 1000, 5000, 16_384, 100_000] {
            let message = vec![len as u8; len];
            path.client.write_all(&message).await.expect("write");
            let mut got = vec![0; len];
            soon("request", path.server.read_exact(&mut got))
                .await
                .expect("read");
            assert_eq!(got, message);
            path.server.write_all(&got).await.expect("write");
            soon("answer", path.client.read_exact(&mut got))
                .await
                .expect("read");
            assert_eq!(got, message);
        }
        let total = 122_395;
        drop((path.client, path.server));
        let copied = soon("the end", path.near).await.expect("join");
        assert!(copied.end.is_finished(), "{}", copied.end);
        assert_eq!((copied.sent, copied.received), (total, total));
        let counted = (path.traffic.sent.get(), path.traffic.received.get());
        assert_eq!(counted, (total as usize, total as usize));
    });
}

#[test]
fn bulk_passes_both_ways_at_once_unharmed() {
    const TOTAL: usize = 20 << 20;
    async fn source(mut to: tokio::net::tcp::OwnedWriteHalf, salt: u8) {
        let block: Vec<u8> = (0..65_521_usize).map(|i| (i % 251) as u8 ^ salt).collect();
        let mut sent = 0;
        while sent < TOTAL {
            let n = block.len().min(TOTAL - sent);
            to.write_all(&block[..n]).await.expect("write");
            sent += n;
        }
        // FIN.
    }
    async fn sink(mut from: tokio::net::tcp::OwnedReadHalf, salt: u8) {
        let mut buffer = vec![0; 1 << 18];
        let mut got = 0;
        loop {
            let n = from.read(&mut buffer).await.expect("read");
            if n == 0 {
                break;
            }
            for (i, byte) in buffer[..n].iter().enumerate() {
                let at = (got + i) % 65_521;
                assert_eq!(*byte, (at % 251) as u8 ^ salt, "at {}", got + i);
            }
            got += n;
        }
        assert_eq!(got, TOTAL);
    }
    on_both_paths(CopySettings::default(), async |path| {
        let (client_read, client_write) = path.client.into_split();
        let (server_read, server_write) = path.server.into_split();
        tokio::join!(
            source(client_write, 0),
            source(server_write, 0x55),
            sink(server_read, 0),
            sink(client_read, 0x55),
        );
        let copied = soon("the end", path.near).await.expect("join");
        assert!(copied.end.is_finished(), "{}", copied.end);
        assert_eq!(copied.sent, TOTAL as u64);
        drop(path.far);
        // Every buffer has gone home.
        let stats = BufferPool::local().stats();
        eventually("no buffer is in use", || stats.bytes_in_use() == 0).await;
    });
}

#[test]
fn a_half_close_passes_and_the_answer_still_comes() {
    on_both_paths(CopySettings::default(), async |mut path| {
        path.client.write_all(b"question").await.expect("write");
        path.client.shutdown().await.expect("FIN");
        let mut question = Vec::new();
        soon("FIN", path.server.read_to_end(&mut question))
            .await
            .expect("read");
        assert_eq!(question, b"question");
        path.server.write_all(b"answer").await.expect("write");
        let mut answer = [0; 6];
        soon("answer", path.client.read_exact(&mut answer))
            .await
            .expect("read");
        assert_eq!(&answer, b"answer");
        assert!(!path.near.is_finished());
        path.server.shutdown().await.expect("FIN");
        assert_eq!(
            soon("FIN", path.client.read(&mut answer))
                .await
                .expect("read"),
            0
        );
        let copied = soon("the end", path.near).await.expect("join");
        assert!(copied.end.is_finished(), "{}", copied.end);
    });
}

#[test]
fn the_clients_reset_reaches_the_server_app_as_a_reset() {
    on_both_paths(CopySettings::default(), async |mut path| {
        path.client.write_all(b"x").await.expect("write");
        soon("x", path.server.read_exact(&mut [0]))
            .await
            .expect("read");
        reset_on_close(&path.client);
        drop(path.client);
        assert_reset(&mut path.server).await;
        let copied = soon("the end", path.near).await.expect("join");
        assert!(matches!(copied.end, CopyEnd::App(_)), "{}", copied.end);
        if let Some(far) = path.far {
            let copied = soon("the end", far).await.expect("join");
            let CopyEnd::Tunnel(TunnelError::Reset(reason)) = copied.end else {
                panic!("{}", copied.end);
            };
            assert_eq!(reason, ResetReason::CONNECT_ERROR);
        }
    });
}

#[test]
fn the_servers_reset_reaches_the_client_app_as_a_reset() {
    on_both_paths(CopySettings::default(), async |mut path| {
        path.client.write_all(b"x").await.expect("write");
        soon("x", path.server.read_exact(&mut [0]))
            .await
            .expect("read");
        reset_on_close(&path.server);
        drop(path.server);
        assert_reset(&mut path.client).await;
        soon("the end", path.near).await.expect("join");
    });
}

#[test]
fn a_reset_after_a_half_close_is_seen_although_nothing_is_read() {
    on_both_paths(CopySettings::default(), async |mut path| {
        path.client.shutdown().await.expect("FIN");
        let n = soon("FIN", path.server.read(&mut [0; 8]))
            .await
            .expect("read");
        assert_eq!(n, 0);
        reset_on_close(&path.client);
        drop(path.client);
        assert_reset_after_fin(&path.server).await;
    });
    on_both_paths(CopySettings::default(), async |mut path| {
        path.server.shutdown().await.expect("FIN");
        let n = soon("FIN", path.client.read(&mut [0; 8]))
            .await
            .expect("read");
        assert_eq!(n, 0);
        reset_on_close(&path.server);
        drop(path.server);
        assert_reset_after_fin(&path.client).await;
    });
}

#[test]
fn a_half_closed_connection_that_nobody_uses_ends() {
    let settings = CopySettings {
        half_closed_idle: Duration::from_millis(50),
        ..CopySettings::default()
    };
    on_both_paths(settings, async |mut path| {
        path.client.shutdown().await.expect("FIN");
        assert_reset_after_fin(&path.server).await;
        let copied = soon("the end", path.near).await.expect("join");
        match copied.end {
            CopyEnd::HalfClosedIdle => {}
            // The far proxy was faster.
            CopyEnd::Tunnel(TunnelError::Reset(ResetReason::CANCEL)) => {}
            other => panic!("{other}"),
        }
    });
}

#[test]
fn a_half_closed_connection_that_is_used_goes_on() {
    let settings = CopySettings {
        half_closed_idle: Duration::from_millis(100),
        ..CopySettings::default()
    };
    on_both_paths(settings, async |mut path| {
        path.client.shutdown().await.expect("FIN");
        for _ in 0..20 {
            path.server.write_all(b"x").await.expect("write");
            soon("x", path.client.read_exact(&mut [0]))
                .await
                .expect("read");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!path.near.is_finished());
    });
}

#[test]
fn an_idle_timeout_ends_what_is_idle_only() {
    let settings = CopySettings {
        idle: Some(Duration::from_millis(100)),
        ..CopySettings::default()
    };
    on_both_paths(settings, async |mut path| {
        for _ in 0..20 {
            path.client.write_all(b"x").await.expect("write");
            soon("x", path.server.read_exact(&mut [0]))
                .await
                .expect("read");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!path.near.is_finished());
        assert_reset(&mut path.client).await;
        assert_reset(&mut path.server).await;
    });
}

#[test]
fn dropping_a_copy_resets_both_apps() {
    on_both_paths(CopySettings::default(), async |mut path| {
        path.near.abort();
        assert_reset(&mut path.client).await;
        assert_reset(&mut path.server).await;
    });
}

#[test]
fn a_lost_hbone_connection_resets_both_apps() {
    run(async {
        let mut path = tunnelled(CopySettings::default()).await;
        let (_connection, server) = path._keep.take().expect("a tunnel");
        server.task.abort();
        assert_reset(&mut path.client).await;
        assert_reset(&mut path.server).await;
    });
}

#[test]
fn a_reader_that_stalls_stops_the_writer_and_bounds_what_is_held() {
    on_both_paths(CopySettings::default(), async |mut path| {
        // The sender stops when the windows and the sockets' buffers are full.
        let block = vec![1; 1 << 16];
        let mut written = 0;
        while let Ok(n) =
            tokio::time::timeout(Duration::from_millis(300), path.client.write(&block)).await
        {
            written += n.expect("write");
            assert!(written < 64 << 20, "nothing stops the sender");
        }
        let pool = BufferPool::local().stats();
        assert!(
            pool.bytes_in_use() <= 6 << 20,
            "{} in use",
            pool.bytes_in_use()
        );
        // And goes on when the reader does, with nothing lost.
        path.client.shutdown().await.expect("FIN");
        let mut read = 0;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match soon("more", path.server.read(&mut buffer))
                .await
                .expect("read")
            {
                0 => break,
                n => read += n,
            }
        }
        assert_eq!(read, written);
    });
}

#[test]
fn pipes_are_recycled_and_closed_with_what_is_in_them() {
    fn pipes() -> usize {
        let fds = std::fs::read_dir("/proc/self/fd").expect("proc");
        fds.flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .filter(|link| link.to_string_lossy().starts_with("pipe:"))
            .count()
    }
    run(async {
        let before = pipes();
        for round in 0..5 {
            let mut path = spliced(CopySettings::default()).await;
            let bulk = vec![round; 4 << 20];
            let server = path.server;
            let reader = spawn_local(async move {
                let mut server = server;
                let mut got = Vec::new();
                server.read_to_end(&mut got).await.expect("read");
                got
            });
            path.client.write_all(&bulk).await.expect("write");
            path.client.shutdown().await.expect("FIN");
            let got = soon("bulk", reader).await.expect("join");
            assert!(got == bulk, "another connection's bytes");
        }
        // Other tests of this process have pipes too, but each thread keeps few.
        assert!(pipes() < before + 100, "{} pipes", pipes());
    });
}

#[test]
fn the_descriptor_is_closed_when_a_copy_ends_half_closed() {
    run(async {
        let (client, app) = sockets().await;
        let (other, server) = sockets().await;
        let fd = app.as_raw_fd();
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).expect("open");
        let settings = CopySettings::default();
        let copy = spawn_local(through_socket(app, other, (), settings));
        let mut client = client;
        client.shutdown().await.expect("FIN");
        let mut server = server;
        assert_eq!(
            soon("FIN", server.read(&mut [0; 1])).await.expect("read"),
            0
        );
        copy.abort();
        let _ = copy.await;
        let now = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
        assert_ne!(now, Some(link), "the watch keeps the socket open");
    });
}
