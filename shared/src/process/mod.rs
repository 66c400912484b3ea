//! What every process asks of the system for itself.

mod memory;

pub use memory::{IdleMemory, forget_code};

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

/// Tells whoever started the process that it is ready, if they want to know: a datagram
/// `READY=1` to `NOTIFY_SOCKET` (sd_notify(3)). In a rolling update two processes answer at
/// the readiness port; this tells them apart.
pub fn notify_ready() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match path.to_str().and_then(|p| p.strip_prefix('@')) {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let told =
        address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(e) = told {
        warn!("readiness could not be told to {}: {e}", path.display());
    }
}

/// A connection needs two descriptors: raises the soft limit to the hard one.
pub fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        warn!("the limit of open files could not be raised: {e}");
    }
}
