//! One copy of every text that many workloads share: namespaces, nodes, networks,
//! localities, service names, identities. A hundred thousand workloads have a few
//! thousand different ones.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use super::types::{GatewayAddress, Port, Service, ServiceName, Workload};
use crate::identity::SpiffeId;

/// Forget what nobody else holds after this many new entries, at the least.
const SWEEP_FLOOR: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Interner {
    texts: HashSet<Arc<str>>,
    ports: HashSet<Arc<[Port]>>,
    gateways: HashSet<Arc<GatewayAddress>>,
    identities: HashSet<SpiffeId>,
    waypoints: HashSet<Arc<[SpiffeId]>>,
    /// Entries after the last sweep.
    kept: usize,
}

impl Interner {
    pub(super) fn workload(&mut self, workload: &mut Workload) {
        let Workload {
            uid: _,
            name: _,
            namespace,
            addresses,
            hostname,
            network,
            tunnel_protocol: _,
            identity,
            native_tunnel: _,
            application_tunnel: _,
            waypoint,
            network_gateway,
            node,
            canonical_name,
            canonical_revision,
            workload_type: _,
            workload_name,
            cluster_id,
            locality,
            host_network: _,
            health: _,
            capacity: _,
            authorization_policies,
            served_by,
            require_waypoint: _,
            callers_matter: _,
            services,
        } = workload;
        for text in [
            namespace,
            hostname,
            network,
            node,
            canonical_name,
            canonical_revision,
            workload_name,
            cluster_id,
            &mut locality.region,
            &mut locality.zone,
            &mut locality.subzone,
        ] {
            self.text(text);
        }
        for key in authorization_policies.iter_mut() {
            self.text(key);
        }
        for membership in services.iter_mut() {
            self.service_name(&mut membership.service);
            share(&mut self.ports, &mut membership.ports);
        }
        for gateway in [waypoint, network_gateway].into_iter().flatten() {
            share(&mut self.gateways, gateway);
        }
        share(&mut self.identities, identity);
        share(&mut self.waypoints, served_by);
        addresses.shrink_to_fit();
        authorization_policies.shrink_to_fit();
        services.shrink_to_fit();
    }

    pub(super) fn service(&mut self, service: &mut Service) {
        self.service_name(&mut service.key);
        for address in &mut service.addresses {
            self.text(&mut address.network);
        }
        if let Some(gateway) = &mut service.waypoint {
            share(&mut self.gateways, gateway);
        }
    }

    /// Forgets what only the interner still holds, when it has doubled since the last
    /// time: the cost is spread over the additions.
    pub(super) fn sweep(&mut self) {
        let Self {
            texts,
            ports,
            gateways,
            identities,
            waypoints,
            kept,
        } = self;
        let size = |t: usize, p: usize, g: usize, i: usize| t + p + g + i;
        let now = size(texts.len(), ports.len(), gateways.len(), identities.len());
        if now < *kept * 2 + SWEEP_FLOOR {
            return;
        }
        // Few: one for each set of waypoints.
        waypoints.retain(|list| Arc::strong_count(list) > 1);
        gateways.retain(|gateway| Arc::strong_count(gateway) > 1);
        ports.retain(|list| Arc::strong_count(list) > 1);
        texts.retain(|text| Arc::strong_count(text) > 1);
        // A SPIFFE id does not tell how often it is held; those in use come back with
        // the next change of their workload.
        identities.clear();
        *kept = size(texts.len(), ports.len(), gateways.len(), identities.len());
    }

    fn text(&mut self, text: &mut Arc<str>) {
        share(&mut self.texts, text);
    }

    fn service_name(&mut self, name: &mut ServiceName) {
        self.text(&mut name.namespace);
        self.text(&mut name.hostname);
    }
}

/// Replaces `value` by the equal one that is already known, or makes it known.
fn share<T: Eq + Hash + Clone>(known: &mut HashSet<T>, value: &mut T) {
    match known.get(value) {
        Some(shared) => *value = shared.clone(),
        None => {
            known.insert(value.clone());
        }
    }
}
