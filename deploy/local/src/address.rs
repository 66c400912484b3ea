//! Which address everything has. The same in every mesh: all of them exist only
//! inside the mesh's own namespaces.
//!
//! The ranges are those of a kind cluster: nodes in 172.18.0.0/16, pods of node n in
//! 10.244.n.0/24, services in 10.96.0.0/16; for IPv6 fd00:172:18::/64,
//! fd00:10:244:n::/64 and fd00:10:96::/112.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The most virtual nodes a mesh can have; the third byte of a pod's address is the node.
pub const MAX_NODES: usize = 250;

/// The pair that a dual-stack thing has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pair {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl Pair {
    /// Both, IPv4 first, as a pod's `status.podIPs` lists them.
    pub fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// The fabric's own address: the nodes' default route, which leads nowhere.
pub const FABRIC: Pair = Pair {
    v4: Ipv4Addr::new(172, 18, 0, 1),
    v6: Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 1),
};

/// The control plane's address.
pub const CONTROL_PLANE: Pair = Pair {
    v4: Ipv4Addr::new(172, 18, 0, 2),
    v6: Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 2),
};

/// Address of the node with this index (from 0).
pub fn node(index: u8) -> Pair {
    let host = u16::from(index) + 10;
    Pair {
        v4: Ipv4Addr::new(172, 18, (host >> 8) as u8, (host & 0xff) as u8),
        v6: Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, host),
    }
}

/// Address `host` in the pod range of the node; 1 is the node's bridge.
pub fn pod(node: u8, host: u8) -> Pair {
    let group = node + 1;
    Pair {
        v4: Ipv4Addr::new(10, 244, group, host),
        v6: Ipv6Addr::new(
            0xfd00,
            0x10,
            0x244,
            u16::from(group),
            0,
            0,
            0,
            u16::from(host),
        ),
    }
}

/// The pod ranges of a node, IPv4 first.
pub fn pod_cidrs(node: u8) -> [String; 2] {
    let base = pod(node, 0);
    [format!("{}/24", base.v4), format!("{}/64", base.v6)]
}

/// The host parts of one node's pod range that are in use.
#[derive(Debug)]
pub struct PodAddresses {
    node: u8,
    used: [bool; 256],
    next: u8,
}

impl PodAddresses {
    /// An empty range of the node.
    pub fn new(node: u8) -> Self {
        let mut used = [false; 256];
        for reserved in [0, 1, 255] {
            used[reserved] = true;
        }
        Self {
            node,
            used,
            next: 2,
        }
    }

    /// A free address, `None` when all 253 are taken. Goes round, so that the address
    /// of a pod that just went is not the next one's: a stale connection must fail,
    /// not reach somebody else.
    pub fn allocate(&mut self) -> Option<Pair> {
        for step in 0..=255u8 {
            let host = self.next.wrapping_add(step);
            if !self.used[usize::from(host)] {
                self.used[usize::from(host)] = true;
                self.next = host.wrapping_add(1);
                return Some(pod(self.node, host));
            }
        }
        None
    }

    /// Gives an address back.
    pub fn release(&mut self, pair: Pair) {
        let host = pair.v4.octets()[3];
        if !matches!(host, 0 | 1 | 255) {
            self.used[usize::from(host)] = false;
        }
    }
}

/// Which service has which cluster addresses. An address, once given, stays with the
/// service's name as long as the mesh lives.
#[derive(Debug, Default)]
pub struct ServiceAddresses {
    hosts: BTreeMap<String, u16>,
    next: u16,
}

impl ServiceAddresses {
    /// The addresses of the service with this key; `taken` says which ones users fixed
    /// by hand. `None` when the range is used up.
    pub fn get(&mut self, key: &str, taken: impl Fn(IpAddr) -> bool) -> Option<Pair> {
        if let Some(host) = self.hosts.get(key) {
            return Some(service(*host));
        }
        loop {
            // 0.1 is the API server's by custom, 0.10 the cluster DNS'.
            let host = self.next.max(0x0100);
            if host == u16::MAX {
                return None;
            }
            self.next = host + 1;
            let pair = service(host);
            if !pair.both().into_iter().any(&taken) {
                self.hosts.insert(key.into(), host);
                return Some(pair);
            }
        }
    }
}

fn service(host: u16) -> Pair {
    Pair {
        v4: Ipv4Addr::new(10, 96, (host >> 8) as u8, (host & 0xff) as u8),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_released_pod_address_is_not_the_next_one() {
        let mut range = PodAddresses::new(0);
        let first = range.allocate().map(|p| p.v4);
        assert_eq!(first, Some(Ipv4Addr::new(10, 244, 1, 2)));
        let second = range.allocate().unwrap_or(FABRIC);
        range.release(second);
        let third = range.allocate().map(|p| p.v4);
        assert_eq!(third, Some(Ipv4Addr::new(10, 244, 1, 4)));
    }

    #[test]
    fn a_full_pod_range_says_so_and_recovers() {
        let mut range = PodAddresses::new(7);
        let all: Vec<Pair> = std::iter::from_fn(|| range.allocate()).collect();
        assert_eq!(all.len(), 253);
        assert!(range.allocate().is_none());
        range.release(all[100]);
        assert_eq!(range.allocate(), Some(all[100]));
    }

    #[test]
    fn services_keep_their_address_and_avoid_fixed_ones() {
        let mut services = ServiceAddresses::default();
        let fixed: IpAddr = Ipv4Addr::new(10, 96, 1, 0).into();
        let a = services.get("ns/a", |ip| ip == fixed);
        let b = services.get("ns/b", |_| false);
        assert_eq!(a.map(|p| p.v4), Some(Ipv4Addr::new(10, 96, 1, 1)));
        assert_ne!(a, b);
        assert_eq!(services.get("ns/a", |_| true), a);
    }

    #[test]
    fn nodes_do_not_meet_the_fabric_or_the_control_plane() {
        let first = node(0);
        let last = node(249);
        assert_eq!(first.v4, Ipv4Addr::new(172, 18, 0, 10));
        assert_eq!(last.v4, Ipv4Addr::new(172, 18, 1, 3));
    }
}
