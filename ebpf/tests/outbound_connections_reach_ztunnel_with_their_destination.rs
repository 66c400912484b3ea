//! What an app connects to arrives at ztunnel's outbound listener, whose accepted socket names the
//! destination; the app notices nothing.

mod common;

use std::net::SocketAddr;

use common::*;

const FOREIGN4: &str = "192.0.2.10:80";
const FOREIGN6: &str = "[2001:db8::10]:80";

fn foreign4() -> SocketAddr {
    FOREIGN4.parse().expect("an address")
}

fn foreign6() -> SocketAddr {
    FOREIGN6.parse().expect("an address")
}

#[test]
fn an_ipv4_connection_keeps_all_its_addresses() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let mut app = pod.app(|| connect(foreign4()).expect("captured"));
    let mut accepted = accept(&trap.outbound);
    assert_eq!(accepted.local, foreign4());
    assert_eq!(accepted.peer, app.local_addr().expect("bound"));
    assert_eq!(accepted.peer.ip(), pod.v4);
    assert_eq!(app.peer_addr().expect("connected"), foreign4());
    converse(&mut app, &mut accepted.stream);
}

#[test]
fn an_ipv6_connection_keeps_all_its_addresses() {
    let lab = Lab::new();
    let pod = lab.pod();
    let mut redirector = lab.redirector();
    let trap = pod.enrol(&mut redirector);
    let mut app = pod.app(|| connect(foreign6()).expect("captured"));
    let mut accepted = accept(&trap.outbound);
    assert_eq!(accepted.local, foreign6());
    // The route's preferred source, not ::1 nor the destination.
    assert_eq!(accepted.peer.ip(), pod.v6);
    assert_eq!(app.peer_addr().expect("connected"), foreign6());
    converse(&mut app, &mut accepted.stream);
}
