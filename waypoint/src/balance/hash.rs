//! Consistent hashing: the same hash goes to the same endpoint, and a change of the
//! endpoints moves few hashes to others.
//!
//! Tables are made of uids and weights alone, so that every replica of a waypoint, and
//! the next version of it, agrees. They hold ejected endpoints too: a lookup walks past
//! those, and finds home again when they return.

use xxhash_rust::xxh64::xxh64;

/// Points of a ring beyond which it does not grow, whatever is asked: 12 bytes each.
const MAX_RING: u64 = 1 << 20;
/// Points of the lightest endpoint, as far as [`MAX_RING`] allows: with fewer, its share
/// would be left to chance.
const MIN_POINTS: u64 = 16;
/// Envoy's default size of a Maglev table; a prime.
const MAGLEV_SIZE: usize = 65_537;
/// Lookups past unusable endpoints before all are looked at.
const MAGLEV_PROBES: u64 = 32;

/// A table for one set of endpoints, by their index in that set.
#[derive(Debug)]
pub(super) enum HashTable {
    Ring(Ring),
    Maglev(Maglev),
}

impl HashTable {
    /// The endpoint of `hash` among those that are `open`.
    pub(super) fn find(&self, hash: u64, open: impl Fn(usize) -> bool) -> Option<usize> {
        match self {
            Self::Ring(ring) => ring.find(hash, open),
            Self::Maglev(maglev) => maglev.find(hash, open),
        }
    }
}

/// Points on a circle; a hash belongs to the owner of the next point (ketama).
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) points: Vec<u64>,
    owners: Vec<u32>,
    /// `starts[b]` is the first point of those whose upper bits are `b`.
    starts: Vec<u32>,
    shift: u32,
    members: usize,
}

impl Ring {
    pub(super) fn new(members: &[(&str, u32)], minimum_size: u32) -> Self {
        // An endpoint's points depend on its own weight, and on what rarely changes when
        // others come and go: powers of two. Envoy divides a ring of fixed size among
        // those that are there, and moves some hashes of all of them each time. Of four
        // endpoints on the ring has the size that was asked for.
        let weights = || members.iter().map(|(_, weight)| u64::from(*weight).max(1));
        let heaviest = weights().max().unwrap_or(1).next_power_of_two();
        let lightest = 1 << weights().min().unwrap_or(1).ilog2();
        let asked = u64::from(minimum_size).next_power_of_two() / 4;
        let mut unit = asked
            .max(MIN_POINTS * heaviest / lightest)
            // The heaviest alone would have as many.
            .clamp(1, 2 * MAX_RING);
        while unit > 1
            && weights()
                .map(|w| (unit * w).div_ceil(heaviest))
                .sum::<u64>()
                > MAX_RING
        {
            unit /= 2;
        }
        let mut points = Vec::new();
        let mut key = Vec::new();
        for (at, (uid, weight)) in members.iter().enumerate() {
            let count = (unit * u64::from(*weight).max(1)).div_ceil(heaviest);
            for n in 0..count {
                key.clear();
                key.extend_from_slice(uid.as_bytes());
                key.push(b'_');
                key.extend_from_slice(&n.to_le_bytes());
                points.push((xxh64(&key, 0), at as u32));
            }
        }
        // Two at one point: the uid decides, not the position, which is others' affair.
        points.sort_unstable_by(|a, b| {
            let uid = |owner: u32| members[owner as usize].0;
            a.0.cmp(&b.0).then_with(|| uid(a.1).cmp(uid(b.1)))
        });
        let bits = (points.len().max(2) as u64).ilog2();
        let shift = 64 - bits;
        let mut starts = Vec::with_capacity((1 << bits) + 1);
        let mut at = 0;
        for bucket in 0..1u64 << bits {
            while at < points.len() && points[at].0 >> shift < bucket {
                at += 1;
            }
            starts.push(at as u32);
        }
        Self {
            owners: points.iter().map(|(_, owner)| *owner).collect(),
            points: points.into_iter().map(|(point, _)| point).collect(),
            starts,
            shift,
            members: members.len(),
        }
    }

    fn find(&self, hash: u64, open: impl Fn(usize) -> bool) -> Option<usize> {
        let bucket = (hash >> self.shift) as usize;
        let mut at = *self.starts.get(bucket)? as usize;
        while self.points.get(at).is_some_and(|point| *point < hash) {
            at += 1;
        }
        let first = *self.owners.get(at).or(self.owners.first())?;
        if open(first as usize) {
            return Some(first as usize);
        }
        // Walk on; every owner is asked once, however many points it has.
        let mut asked = vec![false; self.members];
        let mut left = self.members;
        for step in 0..self.owners.len() {
            let owner = self.owners[(at + step) % self.owners.len()] as usize;
            if !std::mem::replace(&mut asked[owner], true) {
                if open(owner) {
                    return Some(owner);
                }
                left -= 1;
                if left == 0 {
                    break;
                }
            }
        }
        None
    }
}

/// A table that every endpoint fills in an order of its own (Maglev, NSDI 2016, 3.4),
/// weighted as in Envoy.
#[derive(Debug)]
pub(super) struct Maglev {
    table: Vec<u32>,
    uids: Vec<u64>,
}

impl Maglev {
    pub(super) fn new(members: &[(&str, u32)]) -> Self {
        struct Builder {
            /// The next place that it would like to have, and the step to the one after.
            next: usize,
            step: usize,
            weight: u64,
            /// Rounds times the greatest weight from which on it has another turn.
            target: u64,
        }
        let size = MAGLEV_SIZE as u64;
        let heaviest = members.iter().map(|(_, weight)| u64::from(*weight)).max();
        let heaviest = heaviest.unwrap_or(0).max(1);
        let uids: Vec<u64> = members
            .iter()
            .map(|(uid, _)| xxh64(uid.as_bytes(), 0))
            .collect();
        let mut builders: Vec<(usize, Builder)> = members
            .iter()
            .enumerate()
            .map(|(at, (uid, weight))| {
                let builder = Builder {
                    next: (uids[at] % size) as usize,
                    step: (xxh64(uid.as_bytes(), 1) % (size - 1) + 1) as usize,
                    weight: u64::from(*weight).max(1),
                    target: 0,
                };
                (at, builder)
            })
            .collect();
        // The turn order must not depend on who else is there.
        builders.sort_by_key(|(at, _)| members[*at].0);
        let mut table = vec![u32::MAX; MAGLEV_SIZE];
        let mut filled = 0;
        let mut round: u64 = 1;
        while filled < MAGLEV_SIZE && !builders.is_empty() {
            for (at, builder) in &mut builders {
                if round * builder.weight < builder.target {
                    continue;
                }
                builder.target += heaviest;
                while table[builder.next] != u32::MAX {
                    builder.next = (builder.next + builder.step) % MAGLEV_SIZE;
                }
                table[builder.next] = *at as u32;
                filled += 1;
                if filled == MAGLEV_SIZE {
                    break;
                }
            }
            round += 1;
        }
        Self { table, uids }
    }

    fn find(&self, hash: u64, open: impl Fn(usize) -> bool) -> Option<usize> {
        let mut probe = hash;
        for attempt in 0..MAGLEV_PROBES {
            let owner = self.table[(probe % MAGLEV_SIZE as u64) as usize];
            if owner == u32::MAX {
                return None;
            }
            if open(owner as usize) {
                return Some(owner as usize);
            }
            probe = xxh64(&hash.to_le_bytes(), attempt + 1);
        }
        // Rendezvous: as even and as stable as before, only slower.
        let candidates = (0..self.uids.len()).filter(|at| open(*at));
        candidates.max_by_key(|at| xxh64(&hash.to_le_bytes(), self.uids[*at]))
    }
}
