//! Whatever the order in which things come and go, the indexes answer as a scan of what
//! is left does.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::wire::*;
use crate::model::{Health, Service, Snapshot, Store, Update, Workload};
use crate::policy::{Policy, Scope};
use crate::proto::security;
use crate::proto::workload as proto;

const IPS: &[&str] = &[
    "10.0.0.1", "10.0.1.1", "10.1.0.1", "11.0.0.1", "fd00::1", "fe00::1",
];
const BLOCKS: &[&str] = &[
    "10.0.0.1",
    "10.0.1.1",
    "10.0.0.0/24",
    "10.0.0.0/16",
    "10.0.0.0/8",
    "11.0.0.0/8",
    "0.0.0.0/0",
    "fd00::1",
    "fd00::/8",
    "::/0",
];
const NETWORKS: &[&str] = &["", "far"];
const NAMESPACES: &[&str] = &["a", "b", "c"];
const NODES: &[&str] = &["", "n1", "n2"];
const SERVICES: &[&str] = &["a/x", "a/y", "b/x", "b/y"];
const POLICIES: &[&str] = &["a/p", "a/q", "b/p"];
const UIDS: &[&str] = &[
    "Kubernetes//Pod/a/1",
    "Kubernetes//Pod/a/2",
    "Kubernetes//Pod/b/1",
    "Kubernetes/networking.istio.io/WorkloadEntry/a/1",
];

fn any_workload() -> impl Strategy<Value = Update> {
    (
        select(UIDS),
        select(NAMESPACES),
        subsequence(IPS, 0..3),
        (select(NETWORKS), select(NODES)),
        subsequence(SERVICES, 0..3),
        subsequence(POLICIES, 0..3),
        (proptest::bool::weighted(0.2), proptest::bool::weighted(0.2)),
    )
        .prop_map(
            |(uid, namespace, ips, place, services, policies, (host, sick))| {
                let mut wire = proto::Workload {
                    uid: uid.into(),
                    network: place.0.into(),
                    node: place.1.into(),
                    network_mode: host.into(),
                    status: sick.into(),
                    authorization_policies: policies.iter().map(ToString::to_string).collect(),
                    ..pod(namespace, "pod", &ips)
                };
                for name in services {
                    wire = member(wire, name, &[(80, 8080)]);
                }
                workload_update(wire)
            },
        )
}

fn any_service() -> impl Strategy<Value = Update> {
    let addresses = vec((select(NETWORKS), select(BLOCKS)), 0..4);
    (select(SERVICES), addresses, any::<bool>(), any::<bool>()).prop_map(
        |(name, addresses, canonical, private)| {
            let (namespace, hostname) = name.split_once('/').expect("a name");
            service_update(proto::Service {
                addresses: addresses
                    .iter()
                    .map(|(net, text)| block(net, text))
                    .collect(),
                canonical,
                visibility: private.into(),
                ..service(namespace, hostname, &[])
            })
        },
    )
}

fn any_policy() -> impl Strategy<Value = Update> {
    (select(POLICIES), 0..3_i32, 0..2_i32).prop_map(|(key, scope, action)| {
        let (namespace, name) = key.split_once('/').expect("a key");
        let wire = security::Authorization {
            name: name.into(),
            namespace: namespace.into(),
            scope,
            action,
            ..Default::default()
        };
        Update::UpsertPolicy(Policy::from_resource(key, &wire))
    })
}

fn any_update() -> impl Strategy<Value = Update> {
    prop_oneof![
        4 => any_workload(),
        3 => any_service(),
        2 => any_policy(),
        2 => select(UIDS).prop_map(|uid| Update::RemoveAddress(uid.into())),
        1 => select(SERVICES).prop_map(|name| Update::RemoveAddress(name.into())),
        1 => select(POLICIES).prop_map(|key| Update::RemovePolicy(key.into())),
    ]
}

/// What is left, and every question answered by a scan.
#[derive(Default)]
struct Naive {
    workloads: BTreeMap<String, Workload>,
    services: BTreeMap<String, Service>,
    policies: BTreeMap<String, Policy>,
}

impl Naive {
    fn apply(&mut self, update: &Update) {
        match update.clone() {
            Update::UpsertWorkload(w) => drop(self.workloads.insert(w.uid.to_string(), w)),
            Update::UpsertService(s) => drop(self.services.insert(s.key.to_string(), s)),
            Update::UpsertPolicy(p) => drop(self.policies.insert(p.key.to_string(), p)),
            Update::RemoveAddress(name) => {
                if self.workloads.remove(&*name).is_none() {
                    self.services.remove(&*name);
                }
            }
            Update::RemovePolicy(key) => drop(self.policies.remove(&*key)),
        }
    }

    fn workload_at(&self, network: &str, ip: IpAddr) -> Option<&Workload> {
        let holds =
            |w: &&Workload| !w.host_network && *w.network == *network && w.addresses.contains(&ip);
        let key = |w: &&Workload| (!w.is_pod(), w.health == Health::Unhealthy, w.uid.clone());
        self.workloads.values().filter(holds).min_by_key(key)
    }

    /// The length of the longest of the service's blocks around `ip`, VIPs or not.
    fn length(s: &Service, network: &str, ip: IpAddr, vip: bool) -> Option<u8> {
        let blocks = s.addresses.iter().filter(|a| *a.network == *network);
        let full = |a: &&crate::model::ServiceAddress| {
            (a.block.prefix_len() == a.block.max_prefix_len()) == vip
        };
        let around = blocks.filter(full).filter(|a| a.block.contains(&ip));
        around.map(|a| a.block.prefix_len()).max()
    }

    fn service(&self, namespace: &str, length: impl Fn(&Service) -> Option<u8>) -> Option<String> {
        let visible = self.services.values().filter(|s| s.visible_to(namespace));
        let ranked = visible.filter_map(|s| {
            let own = *s.key.namespace == *namespace;
            Some((
                (
                    !own,
                    255 - length(s)?,
                    !(own || s.canonical),
                    !s.canonical,
                    s.key.clone(),
                ),
                s,
            ))
        });
        ranked
            .min_by_key(|(rank, _)| rank.clone())
            .map(|(_, s)| s.key.to_string())
    }

    fn endpoints(&self, service: &Service) -> Vec<&Workload> {
        let workloads = self.workloads.values();
        workloads
            .filter(|w| w.ports_of(&service.key).is_some())
            .collect()
    }

    fn on(&self, node: &str) -> Vec<&Workload> {
        let workloads = self.workloads.values();
        workloads
            .filter(|w| *w.node == *node && !node.is_empty())
            .collect()
    }

    /// Keys that apply and keys that are missing.
    fn policies_for<'a>(&'a self, workload: &'a Workload) -> (Vec<&'a str>, Vec<&'a str>) {
        let of_scope = |scope| self.policies.iter().filter(move |(_, p)| p.scope == scope);
        let mut applied: Vec<&str> = of_scope(Scope::Global).map(|(key, _)| &**key).collect();
        let own = of_scope(Scope::Namespace).filter(|(_, p)| p.namespace == workload.namespace);
        applied.extend(own.map(|(key, _)| &**key));
        let listed = workload.authorization_policies.iter().map(|key| &**key);
        let (known, missing): (Vec<_>, _) = listed.partition(|k| self.policies.contains_key(*k));
        applied.extend(known);
        (applied, missing)
    }
}

fn check(snapshot: &Snapshot, naive: &Naive) -> Result<(), TestCaseError> {
    prop_assert_eq!(snapshot.workloads().len(), naive.workloads.len());
    prop_assert_eq!(snapshot.services().len(), naive.services.len());
    prop_assert_eq!(snapshot.policies().len(), naive.policies.len());
    for network in NETWORKS {
        for text in IPS {
            let address = ip(text);
            let found = snapshot.workload_at(network, address);
            let found = found.map(|w| &**w);
            prop_assert_eq!(found, naive.workload_at(network, address), "{}", text);
            for namespace in NAMESPACES {
                for vip in [true, false] {
                    let found = if vip {
                        snapshot.service_at(network, address, namespace)
                    } else {
                        snapshot.service_around(network, address, namespace)
                    };
                    let found = found.map(|e| e.service().key.to_string());
                    let expected =
                        naive.service(namespace, |s| Naive::length(s, network, address, vip));
                    prop_assert_eq!(found, expected, "{} for {}, {}", text, namespace, vip);
                }
            }
        }
    }
    for hostname in ["x", "y"] {
        for namespace in NAMESPACES {
            let found = snapshot.service_by_hostname(hostname, namespace);
            let found = found.map(|e| e.service().key.to_string());
            let expected =
                naive.service(namespace, |s| (*s.key.hostname == *hostname).then_some(0));
            prop_assert_eq!(found, expected);
        }
    }
    for service in naive.services.values() {
        let entry = snapshot.service(&service.key).expect("a service");
        prop_assert_eq!(&**entry.service(), service);
        let endpoints: Vec<_> = entry.endpoints().iter().map(|w| &**w).collect();
        prop_assert_eq!(endpoints, naive.endpoints(service));
    }
    for node in NODES {
        let found: Vec<_> = snapshot.workloads_on(node).map(|w| &**w).collect();
        prop_assert_eq!(found, naive.on(node));
    }
    for workload in naive.workloads.values() {
        let set = snapshot.policies_for(workload);
        let (applied, missing) = naive.policies_for(workload);
        let found: Vec<_> = set.iter().map(|policy| &*policy.key).collect();
        prop_assert_eq!(found, applied);
        let found: Vec<_> = set.missing().iter().map(|key| &**key).collect();
        prop_assert_eq!(found, missing);
        for policy in set.iter() {
            prop_assert_eq!(&**policy, &naive.policies[&*policy.key]);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn indexes_agree_with_a_scan(batches in vec(vec(any_update(), 0..6), 1..6)) {
        let mut store = Store::new();
        let mut naive = Naive::default();
        for batch in batches {
            batch.iter().for_each(|update| naive.apply(update));
            store.apply(batch);
            check(store.snapshot(), &naive)?;
        }
        // Nothing is left behind when everything goes.
        let addresses = UIDS.iter().chain(SERVICES).map(|name| Update::RemoveAddress((*name).into()));
        let policies = POLICIES.iter().map(|key| Update::RemovePolicy((*key).into()));
        store.apply(addresses.chain(policies).collect::<Vec<_>>());
        prop_assert!(store.is_pristine(), "{:?}", store);
    }
}
