//! Entering another network namespace for a moment: sockets made there stay there.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};

/// A network namespace, kept alive by an open file. Cloning counts a reference.
#[derive(Debug, Clone)]
pub struct NetnsFd {
    fd: Arc<OwnedFd>,
    id: NetnsId,
}

/// What tells one living namespace from another: its device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetnsId {
    /// Device of the nsfs.
    pub device: u64,
    /// Inode there. Reused after the namespace is gone.
    pub inode: u64,
}

impl NetnsFd {
    /// Opens a namespace by a path such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// When it cannot be opened or is no network namespace.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_fd(File::open(path)?.into())
    }

    /// The namespace of a process.
    ///
    /// # Errors
    /// When there is no such process, or we may not look.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// The namespace that this thread is in.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// A namespace that somebody else has opened, such as one received over a socket.
    ///
    /// # Errors
    /// When it is no network namespace.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let metadata = file.metadata()?;
        let fd = OwnedFd::from(file);
        let kind = ioctl::ns_type(fd.as_fd())?;
        if kind != libc::CLONE_NEWNET {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a network namespace",
            ));
        }
        Ok(Self {
            fd: Arc::new(fd),
            id: NetnsId {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
        })
    }

    /// What tells it from other namespaces that live at the same time.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `f` on this thread inside of the namespace, and comes back, also when `f` panics.
    /// `f` is not async on purpose: a task that waits in there would leave its thread there.
    ///
    /// If this thread cannot come back, the process aborts: everything it did afterwards would
    /// happen in the wrong network.
    ///
    /// # Errors
    /// When it cannot enter (CAP_SYS_ADMIN is needed over the namespace).
    pub fn enter<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        struct Home(OwnedFd);
        impl Drop for Home {
            fn drop(&mut self) {
                if let Err(error) = setns(&self.0, CloneFlags::CLONE_NEWNET) {
                    tracing::error!(%error, "cannot return to the own network namespace");
                    std::process::abort();
                }
            }
        }
        let home = File::open("/proc/thread-self/ns/net")?;
        let home = Home(home.into());
        setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
        let result = f();
        drop(home);
        Ok(result)
    }
}

impl AsFd for NetnsFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

mod ioctl {
    use std::io;
    use std::os::fd::{AsRawFd as _, BorrowedFd};

    /// `NS_GET_NSTYPE`, `_IO(0xb7, 0x3)`.
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

    /// Which kind of namespace an open file is (ioctl_ns(2)).
    pub(super) fn ns_type(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
        // SAFETY: this ioctl takes no argument; `fd` is open as long as it is borrowed.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
        if kind < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(kind)
    }
}
