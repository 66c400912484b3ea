//! The sockets that a pod's captured traffic arrives at. They are opened inside the
//! pod's network namespace; one set per worker, each a member of the same SO_REUSEPORT
//! group, so that the kernel spreads connections over the workers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};

use adit_ebpf::in_netns;
use adit_ebpf::socket::{Direction, listener_socket};
use socket2::Socket;

use crate::pod::{HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT};

/// One worker's listening sockets for one pod.
#[derive(Debug)]
pub struct PodListeners<S = Socket> {
    /// Captured connections that the pod opens.
    pub outbound: S,
    /// Plaintext connections to the pod.
    pub plaintext: S,
    /// HBONE connections to the pod.
    pub hbone: S,
}

impl PodListeners {
    /// Opens `count` sets inside `netns`.
    ///
    /// # Errors
    /// Whatever the sockets answer, with the port that failed.
    pub fn open_group(netns: BorrowedFd<'_>, count: usize, ipv6: bool) -> io::Result<Vec<Self>> {
        in_netns(netns, || {
            let any: IpAddr = if ipv6 {
                Ipv6Addr::UNSPECIFIED.into()
            } else {
                Ipv4Addr::UNSPECIFIED.into()
            };
            let open = |port, direction| {
                listener_socket(SocketAddr::new(any, port), direction)
                    .map_err(|e| io::Error::new(e.kind(), format!("port {port}: {e}")))
            };
            (0..count)
                .map(|_| {
                    Ok(Self {
                        outbound: open(OUTBOUND_PORT, Direction::Outbound)?,
                        plaintext: open(PLAINTEXT_PORT, Direction::Inbound)?,
                        hbone: open(HBONE_PORT, Direction::Inbound)?,
                    })
                })
                .collect()
        })?
    }

    /// Further descriptors of the same sockets.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn duplicate(&self) -> io::Result<PodListeners<OwnedFd>> {
        Ok(PodListeners {
            outbound: self.outbound.try_clone()?.into(),
            plaintext: self.plaintext.try_clone()?.into(),
            hbone: self.hbone.try_clone()?.into(),
        })
    }
}
