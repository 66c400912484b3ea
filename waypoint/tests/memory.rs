//! What stalled streams cost the waypoint, counted at the allocator, on its workers' threads
//! alone; and that they are in nobody's way.

#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code, reason = "shared with the tests of what a client may try")]
#[path = "safety/raw.rs"]
mod raw;
#[allow(dead_code, reason = "shared with the tests of the data path")]
#[path = "proxy/support.rs"]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::convert::Infallible;
use std::rc::Rc;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::time::Duration;

use adit_shared::hbone::record::TlsStream;
use adit_shared::hbone::{Connection, Settings, Tunnel};
use adit_shared::proto::waypoint::service_port::Protocol;
use bytes::Bytes;
use futures_util::stream;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Incoming;
use rustls::pki_types::ServerName;
use support::*;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep, timeout};

/// What it may hold for the answers of a connection that asks and does not read, in KiB.
const PER_FLOOD: isize = 2048;

/// Counts what worker threads hold. What they free was allocated by them.
struct Counting;

static HELD: AtomicIsize = AtomicIsize::new(0);

thread_local! {
    /// Whether this thread is a worker; asked for until it has its name.
    static WORKER: Cell<(bool, u16)> = const { Cell::new((false, 0)) };
}

fn count(bytes: isize) {
    let counted = WORKER.try_with(|known| {
        let (mut worker, asked) = known.get();
        if !worker && asked < 1000 {
            let mut name = [0_u8; 16];
            // SAFETY: PR_GET_NAME writes at most 16 bytes.
            unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
            worker = name.starts_with(b"worker-");
            known.set((worker, asked + 1));
        }
        worker
    });
    if counted == Ok(true) {
        HELD.fetch_add(bytes, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const TUNNELS: usize = 500;
/// Of the 16 streams of a connection; one is left for who is not stalled.
const PER_CONNECTION: usize = 15;
/// What the waypoint may hold for a stream that is stalled, in KiB: a stream's window or send
/// buffer of 256 on either side, and what HTTP reads at once.
const PER_STREAM: isize = 640;

/// TLS to the HBONE port.
async fn tls(mesh: &Mesh) -> TlsStream {
    let certificate = mesh.certificate(&identity("default", "curl")).await;
    let stream = TcpStream::connect(mesh.address).await.unwrap();
    let name = ServerName::IpAddress(mesh.address.ip().into());
    let config = certificate.client_config().clone();
    TlsStream::connect(stream, config, name, DEADLINE)
        .await
        .unwrap()
}

/// A connection with windows as the waypoint's own, so that all streams have their part of it.
async fn connect(mesh: &Mesh) -> Client {
    let settings = Settings {
        stream_window: 64 << 10,
        connection_window: 1 << 20,
        ..Settings::DEFAULT
    };
    let connection = Connection::handshake(tls(mesh).await, &settings)
        .await
        .unwrap();
    Client { connection }
}

/// Waits until a counter stands still, having moved.
async fn settled(counter: &Cell<usize>) {
    let deadline = Instant::now() + DEADLINE;
    let mut same = 0;
    let mut before = 0;
    while same < 10 {
        sleep(Duration::from_millis(50)).await;
        let now = counter.get();
        same = if now == before && now > 0 {
            same + 1
        } else {
            0
        };
        before = now;
        assert!(Instant::now() < deadline, "it goes on: {now}");
    }
}

/// Streams without end for `/flood`, a word for everything else.
fn endless(sent: Rc<Cell<usize>>) -> impl App {
    Http(move |request: Request<Incoming>| {
        let sent = sent.clone();
        async move {
            if request.uri().path() != "/flood" {
                return Response::new(body("word"));
            }
            let (pieces, inbox) = tokio::sync::mpsc::channel(1);
            spawn_local(async move {
                let piece = Bytes::from(vec![b'x'; 16 << 10]);
                while pieces.send(piece.clone()).await.is_ok() {
                    sent.set(sent.get() + piece.len());
                }
            });
            let pieces = stream::unfold(inbox, |mut inbox| async move {
                let piece = inbox.recv().await?;
                Some((Ok::<_, Infallible>(Frame::data(piece)), inbox))
            });
            Response::new(StreamBody::new(pieces).boxed())
        }
    })
}

/// Answers `/` and reads nothing of what comes after the head of a POST.
fn deaf() -> impl App {
    Http(|request: Request<Incoming>| async move {
        if request.method() == http::Method::POST {
            let _kept = request;
            std::future::pending::<()>().await;
        }
        Response::<Body>::new(body("word"))
    })
}

fn held() -> isize {
    HELD.load(Ordering::Relaxed)
}

/// What is held when nothing is taken or given back any more.
async fn still() -> isize {
    let deadline = Instant::now() + DEADLINE;
    let (mut before, mut same) = (held(), 0);
    while same < 10 {
        sleep(Duration::from_millis(50)).await;
        let now = held();
        same = if (now - before).abs() < 16 << 10 {
            same + 1
        } else {
            0
        };
        before = now;
        assert!(Instant::now() < deadline, "it goes on: {now}");
    }
    before
}

/// 500 stalled tunnels; returns them with their connections.
async fn stall(
    mesh: &Mesh,
    vip: &Vip,
    begin: impl AsyncFn(Tunnel) -> AbortHandle,
) -> (Vec<Client>, Vec<AbortHandle>) {
    let mut clients = Vec::new();
    let mut stalled = Vec::new();
    while stalled.len() < TUNNELS {
        let client = connect(mesh).await;
        for _ in 0..PER_CONNECTION {
            let tunnel = client.tunnel(vip.address).await.expect("accepted");
            stalled.push(begin(tunnel).await);
        }
        clients.push(client);
    }
    (clients, stalled)
}

/// Others on the same connections go on.
async fn neighbours(clients: &[Client], vip: &Vip) {
    let begun = Instant::now();
    for client in clients {
        let mut sender = client.http1(vip).await;
        for _ in 0..10 {
            assert_eq!(send(&mut sender, get("/")).await.text(), "word");
        }
    }
    println!(
        "{} requests beside stalled streams in {:?}",
        clients.len() * 10,
        begun.elapsed()
    );
}

async fn free(clients: Vec<Client>, stalled: Vec<AbortHandle>, before: isize) {
    for task in stalled {
        task.abort();
    }
    drop(clients);
    // All of it comes back, but for pools and tables that stay.
    eventually("the memory is given back", async || {
        held() - before < 16 << 20
    })
    .await;
    println!("{} KiB stay", (held() - before) / 1024);
}

// One test: the counter is the process's.
#[test]
fn stalled_streams_cost_little_and_are_in_nobodys_way() {
    run(async {
        let mesh = Mesh::with(|config| {
            config.workers = 2;
            config.pool_max_streams = 100;
        })
        .await;

        // Clients that do not read.
        let web = mesh.service("web", Protocol::Http);
        let sent = Rc::new(Cell::new(0));
        let _pod = mesh.pod(&web, "web-a", endless(sent.clone())).await;
        assert_eq!(connect(&mesh).await.get(&web, "/").await.text(), "word");
        let before = held();
        assert!(before > 0);
        let (clients, stalled) = stall(&mesh, &web, async |tunnel: Tunnel| {
            let mut io = tunnel.into_io();
            let head = b"GET /flood HTTP/1.1\r\nhost: w\r\n\r\n";
            io.write_all(head).await.unwrap();
            spawn_local(async move {
                std::future::pending::<()>().await;
                drop(io);
            })
            .abort_handle()
        })
        .await;
        settled(&sent).await;
        let each = (held() - before) / stalled.len() as isize / 1024;
        println!("{each} KiB for each client that does not read");
        assert!(each < PER_STREAM, "{each} KiB");
        neighbours(&clients, &web).await;
        free(clients, stalled, before).await;

        // Frames that want answers which nobody reads.
        for frame in [
            raw::frame(raw::kind::SETTINGS, 0, 0, &[]),
            raw::frame(raw::kind::PING, 0, 0, &[1; 8]),
        ] {
            let before = still().await;
            let mut http = raw::RawHttp2::new(tls(&mesh).await).await;
            let flood = frame.repeat((64 << 20) / frame.len());
            let _ = timeout(Duration::from_secs(2), http.write(&flood)).await;
            let more = (held() - before) / 1024;
            println!("{more} KiB for answers that are not read");
            assert!(more < PER_FLOOD, "{more} KiB");
        }

        // An endpoint that does not read. Its node's connections have windows of their own;
        // who calls another endpoint is not held up.
        let sink = mesh.service("sink", Protocol::Http);
        let _deaf = mesh.pod(&sink, "sink-a", deaf()).await;
        let taken = Rc::new(Cell::new(0));
        let before = held();
        let (clients, stalled) = stall(&mesh, &sink, async |tunnel: Tunnel| {
            let mut io = tunnel.into_io();
            let taken = taken.clone();
            let head = b"POST /sink HTTP/1.1\r\nhost: w\r\ncontent-length: 1000000000\r\n\r\n";
            io.write_all(head).await.unwrap();
            spawn_local(async move {
                let piece = vec![b'x'; 16 << 10];
                while io.write_all(&piece).await.is_ok() {
                    taken.set(taken.get() + piece.len());
                }
            })
            .abort_handle()
        })
        .await;
        settled(&taken).await;
        let each = (held() - before) / stalled.len() as isize / 1024;
        println!("{each} KiB for each endpoint's stream that is not read");
        assert!(each < PER_STREAM, "{each} KiB");
        neighbours(&clients, &web).await;
        let same = timeout(Duration::from_secs(2), clients[0].get(&sink, "/")).await;
        println!("the same endpoint: {:?}", same.map(|answer| answer.status));
        free(clients, stalled, before).await;
    });
}
