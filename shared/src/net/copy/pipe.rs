//! Pipes for splice(2), recycled per thread: making one and giving it room for a full turn costs
//! three system calls, and only connections with bytes under way need one.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::net::TcpStream;

/// Bytes that a pipe takes: one full turn.
pub(super) const PIPE_SIZE: usize = 1 << 20;

/// Empty pipes that a thread keeps.
const KEPT: usize = 32;

thread_local! {
    static FREE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

/// A pipe on loan. Dropped empty, it goes back to its thread; dropped with bytes in it, it is
/// closed: they must never reach another connection.
pub(super) struct PooledPipe {
    pipe: Option<Pipe>,
    filled: usize,
}

impl PooledPipe {
    /// An empty pipe; `None` when the process has no descriptors left.
    pub(super) fn take() -> Option<Self> {
        let free = FREE.try_with(|free| free.borrow_mut().pop()).ok().flatten();
        let pipe = match free {
            Some(pipe) => pipe,
            None => Pipe::new().ok()?,
        };
        Some(Self {
            pipe: Some(pipe),
            filled: 0,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Moves what `socket` has into the empty pipe. `Ok(0)` is the socket's end.
    pub(super) fn fill(&mut self, socket: &TcpStream) -> io::Result<usize> {
        let Some(pipe) = self.pipe.as_ref().filter(|_| self.filled == 0) else {
            return Ok(0);
        };
        let n = socket.try_io(Interest::READABLE, || {
            splice(socket.as_raw_fd(), pipe.write.as_raw_fd(), PIPE_SIZE)
        })?;
        self.filled = n;
        Ok(n)
    }

    /// Moves what is in the pipe into `socket`, as far as it takes it.
    pub(super) fn empty_into(&mut self, socket: &TcpStream) -> io::Result<usize> {
        let Some(pipe) = &self.pipe else {
            return Ok(0);
        };
        let n = socket.try_io(Interest::WRITABLE, || {
            splice(pipe.read.as_raw_fd(), socket.as_raw_fd(), self.filled)
        })?;
        self.filled -= n;
        Ok(n)
    }
}

impl Drop for PooledPipe {
    fn drop(&mut self) {
        if self.filled > 0 {
            return;
        }
        if let Some(pipe) = self.pipe.take() {
            // While the thread ends, the pipe is simply closed.
            let _ = FREE.try_with(|free| {
                let mut free = free.borrow_mut();
                if free.len() < KEPT {
                    free.push(pipe);
                }
            });
        }
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let mut fds = [-1; 2];
        // SAFETY: `fds` has room for the two descriptors that pipe2 writes.
        if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: pipe2 has opened both, and nobody else knows them.
        let (read, write) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
        // Without the room (a limit of unprivileged users) turns are smaller, nothing else.
        // SAFETY: `write` is open, and this command takes a number.
        unsafe {
            libc::fcntl(
                write.as_raw_fd(),
                libc::F_SETPIPE_SZ,
                PIPE_SIZE as libc::c_int,
            )
        };
        Ok(Self { read, write })
    }
}

fn splice(from: RawFd, to: RawFd, len: usize) -> io::Result<usize> {
    // SAFETY: both descriptors are open for the time of the call, which their owners' borrows
    // in the callers guarantee; offsets are null, as they must be for pipes and sockets.
    let n = unsafe {
        libc::splice(
            from,
            std::ptr::null_mut(),
            to,
            std::ptr::null_mut(),
            len,
            libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
