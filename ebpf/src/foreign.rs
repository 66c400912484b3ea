//! Other programs on the connect hooks: a CNI's socket load balancer replaces a service's address before
//! ztunnel can see it, so that the mesh would know the backend only.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use crate::bpf::{self, AttachType};
use crate::pins::is_cgroup2;

/// A program of somebody else on a connect hook that also runs for the node's pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignProgram {
    /// The kernel's name of it (15 bytes at most).
    pub name: String,
    /// The kernel's id of it, as `bpftool prog` shows.
    pub id: u32,
    /// The cgroup that it is attached to.
    pub cgroup: String,
    /// Whose it is, as far as the name says.
    pub owner: Option<&'static str>,
    /// The setting that keeps it away from the pods' connections.
    pub remedy: &'static str,
}

struct Known {
    name: &'static str,
    owner: &'static str,
    remedy: &'static str,
}

const KNOWN: [Known; 3] = [
    Known {
        name: "cil_sock",
        owner: "Cilium",
        remedy: "set socketLB.hostNamespaceOnly=true in Cilium's Helm values",
    },
    Known {
        name: "sock4_connect",
        owner: "Cilium",
        remedy: "set socketLB.hostNamespaceOnly=true in Cilium's Helm values",
    },
    Known {
        name: "cali",
        owner: "Calico",
        remedy: "set bpfConnectTimeLoadBalancing: Disabled and bpfHostNetworkedNATWithoutCTLB: Enabled in Calico's FelixConfiguration",
    },
];

const UNKNOWN_REMEDY: &str =
    "find out whose it is (bpftool cgroup tree) and whether it rewrites service addresses";

/// The foreign programs on `connect4` and `connect6` of a cgroup and of those above it, which run after
/// ours. Programs of Adit's other nodes on this kernel do not count.
///
/// # Errors
/// When the cgroup cannot be opened or the kernel does not answer the query.
pub fn foreign_programs(cgroup: &Path) -> io::Result<Vec<ForeignProgram>> {
    let mut found = BTreeMap::new();
    let start = cgroup.canonicalize()?;
    for directory in start.ancestors().take_while(|path| is_cgroup2(path)) {
        let file = File::open(directory)?;
        for attach_type in [AttachType::Connect4, AttachType::Connect6] {
            for id in bpf::attached_programs(file.as_fd(), attach_type)? {
                // A program may go while we look.
                let Ok(name) = bpf::program_name(id) else {
                    continue;
                };
                if !name.starts_with("adit_") {
                    found
                        .entry(id)
                        .or_insert_with(|| describe(name, id, directory));
                }
            }
        }
    }
    Ok(found.into_values().collect())
}

fn describe(name: String, id: u32, cgroup: &Path) -> ForeignProgram {
    let known = KNOWN.iter().find(|known| name.starts_with(known.name));
    ForeignProgram {
        id,
        cgroup: cgroup.display().to_string(),
        owner: known.map(|known| known.owner),
        remedy: known.map_or(UNKNOWN_REMEDY, |known| known.remedy),
        name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_balancers_are_known_by_their_names() {
        for (name, owner) in [
            ("cil_sock4_conne", Some("Cilium")),
            ("sock4_connect", Some("Cilium")),
            ("calico_connect_", Some("Calico")),
            ("cali_ctlb_conne", Some("Calico")),
            ("my_firewall", None),
        ] {
            assert_eq!(
                describe(name.to_owned(), 1, Path::new("/")).owner,
                owner,
                "{name}"
            );
        }
    }
}
