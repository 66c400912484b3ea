//! Removes a mesh completely, whatever state it is in: after `down`, after a crash of
//! the supervisor in the middle of `up`, twice in a row.
//!
//! Nothing is found by name patterns on the machine: processes by the mesh's cgroup,
//! mounts by the mesh's directory. Links and namespaces end with the processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::layout::Layout;
use super::{cgroup, process};
use crate::config::{default_state_root, validate_name};
use crate::error::LocalError;
use crate::state::MeshStatus;

/// How long a killed process may take to go.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long a supervisor that was asked to end may take.
const SUPERVISOR_DEADLINE: Duration = Duration::from_secs(20);

/// Removes the mesh `name`. Returns whether there was anything to remove.
///
/// A supervisor that still runs in another process is asked to end, and killed when it
/// does not.
///
/// # Errors
/// [`LocalError`] that names what could not be removed; everything else is removed.
pub fn down(name: &str) -> Result<bool, LocalError> {
    down_at(&default_state_root(), name)
}

/// [`down`] for meshes whose state is elsewhere.
///
/// # Errors
/// See [`down`].
pub(crate) fn down_at(state_root: &Path, name: &str) -> Result<bool, LocalError> {
    validate_name("mesh", name)?;
    let layout = Layout::new(state_root, name)?;
    if !layout.root.exists() && !layout.cgroup.exists() {
        return Ok(false);
    }
    end_supervisor(&layout);
    remove(&layout)?;
    Ok(true)
}

/// Removes every ephemeral mesh (of a test) whose supervisor is gone. Returns their names.
///
/// # Errors
/// [`LocalError`] of the first that could not be removed.
pub fn sweep() -> Result<Vec<String>, LocalError> {
    sweep_at(&default_state_root())
}

pub(crate) fn sweep_at(state_root: &Path) -> Result<Vec<String>, LocalError> {
    let mut swept = Vec::new();
    for name in meshes(state_root)? {
        let layout = Layout::new(state_root, &name)?;
        let Ok(status) = MeshStatus::load(&layout.state_file()) else {
            continue;
        };
        if status.ephemeral && !process::is_alive(status.supervisor) {
            remove(&layout)?;
            swept.push(name);
        }
    }
    Ok(swept)
}

/// Names of the meshes that have a state directory.
pub(crate) fn meshes(state_root: &Path) -> Result<Vec<String>, LocalError> {
    let entries = match fs::read_dir(state_root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(LocalError::file("read", state_root)(error)),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

/// Removes all that belongs to a mesh, without asking its supervisor.
pub(crate) fn remove(layout: &Layout) -> Result<(), LocalError> {
    let killed = cgroup::kill_and_remove(&layout.cgroup, KILL_DEADLINE);
    let unmounted = unmount_below(&layout.root);
    let removed = match fs::remove_dir_all(&layout.root) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(LocalError::file("remove", &layout.root)(error))
        }
        _ => Ok(()),
    };
    // The parents are shared by all meshes and stay as long as one is there.
    let parents = [layout.cgroup.parent(), layout.root.parent()];
    for parent in parents.into_iter().flatten() {
        let _ = fs::remove_dir(parent);
    }
    killed.and(unmounted).and(removed)
}

fn end_supervisor(layout: &Layout) {
    let Ok(status) = MeshStatus::load(&layout.state_file()) else {
        return;
    };
    if status.supervisor.pid == std::process::id() {
        return;
    }
    process::signal(status.supervisor, Signal::SIGTERM);
    let until = Instant::now() + SUPERVISOR_DEADLINE;
    while process::is_alive(status.supervisor) && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    process::signal(status.supervisor, Signal::SIGKILL);
}

fn unmount_below(root: &Path) -> Result<(), LocalError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(LocalError::file("read", path))?;
    // Later mounts lie on or in earlier ones.
    for target in mounts_below(&text, root).into_iter().rev() {
        match umount2(&target, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(error) => return Err(LocalError::file("unmount", &target)(error.into())),
        }
    }
    Ok(())
}

/// proc_pid_mountinfo(5): the fifth field is the mount point.
fn mounts_below(mountinfo: &str, root: &Path) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4).map(PathBuf::from))
        .filter(|target| target.starts_with(root))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_the_mesh_are_its_own() {
        let text = "21 1 0:1 / /run rw - tmpfs tmpfs rw\n\
                    22 21 0:2 / /run/adit/local/a/netns rw shared:1 - tmpfs tmpfs rw\n\
                    23 22 0:3 net:[1] /run/adit/local/a/netns/fabric rw - nsfs nsfs rw\n\
                    24 21 0:2 / /run/adit/local/ab/netns rw - tmpfs tmpfs rw\n";
        let found = mounts_below(text, Path::new("/run/adit/local/a"));
        let expected: Vec<PathBuf> = vec![
            "/run/adit/local/a/netns".into(),
            "/run/adit/local/a/netns/fabric".into(),
        ];
        assert_eq!(found, expected);
    }
}
