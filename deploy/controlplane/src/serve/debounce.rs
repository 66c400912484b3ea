//! Collects snapshots that follow each other closely into one push.
//!
//! A change of one object often comes as several (a Deployment's pods, a Service and its
//! endpoints). Waiting 10 ms for more costs nobody anything and saves pushes; waiting is
//! bounded, so that steady change is pushed ten times a second.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::snapshot::ResourceSnapshot;

/// How long to wait for more, and how long at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Debounce {
    /// After every change.
    pub quiet: Duration,
    /// After the first change.
    pub max: Duration,
}

impl Default for Debounce {
    fn default() -> Self {
        Self {
            quiet: Duration::from_millis(10),
            max: Duration::from_millis(100),
        }
    }
}

impl Debounce {
    /// Forwards snapshots until the source or all receivers are gone.
    pub(super) async fn run(
        self,
        mut source: watch::Receiver<Arc<ResourceSnapshot>>,
        target: watch::Sender<Arc<ResourceSnapshot>>,
    ) {
        while source.changed().await.is_ok() {
            let last = Instant::now() + self.max;
            loop {
                source.mark_unchanged();
                let until = last.min(Instant::now() + self.quiet);
                match timeout_at(until, source.changed()).await {
                    Ok(Ok(())) if Instant::now() < last => {}
                    _ => break,
                }
            }
            let snapshot = source.borrow_and_update().clone();
            if target.send(snapshot).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::SnapshotBuilder;
    use super::*;

    #[tokio::test]
    async fn a_burst_is_one_push_and_steady_change_is_not_held_back() {
        let debounce = Debounce {
            quiet: Duration::from_millis(20),
            max: Duration::from_millis(100),
        };
        let (sender, source) = watch::channel(Arc::new(ResourceSnapshot::default()));
        let (target, mut pushed) = watch::channel(Arc::new(ResourceSnapshot::default()));
        let task = tokio::spawn(debounce.run(source, target));
        let mut snapshot = SnapshotBuilder::new().build();
        let mut next = || {
            let mut edit = snapshot.edit();
            let uid = format!("u{}", snapshot.generation());
            edit.set_enrolment(
                "n",
                &adit_shared::proto::enrolment::Enrolment {
                    uid,
                    ..Default::default()
                },
            );
            snapshot = edit.build();
            Arc::new(snapshot.clone())
        };
        // A burst without a pause arrives as its last snapshot.
        let mut last = 0;
        for _ in 0..10 {
            let snapshot = next();
            last = snapshot.generation();
            sender.send_replace(snapshot);
        }
        pushed.changed().await.expect("pushed");
        assert_eq!(pushed.borrow_and_update().generation(), last);
        // Change without end is pushed all the same.
        let steady = async {
            loop {
                sender.send_replace(next());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let pushes = async {
            for _ in 0..3 {
                pushed.changed().await.expect("pushed");
            }
        };
        tokio::select! {
            () = steady => {}
            () = pushes => {}
            () = tokio::time::sleep(Duration::from_secs(20)) => panic!("held back"),
        }
        drop(sender);
        task.await.expect("ends with its source");
    }
}
