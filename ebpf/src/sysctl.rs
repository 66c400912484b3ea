//! The settings of a pod's network namespace that steering needs.
//!
//! `/proc/sys/net` shows the namespace of the thread that looks: all functions here are called inside it.

use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::sync::OnceLock;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

/// A setting that must be 1.
pub(crate) struct Sysctl {
    path: &'static str,
    ipv6: bool,
}

/// In the order of `Enrolment::sysctls_before`.
pub(crate) const SYSCTLS: [Sysctl; 4] = [
    // The app's accepted connection takes the mark of ztunnel's SYN, so that its answers loop back.
    Sysctl {
        path: "/proc/sys/net/ipv4/tcp_fwmark_accept",
        ipv6: false,
    },
    // So does the RST of a port that nobody listens on.
    Sysctl {
        path: "/proc/sys/net/ipv4/fwmark_reflect",
        ipv6: false,
    },
    Sysctl {
        path: "/proc/sys/net/ipv6/fwmark_reflect",
        ipv6: true,
    },
    // What waits in the accept queue of a listener that closes moves to another one of its group.
    Sysctl {
        path: "/proc/sys/net/ipv4/tcp_migrate_req",
        ipv6: false,
    },
];

/// The value of a setting that was not read.
pub(crate) const UNKNOWN: u8 = 0xff;

/// A setting could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source} (it must be writable and 1)")]
pub struct SysctlError {
    path: &'static str,
    source: io::Error,
}

/// Sets what is not set: what each was before, and how many had to be changed.
pub(crate) fn establish(ipv6: bool) -> Result<([u8; SYSCTLS.len()], usize), SysctlError> {
    let mut before = [UNKNOWN; SYSCTLS.len()];
    let mut changed = 0;
    for (sysctl, before) in SYSCTLS.iter().zip(&mut before) {
        if sysctl.ipv6 && !ipv6 {
            continue;
        }
        let value = read(sysctl.path)?;
        *before = value;
        if value != 1 {
            write(sysctl.path, 1)?;
            changed += 1;
        }
    }
    Ok((before, changed))
}

/// Puts back what was before. A setting that does not go back is logged: it does no harm.
pub(crate) fn restore(before: [u8; SYSCTLS.len()]) {
    for (sysctl, before) in SYSCTLS.iter().zip(before) {
        if matches!(before, UNKNOWN | 1) {
            continue;
        }
        if let Err(error) = write(sysctl.path, before) {
            tracing::warn!(%error, "a setting of a pod that left the mesh stays");
        }
    }
}

/// Whether IPv6 is switched on: on the machine, in the namespace and on lo, over which steering goes.
pub(crate) fn ipv6_enabled() -> bool {
    ["all", "lo"].iter().all(|interface| {
        std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"))
            .is_ok_and(|value| value.trim() == "0")
    })
}

/// The settings that this kernel does not know.
pub(crate) fn missing() -> Vec<&'static str> {
    let paths = SYSCTLS.iter().map(|sysctl| sysctl.path);
    paths.filter(|path| !Path::new(path).exists()).collect()
}

/// `fsopen(2)` and its sisters, which libc has no functions for.
fn private_procfs() -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let owned = |result: libc::c_long| match RawFd::try_from(result) {
        // SAFETY: the kernel has just made it for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: a string that lives over the call, and a flag.
    let context =
        owned(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), FSOPEN_CLOEXEC) })?;
    let context_fd = context.as_raw_fd();
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes no key, no value and no number.
    let created = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context_fd,
            FSCONFIG_CMD_CREATE,
            nothing,
            nothing,
            0,
        )
    };
    if created < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor and two numbers.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context_fd, FSMOUNT_CLOEXEC, 0) })
}

fn read(path: &'static str) -> Result<u8, SysctlError> {
    let text = std::fs::read_to_string(path).map_err(|source| SysctlError { path, source })?;
    text.trim().parse().map_err(|_| SysctlError {
        path,
        source: io::ErrorKind::InvalidData.into(),
    })
}

fn write(path: &'static str, value: u8) -> Result<(), SysctlError> {
    let value = value.to_string();
    let written = match std::fs::write(path, &value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            write_privately(path, &value)
        }
        written => written,
    };
    written.map_err(|source| SysctlError { path, source })
}

/// Writes through a procfs of our own: container runtimes mount `/proc/sys` read-only unless a container is
/// privileged, which is far more than this needs. It is attached nowhere and seen by nobody else.
fn write_privately(path: &str, value: &str) -> io::Result<()> {
    static PROCFS: OnceLock<OwnedFd> = OnceLock::new();
    let procfs = match PROCFS.get() {
        Some(procfs) => procfs,
        None => {
            let mounted = private_procfs()?;
            PROCFS.get_or_init(|| mounted)
        }
    };
    let inside = path.strip_prefix("/proc/").unwrap_or(path);
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let file = nix::fcntl::openat(procfs, inside, flags, Mode::empty())?;
    std::fs::File::from(file).write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_written_where_proc_sys_is_read_only() {
        // In a thread with network and mounts of its own, as a container has them.
        let written = std::thread::spawn(|| {
            use nix::mount::{MsFlags, mount};
            use nix::sched::{CloneFlags, unshare};
            const NOTHING: Option<&str> = None;
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("needs root");
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(NOTHING, "/", NOTHING, private, NOTHING).expect("private mounts");
            let bind = MsFlags::MS_BIND;
            mount(Some("/proc/sys"), "/proc/sys", NOTHING, bind, NOTHING).expect("bound");
            let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(NOTHING, "/proc/sys", NOTHING, read_only, NOTHING).expect("read-only");
            let path = SYSCTLS[0].path;
            let refused = std::fs::write(path, "1").expect_err("read-only");
            assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
            establish(false).expect("written all the same");
            read(path).expect("readable")
        });
        assert_eq!(written.join().expect("no panic"), 1);
    }
}
