//! Processes by number: whether one is still the one that was meant, signals, and
//! where programs are found.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::state::ProcessId;

/// The process with this number, if there is one.
pub(crate) fn identify(pid: u32) -> Option<ProcessId> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(ProcessId {
        pid,
        start_time: start_time(&stat)?,
    })
}

/// Whether exactly this process still runs (the number may be somebody else's by now).
pub(crate) fn is_alive(process: ProcessId) -> bool {
    identify(process.pid) == Some(process)
}

/// Sends a signal to exactly this process; nothing if it is gone.
pub(crate) fn signal(process: ProcessId, signal: Signal) {
    if is_alive(process)
        && let Ok(pid) = i32::try_from(process.pid)
    {
        // It may end in between, which is what signals are for.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Field 22 of proc_pid_stat(5); none for a zombie, which only waits to be noticed. The
/// second field is a name in parentheses that may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The file that `program` means when looked up in `dirs` and then in `PATH`.
pub(crate) fn find_program(program: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    if program.contains('/') {
        return is_executable(Path::new(program)).then(|| program.into());
    }
    let path = search_path(dirs);
    path.split(':')
        .map(|dir| Path::new(dir).join(program))
        .find(|candidate| is_executable(candidate))
}

/// The `PATH` of everything that runs in a mesh.
pub(crate) fn search_path(dirs: &[PathBuf]) -> String {
    let own = dirs.iter().map(|dir| dir.display().to_string());
    let inherited = std::env::var("PATH").unwrap_or_default();
    let usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let mut all: Vec<String> = Vec::new();
    let rest = inherited.split(':').chain(usual.split(':'));
    for dir in own.chain(rest.map(String::from)) {
        if !dir.is_empty() && !all.contains(&dir) {
            all.push(dir);
        }
    }
    all.join(":")
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_survives_a_strange_name() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_time(stat), Some(4242));
        assert_eq!(start_time(&stat.replace(" S ", " Z ")), None);
        assert_eq!(start_time("7 (cut"), None);
    }

    #[test]
    fn a_process_is_not_its_successor() {
        let own = identify(std::process::id()).map(|p| (is_alive(p), p));
        assert!(matches!(own, Some((true, _))));
        let other = own.map(|(_, p)| ProcessId {
            start_time: p.start_time + 1,
            ..p
        });
        assert!(other.is_some_and(|p| !is_alive(p)));
    }
}
