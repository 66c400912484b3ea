//! The settings of a pod's network namespace that steering needs.
//!
//! `/proc/sys/net` shows the namespace of the thread that looks: all functions here are called inside it.

use std::io;
use std::path::Path;

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
#[error("{path}: {source} (it must be writable and 1; is /proc/sys mounted read-only?)")]
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

fn read(path: &'static str) -> Result<u8, SysctlError> {
    let text = std::fs::read_to_string(path).map_err(|source| SysctlError { path, source })?;
    text.trim().parse().map_err(|_| SysctlError {
        path,
        source: io::ErrorKind::InvalidData.into(),
    })
}

fn write(path: &'static str, value: u8) -> Result<(), SysctlError> {
    std::fs::write(path, value.to_string()).map_err(|source| SysctlError { path, source })
}
