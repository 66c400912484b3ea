//! One state of everything, as requests read it.

use std::net::SocketAddr;
use std::sync::Arc;

use adit_shared::model::{
    self, GatewayAddress, GatewayDestination, ServiceEntry, ServiceName, Workload,
};
use imbl::HashMap;

use super::Touched;
use super::resources::{DeclaredPort, Store};
use crate::proxy::pick::{self, Picked};

/// Which Gateway this process is an instance of.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// The service that leads to it.
    pub service: ServiceName,
    /// The network that it is on; empty is the default.
    pub network: Arc<str>,
}

impl Gateway {
    /// The Gateway `namespace/name`, whose service has the same name.
    pub fn new(name: &str, namespace: &str, cluster_domain: &str, network: &str) -> Self {
        Self {
            name: name.into(),
            namespace: namespace.into(),
            service: ServiceName {
                namespace: namespace.into(),
                hostname: format!("{name}.{namespace}.svc.{cluster_domain}").into(),
            },
            network: network.into(),
        }
    }
}

/// What a port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Not declared: looked at, unless the server has to speak first.
    Undeclared,
    /// HTTP, of the version that the client uses.
    Http,
    /// HTTP/2.
    Http2,
    /// gRPC, over HTTP/2.
    Grpc,
    /// Opaque bytes.
    Tcp,
    /// TLS, which is not ours to open.
    Tls,
}

/// One state of everything. It never changes.
pub struct View {
    version: u64,
    gateway: Arc<Gateway>,
    model: Arc<model::Snapshot>,
    services: HashMap<ServiceName, Arc<ServiceView>>,
}

/// A service, as the request path sees it.
pub struct ServiceView {
    entry: Arc<ServiceEntry>,
    /// Sorted by number.
    ports: Box<[Arc<PortView>]>,
}

/// One port of a service with everything that decides about requests to it.
pub struct PortView {
    /// The service.
    pub service: Arc<ServiceEntry>,
    /// The port's number.
    pub port: u16,
    /// Its `metadata.name`.
    pub name: Arc<str>,
    /// What it speaks.
    pub protocol: Protocol,
    /// Endpoints that may be given requests.
    pub endpoints: Box<[Picked]>,
}

impl View {
    pub(super) fn empty(gateway: Gateway) -> Self {
        Self {
            version: 0,
            gateway: Arc::new(gateway),
            model: Arc::default(),
            services: HashMap::new(),
        }
    }

    /// The view after a change; `None` when nothing is different.
    pub(super) fn next(
        &self,
        model: Arc<model::Snapshot>,
        store: &Store,
        touched: &Touched,
    ) -> Option<Self> {
        let mut services = self.services.clone();
        let mut changed = touched.everything || !touched.services.is_empty();
        if self.model.version() != model.version() {
            changed = true;
            services.retain(|name, _| model.service(name).is_some());
        }
        for entry in model.services() {
            let name = &entry.service().key;
            let known = services.get(name);
            let same = known.is_some_and(|known| Arc::ptr_eq(&known.entry, entry));
            if !same || touched.everything || touched.services.contains(name) {
                services.insert(name.clone(), Arc::new(ServiceView::compile(entry, store)));
            }
        }
        changed.then(|| Self {
            version: self.version + 1,
            gateway: self.gateway.clone(),
            model,
            services,
        })
    }

    /// How many changes led to this state.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The Gateway that this process is an instance of.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// Workloads and services.
    pub fn model(&self) -> &model::Snapshot {
        &self.model
    }

    /// A service.
    pub fn service(&self, name: &ServiceName) -> Option<&Arc<ServiceView>> {
        self.services.get(name)
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceView>> {
        self.services.values()
    }

    /// Whether `gateway`, which a service or a workload names as its waypoint, is this one.
    pub fn is_self(&self, gateway: &GatewayAddress) -> bool {
        match &gateway.destination {
            GatewayDestination::Hostname(name) => *name == self.gateway.service,
            GatewayDestination::Address(at) => {
                let namespace = &self.gateway.namespace;
                let service = self.model.service_at(&at.network, at.address, namespace);
                let workload = || self.model.workload_at(&at.network, at.address);
                service.is_some_and(|entry| entry.service().key == self.gateway.service)
                    || workload().is_some_and(|w| w.ports_of(&self.gateway.service).is_some())
            }
        }
    }

    /// What `address` of `workload` speaks, as the services say that it belongs to.
    pub fn protocol_of(&self, workload: &Workload, address: SocketAddr) -> Protocol {
        for membership in &workload.services {
            let Some(view) = self.service(&membership.service) else {
                continue;
            };
            let mut ports = membership.ports.iter();
            let port = ports.find(|port| port.target_port == Some(address.port()));
            let declared = port.and_then(|port| view.port(port.service_port));
            if let Some(declared) = declared.filter(|p| p.protocol != Protocol::Undeclared) {
                return declared.protocol;
            }
        }
        Protocol::Undeclared
    }
}

impl ServiceView {
    fn compile(entry: &Arc<ServiceEntry>, store: &Store) -> Self {
        let service = entry.service();
        let declared: &[DeclaredPort] = store
            .services
            .get(&service.key)
            .map_or(&[], |declared| declared);
        let mut ports: Vec<_> = service
            .ports
            .iter()
            .map(|port| {
                let declared = declared.iter().find(|d| d.port == port.service_port);
                Arc::new(PortView {
                    service: entry.clone(),
                    port: port.service_port,
                    name: declared.map(|d| d.name.clone()).unwrap_or_default(),
                    protocol: declared.map_or(Protocol::Undeclared, |d| d.protocol),
                    endpoints: pick::endpoints(entry, port.service_port),
                })
            })
            .collect();
        ports.sort_by_key(|port| port.port);
        Self {
            entry: entry.clone(),
            ports: ports.into(),
        }
    }

    /// The service and its endpoints.
    pub fn entry(&self) -> &Arc<ServiceEntry> {
        &self.entry
    }

    /// The ports, sorted by number.
    pub fn ports(&self) -> &[Arc<PortView>] {
        &self.ports
    }

    /// The port of that number.
    pub fn port(&self, number: u16) -> Option<&Arc<PortView>> {
        let at = self.ports.binary_search_by_key(&number, |port| port.port);
        at.ok().map(|at| &self.ports[at])
    }
}
