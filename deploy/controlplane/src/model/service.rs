//! Services and the endpoints behind them.

use std::net::IpAddr;
use std::sync::Arc;

use adit_shared::proto::workload::{AppProtocol, IpFamilies};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::field::{At, FieldError};
use super::meta::{Kind, Labels, Meta, Origin};

/// Which endpoints of a service are preferred by a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficDistribution {
    /// Any.
    None,
    /// Those in the client's zone.
    PreferSameZone,
    /// Those on the client's node.
    PreferSameNode,
}

impl TrafficDistribution {
    /// Reads the field or the annotation. Unknown text means no preference
    /// (reference: Istio `networking.istio.io/traffic-distribution`).
    pub fn parse(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "preferclose" | "prefersamezone" => Self::PreferSameZone,
            "prefersamenode" => Self::PreferSameNode,
            _ => Self::None,
        }
    }
}

/// Where a service port leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// The name of a container's port.
    Name(Arc<str>),
}

/// What is spoken on a port, as far as it was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeclaredProtocol {
    /// Nothing was said.
    Undeclared,
    /// HTTP/1.1, or whatever the client speaks.
    Http,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// gRPC.
    Grpc,
    /// Bytes that nobody may look at.
    Tcp,
    /// TLS, of which the ClientHello may be looked at.
    Tls,
}

/// A TCP port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty where there is only one.
    pub name: Arc<str>,
    /// What clients dial.
    pub number: u16,
    /// Where it leads to.
    pub target: TargetPort,
    /// What is spoken on it.
    pub protocol: AppProtocol,
    /// What a waypoint takes it for.
    pub declared: DeclaredProtocol,
    /// `appProtocol` or the name states what is spoken.
    pub protocol_stated: bool,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Metadata.
    pub meta: Meta,
    /// `type: ExternalName`: an alias in DNS and nothing else.
    pub external_name: bool,
    /// `spec.selector`; empty: endpoints come from EndpointSlices alone.
    pub selector: Labels,
    /// Cluster IPs; none for a headless service.
    pub addresses: Vec<IpAddr>,
    /// TCP ports.
    pub ports: Vec<ServicePort>,
    /// `internalTrafficPolicy: Local`.
    pub local_only: bool,
    /// `spec.trafficDistribution`.
    pub distribution: Option<TrafficDistribution>,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// Address families.
    pub families: IpFamilies,
}

impl Service {
    /// Checks and keeps a service.
    ///
    /// # Errors
    /// Every field that is wrong.
    pub fn parse(service: core::Service, origin: Origin) -> Result<Self, Vec<FieldError>> {
        let mut errors = Vec::new();
        let meta =
            Meta::parse(Kind::Service, service.metadata, origin).map_err(|error| vec![error])?;
        let spec = service.spec.unwrap_or_default();
        let at = At::ROOT.key("spec");
        let external_name = spec.type_.as_deref() == Some("ExternalName");
        let mut addresses: Vec<IpAddr> = Vec::new();
        let mut keep = |at: At<'_>, text: &str| match text {
            "" | "None" => {}
            text => match text.parse() {
                Ok(ip) if addresses.contains(&ip) => {}
                Ok(ip) => addresses.push(ip),
                Err(_) => errors.push(at.error(format!("{text:?} is not an IP address"))),
            },
        };
        let ips = at.key("clusterIPs");
        for (index, ip) in spec.cluster_ips.iter().flatten().enumerate() {
            keep(ips.index(index), ip);
        }
        keep(
            at.key("clusterIP"),
            spec.cluster_ip.as_deref().unwrap_or_default(),
        );
        let list = at.key("ports");
        let mut ports = Vec::new();
        for (index, port) in spec.ports.iter().flatten().enumerate() {
            match service_port(port, list.index(index)) {
                Ok(Some(port)) => ports.push(port),
                Ok(None) => {}
                Err(error) => errors.push(error),
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self {
            external_name,
            selector: spec.selector.unwrap_or_default(),
            families: families(spec.ip_families.as_deref().unwrap_or_default(), &addresses),
            addresses,
            ports,
            local_only: spec.internal_traffic_policy.as_deref() == Some("Local"),
            distribution: spec
                .traffic_distribution
                .as_deref()
                .map(TrafficDistribution::parse),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
            meta,
        })
    }
}

fn service_port(port: &core::ServicePort, at: At<'_>) -> Result<Option<ServicePort>, FieldError> {
    if !matches!(port.protocol.as_deref(), None | Some("" | "TCP")) {
        return Ok(None);
    }
    let number = port_number(port.port, at.key("port"))?;
    let target = match &port.target_port {
        None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
        Some(IntOrString::Int(target)) => {
            TargetPort::Number(port_number(*target, at.key("targetPort"))?)
        }
        Some(IntOrString::String(name)) => match name.parse() {
            Ok(target) => TargetPort::Number(port_number(target, at.key("targetPort"))?),
            Err(_) if name.is_empty() => TargetPort::Number(number),
            Err(_) => TargetPort::Name(name.as_str().into()),
        },
    };
    let name = port.name.as_deref().unwrap_or_default();
    Ok(Some(ServicePort {
        name: name.into(),
        number,
        target,
        protocol: app_protocol(port.app_protocol.as_deref(), name),
        declared: declared_protocol(port.app_protocol.as_deref(), name, number),
        protocol_stated: port.app_protocol.is_some() || states_protocol(name),
    }))
}

fn port_number(number: i32, at: At<'_>) -> Result<u16, FieldError> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(at.error(format!("{number} is not a port: 1 to 65535"))),
    }
}

/// `appProtocol` (KEP-1422, KEP-3726), else the port name up to its first `-`
/// (Istio "Protocol Selection").
fn app_protocol(declared: Option<&str>, port_name: &str) -> AppProtocol {
    let by_name = port_name.split('-').next().unwrap_or_default();
    // `grpc-web` is HTTP/1.1 on the wire.
    let by_name = if port_name.starts_with("grpc-web") {
        "http"
    } else {
        by_name
    };
    let text = declared.unwrap_or(by_name).to_ascii_lowercase();
    match text.as_str() {
        "http" | "kubernetes.io/ws" | "grpc-web" => AppProtocol::Http11,
        "http2" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        _ => AppProtocol::Unknown,
    }
}

/// Ports on which the server speaks first and for which nobody states a protocol: SMTP,
/// DNS, MySQL, MongoDB (Istio `wellKnownPorts`). Waiting for the client's first bytes
/// would stall them.
const SERVER_FIRST: [u16; 4] = [25, 53, 3306, 27017];

/// As [`app_protocol`], with the difference between bytes, TLS and nothing said.
fn declared_protocol(declared: Option<&str>, port_name: &str, number: u16) -> DeclaredProtocol {
    let text = declared.unwrap_or(port_name).to_ascii_lowercase();
    let prefix = if text.starts_with("grpc-web") {
        "http"
    } else {
        text.split('-').next().unwrap_or_default()
    };
    match prefix {
        "http" | "http_proxy" | "kubernetes.io/ws" => DeclaredProtocol::Http,
        "http2" | "kubernetes.io/h2c" => DeclaredProtocol::Http2,
        "grpc" => DeclaredProtocol::Grpc,
        "https" | "tls" | "kubernetes.io/wss" => DeclaredProtocol::Tls,
        "tcp" | "mongo" | "mysql" | "redis" => DeclaredProtocol::Tcp,
        _ if SERVER_FIRST.contains(&number) => DeclaredProtocol::Tcp,
        _ => DeclaredProtocol::Undeclared,
    }
}

fn states_protocol(port_name: &str) -> bool {
    let prefix = port_name.split('-').next().unwrap_or_default();
    matches!(
        prefix,
        "http" | "http2" | "https" | "grpc" | "tcp" | "tls" | "mongo" | "mysql" | "redis"
    )
}

fn families(declared: &[String], addresses: &[IpAddr]) -> IpFamilies {
    let v4 = declared.iter().any(|f| f == "IPv4") || addresses.iter().any(IpAddr::is_ipv4);
    let v6 = declared.iter().any(|f| f == "IPv6") || addresses.iter().any(IpAddr::is_ipv6);
    match (v4, v6) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}

/// One endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The pod it stands for, in the slice's namespace.
    pub pod: Option<Arc<str>>,
    /// Ready, or not stated.
    pub ready: bool,
    /// Its node; empty: unknown.
    pub node: Arc<str>,
    /// Its zone; empty: unknown.
    pub zone: Arc<str>,
}

/// A TCP port of a slice's endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPort {
    /// Name of the service port that leads to it.
    pub name: Arc<str>,
    /// The port.
    pub number: u16,
}

/// Some of the endpoints of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Metadata.
    pub meta: Meta,
    /// The service, in the slice's namespace; `None`: the slice belongs to none.
    pub service: Option<Arc<str>>,
    /// Endpoints; none for `addressType: FQDN`.
    pub endpoints: Vec<Endpoint>,
    /// Endpoints of which only names are known (`addressType: FQDN`): the mesh cannot send to
    /// them.
    pub named: usize,
    /// TCP ports.
    pub ports: Vec<EndpointPort>,
}

impl EndpointSlice {
    /// Checks and keeps a slice.
    ///
    /// # Errors
    /// Every field that is wrong.
    pub fn parse(slice: discovery::EndpointSlice, origin: Origin) -> Result<Self, Vec<FieldError>> {
        let mut errors = Vec::new();
        let meta = Meta::parse(Kind::EndpointSlice, slice.metadata, origin)
            .map_err(|error| vec![error])?;
        let list = At::ROOT.key("endpoints");
        let mut endpoints = Vec::new();
        let fqdn = slice.address_type == "FQDN";
        for (index, endpoint) in slice.endpoints.iter().enumerate().filter(|_| !fqdn) {
            let at = list.index(index);
            let at = at.key("addresses");
            let mut addresses: Vec<IpAddr> = Vec::new();
            for (index, text) in endpoint.addresses.iter().enumerate() {
                match text.parse() {
                    Ok(ip) => addresses.push(ip),
                    Err(_) => errors.push(
                        at.index(index)
                            .error(format!("{text:?} is not an IP address")),
                    ),
                }
            }
            let target = endpoint.target_ref.as_ref();
            let pod = target.filter(|target| target.kind.as_deref() == Some("Pod"));
            endpoints.push(Endpoint {
                addresses,
                pod: pod.map(|pod| pod.name.as_deref().unwrap_or_default().into()),
                ready: endpoint
                    .conditions
                    .as_ref()
                    .and_then(|conditions| conditions.ready)
                    .unwrap_or(true),
                node: endpoint.node_name.as_deref().unwrap_or_default().into(),
                zone: endpoint.zone.as_deref().unwrap_or_default().into(),
            });
        }
        let ports = slice.ports.iter().flatten();
        let ports = ports
            .filter(|port| matches!(port.protocol.as_deref(), None | Some("" | "TCP")))
            .filter_map(|port| {
                Some(EndpointPort {
                    name: port.name.as_deref().unwrap_or_default().into(),
                    number: u16::try_from(port.port?).ok().filter(|port| *port != 0)?,
                })
            })
            .collect();
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self {
            service: meta.label("kubernetes.io/service-name").map(Arc::from),
            named: if fqdn { slice.endpoints.len() } else { 0 },
            endpoints,
            ports,
            meta,
        })
    }
}
