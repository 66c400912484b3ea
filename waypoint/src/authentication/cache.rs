//! Tokens that have been verified, so that a client that sends the same one with each
//! request pays for its signature once. One cache per worker, bounded in entries and bytes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

use adit_shared::policy::http::Claims;

use super::keys::KeySet;
use super::rules::JwtRule;
use super::token::Lifetime;

/// Of one generation; there are two.
const MAX_ENTRIES: usize = 1024;
const MAX_BYTES: usize = 2 * 1024 * 1024;

/// A token that was good by these keys.
#[derive(Debug, Clone)]
pub(super) struct Verified {
    /// Not kept alive: a rule that is gone must not go on fetching keys.
    pub(super) rule: Weak<JwtRule>,
    /// The very keys: once others are in force the signature is checked again.
    pub(super) keys: Arc<KeySet>,
    pub(super) claims: Arc<Claims>,
    pub(super) payload_text: Arc<str>,
    pub(super) lifetime: Lifetime,
}

/// Keyed by the whole token. What is used moves to the young generation; when that is full
/// the old one is dropped.
#[derive(Debug, Default)]
pub(super) struct TokenCache {
    generations: RefCell<Generations>,
}

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<Box<str>, Verified>,
    young_bytes: usize,
    old: HashMap<Box<str>, Verified>,
}

impl TokenCache {
    /// What is known of the token, if `current` finds the rule by which it is still good.
    pub(super) fn get(
        &self,
        token: &str,
        current: impl FnOnce(&Verified) -> Option<Arc<JwtRule>>,
    ) -> Option<(Arc<JwtRule>, Verified)> {
        let mut generations = self.generations.borrow_mut();
        if let Some(known) = generations.young.get(token) {
            return current(known).map(|rule| (rule, known.clone()));
        }
        let (token, known) = generations.old.remove_entry(token)?;
        let rule = current(&known)?;
        generations.insert(token, known.clone());
        Some((rule, known))
    }

    pub(super) fn insert(&self, token: &str, verified: Verified) {
        self.generations.borrow_mut().insert(token.into(), verified);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        let generations = self.generations.borrow();
        generations.young.len() + generations.old.len()
    }
}

impl Generations {
    fn insert(&mut self, token: Box<str>, verified: Verified) {
        // The claims take about as much again, several times over.
        let bytes = token.len();
        if self.young.len() >= MAX_ENTRIES || self.young_bytes + bytes > MAX_BYTES {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
        }
        if self.young.insert(token, verified).is_none() {
            self.young_bytes += bytes;
        }
    }
}
