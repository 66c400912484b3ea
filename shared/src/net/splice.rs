//! Bytes from socket to socket inside the kernel, through a pipe.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What the pipe holds at most; less where the system allows less.
const PIPE_BYTES: i32 = 1 << 20;

/// A pipe between two sockets.
#[derive(Debug)]
pub(super) struct Splicer {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    pending: usize,
}

impl Splicer {
    /// An empty pipe.
    pub(super) fn new() -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let capacity = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES))
            .or_else(|_| fcntl(&write, FcntlArg::F_GETPIPE_SZ))?;
        Ok(Self {
            read,
            write,
            capacity: capacity.max(4096).unsigned_abs() as usize,
            pending: 0,
        })
    }

    /// Bytes in the pipe.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// Moves what the socket has into the pipe; 0 at its end.
    pub(super) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        let room = self.capacity - self.pending;
        let moved = from.try_io(Interest::READABLE, || {
            Ok(splice(
                from.as_fd(),
                None,
                &self.write,
                None,
                room,
                flags(),
            )?)
        })?;
        self.pending += moved;
        Ok(moved)
    }

    /// Moves what the pipe has into the socket.
    pub(super) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let moved = to.try_io(Interest::WRITABLE, || {
            Ok(splice(
                &self.read,
                None,
                to.as_fd(),
                None,
                self.pending,
                flags(),
            )?)
        })?;
        self.pending -= moved;
        Ok(moved)
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}
