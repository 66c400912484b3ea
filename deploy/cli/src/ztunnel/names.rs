//! Names for what a dump mentions by address or by key.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::dump::{Dump, Gateway, is_healthy};

/// Where the control plane sends traffic of a waypoint that cannot be used: nowhere.
const NOT_READY: &str = ".waypoint.invalid";

/// Whether traffic that is sent there fails, for the waypoint cannot be used.
pub fn leads_nowhere(waypoint: &Gateway) -> bool {
    waypoint.destination.ends_with(NOT_READY)
}

/// The names of all services and workloads of a dump.
#[derive(Debug, Default)]
pub struct Names {
    /// What to call a waypoint, by `namespace/hostname` and by `network/address`.
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
            let mut endpoints = service.endpoints.values();
            let shown = match endpoints.any(|endpoint| is_healthy(&endpoint.status)) {
                true => service.name.clone(),
                false => format!("{} (no endpoint)", service.name),
            };
            names.waypoints.insert(key, shown.clone());
            for vip in &service.vips {
                names.waypoints.insert(vip.clone(), shown.clone());
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

    /// The name of a waypoint's service, and why no traffic gets through it where that is
    /// so; `None` without waypoint.
    pub fn waypoint(&self, waypoint: Option<&Gateway>) -> String {
        let Some(Gateway { destination }) = waypoint else {
            return "None".into();
        };
        if let Some(name) = self.waypoints.get(destination) {
            return name.clone();
        }
        let host = address(destination);
        match host.strip_suffix(NOT_READY) {
            Some(waypoint) => {
                let name = waypoint.split_once('.').map_or(waypoint, |(name, _)| name);
                format!("{name} (not ready)")
            }
            None if host.parse::<IpAddr>().is_ok() => format!("{host} (unknown)"),
            None => {
                let name = host.split_once('.').map_or(host, |(name, _)| name);
                format!("{name} (unknown)")
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waypoint_that_takes_no_traffic_says_so() {
        let text = r#"{"services": [
            {"name": "waypoint", "namespace": "shop", "hostname": "waypoint.shop.svc.cluster.local",
                "vips": ["/10.96.0.3"], "endpoints": {"a": {"status": "Unhealthy"}, "b": {}}},
            {"name": "idle", "namespace": "shop", "hostname": "idle.shop.svc.cluster.local",
                "endpoints": {"a": {"status": "Unhealthy"}}}]}"#;
        let names = Names::of(&Dump::parse(text.as_bytes()).expect("a dump"));
        for (destination, expected) in [
            ("shop/waypoint.shop.svc.cluster.local", "waypoint"),
            ("/10.96.0.3", "waypoint"),
            ("shop/idle.shop.svc.cluster.local", "idle (no endpoint)"),
            (
                "shop/waypoint.shop.waypoint.invalid",
                "waypoint (not ready)",
            ),
            ("shop/gone.shop.svc.cluster.local", "gone (unknown)"),
            ("/10.96.9.9", "10.96.9.9 (unknown)"),
        ] {
            let gateway = Gateway {
                destination: destination.into(),
            };
            assert_eq!(names.waypoint(Some(&gateway)), expected);
        }
        assert_eq!(names.waypoint(None), "None");
    }
}
