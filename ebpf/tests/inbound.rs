//! What arrives at a pod is handed to ztunnel; what ztunnel opens towards the app carries the client's
//! address and reaches the app.

mod common;

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;

use adit_ebpf::socket::{PortRotor, outbound_socket, upstream_socket};
use adit_ebpf::{MARK_UP, PodRedirection};
use common::*;

const CLIENTS: [&str; 2] = ["10.7.0.1", "fd07::1"];

fn clients() -> [IpAddr; 2] {
    CLIENTS.map(|text| text.parse().expect("an address"))
}

/// ztunnel's connection to the app in the name of a client.
fn upstream(pod: &Pod, client: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    pod.ztunnel(|| connect_from(upstream_socket(client, &PortRotor::default())?, to))
}

#[test]
fn plaintext_and_hbone_arrive_at_their_listeners_with_their_addresses() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    let trap = pod.enrol(&mut redirector);
    for own in pod.addresses() {
        for (port, listener) in [
            (8080, &trap.plaintext),
            (9999, &trap.plaintext),
            (15008, &trap.hbone),
        ] {
            let mut client = lab.out(|| connect((own, port)).expect("captured"));
            let mut accepted = accept(listener);
            assert_eq!(accepted.local, SocketAddr::new(own, port));
            assert_eq!(accepted.peer, client.local_addr().expect("bound"));
            converse(&mut client, &mut accepted.stream);
        }
    }
    assert!(is_idle(&server) && is_idle(&trap.outbound));
}

#[test]
fn the_app_sees_the_client_and_not_ztunnel() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    let trap = pod.enrol(&mut redirector);
    let elsewhere: [IpAddr; 2] =
        ["203.0.113.9", "2001:db8:1::9"].map(|text| text.parse().expect("an address"));
    let mut sniffer = Sniffer::new(&lab);
    for clients in [clients(), elsewhere] {
        for (client, own) in clients.into_iter().zip(pod.addresses()) {
            let mut up =
                upstream(&pod, client, SocketAddr::new(own, 8080)).expect("the app is reached");
            let mut accepted = accept(&server);
            assert_eq!(accepted.peer.ip(), client);
            assert_eq!(accepted.local, SocketAddr::new(own, 8080));
            converse(&mut up, &mut accepted.stream);
        }
    }
    assert!(is_idle(&trap.plaintext) && is_idle(&trap.outbound));
    assert_eq!(sniffer.packets(), 0, "the app's answers stay in the pod");
}

/// The trap behind `SO_BINDTODEVICE`: a connection to an own address reports the interface that has the
/// address, so that ztunnel's own connection looks like one that arrives. The listener's mark keeps this
/// from being a loop: the answer does not come back over lo, and the connection fails.
#[test]
fn without_being_bound_to_lo_an_upstream_connection_meets_ztunnel_instead_of_the_app() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    let trap = pod.enrol(&mut redirector);
    let unbound = |client: IpAddr, own: IpAddr| {
        pod.ztunnel(|| {
            let socket = upstream_socket(client, &PortRotor::default()).expect("bound");
            socket.bind_device(None).expect("set");
            connect_from(socket, SocketAddr::new(own, 8080))
        })
    };
    for (client, own) in clients().into_iter().zip(pod.addresses()) {
        assert!(unbound(client, own).is_err());
    }
    // A listener without a mark takes that of the connection, and there the loop is.
    socket2::SockRef::from(&trap.plaintext)
        .set_mark(0)
        .expect("set");
    for (client, own) in clients().into_iter().zip(pod.addresses()) {
        let _up = unbound(client, own).expect("ztunnel answers itself");
        assert_eq!(accept(&trap.plaintext).local, SocketAddr::new(own, 8080));
    }
    assert!(is_idle(&server));
}

#[test]
fn a_port_that_nobody_listens_on_is_refused_at_once_and_nothing_leaves_the_pod() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    let mut sniffer = Sniffer::new(&lab);
    for (client, own) in clients().into_iter().zip(pod.addresses()) {
        let refused = upstream(&pod, client, SocketAddr::new(own, 8080));
        assert_eq!(errno(refused), Some(libc::ECONNREFUSED));
    }
    assert_eq!(sniffer.packets(), 0);
}

#[test]
fn the_settings_are_off_in_a_new_namespace_and_on_in_an_enrolled_one() {
    let lab = Lab::new();
    let pod = lab.pod();
    let settings = [
        "ipv4/tcp_fwmark_accept",
        "ipv4/fwmark_reflect",
        "ipv6/fwmark_reflect",
        "ipv4/tcp_migrate_req",
    ];
    assert_eq!(settings.map(|name| pod.netns.sysctl(name)), ["0"; 4]);
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    assert_eq!(settings.map(|name| pod.netns.sysctl(name)), ["1"; 4]);
    redirector.withdraw(&pod.uid).expect("withdrawn");
    assert_eq!(settings.map(|name| pod.netns.sysctl(name)), ["0"; 4]);
}

/// `tcp_fwmark_accept` gives the connection's mark only to what a listener without one accepts.
#[test]
fn an_app_that_marks_its_own_listener_cannot_be_reached_in_a_clients_name() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    let server = pod.serve(pod.v4, 8080);
    socket2::SockRef::from(&server).set_mark(7).expect("set");
    let failed = upstream(&pod, clients()[0], SocketAddr::new(pod.v4.into(), 8080));
    assert!(failed.is_err());
    // In the pod's own name it is reached: over lo, with the connection's own mark on neither side needed.
    let own = outbound_from_pod(&pod, SocketAddr::new(pod.v4.into(), 8080));
    assert!(own.is_ok());
}

fn outbound_from_pod(pod: &Pod, to: SocketAddr) -> std::io::Result<TcpStream> {
    pod.ztunnel(|| connect_from(outbound_socket(socket2::Domain::for_address(to))?, to))
}

#[test]
fn what_arrives_at_any_other_address_of_the_pod_is_captured_too() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    pod.netns.ip("addr add 10.7.200.1/16 dev eth0");
    let trap = pod.enrol(&mut redirector);
    // Known, and one that nobody told us of since.
    pod.netns.ip("addr add 10.7.200.2/16 dev eth0");
    for address in ["10.7.200.1:8080", "10.7.200.2:8080"] {
        let address: SocketAddr = address.parse().expect("an address");
        let _client = lab.out(|| connect(address).expect("captured"));
        assert_eq!(accept(&trap.plaintext).local, address);
    }
    assert!(is_idle(&server));
}

#[test]
fn what_arrives_at_a_link_local_address_is_captured_too() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    pod.netns.ip("addr add fe80::77/64 dev eth0 nodad");
    let trap = pod.enrol(&mut redirector);
    let shown = lab.outside().show("-o link show br0");
    let scope: u32 = shown
        .split(':')
        .next()
        .and_then(|index| index.parse().ok())
        .expect("an index");
    let address =
        std::net::SocketAddrV6::new("fe80::77".parse().expect("an address"), 8080, 0, scope);
    let _client = lab.out(|| connect(address).expect("captured"));
    let accepted = accept(&trap.plaintext);
    assert_eq!(accepted.local.ip(), IpAddr::V6(*address.ip()));
    assert!(is_idle(&server));
}

#[test]
fn outbound_only_leaves_plaintext_to_the_app_and_still_takes_hbone() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let server = pod.serve(Ipv6Addr::UNSPECIFIED, 8080);
    let trap = pod.listeners();
    redirector
        .enrol(PodRedirection {
            uid: &pod.uid,
            netns: pod.netns.fd.as_fd(),
            addresses: &pod.addresses(),
            outbound_only: true,
            listeners: trap.all(),
        })
        .expect("enrolled");
    for own in pod.addresses() {
        let mut client = lab.out(|| connect((own, 8080)).expect("connected"));
        converse(&mut client, &mut accept(&server).stream);
        let _client = lab.out(|| connect((own, 15008)).expect("connected"));
        assert_eq!(accept(&trap.hbone).local.port(), 15008);
    }
    let _app = pod.app(|| connect(([192, 0, 2, 10], 80)).expect("captured"));
    assert_eq!(accept(&trap.outbound).local.port(), 80);
}

/// A service that resolves to the caller itself: ztunnel goes to its own pod's HBONE port.
#[test]
fn ztunnel_reaches_the_hbone_port_of_its_own_pod() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    for own in pod.addresses() {
        let mut connection =
            outbound_from_pod(&pod, SocketAddr::new(own, 15008)).expect("connected");
        converse(&mut connection, &mut accept(&trap.hbone).stream);
    }
}

#[test]
fn the_apps_half_of_a_spoofed_connection_has_ztunnels_mark() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let server = pod.serve(pod.v4, 8080);
    let _trap = pod.enrol(&mut redirector);
    let _up =
        upstream(&pod, clients()[0], SocketAddr::new(pod.v4.into(), 8080)).expect("connected");
    let accepted = accept(&server);
    assert_eq!(
        socket2::SockRef::from(&accepted.stream)
            .mark()
            .expect("a mark"),
        MARK_UP
    );
}

#[test]
fn two_pods_of_a_node_with_the_same_tuple_in_both_namespaces_are_told_apart() {
    let lab = Lab::new();
    let (a, b) = (lab.pod(), lab.pod());
    let mut redirector = lab.redirector();
    let server = b.serve(b.v4, 8080);
    let (trap_a, trap_b) = (a.enrol(&mut redirector), b.enrol(&mut redirector));
    let destination = SocketAddr::new(b.v4.into(), 8080);
    // A -> B, looped in A.
    let app = a.app(|| connect(destination).expect("captured"));
    let at_a = accept(&trap_a.outbound);
    assert_eq!(
        (at_a.peer.ip(), at_a.local),
        (IpAddr::V4(a.v4), destination)
    );
    // A -> B, ztunnel's in B: reaches the app.
    let mut up = upstream(&b, a.v4.into(), destination).expect("the app is reached");
    converse(&mut up, &mut accept(&server).stream);
    assert!(is_idle(&trap_b.plaintext) && is_idle(&trap_b.outbound));
    drop(app);
}
