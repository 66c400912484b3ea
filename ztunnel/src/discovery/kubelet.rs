//! Which cgroup the kubelet is in, for its probes reach pods without the mesh.
//!
//! Kubelets run as a systemd service, in a process together with everything else of the node
//! (k3s), as a container's child (kind). What they have in common is the port that the API
//! server calls them on: whoever listens there is the kubelet. A kubelet that listens
//! nowhere is looked for by its name.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use adit_ebpf::{NetnsFd, Redirector};
use parking_lot::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};

use super::cgroups::{directories, kubepods};
use super::process::{cgroup_of, members};

/// How often the kubelet is looked at: a probe that fails is repeated after a second or more.
const LOOK: Duration = Duration::from_millis(500);
/// Cgroups that are searched for the kubelet when its own path does not lead to it.
const MAX_SEARCHED: usize = 4096;
/// `TCP_LISTEN` in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// The node's kubelet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubelet {
    /// Process id.
    pub process: u32,
    /// Its cgroup v2 directory.
    pub cgroup: PathBuf,
    /// The cookie of its network namespace.
    pub netns: u64,
    /// The cgroup holds the node's pods as well: only the network namespace tells the
    /// kubelet from them, and pods of the node's own network are taken for it.
    pub shares_with_pods: bool,
}

/// Why it is not known.
#[derive(Debug, Clone, thiserror::Error)]
pub enum KubeletError {
    /// No process is one.
    #[error("no process listens on port {0} of the node, and none is called kubelet")]
    NoProcess(u16),
    /// It is in none of the cgroups that can be seen.
    #[error("process {process} is the kubelet, but in no cgroup below {hierarchy}")]
    NoCgroup {
        /// Its number.
        process: u32,
        /// Where it was looked for.
        hierarchy: PathBuf,
    },
    /// Its network namespace could not be read.
    #[error("network namespace of process {process}, the kubelet: {reason}")]
    Netns {
        /// Its number.
        process: u32,
        /// The kernel's reason.
        reason: String,
    },
}

/// Finds the kubelet among the processes of this PID namespace, which must be the node's.
/// `hierarchy` is the node's cgroup v2 root.
///
/// # Errors
/// [`KubeletError`]; it may come later.
pub fn find_kubelet(hierarchy: &Path, port: u16) -> Result<Kubelet, KubeletError> {
    let process = listener(port)
        .or_else(by_name)
        .ok_or(KubeletError::NoProcess(port))?;
    let cgroup = directory_of(process, hierarchy).ok_or_else(|| KubeletError::NoCgroup {
        process,
        hierarchy: hierarchy.to_owned(),
    })?;
    let netns = NetnsFd::open(format!("/proc/{process}/ns/net"))
        .and_then(|netns| netns.cookie())
        .map_err(|e| KubeletError::Netns {
            process,
            reason: e.to_string(),
        })?;
    let shares_with_pods =
        kubepods(hierarchy).map_or(cgroup == hierarchy, |pods| pods.starts_with(&cgroup));
    Ok(Kubelet {
        process,
        cgroup,
        netns,
        shares_with_pods,
    })
}

/// Keeps the way of the kubelet's probes open: looks for a kubelet that restarts, or that was
/// not there. Runs until dropped.
pub async fn follow_kubelet(redirector: Arc<Mutex<Redirector>>, hierarchy: PathBuf, port: u16) {
    let mut known: Option<Kubelet> = None;
    let mut complained = None;
    loop {
        let (redirector, hierarchy, last) = (redirector.clone(), hierarchy.clone(), known.clone());
        let looked = spawn_blocking(move || {
            // What is still there has not moved: a process stays in its cgroup.
            if let Some(last) = last
                && members(&last.cgroup).contains(&last.process)
            {
                return Ok(last);
            }
            let found = find_kubelet(&hierarchy, port).map_err(|e| e.to_string())?;
            redirector
                .lock()
                .set_kubelet(&found.cgroup, Some(found.netns))
                .map_err(|e| e.to_string())?;
            Ok(found)
        });
        let looked = looked.await.map_err(|e| e.to_string()).flatten();
        match looked {
            Ok(found) => {
                if known.as_ref() != Some(&found) {
                    info!(process = found.process, cgroup = %found.cgroup.display(), "the kubelet's probes pass");
                    if found.shares_with_pods {
                        warn!(
                            "the kubelet's cgroup holds pods as well: connections of pods with hostNetwork \
                             to pods of this node pass like probes (start the kubelet in a cgroup of its own)"
                        );
                    }
                }
                complained = None;
                known = Some(found);
            }
            Err(e) => {
                if complained.as_ref() != Some(&e) {
                    warn!("probes of pods may fail: {e}");
                }
                complained = Some(e);
                known = None;
            }
        }
        sleep(LOOK).await;
    }
}

/// The process that listens on `port` in the node's network namespace.
fn listener(port: u16) -> Option<u32> {
    let sockets: HashSet<String> = ["tcp", "tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(format!("/proc/1/net/{table}")).ok())
        .flat_map(|table| listening(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if sockets.is_empty() {
        return None;
    }
    let holds = |process: &u32| {
        let files = std::fs::read_dir(format!("/proc/{process}/fd"));
        files.into_iter().flatten().flatten().any(|file| {
            std::fs::read_link(file.path())
                .is_ok_and(|target| target.to_str().is_some_and(|text| sockets.contains(text)))
        })
    };
    processes().into_iter().find(holds)
}

/// Inodes of the sockets that listen on `port`, of a table in the form of `/proc/net/tcp`.
fn listening(table: &str, port: u16) -> Vec<u64> {
    let inode = |line: &str| {
        let mut fields = line.split_whitespace();
        let local = fields.nth(1)?;
        let state = fields.nth(1)?;
        let (_, local_port) = local.rsplit_once(':')?;
        let inode = fields.nth(5)?;
        (state == LISTEN && u16::from_str_radix(local_port, 16) == Ok(port))
            .then(|| inode.parse().ok())
            .flatten()
    };
    table.lines().skip(1).filter_map(inode).collect()
}

fn by_name() -> Option<u32> {
    let is_kubelet = |process: &u32| {
        std::fs::read_to_string(format!("/proc/{process}/comm"))
            .is_ok_and(|name| name.trim() == "kubelet")
    };
    processes().into_iter().find(is_kubelet)
}

fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// The directory of a process's cgroup. What `/proc` says is relative to our own cgroup
/// namespace; the names at its end lead there in most cases, a search in all others.
fn directory_of(process: u32, hierarchy: &Path) -> Option<PathBuf> {
    let holds = |path: &Path| members(path).contains(&process);
    let path = cgroup_of(process)?;
    let named: PathBuf = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != "..")
        .collect();
    let guess = hierarchy.join(named);
    if holds(&guess) {
        // Without the slash that joining nothing leaves.
        return Some(guess.components().collect());
    }
    let pods = kubepods(hierarchy);
    let mut open = vec![hierarchy.to_owned()];
    let mut searched = 0;
    while let Some(directory) = open.pop() {
        searched += 1;
        if searched > MAX_SEARCHED {
            return None;
        }
        if holds(&directory) {
            return Some(directory);
        }
        let below = directories(&directory).into_iter();
        open.extend(below.filter(|path| Some(path) != pods.as_ref()));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_read_from_the_kernels_table() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:280A 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0
   1: 0100007F:280A 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0 0 10 0
   2: 00000000:280B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0 100 0 0 10 0
   3: broken";
        assert_eq!(listening(table, 10250), [4711]);
        assert!(listening("", 10250).is_empty());
    }

    #[test]
    fn a_process_that_listens_is_found_with_its_cgroup() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("bound").port();
        // Only where this test shares the first process's network namespace.
        let id = |path| std::fs::read_link(path).ok();
        if id("/proc/self/ns/net") != id("/proc/1/ns/net") {
            return;
        }
        let hierarchy = adit_ebpf::cgroup2_mount().expect("cgroup v2");
        let found = find_kubelet(&hierarchy, port).expect("found");
        assert_eq!(found.process, std::process::id());
        assert!(members(&found.cgroup).contains(&std::process::id()));
        let own = NetnsFd::current().and_then(|netns| netns.cookie());
        assert_eq!(found.netns, own.expect("a cookie"));
    }
}
