//! Draining across threads.

#[path = "support/hbone.rs"]
mod support;

use std::time::Duration;

use adit_shared::net::drain::{DrainMode, channel};
use support::*;
use tokio::task::spawn_local;
use tokio::time::Instant;

#[test]
fn a_drain_is_seen_and_ends_when_all_watchers_are_gone() {
    run(async {
        let (trigger, watcher) = channel();
        assert_eq!(watcher.mode(), None);
        let deadline = patience();
        let mode = DrainMode::Graceful { deadline };
        let mut threads = Vec::new();
        for _ in 0..3 {
            let mut watcher = watcher.clone();
            threads.push(std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .expect("runtime");
                runtime.block_on(watcher.signalled())
            }));
        }
        drop(watcher);
        assert!(trigger.drain(mode, Duration::ZERO).await);
        for thread in threads {
            assert_eq!(thread.join().expect("thread"), mode);
        }
        // Who comes late sees it at once.
        assert_eq!(trigger.watcher().signalled().await, mode);
    });
}

#[test]
fn at_its_deadline_a_graceful_drain_becomes_an_immediate_one() {
    run(async {
        let (trigger, mut watcher) = channel();
        let slow = spawn_local(async move {
            let first = watcher.signalled().await;
            watcher.changed().await;
            (first, watcher.mode())
        });
        let deadline = Instant::now() + Duration::from_millis(20);
        let mode = DrainMode::Graceful { deadline };
        assert!(trigger.drain(mode, PATIENCE).await);
        let seen = slow.await.expect("task");
        assert_eq!(seen, (mode, Some(DrainMode::Immediate)));
        // And stays one.
        trigger.signal(mode);
        assert_eq!(trigger.watcher().mode(), Some(DrainMode::Immediate));
    });
}

#[test]
fn a_watcher_that_does_not_go_is_reported() {
    run(async {
        let (trigger, _watcher) = channel();
        let begin = Instant::now();
        let grace = Duration::from_millis(10);
        assert!(!trigger.drain(DrainMode::Immediate, grace).await);
        assert!(begin.elapsed() >= grace);
    });
}

#[test]
fn a_trigger_that_is_gone_drains_at_once() {
    run(async {
        let (trigger, mut watcher) = channel();
        drop(trigger);
        assert_eq!(watcher.mode(), Some(DrainMode::Immediate));
        assert_eq!(
            soon("signal", watcher.signalled()).await,
            DrainMode::Immediate
        );
    });
}
