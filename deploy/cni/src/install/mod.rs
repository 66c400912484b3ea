//! The plugin in the node's CNI configuration: put in, kept in, taken out.
//!
//! A runtime uses the first configuration of its directory, whichever network plugin wrote
//! it. The plugin goes to the end of that one's list. Its owner may write it anew at any
//! time (an update, a restart) and then the plugin has to come back before the next pod
//! starts, so the directory is watched.

mod configuration;
mod file;

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::plugin::PLUGIN_TYPE;
pub use configuration::ConfigurationError;
use configuration::Form;

/// Without any sign the directories are looked at so often.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// After a sign: what writes a configuration may take some steps.
const SETTLE: Duration = Duration::from_millis(50);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);
/// A single configuration that was turned into a list keeps its text under this suffix.
const SAVED: &str = "adit-saved";
/// How the names of single configurations end.
const SINGLE: [&str; 2] = ["conf", "json"];

/// Why the plugin is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file could not be read, written or moved.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// No network plugin has written a configuration.
    #[error("{0} has no CNI configuration yet; the plugin joins the first one that comes")]
    NoConfiguration(PathBuf),
    /// A single plugin becomes a list, whose name is another one's.
    #[error("{single} cannot be joined: {list}, which would take its place, is somebody else's")]
    Taken {
        /// The configuration of a single plugin.
        single: PathBuf,
        /// The list.
        list: PathBuf,
    },
    /// The first configuration cannot take it.
    #[error("{path}: {source}")]
    Configuration {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConfigurationError,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::Io { what, path, source }
}

/// Puts the plugin in.
#[derive(Debug, Clone)]
pub struct Installer {
    /// The runtime's directory of plugins.
    pub bin_dir: PathBuf,
    /// The runtime's directory of configurations.
    pub conf_dir: PathBuf,
    /// The binary that is installed.
    pub binary: PathBuf,
    /// The plugin's entry of the list.
    pub entry: Value,
    /// The configuration to join, by its file's name; default: the one that a runtime uses.
    pub conf_name: Option<String>,
    /// The binary as it was last found in place.
    pub in_place: InPlace,
}

/// Two binaries that were the same when they were last read: while neither has been touched,
/// they need not be read again.
#[derive(Debug, Clone, Default)]
pub struct InPlace(Arc<Mutex<Option<[FileState; 2]>>>);

/// What changes with a file's content: device, inode, length, and both times in nanoseconds.
type FileState = (u64, u64, u64, (i64, i64), (i64, i64));

fn file_state(path: &Path) -> Option<FileState> {
    let found = fs::metadata(path).ok()?;
    let (modified, changed) = (
        (found.mtime(), found.mtime_nsec()),
        (found.ctime(), found.ctime_nsec()),
    );
    Some((found.dev(), found.ino(), found.len(), modified, changed))
}

impl Installer {
    /// Brings binary and configuration to where they should be; what had to be changed.
    ///
    /// # Errors
    /// [`InstallError`]; it may be tried again.
    pub fn reconcile(&self) -> Result<Vec<PathBuf>, InstallError> {
        let mut changed = Vec::new();
        // Never a configuration that names a binary which is not there.
        changed.extend(self.install_binary()?);
        let files = configurations(&self.conf_dir)?;
        let is_wanted = |path: &&PathBuf| {
            let name = self.conf_name.as_ref().map(|name| self.conf_dir.join(name));
            name.is_none_or(|name| same_stem(path, &name))
        };
        let wanted: Vec<PathBuf> = files.iter().filter(is_wanted).cloned().collect();
        let Some((primary, form)) = primary(&wanted) else {
            return Err(InstallError::NoConfiguration(self.conf_dir.clone()));
        };
        changed.extend(self.join(&primary, form)?);
        // Only the first one counts; another may have been the first before.
        for path in files.iter().filter(|path| !same_stem(path, &primary)) {
            if leave(path)? {
                changed.push(path.clone());
            }
        }
        Ok(changed)
    }

    fn install_binary(&self) -> Result<Option<PathBuf>, InstallError> {
        fs::create_dir_all(&self.bin_dir).map_err(io_error("make", &self.bin_dir))?;
        let target = self.bin_dir.join(PLUGIN_TYPE);
        // Before they are read: what is written meanwhile is read the next time.
        let states = file_state(&self.binary).zip(file_state(&target));
        let states = states.map(|(binary, target)| [binary, target]);
        if states.is_some() && *self.in_place.0.lock() == states {
            return Ok(None);
        }
        let wanted = fs::read(&self.binary).map_err(io_error("read", &self.binary))?;
        let mode = fs::metadata(&target).map(|file| file.permissions().mode() & 0o777);
        if fs::read(&target).is_ok_and(|found| found == wanted) && mode.is_ok_and(|m| m == 0o755) {
            *self.in_place.0.lock() = states;
            return Ok(None);
        }
        file::replace(&target, &wanted, 0o755).map_err(io_error("write", &target))?;
        Ok(Some(target))
    }

    /// Adds the entry to a configuration.
    fn join(&self, path: &Path, form: Form) -> Result<Option<PathBuf>, InstallError> {
        let refused = |source| InstallError::Configuration {
            path: path.to_owned(),
            source,
        };
        match form {
            Form::List => file::update(path, |text| {
                configuration::join(text, &self.entry).map_err(refused)
            }),
            Form::Single => {
                let text = fs::read(path).map_err(io_error("read", path))?;
                let list = configuration::to_list(&text, &self.entry).map_err(refused)?;
                let new = path.with_extension("conflist");
                let saved = saved(path);
                // Ours is one that was made of this file, as it is or as it was.
                let is_ours = |there: &[u8]| {
                    let before = fs::read(&saved).ok();
                    [Some(text.clone()), before]
                        .into_iter()
                        .flatten()
                        .any(|single| configuration::is_made_of(there, &single))
                };
                match fs::read(&new) {
                    Ok(there) if !is_ours(&there) => {
                        return Err(InstallError::Taken {
                            single: path.to_owned(),
                            list: new,
                        });
                    }
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(io_error("read", &new)(error));
                    }
                    _ => {}
                }
                file::replace(&new, list.as_bytes(), 0o600).map_err(io_error("write", &new))?;
                // The list takes force with this: `.conf` comes first.
                fs::rename(path, &saved).map_err(io_error("move", path))?;
                Ok(Some(new))
            }
        }
    }
}

/// Takes the plugin out of every configuration of the directory, and removes its binary.
///
/// # Errors
/// [`InstallError`]; what could be removed is.
pub fn uninstall(bin_dir: &Path, conf_dir: &Path) -> Result<(), InstallError> {
    let mut first = None;
    match configurations(conf_dir) {
        Ok(files) => {
            for path in files {
                if let Err(error) = leave(&path) {
                    first.get_or_insert(error);
                }
            }
        }
        Err(error) => first = Some(error),
    }
    // The binary last: no configuration may name one that is not there.
    if first.is_none() {
        let binary = bin_dir.join(PLUGIN_TYPE);
        match fs::remove_file(&binary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                first = Some(io_error("remove", &binary)(error));
            }
            _ => {}
        }
    }
    first.map_or(Ok(()), Err)
}

/// Takes the plugin out of one configuration; whether it was in.
fn leave(path: &Path) -> Result<bool, InstallError> {
    if path.extension().is_none_or(|e| e != "conflist") {
        return Ok(false);
    }
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io_error("read", path)(error)),
    };
    if configuration::leave(&text).is_none() {
        return Ok(false);
    }
    let mut is_put_back = false;
    for original in SINGLE.map(|extension| path.with_extension(extension)) {
        let saved = saved(&original);
        let Ok(single) = fs::read(&saved) else {
            continue;
        };
        // This list was made of a single configuration, which is put back as it was, unless
        // its owner has written it anew, or a list of its own in the place of ours.
        let is_made_of_it = configuration::is_made_of(&text, &single);
        if is_made_of_it && !original.exists() {
            fs::rename(&saved, &original).map_err(io_error("move", &saved))?;
        } else {
            fs::remove_file(&saved).map_err(io_error("remove", &saved))?;
        }
        is_put_back |= is_made_of_it;
    }
    if is_put_back {
        fs::remove_file(path).map_err(io_error("remove", path))?;
    } else {
        file::update(path, |text| Ok(configuration::leave(text)))?;
    }
    Ok(true)
}

fn saved(conf: &Path) -> PathBuf {
    let mut name = conf.to_owned().into_os_string();
    name.push(".");
    name.push(SAVED);
    name.into()
}

fn same_stem(one: &Path, other: &Path) -> bool {
    one.file_stem() == other.file_stem()
}

/// The configurations of a directory, in the order in which runtimes look at them.
fn configurations(directory: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("list", directory)(error)),
    };
    let is_configuration = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("conf" | "conflist" | "json"))
    };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = paths.filter(is_configuration).collect();
    paths.sort();
    Ok(paths)
}

/// The one that a runtime uses: the first that it can read.
fn primary(files: &[PathBuf]) -> Option<(PathBuf, Form)> {
    files.iter().find_map(|path| {
        let text = fs::read(path).ok()?;
        let form = configuration::form(&text)?;
        let is_list = path.extension().is_some_and(|e| e == "conflist");
        // Runtimes go by the name.
        let fits = is_list == (form == Form::List);
        fits.then(|| (path.clone(), form))
    })
}

/// Whether the plugin is still wanted. What puts it back and what takes it out hold it while they
/// work: a round that was under way must not put back what has just been taken out.
#[derive(Debug, Clone)]
pub struct Wanted(Arc<Mutex<bool>>);

impl Default for Wanted {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(true)))
    }
}

impl Wanted {
    /// Takes the plugin out for good: [`keep`] puts it back no more.
    ///
    /// # Errors
    /// As [`uninstall`].
    pub fn uninstall(&self, bin_dir: &Path, conf_dir: &Path) -> Result<(), InstallError> {
        let mut wanted = self.0.lock();
        *wanted = false;
        uninstall(bin_dir, conf_dir)
    }

    fn reconcile(&self, installer: &Installer) -> Result<Vec<PathBuf>, InstallError> {
        let wanted = self.0.lock();
        if *wanted {
            installer.reconcile()
        } else {
            Ok(Vec::new())
        }
    }
}

/// Keeps the plugin installed until dropped, as long as it is `wanted`. `installed` says whether
/// it is.
pub async fn keep(installer: Installer, installed: Arc<AtomicBool>, wanted: Wanted) {
    let changed = Arc::new(Notify::new());
    let mut watch: Option<Watch> = None;
    let mut complaint = None;
    loop {
        // Before looking, so that nothing happens unseen in between.
        if watch
            .as_ref()
            .is_none_or(|watch| watch.directories != inodes(&installer))
        {
            watch = Watch::new(&installer, changed.clone())
                .inspect_err(|e| debug!("changes are noticed late: {e}"))
                .ok();
        }
        let (worker, gate) = (installer.clone(), wanted.clone());
        let failed = "the installer failed".to_owned();
        let done = spawn_blocking(move || gate.reconcile(&worker).map_err(|e| e.to_string()));
        let done = done.await.unwrap_or(Err(failed));
        installed.store(done.is_ok(), Ordering::Relaxed);
        let pause = match done {
            Ok(paths) => {
                for path in &paths {
                    info!(path = %path.display(), "the CNI plugin is installed");
                }
                complaint = None;
                LOOK_INTERVAL
            }
            Err(error) => {
                if complaint.as_ref() != Some(&error) {
                    warn!("the CNI plugin is not installed: {error}");
                }
                complaint = Some(error);
                RETRY
            }
        };
        if timeout(pause, changed.notified()).await.is_ok() {
            sleep(SETTLE).await;
        }
    }
}

/// Both directories, watched; dropped, it stops.
struct Watch {
    _watcher: notify::RecommendedWatcher,
    /// Which directories they were: one that is made anew is not watched.
    directories: [Option<u64>; 2],
}

impl Watch {
    fn new(installer: &Installer, changed: Arc<Notify>) -> notify::Result<Self> {
        let tell = move |event: notify::Result<notify::Event>| {
            // Reading is what we do ourselves.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                changed.notify_one();
            }
        };
        let directories = inodes(installer);
        let mut watcher = notify::recommended_watcher(tell)?;
        for directory in [&installer.bin_dir, &installer.conf_dir] {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
        }
        Ok(Self {
            _watcher: watcher,
            directories,
        })
    }
}

fn inodes(installer: &Installer) -> [Option<u64>; 2] {
    [&installer.bin_dir, &installer.conf_dir]
        .map(|directory| Some(fs::metadata(directory).ok()?.ino()))
}
