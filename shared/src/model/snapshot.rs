//! One state of the mesh, and what can be looked up in it.

use std::net::IpAddr;
use std::sync::Arc;

use imbl::{HashMap, OrdSet};
use rand::Rng;

use super::address::{Claims, NetworkIndex};
use super::balance::{Balancer, Drawn};
use super::types::{Service, ServiceName, Workload, WorkloadUid, pod_uid};
use crate::identity::SpiffeId;
use crate::policy::{Policy, PolicyKey, PolicySet, ServedBy};

/// One state of the mesh. It never changes; cloning it copies a few pointers.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub(super) version: u64,
    pub(super) policy_version: u64,
    pub(super) workloads: HashMap<WorkloadUid, Arc<Workload>>,
    pub(super) services: HashMap<ServiceName, Arc<ServiceEntry>>,
    pub(super) networks: HashMap<Arc<str>, NetworkIndex>,
    pub(super) hostnames: HashMap<Arc<str>, Claims>,
    pub(super) nodes: HashMap<Arc<str>, OrdSet<WorkloadUid>>,
    pub(super) policies: HashMap<PolicyKey, Arc<Policy>>,
    pub(super) global_policies: Arc<[Arc<Policy>]>,
    pub(super) namespace_policies: HashMap<Arc<str>, Arc<[Arc<Policy>]>>,
}

/// A service and its endpoints.
#[derive(Debug)]
pub struct ServiceEntry {
    service: Arc<Service>,
    /// Sorted by uid.
    endpoints: Arc<[Arc<Workload>]>,
    identities: Arc<[SpiffeId]>,
    balancer: Balancer,
}

impl Snapshot {
    /// How many batches of changes led to this state.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The version at which policies last changed.
    pub fn policy_version(&self) -> u64 {
        self.policy_version
    }

    /// The workload with that uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload of a Kubernetes pod.
    pub fn pod(&self, cluster: &str, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.workload(&pod_uid(cluster, namespace, name))
    }

    /// The workload at `address` of `network`. Pods that use their node's network are
    /// never found. Where several share the address: a pod, then a healthy one, then
    /// the first by uid.
    pub fn workload_at(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        self.networks.get(network)?.workload(address.to_canonical())
    }

    /// The service of that name.
    pub fn service(&self, name: &ServiceName) -> Option<&Arc<ServiceEntry>> {
        self.services.get(name)
    }

    /// The service with the virtual address `address`, as a client of `namespace`
    /// sees it: its own namespace's, then the canonical one, then the first by name.
    pub fn service_at(
        &self,
        network: &str,
        address: IpAddr,
        namespace: &str,
    ) -> Option<&Arc<ServiceEntry>> {
        let index = self.networks.get(network)?;
        self.service(index.vip(address.to_canonical(), namespace)?)
    }

    /// The service that owns a block around `address`, as a client of `namespace` sees
    /// it: its own namespace's, then the one with the longest prefix, then the
    /// canonical one, then the first by name.
    pub fn service_around(
        &self,
        network: &str,
        address: IpAddr,
        namespace: &str,
    ) -> Option<&Arc<ServiceEntry>> {
        let index = self.networks.get(network)?;
        self.service(index.block(address.to_canonical(), namespace)?)
    }

    /// The service with that host name, as a client of `namespace` sees it. Case does
    /// not matter (RFC 9110 4.2.3).
    pub fn service_by_hostname(
        &self,
        hostname: &str,
        namespace: &str,
    ) -> Option<&Arc<ServiceEntry>> {
        let claims = self.hostnames.get(hostname).or_else(|| {
            let has_upper = hostname.bytes().any(|b| b.is_ascii_uppercase());
            let lower = has_upper.then(|| hostname.to_ascii_lowercase())?;
            self.hostnames.get(lower.as_str())
        });
        self.service(claims?.for_client(namespace)?)
    }

    /// The workloads of a node, by uid.
    pub fn workloads_on(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        let uids = self.nodes.get(node).into_iter().flatten();
        uids.filter_map(|uid| self.workloads.get(uid))
    }

    /// Every workload, in no order.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<ServiceEntry>> {
        self.services.values()
    }

    /// The policy of that key.
    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// Every policy, in no order.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// What applies to connections to `workload`: mesh-wide policies, those of its
    /// namespace, and those it lists. One that it lists and that has not arrived
    /// denies.
    pub fn policies_for(&self, workload: &Workload) -> PolicySet {
        let namespace = self.namespace_policies.get(&workload.namespace);
        let mut listed = Vec::new();
        let mut missing = Vec::new();
        for key in &workload.authorization_policies {
            match self.policies.get(key) {
                Some(policy) => listed.push(policy.clone()),
                None => missing.push(key.clone()),
            }
        }
        PolicySet::new(
            self.global_policies.clone(),
            namespace.cloned().unwrap_or_default(),
            listed,
            missing,
        )
        .with_waypoints(ServedBy {
            identities: workload.served_by.clone(),
            required: workload.require_waypoint,
        })
    }
}

impl ServiceEntry {
    pub(super) fn new(
        service: Arc<Service>,
        endpoints: Arc<[Arc<Workload>]>,
        before: Option<&Self>,
    ) -> Self {
        let names = service.subject_alt_names.iter();
        let identities = names.filter_map(|name| name.parse().ok()).collect();
        let balancer = before.map(|before| before.balancer.successor());
        Self {
            service,
            endpoints,
            identities,
            balancer: balancer.unwrap_or_default(),
        }
    }

    /// Prepares for connections, if there have been any to this service.
    pub(super) fn warm(&self) {
        self.balancer.warm(&self.service, &self.endpoints);
    }

    /// The service.
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// The workloads behind it, whatever their health, sorted by uid.
    pub fn endpoints(&self) -> &[Arc<Workload>] {
        &self.endpoints
    }

    /// Whether `uid` is one of its endpoints.
    pub fn has_endpoint(&self, uid: &str) -> bool {
        let found = self
            .endpoints
            .binary_search_by(|other| (*other.uid).cmp(uid));
        found.is_ok()
    }

    /// Those of its `subject_alt_names` that are SPIFFE ids: identities that may answer
    /// for it beside those of its endpoints.
    pub fn identities(&self) -> &Arc<[SpiffeId]> {
        &self.identities
    }

    pub(super) fn draw<R: Rng + ?Sized>(
        &self,
        client: &Workload,
        service_port: Option<u16>,
        exclude: &[WorkloadUid],
        rng: &mut R,
    ) -> Drawn<'_> {
        let Self {
            service,
            endpoints,
            balancer,
            ..
        } = self;
        balancer.draw(service, endpoints, client, service_port, exclude, rng)
    }
}
