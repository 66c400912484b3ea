//! Ports: those of accepted connections, which apps may want to bind, and those of ztunnel's connections
//! to apps, which must not meet the client's own.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use adit_ebpf::socket::{PortRotor, outbound_socket, retry_with_next_port, upstream_socket};
use common::*;
use socket2::{Domain, Socket, Type};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 1);

/// istio#52260: an accepted connection sits under the port of its destination, and ztunnel's own ones under
/// ports of the pod's address. `strict` is a server that does not set SO_REUSEADDR: the hook of bind() does.
#[test]
fn an_app_may_bind_every_port_of_ztunnels_connections() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let server = pod.serve(pod.v4, 8081);
    // Outbound to somebody's 8080 over either family, and plaintext that arrives for 9090.
    let _app = pod.app(|| connect(([192, 0, 2, 10], 8080)).expect("captured"));
    let outbound = accept(&trap.outbound);
    let beyond: SocketAddr = "[2001:db8::10]:8090".parse().expect("an address");
    let _app6 = pod.app(|| connect(beyond).expect("captured"));
    let outbound6 = accept(&trap.outbound);
    let _client = lab.out(|| connect((pod.v4, 9090)).expect("captured"));
    let plaintext = accept(&trap.plaintext);
    // ztunnel to another node, and to the app with the client's address.
    let elsewhere = lab.out(|| bind((CLIENT, 15008).into()).expect("bound"));
    let own = pod.ztunnel(|| {
        let socket = outbound_socket(Domain::IPV4).expect("a socket");
        socket.set_nonblocking(false).expect("blocking");
        connect_from(socket, (CLIENT, 15008).into()).expect("connected")
    });
    let _there = accept(&elsewhere);
    let up = pod.ztunnel(|| {
        let socket = upstream_socket(CLIENT.into(), &PortRotor::default()).expect("bound");
        connect_from(socket, (pod.v4, 8081).into()).expect("connected")
    });
    let _accepted = accept(&server);
    let port = |stream: &std::net::TcpStream| stream.local_addr().expect("connected").port();

    let v4 = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    let v6 = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    for (what, ip, port) in [
        ("outbound", v4, outbound.local.port()),
        ("outbound, a dual-stack server", v6, outbound.local.port()),
        ("outbound over IPv6", v6, outbound6.local.port()),
        ("plaintext", v4, plaintext.local.port()),
        ("to another node", v4, port(&own)),
        ("to the app", v4, port(&up)),
    ] {
        let address = SocketAddr::new(ip, port);
        // The problem is real: the hook leaves a pod alone that has been released.
        redirector.release(&pod.uid).expect("released");
        let helpless = pod.app(|| bind_as(address, false));
        assert_eq!(errno(helpless), Some(libc::EADDRINUSE), "{what}, {address}");
        pod.enrol_with(&mut redirector, &trap).expect("enrolled");
        let strict = pod
            .app(|| bind_as(address, false))
            .unwrap_or_else(|error| panic!("{what}, {address}: {error}"));
        // Two listeners exclude each other as ever.
        let second = pod.app(|| bind_as(address, false));
        assert_eq!(errno(second), Some(libc::EADDRINUSE), "{what}, {address}");
        close(strict);
        pod.app(|| bind(address))
            .unwrap_or_else(|error| panic!("{what}, {address}: {error}"));
    }
}

/// A port that the kernel chooses must be the socket's alone, else its connect or listen may fail.
#[test]
fn sockets_without_a_port_of_their_own_choice_are_left_as_they_are() {
    let lab = Lab::new();
    let pod = lab.pod();
    let other = lab.pod();
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    let shares = |pod: &Pod, kind: Type, port: u16| {
        pod.app(|| {
            let socket = Socket::new(Domain::IPV4, kind, None).expect("a socket");
            let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            socket.bind(&address.into()).expect("bound");
            socket.reuse_address().expect("the option")
        })
    };
    assert!(shares(&pod, Type::STREAM, 7000));
    assert!(!shares(&pod, Type::STREAM, 0));
    // UDP servers would steal each other's datagrams.
    assert!(!shares(&pod, Type::DGRAM, 7000));
    // Not enrolled.
    assert!(!shares(&other, Type::STREAM, 7000));
}

#[test]
fn an_app_may_bind_its_port_again_while_ztunnel_is_connected_to_it() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    let to = SocketAddr::new(pod.v4.into(), 8080);
    let server = pod.serve(pod.v4, 8080);
    let _up = pod.ztunnel(|| {
        connect_from(
            upstream_socket(CLIENT.into(), &PortRotor::default()).expect("bound"),
            to,
        )
        .expect("connected")
    });
    let _accepted = accept(&server);
    close(server);
    pod.app(|| bind(to)).expect("the app restarts");
}

#[test]
fn an_app_may_listen_on_ztunnels_port_numbers() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    // On ztunnel's own addresses they are taken; connections to them are captured like any.
    let _client = lab.out(|| connect((pod.v4, 15001)).expect("captured"));
    assert_eq!(accept(&trap.plaintext).local.port(), 15001);
    let _client = lab.out(|| connect((pod.v4, 15006)).expect("captured"));
    assert_eq!(accept(&trap.plaintext).local.port(), 15006);
}

/// ztunnel's connection in the name of a client must not have the port of the client's own connection,
/// which ends in ztunnel: its SYN would meet that.
#[test]
fn the_port_of_a_clients_own_connection_is_not_used_towards_the_app() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let server = pod.serve(pod.v4, 8080);
    let to = SocketAddr::new(pod.v4.into(), 8080);
    let mut client = lab.out(|| {
        let socket = tcp(CLIENT.into());
        socket
            .bind(&SocketAddr::from((CLIENT, 61000)).into())
            .expect("bound");
        connect_from(socket, to).expect("captured")
    });
    let accepted = accept(&trap.plaintext);
    assert_eq!(accepted.peer.port(), 61000);

    let ports = PortRotor::default();
    let hold = ports.hold(accepted.peer);
    let mut up = pod.ztunnel(|| {
        connect_from(upstream_socket(CLIENT.into(), &ports).expect("bound"), to).expect("connected")
    });
    let mut at_app = accept(&server);
    assert_eq!(at_app.peer, SocketAddr::from((CLIENT, 61001)));
    converse(&mut up, &mut at_app.stream);
    drop(hold);

    // What the hold is for.
    let collision = pod.ztunnel(|| {
        let ports = PortRotor::default();
        connect_from(upstream_socket(CLIENT.into(), &ports).expect("bound"), to)
    });
    assert!(collision.is_err());
    assert!(is_idle(&server));
    let _ = client.write_all(b"x");
    let _ = accepted.stream.set_nonblocking(true);
}

#[test]
fn ports_are_taken_in_turn_and_taken_ones_are_passed_over() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    for (client, own) in ["10.7.0.1", "fd07::1"].into_iter().zip(pod.addresses()) {
        let client: IpAddr = client.parse().expect("an address");
        let ports = PortRotor::default();
        pod.ztunnel(|| {
            // Somebody listens there, so that it cannot be bound.
            let blocked = SocketAddr::new(own, 61001);
            let socket = tcp(own);
            socket
                .bind(&SocketAddr::new(own, 61001).into())
                .expect("bound");
            socket.listen(1).expect("listening");
            let first = upstream_socket(client, &ports).expect("bound");
            // The same port of another address does not matter.
            let second = upstream_socket(client, &ports).expect("bound");
            let third = upstream_socket(own, &PortRotor::starting_at(1)).expect("bound");
            let port = |socket: &socket2::Socket| {
                socket
                    .local_addr()
                    .expect("bound")
                    .as_socket()
                    .expect("an address")
                    .port()
            };
            assert_eq!((port(&first), port(&second)), (61000, 61001));
            assert_eq!(port(&third), 61002, "{blocked} is taken");
        });
    }
}

/// More connections than there are source ports, each closed at once, by either side: their rest in
/// `TIME_WAIT` must not use the ports up. (The best existing node proxy collapses here.)
#[test]
fn short_connections_do_not_use_the_ports_up() {
    const COUNT: usize = 18_000;
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let _trap = pod.enrol(&mut redirector);
    let mut sniffer = Sniffer::new(&lab);
    for ztunnel_closes_first in [true, false] {
        let server = pod.serve(pod.v4, 8080);
        let ports = PortRotor::default();
        let to = SocketAddr::new(pod.v4.into(), 8080);
        let (retries, slowest) = std::thread::scope(|scope| {
            scope.spawn(|| serve_and_close(&server, COUNT, !ztunnel_closes_first));
            pod.ztunnel(|| short_connections(COUNT, to, &ports, ztunnel_closes_first))
        });
        eprintln!(
            "ztunnel closes first: {ztunnel_closes_first}, {retries} ports passed over, slowest {slowest:?}"
        );
        assert!(
            retries < COUNT / 100,
            "{retries} ports had to be passed over"
        );
        assert!(slowest < Duration::from_secs(1), "a SYN had to be repeated");
        assert_eq!(
            sniffer.packets(),
            0,
            "a late answer of the kernel left the pod"
        );
    }
}

/// Each connection is one byte, after which one side closes and the other follows.
fn serve_and_close(server: &TcpListener, count: usize, close_first: bool) {
    for _ in 0..count {
        let mut stream = accept(server).stream;
        stream.write_all(b"x").expect("sent");
        if !close_first {
            let _ = stream.read(&mut [0; 1]);
        }
    }
}

fn short_connections(
    count: usize,
    to: SocketAddr,
    ports: &PortRotor,
    close_first: bool,
) -> (usize, Duration) {
    let (mut retries, mut slowest) = (0, Duration::ZERO);
    for _ in 0..count {
        let start = Instant::now();
        let mut stream = loop {
            let socket = upstream_socket(CLIENT.into(), ports).expect("a port is free");
            match connect_from(socket, to) {
                Ok(stream) => break stream,
                Err(error) if retry_with_next_port(&error) => retries += 1,
                Err(error) => panic!("{error}"),
            }
        };
        stream.read_exact(&mut [0; 1]).expect("the byte");
        if !close_first {
            let _ = stream.read(&mut [0; 1]);
        }
        slowest = slowest.max(start.elapsed());
    }
    (retries, slowest)
}
