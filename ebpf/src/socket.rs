//! The sockets that ztunnel opens in a pod's network namespace.
//!
//! A socket belongs to the namespace of the thread that makes it: call these inside [`crate::in_netns`].
//! The connect hooks and rules tell ztunnel's sockets from the app's by their mark, so each gets its mark
//! before anything else can happen to it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use crate::{MARK_OUT, MARK_OWN, MARK_UP};

/// Connections that may wait to be accepted, as far as `net.core.somaxconn` allows (4096 by default).
const BACKLOG: i32 = 4096;

/// A dead peer behind a silent network is noticed after 180 + 9 * 60 seconds (Istio's ztunnel).
const KEEPALIVE_TIME: Duration = Duration::from_secs(180);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
const KEEPALIVE_RETRIES: u32 = 9;

/// Source ports of connections to the app: outside of Linux' default ephemeral range, from which the client
/// has the port of its own connection. First choice, then overflow.
const PORT_RANGES: [(u16, u16); 2] = [(61000, 65535), (20000, 32767)];

const fn range_length(range: (u16, u16)) -> u32 {
    (range.1 - range.0) as u32 + 1
}

const PORT_COUNT: u32 = range_length(PORT_RANGES[0]) + range_length(PORT_RANGES[1]);

/// Whose connections a listener accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Those of the pod's app to elsewhere, captured. What is accepted has [`MARK_OUT`] as the app's end
    /// has: the kernel answers a packet that meets no open socket (a late one in `TIME_WAIT`, a RST) with the
    /// mark of that packet, and with any other mark the answer would leave the pod, to the real destination.
    Outbound,
    /// Those that arrive at the pod.
    Inbound,
}

impl Direction {
    fn mark(self) -> u32 {
        match self {
            Self::Outbound => MARK_OUT,
            Self::Inbound => MARK_OWN,
        }
    }
}

/// A listening socket for one of a pod's slots: transparent, one member of a `SO_REUSEPORT` group,
/// non-blocking. Steering ignores the address it is bound to.
///
/// An IPv6 unspecified address makes a dual-stack listener; where the namespace has no IPv6, its IPv4
/// twin is made instead.
///
/// # Errors
/// As `socket(2)`, `bind(2)` and `listen(2)`; `EPERM` without `CAP_NET_ADMIN`.
pub fn listener_socket(address: SocketAddr, direction: Direction) -> io::Result<Socket> {
    let no_ipv6 = |error: &io::Error| {
        let code = error.raw_os_error();
        matches!(code, Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
    };
    match listen(address, direction) {
        Err(error) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && no_ipv6(&error) => {
            listen(SocketAddr::from(([0, 0, 0, 0], address.port())), direction)
        }
        result => result,
    }
}

fn listen(address: SocketAddr, direction: Direction) -> io::Result<Socket> {
    let socket = tcp(address.ip())?;
    socket.set_mark(direction.mark())?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    set_transparent(&socket, address.ip())?;
    // Accepted connections sit under the port of their destination, which an app may want to bind: their
    // inherited SO_REUSEADDR lets it, if it asks for the same.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    // Accepted connections inherit it.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// A socket for a connection to elsewhere, in ztunnel's own name; not bound, not connected, non-blocking.
///
/// # Errors
/// As `socket(2)`; `EPERM` without `CAP_NET_ADMIN`.
pub fn outbound_socket(family: Domain) -> io::Result<Socket> {
    let socket = Socket::new(family, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_mark(MARK_OWN)?;
    // The pod has one address for ztunnel and the app: the app may want to bind this port.
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_TIME)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_keepalive(&keepalive)?;
    Ok(socket)
}

/// A socket for the connection to the app, which will see `client` as its peer's address: bound to that
/// address, to lo and to a port of the [`PortRotor`]; not connected, non-blocking.
///
/// The port is free on this machine, but the connection may still be one that is in `TIME_WAIT`: a
/// `connect` that fails with `EADDRNOTAVAIL` is repeated with a new socket from here, which has the next
/// port. [`retry_with_next_port`] says so of an error.
///
/// The app's own address cannot be spoofed (use [`outbound_socket`] when client and app are one), nor can
/// an IPv6 link-local one.
///
/// # Errors
/// As `socket(2)` and `bind(2)`; `EADDRNOTAVAIL` when every port is taken for this client.
pub fn upstream_socket(client: IpAddr, ports: &PortRotor) -> io::Result<Socket> {
    let client = client.to_canonical();
    let mut last = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    let mut socket = None;
    // A port that is taken is rare, and one that a client uses in our range rarer: a bound that is far from
    // what happens, and short enough not to be felt.
    for _ in 0..ATTEMPTS {
        let port = ports.next();
        if ports.is_held(client, port) {
            continue;
        }
        let bound = match socket.take() {
            Some(socket) => socket,
            None => unbound_upstream(client)?,
        };
        match bound.bind(&SocketAddr::new(client, port).into()) {
            Ok(()) => return Ok(bound),
            Err(error) if retry_with_next_port(&error) => {
                last = error;
                socket = Some(bound);
            }
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// How many ports [`upstream_socket`] tries.
const ATTEMPTS: u32 = 256;

fn unbound_upstream(client: IpAddr) -> io::Result<Socket> {
    let socket = tcp(client)?;
    socket.set_mark(MARK_UP)?;
    set_transparent(&socket, client)?;
    // Without this the connection re-enters the plaintext listener for ever: one to a local address reports
    // the interface that has the address, unless the socket is bound to lo.
    socket.bind_device(Some(b"lo"))?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// Whether a bind or connect failed only because of the source port, so that the next one may do.
pub fn retry_with_next_port(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL)
    )
}

fn tcp(address: IpAddr) -> io::Result<Socket> {
    let domain = if address.is_ipv4() {
        Domain::IPV4
    } else {
        Domain::IPV6
    };
    Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

fn set_transparent(socket: &Socket, address: IpAddr) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    if address.is_ipv4() {
        return socket.set_ip_transparent_v4(true);
    }
    let on: libc::c_int = 1;
    // SAFETY: the option reads an int from the live variable of that size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IPV6,
            libc::IPV6_TRANSPARENT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Hands out the source ports of connections to an app in turn, so that a port comes back as late as
/// possible. One for each pod and thread is enough; it may be shared.
///
/// A client that is not in the mesh has a connection of its own to the app's port, ending in ztunnel: if
/// ztunnel came from the same address *and port* it would meet itself. Hence the ranges, and
/// [`PortRotor::hold`] for clients whose ports are from our ranges all the same.
#[derive(Debug, Default)]
pub struct PortRotor {
    next: AtomicU32,
    held: Arc<Mutex<HashMap<(IpAddr, u16), usize>>>,
}

impl PortRotor {
    /// A rotor that begins at a given place: processes that succeed each other should not begin alike.
    pub fn starting_at(seed: u32) -> Self {
        Self {
            next: AtomicU32::new(seed % PORT_COUNT),
            held: Arc::default(),
        }
    }

    /// Goes on at another place, `by` ports ahead.
    pub fn jump(&self, by: u32) {
        self.next.fetch_add(by % PORT_COUNT, Ordering::Relaxed);
    }

    /// The next port.
    fn next(&self) -> u16 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        port(number)
    }

    /// Keeps [`upstream_socket`] off the address and port of a client's own connection while that lives.
    /// `None`, and free, for a port that is not from our ranges.
    pub fn hold(&self, client: SocketAddr) -> Option<PortHold> {
        let port = client.port();
        if !PORT_RANGES
            .iter()
            .any(|&(first, last)| (first..=last).contains(&port))
        {
            return None;
        }
        let key = (client.ip().to_canonical(), port);
        *self.held.lock().entry(key).or_default() += 1;
        Some(PortHold {
            key,
            held: Arc::clone(&self.held),
        })
    }

    fn is_held(&self, client: IpAddr, port: u16) -> bool {
        self.held.lock().contains_key(&(client, port))
    }
}

/// Keeps a client's address and port from being used towards the app, until dropped.
#[derive(Debug)]
pub struct PortHold {
    key: (IpAddr, u16),
    held: Arc<Mutex<HashMap<(IpAddr, u16), usize>>>,
}

impl Drop for PortHold {
    fn drop(&mut self) {
        let mut held = self.held.lock();
        if let Some(count) = held.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.key);
            }
        }
    }
}

/// The n-th port of the ranges, which are taken one after the other, again and again. The overflow begins
/// only where the first range has been gone through: a port's rest in `TIME_WAIT` is as long as can be.
fn port(number: u32) -> u16 {
    let number = number % PORT_COUNT;
    let first = range_length(PORT_RANGES[0]);
    // Each sum is within its range, which ends below 65536.
    if number < first {
        PORT_RANGES[0].0 + number as u16
    } else {
        PORT_RANGES[1].0 + (number - first) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ports_come_from_both_ranges_and_each_once_before_the_first_returns() {
        let rotor = PortRotor::default();
        let ports: Vec<u16> = (0..PORT_COUNT).map(|_| rotor.next()).collect();
        assert_eq!(ports.iter().collect::<HashSet<_>>().len(), ports.len());
        assert!(ports.iter().all(|port| !(32768..=60999).contains(port)));
        assert_eq!((ports[0], rotor.next()), (61000, 61000));
        assert_eq!(ports[4536], 20000);
    }

    #[test]
    fn the_counter_may_wrap() {
        assert_eq!(port(u32::MAX), port(u32::MAX % PORT_COUNT));
    }

    #[test]
    fn a_clients_own_port_is_held_only_within_our_ranges_and_as_long_as_needed() {
        let rotor = PortRotor::default();
        let client: IpAddr = [10, 0, 0, 1].into();
        assert!(rotor.hold(SocketAddr::new(client, 40000)).is_none());
        let one = rotor.hold(SocketAddr::new(client, 61000));
        let two = rotor.hold("[::ffff:10.0.0.1]:61000".parse().expect("an address"));
        drop(one);
        assert!(rotor.is_held(client, 61000));
        drop(two);
        assert!(!rotor.is_held(client, 61000));
    }
}
