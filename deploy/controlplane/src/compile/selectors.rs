//! Finds the selectors that pick an object without trying them all.

use std::collections::HashMap;

use crate::model::{Labels, selects};

/// Selectors with a value each, by their rarest pair.
#[derive(Debug)]
pub(super) struct SelectorIndex<'a, T> {
    entries: Vec<(&'a Labels, T)>,
    by_pair: HashMap<(&'a str, &'a str), Vec<usize>>,
    /// Empty selectors pick everything.
    unconditional: Vec<usize>,
}

impl<'a, T> SelectorIndex<'a, T> {
    pub(super) fn new(entries: Vec<(&'a Labels, T)>) -> Self {
        let mut frequency: HashMap<(&str, &str), usize> = HashMap::new();
        for (selector, _) in &entries {
            for (key, value) in *selector {
                *frequency.entry((key, value)).or_default() += 1;
            }
        }
        let mut by_pair: HashMap<_, Vec<usize>> = HashMap::new();
        let mut unconditional = Vec::new();
        for (position, (selector, _)) in entries.iter().enumerate() {
            let pairs = selector
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()));
            match pairs.min_by_key(|pair| frequency.get(pair)) {
                Some(pair) => by_pair.entry(pair).or_default().push(position),
                None => unconditional.push(position),
            }
        }
        Self {
            entries,
            by_pair,
            unconditional,
        }
    }

    /// Values of the selectors that pick `labels`, in the order in which they were given.
    pub(super) fn matching(&self, labels: &Labels) -> impl Iterator<Item = &T> {
        let candidates = labels
            .iter()
            .filter_map(|(key, value)| self.by_pair.get(&(key.as_str(), value.as_str())))
            .flatten()
            .filter(|position| selects(self.entries[**position].0, labels));
        let mut found: Vec<usize> = candidates.chain(&self.unconditional).copied().collect();
        found.sort_unstable();
        found.into_iter().map(|position| &self.entries[position].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(own).collect()
    }

    #[test]
    fn finds_what_a_scan_finds() {
        let selectors: Vec<Labels> = vec![
            labels(&[]),
            labels(&[("a", "1")]),
            labels(&[("a", "1"), ("b", "1")]),
            labels(&[("a", "1"), ("b", "2")]),
            labels(&[("c", "1")]),
        ];
        let index = SelectorIndex::new(selectors.iter().zip(0..).collect());
        for object in [
            labels(&[]),
            labels(&[("a", "1")]),
            labels(&[("a", "1"), ("b", "1")]),
            labels(&[("a", "2"), ("b", "2"), ("c", "1")]),
            labels(&[("a", "1"), ("b", "2"), ("c", "1")]),
        ] {
            let scanned: Vec<usize> = (0..selectors.len())
                .filter(|position| selects(&selectors[*position], &object))
                .collect();
            let found: Vec<usize> = index.matching(&object).copied().collect();
            assert_eq!(found, scanned, "{object:?}");
        }
    }
}
