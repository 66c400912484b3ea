//! How much of something each of many may have at a time, so that one cannot take it from
//! the others.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;

/// At most so many for each key. Cheap to clone. A key of which nothing is held costs nothing.
#[derive(Debug, Clone)]
pub(crate) struct Quota<K> {
    each: usize,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

/// One of those that a key may have, until this is dropped.
#[derive(Debug)]
pub(crate) struct Share<K: Hash + Eq> {
    key: K,
    held: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Hash + Eq + Clone> Quota<K> {
    /// `each` for every key, but at least one.
    pub(crate) fn new(each: usize) -> Self {
        Self {
            each: each.max(1),
            held: Arc::default(),
        }
    }

    /// `None`: the key has all that it may have.
    pub(crate) fn take(&self, key: K) -> Option<Share<K>> {
        let mut held = self.held.lock();
        let count = held.get(&key).copied().unwrap_or_default();
        if count >= self.each {
            return None;
        }
        held.insert(key.clone(), count + 1);
        Some(Share {
            key,
            held: self.held.clone(),
        })
    }
}

impl<K: Hash + Eq> Drop for Share<K> {
    fn drop(&mut self) {
        let mut held = self.held.lock();
        match held.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                held.remove(&self.key);
            }
        }
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
        assert_eq!(quota.held.lock().keys().collect::<Vec<_>>(), [&"b"]);
    }
}
