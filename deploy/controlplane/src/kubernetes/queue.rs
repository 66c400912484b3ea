//! What is left to do, each thing once.
//!
//! A thing that is added again before it was begun is done once; one that is added while it
//! is being done is done again afterwards; one that failed comes back after a pause. The
//! queue holds no more than there are different things, which are objects of the cluster.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::apply::backoff;

/// Keys of things to do, oldest first.
#[derive(Debug)]
pub struct Queue<K> {
    order: VecDeque<K>,
    states: BTreeMap<K, State>,
    later: BTreeSet<(Instant, K)>,
}

#[derive(Debug, Default)]
struct State {
    queued: bool,
    /// Somebody does it.
    running: bool,
    again: bool,
    /// Waits in `later` until then.
    until: Option<Instant>,
    failures: u32,
}

impl<K> Default for Queue<K> {
    fn default() -> Self {
        Self {
            order: VecDeque::new(),
            states: BTreeMap::new(),
            later: BTreeSet::new(),
        }
    }
}

impl<K: Ord + Clone> Queue<K> {
    /// Adds a thing. One that waits after a failure is tried at once: it has changed.
    pub fn add(&mut self, key: K) {
        let state = self.states.entry(key.clone()).or_default();
        if let Some(until) = state.until.take() {
            self.later.remove(&(until, key.clone()));
        }
        if state.running {
            state.again = true;
        } else if !state.queued {
            state.queued = true;
            self.order.push_back(key);
        }
    }

    /// Takes the next thing; [`Self::done`] or [`Self::failed`] has to follow.
    pub fn take(&mut self, now: Instant) -> Option<K> {
        while let Some((until, _)) = self.later.first()
            && *until <= now
            && let Some((_, key)) = self.later.pop_first()
        {
            let state = self.states.entry(key.clone()).or_default();
            state.until = None;
            state.queued = true;
            self.order.push_back(key);
        }
        let key = self.order.pop_front()?;
        let state = self.states.entry(key.clone()).or_default();
        state.queued = false;
        state.running = true;
        Some(key)
    }

    /// When the next thing that waits is due.
    pub fn next(&self) -> Option<Instant> {
        self.later.first().map(|(until, _)| *until)
    }

    /// A thing is done.
    pub fn done(&mut self, key: &K) {
        if self.states.remove(key).is_some_and(|state| state.again) {
            self.add(key.clone());
        }
    }

    /// A thing is to be tried again, after `pause` or, if that is none, after one that grows
    /// with the number of failures. Says how many there have been.
    pub fn failed(&mut self, key: &K, pause: Option<Duration>, now: Instant) -> u32 {
        let Some(state) = self.states.get_mut(key) else {
            return 0;
        };
        state.running = false;
        state.failures = state.failures.saturating_add(1);
        let failures = state.failures;
        if std::mem::take(&mut state.again) {
            state.queued = true;
            self.order.push_back(key.clone());
        } else {
            let until = now + pause.unwrap_or_else(|| backoff(failures));
            state.until = Some(until);
            self.later.insert((until, key.clone()));
        }
        failures
    }

    /// How many things there are.
    pub fn len(&self) -> usize {
        self.states.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.states.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_is_done_once_and_in_order() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for key in ["a", "b", "a"] {
            queue.add(key);
        }
        assert_eq!((queue.take(now), queue.take(now)), (Some("a"), Some("b")));
        assert_eq!(queue.take(now), None);
        queue.add("a");
        assert_eq!(queue.take(now), None, "a is being done");
        queue.done(&"a");
        queue.done(&"b");
        assert_eq!(queue.take(now), Some("a"));
        queue.done(&"a");
        assert!(queue.is_empty());
    }

    #[test]
    fn what_failed_comes_back_later_unless_it_changes() {
        let now = Instant::now();
        let pause = Duration::from_secs(5);
        let mut queue = Queue::default();
        queue.add("a");
        assert_eq!(queue.take(now), Some("a"));
        assert_eq!(queue.failed(&"a", Some(pause), now), 1);
        assert_eq!((queue.take(now), queue.next()), (None, Some(now + pause)));
        assert_eq!(queue.take(now + pause), Some("a"));
        assert_eq!(queue.failed(&"a", Some(pause), now), 2);
        queue.add("a");
        assert_eq!(queue.next(), None);
        assert_eq!(queue.take(now), Some("a"));
        queue.add("a");
        queue.failed(&"a", Some(pause), now);
        assert_eq!(queue.take(now), Some("a"), "it changed while it failed");
        queue.done(&"a");
        assert!(queue.is_empty());
    }
}
