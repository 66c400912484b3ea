//! Workloads and services as values. Illegal states of the wire form cannot be
//! written down here: conversion from protobuf refuses them by name and field.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::identity::SpiffeId;

/// A workload's unique name in the mesh: `<cluster>//Pod/<namespace>/<name>` for pods.
pub type WorkloadUid = Arc<str>;

/// An address and the network it is valid on (empty: the default network).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// The network's name; empty is the default network.
    pub network: Arc<str>,
    /// The address on that network.
    pub address: IpAddr,
}

/// `namespace/hostname`, the key of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// The namespace that owns the service.
    pub namespace: Arc<str>,
    /// The fully qualified host name.
    pub hostname: Arc<str>,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// Where a workload runs, as far as it is known. Empty parts are unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: Arc<str>,
    /// `topology.kubernetes.io/zone`.
    pub zone: Arc<str>,
    /// `topology.istio.io/subzone`.
    pub subzone: Arc<str>,
}

/// How to reach a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TunnelProtocol {
    /// Plain TCP to its port.
    None,
    /// mTLS and CONNECT to its port 15008.
    Hbone,
}

/// Whether a workload may be given traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Health {
    /// Ready.
    Healthy,
    /// Not ready, or about to go.
    Unhealthy,
}

/// What a gateway or a waypoint is addressed by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// A service of that name.
    Hostname(ServiceName),
    /// An address.
    Address(NetworkAddress),
}

/// A gateway or a waypoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// What to look up.
    pub destination: GatewayDestination,
    /// Its HBONE port, usually 15008.
    pub hbone_port: u16,
}

/// One port of a service, or of a service at one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Port {
    /// What clients dial.
    pub service_port: u16,
    /// What the app listens on; `None` for a named port that only the endpoint knows.
    pub target_port: Option<u16>,
}

/// One workload: a pod, a virtual machine, or an endpoint without either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Unique in the mesh.
    pub uid: WorkloadUid,
    /// Pod name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Its addresses; may be empty when `hostname` is set.
    pub addresses: Vec<IpAddr>,
    /// To be resolved when there is no address; empty: none.
    pub hostname: Arc<str>,
    /// Network that the addresses are on; empty is the default.
    pub network: Arc<str>,
    /// How to reach it.
    pub tunnel_protocol: TunnelProtocol,
    /// Who it is: trust domain, namespace, service account.
    pub identity: SpiffeId,
    /// It terminates HBONE itself; nothing stands before its app.
    pub native_tunnel: bool,
    /// How its app wants to be told of tunnelled connections.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Waypoint for traffic addressed to the workload itself.
    pub waypoint: Option<Arc<GatewayAddress>>,
    /// Gateway through which other networks reach it.
    pub network_gateway: Option<Arc<GatewayAddress>>,
    /// Node name; empty: unknown.
    pub node: Arc<str>,
    /// Telemetry: canonical service name.
    pub canonical_name: Arc<str>,
    /// Telemetry: canonical revision.
    pub canonical_revision: Arc<str>,
    /// Telemetry: `deployment`, `cronjob`, `pod` or `job`.
    pub workload_type: &'static str,
    /// Telemetry: name of the owning Deployment or the like.
    pub workload_name: Arc<str>,
    /// Cluster id.
    pub cluster_id: Arc<str>,
    /// Where it runs.
    pub locality: Locality,
    /// Uses its node's network: never looked up by address.
    pub host_network: bool,
    /// Whether it may be given traffic.
    pub health: Health,
    /// Load-balancing weight. 0 drains: no service picks the workload, its own address
    /// still reaches it.
    pub capacity: u32,
    /// `namespace/name` of selector policies that apply to it.
    pub authorization_policies: Vec<Arc<str>>,
    /// The waypoints that serve it.
    pub served_by: Arc<[SpiffeId]>,
    /// Only what has passed one of them is let in.
    pub require_waypoint: bool,
    /// Some L4 policy depends on who calls: its waypoints keep connections of different
    /// callers apart.
    pub callers_matter: bool,
    /// The services it belongs to, sorted by name.
    pub services: Vec<Membership>,
}

/// That a workload is an endpoint of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Membership {
    /// The service.
    pub service: ServiceName,
    /// Which port of the workload stands behind each port of the service.
    pub ports: Arc<[Port]>,
}

/// How an app that sits behind a tunnel is told who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// PROXY protocol before the bytes; otherwise plain bytes.
    pub proxy_protocol: bool,
    /// Where the app listens for them; `None`: the port that was called.
    pub port: Option<u16>,
}

impl Workload {
    /// The port map of `service`, where the workload belongs to it.
    pub fn ports_of(&self, service: &ServiceName) -> Option<&[Port]> {
        let found = self
            .services
            .binary_search_by(|membership| membership.service.cmp(service));
        found.ok().map(|at| &*self.services[at].ports)
    }

    /// Whether it is a Kubernetes pod, by its uid.
    pub fn is_pod(&self) -> bool {
        let mut parts = self.uid.split('/');
        (parts.nth(1), parts.next()) == (Some(""), Some("Pod"))
    }
}

/// The uid of a pod's workload.
pub fn pod_uid(cluster: &str, namespace: &str, name: &str) -> String {
    format!("{cluster}//Pod/{namespace}/{name}")
}

/// A block of addresses that a service owns on a network; a VIP is a full-length prefix.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceAddress {
    /// The network's name; empty is the default network.
    pub network: Arc<str>,
    /// The block.
    pub block: IpNet,
}

/// A property that load balancing compares between client and endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LocalityScope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}

/// How the scopes of [`LoadBalancing`] are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LoadBalancingMode {
    /// Scopes are ignored.
    Standard,
    /// Only endpoints that match every scope.
    Strict,
    /// Endpoints that match the longest prefix of the scopes.
    Failover,
    /// To the original destination, untouched.
    Passthrough,
}

/// One of several waypoints of a service, for canaries.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub destination: Arc<GatewayAddress>,
    /// Its share; 0: none.
    pub weight: u32,
}

/// How a service spreads connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LoadBalancing {
    /// Scopes in order of preference.
    pub scopes: Vec<LocalityScope>,
    /// What the scopes mean.
    pub mode: LoadBalancingMode,
    /// Unhealthy endpoints are used too (`publishNotReadyAddresses`).
    pub allow_unhealthy: bool,
}

impl Default for LoadBalancing {
    fn default() -> Self {
        Self {
            scopes: Vec::new(),
            mode: LoadBalancingMode::Standard,
            allow_unhealthy: false,
        }
    }
}

/// Which address families a service has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpFamilies {
    /// Whatever its endpoints have.
    Automatic,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

/// A service: a set of workloads behind one name and, often, virtual addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Key: namespace and host name.
    pub key: ServiceName,
    /// Short name.
    pub name: Arc<str>,
    /// Virtual addresses.
    pub addresses: Vec<ServiceAddress>,
    /// Ports.
    pub ports: Vec<Port>,
    /// Further identities that may answer for it (SPIFFE URIs).
    pub subject_alt_names: Vec<Arc<str>>,
    /// Waypoint for traffic addressed to the service.
    pub waypoint: Option<Arc<GatewayAddress>>,
    /// Where not empty, takes the place of `waypoint`: one is drawn per connection.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How connections are spread.
    pub load_balancing: LoadBalancing,
    /// Address families.
    pub ip_families: IpFamilies,
    /// The owner of the host name, where several namespaces claim it.
    pub canonical: bool,
    /// Hidden from other namespaces.
    pub namespace_private: bool,
}

impl Service {
    /// What stands behind `service_port`, where the service has that port.
    pub fn port(&self, service_port: u16) -> Option<Port> {
        let mut ports = self.ports.iter();
        ports
            .find(|port| port.service_port == service_port)
            .copied()
    }

    /// Whether clients of `namespace` may know it.
    pub fn visible_to(&self, namespace: &str) -> bool {
        !self.namespace_private || &*self.key.namespace == namespace
    }
}
