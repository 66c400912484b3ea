//! Accepting, so that no error ends it and no flood exhausts what others need.
//!
//! What trips it: running out of file descriptors or memory (waits and goes on), connections
//! that are gone before they are accepted (ignored), more connections than the limit (they wait
//! in the kernel's backlog until one ends).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;

/// How many connections a listener may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptLimits {
    /// Connections at once. What is above waits in the backlog.
    pub max_connections: usize,
    /// The first wait after a shortage of descriptors or memory; doubles up to
    /// [`Self::max_backoff`].
    pub min_backoff: Duration,
    /// The longest wait.
    pub max_backoff: Duration,
}

impl Default for AcceptLimits {
    fn default() -> Self {
        Self {
            max_connections: 65_536,
            min_backoff: Duration::from_millis(5),
            max_backoff: Duration::from_secs(1),
        }
    }
}

/// Counts of a listener, readable from any thread.
#[derive(Debug, Default)]
pub struct AcceptCounts {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections open now.
    pub open: AtomicUsize,
    /// Connections that were gone before they were accepted.
    pub aborted: AtomicU64,
    /// Times that there was no descriptor or memory.
    pub exhausted: AtomicU64,
    /// Times that the limit was reached.
    pub saturated: AtomicU64,
}

/// An accepted connection's place among those that a listener may have; dropped when the
/// connection has ended.
#[derive(Debug)]
pub struct AcceptPermit {
    counts: Arc<AcceptCounts>,
    _place: OwnedSemaphorePermit,
}

impl Drop for AcceptPermit {
    fn drop(&mut self) {
        self.counts.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Accepts until dropped (which is how it is drained: close the listener first), and calls
/// `connected`, which spawns, for every connection.
///
/// # Errors
/// Only when the listener itself is broken.
pub async fn accept_loop(
    listener: TcpListener,
    limits: AcceptLimits,
    counts: Arc<AcceptCounts>,
    mut connected: impl FnMut(TcpStream, SocketAddr, AcceptPermit),
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(
        limits.max_connections.min(Semaphore::MAX_PERMITS),
    ));
    let mut backoff = limits.min_backoff;
    loop {
        let place = match places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                counts.saturated.fetch_add(1, Ordering::Relaxed);
                // It is never closed.
                places
                    .clone()
                    .acquire_owned()
                    .await
                    .map_err(io::Error::other)?
            }
        };
        match listener.accept().await {
            Ok((stream, peer)) => {
                backoff = limits.min_backoff;
                counts.accepted.fetch_add(1, Ordering::Relaxed);
                counts.open.fetch_add(1, Ordering::Relaxed);
                let permit = AcceptPermit {
                    counts: counts.clone(),
                    _place: place,
                };
                connected(stream, peer, permit);
            }
            Err(error) => match judge(&error) {
                Failure::Connection => {
                    counts.aborted.fetch_add(1, Ordering::Relaxed);
                }
                Failure::Shortage => {
                    counts.exhausted.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%error, ?backoff, "cannot accept");
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(limits.max_backoff);
                }
                Failure::Listener => return Err(error),
            },
        }
    }
}

enum Failure {
    /// Of the one connection: the next one may be fine.
    Connection,
    /// Of the process or the machine: may pass.
    Shortage,
    /// Of the listener: will not pass.
    Listener,
}

/// accept(2): errors of the network that a new connection already had are returned by accept
/// and mean only this connection.
fn judge(error: &io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Failure::Shortage,
        Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP | libc::EFAULT)
        | None => Failure::Listener,
        Some(_) => Failure::Connection,
    }
}
