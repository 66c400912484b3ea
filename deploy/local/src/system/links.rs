//! The wires: bridges, veths, addresses and routes, written as `ip -batch` commands.
//!
//! A pod has a host address (/32, /128) and its node as the way to everything, also to
//! the pod beside it: so every packet of a service address and every answer passes the
//! node's address translation, whatever the bridge would do with it.

use std::fmt::Write;
use std::path::Path;

use super::helper::{ip, ip_all};
use super::layout::Layout;
use super::netns::{self, Sysctl};
use crate::address::{self, CONTROL_PLANE, FABRIC, Pair};
use crate::error::LocalError;

/// Bridge of a node that its pods are attached to.
const NODE_BRIDGE: &str = "pods";
/// Bridge of the fabric that the nodes are attached to.
const FABRIC_BRIDGE: &str = "fabric";
const MTU: u32 = 1500;

/// Congestion control that namespaces get in place of the machine's default; `None`
/// leaves it.
pub(crate) type CongestionControl<'a> = Option<&'a str>;

/// Makes the fabric.
pub(crate) fn create_fabric(layout: &Layout) -> Result<(), LocalError> {
    let netns = layout.fabric_netns();
    netns::create(&netns, &router_sysctls(None))?;
    let mut batch = bridge(FABRIC_BRIDGE, "02:ad:17:00:00:01");
    address(&mut batch, FABRIC_BRIDGE, FABRIC, (16, 64));
    ip(&netns, "the fabric", &batch)
}

/// Makes the control plane's namespace and attaches it to the fabric.
pub(crate) fn create_control_plane(layout: &Layout) -> Result<(), LocalError> {
    let netns = layout.aditd_netns();
    netns::create(&netns, &pod_sysctls(None))?;
    attach_to_fabric(layout, &netns, "aditd", CONTROL_PLANE)
}

/// Makes a node and attaches it to the fabric.
pub(crate) fn create_node(
    layout: &Layout,
    node: &str,
    index: u8,
    congestion: CongestionControl<'_>,
) -> Result<(), LocalError> {
    let netns = layout.node_netns(node);
    netns::create(&netns, &router_sysctls(congestion))?;
    attach_to_fabric(layout, &netns, &format!("n{index}"), address::node(index))?;
    let mut batch = bridge(NODE_BRIDGE, "02:ad:17:00:01:01");
    address(&mut batch, NODE_BRIDGE, address::pod(index, 1), (24, 64));
    ip(&netns, &format!("node {node}"), &batch)
}

/// Tells every node, and the fabric, which node has which pods.
pub(crate) fn route_nodes(layout: &Layout, nodes: &[String]) -> Result<(), LocalError> {
    let routes = |own: Option<usize>| {
        let mut batch = String::new();
        for index in (0..nodes.len()).filter(|index| Some(*index) != own) {
            let index = index as u8;
            let via = address::node(index);
            let [v4, v6] = address::pod_cidrs(index);
            let _ = writeln!(batch, "route add {v4} via {}", via.v4);
            let _ = writeln!(batch, "route add {v6} via {}", via.v6);
        }
        batch
    };
    ip(&layout.fabric_netns(), "the fabric's routes", &routes(None))?;
    for (index, node) in nodes.iter().enumerate() {
        let what = format!("the routes of node {node}");
        ip(&layout.node_netns(node), &what, &routes(Some(index)))?;
    }
    Ok(())
}

/// Makes a pod's namespace and attaches it to its node.
pub(crate) fn create_pod(
    layout: &Layout,
    node: (&str, u8),
    uid: &str,
    addresses: Pair,
    congestion: CongestionControl<'_>,
) -> Result<(), LocalError> {
    let (node, index) = node;
    let netns = layout.pod_netns(uid);
    let what = format!("pod {uid}");
    netns::create(&netns, &pod_sysctls(congestion))?;
    let link = link_name(uid);
    let batch = format!(
        "link add {link} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {}\n\
         link set {link} master {NODE_BRIDGE} up\n\
         route add {}/32 dev {NODE_BRIDGE}\n\
         route add {}/128 dev {NODE_BRIDGE}\n",
        netns.display(),
        addresses.v4,
        addresses.v6,
    );
    ip(&layout.node_netns(node), &what, &batch)?;
    let gateway = address::pod(index, 1);
    let mut batch = String::from("link set lo up\nlink set eth0 up\n");
    let _ = writeln!(batch, "address add {}/32 dev eth0", addresses.v4);
    let _ = writeln!(batch, "address add {}/128 dev eth0 nodad", addresses.v6);
    let _ = writeln!(batch, "route add {} dev eth0 scope link", gateway.v4);
    let _ = writeln!(
        batch,
        "route add default via {} dev eth0 src {}",
        gateway.v4, addresses.v4
    );
    let _ = writeln!(batch, "route add {}/128 dev eth0", gateway.v6);
    let _ = writeln!(batch, "route add default via {} dev eth0", gateway.v6);
    ip(&netns, &what, &batch)
}

/// Detaches a pod from its node and lets go of its namespace.
pub(crate) fn remove_pod(
    layout: &Layout,
    node: &str,
    uid: &str,
    addresses: Pair,
) -> Result<(), LocalError> {
    let batch = format!(
        "link del {}\nroute del {}/32 dev {NODE_BRIDGE}\nroute del {}/128 dev {NODE_BRIDGE}\n",
        link_name(uid),
        addresses.v4,
        addresses.v6
    );
    let detached = ip_all(&layout.node_netns(node), &format!("pod {uid}"), &batch);
    netns::remove(&layout.pod_netns(uid))?;
    detached
}

/// The node's end of a pod's wire. Unique within the node, which is all it must be.
fn link_name(uid: &str) -> String {
    let digits: String = uid.chars().filter(|c| *c != '-').take(11).collect();
    format!("veth{digits}")
}

fn attach_to_fabric(
    layout: &Layout,
    netns: &Path,
    port: &str,
    own: Pair,
) -> Result<(), LocalError> {
    let batch = format!(
        "link add {port} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {}\n\
         link set {port} master {FABRIC_BRIDGE} up\n",
        netns.display()
    );
    ip(&layout.fabric_netns(), port, &batch)?;
    let mut batch = String::from("link set lo up\nlink set eth0 up\n");
    address(&mut batch, "eth0", own, (16, 64));
    let _ = writeln!(batch, "route add default via {}", FABRIC.v4);
    let _ = writeln!(batch, "route add default via {}", FABRIC.v6);
    ip(netns, port, &batch)
}

/// A bridge with a fixed address: by default it changes with the ports, and neighbours
/// would keep the old one.
fn bridge(name: &str, mac: &str) -> String {
    format!(
        "link set lo up\n\
         link add {name} address {mac} mtu {MTU} type bridge mcast_snooping 0\n\
         link set {name} up\n"
    )
}

fn address(batch: &mut String, device: &str, pair: Pair, lengths: (u8, u8)) {
    let _ = writeln!(batch, "address add {}/{} dev {device}", pair.v4, lengths.0);
    let _ = writeln!(
        batch,
        "address add {}/{} dev {device} nodad",
        pair.v6, lengths.1
    );
}

fn pod_sysctls(congestion: CongestionControl<'_>) -> Vec<Sysctl> {
    let mut all = vec![
        Sysctl::optional("ipv6/conf/all/disable_ipv6", "0"),
        Sysctl::optional("ipv6/conf/default/disable_ipv6", "0"),
        // An address that is being checked for duplicates cannot be used for a second.
        Sysctl::optional("ipv6/conf/all/accept_dad", "0"),
        Sysctl::optional("ipv6/conf/default/accept_dad", "0"),
        Sysctl::optional("ipv6/conf/all/accept_ra", "0"),
        Sysctl::optional("ipv6/conf/default/accept_ra", "0"),
        // The node sees that a packet leaves by the bridge it came from and tells the pod
        // a shorter way, which is past the translation of service addresses.
        Sysctl::optional("ipv6/conf/all/accept_redirects", "0"),
        Sysctl::optional("ipv6/conf/default/accept_redirects", "0"),
        Sysctl::new("ipv4/conf/all/accept_redirects", "0"),
        Sysctl::new("ipv4/conf/default/accept_redirects", "0"),
    ];
    if let Some(name) = congestion {
        all.push(Sysctl::optional("ipv4/tcp_congestion_control", name));
    }
    all
}

fn router_sysctls(congestion: CongestionControl<'_>) -> Vec<Sysctl> {
    let mut all = pod_sysctls(congestion);
    all.extend([
        Sysctl::new("ipv4/ip_forward", "1"),
        Sysctl::optional("ipv6/conf/all/forwarding", "1"),
        Sysctl::new("ipv4/conf/all/rp_filter", "0"),
        Sysctl::new("ipv4/conf/default/rp_filter", "0"),
        // Two pods of a node talk through the bridge's own address on purpose.
        Sysctl::new("ipv4/conf/all/send_redirects", "0"),
        Sysctl::new("ipv4/conf/default/send_redirects", "0"),
        Sysctl::optional("bridge/bridge-nf-call-iptables", "0"),
        Sysctl::optional("bridge/bridge-nf-call-ip6tables", "0"),
    ]);
    all
}
