//! Draining: one side says that it is time to end, many listen, on any thread.

use std::time::Duration;

use tokio::sync::watch;

/// How to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainMode {
    /// New work is refused; what is open has so long.
    Graceful(Duration),
    /// Everything ends now.
    Immediate,
}

impl DrainMode {
    /// How long open work may go on.
    pub fn deadline(self) -> Duration {
        match self {
            Self::Graceful(deadline) => deadline,
            Self::Immediate => Duration::ZERO,
        }
    }
}

/// Says when to drain.
#[derive(Debug)]
pub struct DrainTrigger {
    sender: watch::Sender<Option<DrainMode>>,
}

/// Hears it.
#[derive(Debug, Clone)]
pub struct DrainWatcher {
    receiver: watch::Receiver<Option<DrainMode>>,
}

/// The two ends.
pub fn channel() -> (DrainTrigger, DrainWatcher) {
    let (sender, receiver) = watch::channel(None);
    (DrainTrigger { sender }, DrainWatcher { receiver })
}

impl DrainTrigger {
    /// Begins to drain, or hurries a drain that has begun.
    pub fn drain(&self, mode: DrainMode) {
        self.sender.send_replace(Some(mode));
    }
}

impl DrainWatcher {
    /// Completes when draining has begun. A trigger that was dropped means at once.
    pub async fn draining(&mut self) -> DrainMode {
        match self.receiver.wait_for(Option::is_some).await {
            Ok(mode) => mode.unwrap_or(DrainMode::Immediate),
            Err(_) => DrainMode::Immediate,
        }
    }

    /// Whether draining has begun.
    pub fn is_draining(&self) -> bool {
        self.receiver.borrow().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_watchers_hear_and_late_ones_too() {
        let (trigger, watcher) = channel();
        let mut early = watcher.clone();
        assert!(!watcher.is_draining());
        let mode = DrainMode::Graceful(Duration::from_secs(3));
        let waiting = tokio::spawn(async move { early.draining().await });
        trigger.drain(mode);
        assert_eq!(waiting.await.expect("joined"), mode);
        assert_eq!(watcher.clone().draining().await, mode);
    }

    #[tokio::test]
    async fn a_trigger_that_is_gone_means_now() {
        let (trigger, mut watcher) = channel();
        drop(trigger);
        assert_eq!(watcher.draining().await, DrainMode::Immediate);
    }
}
