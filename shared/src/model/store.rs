//! The writer's side: takes updates in any order and keeps every index in step.
//!
//! Workloads and services arrive independently. Membership is therefore kept by the
//! service's name, whether or not the service is there, and a service's endpoints are
//! put together anew after each batch that touched them, from what is then known. No
//! index holds a copy that could go stale.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::address::{NetworkIndex, claim, disclaim};
use super::intern::Interner;
use super::snapshot::{ServiceEntry, Snapshot};
use super::types::{Service, ServiceName, Workload, WorkloadUid};
use crate::policy::{Policy, PolicyKey, Scope};

/// One change.
#[derive(Debug, Clone)]
pub enum Update {
    /// A workload is new or has changed.
    UpsertWorkload(Workload),
    /// A service is new or has changed.
    UpsertService(Service),
    /// A policy is new or has changed.
    UpsertPolicy(Policy),
    /// A workload (by uid) or a service (by `namespace/hostname`) is gone.
    RemoveAddress(Arc<str>),
    /// A policy (by `namespace/name`) is gone.
    RemovePolicy(PolicyKey),
}

/// The model and what is needed to change it.
#[derive(Debug, Default)]
pub struct Store {
    snapshot: Snapshot,
    /// Which workloads say that they belong to a service.
    members: HashMap<ServiceName, BTreeSet<WorkloadUid>>,
    interner: Interner,
}

/// What a batch has touched.
#[derive(Default)]
struct Touched {
    anything: bool,
    services: HashSet<ServiceName>,
    policies: bool,
    policy_namespaces: HashSet<Arc<str>>,
}

impl Store {
    /// An empty model.
    pub fn new() -> Self {
        Self::default()
    }

    /// The state after the last batch.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Applies a batch, in order. Returns whether anything is different; an update
    /// that repeats what is known is not a change.
    pub fn apply(&mut self, updates: impl IntoIterator<Item = Update>) -> bool {
        let mut touched = Touched::default();
        for update in updates {
            match update {
                Update::UpsertWorkload(workload) => self.upsert_workload(workload, &mut touched),
                Update::UpsertService(service) => self.upsert_service(service, &mut touched),
                Update::UpsertPolicy(policy) => self.upsert_policy(policy, &mut touched),
                Update::RemoveAddress(name) => self.remove_address(&name, &mut touched),
                Update::RemovePolicy(key) => self.remove_policy(&key, &mut touched),
            }
        }
        if !touched.anything {
            return false;
        }
        self.finish(touched);
        true
    }

    /// Whether no index holds anything, as in a new store.
    #[cfg(test)]
    pub(super) fn is_pristine(&self) -> bool {
        let Snapshot {
            version: _,
            policy_version: _,
            workloads,
            services,
            networks,
            hostnames,
            nodes,
            policies,
            global_policies,
            namespace_policies,
        } = &self.snapshot;
        workloads.is_empty()
            && services.is_empty()
            && networks.is_empty()
            && hostnames.is_empty()
            && nodes.is_empty()
            && policies.is_empty()
            && global_policies.is_empty()
            && namespace_policies.is_empty()
            && self.members.is_empty()
    }

    fn upsert_workload(&mut self, mut workload: Workload, touched: &mut Touched) {
        let known = self.snapshot.workloads.get(&workload.uid).cloned();
        if known.as_deref() == Some(&workload) {
            return;
        }
        if let Some(known) = &known {
            workload.uid = known.uid.clone();
            self.unlink_workload(known, touched);
        }
        self.interner.workload(&mut workload);
        let workload = Arc::new(workload);
        touched.anything = true;
        if !workload.host_network && !workload.addresses.is_empty() {
            let networks = &mut self.snapshot.networks;
            let index = networks.entry(workload.network.clone()).or_default();
            for address in &workload.addresses {
                index.add_workload(address.to_canonical(), &workload);
            }
        }
        for membership in &workload.services {
            let members = self.members.entry(membership.service.clone()).or_default();
            members.insert(workload.uid.clone());
            touched.services.insert(membership.service.clone());
        }
        if !workload.node.is_empty() {
            let nodes = &mut self.snapshot.nodes;
            let node = nodes.entry(workload.node.clone()).or_default();
            node.insert(workload.uid.clone());
        }
        self.snapshot
            .workloads
            .insert(workload.uid.clone(), workload);
    }

    /// Takes `workload` out of every index but the one by uid.
    fn unlink_workload(&mut self, workload: &Arc<Workload>, touched: &mut Touched) {
        if !workload.host_network {
            for address in &workload.addresses {
                self.edit_network(&workload.network, |index| {
                    index.remove_workload(address.to_canonical(), workload);
                });
            }
        }
        for membership in &workload.services {
            if let Some(members) = self.members.get_mut(&membership.service) {
                members.remove(&workload.uid);
                if members.is_empty() {
                    self.members.remove(&membership.service);
                }
            }
            touched.services.insert(membership.service.clone());
        }
        let nodes = &mut self.snapshot.nodes;
        if let Some(node) = nodes.get_mut(&workload.node) {
            node.remove(&workload.uid);
            if node.is_empty() {
                nodes.remove(&workload.node);
            }
        }
    }

    fn upsert_service(&mut self, mut service: Service, touched: &mut Touched) {
        let known = self.snapshot.services.get(&service.key).cloned();
        if known.as_deref().map(|known| &**known.service()) == Some(&service) {
            return;
        }
        if let Some(known) = &known {
            self.unlink_service(known.service());
        }
        self.interner.service(&mut service);
        touched.anything = true;
        touched.services.insert(service.key.clone());
        for address in &service.addresses {
            let networks = &mut self.snapshot.networks;
            let index = networks.entry(address.network.clone()).or_default();
            index.add_block(address.block.trunc(), &service);
        }
        let hostname = service.key.hostname.clone();
        claim(&mut self.snapshot.hostnames, hostname, &service);
        let key = service.key.clone();
        // The endpoints follow when the batch is done; until then those of before.
        let endpoints = known.as_deref().map(|known| known.endpoints().into());
        let entry = ServiceEntry::new(
            Arc::new(service),
            endpoints.unwrap_or_default(),
            known.as_deref(),
        );
        self.snapshot.services.insert(key, Arc::new(entry));
    }

    /// Takes `service` out of every index but the one by name.
    fn unlink_service(&mut self, service: &Service) {
        for address in &service.addresses {
            self.edit_network(&address.network, |index| {
                index.remove_block(address.block.trunc(), &service.key);
            });
        }
        let hostnames = &mut self.snapshot.hostnames;
        disclaim(hostnames, &service.key.hostname, &service.key);
    }

    fn remove_address(&mut self, name: &str, touched: &mut Touched) {
        if let Some(workload) = self.snapshot.workloads.remove(name) {
            touched.anything = true;
            self.unlink_workload(&workload, touched);
        } else if let Some((namespace, hostname)) = name.split_once('/') {
            let key = ServiceName {
                namespace: namespace.into(),
                hostname: hostname.into(),
            };
            if let Some(entry) = self.snapshot.services.remove(&key) {
                touched.anything = true;
                self.unlink_service(entry.service());
            }
        }
    }

    fn upsert_policy(&mut self, policy: Policy, touched: &mut Touched) {
        let known = self.snapshot.policies.get(&policy.key);
        if known.is_some_and(|known| **known == policy) {
            return;
        }
        touched.anything = true;
        if let Some(known) = known {
            touched.policy(known);
        }
        touched.policy(&policy);
        let key = policy.key.clone();
        self.snapshot.policies.insert(key, Arc::new(policy));
    }

    fn remove_policy(&mut self, key: &str, touched: &mut Touched) {
        if let Some(policy) = self.snapshot.policies.remove(key) {
            touched.anything = true;
            touched.policy(&policy);
        }
    }

    /// Changes the index of a network and forgets it when nothing is left in it.
    fn edit_network(&mut self, network: &str, edit: impl FnOnce(&mut NetworkIndex)) {
        let networks = &mut self.snapshot.networks;
        if let Some(index) = networks.get_mut(network) {
            edit(index);
            if index.is_empty() {
                networks.remove(network);
            }
        }
    }

    fn finish(&mut self, touched: Touched) {
        let Self {
            snapshot,
            members,
            interner,
        } = self;
        snapshot.version += 1;
        for name in touched.services {
            let Some(before) = snapshot.services.get(&name) else {
                continue;
            };
            let uids = members.get(&name).into_iter().flatten();
            let endpoints = uids.filter_map(|uid| snapshot.workloads.get(uid).cloned());
            let service = before.service().clone();
            let entry = ServiceEntry::new(service, endpoints.collect(), Some(before));
            entry.warm();
            snapshot.services.insert(name, Arc::new(entry));
        }
        if touched.policies {
            snapshot.policy_version = snapshot.version;
            list_policies(snapshot, touched.policy_namespaces);
        }
        interner.sweep();
    }
}

/// Lists anew, in the order of keys, the mesh-wide policies and those of `namespaces`.
fn list_policies(snapshot: &mut Snapshot, namespaces: HashSet<Arc<str>>) {
    let mut global = Vec::new();
    let mut lists: HashMap<_, _> = namespaces.into_iter().map(|ns| (ns, Vec::new())).collect();
    for policy in snapshot.policies.values() {
        let list = match policy.scope {
            Scope::Global => Some(&mut global),
            Scope::Namespace => lists.get_mut(&policy.namespace),
            Scope::WorkloadSelector => None,
        };
        list.into_iter().for_each(|list| list.push(policy.clone()));
    }
    let sorted = |mut list: Vec<Arc<Policy>>| -> Arc<[Arc<Policy>]> {
        list.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        list.into()
    };
    snapshot.global_policies = sorted(global);
    for (namespace, list) in lists {
        if list.is_empty() {
            snapshot.namespace_policies.remove(&namespace);
        } else {
            snapshot.namespace_policies.insert(namespace, sorted(list));
        }
    }
}

impl Touched {
    fn policy(&mut self, policy: &Policy) {
        self.policies = true;
        if policy.scope == Scope::Namespace {
            self.policy_namespaces.insert(policy.namespace.clone());
        }
    }
}
