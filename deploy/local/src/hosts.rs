//! Names: the `/etc/hosts` and `/etc/resolv.conf` of pods and nodes. They stand in for
//! cluster DNS, with the same names.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;

use crate::address::CONTROL_PLANE;
use crate::cluster::{PodView, ServiceView};

/// The `/etc/hosts` of pods of `namespace`, or of nodes.
///
/// Services by every name that cluster DNS has for them, headless ones with the
/// addresses of their ready pods, and pods by their own names (Kubernetes has none for
/// those, but a laptop's user types them).
pub(crate) fn hosts(namespace: Option<&str>, services: &[ServiceView], pods: &[PodView]) -> String {
    let mut text = String::from(
        "# Written by `adit local`.\n127.0.0.1 localhost\n::1 localhost ip6-localhost\n",
    );
    let _ = writeln!(
        text,
        "{} istiod.istio-system.svc istiod.istio-system.svc.cluster.local aditd",
        CONTROL_PLANE.v4
    );
    for service in services {
        let (own, name) = &service.key;
        let mut names = format!("{name}.{own}.svc.cluster.local {name}.{own}.svc {name}.{own}");
        if Some(own.as_str()) == namespace {
            let _ = write!(names, " {name}");
        }
        for address in service_addresses(service) {
            let _ = writeln!(text, "{address} {names}");
        }
    }
    // The name of a service wins over a pod of the same name.
    let taken: BTreeSet<&str> = services
        .iter()
        .filter(|service| Some(service.key.0.as_str()) == namespace)
        .map(|service| service.key.1.as_str())
        .collect();
    for pod in pods.iter().filter(|pod| !pod.terminating) {
        let (own, name) = &pod.key;
        let mut names = format!("{name}.{own}.pod");
        if Some(own.as_str()) == namespace && !taken.contains(name.as_str()) {
            let _ = write!(names, " {name}");
        }
        let _ = writeln!(text, "{} {names}", pod.addresses.v4);
    }
    text
}

fn service_addresses(service: &ServiceView) -> Vec<IpAddr> {
    let spec = service.object.spec.as_ref();
    let headless = spec.and_then(|s| s.cluster_ip.as_deref()) == Some("None");
    if !headless {
        return service.addresses.clone();
    }
    let targets = service.ports.iter().flat_map(|port| port.targets.iter());
    let mut all: Vec<IpAddr> = targets.map(|target| target.ip()).collect();
    all.sort();
    all.dedup();
    all
}

/// The `/etc/resolv.conf` of pods of `namespace`.
///
/// There is no name server: without one, resolvers ask the pod itself, where nobody
/// listens, and an unknown name fails at once.
pub(crate) fn resolv_conf(namespace: &str) -> String {
    format!(
        "# Written by `adit local`.\n\
         search {namespace}.svc.cluster.local svc.cluster.local cluster.local\n\
         options ndots:5 timeout:1 attempts:1\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{PortView, tests::pod};

    fn service(name: &str, headless: bool) -> ServiceView {
        let ip = if headless { "None" } else { "10.96.1.0" };
        let text = format!("spec: {{clusterIP: {ip}}}");
        ServiceView {
            key: ("shop".into(), name.into()),
            object: serde_yaml_ng::from_str(&text).unwrap_or_default(),
            addresses: if headless {
                vec![]
            } else {
                vec![[10, 96, 1, 0].into()]
            },
            ports: vec![PortView {
                name: None,
                protocol: "TCP".into(),
                port: 80,
                targets: ["10.244.1.2:8080".parse(), "10.244.1.3:8080".parse()]
                    .into_iter()
                    .flatten()
                    .collect(),
            }],
        }
    }

    fn lines_with(text: &str, name: &str) -> Vec<String> {
        let named = |line: &&str| line.split(' ').skip(1).any(|word| word == name);
        let address = |line: &str| line.split(' ').next().unwrap_or("").to_owned();
        text.lines().filter(named).map(address).collect()
    }

    #[test]
    fn services_have_every_name_and_the_short_one_only_at_home() {
        let services = [service("web", false), service("db", true)];
        let pods = [pod("a", 2, true), pod("web", 9, true)];
        let home = hosts(Some("shop"), &services, &pods);
        let away = hosts(Some("other"), &services, &pods);
        for name in ["web.shop", "web.shop.svc", "web.shop.svc.cluster.local"] {
            assert_eq!(lines_with(&home, name), ["10.96.1.0"]);
            assert_eq!(lines_with(&away, name), ["10.96.1.0"]);
        }
        assert_eq!(lines_with(&home, "web"), ["10.96.1.0"]);
        assert_eq!(lines_with(&away, "web"), Vec::<String>::new());
        assert_eq!(lines_with(&home, "db"), ["10.244.1.2", "10.244.1.3"]);
        assert_eq!(lines_with(&home, "a"), ["10.244.1.2"]);
        assert_eq!(lines_with(&away, "a.shop.pod"), ["10.244.1.2"]);
    }
}
