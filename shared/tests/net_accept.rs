//! Accepting when descriptors run out, and up to a limit.

#[path = "support/hbone.rs"]
mod support;

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use adit_shared::net::accept::{AcceptCounts, AcceptLimits, accept_loop};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::*;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;

/// Descriptors are the process's: the tests of this file follow each other.
static DESCRIPTORS: Mutex<()> = Mutex::new(());

#[test]
fn accepting_survives_a_lack_of_descriptors() {
    let _alone = DESCRIPTORS.lock().unwrap_or_else(PoisonError::into_inner);
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let counts = Arc::new(AcceptCounts::default());
        let accepted = Rc::new(RefCell::new(Vec::new()));
        let (count, keep) = (counts.clone(), accepted.clone());
        let accepting = spawn_local(accept_loop(
            listener,
            AcceptLimits::default(),
            count,
            move |stream, _, permit| keep.borrow_mut().push((stream, permit)),
        ));
        let _first = TcpStream::connect(address).await.expect("connect");
        eventually("the first", || accepted.borrow().len() == 1).await;

        // The client's socket takes the last descriptor.
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
        let highest = std::fs::read_dir("/proc/self/fd").expect("proc").count() as u64 + 16;
        setrlimit(Resource::RLIMIT_NOFILE, highest, hard).expect("lower");
        let mut filler = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            filler.push(file);
        }
        filler.pop();
        let second = TcpStream::connect(address).await;
        eventually("a shortage", || {
            counts.exhausted.load(Ordering::Relaxed) > 0
        })
        .await;
        assert!(!accepting.is_finished());
        assert_eq!(accepted.borrow().len(), 1);
        drop(filler);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("restore");

        let _second = second.expect("it is in the backlog");
        eventually("the second", || accepted.borrow().len() == 2).await;
        assert_eq!(counts.accepted.load(Ordering::Relaxed), 2);
        assert_eq!(counts.open.load(Ordering::Relaxed), 2);
        accepted.borrow_mut().clear();
        assert_eq!(counts.open.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn above_the_limit_connections_wait_until_one_ends() {
    let _alone = DESCRIPTORS.lock().unwrap_or_else(PoisonError::into_inner);
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let counts = Arc::new(AcceptCounts::default());
        let limits = AcceptLimits {
            max_connections: 2,
            ..AcceptLimits::default()
        };
        let accepted = Rc::new(RefCell::new(Vec::new()));
        let (count, keep) = (counts.clone(), accepted.clone());
        spawn_local(accept_loop(
            listener,
            limits,
            count,
            move |stream, _, permit| {
                keep.borrow_mut().push((stream, permit));
            },
        ));
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(TcpStream::connect(address).await.expect("connect"));
        }
        eventually("the limit", || {
            counts.saturated.load(Ordering::Relaxed) == 1
        })
        .await;
        assert_eq!(accepted.borrow().len(), 2);
        accepted.borrow_mut().remove(0);
        let end = soon("the first is closed", clients[0].read(&mut [0; 1])).await;
        assert_eq!(end.expect("FIN"), 0);
        eventually("the third", || counts.accepted.load(Ordering::Relaxed) == 3).await;
        assert_eq!(counts.open.load(Ordering::Relaxed), 2);
    });
}
