//! The outbound decision, in Istio's order, one line per case.

use std::net::SocketAddr;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::wire::*;
use crate::model::route::{Outbound, Via, outbound};
use crate::model::{Snapshot, Store, WorkloadUid};
use crate::proto::workload as proto;

fn plain(workload: proto::Workload) -> proto::Workload {
    proto::Workload {
        tunnel_protocol: 0,
        ..workload
    }
}

fn uid(namespace: &str, name: &str) -> WorkloadUid {
    format!("Kubernetes//Pod/{namespace}/{name}").into()
}

/// The decision as one line: way, gateway, authority, peer, destination, service.
fn decide(snapshot: &Snapshot, client: &str, dialled: &str, exclude: &[WorkloadUid]) -> String {
    let client = snapshot.pod("Kubernetes", "c", client).expect("the client");
    let dialled: SocketAddr = dialled.parse().expect("an address");
    let decision = outbound(
        snapshot,
        client,
        dialled,
        exclude,
        &mut StdRng::seed_from_u64(1),
    );
    let service = |s: &Option<std::sync::Arc<crate::model::Service>>| {
        s.as_ref().map_or("-".to_owned(), |s| s.key.to_string())
    };
    match decision {
        Outbound::Hbone(h) => {
            let via = match h.via {
                Via::Direct => "direct",
                Via::ServiceWaypoint => "service waypoint",
                Via::WorkloadWaypoint => "workload waypoint",
            };
            let destination = h.destination.as_ref().map_or("-", |w| &w.name);
            format!(
                "{via} {} {} {} {destination} {}",
                h.gateway,
                h.authority,
                h.peer.name,
                service(&h.service)
            )
        }
        Outbound::Plain(p) => {
            format!(
                "plain {} {} {}",
                p.address,
                p.destination.name,
                service(&p.service)
            )
        }
        Outbound::Passthrough { service: s } => format!("passthrough {}", service(&s)),
        Outbound::Unavailable { reason, service: s } => format!("{reason}: {}", service(&s)),
        Outbound::Unsupported { reason, service: s } => format!("{reason}: {}", service(&s)),
    }
}

fn mesh() -> Store {
    let far = |w: proto::Workload| proto::Workload {
        network: "far".into(),
        network_gateway: gateway_ip("far", "172.16.0.1"),
        ..w
    };
    let with_waypoint = |waypoint, w: proto::Workload| proto::Workload { waypoint, ..w };
    let behind = |waypoint, s: proto::Service| proto::Service { waypoint, ..s };
    let unhealthy = |w: proto::Workload| proto::Workload { status: 1, ..w };
    let passthrough = proto::LoadBalancing {
        mode: 3,
        ..Default::default()
    };
    let waypoint = || gateway_host("s/waypoint.s");
    let endpoint = |name, address: &[&str], service| member(pod("s", name, address), service, &[]);
    let workloads = [
        pod("c", "client", &["10.1.0.1"]),
        pod("c", "waypoint-client", &["10.1.0.2"]),
        endpoint("web", &["10.2.0.1"], "s/web.s"),
        plain(endpoint("old", &["10.2.0.2"], "s/old.s")),
        member(
            pod("s", "mapped", &["10.2.0.3"]),
            "s/mapped.s",
            &[(80, 9999)],
        ),
        unhealthy(endpoint("sick", &["10.2.0.4"], "s/sick.s")),
        unhealthy(endpoint("starting", &["10.2.0.5"], "s/eager.s")),
        endpoint("dual", &["10.2.0.6", "fd00::6"], "s/dual.s"),
        endpoint("dual4", &["10.2.0.16", "fd00::16"], "s/four.s"),
        endpoint("dual6", &["10.2.0.17", "fd00::17"], "s/six.s"),
        far(endpoint("abroad", &["10.2.0.7"], "s/abroad.s")),
        member(
            proto::Workload {
                hostname: "db.example".into(),
                ..pod("s", "dns", &[])
            },
            "s/dns.s",
            &[],
        ),
        proto::Workload {
            capacity: Some(0),
            ..endpoint("drained", &["10.2.0.8"], "s/drained.s")
        },
        endpoint("waypoint", &["10.2.0.9"], "s/waypoint.s"),
        member(pod("c", "self-waypoint", &["10.1.0.9"]), "s/own.s", &[]),
        with_waypoint(waypoint(), pod("s", "guarded", &["10.2.0.10"])),
        with_waypoint(
            gateway_host("s/own.s"),
            pod("s", "guarded-own", &["10.2.0.11"]),
        ),
        with_waypoint(
            gateway_ip("", "10.1.0.2"),
            pod("s", "guarded-ip", &["10.2.0.12"]),
        ),
        with_waypoint(
            gateway_host("s/gone.s"),
            pod("s", "guarded-gone", &["10.2.0.13"]),
        ),
        with_waypoint(
            gateway_ip("far", "10.2.0.7"),
            pod("s", "guarded-far", &["10.2.0.14"]),
        ),
        pod("s", "in-block", &["10.50.0.1"]),
        with_waypoint(
            gateway_ip("", "10.9.0.9"),
            pod("s", "guarded-vip", &["10.2.0.15"]),
        ),
        member(
            plain(pod("s", "external", &["192.0.2.1"])),
            "s/block.s",
            &[],
        ),
        proto::Workload {
            application_tunnel: Some(proto::ApplicationTunnel {
                protocol: 1,
                port: 15088,
            }),
            ..endpoint("tunnelled", &["10.2.0.18"], "s/tunnelled.s")
        },
    ];
    let named = |s: proto::Service| proto::Service {
        ports: ports(&[(80, 0)]),
        ..s
    };
    let families = |ip_families, s: proto::Service| proto::Service { ip_families, ..s };
    let services = [
        service("s", "web.s", &["10.9.0.1", "fd09::1"]),
        service("s", "old.s", &["10.9.0.2"]),
        named(service("s", "mapped.s", &["10.9.0.3"])),
        service("s", "sick.s", &["10.9.0.4"]),
        proto::Service {
            load_balancing: Some(proto::LoadBalancing {
                health_policy: 1,
                ..Default::default()
            }),
            ..service("s", "eager.s", &["10.9.0.5"])
        },
        service("s", "dual.s", &["10.9.0.6", "fd09::6"]),
        families(1, service("s", "four.s", &["10.9.0.16", "fd09::16"])),
        families(2, service("s", "six.s", &["10.9.0.17", "fd09::17"])),
        service("s", "abroad.s", &["10.9.0.7"]),
        service("s", "dns.s", &["10.9.0.8"]),
        service("s", "waypoint.s", &["10.9.0.9"]),
        service("s", "drained.s", &["10.9.0.10"]),
        behind(waypoint(), service("s", "behind.s", &["10.9.0.11"])),
        behind(
            gateway_host("s/gone.s"),
            service("s", "behind-gone.s", &["10.9.0.12"]),
        ),
        behind(
            gateway_host("s/sick.s"),
            service("s", "behind-sick.s", &["10.9.0.13"]),
        ),
        behind(
            gateway_host("s/abroad.s"),
            service("s", "behind-far.s", &["10.9.0.14"]),
        ),
        proto::Service {
            load_balancing: Some(passthrough),
            ..service("s", "pass.s", &["10.9.0.15"])
        },
        service("s", "own.s", &[]),
        service("s", "block.s", &["10.50.0.0/16"]),
        named(service("s", "tunnelled.s", &["10.9.0.18"])),
        proto::Service {
            visibility: 1,
            ..service("s", "private.s", &["10.9.0.19"])
        },
    ];
    store(workloads, services)
}

#[test]
fn decisions() {
    let store = mesh();
    for (client, dialled, expected) in [
        // A service without waypoint: an endpoint, by its target port.
        (
            "client",
            "10.9.0.1:80",
            "direct 10.2.0.1:15008 10.2.0.1:8080 web web s/web.s",
        ),
        (
            "client",
            "[::ffff:10.9.0.1]:80",
            "direct 10.2.0.1:15008 10.2.0.1:8080 web web s/web.s",
        ),
        (
            "client",
            "[fd09::1]:80",
            "direct 10.2.0.1:15008 10.2.0.1:8080 web web s/web.s",
        ),
        ("client", "10.9.0.2:80", "plain 10.2.0.2:8080 old s/old.s"),
        (
            "client",
            "10.9.0.3:80",
            "direct 10.2.0.3:15008 10.2.0.3:9999 mapped mapped s/mapped.s",
        ),
        ("client", "10.9.0.1:81", "no healthy upstream: s/web.s"),
        ("client", "10.9.0.4:80", "no healthy upstream: s/sick.s"),
        ("client", "10.9.0.10:80", "no healthy upstream: s/drained.s"),
        (
            "client",
            "10.9.0.5:80",
            "direct 10.2.0.5:15008 10.2.0.5:8080 starting starting s/eager.s",
        ),
        (
            "client",
            "10.9.0.18:80",
            "direct 10.2.0.18:15008 10.2.0.18:80 tunnelled tunnelled s/tunnelled.s",
        ),
        // The family that was dialled, of those that the service has.
        (
            "client",
            "10.9.0.6:80",
            "direct 10.2.0.6:15008 10.2.0.6:8080 dual dual s/dual.s",
        ),
        (
            "client",
            "[fd09::6]:80",
            "direct [fd00::6]:15008 [fd00::6]:8080 dual dual s/dual.s",
        ),
        (
            "client",
            "[fd09::16]:80",
            "direct 10.2.0.16:15008 10.2.0.16:8080 dual4 dual4 s/four.s",
        ),
        (
            "client",
            "10.9.0.17:80",
            "direct [fd00::17]:15008 [fd00::17]:8080 dual6 dual6 s/six.s",
        ),
        // Not silently in plaintext.
        (
            "client",
            "10.9.0.7:80",
            "the destination is on another network: s/abroad.s",
        ),
        (
            "client",
            "10.9.0.8:80",
            "the destination has a host name and no address: s/dns.s",
        ),
        // A service with waypoint: the authority is what was dialled.
        (
            "client",
            "10.9.0.11:80",
            "service waypoint 10.2.0.9:15008 10.9.0.11:80 waypoint - s/behind.s",
        ),
        // Even for a port that it does not have: the waypoint says so.
        (
            "client",
            "10.9.0.11:81",
            "service waypoint 10.2.0.9:15008 10.9.0.11:81 waypoint - s/behind.s",
        ),
        (
            "client",
            "10.9.0.12:80",
            "no healthy waypoint: s/behind-gone.s",
        ),
        (
            "client",
            "10.9.0.13:80",
            "no healthy waypoint: s/behind-sick.s",
        ),
        (
            "client",
            "10.9.0.14:80",
            "the waypoint is on another network: s/behind-far.s",
        ),
        ("client", "10.9.0.15:80", "passthrough s/pass.s"),
        // A workload's own address.
        (
            "client",
            "10.2.0.1:1234",
            "direct 10.2.0.1:15008 10.2.0.1:1234 web web -",
        ),
        (
            "client",
            "[fd00::6]:80",
            "direct [fd00::6]:15008 [fd00::6]:80 dual dual -",
        ),
        ("client", "10.2.0.2:1234", "plain 10.2.0.2:1234 old -"),
        (
            "client",
            "10.2.0.4:80",
            "direct 10.2.0.4:15008 10.2.0.4:80 sick sick -",
        ),
        (
            "client",
            "10.1.0.1:80",
            "direct 10.1.0.1:15008 10.1.0.1:80 client client -",
        ),
        (
            "client",
            "10.2.0.10:80",
            "workload waypoint 10.2.0.9:15008 10.2.0.10:80 waypoint guarded -",
        ),
        (
            "client",
            "10.2.0.12:80",
            "workload waypoint 10.1.0.2:15008 10.2.0.12:80 waypoint-client guarded-ip -",
        ),
        (
            "client",
            "10.2.0.15:80",
            "workload waypoint 10.2.0.9:15008 10.2.0.15:80 waypoint guarded-vip -",
        ),
        ("client", "10.2.0.13:80", "no healthy waypoint: -"),
        (
            "client",
            "10.2.0.14:80",
            "the waypoint is on another network: -",
        ),
        // The waypoint itself goes straight on.
        (
            "self-waypoint",
            "10.2.0.11:80",
            "direct 10.2.0.11:15008 10.2.0.11:80 guarded-own guarded-own -",
        ),
        (
            "waypoint-client",
            "10.2.0.12:80",
            "direct 10.2.0.12:15008 10.2.0.12:80 guarded-ip guarded-ip -",
        ),
        (
            "client",
            "10.2.0.11:80",
            "workload waypoint 10.1.0.9:15008 10.2.0.11:80 self-waypoint guarded-own -",
        ),
        // A workload stands before a block that its address is in.
        (
            "client",
            "10.50.0.1:80",
            "direct 10.50.0.1:15008 10.50.0.1:80 in-block in-block -",
        ),
        (
            "client",
            "10.50.0.2:80",
            "plain 192.0.2.1:8080 external s/block.s",
        ),
        // Unknown, and what the client may not see.
        ("client", "192.0.2.77:443", "passthrough -"),
        ("client", "10.9.0.19:80", "passthrough -"),
        ("client", "10.2.0.7:80", "passthrough -"),
    ] {
        let decision = decide(store.snapshot(), client, dialled, &[]);
        assert_eq!(decision, expected, "{client} to {dialled}");
    }
}

/// Where a service and a workload claim one address, the service is meant, so that its
/// waypoint cannot be gone around.
#[test]
fn a_virtual_address_stands_before_a_workloads() {
    let mut store = mesh();
    let waypoint = gateway_host("s/waypoint.s");
    let claims = proto::Service {
        waypoint,
        ..service("s", "claims.s", &["10.2.0.1"])
    };
    store.apply([service_update(claims)]);
    assert_eq!(
        decide(store.snapshot(), "client", "10.2.0.1:80", &[]),
        "service waypoint 10.2.0.9:15008 10.2.0.1:80 waypoint - s/claims.s"
    );
}

#[test]
fn what_was_tried_is_not_tried_again() {
    let store = mesh();
    for (dialled, tried, expected) in [
        (
            "10.9.0.1:80",
            uid("s", "web"),
            "no healthy upstream: s/web.s",
        ),
        (
            "10.9.0.2:80",
            uid("s", "old"),
            "no healthy upstream: s/old.s",
        ),
        (
            "10.9.0.11:80",
            uid("s", "waypoint"),
            "no healthy waypoint: s/behind.s",
        ),
        (
            "10.2.0.1:80",
            uid("s", "web"),
            "no other upstream to try: -",
        ),
        (
            "10.2.0.12:80",
            uid("c", "waypoint-client"),
            "no healthy waypoint: -",
        ),
    ] {
        let decision = decide(store.snapshot(), "client", dialled, &[tried]);
        assert_eq!(decision, expected, "{dialled}");
    }
}

#[test]
fn a_service_may_be_answered_by_its_further_identities() {
    let subject_alt_names = vec!["spiffe://far.td/ns/x/sa/y".into(), "web.example".into()];
    let named = proto::Service {
        subject_alt_names,
        ..service("s", "named.s", &["10.9.0.1"])
    };
    let web = member(pod("s", "web", &["10.2.0.1"]), "s/named.s", &[]);
    let store = store([pod("c", "client", &["10.1.0.1"]), web], [named]);
    let client = store
        .snapshot()
        .pod("Kubernetes", "c", "client")
        .expect("the client");
    let identities = |dialled: &str| -> Vec<String> {
        let dialled = dialled.parse().expect("an address");
        let mut rng = StdRng::seed_from_u64(1);
        let Outbound::Hbone(hbone) = outbound(store.snapshot(), client, dialled, &[], &mut rng)
        else {
            panic!("no tunnel");
        };
        hbone.identities.iter().map(ToString::to_string).collect()
    };
    let own = "spiffe://cluster.local/ns/s/sa/web";
    assert_eq!(
        identities("10.9.0.1:80"),
        [own, "spiffe://far.td/ns/x/sa/y"]
    );
    assert_eq!(identities("10.2.0.1:80"), [own]);
}

#[test]
fn weighted_waypoints_are_drawn_by_weight() {
    let waypoint = |name: &str, weight| proto::WeightedWaypoint {
        destination: gateway_host(&format!("s/{name}.s")),
        weight,
    };
    let canary = proto::Service {
        waypoint: gateway_host("s/one.s"),
        weighted_waypoints: vec![
            waypoint("one", 90),
            waypoint("two", 10),
            waypoint("three", 0),
        ],
        ..service("s", "web.s", &["10.9.0.1"])
    };
    let none = proto::Service {
        waypoint: gateway_host("s/one.s"),
        weighted_waypoints: vec![waypoint("two", 0)],
        ..service("s", "none.s", &["10.9.0.2"])
    };
    let instance = |name, ip| member(pod("s", name, &[ip]), &format!("s/{name}.s"), &[]);
    let workloads = [
        pod("c", "client", &["10.1.0.1"]),
        instance("one", "10.2.0.1"),
        instance("two", "10.2.0.2"),
        instance("three", "10.2.0.3"),
    ];
    let waypoints = ["one.s", "two.s", "three.s"].map(|host| service("s", host, &[]));
    let store = store(workloads, waypoints.into_iter().chain([canary, none]));
    let client = store
        .snapshot()
        .pod("Kubernetes", "c", "client")
        .expect("the client");
    let mut rng = StdRng::seed_from_u64(7);
    let mut count = |dialled: &str, name: &str| {
        let dialled = dialled.parse().expect("an address");
        let hits = (0..1000).filter(|_| {
            let decision = outbound(store.snapshot(), client, dialled, &[], &mut rng);
            matches!(decision, Outbound::Hbone(hbone) if *hbone.peer.name == *name)
        });
        hits.count()
    };
    assert!((60..140).contains(&count("10.9.0.1:80", "two")));
    assert_eq!(count("10.9.0.1:80", "three"), 0);
    assert_eq!(count("10.9.0.2:80", "one"), 1000);
}

/// A decision lives as long as its connection's set-up: it must not grow unseen.
const _: () = assert!(size_of::<Outbound>() <= 168);
