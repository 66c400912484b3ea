//! What an app connects to arrives at ztunnel's outbound listener, whose accepted socket names the
//! destination; the app notices nothing. What is not the mesh's business passes.

mod common;

use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use adit_ebpf::socket::outbound_socket;
use common::*;
use socket2::Domain;

const FOREIGN: [&str; 2] = ["192.0.2.10:80", "[2001:db8::10]:80"];

fn foreign() -> [SocketAddr; 2] {
    FOREIGN.map(|text| text.parse().expect("an address"))
}

/// Servers of the outside that a connection reaches only past the mesh.
fn beyond(lab: &Lab) -> [TcpListener; 2] {
    lab.out(|| foreign().map(|address| bind(address).expect("bound")))
}

#[test]
fn a_connection_keeps_all_its_addresses() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for (destination, own) in foreign().into_iter().zip(pod.addresses()) {
        let mut app = pod.app(|| connect(destination).expect("captured"));
        let mut accepted = accept(&trap.outbound);
        assert_eq!(accepted.local, destination);
        assert_eq!(accepted.peer, app.local_addr().expect("bound"));
        // The route's preferred source: not a loopback address, not the destination.
        assert_eq!(accepted.peer.ip(), own);
        assert_eq!(app.peer_addr().expect("connected"), destination);
        converse(&mut app, &mut accepted.stream);
    }
}

#[test]
fn a_v4_mapped_destination_is_an_ipv4_one() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let mapped: SocketAddr = "[::ffff:192.0.2.10]:80".parse().expect("an address");
    let mut app = pod.app(|| connect(mapped).expect("captured"));
    let mut accepted = accept(&trap.outbound);
    assert_eq!(accepted.local, foreign()[0]);
    assert_eq!(accepted.peer.ip(), pod.v4);
    assert_eq!(app.peer_addr().expect("connected"), mapped);
    converse(&mut app, &mut accepted.stream);
}

#[test]
fn a_blocking_and_a_non_blocking_connect_are_captured() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for destination in foreign() {
        pod.app(|| {
            let blocking = tcp(destination.ip());
            blocking.set_write_timeout(Some(PATIENCE)).expect("set");
            blocking.connect(&destination.into()).expect("captured");
            assert_eq!(accept(&trap.outbound).local, destination);

            let other = tcp(destination.ip());
            other.set_nonblocking(true).expect("set");
            let started = other.connect(&destination.into());
            assert_eq!(errno(started), Some(libc::EINPROGRESS));
            assert_eq!(accept(&trap.outbound).local, destination);
            // Asking again does not start again.
            let again = other.connect(&destination.into());
            assert!(matches!(errno(again), None | Some(libc::EISCONN)));
        });
    }
}

#[test]
fn an_address_and_port_bound_before_the_connect_are_kept() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for (destination, own) in foreign().into_iter().zip(pod.addresses()) {
        let source = SocketAddr::new(own, 23456);
        let mut app = pod.app(|| {
            let socket = tcp(own);
            socket.bind(&source.into()).expect("bound");
            connect_from(socket, destination).expect("captured")
        });
        let mut accepted = accept(&trap.outbound);
        assert_eq!((accepted.peer, accepted.local), (source, destination));
        converse(&mut app, &mut accepted.stream);
    }
}

#[test]
fn a_socket_bound_to_the_interface_is_captured() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for (destination, own) in foreign().into_iter().zip(pod.addresses()) {
        let mut app = pod.app(|| {
            let socket = tcp(destination.ip());
            socket.bind_device(Some(b"eth0")).expect("bound");
            connect_from(socket, destination).expect("captured")
        });
        let mut accepted = accept(&trap.outbound);
        assert_eq!((accepted.peer.ip(), accepted.local), (own, destination));
        converse(&mut app, &mut accepted.stream);
    }
}

#[test]
fn a_socket_bound_to_loopback_is_captured_with_that_source() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let destination = foreign()[0];
    let mut app = pod.app(|| {
        let socket = tcp(destination.ip());
        socket
            .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .expect("bound");
        connect_from(socket, destination).expect("captured")
    });
    let mut accepted = accept(&trap.outbound);
    assert_eq!(accepted.local, destination);
    assert!(accepted.peer.ip().is_loopback());
    converse(&mut app, &mut accepted.stream);
}

/// envoyproxy/envoy#15305: a redirection that rewrites destinations makes one 4-tuple of these.
#[test]
fn one_source_port_may_go_to_several_destinations() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let connections = ["192.0.2.10:80", "192.0.2.10:81", "192.0.2.11:80"].map(|destination| {
        let destination: SocketAddr = destination.parse().expect("an address");
        let app = pod.app(|| {
            let socket = tcp(destination.ip());
            socket.set_reuse_address(true).expect("set");
            socket
                .bind(&SocketAddr::new(pod.v4.into(), 24000).into())
                .expect("bound");
            connect_from(socket, destination).expect("captured")
        });
        let accepted = accept(&trap.outbound);
        assert_eq!((accepted.peer.port(), accepted.local), (24000, destination));
        (app, accepted)
    });
    for (mut app, mut accepted) in connections {
        converse(&mut app, &mut accepted.stream);
    }
}

#[test]
fn another_pods_address_is_captured_and_the_own_is_not() {
    let lab = Lab::new();
    let (pod, other) = (lab.pod(), lab.pod());
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let _other = other.enrol(&mut redirector);
    let destinations = other
        .addresses()
        .map(|address| SocketAddr::new(address, 8080));
    for destination in destinations {
        let _app = pod.app(|| connect(destination).expect("captured"));
        assert_eq!(accept(&trap.outbound).local, destination);
    }
    for own in pod.addresses() {
        let server = pod.serve(own, 8080);
        let mut app = pod.app(|| connect((own, 8080)).expect("the app itself"));
        converse(&mut app, &mut accept(&server).stream);
    }
    assert!(is_idle(&trap.outbound) && is_idle(&trap.plaintext));
}

#[test]
fn loopback_is_not_captured() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    for destination in [
        "127.0.0.1:8080",
        "127.9.9.9:8080",
        "0.0.0.0:8080",
        "[::1]:8080",
        "[::]:8080",
        "[::ffff:127.0.0.1]:8080",
    ] {
        let destination: SocketAddr = destination.parse().expect("an address");
        let mut app = pod.app(|| connect(destination).expect("the app itself"));
        converse(&mut app, &mut accept(&server).stream);
    }
    let closed = pod.app(|| connect((Ipv4Addr::LOCALHOST, 8081)));
    assert_eq!(errno(closed), Some(libc::ECONNREFUSED));
    assert!(is_idle(&trap.outbound) && is_idle(&trap.plaintext));
}

#[test]
fn a_socket_that_was_captured_and_connects_to_loopback_later_is_not_steered() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let server = pod.serve(Ipv4Addr::LOCALHOST, 8080);
    pod.app(|| {
        let socket = tcp(Ipv4Addr::LOCALHOST.into());
        socket
            .connect_timeout(&foreign()[0].into(), PATIENCE)
            .expect("captured");
        drop(accept(&trap.outbound));
        let nowhere = libc::sockaddr {
            sa_family: libc::AF_UNSPEC as u16,
            sa_data: [0; 14],
        };
        // SAFETY: a live address of that length; AF_UNSPEC dissolves the association.
        let result = unsafe {
            libc::connect(
                std::os::fd::AsRawFd::as_raw_fd(&socket),
                &raw const nowhere,
                size_of::<libc::sockaddr>() as u32,
            )
        };
        assert_eq!(result, 0);
        let _app = connect_from(socket, "127.0.0.1:8080".parse().expect("an address"))
            .expect("the app itself");
        drop(accept(&server));
    });
}

#[test]
fn a_pod_that_is_not_enrolled_connects_as_without_a_mesh() {
    let lab = Lab::new();
    let (pod, enrolled) = (lab.pod(), lab.pod());
    let beyond = beyond(&lab);
    let mut redirector = lab.redirector();
    let trap = enrolled.enrol(&mut redirector);
    for (destination, server) in foreign().into_iter().zip(&beyond) {
        let mut app = pod.app(|| connect(destination).expect("connected"));
        converse(&mut app, &mut accept(server).stream);
    }
    assert!(is_idle(&trap.outbound));
}

#[test]
fn another_network_namespace_of_the_pods_processes_is_not_captured() {
    let lab = Lab::new();
    let (pod, nested) = (lab.pod(), lab.pod());
    let beyond = beyond(&lab);
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    // The same cgroup, as for Docker in a pod; the namespace is another one's.
    let mut app = nested.app(|| connect(foreign()[0]).expect("connected"));
    converse(&mut app, &mut accept(&beyond[0]).stream);
    assert!(is_idle(&trap.outbound));
}

#[test]
fn a_connection_from_before_the_enrolment_goes_on() {
    let lab = Lab::new();
    let pod = lab.pod();
    let beyond = beyond(&lab);
    let mut redirector = lab.redirector();
    let before = foreign().map(|destination| pod.app(|| connect(destination).expect("connected")));
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    let inbound = pod
        .addresses()
        .map(|own| lab.out(|| connect((own, 8080)).expect("connected")));
    let accepted = [accept(&server), accept(&server)];
    let _trap = pod.enrol(&mut redirector);
    for (mut app, listener) in before.into_iter().zip(&beyond) {
        converse(&mut app, &mut accept(listener).stream);
    }
    for (mut client, mut accepted) in inbound.into_iter().zip(accepted) {
        converse(&mut client, &mut accepted.stream);
    }
}

#[test]
fn what_ztunnel_opens_leaves_the_pod_even_from_within_the_pods_cgroup() {
    let lab = Lab::new();
    let pod = lab.pod();
    let beyond = beyond(&lab);
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for (destination, server) in foreign().into_iter().zip(&beyond) {
        let open = || {
            let socket = outbound_socket(Domain::for_address(destination)).expect("opened");
            connect_from(socket, destination).expect("connected")
        };
        for mut own in [pod.ztunnel(open), pod.app(open)] {
            converse(&mut own, &mut accept(server).stream);
        }
    }
    assert!(is_idle(&trap.outbound));
}

#[test]
fn udp_is_not_touched() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    let receivers = lab.out(|| {
        foreign().map(|address| {
            let socket = UdpSocket::bind(SocketAddr::new(address.ip(), 443)).expect("bound");
            socket.set_read_timeout(Some(PATIENCE)).expect("set");
            socket
        })
    });
    for (receiver, own) in receivers.iter().zip(pod.addresses()) {
        let to = receiver.local_addr().expect("bound");
        pod.app(|| {
            let socket = UdpSocket::bind(SocketAddr::new(own, 0)).expect("bound");
            socket.connect(to).expect("connected");
            socket.send(b"quic").expect("sent");
        });
        let mut buffer = [0; 16];
        let (length, from) = receiver.recv_from(&mut buffer).expect("received");
        assert_eq!((&buffer[..length], from.ip()), (&b"quic"[..], own));
    }
}

#[test]
fn a_link_local_neighbour_is_reached_as_without_a_mesh() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    lab.outside().ip("addr add fe80::1/64 dev br0 nodad");
    let neighbour = |scope: u32| {
        std::net::SocketAddrV6::new("fe80::1".parse().expect("an address"), 80, 0, scope)
    };
    let index = |netns: &Netns, name: &str| -> u32 {
        let shown = netns.show(&format!("-o link show {name}"));
        shown
            .split(':')
            .next()
            .and_then(|index| index.parse().ok())
            .expect("an index")
    };
    let scope = index(lab.outside(), "br0");
    let server = lab.out(|| bind(neighbour(scope).into()).expect("bound"));
    let scope = index(&pod.netns, "eth0");
    let mut app = pod.app(|| connect(neighbour(scope)).expect("connected"));
    converse(&mut app, &mut accept(&server).stream);
    assert!(is_idle(&trap.outbound));
}

#[test]
fn half_closing_and_resetting_reach_the_other_side() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for destination in foreign() {
        let app = pod.app(|| connect(destination).expect("captured"));
        let mut accepted = accept(&trap.outbound);
        app.shutdown(std::net::Shutdown::Write)
            .expect("half-closed");
        assert_eq!(accepted.stream.read(&mut [0; 1]).expect("the end"), 0);
        socket2::SockRef::from(&accepted.stream)
            .set_linger(Some(Duration::ZERO))
            .expect("set");
        drop(accepted);
        let mut app = app;
        assert_eq!(errno(app.read(&mut [0; 1])), Some(libc::ECONNRESET));
    }
}

/// The kernel answers late packets (of `TIME_WAIT`, or with a RST) with the mark of the packet that it
/// answers: with ztunnel's own mark on the accepted side these answers left for the real destination.
#[test]
fn short_connections_leave_nothing_behind_and_no_packet_leaves_the_pod() {
    const COUNT: usize = 1500;
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let mut sniffer = Sniffer::new(&lab);
    for destination in foreign() {
        for abort in [false, true] {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for _ in 0..COUNT {
                        let stream = accept(&trap.outbound).stream;
                        if abort {
                            let stream = socket2::SockRef::from(&stream);
                            stream.set_linger(Some(Duration::ZERO)).expect("set");
                        }
                        // Either side may be the first to close.
                        drop(stream);
                    }
                });
                pod.app(|| {
                    for _ in 0..COUNT {
                        match connect(destination) {
                            // Reset before we could look.
                            Err(error)
                                if abort && error.raw_os_error() == Some(libc::ECONNRESET) => {}
                            result => drop(result.expect("captured")),
                        }
                    }
                });
            });
            assert_eq!(sniffer.packets(), 0, "{destination}");
        }
    }
    let stuck = || -> Vec<String> {
        let tables = pod.netns.thread(None, || {
            ["tcp", "tcp6"].map(|table| {
                std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).expect("read")
            })
        });
        let lines = tables.iter().flat_map(|table| table.lines());
        // FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING: somebody waits for an answer, or sends again. (Not
        // FIN_WAIT2, which the app's end keeps for a minute when a RST crosses its close, mesh or not.)
        let state = |line: &str| line.split_whitespace().nth(3).map(str::to_owned);
        let open = |state: String| matches!(state.as_str(), "04" | "08" | "09" | "0B");
        lines
            .filter(|line| state(line).is_some_and(open))
            .map(str::to_owned)
            .collect()
    };
    let deadline = std::time::Instant::now() + PATIENCE;
    while !stuck().is_empty() {
        assert!(std::time::Instant::now() < deadline, "{:#?}", stuck());
        std::thread::sleep(Duration::from_millis(20));
    }
}
