//! One ztunnel after the other: nothing is refused and nothing gets past while listeners, programs and
//! processes are exchanged under load.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use adit_ebpf::PodState;
use common::*;

fn foreign() -> [SocketAddr; 2] {
    ["192.0.2.10:80", "[2001:db8::10]:80"].map(|text| text.parse().expect("an address"))
}

/// Connections of an app, one after the other, each of which gets a byte of an answer.
struct Load<'a> {
    stop: &'a AtomicBool,
    done: &'a AtomicUsize,
}

impl Load<'_> {
    fn run(&self, pod: &Pod, destination: SocketAddr) {
        pod.app(|| {
            while !self.stop.load(Ordering::Relaxed) {
                let mut stream = connect(destination).unwrap_or_else(|error| {
                    panic!(
                        "{destination} after {}: {error}",
                        self.done.load(Ordering::Relaxed)
                    )
                });
                stream
                    .read_exact(&mut [0; 1])
                    .unwrap_or_else(|error| panic!("{destination}: no answer: {error}"));
                self.done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    /// Waits until that many more connections have been made.
    fn progress(&self, count: usize) {
        let goal = self.done.load(Ordering::Relaxed) + count;
        wait_for("the load goes on", || {
            self.done.load(Ordering::Relaxed) >= goal || self.stop.load(Ordering::Relaxed)
        });
    }
}

/// A ztunnel that answers with one byte, until it is told to drain: it accepts what is in its queue and goes.
fn answer(listener: &TcpListener, drain: &AtomicBool) {
    listener.set_nonblocking(true).expect("set");
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                let _ = stream.write_all(b"x");
            }
            Err(_) if drain.load(Ordering::Relaxed) => return,
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// Sets the flag also when a thread panics, so that the others end.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_connection_fails_while_listeners_are_exchanged() {
    const ROUNDS: usize = 25;
    let lab = Lab::new();
    let pod = lab.pod();
    let beyond = lab.out(|| foreign().map(|address| bind(address).expect("bound")));
    let mut redirector = lab.redirector();
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let load = Load {
        stop: &stop,
        done: &done,
    };
    let mut trap = pod.listeners();
    pod.enrol_with(&mut redirector, &trap).expect("enrolled");
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for destination in foreign() {
            let (load, pod) = (&load, &pod);
            scope.spawn(move || {
                let _stop = Stop(load.stop);
                load.run(pod, destination);
            });
        }
        for _ in 0..ROUNDS {
            let drain = AtomicBool::new(false);
            let next = std::thread::scope(|scope| {
                let _drain = Stop(&drain);
                scope.spawn(|| answer(&trap.outbound, &drain));
                load.progress(20);
                let next = pod.listeners();
                pod.enrol_with(&mut redirector, &next)
                    .expect("enrolled again");
                next
            });
            // The old one's listeners close here, with what may have come into their queues since.
            trap = next;
        }
        let drain = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _drain = Stop(&drain);
            scope.spawn(|| answer(&trap.outbound, &drain));
            load.progress(20);
            stop.store(true, Ordering::Relaxed);
            // The last connections still want their byte.
            std::thread::sleep(Duration::from_millis(200));
        });
    });
    assert!(beyond.iter().all(is_idle));
    assert!(done.load(Ordering::Relaxed) > ROUNDS * 20);
    assert_eq!(redirector.pods()[0].generation as usize, ROUNDS + 1);
}

#[test]
fn no_connection_fails_or_gets_past_while_programs_are_replaced() {
    const ROUNDS: usize = 15;
    let lab = Lab::new();
    let pod = lab.pod();
    let beyond = lab.out(|| foreign().map(|address| bind(address).expect("bound")));
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let (stop, done, drain) = (
        AtomicBool::new(false),
        AtomicUsize::new(0),
        AtomicBool::new(false),
    );
    let load = Load {
        stop: &stop,
        done: &done,
    };
    std::thread::scope(|scope| {
        let _drain = Stop(&drain);
        let _stop = Stop(&stop);
        scope.spawn(|| answer(&trap.outbound, &drain));
        let loads = foreign().map(|destination| {
            let (load, pod) = (&load, &pod);
            scope.spawn(move || {
                let _stop = Stop(load.stop);
                load.run(pod, destination);
            })
        });
        for _ in 0..ROUNDS {
            // What a new process does: it takes the links over and replaces their programs.
            drop(redirector);
            redirector = lab.redirector();
            assert_eq!(redirector.pods()[0].state, PodState::Left);
            load.progress(5);
            pod.enrol_with(&mut redirector, &trap).expect("enrolled");
            load.progress(5);
        }
        stop.store(true, Ordering::Relaxed);
        for load in loads {
            load.join().expect("no connection failed");
        }
    });
    assert!(beyond.iter().all(is_idle));
}

#[test]
fn a_new_process_takes_over_the_links_of_the_one_before() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let links = ["connect4", "connect6", "probe", "pods/0"].map(|name| lab.pins().join(name));
    let before = links.clone().map(|pin| raw_bpf::link_id(&pin));
    drop(redirector);
    let mut redirector = lab.redirector();
    let left = redirector.pods();
    assert_eq!(left.len(), 1);
    assert_eq!(
        (left[0].uid.as_str(), left[0].state),
        (pod.uid.as_str(), PodState::Left)
    );
    assert_eq!(left[0].addresses, pod.addresses());
    assert_eq!(left[0].listeners, [true; 3]);
    assert_eq!(left[0].netns_inode, pod.netns.fd.inode());
    pod.enrol_with(&mut redirector, &trap).expect("enrolled");
    assert_eq!(links.map(|pin| raw_bpf::link_id(&pin)), before);
    assert_eq!(
        (redirector.pods()[0].state, redirector.pods()[0].generation),
        (PodState::Captured, 2)
    );
}

#[test]
fn maps_of_an_incompatible_layout_are_replaced() {
    let lab = Lab::new();
    let pod = lab.pod();
    drop(lab.redirector());
    // A map of other sizes under the name of ours.
    let (cookies, other) = (
        lab.pins().join("adit_cookies"),
        lab.pins().join("adit_slots"),
    );
    std::fs::remove_file(&cookies).expect("removed");
    std::fs::rename(other, cookies).expect("renamed");
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let _app = pod.app(|| connect(foreign()[0]).expect("captured"));
    drop(accept(&trap.outbound));
}

#[test]
fn what_another_layout_left_stays_in_force_until_it_is_removed() {
    let lab = Lab::new();
    drop(lab.redirector());
    let old = lab.pins().with_file_name("v0");
    std::fs::rename(lab.pins(), &old).expect("renamed");
    let mut redirector = lab.redirector();
    assert!(old.join("connect4").exists());
    assert_eq!(redirector.remove_outdated().expect("removed"), 1);
    assert!(!old.exists() && lab.pins().join("connect4").exists());
    assert_eq!(redirector.remove_outdated().expect("nothing left"), 0);
}
