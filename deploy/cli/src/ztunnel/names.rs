//! Names for what a dump mentions by address or by key.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::dump::{Dump, Gateway};

/// The names of all services and workloads of a dump.
#[derive(Debug, Default)]
pub struct Names {
    /// Service names by `namespace/hostname` and by `network/address`.
    waypoints: HashMap<String, String>,
    services: HashMap<IpAddr, String>,
    workloads: HashMap<IpAddr, String>,
}

impl Names {
    /// From a whole dump, before anything is filtered.
    pub fn of(dump: &Dump) -> Self {
        let mut names = Self::default();
        for service in dump.services.iter().map(|entry| &entry.view) {
            let key = format!("{}/{}", service.namespace, service.hostname);
            names.waypoints.insert(key, service.name.clone());
            for vip in &service.vips {
                names.waypoints.insert(vip.clone(), service.name.clone());
                if let Ok(ip) = address(vip).parse() {
                    names.services.insert(ip, service.hostname.clone());
                }
            }
        }
        for workload in dump.workloads.iter().map(|entry| &entry.view) {
            let name = format!("{}.{}", workload.name, workload.namespace);
            for ip in workload
                .workload_ips
                .iter()
                .filter_map(|ip| ip.parse().ok())
            {
                names.workloads.insert(ip, name.clone());
            }
        }
        names
    }

    /// The name of a waypoint's service; `None` without waypoint, and `NA` for one that
    /// ztunnel does not know, as istioctl has it.
    pub fn waypoint(&self, waypoint: Option<&Gateway>) -> &str {
        waypoint.map_or("None", |waypoint| {
            let name = self.waypoints.get(&waypoint.destination);
            name.map_or("NA", String::as_str)
        })
    }

    /// `address:port` with the name of the service or workload in place of the address.
    pub fn peer(&self, address: &str) -> String {
        let Ok(parsed) = address.parse::<SocketAddr>() else {
            return address.to_owned();
        };
        let ip = parsed.ip().to_canonical();
        match self.services.get(&ip).or_else(|| self.workloads.get(&ip)) {
            Some(name) => format!("{name}:{}", parsed.port()),
            None => address.to_owned(),
        }
    }
}

/// The address of `network/address`; the network may be empty.
pub fn address(network_address: &str) -> &str {
    network_address
        .split_once('/')
        .map_or(network_address, |(_, address)| address)
}
