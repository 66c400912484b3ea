//! Network namespaces: holding one, and doing something inside it.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};

/// A network namespace that is held open: it lives as long as this does, whatever becomes of its processes.
#[derive(Debug)]
pub struct NetnsFd {
    fd: OwnedFd,
    inode: u64,
}

impl NetnsFd {
    /// Opens a namespace by a path: a bind mount such as those of `ip netns`, or `/proc/<pid>/ns/net`.
    ///
    /// # Errors
    /// As `open(2)`; `InvalidInput` if the file is not a network namespace.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::try_from(OwnedFd::from(File::open(path)?))
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The kernel's number of the namespace: unique among those that exist now.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// A second handle of the same namespace.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            inode: self.inode,
        })
    }

    /// The kernel's cookie of the namespace: unique over the machine's uptime. Since Linux 5.14.
    ///
    /// # Errors
    /// `ENOPROTOOPT` from kernels that lack `SO_NETNS_COOKIE`; failures to enter the namespace.
    pub fn cookie(&self) -> io::Result<u64> {
        in_netns(self.as_fd(), || {
            let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
            socket_netns_cookie(socket.as_fd())
        })?
    }
}

impl TryFrom<OwnedFd> for NetnsFd {
    type Error = io::Error;

    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        const NSFS_MAGIC: libc::c_long = 0x6e73_6673;
        let file = File::from(fd);
        if nix::sys::statfs::fstatfs(&file)?.filesystem_type().0 as libc::c_long != NSFS_MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a namespace file",
            ));
        }
        let inode = file.metadata()?.ino();
        Ok(Self {
            fd: file.into(),
            inode,
        })
    }
}

impl AsFd for NetnsFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Runs `work` with the calling thread inside the namespace, then brings the thread back.
///
/// Only for short, synchronous work, such as opening a socket, which stays in the namespace: nothing else
/// may run on the thread meanwhile. If the thread cannot return the process aborts, for everything it did
/// next would happen in the wrong place; a panic of `work` goes on after the return.
///
/// # Errors
/// When the namespace cannot be entered; `work` has not run then.
pub fn in_netns<T>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T) -> io::Result<T> {
    visit_netns(&NetnsFd::current()?, netns, work)
}

/// [`in_netns`] for a thread that knows its own namespace, `home`: finding that out takes as many system
/// calls again. The thread is in `home` afterwards, wherever it was before.
///
/// # Errors
/// As [`in_netns`].
pub fn visit_netns<T>(
    home: &NetnsFd,
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> T,
) -> io::Result<T> {
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    let _back = Return(home);
    Ok(work())
}

struct Return<'a>(&'a NetnsFd);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET) {
            eprintln!("fatal: a thread could not return to its network namespace: {error}");
            std::process::abort();
        }
    }
}

/// Runs `work` on a thread of its own inside the namespace. Nothing has to be brought back.
pub(crate) fn on_own_thread<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("adit-netns".to_owned())
            .spawn_scoped(scope, || {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The cookie of the namespace a socket was made in.
pub(crate) fn socket_netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = MaybeUninit::<u64>::zeroed();
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option writes eight bytes to the live buffer of that length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            cookie.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed, then filled; any bit pattern is a u64.
    Ok(unsafe { cookie.assume_init() })
}

/// Finds a namespace by its inode among those of the running processes and the bind mounts of `ip netns`.
pub(crate) fn find(inode: u64) -> Option<NetnsFd> {
    let of_processes = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?
                .bytes()
                .all(|byte| byte.is_ascii_digit())
                .then(|| entry.path().join("ns/net"))
        });
    let named = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    of_processes
        .chain(named)
        .filter(|path| std::fs::metadata(path).is_ok_and(|file| file.ino() == inode))
        .find_map(|path| {
            NetnsFd::open(path)
                .ok()
                .filter(|netns| netns.inode == inode)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_netns() -> NetnsFd {
        std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            NetnsFd::current().expect("the new namespace")
        })
        .join()
        .expect("the thread")
    }

    #[test]
    fn a_thread_enters_a_namespace_and_comes_back() {
        let netns = new_netns();
        let before = NetnsFd::current().expect("current").inode();
        let inside = in_netns(netns.as_fd(), || {
            NetnsFd::current().expect("current").inode()
        })
        .expect("entry");
        assert_eq!(inside, netns.inode());
        assert_ne!(inside, before);
        assert_eq!(NetnsFd::current().expect("current").inode(), before);
    }

    #[test]
    fn a_panic_inside_does_not_leave_the_thread_there() {
        let netns = new_netns();
        let before = NetnsFd::current().expect("current").inode();
        let caught = std::panic::catch_unwind(|| in_netns(netns.as_fd(), || panic!("inside")));
        assert!(caught.is_err());
        assert_eq!(NetnsFd::current().expect("current").inode(), before);
    }

    #[test]
    fn a_namespace_has_one_cookie_and_another_has_another() {
        let (one, other) = (new_netns(), new_netns());
        assert_eq!(one.cookie().expect("cookie"), one.cookie().expect("cookie"));
        assert_ne!(
            one.cookie().expect("cookie"),
            other.cookie().expect("cookie")
        );
    }

    #[test]
    fn a_file_that_is_no_namespace_is_refused() {
        let error = NetnsFd::open("/proc/self/status").expect_err("not a namespace");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
