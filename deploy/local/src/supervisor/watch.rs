//! Notices changes of the manifest directory.

use std::path::Path;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::event::Event;

/// Watches `directory`. Where that is impossible (inotify's limits), the regular look of
/// the event loop has to do.
pub(super) fn watch(directory: &Path, events: mpsc::Sender<Event>) -> Option<RecommendedWatcher> {
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading is an access and must not make us read again.
        let relevant = event.is_ok_and(|event| {
            matches!(
                event.kind,
                EventKind::Create(_) | EventKind::Modify(_) | EventKind::Remove(_)
            )
        });
        if relevant {
            // A full queue has the same event in it, or the regular look follows.
            let _ = events.try_send(Event::Manifests);
        }
    });
    let watched = watcher.and_then(|mut watcher| {
        watcher.watch(directory, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    match watched {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(%error, "changes of the manifests are noticed late");
            None
        }
    }
}
