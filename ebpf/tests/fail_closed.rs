//! Without a ztunnel nothing gets past the mesh, and everybody learns it at once.

mod common;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use adit_ebpf::MARK_OUT;
use common::*;

fn foreign() -> [SocketAddr; 2] {
    ["192.0.2.10:80", "[2001:db8::10]:80"].map(|text| text.parse().expect("an address"))
}

#[test]
fn outbound_is_refused_at_once_when_ztunnels_listeners_are_gone() {
    let lab = Lab::new();
    let pod = lab.pod();
    let beyond = lab.out(|| foreign().map(|address| bind(address).expect("bound")));
    let mut redirector = lab.redirector();
    close(pod.enrol(&mut redirector));
    let mut sniffer = Sniffer::new(&lab);
    for destination in foreign() {
        let start = Instant::now();
        assert_eq!(
            errno(pod.app(|| connect(destination))),
            Some(libc::ECONNREFUSED)
        );
        assert!(start.elapsed() < Duration::from_millis(500));
    }
    assert!(beyond.iter().all(is_idle));
    assert_eq!(sniffer.packets(), 0);
}

#[test]
fn inbound_is_reset_when_ztunnels_listeners_are_gone() {
    let lab = Lab::new();
    let pod = lab.pod();
    let server = pod.serve(std::net::Ipv6Addr::UNSPECIFIED, 8080);
    let mut redirector = lab.redirector();
    close(pod.enrol(&mut redirector));
    for own in pod.addresses() {
        for port in [8080, 15008] {
            assert_eq!(
                errno(lab.out(|| connect((own, port)))),
                Some(libc::ECONNREFUSED)
            );
        }
    }
    assert!(is_idle(&server));
}

#[test]
fn killing_the_process_that_listens_empties_the_slots() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.listeners();
    pod.enrol_with(&mut redirector, &trap).expect("enrolled");
    let held = [&trap.outbound, &trap.plaintext, &trap.hbone].map(|listener| listener.as_raw_fd());
    let child = fork_holding(&held);
    // Now only the child has them.
    close(trap);
    let alive = pod.app(|| connect(foreign()[0]));
    // SAFETY: our own child.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    alive.expect("the child's listener takes it");
    wait_for("the connect is refused", || {
        errno(pod.app(|| connect(foreign()[0]))) == Some(libc::ECONNREFUSED)
    });
    assert_eq!(redirector.pods()[0].listeners, [false; 3]);
}

/// Why the hook decides and not `sk_lookup`: an IPv4 connection that loops and is dropped there gets no
/// answer, for the kernel sends no RST from an address that is not its own. IPv6 has no such check.
#[test]
fn a_looped_connection_that_meets_an_empty_slot_hangs_over_ipv4() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    close(pod.enrol(&mut redirector));
    // The hook is out of the way; the app marks its socket itself.
    redirector.release(&pod.uid).expect("released");
    let [over4, over6] = foreign().map(|destination| {
        pod.app(|| {
            let socket = tcp(destination.ip());
            socket.set_mark(MARK_OUT).expect("set");
            connect_from(socket, destination)
        })
    });
    assert_eq!(over4.expect_err("dropped").kind(), ErrorKind::TimedOut);
    assert_eq!(errno(over6), Some(libc::ECONNREFUSED));
}

#[test]
fn capture_outlives_the_process_that_set_it_up() {
    let lab = Lab::new();
    let pod = lab.pod();
    let beyond = lab.out(|| foreign().map(|address| bind(address).expect("bound")));
    let server = pod.serve(pod.v4, 8080);
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    close((trap, redirector));
    for destination in foreign() {
        assert_eq!(
            errno(pod.app(|| connect(destination))),
            Some(libc::ECONNREFUSED)
        );
    }
    assert_eq!(
        errno(lab.out(|| connect((pod.v4, 8080)))),
        Some(libc::ECONNREFUSED)
    );
    assert!(beyond.iter().all(is_idle) && is_idle(&server));
}
