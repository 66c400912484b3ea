//! When certificates are fetched: a pure schedule without clocks or I/O.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::SystemTime;

use tokio::time::Instant;

/// How urgent a certificate is. Greater is sooner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A renewal while the old certificate is still good.
    Background,
    /// A workload of this node that has not been used yet.
    Warmup,
    /// A connection is waiting.
    Realtime,
}

/// When to renew a certificate: at the half of its life at the latest, up to a tenth of
/// its life sooner by `jitter` (0 to 1), so that certificates that were issued together
/// are not renewed together.
pub fn next_renewal(not_before: SystemTime, not_after: SystemTime, jitter: f64) -> SystemTime {
    let life = not_after.duration_since(not_before).unwrap_or_default();
    let jitter = if jitter.is_finite() {
        jitter.clamp(0.0, 1.0)
    } else {
        0.0
    };
    not_before + life.mul_f64(0.5 - 0.1 * jitter)
}

/// Which key is to be worked on next. A key is in at most one place: ready, or due at
/// some later time. Within a priority first come is first served.
#[derive(Debug)]
pub(super) struct Queue<K> {
    places: HashMap<K, Place>,
    ready: BTreeSet<(std::cmp::Reverse<Priority>, u64, K)>,
    later: BTreeSet<(Instant, K)>,
    arrivals: u64,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Ready(Priority, u64),
    Later(Instant, Priority),
}

impl<K: Clone + Ord + Hash> Queue<K> {
    pub(super) fn new() -> Self {
        Self {
            places: HashMap::new(),
            ready: BTreeSet::new(),
            later: BTreeSet::new(),
            arrivals: 0,
        }
    }

    /// Makes `key` ready. If it already is, a greater priority moves it forward and a
    /// lesser one changes nothing.
    pub(super) fn push(&mut self, key: K, priority: Priority) {
        match self.places.get(&key) {
            Some(Place::Ready(now, _)) if *now >= priority => return,
            _ => self.remove(&key),
        }
        self.arrivals += 1;
        let place = Place::Ready(priority, self.arrivals);
        self.ready
            .insert((std::cmp::Reverse(priority), self.arrivals, key.clone()));
        self.places.insert(key, place);
    }

    /// Makes `key` ready at `due` and not before, wherever it was.
    pub(super) fn push_later(&mut self, key: K, due: Instant, priority: Priority) {
        self.remove(&key);
        self.later.insert((due, key.clone()));
        self.places.insert(key, Place::Later(due, priority));
    }

    /// Forgets `key`.
    pub(super) fn remove(&mut self, key: &K) {
        match self.places.remove(key) {
            Some(Place::Ready(priority, arrival)) => {
                self.ready
                    .remove(&(std::cmp::Reverse(priority), arrival, key.clone()));
            }
            Some(Place::Later(due, _)) => {
                self.later.remove(&(due, key.clone()));
            }
            None => {}
        }
    }

    /// Takes the most urgent key that is ready at `now`.
    pub(super) fn pop(&mut self, now: Instant) -> Option<K> {
        while let Some((due, key)) = self.later.first() {
            if *due > now {
                break;
            }
            let key = key.clone();
            let priority = match self.places.get(&key) {
                Some(Place::Later(_, priority)) => *priority,
                // Both structures change together; anything else cannot be.
                _ => Priority::Background,
            };
            self.push(key, priority);
        }
        let (_, _, key) = self.ready.pop_first()?;
        self.places.remove(&key);
        Some(key)
    }

    /// When the next key becomes ready, if none is.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.later.first().map(|(due, _)| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn renews_between_two_fifths_and_half_of_the_life() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let day = Duration::from_secs(86_400);
        let at = |jitter| {
            next_renewal(start, start + day, jitter)
                .duration_since(start)
                .expect("later")
        };
        assert_eq!(at(0.0), day / 2);
        assert_eq!(at(0.5), day.mul_f64(0.45));
        assert_eq!(at(1.0), day.mul_f64(0.4));
        for odd in [-3.0, f64::NAN, f64::INFINITY] {
            assert_eq!(at(odd), day / 2, "{odd}");
        }
        assert_eq!(at(7.0), at(1.0));
        // A certificate that ends before it begins is due at once.
        assert_eq!(next_renewal(start, start - day, 0.3), start);
    }

    #[test]
    fn serves_by_priority_then_by_arrival() {
        let now = Instant::now();
        let mut queue = Queue::new();
        queue.push("renewal", Priority::Background);
        queue.push("warm 1", Priority::Warmup);
        queue.push("warm 2", Priority::Warmup);
        queue.push("waiting", Priority::Realtime);
        let order: Vec<_> = std::iter::from_fn(|| queue.pop(now)).collect();
        assert_eq!(order, ["waiting", "warm 1", "warm 2", "renewal"]);
    }

    #[test]
    fn a_greater_priority_moves_forward_and_a_lesser_does_not_move_back() {
        let now = Instant::now();
        let mut queue = Queue::new();
        queue.push("a", Priority::Warmup);
        queue.push("b", Priority::Warmup);
        queue.push("b", Priority::Realtime);
        queue.push("b", Priority::Background);
        assert_eq!(queue.pop(now), Some("b"));
        assert_eq!(queue.pop(now), Some("a"));
        assert_eq!(queue.pop(now), None);
    }

    #[test]
    fn later_keys_wait_and_can_be_pulled_forward_or_removed() {
        let now = Instant::now();
        let minute = Duration::from_secs(60);
        let mut queue = Queue::new();
        queue.push_later("renewal", now + minute, Priority::Background);
        queue.push_later("retry", now + minute / 2, Priority::Realtime);
        queue.push_later("gone", now + minute / 4, Priority::Realtime);
        queue.remove(&"gone");
        assert_eq!(queue.pop(now), None);
        assert_eq!(queue.next_due(), Some(now + minute / 2));
        queue.push("renewal", Priority::Realtime);
        assert_eq!(queue.pop(now), Some("renewal"));
        assert_eq!(queue.pop(now + minute), Some("retry"));
        assert_eq!(queue.pop(now + minute), None);
        assert_eq!(queue.next_due(), None);
    }
}
