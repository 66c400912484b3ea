//! What an idle connection costs, counted at the allocator.

#[path = "support/hbone.rs"]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use adit_shared::hbone::buffer::BufferPool;
use adit_shared::hbone::{Connection, Incoming, Settings};
use adit_shared::net::copy::{CopySettings, through_socket, through_tunnel};
use support::*;
use tokio::task::spawn_local;

/// Bytes that are allocated now.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const TUNNELS: usize = 1000;
const PER_CONNECTION: usize = 100;

/// An app's socket, which costs our heap nothing, and the proxy's end of it.
fn app() -> (TcpStream, tokio::net::TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let app = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (proxy, _) = listener.accept().expect("accept");
    proxy.set_nonblocking(true).expect("nonblocking");
    let proxy = tokio::net::TcpStream::from_std(proxy).expect("register");
    (app, proxy)
}

fn allow_descriptors(count: u64) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    if soft < count {
        setrlimit(Resource::RLIMIT_NOFILE, count, hard.max(count)).expect("more descriptors");
    }
}

// One test: the counter is the process's.
#[test]
fn an_idle_connection_holds_less_than_its_promised_memory() {
    allow_descriptors(16_384);
    run(async {
        let (tunnel, _apps) = tunnels().await;
        println!("{tunnel} bytes per tunnelled connection and proxy");
        assert!(
            tunnel < 2048,
            "{tunnel} bytes per tunnelled connection and proxy"
        );
        let (plain, _apps) = plain().await;
        println!("{plain} bytes per plaintext connection");
        assert!(plain < 2048, "{plain} bytes per plaintext connection");
    });
}

/// The figure, and what has to live until all is measured.
async fn tunnels() -> (usize, impl Sized) {
    let waiting: Rc<RefCell<Vec<tokio::net::TcpStream>>> = Rc::default();
    let mut apps = Vec::with_capacity(TUNNELS);
    let mut connections = Vec::new();
    for _ in 0..TUNNELS / PER_CONNECTION {
        let waiting = waiting.clone();
        connections.push(
            connect(Settings::DEFAULT, async move |incoming: Incoming| {
                let tunnel = incoming.respond.accept(None).expect("accept");
                let app = waiting.borrow_mut().pop().expect("an app");
                through_tunnel(app, tunnel, (), CopySettings::default()).await;
            })
            .await,
        );
    }
    // One stream warms up each connection: what it holds is not per stream.
    for (connection, _) in &connections {
        apps.push(exchange(connection, &waiting).await);
    }
    let before = ALLOCATED.load(Ordering::Relaxed);
    let measured = TUNNELS - connections.len();
    for i in 0..measured {
        let (connection, _) = &connections[i % connections.len()];
        apps.push(exchange(connection, &waiting).await);
    }
    assert_eq!(BufferPool::local().stats().bytes_in_use(), 0);
    let after = ALLOCATED.load(Ordering::Relaxed);
    // Both proxies live in this process.
    ((after - before) / measured / 2, (apps, connections))
}

/// Opens a tunnel between two apps, moves a message each way, and leaves it idle.
async fn exchange(
    connection: &Connection,
    waiting: &RefCell<Vec<tokio::net::TcpStream>>,
) -> (TcpStream, TcpStream) {
    let (mut client, near) = app();
    let (mut server, far) = app();
    waiting.borrow_mut().push(far);
    let tunnel = open(connection).await;
    spawn_local(through_tunnel(near, tunnel, (), CopySettings::default()));
    settle(&mut client, &mut server).await;
    settle(&mut server, &mut client).await;
    (client, server)
}

async fn settle(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"ping").expect("write");
    to.set_nonblocking(true).expect("nonblocking");
    let (mut got, deadline) = (0, patience());
    while got < 4 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the message does not come"
        );
        got += to.read(&mut [0; 4]).unwrap_or_default();
        tokio::task::yield_now().await;
    }
    to.set_nonblocking(false).expect("blocking");
}

async fn plain() -> (usize, impl Sized) {
    let mut apps = Vec::with_capacity(TUNNELS);
    let before = ALLOCATED.load(Ordering::Relaxed);
    for _ in 0..TUNNELS {
        let (mut client, first) = app();
        let (mut server, second) = app();
        spawn_local(through_socket(first, second, (), CopySettings::default()));
        settle(&mut client, &mut server).await;
        settle(&mut server, &mut client).await;
        apps.push((client, server));
    }
    let after = ALLOCATED.load(Ordering::Relaxed);
    ((after - before) / TUNNELS, apps)
}
