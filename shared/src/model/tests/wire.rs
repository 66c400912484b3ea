//! Short ways to write workloads and services as they come over the wire.

use std::net::IpAddr;

use crate::model::{Service, Store, Update, Workload};
use crate::proto::workload::{self as proto, gateway_address::Destination};

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(super) fn bytes(text: &str) -> Vec<u8> {
    match ip(text) {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A pod `namespace/name` that speaks HBONE.
pub(super) fn pod(namespace: &str, name: &str, addresses: &[&str]) -> proto::Workload {
    proto::Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}"),
        name: name.into(),
        namespace: namespace.into(),
        addresses: addresses.iter().map(|text| bytes(text)).collect(),
        tunnel_protocol: proto::TunnelProtocol::Hbone.into(),
        service_account: name.into(),
        ..Default::default()
    }
}

pub(super) fn ports(pairs: &[(u32, u32)]) -> Vec<proto::Port> {
    let port = |&(service_port, target_port): &(u32, u32)| proto::Port {
        service_port,
        target_port,
        app_protocol: 0,
    };
    pairs.iter().map(port).collect()
}

/// Makes `workload` an endpoint of `namespace/hostname`.
pub(super) fn member(
    mut workload: proto::Workload,
    service: &str,
    pairs: &[(u32, u32)],
) -> proto::Workload {
    let ports = proto::PortList {
        ports: ports(pairs),
    };
    workload.services.insert(service.into(), ports);
    workload
}

/// A service `namespace/hostname` with VIPs and blocks on the default network and port
/// 80 to 8080.
pub(super) fn service(namespace: &str, hostname: &str, addresses: &[&str]) -> proto::Service {
    proto::Service {
        name: hostname.split('.').next().unwrap_or_default().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        addresses: addresses.iter().map(|text| block("", text)).collect(),
        ports: ports(&[(80, 8080)]),
        ..Default::default()
    }
}

pub(super) fn block(network: &str, text: &str) -> proto::NetworkAddress {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse().expect("a length"))),
        None => (text, None),
    };
    proto::NetworkAddress {
        network: network.into(),
        address: bytes(address),
        length,
    }
}

pub(super) fn gateway_host(name: &str) -> Option<proto::GatewayAddress> {
    let (namespace, hostname) = name.split_once('/').expect("namespace/hostname");
    gateway(Destination::Hostname(proto::NamespacedHostname {
        namespace: namespace.into(),
        hostname: hostname.into(),
    }))
}

pub(super) fn gateway_ip(network: &str, address: &str) -> Option<proto::GatewayAddress> {
    gateway(Destination::Address(block(network, address)))
}

fn gateway(destination: Destination) -> Option<proto::GatewayAddress> {
    Some(proto::GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: 15008,
    })
}

pub(super) fn workload_update(wire: proto::Workload) -> Update {
    Update::UpsertWorkload(Workload::try_from(&wire).expect("a workload"))
}

pub(super) fn service_update(wire: proto::Service) -> Update {
    Update::UpsertService(Service::try_from(&wire).expect("a service"))
}

pub(super) fn store(
    workloads: impl IntoIterator<Item = proto::Workload>,
    services: impl IntoIterator<Item = proto::Service>,
) -> Store {
    let mut store = Store::new();
    let workloads = workloads.into_iter().map(workload_update);
    store.apply(workloads.chain(services.into_iter().map(service_update)));
    store
}
