//! Service addresses for traffic that the mesh does not capture: what kube-proxy does
//! in its nftables mode, as one ruleset per node.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use crate::cluster::{PortView, ServiceView};

/// The ruleset for `nft -f -`. It replaces the one before as a whole.
pub(crate) fn ruleset(services: &[ServiceView]) -> String {
    let mut text = String::new();
    for v4 in [true, false] {
        family(services, v4, &mut text);
    }
    text
}

fn family(services: &[ServiceView], v4: bool, out: &mut String) {
    let ip = if v4 { "ip" } else { "ip6" };
    let mut translate = String::new();
    let mut refuse = String::new();
    let mut backends = BTreeSet::new();
    for service in services {
        let _ = writeln!(translate, "  # {}/{}", service.key.0, service.key.1);
        for vip in service.addresses.iter().filter(|vip| vip.is_ipv4() == v4) {
            for port in &service.ports {
                rules(*vip, port, &mut translate, &mut refuse, &mut backends);
            }
        }
    }
    // A pod that reaches itself through a service would see its own address as the
    // peer's and drop the packet.
    let pairs: Vec<String> = backends.iter().map(|ip| format!("{ip} . {ip}")).collect();
    let hairpin = match pairs.is_empty() {
        true => String::new(),
        false => format!(
            "  ct status dnat {ip} saddr . {ip} daddr {{ {} }} masquerade\n",
            pairs.join(", ")
        ),
    };
    let _ = write!(
        out,
        "table {ip} adit-local\n\
         delete table {ip} adit-local\n\
         table {ip} adit-local {{\n \
         chain services {{\n{translate} }}\n \
         chain refused {{\n{refuse} }}\n \
         chain early {{\n  type filter hook prerouting priority -150;\n  jump refused;\n }}\n \
         chain early-output {{\n  type filter hook output priority -150;\n  jump refused;\n }}\n \
         chain prerouting {{\n  type nat hook prerouting priority -100;\n  jump services;\n }}\n \
         chain output {{\n  type nat hook output priority -100;\n  jump services;\n }}\n \
         chain postrouting {{\n  type nat hook postrouting priority 100;\n{hairpin} }}\n}}\n"
    );
}

fn rules(
    vip: IpAddr,
    port: &PortView,
    translate: &mut String,
    refuse: &mut String,
    backends: &mut BTreeSet<IpAddr>,
) {
    let protocol = match port.protocol.as_str() {
        "TCP" => "tcp",
        "UDP" => "udp",
        _ => return,
    };
    let ip = if vip.is_ipv4() { "ip" } else { "ip6" };
    let matches = format!("{ip} daddr {vip} {protocol} dport {}", port.port);
    let targets: Vec<&SocketAddr> = port
        .targets
        .iter()
        .filter(|target| target.is_ipv4() == vip.is_ipv4())
        .collect();
    backends.extend(targets.iter().map(|target| target.ip()));
    match targets.as_slice() {
        [] => {
            let how = match protocol {
                "tcp" => "reject with tcp reset",
                _ => "reject",
            };
            let _ = writeln!(refuse, "  {matches} {how}");
        }
        [one] => {
            let _ = writeln!(translate, "  {matches} dnat to {one}");
        }
        several => {
            let elements = several.iter().enumerate();
            let elements: Vec<String> = elements
                .map(|(index, target)| format!("{index} : {} . {}", target.ip(), target.port()))
                .collect();
            let _ = writeln!(
                translate,
                "  {matches} dnat {ip} to numgen random mod {} map {{ {} }}",
                several.len(),
                elements.join(", ")
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(vips: &[&str], targets: &[&str]) -> ServiceView {
        ServiceView {
            key: ("shop".into(), "web".into()),
            object: Default::default(),
            addresses: vips.iter().filter_map(|ip| ip.parse().ok()).collect(),
            ports: vec![PortView {
                name: None,
                protocol: "TCP".into(),
                port: 80,
                targets: targets.iter().filter_map(|t| t.parse().ok()).collect(),
            }],
        }
    }

    #[test]
    fn rules_for_no_one_and_several_targets() {
        let table = [
            (
                vec![],
                "ip daddr 10.96.1.0 tcp dport 80 reject with tcp reset",
            ),
            (
                vec!["10.244.1.2:8080", "[fd00::1]:8080"],
                "ip daddr 10.96.1.0 tcp dport 80 dnat to 10.244.1.2:8080",
            ),
            (
                vec!["10.244.1.2:8080", "10.244.2.2:81"],
                "ip daddr 10.96.1.0 tcp dport 80 dnat ip to numgen random mod 2 map { 0 : \
                 10.244.1.2 . 8080, 1 : 10.244.2.2 . 81 }",
            ),
        ];
        for (targets, rule) in table {
            let text = ruleset(&[service(&["10.96.1.0"], &targets)]);
            assert!(text.contains(rule), "{rule}\nis not in\n{text}");
        }
    }

    #[test]
    fn families_do_not_mix() {
        let both = ["10.244.1.2:80", "[fd00:10:244:1::2]:80"];
        let text = ruleset(&[service(&["fd00:10:96::100"], &both)]);
        assert!(
            text.contains("ip6 daddr fd00:10:96::100 tcp dport 80 dnat to [fd00:10:244:1::2]:80")
        );
        assert!(!text.contains("ip daddr"));
    }
}
