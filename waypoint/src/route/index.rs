//! The candidates that one path leads to, so laid out that few of them are tried: those that
//! want one value of a header or of a query parameter are found by that value.
//!
//! An index only proposes. A proposed candidate is tested in full, so a collision of hashes
//! costs a test and decides nothing.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use xxhash_rust::xxh64::{Xxh64, xxh64};

use super::matching::{self, HeaderSource, RequestMatch, RequestView};
use super::query;
use super::text::TextMatch;

/// Fewer candidates than this are tried one by one.
const SCAN: usize = 4;

/// Rank of a candidate in its table: the smaller goes first.
pub(super) type Rank = u32;

/// The candidates of one path, prefix or node.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    /// Smallest rank of all.
    first: Rank,
    /// Without a condition that one value meets, in order.
    scanned: Box<[Rank]>,
    keyed: Option<Box<Keyed>>,
}

/// The candidates that need a certain value, by the value's hash.
#[derive(Debug, Default)]
struct Keyed {
    headers: HashMap<HeaderName, ByValue>,
    authority: ByValue,
    /// By name and value at once.
    query: ByValue,
}

#[derive(Debug)]
struct ByValue {
    first: Rank,
    ranks: HashMap<u64, Vec<Rank>, BuildHasherDefault<Hashed>>,
}

impl Default for ByValue {
    fn default() -> Self {
        Self {
            first: Rank::MAX,
            ranks: HashMap::default(),
        }
    }
}

/// Keys of [`ByValue`] are hashes already.
#[derive(Debug, Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh64(bytes, self.0);
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A condition by which a candidate can be found.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Header(HeaderName, u64),
    Authority(u64),
    Query(u64),
}

impl Bucket {
    /// `ranks` in rising order; `of` gives the match of a rank.
    pub(super) fn new<'m>(ranks: &[Rank], of: impl Fn(Rank) -> &'m RequestMatch) -> Self {
        let first = ranks.first().copied().unwrap_or(Rank::MAX);
        if ranks.len() < SCAN {
            let scanned = ranks.into();
            return Self {
                first,
                scanned,
                keyed: None,
            };
        }
        let mut uses: HashMap<Key, usize> = HashMap::new();
        for key in ranks.iter().flat_map(|&rank| keys(of(rank))) {
            *uses.entry(key).or_default() += 1;
        }
        let mut scanned = Vec::new();
        let mut keyed = Keyed::default();
        for &rank in ranks {
            // The value that fewest share tells most.
            match keys(of(rank)).min_by_key(|key| uses[key]) {
                Some(Key::Header(name, hash)) => {
                    keyed.headers.entry(name).or_default().insert(hash, rank);
                }
                Some(Key::Authority(hash)) => keyed.authority.insert(hash, rank),
                Some(Key::Query(hash)) => keyed.query.insert(hash, rank),
                None => scanned.push(rank),
            }
        }
        Self {
            first,
            scanned: scanned.into(),
            keyed: (!keyed.is_empty()).then(|| Box::new(keyed)),
        }
    }

    /// Lowers `best` to the smallest rank below it whose match holds, if there is one.
    pub(super) fn find(
        &self,
        request: &RequestView<'_>,
        holds: impl Fn(Rank) -> bool,
        best: &mut Rank,
    ) {
        if self.first >= *best {
            return;
        }
        lower(&self.scanned, &holds, best);
        if let Some(keyed) = &self.keyed {
            keyed.find(request, &holds, best);
        }
    }
}

fn lower(ranks: &[Rank], holds: impl Fn(Rank) -> bool, best: &mut Rank) {
    let better = ranks.iter().take_while(|&&rank| rank < *best);
    if let Some(&rank) = better.clone().find(|&&rank| holds(rank)) {
        *best = rank;
    }
}

impl Keyed {
    fn is_empty(&self) -> bool {
        self.headers.is_empty() && self.authority.ranks.is_empty() && self.query.ranks.is_empty()
    }

    fn find(&self, request: &RequestView<'_>, holds: impl Fn(Rank) -> bool, best: &mut Rank) {
        if self.authority.first < *best {
            let hash = xxh64(matching::authority(request), 0);
            self.authority.find(hash, &holds, best);
        }
        // Whichever is shorter: the names that are asked for or those that were sent.
        if self.headers.len() <= request.headers.keys_len() {
            for (name, values) in &self.headers {
                if values.first < *best
                    && let Some(hash) = hash_lines(request.headers, name)
                {
                    values.find(hash, &holds, best);
                }
            }
        } else {
            for name in request.headers.keys() {
                if let Some(values) = self.headers.get(name)
                    && values.first < *best
                    && let Some(hash) = hash_lines(request.headers, name)
                {
                    values.find(hash, &holds, best);
                }
            }
        }
        if self.query.first < *best
            && let Some(query) = request.query
        {
            for (name, value) in query::pairs(query) {
                self.query.find(hash_pair(name, value), &holds, best);
            }
        }
    }
}

impl ByValue {
    fn insert(&mut self, hash: u64, rank: Rank) {
        self.first = self.first.min(rank);
        self.ranks.entry(hash).or_default().push(rank);
    }

    fn find(&self, hash: u64, holds: impl Fn(Rank) -> bool, best: &mut Rank) {
        if let Some(ranks) = self.ranks.get(&hash) {
            lower(ranks, holds, best);
        }
    }
}

/// The conditions of a match that one value alone meets.
fn keys(of: &RequestMatch) -> impl Iterator<Item = Key> {
    let headers = of.headers.iter().filter_map(|header| match &header.test {
        TextMatch::Exact(text) if !header.invert => {
            let hash = xxh64(text.as_bytes(), 0);
            match &header.source {
                HeaderSource::Header(name) => Some(Key::Header(name.clone(), hash)),
                HeaderSource::Authority => Some(Key::Authority(hash)),
                HeaderSource::Invalid => None,
            }
        }
        _ => None,
    });
    let query = of.query.iter().filter_map(|param| match &param.test {
        TextMatch::Exact(text) if !param.invert => {
            let mut hash = Xxh64::new(0);
            hash.update(param.name.as_bytes());
            hash.update(&[0]);
            hash.update(text.as_bytes());
            Some(Key::Query(hash.digest()))
        }
        _ => None,
    });
    headers.chain(query)
}

/// Of a header's value, its lines joined by commas.
fn hash_lines(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    let mut lines = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let first = lines.next()?;
    let Some(second) = lines.next() else {
        return Some(xxh64(first, 0));
    };
    let mut hash = Xxh64::new(0);
    hash.update(first);
    for line in std::iter::once(second).chain(lines) {
        hash.update(b",");
        hash.update(line);
    }
    Some(hash.digest())
}

fn hash_pair(name: &str, value: &str) -> u64 {
    let mut hash = Xxh64::new(0);
    query::hash_decoded(name, &mut hash);
    hash.update(&[0]);
    query::hash_decoded(value, &mut hash);
    hash.digest()
}
