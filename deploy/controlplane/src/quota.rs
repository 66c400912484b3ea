//! How much of something each of many may have at a time, so that one cannot take it from
//! the others.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// At most so many for each key. Cheap to clone. A key of which nothing is held costs nothing.
#[derive(Debug, Clone)]
pub(crate) struct Quota<K> {
    each: usize,
    shared: Arc<Shared<K>>,
}

#[derive(Debug)]
struct Shared<K> {
    held: Mutex<HashMap<K, usize>>,
    returned: Notify,
}

/// One of those that a key may have, until this is dropped.
#[derive(Debug)]
pub(crate) struct Share<K: Hash + Eq> {
    key: K,
    shared: Arc<Shared<K>>,
}

impl<K: Hash + Eq + Clone> Quota<K> {
    /// `each` for every key, but at least one.
    pub(crate) fn new(each: usize) -> Self {
        Self {
            each: each.max(1),
            shared: Arc::new(Shared {
                held: Mutex::default(),
                returned: Notify::new(),
            }),
        }
    }

    /// Waits until the key has less than it may have.
    pub(crate) async fn wait(&self, key: K) -> Share<K> {
        loop {
            // Before looking: what is given back in between is not missed.
            let returned = self.shared.returned.notified();
            if let Some(share) = self.take(key.clone()) {
                return share;
            }
            returned.await;
        }
    }

    /// `None`: the key has all that it may have.
    pub(crate) fn take(&self, key: K) -> Option<Share<K>> {
        let mut held = self.shared.held.lock();
        let count = held.get(&key).copied().unwrap_or_default();
        if count >= self.each {
            return None;
        }
        held.insert(key.clone(), count + 1);
        Some(Share {
            key,
            shared: self.shared.clone(),
        })
    }
}

impl<K: Hash + Eq> Drop for Share<K> {
    fn drop(&mut self) {
        let mut held = self.shared.held.lock();
        match held.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                held.remove(&self.key);
            }
        }
        drop(held);
        self.shared.returned.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_and_gets_it_back() {
        let quota = Quota::new(2);
        let first = quota.take("a").expect("free");
        let second = quota.take("a").expect("free");
        assert!(quota.take("a").is_none());
        let _other = quota.take("b").expect("another's");
        drop(first);
        let third = quota.take("a").expect("given back");
        assert!(quota.take("a").is_none());
        drop((second, third));
        assert_eq!(quota.shared.held.lock().keys().collect::<Vec<_>>(), [&"b"]);
    }

    #[tokio::test]
    async fn what_is_given_back_ends_a_wait() {
        let quota = Quota::new(1);
        let held = quota.take("a").expect("free");
        let wait = tokio::spawn({
            let quota = quota.clone();
            async move { drop(quota.wait("a").await) }
        });
        drop(quota.wait("b").await);
        tokio::task::yield_now().await;
        assert!(!wait.is_finished());
        drop(held);
        wait.await.expect("no panic");
    }
}
