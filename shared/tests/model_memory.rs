//! What a large mesh costs a node: memory per workload and time per change, with every
//! byte counted by the allocator. A process of its own, because it replaces that.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use adit_shared::model::{Service, Store, Update, Workload};
use adit_shared::proto::workload as proto;

const WORKLOADS: usize = 100_000;
const PER_SERVICE: usize = 10;
const NODES: usize = 1_000;
const NAMESPACES: usize = 500;
/// Promised bytes per workload, with its share of services and indexes.
const LIMIT: usize = 1_400;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those of the system allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those of the system allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn workload(i: usize) -> Update {
    let service = i / PER_SERVICE;
    let namespace = format!("namespace-{}", service % NAMESPACES);
    let name = format!("deployment-{service}-7d9f8c6b5-{i:05}");
    let port = proto::Port {
        service_port: 80,
        target_port: 8080,
        app_protocol: 0,
    };
    let host = format!("{namespace}/service-{service}.{namespace}.svc.cluster.local");
    let wire = proto::Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}"),
        name,
        addresses: vec![
            std::net::Ipv4Addr::from_bits(0x0a00_0000 + i as u32)
                .octets()
                .to_vec(),
        ],
        tunnel_protocol: proto::TunnelProtocol::Hbone.into(),
        service_account: format!("account-{service}"),
        node: format!("node-{}.example.internal", i % NODES),
        canonical_name: format!("deployment-{service}"),
        canonical_revision: "latest".into(),
        workload_name: format!("deployment-{service}"),
        authorization_policies: vec!["istio-system/istio_converted_static_strict".into()],
        locality: Some(proto::Locality {
            region: "region-1".into(),
            zone: format!("zone-{}", i % 3),
            subzone: String::new(),
        }),
        services: [(host, proto::PortList { ports: vec![port] })].into(),
        namespace,
        ..Default::default()
    };
    Update::UpsertWorkload(Workload::try_from(&wire).expect("a workload"))
}

fn service(service: usize) -> Update {
    let namespace = format!("namespace-{}", service % NAMESPACES);
    let wire = proto::Service {
        name: format!("service-{service}"),
        hostname: format!("service-{service}.{namespace}.svc.cluster.local"),
        addresses: vec![proto::NetworkAddress {
            network: String::new(),
            address: std::net::Ipv4Addr::from_bits(0x0b00_0000 + service as u32)
                .octets()
                .to_vec(),
            length: None,
        }],
        ports: vec![proto::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
        namespace,
        ..Default::default()
    };
    Update::UpsertService(Service::try_from(&wire).expect("a service"))
}

#[test]
fn a_hundred_thousand_workloads_fit_on_a_node() {
    let before = LIVE.load(Ordering::Relaxed);
    let mut store = Store::new();
    let start = Instant::now();
    for batch in (0..WORKLOADS).collect::<Vec<_>>().chunks(1_000) {
        store.apply(batch.iter().map(|i| workload(*i)));
    }
    store.apply((0..WORKLOADS / PER_SERVICE).map(service));
    let loaded = start.elapsed();
    let bytes = (LIVE.load(Ordering::Relaxed) - before) / WORKLOADS;
    println!("{bytes} bytes per workload; {WORKLOADS} loaded in {loaded:?}");

    // One change at a time, with a reader that keeps the state of before.
    let held = store.snapshot().clone();
    let gone: Vec<_> = held
        .workloads()
        .take(1_000)
        .map(|w| w.uid.clone())
        .collect();
    let start = Instant::now();
    for uid in &gone {
        store.apply([Update::RemoveAddress(uid.clone())]);
    }
    println!("{:?} per change", start.elapsed() / 1_000);
    assert_eq!(held.workloads().len(), WORKLOADS);
    assert_eq!(store.snapshot().workloads().len(), WORKLOADS - 1_000);
    assert!(
        bytes < LIMIT,
        "{bytes} bytes per workload, {LIMIT} promised"
    );

    drop((held, gone, store));
    let left = LIVE.load(Ordering::Relaxed).saturating_sub(before);
    assert!(left < 100_000, "{left} bytes leaked");
}
