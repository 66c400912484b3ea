//! What a small change costs when there is much: not what everything costs.

mod support;

use std::time::Duration;

use adit_controlplane::serve::SnapshotBuilder;
use adit_shared::proto::ADDRESS_TYPE;
use adit_shared::proto::workload::{Address, Workload, address};
use support::{Mesh, Proxy};
use tokio::time::Instant;

const WORKLOADS: usize = 20_000;
const PROXIES: usize = 20;

fn workload(number: usize, version: &str) -> (String, Address) {
    let name = format!("Kubernetes//Pod/shop/pod-{number:06}");
    let workload = Workload {
        uid: name.clone(),
        name: format!("pod-{number:06}"),
        namespace: "shop".into(),
        service_account: "default".into(),
        canonical_revision: version.into(),
        ..Workload::default()
    };
    let address = Address {
        r#type: Some(address::Type::Workload(workload)),
    };
    (name, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_change_is_cheap_for_many_proxies_of_a_large_mesh() {
    let mut builder = SnapshotBuilder::new();
    builder.replace(ADDRESS_TYPE, (0..WORKLOADS).map(|i| workload(i, "v1")));
    let mesh = Mesh::start_with(|_| {}, builder.build()).await;
    let start = Instant::now();
    let proxies: Vec<Proxy> = (0..PROXIES)
        .map(|i| Proxy::start(mesh.client_config(&format!("n{i}"))))
        .collect();
    for proxy in &proxies {
        proxy.ready().await;
    }
    let everything = start.elapsed();

    let (name, _) = workload(7, "v1");
    let held = |proxy: &Proxy| proxy.body(ADDRESS_TYPE, &name);
    let mut slowest = Duration::ZERO;
    for round in 0..5 {
        let (name, changed) = workload(7, &format!("round {round}"));
        let before: Vec<_> = proxies.iter().map(held).collect();
        let start = Instant::now();
        mesh.publish(|edit| {
            edit.set(ADDRESS_TYPE, &name, &changed);
        });
        for (proxy, before) in proxies.iter().zip(before) {
            support::eventually("the change", || held(proxy) != before).await;
        }
        slowest = slowest.max(start.elapsed());
    }
    println!("{WORKLOADS} workloads to {PROXIES} proxies: {everything:?}; one change: {slowest:?}");
    for proxy in &proxies {
        assert_eq!(proxy.names(ADDRESS_TYPE).len(), WORKLOADS);
        let single = proxy.messages().into_iter().skip(3);
        for message in single {
            assert_eq!(message, format!("Address +{name}"));
        }
    }
    // The debounce alone is 10 ms; a machine that is busy otherwise gets a lot more.
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
}
