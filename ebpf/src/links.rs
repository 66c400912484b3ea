//! Links: a program attached to a cgroup or a network namespace, held by a descriptor and by a pin.
//!
//! The pin keeps the program in force when the process ends; the descriptor when somebody removes the pin.
//! The kernel ends a link when its cgroup or namespace goes away, or when somebody detaches it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::bpf::{self, AttachType};

#[derive(Debug)]
pub(crate) struct PinnedLink {
    fd: OwnedFd,
    pin: PathBuf,
    attach_type: AttachType,
}

impl PinnedLink {
    /// Attaches `program` to `target`. A link that an earlier process pinned is taken over and its program
    /// replaced atomically; one that is attached elsewhere is left only once the new one is in force.
    pub(crate) fn establish(
        pin: &Path,
        attach_type: AttachType,
        program: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        let elsewhere = match Self::open(pin, attach_type) {
            Some(link) if link.is_attached_to(target) => {
                bpf::update_link(link.fd.as_fd(), program)?;
                return Ok(link);
            }
            found => found,
        };
        let fd = bpf::create_link(program, target, attach_type)?;
        let link = Self {
            fd,
            pin: pin.to_owned(),
            attach_type,
        };
        link.pin_again()?;
        if let Some(elsewhere) = elsewhere {
            bpf::detach_link(elsewhere.fd.as_fd())?;
        }
        Ok(link)
    }

    /// Opens what an earlier process pinned; `None` if nothing usable is there.
    pub(crate) fn open(pin: &Path, attach_type: AttachType) -> Option<Self> {
        let fd = bpf::open_pin(pin).ok()?;
        Some(Self {
            fd,
            pin: pin.to_owned(),
            attach_type,
        })
    }

    /// Whether the link is in force on this cgroup directory or namespace.
    pub(crate) fn is_attached_to(&self, target: BorrowedFd<'_>) -> bool {
        let inode = nix::sys::stat::fstat(target).map(|file| file.st_ino);
        let info = bpf::link_info(self.fd.as_fd(), self.attach_type);
        matches!((inode, info), (Ok(inode), Ok(info)) if info.target == inode)
    }

    /// Whether the pin is still this link.
    pub(crate) fn is_pinned(&self) -> bool {
        let pinned = bpf::open_pin(&self.pin)
            .and_then(|pinned| bpf::link_info(pinned.as_fd(), self.attach_type));
        let own = bpf::link_info(self.fd.as_fd(), self.attach_type);
        matches!((pinned, own), (Ok(pinned), Ok(own)) if pinned.id == own.id)
    }

    /// Pins the link in place of whatever is pinned there.
    pub(crate) fn pin_again(&self) -> io::Result<()> {
        remove_pin(&self.pin)?;
        bpf::pin(&self.pin, self.fd.as_fd())
    }

    /// Detaches the program: when this returns, it does not run any more.
    pub(crate) fn remove(self) -> io::Result<()> {
        remove_pin(&self.pin)?;
        bpf::detach_link(self.fd.as_fd())
    }
}

fn remove_pin(pin: &Path) -> io::Result<()> {
    match std::fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
