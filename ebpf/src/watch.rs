//! Rules and routes that somebody else removes: noticed at once, put back at once. Until then the pod's new
//! connections leave in plaintext.
//!
//! Each enrolled pod has an rtnetlink socket in its namespace, subscribed to what can undo the steering. One
//! epoll descriptor tells of all of them. Repairs take the pod's own lock and not the [`crate::Redirector`],
//! whose enrolments may take seconds. What is missed (a full socket buffer counts as a change) is found by
//! [`crate::Redirector::reconcile`].

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::netns::{NetnsFd, in_netns};
use crate::routing::{self, Changed, RoutingError};

/// `RTNLGRP_LINK`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_ROUTE`, `_IPV6_RULE` as bits. An interface that goes
/// down takes its IPv4 routes along without a word about them.
const GROUPS: u32 = 1 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 18;

/// Longer than any message about a rule or a route; of one that is longer the beginning is enough.
const MESSAGE: usize = 8192;

/// The steering of a node's enrolled pods under watch. Its descriptor is readable when something may have
/// changed; [`SteeringWatch::repair`] looks, and puts it right.
#[derive(Debug)]
pub struct SteeringWatch {
    epoll: OwnedFd,
    pods: Mutex<HashMap<String, Arc<Mutex<WatchedPod>>>>,
}

#[derive(Debug)]
struct WatchedPod {
    netns: NetnsFd,
    given: Vec<IpAddr>,
    socket: OwnedFd,
    /// Withdrawn: whatever it has lost is to be gone.
    gone: bool,
}

/// What [`SteeringWatch::repair`] did.
#[derive(Debug, Default)]
pub struct Repairs {
    /// Rules that were missing or changed.
    pub rules: usize,
    /// Routes that were missing or changed.
    pub routes: usize,
    /// Settings that had been changed.
    pub sysctls: usize,
    /// A pod was being worked on: call again soon.
    pub again: bool,
    /// Pods, by uid, whose steering could not be put right.
    pub failures: Vec<(String, RoutingError)>,
}

impl SteeringWatch {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: new_epoll()?,
            pods: Mutex::default(),
        })
    }

    /// Puts right what others changed since the last call. Blocks for some milliseconds for each pod that
    /// something was changed of.
    pub fn repair(&self) -> Repairs {
        let pods: Vec<_> = {
            let pods = self.pods.lock();
            pods.iter()
                .map(|(uid, pod)| (uid.clone(), pod.clone()))
                .collect()
        };
        let mut repairs = Repairs::default();
        for (uid, pod) in pods {
            let Some(pod) = pod.try_lock() else {
                repairs.again = true;
                continue;
            };
            if pod.gone || !heard_of_change(pod.socket.as_fd()) {
                continue;
            }
            match routing::repair(&pod.netns, &pod.given) {
                Ok(Changed {
                    rules,
                    routes,
                    sysctls,
                }) => {
                    repairs.rules += rules;
                    repairs.routes += routes;
                    repairs.sysctls += sysctls;
                }
                Err(error) => repairs.failures.push((uid, error)),
            }
        }
        repairs
    }

    /// Watches a pod from now on, as it is to be.
    pub(crate) fn follow(&self, uid: &str, netns: &NetnsFd, given: &[IpAddr]) -> io::Result<()> {
        let socket = in_netns(netns.as_fd(), subscribe)??;
        tell_of(self.epoll.as_fd(), socket.as_fd())?;
        let pod = WatchedPod {
            netns: netns.try_clone()?,
            given: given.to_vec(),
            socket,
            gone: false,
        };
        self.forget(uid);
        let pod = Arc::new(Mutex::new(pod));
        self.pods.lock().insert(uid.to_owned(), pod);
        Ok(())
    }

    /// Watches a pod no more. When this returns, nothing is being put back.
    pub(crate) fn forget(&self, uid: &str) {
        let pod = self.pods.lock().remove(uid);
        if let Some(pod) = pod {
            pod.lock().gone = true;
        }
    }

    /// Runs `work` on a pod's rules and routes while nobody else does.
    pub(crate) fn exclusively<T>(&self, uid: &str, work: impl FnOnce() -> T) -> T {
        let pod = self.pods.lock().get(uid).cloned();
        let _alone = pod.as_ref().map(|pod| pod.lock());
        work()
    }
}

/// [`SteeringWatch`] as seen by a task.
#[derive(Debug)]
pub struct SteeringChanges(AsyncFd<Arc<SteeringWatch>>);

impl SteeringChanges {
    /// Registers the watch with the current tokio runtime.
    ///
    /// # Errors
    /// When the runtime cannot take its descriptor.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O.
    pub fn new(watch: Arc<SteeringWatch>) -> io::Result<Self> {
        // SAFETY: the watch owns its one epoll descriptor, always returns that, and keeps it open for as
        // long as it lives, which this registration does not outlive.
        let registered = unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Waits for something that [`SteeringWatch::repair`] should look at. What happens after this has
    /// returned makes the next call return.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}

impl AsFd for SteeringWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl AsRawFd for SteeringWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

fn new_epoll() -> io::Result<OwnedFd> {
    // SAFETY: takes no memory of ours.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The epoll becomes readable when the socket is, until that is closed.
fn tell_of(epoll: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 0,
    };
    // SAFETY: both descriptors are open, and the event is read only during the call.
    let result = unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            socket.as_raw_fd(),
            &mut event,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn subscribe() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkRoute,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    Ok(socket)
}

/// Reads everything that is there; whether any of it may mean that the steering has changed.
fn heard_of_change(socket: BorrowedFd<'_>) -> bool {
    let mut changed = false;
    let mut buffer = [0; MESSAGE];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => changed |= concerns_steering(&buffer[..length]),
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::EAGAIN) => return changed,
            // ENOBUFS: more than the socket could hold.
            Err(nix::errno::Errno::ENOBUFS) => changed = true,
            Err(_) => return true,
        }
    }
}

/// Whether a notification is of something that can undo the steering. What we add ourselves is not, else
/// each repair would cause another look.
fn concerns_steering(message: &[u8]) -> bool {
    const TYPE: usize = 4;
    /// Of `struct rtmsg`, which follows the header.
    const ROUTE_PROTOCOL: usize = 16 + 5;
    let Some([low, high]) = message.get(TYPE..TYPE + 2) else {
        return true;
    };
    match u16::from_ne_bytes([*low, *high]) {
        libc::RTM_NEWRULE => false,
        // One that takes the place of ours is told of as new.
        libc::RTM_NEWROUTE => message.get(ROUTE_PROTOCOL) != Some(&routing::PROTOCOL),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_we_make_ourselves_causes_no_look() {
        let message = |kind: u16, protocol: u8| {
            let mut message = vec![0; 32];
            message[4..6].copy_from_slice(&kind.to_ne_bytes());
            message[21] = protocol;
            message
        };
        for (kind, protocol, concerns) in [
            (libc::RTM_NEWRULE, 0, false),
            (libc::RTM_DELRULE, 0, true),
            (libc::RTM_NEWROUTE, routing::PROTOCOL, false),
            (libc::RTM_NEWROUTE, 3, true),
            (libc::RTM_DELROUTE, routing::PROTOCOL, true),
            (libc::RTM_NEWLINK, 0, true),
        ] {
            assert_eq!(
                concerns_steering(&message(kind, protocol)),
                concerns,
                "{kind} by {protocol}"
            );
        }
        assert!(concerns_steering(&[]));
    }
}
