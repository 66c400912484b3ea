//! A laboratory on the real kernel: an outside network with a bridge, pods attached to it by veth, a cgroup
//! for the pods' processes and one for ztunnel, a BPF file system. Everything has a unique name, is the
//! test's own, and goes away with it, also after a panic.
//!
//! "Processes" are threads: each enters its pod's network namespace and cgroup before it opens a socket,
//! and what the kernel looks at is the namespace and the cgroup that the socket was made in.

#![allow(dead_code, clippy::unwrap_used)]

pub mod raw_bpf;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use adit_ebpf::socket::{Direction, listener_socket};
use adit_ebpf::{Listeners, NetnsFd, NodeConfig, PodRedirection, Redirector};
use nix::sched::{CloneFlags, setns};
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};

/// How long a test waits for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long it waits for something that must not happen, where nothing else can show it.
pub const SHORT: Duration = Duration::from_millis(400);

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Lab {
    pub id: String,
    /// What a CNI on the machine would take for the root of the hierarchy.
    pub root: PathBuf,
    /// The node's cgroup, below the root.
    pub cgroup: PathBuf,
    pub directory: PathBuf,
    outside: Netns,
    pods: AtomicU32,
}

/// A named network namespace that is deleted with this.
pub struct Netns {
    pub name: String,
    pub fd: NetnsFd,
}

impl Netns {
    fn new(name: String) -> Self {
        ip(&format!("netns add {name}"));
        let fd = NetnsFd::open(format!("/run/netns/{name}")).unwrap();
        let netns = Self { name, fd };
        netns.ip("link set lo up");
        netns
    }

    pub fn ip(&self, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name));
    }

    /// What `ip` prints about this namespace.
    pub fn show(&self, arguments: &str) -> String {
        let output = run_ip(&format!("-n {} {arguments}", self.name));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A setting below /proc/sys/net.
    pub fn sysctl(&self, name: &str) -> String {
        let path = format!("/proc/sys/net/{name}");
        self.thread(None, move || {
            std::fs::read_to_string(path).unwrap().trim().to_owned()
        })
    }

    pub fn set_sysctl(&self, name: &str, value: &str) {
        let (path, value) = (format!("/proc/sys/net/{name}"), value.to_owned());
        self.thread(None, move || std::fs::write(path, value).unwrap());
    }

    /// Runs something on a thread inside the namespace, and the cgroup.
    pub fn thread<T: Send>(&self, cgroup: Option<&Path>, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                if let Some(cgroup) = cgroup {
                    join_cgroup(cgroup);
                }
                setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        run_ip(&format!("netns del {}", self.name));
    }
}

impl Lab {
    pub fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("adit-t{}-{number}", std::process::id());
        let directory = PathBuf::from("/run").join(&id);
        std::fs::create_dir_all(directory.join("bpf")).unwrap();
        let root = cgroup_root().join(&id);
        let cgroup = root.join("node");
        make_cgroup(&root);
        make_cgroup(&cgroup);
        for child in ["pods", "ztunnel", "kubelet"] {
            make_cgroup(&cgroup.join(child));
        }
        let outside = Netns::new(format!("{id}-out"));
        outside.ip("link add br0 type bridge");
        outside.ip("addr add 10.7.0.1/16 dev br0");
        outside.ip("addr add fd07::1/64 dev br0 nodad");
        outside.ip("link set br0 up");
        // What pods reach beyond their own network.
        outside.ip("addr add 192.0.2.10/32 dev lo");
        outside.ip("addr add 2001:db8::10/128 dev lo nodad");
        Self {
            id,
            root,
            cgroup,
            directory,
            outside,
            pods: AtomicU32::new(0),
        }
    }

    pub fn config(&self) -> NodeConfig {
        NodeConfig {
            node: format!("{}.example", self.id),
            cgroup: self.cgroup.clone(),
            bpffs: self.directory.join("bpf"),
            kubelet_cgroup: Some(self.cgroup.join("kubelet")),
            kubelet_netns: None,
        }
    }

    pub fn pins(&self) -> PathBuf {
        self.directory
            .join("bpf/adit")
            .join(format!("{}~2eexample", self.id))
            .join("v1")
    }

    pub fn redirector(&self) -> Redirector {
        Redirector::open(self.config()).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn pod(&self) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 10;
        let netns = Netns::new(format!("{}-p{number}", self.id));
        let host = format!("v{number}");
        ip(&format!(
            "-n {} link add {host} type veth peer name eth0 netns {}",
            self.outside.name, netns.name
        ));
        self.outside.ip(&format!("link set {host} master br0 up"));
        let v4 = Ipv4Addr::new(10, 7, (number >> 8) as u8, number as u8);
        let v6: Ipv6Addr = format!("fd07::{number:x}").parse().unwrap();
        netns.ip(&format!("addr add {v4}/16 dev eth0"));
        netns.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
        netns.ip("link set eth0 up");
        netns.ip("route add default via 10.7.0.1");
        netns.ip("-6 route add default via fd07::1");
        // Congestion control that does not pace.
        netns.set_sysctl("ipv4/tcp_congestion_control", "reno");
        wait_for("eth0 carries packets", || {
            netns.show("link show eth0").contains("LOWER_UP")
        });
        Pod {
            uid: format!("uid-{number}"),
            netns,
            v4,
            v6,
            cgroup: self.cgroup.clone(),
        }
    }

    pub fn outside(&self) -> &Netns {
        &self.outside
    }

    /// Runs something as a process of the outside, in no cgroup of the node.
    pub fn out<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.outside.thread(None, work)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let bpffs = self.directory.join("bpf");
        let _ = nix::mount::umount2(&bpffs, nix::mount::MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir_all(&self.directory);
        // Threads that joined have ended, but the kernel lets go of them a moment later.
        let deadline = Instant::now() + PATIENCE;
        for child in ["node/pods", "node/ztunnel", "node/kubelet", "node", ""] {
            let path = self.root.join(child);
            while path.exists() && std::fs::remove_dir(&path).is_err() && Instant::now() < deadline
            {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

pub struct Pod {
    pub uid: String,
    pub netns: Netns,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    cgroup: PathBuf,
}

impl Pod {
    /// Runs something as a process of the pod's app.
    pub fn app<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.thread(Some(&self.cgroup.join("pods")), work)
    }

    /// Runs something as ztunnel inside the pod's namespace.
    pub fn ztunnel<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.thread(Some(&self.cgroup.join("ztunnel")), work)
    }

    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// The listeners of a ztunnel for this pod.
    pub fn listeners(&self) -> Trap {
        self.ztunnel(|| {
            let open = |port: u16, direction: Direction| {
                let address = (Ipv6Addr::UNSPECIFIED, port).into();
                TcpListener::from(listener_socket(address, direction).unwrap())
            };
            Trap {
                outbound: open(15001, Direction::Outbound),
                plaintext: open(15006, Direction::Inbound),
                hbone: open(15008, Direction::Inbound),
            }
        })
    }

    pub fn enrol(&self, redirector: &mut Redirector) -> Trap {
        let trap = self.listeners();
        self.enrol_with(redirector, &trap)
            .expect("the pod is enrolled");
        trap
    }

    pub fn enrol_with(
        &self,
        redirector: &mut Redirector,
        trap: &Trap,
    ) -> Result<(), adit_ebpf::Error> {
        redirector.enrol(PodRedirection {
            uid: &self.uid,
            netns: self.netns.fd.as_fd(),
            addresses: &self.addresses(),
            outbound_only: false,
            listeners: trap.all(),
        })
    }

    /// A server of the app, on an address of the pod.
    pub fn serve(&self, address: impl Into<IpAddr> + Send, port: u16) -> TcpListener {
        let address = SocketAddr::new(address.into(), port);
        self.app(move || bind(address).unwrap())
    }
}

/// A ztunnel's listeners, as far as a test plays it.
pub struct Trap {
    pub outbound: TcpListener,
    pub plaintext: TcpListener,
    pub hbone: TcpListener,
}

impl Trap {
    pub fn all(&self) -> Listeners<'_> {
        Listeners {
            outbound: self.outbound.as_fd(),
            plaintext: self.plaintext.as_fd(),
            hbone: self.hbone.as_fd(),
        }
    }
}

/// What a listener accepted: the peer and the local address as the kernel names them.
pub struct Accepted {
    pub stream: TcpStream,
    pub peer: SocketAddr,
    pub local: SocketAddr,
}

/// Waits for a connection.
pub fn accept(listener: &TcpListener) -> Accepted {
    accept_within(listener, PATIENCE).expect("a connection was expected")
}

pub fn accept_within(listener: &TcpListener, patience: Duration) -> io::Result<Accepted> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + patience;
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let local = canonical(stream.local_addr()?);
                return Ok(Accepted {
                    peer: canonical(peer),
                    local,
                    stream,
                });
            }
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_micros(100));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Nothing waits to be accepted.
pub fn is_idle(listener: &TcpListener) -> bool {
    listener.set_nonblocking(true).unwrap();
    listener
        .accept()
        .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Sees the TCP packets that arrive at the outside.
pub struct Sniffer([Socket; 2]);

impl Sniffer {
    pub fn new(lab: &Lab) -> Self {
        lab.out(|| {
            Self([Domain::IPV4, Domain::IPV6].map(|domain| {
                let socket = Socket::new(domain, Type::RAW, Some(Protocol::TCP)).unwrap();
                socket.set_nonblocking(true).unwrap();
                socket
            }))
        })
    }

    /// How many there were since the last call.
    pub fn packets(&mut self) -> usize {
        let mut count = 0;
        for socket in &mut self.0 {
            let mut buffer = [0; 2048];
            while socket.read(&mut buffer).is_ok() {
                count += 1;
            }
        }
        count
    }
}

/// A plain server socket, with `SO_REUSEADDR` as nearly every server sets it.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    bind_as(address, true)
}

pub fn bind_as(address: SocketAddr, reuse: bool) -> io::Result<TcpListener> {
    let socket = tcp(address.ip());
    socket.set_reuse_address(reuse)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

pub fn tcp(address: IpAddr) -> Socket {
    let domain = if address.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap()
}

/// Connects within a second and a half: a SYN that nobody answers is an error of kind `TimedOut`.
pub fn connect(address: impl Into<SocketAddr>) -> io::Result<TcpStream> {
    let address = address.into();
    connect_from(tcp(address.ip()), address)
}

pub fn connect_from(socket: Socket, address: SocketAddr) -> io::Result<TcpStream> {
    connect_timeout(&socket, address)?;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket.into())
}

fn connect_timeout(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    socket.connect_timeout(&address.into(), Duration::from_millis(1500))
}

/// The error number of a failed attempt.
pub fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Sends a few bytes each way.
pub fn converse(one: &mut TcpStream, other: &mut TcpStream) {
    for (from, to) in [(0, 1), (1, 0)] {
        let streams = [&mut *one, &mut *other];
        streams[from].write_all(b"hello").unwrap();
        let mut buffer = [0; 5];
        streams[to].read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"hello");
    }
}

/// Waits until something is true.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Tells, loudly, that this kernel cannot show something.
pub fn skip(reason: &str) {
    // Not by a macro, whose output the test runner hides.
    let _ = writeln!(io::stderr().lock(), "SKIP: {reason}");
}

/// Held while a process runs: until its exec, of whose end we do not learn, it has copies of all our
/// descriptors, which keep the sockets open that a test closes.
static SPAWN: Mutex<()> = Mutex::new(());

/// Drops something whose sockets must be closed afterwards.
pub fn close<T>(value: T) {
    let _no_copies = SPAWN.lock();
    drop(value);
}

/// Forks; the child keeps nothing open but `keep`, does nothing, and has to be killed.
pub fn fork_holding(keep: &[i32]) -> libc::pid_t {
    let _no_copies = SPAWN.lock();
    let (mut ready, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let theirs_fd = std::os::fd::AsRawFd::as_raw_fd(&theirs);
    // SAFETY: the child only makes async-signal-safe calls.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: as above; the descriptors are the child's own copies.
        unsafe {
            for fd in 3..4096 {
                if fd != theirs_fd && !keep.contains(&fd) {
                    libc::close(fd);
                }
            }
            libc::write(theirs_fd, c"x".as_ptr().cast(), 1);
            loop {
                libc::pause();
            }
        }
    }
    drop(theirs);
    ready.read_exact(&mut [0; 1]).unwrap();
    child
}

fn run_ip(arguments: &str) -> std::process::Output {
    let _copies = SPAWN.lock();
    Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 is installed")
}

fn ip(arguments: &str) {
    let output = run_ip(arguments);
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

pub fn cgroup_root() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mut fields = mounts.lines().map(|line| line.split(' ').skip(1));
    fields
        .find_map(|mut fields| {
            let path = fields.next()?;
            (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
        })
        .expect("cgroup v2 is mounted")
}

/// Threads of one process may be in different cgroups if these are threaded and the process is in the root.
pub fn make_cgroup(path: &Path) {
    static MOVE: Once = Once::new();
    MOVE.call_once(|| std::fs::write(cgroup_root().join("cgroup.procs"), "0").unwrap());
    std::fs::create_dir_all(path).unwrap();
    std::fs::write(path.join("cgroup.type"), "threaded").unwrap();
}

pub fn join_cgroup(path: &Path) {
    std::fs::write(
        path.join("cgroup.threads"),
        nix::unistd::gettid().to_string(),
    )
    .unwrap();
}

/// An owned descriptor of a directory, for attaching to it.
pub fn directory(path: &Path) -> OwnedFd {
    std::fs::File::open(path).unwrap().into()
}
