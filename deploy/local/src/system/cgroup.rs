//! cgroup v2: every process of a mesh is in the mesh's part of the tree, which is
//! how all of them are found and ended, whatever became of the supervisor.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::LocalError;

/// Where the cgroup v2 tree is mounted. On machines with both versions that is not
/// `/sys/fs/cgroup`.
///
/// # Errors
/// [`LocalError::Config`] when there is none.
pub(crate) fn mount_point() -> Result<PathBuf, LocalError> {
    let path = Path::new("/proc/self/mounts");
    let mounts = fs::read_to_string(path).map_err(LocalError::file("read", path))?;
    find_mount(&mounts).ok_or_else(|| {
        LocalError::Config(
            "no cgroup v2 file system is mounted; `mount -t cgroup2 none /sys/fs/cgroup/unified` \
             makes one"
                .into(),
        )
    })
}

fn find_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Makes a cgroup and those above it.
pub(crate) fn create(path: &Path) -> Result<(), LocalError> {
    create_dirs(path).map_err(LocalError::file("create cgroup", path))
}

/// `create_dir_all` against the removal of a neighbour's last directory, which takes the
/// shared parents with it.
pub(crate) fn create_dirs(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match fs::create_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < 100 => tries += 1,
            other => return other,
        }
    }
}

/// Ends every process in the cgroup and below it with SIGKILL and removes the cgroups.
/// One that does not exist is fine.
///
/// # Errors
/// [`LocalError::File`] when a cgroup is still busy after `deadline`.
pub(crate) fn kill_and_remove(path: &Path, deadline: Duration) -> Result<(), LocalError> {
    let until = Instant::now() + deadline;
    loop {
        match kill(path).and_then(|()| remove_tree(path)) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if Instant::now() >= until => {
                return Err(LocalError::file("remove cgroup", path)(error));
            }
            // Processes take a moment to die, and a cgroup is busy until they have.
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Sends SIGKILL to every process below `path`.
pub(crate) fn kill(path: &Path) -> io::Result<()> {
    match fs::write(path.join("cgroup.kill"), "1") {
        // cgroup.kill is there since Linux 5.14.
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.exists() => {
            kill_one_by_one(path)
        }
        other => other,
    }
}

fn kill_one_by_one(path: &Path) -> io::Result<()> {
    for pid in pids(path)? {
        // It may be gone already, which is what we want.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            kill_one_by_one(&entry.path())?;
        }
    }
    Ok(())
}

/// The processes that are in exactly this cgroup.
pub(crate) fn pids(path: &Path) -> io::Result<Vec<i32>> {
    let text = fs::read_to_string(path.join("cgroup.procs"))?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_version_is_found_beside_the_first() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(find_mount(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_mount("proc /proc proc rw 0 0\n"), None);
    }
}
