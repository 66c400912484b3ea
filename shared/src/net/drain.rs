//! Draining: one signal from whoever shuts something down to everything that has to end, and
//! one wait for all of it to have ended. Works across threads.

use std::task::Poll;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// How to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainMode {
    /// Take nothing new, tell peers, let what is there go on until the deadline.
    Graceful {
        /// When to stop waiting.
        deadline: Instant,
    },
    /// End now: there is nothing to wait for (the pod is gone).
    Immediate,
}

/// Starts a drain. Dropping it without starting one drains immediately: whatever it stood for
/// is gone.
#[derive(Debug)]
pub struct DrainTrigger(watch::Sender<Option<DrainMode>>);

/// Sees a drain start. What has to end holds one until it has ended.
#[derive(Debug, Clone)]
pub struct DrainWatcher(watch::Receiver<Option<DrainMode>>);

/// A trigger and its first watcher; more are made by cloning.
pub fn channel() -> (DrainTrigger, DrainWatcher) {
    let (sender, receiver) = watch::channel(None);
    (DrainTrigger(sender), DrainWatcher(receiver))
}

impl DrainTrigger {
    /// Signals, without waiting. May be called again with a stricter mode: an immediate drain
    /// stays one.
    pub fn signal(&self, mode: DrainMode) {
        self.0.send_if_modified(|current| {
            let changed = *current != Some(DrainMode::Immediate) && *current != Some(mode);
            if changed {
                *current = Some(mode);
            }
            changed
        });
    }

    /// Waits until all watchers are gone.
    pub async fn completed(&self) {
        self.0.closed().await;
    }

    /// Signals, waits for all watchers to go, and at the deadline of a graceful drain makes it
    /// an immediate one. `grace` is what an immediate drain may take.
    ///
    /// Returns whether all watchers are gone.
    pub async fn drain(&self, mode: DrainMode, grace: std::time::Duration) -> bool {
        self.signal(mode);
        if let DrainMode::Graceful { deadline } = mode {
            if timeout_at(deadline, self.completed()).await.is_ok() {
                return true;
            }
            self.signal(DrainMode::Immediate);
        }
        tokio::time::timeout(grace, self.completed()).await.is_ok()
    }

    /// Another watcher.
    pub fn watcher(&self) -> DrainWatcher {
        DrainWatcher(self.0.subscribe())
    }
}

impl DrainWatcher {
    /// The mode, if a drain was signalled.
    pub fn mode(&self) -> Option<DrainMode> {
        let mode = *self.0.borrow();
        mode.or_else(|| {
            self.0
                .has_changed()
                .is_err()
                .then_some(DrainMode::Immediate)
        })
    }

    /// Waits for the signal; at once if it was there before.
    pub async fn signalled(&mut self) -> DrainMode {
        // An error means that the trigger is gone.
        let mode = self.0.wait_for(Option::is_some).await.map(|mode| *mode);
        mode.ok().flatten().unwrap_or(DrainMode::Immediate)
    }

    /// Waits until the mode is another one than was last seen; for ever if the trigger is gone.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::poll_fn(|_| Poll::<()>::Pending).await;
        }
    }
}
