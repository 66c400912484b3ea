//! Connections that the proxy opens inside a pod's network namespace: to the pod's own
//! app in the name of the real client, and to other pods in the pod's own name.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use adit_ebpf::socket::{outbound_socket, retry_with_next_port, upstream_socket};
use adit_ebpf::visit_netns;
use socket2::{Domain, Socket};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::pod::Pod;
use crate::worker::Worker;

/// How long a TCP connect may take (Istio's ztunnel: 10 s).
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Connections to the app whose source port turned out to be in use are tried on so many
/// further ports.
const PORT_ATTEMPTS: usize = 32;

/// Connects to the pod's app at `target`; the app sees `client` as its peer.
///
/// # Errors
/// Whatever the connect answers; [`io::ErrorKind::TimedOut`] at the deadline.
pub async fn connect_app(
    worker: &Worker,
    pod: &Pod,
    client: SocketAddr,
    target: SocketAddr,
) -> io::Result<TcpStream> {
    // A pod that calls itself needs no disguise, and could not wear one; nor is there one for
    // an address that means something only on the client's link.
    let link_local = matches!(client.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local());
    if client.ip() == target.ip() || link_local {
        return connect_out(worker, pod, target).await;
    }
    let ports = &worker.shared.ports;
    let mut last = None;
    for _ in 0..PORT_ATTEMPTS {
        let socket = visit_netns(&worker.home, pod.netns(), || {
            upstream_socket(client.ip(), ports)
        })??;
        match connect(socket, target).await {
            Err(error) if retry_with_next_port(&error) => {
                last = Some(error);
                // Ports in use are neighbours, thousands of them where a client holds so many
                // connections: the next free one is anywhere but next.
                ports.jump(rand::random());
            }
            result => return result,
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()))
}

/// Connects from the pod to `target` elsewhere.
///
/// # Errors
/// As [`connect_app`].
pub async fn connect_out(worker: &Worker, pod: &Pod, target: SocketAddr) -> io::Result<TcpStream> {
    let socket = visit_netns(&worker.home, pod.netns(), || {
        outbound_socket(Domain::for_address(target))
    })??;
    connect(socket, target).await
}

async fn connect(socket: Socket, target: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(socket.into());
    timeout(CONNECT_DEADLINE, socket.connect(target))
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "connect timed out")))
}
