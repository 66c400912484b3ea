//! Draws against what a scan of all endpoints says may be drawn.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::wire::*;
use crate::model::route::{Outbound, Unavailable, outbound};
use crate::model::{Snapshot, Store, WorkloadUid};
use crate::proto::workload::{self as proto, load_balancing::Mode};

const VIP: &str = "10.9.0.1:80";

/// How often each endpoint is drawn.
fn draws(
    snapshot: &Snapshot,
    exclude: &[WorkloadUid],
    times: usize,
    seed: u64,
) -> BTreeMap<String, usize> {
    let client = snapshot
        .pod("Kubernetes", "c", "client")
        .expect("the client");
    let vip: SocketAddr = VIP.parse().expect("an address");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut counts = BTreeMap::new();
    for _ in 0..times {
        let name = match outbound(snapshot, client, vip, exclude, &mut rng) {
            Outbound::Hbone(hbone) => hbone.peer.name.to_string(),
            Outbound::Unavailable {
                reason: Unavailable::NoEndpoint,
                ..
            } => "none".into(),
            Outbound::Unsupported { .. } => "unsupported".into(),
            other => panic!("{other:?}"),
        };
        *counts.entry(name).or_default() += 1;
    }
    counts
}

fn endpoint(name: &str, capacity: u32) -> proto::Workload {
    let pod = member(pod("s", name, &["10.2.0.1"]), "s/web.s", &[]);
    proto::Workload {
        capacity: Some(capacity),
        ..pod
    }
}

fn client() -> proto::Workload {
    pod("c", "client", &["10.1.0.1"])
}

fn uid(name: &str) -> WorkloadUid {
    format!("Kubernetes//Pod/s/{name}").into()
}

#[test]
fn shares_follow_capacity() {
    let endpoints = [("a", 1), ("b", 2), ("c", 0), ("d", 7)];
    let workloads = endpoints.map(|(name, capacity)| endpoint(name, capacity));
    let web = service("s", "web.s", &["10.9.0.1"]);
    let store = store(workloads.into_iter().chain([client()]), [web]);
    // Excluded, and the capacity of what is left.
    for (exclude, total) in [
        (vec![], 10),
        (vec!["d"], 3),
        (vec!["a", "b"], 7),
        (vec!["a"], 9),
    ] {
        let uids: Vec<_> = exclude.iter().map(|name| uid(name)).collect();
        let times = 20_000;
        let counts = draws(store.snapshot(), &uids, times, 3);
        for (name, capacity) in endpoints {
            let share = if exclude.contains(&name) {
                0
            } else {
                capacity as usize
            };
            let expected = times * share / total;
            let drawn = counts.get(name).copied().unwrap_or_default();
            // Five standard deviations of a binomial, at the most 355 of 20,000.
            assert!(
                drawn.abs_diff(expected) <= 360,
                "{name}: {drawn} for {expected}, {exclude:?}"
            );
            assert_eq!(drawn == 0, expected == 0, "{name}");
        }
    }
    let all = ["a", "b", "d"].map(uid);
    assert_eq!(
        draws(store.snapshot(), &all, 1, 3),
        [("none".to_owned(), 1)].into()
    );
}

/// A service that has been used follows every change at once.
#[test]
fn tables_follow_changes_after_use() {
    let web = || service("s", "web.s", &["10.9.0.1"]);
    let mut store = store([client(), endpoint("a", 1)], [web()]);
    let drawn = |store: &Store| {
        draws(store.snapshot(), &[], 50, 1)
            .into_keys()
            .collect::<Vec<_>>()
    };
    assert_eq!(drawn(&store), ["a"]);
    store.apply([workload_update(endpoint("b", 1))]);
    assert_eq!(drawn(&store), ["a", "b"]);
    store.apply([workload_update(proto::Workload {
        status: 1,
        ..endpoint("a", 1)
    })]);
    assert_eq!(drawn(&store), ["b"]);
    let all = proto::LoadBalancing {
        health_policy: 1,
        ..Default::default()
    };
    store.apply([service_update(proto::Service {
        load_balancing: Some(all),
        ..web()
    })]);
    assert_eq!(drawn(&store), ["a", "b"]);
    store.apply([service_update(proto::Service {
        ports: ports(&[(81, 1)]),
        ..web()
    })]);
    assert_eq!(drawn(&store), ["none"]);
}

/// `PreferSameNode` falls back step by step; `internalTrafficPolicy: Local` does not.
#[test]
fn near_endpoints_first() {
    use proto::load_balancing::Scope::{Network, Node, Region, Subzone, Zone};
    let at = |name, region: &str, zone: &str, node: &str| proto::Workload {
        locality: Some(proto::Locality {
            region: region.into(),
            zone: zone.into(),
            subzone: String::new(),
        }),
        node: node.into(),
        ..if name == "client" {
            client()
        } else {
            endpoint(name, 1)
        }
    };
    let workloads = [
        at("client", "r1", "z1", "n1"),
        at("node", "r1", "z1", "n1"),
        at("zone", "r1", "z1", "n2"),
        at("region", "r1", "z2", "n3"),
        // Zone and node names do not count where the region differs.
        at("world", "r2", "z1", "n1"),
    ];
    let drawn = |mode: Mode, scopes: &[proto::load_balancing::Scope], exclude: &[&str]| {
        let load_balancing = Some(proto::LoadBalancing {
            routing_preference: scopes.iter().map(|scope| *scope as i32).collect(),
            mode: mode.into(),
            health_policy: 0,
        });
        let web = proto::Service {
            load_balancing,
            ..service("s", "web.s", &["10.9.0.1"])
        };
        let store = store(workloads.clone(), [web]);
        let exclude: Vec<_> = exclude.iter().map(|name| uid(name)).collect();
        let counts = draws(store.snapshot(), &exclude, 100, 5);
        counts.into_keys().collect::<Vec<_>>().join(" ")
    };
    let near = [Network, Region, Zone, Subzone, Node];
    assert_eq!(drawn(Mode::Failover, &near, &[]), "node");
    assert_eq!(drawn(Mode::Failover, &near, &["node"]), "zone");
    assert_eq!(drawn(Mode::Failover, &near, &["node", "zone"]), "region");
    assert_eq!(
        drawn(Mode::Failover, &near, &["node", "zone", "region"]),
        "world"
    );
    assert_eq!(drawn(Mode::Failover, &near[..3], &[]), "node zone");
    assert_eq!(drawn(Mode::Strict, &near, &[]), "node");
    assert_eq!(drawn(Mode::Strict, &near, &["node"]), "none");
    assert_eq!(drawn(Mode::Strict, &[Node], &[]), "node world");
    assert_eq!(drawn(Mode::Strict, &[Zone], &["node", "zone"]), "world");
    assert_eq!(
        drawn(Mode::UnspecifiedMode, &near, &[]),
        "node region world zone"
    );
}

#[derive(Debug, Clone)]
struct Place {
    region: u8,
    zone: u8,
    node: u8,
    network: u8,
    healthy: bool,
    capacity: u32,
    has_port: bool,
}

fn any_place() -> impl Strategy<Value = Place> {
    let flag = || proptest::bool::weighted(0.8);
    (0..2_u8, 0..2_u8, 0..3_u8, 0..8_u8, flag(), 0..3_u32, flag()).prop_map(
        |(region, zone, node, network, healthy, capacity, has_port)| Place {
            region,
            zone,
            node,
            network: network / 7,
            healthy,
            capacity,
            has_port,
        },
    )
}

impl Place {
    fn workload(&self, workload: proto::Workload) -> proto::Workload {
        let target = if self.has_port { 8080 } else { 0 };
        let name = |number: u8| {
            if number == 0 {
                String::new()
            } else {
                number.to_string()
            }
        };
        let workload = proto::Workload {
            locality: Some(proto::Locality {
                region: name(self.region),
                zone: name(self.zone),
                subzone: String::new(),
            }),
            node: name(self.node),
            network: name(self.network),
            status: (!self.healthy).into(),
            capacity: Some(self.capacity),
            ..workload
        };
        member(workload, "s/web.s", &[(80, target)])
    }

    /// Whether both are at the same place by scope number.
    fn same(&self, other: &Self, scope: i32) -> bool {
        match scope {
            1 => self.region == other.region,
            2 => self.zone == other.zone,
            4 => self.node == other.node && self.node != 0,
            6 => self.network == other.network,
            _ => true,
        }
    }
}

/// Names of the endpoints that may be drawn, by a scan of all of them.
fn candidates(
    places: &[Place],
    client: &Place,
    exclude: &[usize],
    scopes: &[i32],
    mode: Mode,
    allow_unhealthy: bool,
) -> Vec<String> {
    let usable = |(i, place): &(usize, &Place)| {
        place.capacity > 0
            && place.has_port
            && (place.healthy || allow_unhealthy)
            && place.network == client.network
            && !exclude.contains(i)
    };
    let rank = |place: &Place| {
        scopes
            .iter()
            .take_while(|s| place.same(client, **s))
            .count()
    };
    let usable: Vec<_> = places.iter().enumerate().filter(usable).collect();
    let wanted = match mode {
        Mode::UnspecifiedMode => 0,
        Mode::Strict => scopes.len(),
        _ => usable
            .iter()
            .map(|(_, place)| rank(place))
            .max()
            .unwrap_or(0),
    };
    let best = usable
        .into_iter()
        .filter(|(_, place)| rank(place) >= wanted);
    let mut names: Vec<_> = best.map(|(i, _)| format!("e{i}")).collect();
    names.sort();
    names
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..Default::default() })]

    #[test]
    fn draws_agree_with_a_scan(
        places in proptest::collection::vec(any_place(), 0..8),
        client_place in any_place(),
        exclude in proptest::collection::vec(0..8_usize, 0..4),
        scopes in proptest::collection::vec(proptest::sample::select(&[1, 2, 3, 4, 5, 6][..]), 0..4),
        mode in proptest::sample::select(&[Mode::UnspecifiedMode, Mode::Strict, Mode::Failover][..]),
        allow_unhealthy in any::<bool>(),
    ) {
        let client_network = ["", "1"][usize::from(client_place.network)];
        let client = proto::Workload { capacity: Some(0), ..client_place.workload(client()) };
        let client = proto::Workload { services: Default::default(), ..client };
        let endpoints = places
            .iter()
            .enumerate()
            .map(|(i, place)| place.workload(pod("s", &format!("e{i}"), &["10.2.0.1"])));
        let web = proto::Service {
            addresses: vec![block(client_network, "10.9.0.1")],
            ports: ports(&[(80, 0)]),
            load_balancing: Some(proto::LoadBalancing {
                routing_preference: scopes.clone(),
                mode: mode.into(),
                health_policy: allow_unhealthy.into(),
            }),
            ..service("s", "web.s", &[])
        };
        let store = store(endpoints.chain([client]), [web]);
        let mut expected =
            candidates(&places, &client_place, &exclude, &scopes, mode, allow_unhealthy);
        if expected.is_empty() {
            expected.push("none".into());
        }
        let uids: Vec<_> = exclude.iter().map(|i| uid(&format!("e{i}"))).collect();
        // Eight endpoints of capacity 1 or 2: 300 draws miss one once in 10^8 cases.
        let counts = draws(store.snapshot(), &uids, 300, 11);
        let drawn: Vec<_> = counts.into_keys().collect();
        prop_assert_eq!(drawn, expected);
    }
}
