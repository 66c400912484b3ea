//! Who is found by an address or a name (ztunnel: workload and service discovery).

use super::wire::*;
use crate::model::{Snapshot, Update};
use crate::proto::workload as proto;

fn service_at(snapshot: &Snapshot, address: &str, namespace: &str) -> String {
    let found = snapshot
        .service_at("", ip(address), namespace)
        .or_else(|| snapshot.service_around("", ip(address), namespace));
    found.map_or("none".into(), |entry| entry.service().key.to_string())
}

#[test]
fn a_shared_address_is_the_pods() {
    let entry = proto::Workload {
        uid: "Kubernetes/networking.istio.io/WorkloadEntry/ns/a".into(),
        ..pod("ns", "a", &["10.0.0.1"])
    };
    let old = proto::Workload {
        status: 1,
        ..pod("ns", "aaa-old", &["10.0.0.1"])
    };
    let new = pod("ns", "bbb-new", &["10.0.0.1"]);
    let mut store = store([entry, old, new], []);
    let holder = |store: &crate::model::Store| {
        let holder = store.snapshot().workload_at("", ip("10.0.0.1"));
        holder.map(|workload| workload.uid.to_string())
    };
    assert_eq!(
        holder(&store).as_deref(),
        Some("Kubernetes//Pod/ns/bbb-new")
    );
    for (gone, left) in [
        (
            "Kubernetes//Pod/ns/bbb-new",
            Some("Kubernetes//Pod/ns/aaa-old"),
        ),
        (
            "Kubernetes//Pod/ns/aaa-old",
            Some("Kubernetes/networking.istio.io/WorkloadEntry/ns/a"),
        ),
        ("Kubernetes/networking.istio.io/WorkloadEntry/ns/a", None),
    ] {
        store.apply([Update::RemoveAddress(gone.into())]);
        assert_eq!(holder(&store).as_deref(), left, "without {gone}");
    }
}

#[test]
fn host_network_pods_have_no_address() {
    let host = proto::Workload {
        network_mode: 1,
        ..pod("ns", "a", &["10.0.0.1"])
    };
    let store = store([host], []);
    assert!(store.snapshot().workload_at("", ip("10.0.0.1")).is_none());
    assert!(store.snapshot().pod("Kubernetes", "ns", "a").is_some());
}

#[test]
fn an_address_belongs_to_its_network() {
    let far = proto::Workload {
        network: "far".into(),
        ..pod("ns", "a", &["10.0.0.1"])
    };
    let store = store([far], []);
    assert!(store.snapshot().workload_at("", ip("10.0.0.1")).is_none());
    assert!(
        store
            .snapshot()
            .workload_at("far", ip("10.0.0.1"))
            .is_some()
    );
    assert!(
        store
            .snapshot()
            .workload_at("far", ip("::ffff:10.0.0.1"))
            .is_some()
    );
}

/// Own namespace, then canonical, then first; private ones are hidden from others.
#[test]
fn a_shared_vip_depends_on_who_asks() {
    let canonical = |s: proto::Service| proto::Service {
        canonical: true,
        ..s
    };
    let private = |s: proto::Service| proto::Service { visibility: 1, ..s };
    let a = service("a", "api.example", &["10.0.0.1"]);
    let b = canonical(service("b", "api.example", &["10.0.0.1"]));
    let c = private(service("c", "api.example", &["10.0.0.1"]));
    for (services, client, expected) in [
        (vec![a.clone(), b.clone(), c.clone()], "a", "a/api.example"),
        (vec![a.clone(), b.clone(), c.clone()], "b", "b/api.example"),
        (vec![a.clone(), b.clone(), c.clone()], "c", "c/api.example"),
        (vec![a.clone(), b.clone(), c.clone()], "d", "b/api.example"),
        (vec![a.clone(), c.clone()], "d", "a/api.example"),
        (vec![c.clone()], "d", "none"),
        (vec![c.clone()], "c", "c/api.example"),
    ] {
        let store = store([], services);
        let snapshot = store.snapshot();
        assert_eq!(service_at(snapshot, "10.0.0.1", client), expected);
        let by_name = snapshot.service_by_hostname("API.example", client);
        let by_name = by_name.map_or("none".into(), |e| e.service().key.to_string());
        assert_eq!(by_name, expected);
    }
}

/// Own namespace, then the longest prefix, then canonical.
#[test]
fn a_block_depends_on_who_asks() {
    let wide = service("a", "wide", &["10.0.0.0/8"]);
    let narrow = service("b", "narrow", &["10.1.0.0/16"]);
    let same = proto::Service {
        canonical: true,
        ..service("c", "same", &["10.1.0.0/16"])
    };
    let exact = service("d", "exact", &["10.1.0.1"]);
    let hidden = proto::Service {
        visibility: 1,
        ..service("e", "hidden", &["10.1.0.0/24"])
    };
    let six = service("f", "six", &["fd00::/8"]);
    let store = store([], [wide, narrow, same, exact, hidden, six]);
    for (address, client, expected) in [
        ("10.9.0.1", "x", "a/wide"),
        ("10.1.0.2", "x", "c/same"),
        ("10.1.0.2", "a", "a/wide"),
        ("10.1.0.2", "b", "b/narrow"),
        ("10.1.0.2", "e", "e/hidden"),
        ("10.1.0.1", "a", "d/exact"),
        ("fd12::1", "x", "f/six"),
        ("11.0.0.1", "x", "none"),
        ("::1", "x", "none"),
    ] {
        let found = service_at(store.snapshot(), address, client);
        assert_eq!(found, expected, "{address} for {client}");
    }
}

/// In Istio's ztunnel a change of endpoints adds the block again and keeps the old
/// entry, whose endpoints then win.
#[test]
fn a_block_has_no_stale_endpoints() {
    let block = service("a", "wide", &["10.0.0.0/8", "10.0.0.0/8"]);
    let endpoint = |name| member(pod("a", name, &["192.168.0.1"]), "a/wide", &[]);
    let mut store = store([endpoint("one")], [block]);
    let endpoints = |store: &crate::model::Store| -> Vec<String> {
        let snapshot = store.snapshot();
        let entry = snapshot
            .service_around("", ip("10.1.1.1"), "x")
            .expect("a service");
        entry
            .endpoints()
            .iter()
            .map(|w| w.name.to_string())
            .collect()
    };
    assert_eq!(endpoints(&store), ["one"]);
    store.apply([workload_update(endpoint("two"))]);
    assert_eq!(endpoints(&store), ["one", "two"]);
    store.apply([Update::RemoveAddress("Kubernetes//Pod/a/one".into())]);
    assert_eq!(endpoints(&store), ["two"]);
    store.apply([Update::RemoveAddress("a/wide".into())]);
    assert!(
        store
            .snapshot()
            .service_around("", ip("10.1.1.1"), "x")
            .is_none()
    );
}

#[test]
fn services_and_workloads_arrive_in_any_order() {
    let endpoint = || workload_update(member(pod("a", "one", &["192.168.0.1"]), "a/s", &[]));
    let service = || service_update(service("a", "s", &["10.0.0.1"]));
    for updates in [vec![endpoint(), service()], vec![service(), endpoint()]] {
        for batches in [1, 2] {
            let mut store = crate::model::Store::new();
            for batch in updates.chunks(updates.len() / batches) {
                store.apply(batch.to_vec());
            }
            let snapshot = store.snapshot();
            let entry = snapshot
                .service_at("", ip("10.0.0.1"), "x")
                .expect("a service");
            assert!(entry.has_endpoint("Kubernetes//Pod/a/one"));
        }
    }
}

#[test]
fn a_snapshot_never_changes() {
    let mut store = store([pod("a", "one", &["10.0.0.1"])], []);
    let before = store.snapshot().clone();
    store.apply([Update::RemoveAddress("Kubernetes//Pod/a/one".into())]);
    assert!(before.workload_at("", ip("10.0.0.1")).is_some());
    assert!(store.snapshot().workload_at("", ip("10.0.0.1")).is_none());
    assert!(store.snapshot().version() > before.version());
}

#[test]
fn what_repeats_is_no_change() {
    let wire = member(pod("a", "one", &["10.0.0.1"]), "a/s", &[(80, 1)]);
    let mut store = store([wire.clone()], [service("a", "s", &["10.0.0.2"])]);
    let version = store.snapshot().version();
    assert!(!store.apply([
        workload_update(wire),
        service_update(service("a", "s", &["10.0.0.2"]))
    ]));
    assert!(!store.apply([Update::RemoveAddress("nobody".into())]));
    assert!(!store.apply([Update::RemovePolicy("no/policy".into())]));
    assert_eq!(store.snapshot().version(), version);
}

#[test]
fn workloads_of_a_node() {
    let on = |node: &str, name| proto::Workload {
        node: node.into(),
        ..pod("a", name, &[])
    };
    let mut store = store(
        [on("n1", "b"), on("n1", "a"), on("n2", "c"), on("", "d")],
        [],
    );
    let names = |store: &crate::model::Store, node| -> Vec<String> {
        let workloads = store.snapshot().workloads_on(node);
        workloads.map(|w| w.name.to_string()).collect()
    };
    assert_eq!(names(&store, "n1"), ["a", "b"]);
    assert_eq!(names(&store, ""), [""; 0]);
    store.apply([workload_update(on("n2", "a"))]);
    assert_eq!(names(&store, "n1"), ["b"]);
    assert_eq!(names(&store, "n2"), ["a", "c"]);
}
