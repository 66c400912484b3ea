//! Socket options that both proxies set.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// How a dead TCP peer is noticed: Istio's ztunnel's values, half an hour in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub time: Duration,
    /// Between probes.
    pub interval: Duration,
    /// Probes without an answer until the connection fails.
    pub retries: u32,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(180),
            interval: Duration::from_secs(180),
            retries: 9,
        }
    }
}

impl Keepalive {
    /// The time after which probes without an answer end a connection; the value that fits for
    /// [`set_user_timeout`].
    pub fn total(&self) -> Duration {
        self.time + self.interval * self.retries
    }
}

/// `port` of every address of this host or pod: the wildcard of IPv6, which takes IPv4 too;
/// that of IPv4 where the kernel has no IPv6 (`ipv6.disable=1`).
pub fn any_address(port: u16) -> SocketAddr {
    let wildcard = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    let address = match UdpSocket::bind((wildcard, 0)) {
        Ok(_) => wildcard,
        Err(_) => Ipv4Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(address, port)
}

/// What every connection of a proxy gets: no delay for small writes, and keepalive.
pub fn prepare(socket: &impl AsFd, keepalive: &Keepalive) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let probes = TcpKeepalive::new()
        .with_time(keepalive.time)
        .with_interval(keepalive.interval)
        .with_retries(keepalive.retries);
    socket.set_tcp_keepalive(&probes)
}

/// `SO_MARK`: routing and packet filters tell our packets by it. Needs CAP_NET_ADMIN.
pub fn set_mark(socket: &impl AsFd, mark: u32) -> io::Result<()> {
    SockRef::from(socket).set_mark(mark)
}

/// `TCP_USER_TIMEOUT`: how long sent data may stay without an acknowledgement.
pub fn set_user_timeout(socket: &impl AsFd, timeout: Duration) -> io::Result<()> {
    SockRef::from(socket).set_tcp_user_timeout(Some(timeout))
}

/// Says that a read took all there was, because it took less than it had room for: the next one
/// waits for an event, rather than asking the kernel first. Nothing is missed, since whatever
/// arrives after that read is an event of its own (epoll(7), edge-triggered), and an end that has
/// been seen stays seen.
pub fn drained(socket: &TcpStream) {
    // No system call: an operation that would have blocked resets the readiness.
    let _ = socket.try_io(Interest::READABLE, || {
        Err::<(), _>(io::ErrorKind::WouldBlock.into())
    });
}

/// Sends FIN; reading goes on. A socket that is not connected any more has nothing to tell.
pub fn shutdown_write(socket: &impl AsFd) -> io::Result<()> {
    match SockRef::from(socket).shutdown(Shutdown::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Lets closing send RST instead of FIN, and drop what was not sent (`SO_LINGER` 0): the other
/// end must not take a broken transfer for a complete one.
pub fn reset_on_close(socket: &impl AsFd) {
    // It fails only for what is no socket.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream as Client};

    use super::*;

    #[test]
    fn every_address_is_of_both_families() {
        let listener = TcpListener::bind(any_address(0)).expect("listener");
        let port = listener.local_addr().expect("address").port();
        Client::connect((Ipv4Addr::LOCALHOST, port)).expect("IPv4");
        if any_address(0).is_ipv6() {
            Client::connect((Ipv6Addr::LOCALHOST, port)).expect("IPv6");
        }
    }
}
