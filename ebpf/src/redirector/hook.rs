//! A program on a cgroup, with what it takes to put it back.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use super::{Error, io_error};
use crate::bpf::AttachType;
use crate::links::PinnedLink;
use crate::pins::Pins;

/// A program of a cgroup.
pub(super) struct Hook {
    pub(super) attach_type: AttachType,
    pub(super) program: OwnedFd,
    pub(super) cgroup: File,
    pub(super) path: PathBuf,
    pub(super) pin: PathBuf,
    pub(super) link: PinnedLink,
}

impl Hook {
    pub(super) fn establish(
        pins: &Pins,
        name: &str,
        attach_type: AttachType,
        program: OwnedFd,
        cgroup: &std::path::Path,
    ) -> Result<Self, Error> {
        let what = format!("attaching {name} to {}", cgroup.display());
        let pin = pins.of(name);
        let file = File::open(cgroup).map_err(io_error(what.clone()))?;
        let link = PinnedLink::establish(&pin, attach_type, program.as_fd(), file.as_fd())
            .map_err(io_error(what))?;
        Ok(Self {
            attach_type,
            program,
            cgroup: file,
            path: cgroup.to_owned(),
            pin,
            link,
        })
    }

    /// Looks whether the cgroup is there; one that was made anew under its path takes the place of
    /// the old one.
    pub(super) fn find_cgroup(&mut self) -> io::Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let now = std::fs::metadata(&self.path)?.ino();
        if !self.cgroup.metadata().is_ok_and(|held| held.ino() == now) {
            self.cgroup = File::open(&self.path)?;
        }
        Ok(())
    }
}
