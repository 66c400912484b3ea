//! Network namespaces, each held by a bind mount at a path, as `ip netns` does it.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::error::LocalError;

/// Makes a new network namespace, keeps it at `path`, and sets the sysctls given as
/// (path below `/proc/sys`, value). One that is set with [`Sysctl::optional`] may fail.
pub(crate) fn create(path: &Path, sysctls: &[Sysctl]) -> Result<(), LocalError> {
    File::create(path).map_err(LocalError::file("create", path))?;
    let path = path.to_owned();
    let sysctls = sysctls.to_vec();
    on_thread(move || {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|e| LocalError::system("cannot make a network namespace")(e.into()))?;
        mount(
            Some("/proc/thread-self/ns/net"),
            &path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .map_err(|e| LocalError::file("keep the network namespace at", &path)(e.into()))?;
        for sysctl in &sysctls {
            sysctl.write()?;
        }
        Ok(())
    })
}

/// Lets go of the namespace at `path`; it ends when the last process in it does.
pub(crate) fn remove(path: &Path) -> Result<(), LocalError> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(error) => return Err(LocalError::file("unmount", path)(error.into())),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(LocalError::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Runs `work` on a thread of its own inside the namespace at `path`.
pub(crate) fn within<T, F>(path: &Path, work: F) -> Result<T, LocalError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, LocalError> + Send + 'static,
{
    let file = File::open(path).map_err(LocalError::file("open network namespace", path))?;
    let path = path.to_owned();
    on_thread(move || {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|e| LocalError::file("enter network namespace", &path)(e.into()))?;
        work()
    })
}

/// A namespace belongs to a thread, and a thread that changed its own must not be
/// anybody else's afterwards.
fn on_thread<T, F>(work: F) -> Result<T, LocalError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, LocalError> + Send + 'static,
{
    let thread = thread::Builder::new()
        .name("netns".into())
        .spawn(work)
        .map_err(LocalError::system("cannot start a thread"))?;
    thread.join().unwrap_or_else(|_| {
        Err(LocalError::Config(
            "a thread in a network namespace panicked".into(),
        ))
    })
}

/// One setting of a network namespace.
#[derive(Debug, Clone)]
pub(crate) struct Sysctl {
    key: String,
    value: String,
    optional: bool,
}

impl Sysctl {
    /// `key` with slashes, below `/proc/sys/net`.
    pub(crate) fn new(key: &str, value: &str) -> Self {
        Self {
            key: key.into(),
            value: value.into(),
            optional: false,
        }
    }

    /// The same, for a kernel that may not have it.
    pub(crate) fn optional(key: &str, value: &str) -> Self {
        Self {
            optional: true,
            ..Self::new(key, value)
        }
    }

    fn write(&self) -> Result<(), LocalError> {
        let path = Path::new("/proc/sys/net").join(&self.key);
        match fs::write(&path, &self.value) {
            Err(error) if self.optional => {
                tracing::info!(sysctl = %path.display(), value = self.value, %error, "not set");
                Ok(())
            }
            other => other.map_err(LocalError::file("set", &path)),
        }
    }
}
