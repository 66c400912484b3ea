//! Follows a [`Directory`] and publishes every new state of it.
//!
//! The kernel's notifications say only that something happened; the directory then
//! finds out what. Bursts (an editor's save, a ConfigMap's swap) are waited out, and a
//! slow poll catches what no notification tells: links that lead elsewhere, network
//! file systems, exhausted inotify limits.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::directory::Directory;
use crate::model::{Finding, Objects, Severity};

/// A source's state: all objects, and what is wrong with them.
#[derive(Debug, Clone, Default)]
pub struct SourceState {
    /// All objects.
    pub objects: Objects,
    /// What is wrong.
    pub findings: Arc<Vec<Finding>>,
    /// Everything has been read once. Before that nothing is to be concluded from what is
    /// not among the objects.
    pub synced: bool,
}

/// How long the directory has to be quiet before it is read.
#[derive(Debug, Clone, Copy)]
pub struct WatchOptions {
    /// Quiet time after a notification.
    pub debounce: Duration,
    /// Longest time that a busy directory is waited for.
    pub max_delay: Duration,
    /// How often it is looked at without a notification.
    pub poll: Duration,
}

impl Default for WatchOptions {
    fn default() -> Self {
        Self {
            debounce: Duration::from_millis(50),
            max_delay: Duration::from_millis(500),
            poll: Duration::from_secs(5),
        }
    }
}

/// A directory that is being followed. Dropping it ends that.
#[derive(Debug)]
pub struct DirectorySource {
    state: watch::Receiver<SourceState>,
    task: JoinHandle<()>,
}

impl DirectorySource {
    /// Reads `roots`, directories or files, and follows them. Returns when they have
    /// been read once; what is wrong with them is in the state's findings.
    ///
    /// Must be called within a tokio runtime.
    pub async fn open(roots: Vec<PathBuf>, options: WatchOptions) -> Self {
        // One pending notification is as good as a thousand.
        let (wake, woken) = mpsc::channel(1);
        let watcher = watch_paths(&roots, wake);
        let (directory, state) = load(Directory::new(roots)).await;
        log_new(&[], &state.findings);
        let (publish, receiver) = watch::channel(state);
        let task = tokio::spawn(follow(directory, watcher, woken, publish, options));
        Self {
            state: receiver,
            task,
        }
    }

    /// The state and its changes.
    pub fn subscribe(&self) -> watch::Receiver<SourceState> {
        self.state.clone()
    }
}

impl Drop for DirectorySource {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `None` leaves the poll to find changes.
fn watch_paths(roots: &[PathBuf], wake: mpsc::Sender<()>) -> Option<RecommendedWatcher> {
    let handler = move |event: notify::Result<notify::Event>| {
        // Reading the files is an access too.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _ = wake.try_send(());
        }
    };
    let mut watcher = notify::recommended_watcher(handler)
        .inspect_err(|error| tracing::warn!(%error, "no change notifications, polling instead"))
        .ok()?;
    for root in roots {
        // A file's own watch would follow its inode, which an atomic rename replaces.
        let (target, mode) = match root.parent() {
            Some(parent) if root.is_file() && parent.as_os_str().is_empty() => {
                (Path::new("."), RecursiveMode::NonRecursive)
            }
            Some(parent) if root.is_file() => (parent, RecursiveMode::NonRecursive),
            _ => (root.as_path(), RecursiveMode::Recursive),
        };
        if let Err(error) = watcher.watch(target, mode) {
            tracing::warn!(path = %target.display(), %error, "no change notifications, polling instead");
        }
    }
    Some(watcher)
}

/// The file system may block, so it is read on a thread that may. A defect there ends the
/// source: what was published stays, where an empty state would take everything away.
async fn load(mut directory: Directory) -> (Directory, SourceState) {
    let loaded = tokio::task::spawn_blocking(move || {
        directory.reload();
        directory
    });
    let directory = match loaded.await {
        Ok(directory) => directory,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime shuts down, and this task with it.
        Err(_) => std::future::pending().await,
    };
    let state = SourceState {
        objects: directory.objects().clone(),
        findings: Arc::new(directory.findings().to_vec()),
        synced: true,
    };
    (directory, state)
}

async fn follow(
    mut directory: Directory,
    mut watcher: Option<RecommendedWatcher>,
    mut woken: mpsc::Receiver<()>,
    publish: watch::Sender<SourceState>,
    options: WatchOptions,
) {
    loop {
        let poll_at = Instant::now() + options.poll;
        match timeout_at(poll_at, woken.recv()).await {
            Ok(Some(())) => settle(&mut woken, options).await,
            // No watcher any more: the poll remains.
            Ok(None) => {
                watcher = None;
                tokio::time::sleep_until(poll_at).await;
            }
            Err(_) => {}
        }
        let before = publish.borrow().clone();
        let (reloaded, state) = load(directory).await;
        directory = reloaded;
        log_new(&before.findings, &state.findings);
        publish.send_if_modified(|current| {
            let changed =
                !current.objects.same(&state.objects) || current.findings != state.findings;
            *current = state;
            changed
        });
        if publish.is_closed() {
            drop(watcher);
            return;
        }
    }
}

/// Waits until nothing has happened for a while.
async fn settle(woken: &mut mpsc::Receiver<()>, options: WatchOptions) {
    let end = Instant::now() + options.max_delay;
    loop {
        let quiet = (Instant::now() + options.debounce).min(end);
        match timeout_at(quiet, woken.recv()).await {
            Ok(Some(())) if quiet < end => {}
            _ => return,
        }
    }
}

/// Every finding is logged once, when it appears.
pub(super) fn log_new(before: &[Finding], now: &[Finding]) {
    let known: HashSet<String> = before.iter().map(ToString::to_string).collect();
    for finding in now {
        let text = finding.to_string();
        if known.contains(&text) {
            continue;
        }
        match finding.severity {
            Severity::Error => tracing::error!("{text}"),
            Severity::Warning => tracing::warn!("{text}"),
            Severity::Info => tracing::info!("{text}"),
        }
    }
}
