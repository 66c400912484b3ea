//! Sockets in pods, for tests that have to see what a socket sees: how a connect fails, how a
//! connection ends, how the bytes come.
//!
//! Capture goes by the network namespace and the cgroup that a socket was made in. A thread
//! can change the one but not the other, so a short-lived child makes the sockets in the pod
//! and hands them over; the test then connects them itself.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::mesh::{Pod, TestMesh};

/// A connect, and an answer, take no longer.
pub const LIMIT: Duration = Duration::from_secs(5);
/// Descriptors in one message; the kernel takes 253.
const BATCH: usize = 200;
/// Sockets that are made in advance.
const STOCK: usize = 24;

/// Sockets that were made and not used yet, by the pod's uid and whether they are IPv6.
pub(crate) type SocketStock = Mutex<HashMap<(String, bool), Vec<OwnedFd>>>;

/// How a conversation with a server went, as its client saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It answered: HTTP status and the server's name.
    Answered(u16, String),
    /// The connect was refused.
    Refused,
    /// The connection was reset before the answer.
    Reset,
    /// The connection was closed before the answer.
    Closed,
    /// Nothing happened in time.
    Silent,
    /// Something else.
    Other(String),
}

impl Outcome {
    /// It answered 200.
    pub fn is_ok(&self) -> bool {
        matches!(self, Self::Answered(200, _))
    }

    /// It was refused, reset or closed: what a denied client sees.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Refused | Self::Reset | Self::Closed)
    }

    fn of(error: &io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionRefused => Self::Refused,
            Kind::ConnectionReset | Kind::BrokenPipe => Self::Reset,
            Kind::UnexpectedEof => Self::Closed,
            Kind::TimedOut | Kind::WouldBlock => Self::Silent,
            _ => Self::Other(error.to_string()),
        }
    }
}

impl TestMesh {
    /// `count` TCP sockets that were made in the pod.
    ///
    /// # Errors
    /// There is no such pod, or no descriptors for so many.
    pub fn sockets(&self, from: Pod<'_>, ipv6: bool, count: usize) -> anyhow::Result<Vec<OwnedFd>> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = self.command(&self.place(from), "true")?;
        let fd = theirs.as_raw_fd();
        // SAFETY: `make_and_send` makes only system calls, on memory of its own stack.
        unsafe {
            command.pre_exec(move || make_and_send(fd, ipv6, count));
        }
        let mut child = command.spawn().context("make sockets in a pod")?;
        drop(theirs);
        let mut sockets = Vec::with_capacity(count);
        while sockets.len() < count {
            let before = sockets.len();
            receive(&ours, &mut sockets)?;
            if sockets.len() == before {
                bail!("only {before} of {count} sockets came from the pod");
            }
        }
        child.wait()?;
        Ok(sockets)
    }

    /// One TCP socket that was made in the pod.
    ///
    /// # Errors
    /// As [`Self::sockets`].
    pub fn socket(&self, from: Pod<'_>, ipv6: bool) -> anyhow::Result<OwnedFd> {
        let status = self.status()?;
        let uid = &status
            .pod(from.namespace, from.name)
            .with_context(|| format!("no pod {from:?}"))?
            .uid;
        let key = (uid.clone(), ipv6);
        let take = |stock: &mut HashMap<_, Vec<OwnedFd>>| stock.get_mut(&key).and_then(Vec::pop);
        let mut stock = self.stock.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(socket) = take(&mut stock) {
            return Ok(socket);
        }
        let made = self.sockets(from, ipv6, STOCK)?;
        stock.insert(key.clone(), made);
        take(&mut stock).context("no socket")
    }

    /// Closes the sockets that were made in advance: they keep the namespaces of their pods.
    pub fn forget_sockets(&self) {
        self.stock.lock().unwrap_or_else(|e| e.into_inner()).clear();
    }

    /// Connects from the pod.
    ///
    /// # Errors
    /// The inner result is the connect's own, the outer one the harness's.
    pub fn connect(
        &self,
        from: Pod<'_>,
        target: SocketAddr,
    ) -> anyhow::Result<io::Result<TcpStream>> {
        let socket = self.socket(from, target.is_ipv6())?;
        Ok(connect_socket(socket, target, LIMIT))
    }

    /// One HTTP GET on a connection of its own, from the pod.
    ///
    /// # Errors
    /// The harness's; what the client sees is the [`Outcome`].
    pub fn http_get(&self, from: Pod<'_>, target: SocketAddr) -> anyhow::Result<Outcome> {
        self.http_request(from, target, "GET")
    }

    /// [`Self::http_get`] with another method.
    ///
    /// # Errors
    /// As [`Self::http_get`].
    pub fn http_request(
        &self,
        from: Pod<'_>,
        target: SocketAddr,
        method: &str,
    ) -> anyhow::Result<Outcome> {
        Ok(match self.connect(from, target)? {
            Ok(stream) => exchange(stream, method),
            Err(error) => Outcome::of(&error),
        })
    }

    /// A line to an echo port and back, from the pod: 200 is an echo.
    ///
    /// # Errors
    /// As [`Self::http_get`].
    pub fn echo(&self, from: Pod<'_>, target: SocketAddr) -> anyhow::Result<Outcome> {
        Ok(match self.connect(from, target)? {
            Ok(mut stream) => match echo_once(&mut stream, b"line\n") {
                Ok(()) => Outcome::Answered(200, String::new()),
                Err(error) => Outcome::of(&error),
            },
            Err(error) => Outcome::of(&error),
        })
    }

    /// The address `address:port` of a pod; IPv4.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn at(&self, pod: Pod<'_>, port: u16) -> anyhow::Result<SocketAddr> {
        Ok(SocketAddr::new(self.address(pod)?.parse()?, port))
    }

    /// The IPv6 address and `port` of a pod.
    ///
    /// # Errors
    /// There is no such pod, or it has none.
    pub fn at_v6(&self, pod: Pod<'_>, port: u16) -> anyhow::Result<SocketAddr> {
        let status = self.status()?;
        let found = status.pod(pod.namespace, pod.name).context("no such pod")?;
        let v6 = found.addresses.iter().find(|a| a.contains(':'));
        Ok(SocketAddr::new(
            v6.context("no IPv6 address")?.parse()?,
            port,
        ))
    }

    /// Addresses of a Service, IPv4 first, as the ztunnels know them.
    ///
    /// # Errors
    /// The Service does not become known.
    pub fn vips(&self, namespace: &str, name: &str) -> anyhow::Result<Vec<std::net::IpAddr>> {
        self.eventually("service address", || {
            let node = self.status()?.nodes.first().context("a node")?.name.clone();
            let dump = self.config_dump(&node)?;
            let services = dump["services"].as_array().context("services")?;
            let service = services
                .iter()
                .find(|s| s["namespace"] == namespace && s["name"] == name)
                .with_context(|| format!("no service {namespace}/{name}"))?;
            let mut vips = Vec::new();
            for vip in service["vips"].as_array().context("vips")? {
                let text = vip.as_str().context("vip")?;
                vips.push(text.rsplit('/').next().unwrap_or(text).parse()?);
            }
            vips.sort_by_key(std::net::IpAddr::is_ipv6);
            Ok(vips)
        })
    }

    /// The IPv4 address of a Service with `port`.
    ///
    /// # Errors
    /// As [`Self::vips`].
    pub fn service(&self, namespace: &str, name: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let vips = self.vips(namespace, name)?;
        let first = vips.first().context("the service has no address")?;
        Ok(SocketAddr::new(*first, port))
    }

    /// Runs `work` on a thread inside the pod's network namespace. Sockets that it opens are
    /// not captured when they connect; those that listen are what the pod's app would be.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn in_pod<T: Send>(
        &self,
        pod: Pod<'_>,
        work: impl FnOnce() -> T + Send,
    ) -> anyhow::Result<T> {
        let status = self.status()?;
        let found = status.pod(pod.namespace, pod.name).context("no such pod")?;
        in_netns(&found.netns, work)
    }

    /// [`Self::in_pod`], in a node's namespace.
    ///
    /// # Errors
    /// There is no such node.
    pub fn in_node<T: Send>(
        &self,
        node: &str,
        work: impl FnOnce() -> T + Send,
    ) -> anyhow::Result<T> {
        let status = self.status()?;
        in_netns(&status.node(node).context("no such node")?.netns, work)
    }

    /// A listener in the pod, as its app would open it.
    ///
    /// # Errors
    /// The port is taken.
    pub fn listen(&self, pod: Pod<'_>, port: u16) -> anyhow::Result<TcpListener> {
        // A child that another test has just forked may hold a copy of an earlier listener, until
        // it calls exec.
        let until = Instant::now() + LIMIT;
        loop {
            match self.in_pod(pod, move || TcpListener::bind(("::", port)))? {
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => return Ok(result?),
            }
        }
    }
}

/// Runs `work` on a thread of its own inside a network namespace.
///
/// # Errors
/// The namespace is gone.
pub fn in_netns<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    let file = std::fs::File::open(netns).with_context(|| netns.display().to_string())?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a thread in a network namespace panicked"))?
    })
}

/// Connects a socket; it is blocking afterwards, with `limit` for each read and write.
///
/// # Errors
/// The connect's.
pub fn connect_socket(
    socket: OwnedFd,
    target: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let stream = TcpStream::from(socket);
    // Also the deadline of connect, which is what Linux takes SO_SNDTIMEO for.
    stream.set_write_timeout(Some(limit))?;
    stream.set_read_timeout(Some(limit))?;
    let address = nix::sys::socket::SockaddrStorage::from(target);
    match nix::sys::socket::connect(stream.as_raw_fd(), &address) {
        Ok(()) => {
            stream.set_nodelay(true)?;
            Ok(stream)
        }
        Err(nix::errno::Errno::EINPROGRESS) => Err(io::ErrorKind::TimedOut.into()),
        Err(error) => Err(error.into()),
    }
}

/// Sends `line` and reads as many bytes, which must be the same.
///
/// # Errors
/// The connection's; [`io::ErrorKind::InvalidData`] for other bytes.
pub fn echo_once(stream: &mut TcpStream, line: &[u8]) -> io::Result<()> {
    stream.write_all(line)?;
    let mut back = vec![0; line.len()];
    stream.read_exact(&mut back)?;
    if back != line {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "other bytes"));
    }
    Ok(())
}

fn exchange(mut stream: TcpStream, method: &str) -> Outcome {
    let head =
        format!("{method} / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    let mut answer = Vec::new();
    let until = Instant::now() + LIMIT;
    if let Err(error) = stream.write_all(head.as_bytes()) {
        return Outcome::of(&error);
    }
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&chunk[..n]),
            Err(error) => return Outcome::of(&error),
        }
        if Instant::now() > until {
            return Outcome::Silent;
        }
    }
    if answer.is_empty() {
        return Outcome::Closed;
    }
    let text = String::from_utf8_lossy(&answer);
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok());
    let server = text.lines().find_map(|l| l.strip_prefix("x-adit-sample: "));
    match status {
        Some(status) => Outcome::Answered(status, server.unwrap_or_default().to_owned()),
        None => Outcome::Other(text.into_owned()),
    }
}

/// In the child, between fork and exec: nothing here allocates.
fn make_and_send(to: RawFd, ipv6: bool, count: usize) -> io::Result<()> {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    let mut left = count;
    while left > 0 {
        let mut fds = [-1; BATCH];
        let now = left.min(BATCH);
        for fd in &mut fds[..now] {
            // SAFETY: plain numbers.
            *fd =
                check(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
        }
        send_fds(to, &fds[..now])?;
        for fd in &fds[..now] {
            // SAFETY: opened above, closed once.
            unsafe { libc::close(*fd) };
        }
        left -= now;
    }
    Ok(())
}

#[repr(align(8))]
struct ControlBuffer([u8; 1024]);

fn send_fds(to: RawFd, fds: &[RawFd]) -> io::Result<()> {
    let mut control = ControlBuffer([0; 1024]);
    let mut byte = 0_u8;
    let mut iov = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let size = std::mem::size_of_val(fds) as u32;
    // SAFETY: all pointers are to the locals above, which outlive the call; the control
    // buffer is aligned and holds CMSG_SPACE of BATCH descriptors.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size) as usize;
        std::ptr::copy_nonoverlapping(
            fds.as_ptr().cast::<u8>(),
            libc::CMSG_DATA(header),
            size as usize,
        );
        if libc::sendmsg(to, &message, 0) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn receive(from: &UnixStream, into: &mut Vec<OwnedFd>) -> anyhow::Result<()> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut byte = [0];
    let mut iov = [io::IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; BATCH]);
    let message = recvmsg::<()>(
        from.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        bail!("no descriptors left for sockets of a pod");
    }
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: the kernel has just made these descriptors for us.
            into.extend(
                fds.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
