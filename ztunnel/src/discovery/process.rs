//! From a pod's cgroup to its network namespace, by way of a process.
//!
//! Between any two steps the process may end and its number go to another one, of another
//! pod. So the namespace is opened first, and only then is the process asked whether it is
//! still of this cgroup: what was opened was then its namespace.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use adit_ebpf::{NetnsFd, in_netns};
use nix::ifaddrs::getifaddrs;

use super::DiscoveryError;
use super::cgroups::directories;
use crate::pod::{NetnsId, netns_id};

/// Cgroups of one pod that are looked at: containers, and what they make below themselves.
const MAX_CGROUPS: usize = 256;
/// Processes of one cgroup that are looked at: those of a container share a namespace,
/// except where one made its own.
const MAX_PROCESSES: usize = 32;

/// The namespaces that are no pod's.
#[derive(Debug)]
pub(super) struct NodeNamespaces {
    own: NetnsId,
    /// Of the first process that we see; unknown where we may not look at it.
    node: Option<NetnsId>,
}

impl NodeNamespaces {
    pub(super) fn read() -> io::Result<Self> {
        let id = |path: &str| Ok::<_, io::Error>(netns_id(&std::fs::metadata(path)?));
        Ok(Self {
            own: id("/proc/self/ns/net")?,
            node: id("/proc/1/ns/net").ok(),
        })
    }

    pub(super) fn have(&self, netns: NetnsId) -> bool {
        netns == self.own || Some(netns) == self.node
    }
}

/// The processes of a pod's cgroup and of those below it.
pub(super) struct Processes<'a> {
    cgroup: &'a Path,
    numbers: Vec<u32>,
}

impl<'a> Processes<'a> {
    pub(super) fn of(cgroup: &'a Path) -> Self {
        let mut open = vec![cgroup.to_owned()];
        let mut numbers = Vec::new();
        let mut seen = 0;
        while let Some(directory) = open.pop() {
            seen += 1;
            if seen > MAX_CGROUPS {
                break;
            }
            numbers.extend(members(&directory).into_iter().take(MAX_PROCESSES));
            open.extend(directories(&directory));
        }
        Self { cgroup, numbers }
    }

    /// The namespace with one of `addresses`, or `known` if any process is still in that.
    pub(super) fn find_netns(
        &self,
        node: &NodeNamespaces,
        addresses: &[IpAddr],
        known: Option<NetnsId>,
    ) -> Result<(File, NetnsId), DiscoveryError> {
        let mut error = DiscoveryError::NoProcess(self.cgroup.to_owned());
        let mut judged = HashSet::new();
        let mut candidates = Vec::new();
        for number in &self.numbers {
            let path = PathBuf::from(format!("/proc/{number}/ns/net"));
            let file = match File::open(&path) {
                Ok(file) => file,
                // It has ended.
                Err(e) if is_gone(&e) => continue,
                Err(e) => {
                    error = unreadable(path, &e);
                    continue;
                }
            };
            let Ok(id) = file.metadata().map(|found| netns_id(&found)) else {
                continue;
            };
            if judged.contains(&id) || !is_member(*number, self.cgroup) {
                continue;
            }
            judged.insert(id);
            if node.have(id) {
                error = DiscoveryError::HostNetwork;
                continue;
            }
            if known == Some(id) {
                return Ok((file, id));
            }
            candidates.push((path, file, id));
        }
        for (path, file, id) in candidates {
            match has_address(&file, addresses) {
                Ok(true) => return Ok((file, id)),
                Ok(false) => {
                    if let Some(address) = addresses.first() {
                        error = DiscoveryError::OtherAddress(*address);
                    }
                }
                Err(e) => error = unreadable(path, &e),
            }
        }
        Err(error)
    }
}

fn unreadable(path: PathBuf, error: &io::Error) -> DiscoveryError {
    DiscoveryError::Unreadable {
        path,
        reason: error.to_string(),
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The processes of one cgroup. 0 stands for those of a PID namespace that we do not see.
pub(super) fn members(cgroup: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let numbers = text.lines().filter_map(|line| line.parse().ok());
    numbers.filter(|number| *number != 0).collect()
}

/// Whether a process is in `cgroup` or below. Its own view of the path depends on our cgroup
/// namespace, but not the names at its end.
fn is_member(number: u32, cgroup: &Path) -> bool {
    let Some(pod) = cgroup.file_name().and_then(|name| name.to_str()) else {
        return false;
    };
    cgroup_of(number).is_some_and(|path| path.split('/').any(|part| part == pod))
}

/// The cgroup v2 path of a process, as seen from our cgroup namespace.
fn cgroup_of(number: u32) -> Option<String> {
    cgroup_in(Path::new(&format!("/proc/{number}/cgroup")))
}

/// The cgroup v2 path in a process's file of cgroups.
pub(super) fn cgroup_in(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(path.to_owned())
}

/// Whether an interface of the namespace has one of `addresses`.
pub(crate) fn has_address(netns: &File, addresses: &[IpAddr]) -> io::Result<bool> {
    let netns = NetnsFd::try_from(netns.as_fd().try_clone_to_owned()?)?;
    let found = in_netns(netns.as_fd(), getifaddrs)??;
    let mut found = found.filter_map(|interface| {
        let address = interface.address?;
        match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => Some(IpAddr::from(v4.ip())),
            (_, Some(v6)) => Some(IpAddr::from(v6.ip())),
            _ => None,
        }
    });
    Ok(found.any(|address| addresses.contains(&address)))
}
