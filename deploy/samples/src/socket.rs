//! Sockets with the options that the samples need.

use std::net::SocketAddr;

use anyhow::{Context, anyhow};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, lookup_host};

/// A listener that can be opened again at once after its predecessor ended. `[::]`
/// takes IPv4 as well.
pub(crate) fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || -> std::io::Result<TcpListener> {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        TcpListener::from_std(socket.into())
    };
    bind().with_context(|| format!("cannot listen on {address}"))
}

/// The first address of `host:port`.
pub(crate) async fn resolve(target: &str) -> anyhow::Result<SocketAddr> {
    let mut addresses = lookup_host(target)
        .await
        .with_context(|| format!("cannot resolve {target}"))?;
    addresses
        .next()
        .ok_or_else(|| anyhow!("{target} has no address"))
}

/// Thousands of connections need thousands of descriptors; the usual soft limit is 1024.
pub(crate) fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // With a low limit the loads say what they could not open.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
