//! Moving an app connection's bytes.
//!
//! [`through_tunnel`] joins an app's socket to a tunnel, [`through_socket`] joins two sockets.
//! Both are plain futures of a known, small size: an idle connection holds no buffer, and turns
//! grow from 16 KiB to 1 MiB only while the app fills them.
//!
//! FIN passes as a half-close in each direction. RST stays RST: an app's reset resets the other
//! side, and a reset from there resets the app's socket, so that neither app takes a broken
//! transfer for a complete one. Dropping an unfinished copy resets both sides.

mod chunks;
mod pipe;
mod splice;
mod timer;
mod tunnel;
mod turn;
mod watch;

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

pub use splice::{SocketCopy, through_socket};
pub use tunnel::{TunnelCopy, through_tunnel};

use crate::hbone::TunnelError;

/// Sees the bytes that a copy moves, when they have been read.
pub trait Traffic {
    /// Bytes from the app (the first socket) towards the tunnel (the second socket).
    fn sent(&self, bytes: usize);
    /// Bytes from the tunnel (the second socket) towards the app (the first socket).
    fn received(&self, bytes: usize);
}

impl Traffic for () {
    fn sent(&self, _: usize) {}
    fn received(&self, _: usize) {}
}

macro_rules! forward_traffic {
    ($($pointer:ty),*) => {$(
        impl<T: Traffic + ?Sized> Traffic for $pointer {
            fn sent(&self, bytes: usize) {
                (**self).sent(bytes);
            }
            fn received(&self, bytes: usize) {
                (**self).received(bytes);
            }
        }
    )*};
}

forward_traffic!(&T, Box<T>, Rc<T>, Arc<T>);

/// When a copy gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopySettings {
    /// End a connection on which nothing moved for this long (up to twice this long). `None`:
    /// never, as TCP itself; keepalive and PING find dead peers.
    pub idle: Option<Duration>,
    /// The same once one direction has finished: the other one must not be held open for ever
    /// by a peer that has forgotten it.
    pub half_closed_idle: Duration,
}

impl Default for CopySettings {
    fn default() -> Self {
        Self {
            idle: None,
            half_closed_idle: Duration::from_secs(600),
        }
    }
}

/// How a copy ended, and what it moved.
#[derive(Debug)]
pub struct Copied {
    /// Bytes from the app.
    pub sent: u64,
    /// Bytes to the app.
    pub received: u64,
    /// Why it ended.
    pub end: CopyEnd,
}

/// Why a copy ended.
#[derive(Debug, thiserror::Error)]
pub enum CopyEnd {
    /// Both directions have finished.
    #[error("finished")]
    Finished,
    /// The app's (first) socket failed, usually by a reset. The other side was reset.
    #[error("app connection failed: {0}")]
    App(#[source] io::Error),
    /// The tunnel was reset or its connection ended. The app's socket was reset.
    #[error("tunnel failed: {0}")]
    Tunnel(#[source] TunnelError),
    /// The second socket failed. The first one was reset.
    #[error("upstream connection failed: {0}")]
    Upstream(#[source] io::Error),
    /// Nothing moved for [`CopySettings::idle`].
    #[error("idle")]
    Idle,
    /// Nothing moved for [`CopySettings::half_closed_idle`] after one direction finished.
    #[error("idle and half-closed")]
    HalfClosedIdle,
}

impl CopyEnd {
    /// Whether all bytes of both directions have been passed on.
    pub fn is_finished(&self) -> bool {
        matches!(self, Self::Finished)
    }
}
