//! On the real kernel: cgroups and network namespaces of this test stand for pods.

use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::*;

const UID: &str = "0b2c5f3e-7c1a-4d0e-9f53-0f6b0c6d5a11";
const HASH: &str = "0123456789abcdef0123456789abcdef";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// A node: a cgroup and the network namespaces of its pods.
struct Node {
    name: String,
    root: PathBuf,
    processes: Vec<Child>,
    namespaces: Vec<String>,
}

impl Node {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ztd{}-{number}", std::process::id());
        let hierarchy = adit_ebpf::cgroup2_mount().expect("cgroup v2");
        let root = hierarchy.join(&name);
        std::fs::create_dir_all(root.join("kubepods/burstable")).expect("needs root");
        Self {
            name,
            root,
            processes: Vec::new(),
            namespaces: Vec::new(),
        }
    }

    /// A namespace with an address; its path and number.
    fn netns(&mut self, address: Ipv4Addr) -> (PathBuf, u64) {
        let name = format!("{}-{}", self.name, self.namespaces.len());
        ip(&["netns", "add", &name]);
        ip(&[
            "-n",
            &name,
            "addr",
            "add",
            &format!("{address}/32"),
            "dev",
            "lo",
        ]);
        let path = Path::new("/run/netns").join(&name);
        self.namespaces.push(name);
        let inode = std::fs::metadata(&path).expect("there").ino();
        (path, inode)
    }

    fn pod(&self, uid: &str) -> PathBuf {
        self.root.join(format!("kubepods/burstable/pod{uid}"))
    }

    /// A process of a container of the pod, in `netns` or in ours.
    fn start(&mut self, uid: &str, container: &str, netns: Option<&Path>) -> usize {
        let cgroup = self.pod(uid).join(container);
        std::fs::create_dir_all(&cgroup).expect("made");
        let mut command = match netns {
            Some(netns) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", netns.display()));
                command.args(["sleep", "600"]);
                command
            }
            None => {
                let mut command = Command::new("sleep");
                command.arg("600");
                command
            }
        };
        let child = command.spawn().expect("util-linux is installed");
        std::fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).expect("joined");
        self.processes.push(child);
        // It enters its namespace by itself.
        let own = std::fs::metadata("/proc/self/ns/net").expect("there").ino();
        let wanted = netns.map_or(own, |n| std::fs::metadata(n).expect("there").ino());
        let number = self.processes.len() - 1;
        let path = format!("/proc/{}/ns/net", self.processes[number].id());
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::fs::metadata(&path).map(|found| found.ino()).ok() != Some(wanted) {
            assert!(Instant::now() < deadline, "the process did not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        number
    }

    fn end(&mut self, number: usize) {
        let _ = self.processes[number].kill();
        let _ = self.processes[number].wait();
    }

    fn discovery(&self) -> CgroupDiscovery {
        CgroupDiscovery::new(&self.root).expect("readable")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for number in 0..self.processes.len() {
            self.end(number);
        }
        for name in &self.namespaces {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
        let mut open = vec![self.root.clone()];
        let mut all = Vec::new();
        while let Some(path) = open.pop() {
            open.extend(cgroups::directories(&path));
            all.push(path);
        }
        for path in all.iter().rev() {
            let _ = std::fs::remove_dir(path);
        }
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output();
    let output = output.expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments:?}: {output:?}");
}

fn inode(found: Result<(File, NetnsId), DiscoveryError>) -> Result<u64, String> {
    found.map(|(_, id)| id.1).map_err(|e| e.to_string())
}

#[test]
fn a_pods_namespace_is_that_of_its_processes() {
    let mut node = Node::new();
    let discovery = node.discovery();
    let addresses = [IpAddr::from(ADDRESS)];
    let find = || inode(discovery.find(UID, &addresses, None));
    let missing = find().expect_err("nothing yet");
    assert!(missing.starts_with("no cgroup"), "{missing}");

    std::fs::create_dir_all(node.pod(UID)).expect("made");
    let empty = find().expect_err("nothing runs");
    assert!(empty.starts_with("no process"), "{empty}");

    // The pause container is enough.
    let (netns, expected) = node.netns(ADDRESS);
    let pause = node.start(UID, "pause", Some(&netns));
    assert_eq!(find(), Ok(expected));

    // A sandbox that is made anew.
    node.end(pause);
    assert!(find().is_err());
    let (netns, next) = node.netns(ADDRESS);
    node.start(UID, "pause-again", Some(&netns));
    assert_eq!(find(), Ok(next));
    let before = (0, expected);
    let found = Discovery::Cgroups(node.discovery()).current(UID, &addresses, before);
    assert_eq!(found.map(|id| id.1), Some(next));
}

#[test]
fn namespaces_that_are_not_the_pods_are_refused() {
    let mut node = Node::new();
    let discovery = node.discovery();
    let addresses = [IpAddr::from(ADDRESS)];
    let find = || inode(discovery.find(UID, &addresses, None));
    node.start(UID, "monitor", None);
    let refused = find().expect_err("ours");
    assert!(refused.contains("node's network"), "{refused}");

    let (other, _) = node.netns(Ipv4Addr::new(10, 9, 0, 3));
    node.start(UID, "nested", Some(&other));
    let refused = find().expect_err("another address");
    assert!(refused.contains("10.9.0.2"), "{refused}");

    // Beside both of them there is the right one.
    let (netns, expected) = node.netns(ADDRESS);
    node.start(UID, "pause", Some(&netns));
    assert_eq!(find(), Ok(expected));
}

#[test]
fn a_static_pod_is_found_by_its_address() {
    let mut node = Node::new();
    let discovery = node.discovery();
    let (netns, expected) = node.netns(ADDRESS);
    node.start(HASH, "pause", Some(&netns));
    let find = |address: [u8; 4]| inode(discovery.find(UID, &[address.into()], None));
    assert_eq!(find(ADDRESS.octets()), Ok(expected));
    assert!(find([10, 9, 0, 3]).is_err());
}
