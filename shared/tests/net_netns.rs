//! Entering a network namespace and coming back. Needs root, as the node tunnel does.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use adit_shared::net::netns::NetnsFd;
use nix::sched::{CloneFlags, unshare};

/// A new, empty namespace, which lives as long as the handle.
fn fresh() -> NetnsFd {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace (needs root)");
        NetnsFd::current().expect("open")
    })
    .join()
    .expect("thread")
}

fn interfaces() -> usize {
    std::fs::read_to_string("/proc/thread-self/net/dev")
        .expect("proc")
        .lines()
        .count()
        - 2
}

#[test]
fn what_is_done_inside_happens_there_and_the_thread_comes_back() {
    let home = NetnsFd::current().expect("open");
    let other = fresh();
    assert_ne!(home.id(), other.id());
    let inside = other
        .enter(|| (NetnsFd::current().expect("open").id(), interfaces()))
        .expect("enter");
    assert_eq!(inside, (other.id(), 1), "there is nothing but lo");
    assert_eq!(NetnsFd::current().expect("open").id(), home.id());

    // lo is down there: a socket made inside belongs there for good.
    let listener = other
        .enter(|| TcpListener::bind("127.0.0.1:0"))
        .expect("enter")
        .expect("bind");
    let address = listener.local_addr().expect("address");
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn a_panic_inside_comes_back_too() {
    let home = NetnsFd::current().expect("open").id();
    let other = fresh();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = other.enter(|| panic!("on purpose"));
    }));
    assert!(panicked.is_err());
    assert_eq!(NetnsFd::current().expect("open").id(), home);
}

#[test]
fn nested_visits_unwind_one_by_one() {
    let (a, b) = (fresh(), fresh());
    let ids = a
        .enter(|| {
            let inner = b
                .enter(|| NetnsFd::current().expect("open").id())
                .expect("enter");
            (inner, NetnsFd::current().expect("open").id())
        })
        .expect("enter");
    assert_eq!(ids, (b.id(), a.id()));
}

#[test]
fn what_is_no_network_namespace_is_refused() {
    for path in ["/proc/self/ns/mnt", "/dev/null", "/proc/self/ns/none"] {
        assert!(NetnsFd::open(path).is_err(), "{path}");
    }
    let own = NetnsFd::of_pid(std::process::id()).expect("open");
    assert_eq!(own.id(), NetnsFd::current().expect("open").id());
    assert!(NetnsFd::of_pid(u32::MAX).is_err());
}

#[test]
fn a_visit_is_cheap() {
    let other = fresh();
    let rounds = 200;
    let begin = Instant::now();
    for _ in 0..rounds {
        other.enter(|| ()).expect("enter");
    }
    let each = begin.elapsed() / rounds;
    // Microseconds; the bound is for slow and busy machines.
    assert!(each < Duration::from_millis(5), "{each:?} per visit");
    println!("{each:?} per visit");
}
