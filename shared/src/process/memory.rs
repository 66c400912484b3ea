//! Memory of the program itself: code that was needed once does not stay resident.

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;

/// A process that needs less of a core than this is idle: timers, renewals, reports. Checking the
/// capture of a few pods every 3 s takes up to 1 %.
const IDLE_SHARE: f64 = 0.03;

/// A multiple of the page size on every architecture that we build for.
#[cfg(target_os = "linux")]
const PAGE: u64 = 64 << 10;

/// Lets go of memory while nothing happens.
#[derive(Debug)]
pub struct IdleMemory {
    looked: Instant,
    used: Duration,
}

impl Default for IdleMemory {
    fn default() -> Self {
        Self {
            looked: Instant::now(),
            used: cpu_time(),
        }
    }
}

impl IdleMemory {
    /// To be called from time to time: when the process has been idle since the last call, what it
    /// does not need for that leaves its memory.
    pub fn look(&mut self) {
        let (now, used) = (Instant::now(), cpu_time());
        let elapsed = now.saturating_duration_since(self.looked);
        let idle = used.saturating_sub(self.used) < elapsed.mul_f64(IDLE_SHARE);
        (self.looked, self.used) = (now, used);
        if idle {
            forget_code();
        }
    }

    /// When that was last done.
    pub fn looked(&self) -> Instant {
        self.looked
    }
}

/// CPU time of the whole process.
fn cpu_time() -> Duration {
    getrusage(UsageWho::RUSAGE_SELF)
        .map(|usage| {
            let micros = |time: nix::sys::time::TimeVal| time.num_microseconds();
            let micros = micros(usage.user_time()) + micros(usage.system_time());
            Duration::from_micros(u64::try_from(micros).unwrap_or(0))
        })
        .unwrap_or_default()
}

/// Forgets which pages of the program's code and constants were touched so far, so that those that
/// only starting or a burst needed do not stay resident. What is used again is mapped again, from
/// the page cache and not from the disk: some hundred faults of half a microsecond.
///
/// A probe that somebody has put into the code is lost.
pub fn forget_code() {
    #[cfg(target_os = "linux")]
    // SAFETY: the callback has the type that is asked for and does not unwind.
    unsafe {
        libc::dl_iterate_phdr(Some(forget_code_of), std::ptr::null_mut());
    }
}

/// Called for the program and each of its libraries.
#[cfg(target_os = "linux")]
unsafe extern "C" fn forget_code_of(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: dl_iterate_phdr passes a valid object, whose headers live as long as it.
    let (base, headers) = unsafe {
        let object = &*object;
        if object.dlpi_phdr.is_null() {
            return 0;
        }
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr, headers)
    };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        // Whole pages of the segment: what it shares with its neighbours stays.
        let begin = (base + header.p_vaddr).next_multiple_of(PAGE);
        let end = (base + header.p_vaddr + header.p_memsz) / PAGE * PAGE;
        if begin < end {
            // SAFETY: the segment is mapped as long as the object is, and only from its file: it
            // was never writable, so every page reads the same when it is mapped again.
            unsafe {
                libc::madvise(
                    begin as *mut libc::c_void,
                    (end - begin) as usize,
                    libc::MADV_DONTNEED,
                );
            }
        }
    }
    0
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// KiB of files that are mapped and resident.
    fn resident_files() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
        let line = status.lines().find_map(|l| l.strip_prefix("RssFile:"));
        let size = line.and_then(|l| l.trim().strip_suffix(" kB"));
        size.and_then(|s| s.parse().ok()).expect("RssFile in kB")
    }

    #[test]
    fn code_that_was_forgotten_still_runs_and_is_not_resident() {
        let before = resident_files();
        forget_code();
        let after = resident_files();
        assert!(after < before, "{before} -> {after} KiB");
        assert_eq!(format!("{:?}", (1, "text")), "(1, \"text\")");
    }
}
