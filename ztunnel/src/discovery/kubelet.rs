//! Which cgroup the kubelet is in, for its probes reach pods without the mesh.
//!
//! Kubelets run as a systemd service, in a process together with everything else of the node
//! (k3s), as a container's child (kind). What they have in common is the port that the API
//! server calls them on: whoever listens there is the kubelet. A kubelet that listens
//! nowhere is looked for by its name.
//!
//! Whoever is taken for the kubelet goes around the mesh, and any pod may call a process
//! "kubelet". So only a process of the node is believed: one in its network namespace and in
//! no pod's cgroup. One that only has the name is looked for again each time: another may
//! listen by then.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use adit_ebpf::{NetnsFd, Redirector};
use parking_lot::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};

use super::cgroups::{directories, kubepods, pod_uid};
use super::process::{cgroup_in, members};
use crate::pod::netns_id;

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
    /// Nobody listens on its port: it is known by its name alone, until somebody does.
    pub by_name: bool,
}

/// Why it is not known.
#[derive(Debug, Clone, thiserror::Error)]
pub enum KubeletError {
    /// No process is one. Those of pods do not count, nor those of other networks.
    #[error("no process of the node listens on port {0}, and none is called kubelet")]
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
    NodeProcesses::new("/proc").find_kubelet(hierarchy, port)
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
            if let Some(last) = &last
                && !last.by_name
                && members(&last.cgroup).contains(&last.process)
            {
                return Ok(last.clone());
            }
            let found = find_kubelet(&hierarchy, port).map_err(|e| e.to_string())?;
            if last.as_ref() == Some(&found) {
                return Ok(found);
            }
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

/// The processes of the node's PID namespace, as a proc file system shows them.
struct NodeProcesses {
    proc: PathBuf,
}

impl NodeProcesses {
    fn new(proc: impl Into<PathBuf>) -> Self {
        Self { proc: proc.into() }
    }

    fn find_kubelet(&self, hierarchy: &Path, port: u16) -> Result<Kubelet, KubeletError> {
        let (process, by_name) = match self.listener(port) {
            Some(process) => (process, false),
            None => (self.named().ok_or(KubeletError::NoProcess(port))?, true),
        };
        let cgroup =
            self.directory_of(process, hierarchy)
                .ok_or_else(|| KubeletError::NoCgroup {
                    process,
                    hierarchy: hierarchy.to_owned(),
                })?;
        // The node's own, and that of no process that has got the number since.
        let netns = NetnsFd::open(self.of(1, "ns/net"))
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
            by_name,
        })
    }

    /// The process of the node that listens on `port` in its network namespace.
    fn listener(&self, port: u16) -> Option<u32> {
        let sockets: HashSet<String> = ["net/tcp", "net/tcp6"]
            .iter()
            .filter_map(|table| std::fs::read_to_string(self.of(1, table)).ok())
            .flat_map(|table| listening(&table, port))
            .map(|inode| format!("socket:[{inode}]"))
            .collect();
        if sockets.is_empty() {
            return None;
        }
        let holds = |process: &u32| {
            let files = std::fs::read_dir(self.of(*process, "fd"));
            files.into_iter().flatten().flatten().any(|file| {
                std::fs::read_link(file.path())
                    .is_ok_and(|target| target.to_str().is_some_and(|text| sockets.contains(text)))
            })
        };
        self.all()
            .find(|process| holds(process) && self.is_the_nodes(*process))
    }

    fn named(&self) -> Option<u32> {
        let is_called_kubelet = |process: &u32| {
            std::fs::read_to_string(self.of(*process, "comm"))
                .is_ok_and(|name| name.trim() == "kubelet")
        };
        self.all()
            .find(|process| is_called_kubelet(process) && self.is_the_nodes(*process))
    }

    /// Whether a process is in the node's network namespace and in no pod's cgroup. What
    /// cannot be read is not.
    fn is_the_nodes(&self, process: u32) -> bool {
        let netns = |process| {
            let found = std::fs::metadata(self.of(process, "ns/net")).ok()?;
            Some(netns_id(&found))
        };
        netns(1).is_some_and(|node| netns(process) == Some(node))
            && self
                .cgroup_of(process)
                .is_some_and(|path| !is_of_a_pod(Path::new(&path)))
    }

    /// The directory of a process's cgroup; none if it is a pod's. What `/proc` says is
    /// relative to our own cgroup namespace; the names at its end lead there in most cases, a
    /// search in all others.
    fn directory_of(&self, process: u32, hierarchy: &Path) -> Option<PathBuf> {
        let holds = |path: &Path| members(path).contains(&process);
        let path = self.cgroup_of(process)?;
        let named: PathBuf = path
            .split('/')
            .filter(|part| !part.is_empty() && *part != "..")
            .collect();
        let guess = hierarchy.join(&named);
        if !is_of_a_pod(&named) && holds(&guess) {
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
            let is_the_nodes = |path: &PathBuf| {
                Some(path) != pods.as_ref()
                    && !path.file_name().map(Path::new).is_some_and(is_of_a_pod)
            };
            open.extend(below.filter(is_the_nodes));
        }
        None
    }

    fn cgroup_of(&self, process: u32) -> Option<String> {
        cgroup_in(&self.of(process, "cgroup"))
    }

    fn all(&self) -> impl Iterator<Item = u32> {
        let entries = std::fs::read_dir(&self.proc)
            .into_iter()
            .flatten()
            .flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
    }

    fn of(&self, process: u32, file: &str) -> PathBuf {
        self.proc.join(process.to_string()).join(file)
    }
}

/// Whether a cgroup is a pod's, or below one.
fn is_of_a_pod(cgroup: &Path) -> bool {
    cgroup
        .iter()
        .any(|name| name.to_str().and_then(pod_uid).is_some())
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

    /// A node's proc file system and cgroups, in directories.
    struct Node(tempfile::TempDir);

    const POD: &str = "kubepods/burstable/pod0b2c5f3e-7c1a-4d0e-9f53-0f6b0c6d5a11/a";

    impl Node {
        fn new() -> Self {
            let node = Self(tempfile::tempdir().expect("a directory"));
            node.start(1, "init", "/", own_netns());
            node.listens(0);
            std::fs::create_dir_all(node.hierarchy().join("kubepods/burstable")).expect("made");
            node
        }

        fn hierarchy(&self) -> PathBuf {
            self.0.path().join("cgroup")
        }

        fn start(&self, process: u32, name: &str, cgroup: &str, netns: PathBuf) {
            let at = |file: &str| self.0.path().join(format!("proc/{process}/{file}"));
            for directory in ["ns", "fd", "net"] {
                std::fs::create_dir_all(at(directory)).expect("made");
            }
            std::fs::write(at("comm"), format!("{name}\n")).expect("written");
            std::fs::write(at("cgroup"), format!("1:name=systemd:/\n0::{cgroup}\n"))
                .expect("written");
            // The namespace itself is what the kernel says it is.
            std::os::unix::fs::symlink(netns, at("ns/net")).expect("linked");
            std::os::unix::fs::symlink(format!("socket:[{process}]"), at("fd/3")).expect("linked");
            let cgroup = self.hierarchy().join(cgroup.trim_start_matches('/'));
            std::fs::create_dir_all(&cgroup).expect("made");
            let members = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            std::fs::write(cgroup.join("cgroup.procs"), format!("{members}{process}\n"))
                .expect("written");
        }

        /// The node's port 10250 is this process's.
        fn listens(&self, process: u32) {
            let row = format!("0: 00000000:280A 00000000:0000 0A 0:0 0:0 0 0 0 {process} 1");
            let table = format!("header\n{}", if process == 0 { "" } else { &row });
            std::fs::write(self.0.path().join("proc/1/net/tcp"), table).expect("written");
        }

        fn found(&self) -> Option<(u32, bool)> {
            let processes = NodeProcesses::new(self.0.path().join("proc"));
            let found = processes.find_kubelet(&self.hierarchy(), 10250).ok()?;
            Some((found.process, found.by_name))
        }
    }

    fn own_netns() -> PathBuf {
        format!("/proc/{}/ns/net", std::process::id()).into()
    }

    /// Another network namespace, as long as the file is open.
    fn other_netns() -> (std::fs::File, PathBuf) {
        let made = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
            std::fs::File::open("/proc/thread-self/ns/net").expect("there")
        });
        let file = made.join().expect("made");
        let number = std::os::fd::AsRawFd::as_raw_fd(&file);
        let path = format!("/proc/{}/fd/{number}", std::process::id());
        (file, path.into())
    }

    #[test]
    fn a_pods_process_is_not_the_kubelet_whatever_it_is_called() {
        let node = Node::new();
        let (_held, other) = other_netns();
        node.start(20, "kubelet", &format!("/{POD}"), other.clone());
        assert_eq!(node.found(), None, "a pod");
        node.start(21, "kubelet", &format!("/{POD}"), own_netns());
        assert_eq!(node.found(), None, "a pod with hostNetwork");
        // As a ztunnel sees it that is in a cgroup namespace of its own.
        node.start(
            22,
            "kubelet",
            "/../../kubepods-pod0123456789abcdef0123456789abcdef.slice/a",
            own_netns(),
        );
        assert_eq!(node.found(), None, "a pod, seen from another");
        node.start(23, "kubelet", "/system.slice/docker-1.scope", other);
        assert_eq!(node.found(), None, "another network");
        node.start(24, "kubelet", "/system.slice/kubelet.service", own_netns());
        assert_eq!(node.found(), Some((24, true)));
    }

    #[test]
    fn who_listens_on_the_port_goes_before_who_has_the_name() {
        let node = Node::new();
        node.start(20, "kubelet", "/user.slice", own_netns());
        node.start(30, "k3s-server", "/system.slice/k3s.service", own_netns());
        assert_eq!(node.found(), Some((20, true)));
        node.listens(30);
        assert_eq!(node.found(), Some((30, false)));
        // The kubelet is away, and a pod with hostNetwork has taken its port.
        node.start(40, "server", &format!("/{POD}"), own_netns());
        node.listens(40);
        assert_eq!(node.found(), Some((20, true)));
    }

    #[test]
    fn the_cgroup_is_found_from_another_cgroup_namespace() {
        let node = Node::new();
        node.start(20, "kubelet", "/system.slice/kubelet.service", own_netns());
        let file = node.0.path().join("proc/20/cgroup");
        std::fs::write(file, "0::/../../../kubelet.service\n").expect("written");
        let processes = NodeProcesses::new(node.0.path().join("proc"));
        let found = processes
            .find_kubelet(&node.hierarchy(), 10250)
            .expect("found");
        assert_eq!(
            found.cgroup,
            node.hierarchy().join("system.slice/kubelet.service")
        );
        assert!(!found.shares_with_pods);
        let own = NetnsFd::current().and_then(|netns| netns.cookie());
        assert_eq!(found.netns, own.expect("a cookie"));
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
