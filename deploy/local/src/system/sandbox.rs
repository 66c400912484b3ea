//! Starts a program inside the mesh: in a cgroup, a network namespace, and mount and
//! host-name namespaces of its own.
//!
//! The cgroup comes first: the sockets that a program opens belong to the cgroup its
//! process was in at that moment, and that is what the eBPF hooks go by.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

use crate::error::LocalError;

/// Where a program is to run. All strings are ready-made C strings, because nothing may
/// be allocated between fork and exec of a threaded program.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    cgroup_procs: Option<CString>,
    netns: CString,
    mounts: Option<Mounts>,
    session: bool,
}

#[derive(Debug, Clone)]
struct Mounts {
    hostname: CString,
    /// Source and target of bind mounts; the second half may be missing on the machine.
    hosts: CString,
    resolv_conf: Option<CString>,
    /// Unmounted, so that no copy of a mount keeps a namespace or a pin alive.
    hidden: Vec<CString>,
}

impl Sandbox {
    /// Only another network namespace.
    pub(crate) fn netns_only(netns: &Path) -> Result<Self, LocalError> {
        Ok(Self {
            cgroup_procs: None,
            netns: c_path(netns)?,
            mounts: None,
            session: false,
        })
    }

    /// Joins this cgroup before anything else.
    pub(crate) fn cgroup(mut self, cgroup: &Path) -> Result<Self, LocalError> {
        self.cgroup_procs = Some(c_path(&cgroup.join("cgroup.procs"))?);
        Ok(self)
    }

    /// Gives the program a mount namespace with this `/etc/hosts` and `/etc/resolv.conf`,
    /// and a host name.
    pub(crate) fn names(
        mut self,
        hostname: &str,
        hosts: &Path,
        resolv_conf: Option<&Path>,
        hidden: &[PathBuf],
    ) -> Result<Self, LocalError> {
        self.mounts = Some(Mounts {
            hostname: c_string(hostname.as_bytes())?,
            hosts: c_path(hosts)?,
            resolv_conf: resolv_conf.map(c_path).transpose()?,
            hidden: hidden.iter().map(|p| c_path(p)).collect::<Result<_, _>>()?,
        });
        Ok(self)
    }

    /// Makes the program the leader of a session, so that an interrupt typed at the
    /// supervisor's terminal does not reach it.
    pub(crate) fn session(mut self) -> Self {
        self.session = true;
        self
    }

    /// A command that starts `program` here.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        let sandbox = self.clone();
        // SAFETY: `enter` makes only async-signal-safe system calls on memory that was
        // allocated before the fork.
        unsafe {
            command.pre_exec(move || sandbox.enter());
        }
        command
    }

    fn enter(&self) -> io::Result<()> {
        if let Some(procs) = &self.cgroup_procs {
            join_cgroup(procs)?;
        }
        if self.session {
            // SAFETY: setsid takes no arguments and touches no memory.
            check(unsafe { libc::setsid() })?;
        }
        enter_netns(&self.netns)?;
        if let Some(mounts) = &self.mounts {
            mounts.enter()?;
        }
        Ok(())
    }
}

impl Mounts {
    fn enter(&self) -> io::Result<()> {
        // SAFETY: plain flags, no memory.
        check(unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWUTS) })?;
        let name = self.hostname.as_bytes();
        // SAFETY: pointer and length describe `name`, which lives across the call.
        check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })?;
        // What happens to mounts outside is seen here, but not the other way round.
        mount_raw(None, c"/", libc::MS_SLAVE | libc::MS_REC)?;
        for hidden in &self.hidden {
            // SAFETY: `hidden` is a C string that lives across the call.
            let done = check(unsafe { libc::umount2(hidden.as_ptr(), libc::MNT_DETACH) });
            // EINVAL: it is no mount point (any more).
            if let Err(error) = done
                && error.raw_os_error() != Some(libc::EINVAL)
            {
                return Err(error);
            }
        }
        mount_raw(Some(&self.hosts), c"/etc/hosts", libc::MS_BIND)?;
        if let Some(resolv_conf) = &self.resolv_conf {
            match mount_raw(Some(resolv_conf), c"/etc/resolv.conf", libc::MS_BIND) {
                // A machine without that file needs no cover for it.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
        Ok(())
    }
}

fn join_cgroup(procs: &CStr) -> io::Result<()> {
    // SAFETY: `procs` is a C string that lives across the call.
    let fd = check(unsafe { libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) })?;
    // SAFETY: one byte of a static string; "0" means the calling process.
    let written = unsafe { libc::write(fd, c"0".as_ptr().cast(), 1) };
    let result = if written == 1 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    };
    // SAFETY: `fd` was opened above and is closed once.
    unsafe { libc::close(fd) };
    result
}

fn enter_netns(path: &CStr) -> io::Result<()> {
    // SAFETY: `path` is a C string that lives across the call.
    let fd = check(unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) })?;
    // SAFETY: `fd` is open; no memory is passed.
    let result = check(unsafe { libc::setns(fd, libc::CLONE_NEWNET) });
    // SAFETY: `fd` was opened above and is closed once.
    unsafe { libc::close(fd) };
    result.map(drop)
}

fn mount_raw(source: Option<&CStr>, target: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    let source = source.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: source and target are C strings that live across the call or null, type and
    // data may be null for bind and propagation mounts.
    check(unsafe { libc::mount(source, target.as_ptr(), ptr::null(), flags, ptr::null()) })
        .map(drop)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn c_path(path: &Path) -> Result<CString, LocalError> {
    c_string(path.as_os_str().as_bytes())
}

fn c_string(bytes: &[u8]) -> Result<CString, LocalError> {
    CString::new(bytes).map_err(|_| {
        LocalError::Config(format!(
            "{:?} has a zero byte",
            String::from_utf8_lossy(bytes)
        ))
    })
}
