//! Chooses one of several endpoints that are equally near.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rand::Rng;

use super::endpoint::Host;
use super::hash::HashTable;
use super::settings::{Algorithm, SlowStart};
use super::table::{Chooser, nanos};
use super::turns;

/// Draws that may hit an endpoint that must not be taken before all are looked at.
const REDRAWS: usize = 8;
/// Latencies below this are equal: what makes them differ is not the endpoint.
pub(super) const LATENCY_FLOOR_US: f32 = 1_000.0;
/// An endpoint up to this much slower than another counts as equally fast, so that
/// requests one after the other spread by weight.
pub(super) const LATENCY_MARGIN: f32 = 2.0;

/// Endpoints that share load by weight.
#[derive(Debug)]
pub(super) struct Group {
    /// Those that can be used.
    usable: Vec<Arc<Host>>,
    weights: Weights,
    /// In what order they have their turns; empty: as they stand.
    schedule: Vec<u32>,
    /// All that are ready, which the hash table is made of, and which of them can be used.
    members: Vec<Arc<Host>>,
    open: Vec<bool>,
    hash: Option<Arc<HashTable>>,
}

#[derive(Debug)]
enum Weights {
    Equal,
    Unequal {
        /// `sums[i]` is the weight of 0 to i together.
        sums: Vec<u64>,
        /// Mean weight over weight.
        inverse: Vec<f32>,
    },
}

impl Group {
    /// `open[i]` says that `members[i]` can be used; at least one can.
    pub(super) fn new(
        algorithm: Algorithm,
        members: &[Arc<Host>],
        open: Vec<bool>,
        hash: Option<Arc<HashTable>>,
    ) -> Self {
        let of = members.iter().zip(&open);
        let usable: Vec<_> = of
            .filter(|(_, open)| **open)
            .map(|(host, _)| host.clone())
            .collect();
        let weights: Vec<u32> = usable.iter().map(|host| host.endpoint.weight).collect();
        let schedule = match algorithm {
            Algorithm::RoundRobin => turns::schedule(&weights),
            _ => Vec::new(),
        };
        let (members, open) = match hash {
            Some(_) => (members.to_vec(), open),
            None => Default::default(),
        };
        Self {
            weights: Weights::new(&weights),
            usable,
            schedule,
            members,
            open,
            hash,
        }
    }

    /// An endpoint that has not been tried; `None` if all have.
    pub(super) fn choose<R: Rng + ?Sized>(
        &self,
        chooser: &Chooser<'_>,
        rng: &mut R,
    ) -> Option<&Arc<Host>> {
        let chosen = match chooser.algorithm {
            Algorithm::LeastRequest => self.least_request(chooser, rng),
            Algorithm::RoundRobin => self.in_turn(chooser, rng),
            Algorithm::Random => self.draw(chooser, None, rng),
            Algorithm::Passthrough => {
                let address = chooser.destination;
                let dialled = address.and_then(|address| self.at_address(address));
                // A virtual address stands for any of them.
                return dialled.or_else(|| {
                    let at = self.draw(chooser, None, rng)?;
                    Some(&self.usable[at])
                });
            }
            Algorithm::RingHash { .. } | Algorithm::Maglev => {
                let (Some(hash), Some(table)) = (chooser.hash, &self.hash) else {
                    let at = self.draw(chooser, None, rng)?;
                    return Some(&self.usable[at]);
                };
                let open = |at: usize| {
                    self.open[at] && !chooser.tried.contains(&self.members[at].endpoint.uid)
                };
                return table.find(hash, open).map(|at| &self.members[at]);
            }
        };
        chosen.map(|at| &self.usable[at])
    }

    pub(super) fn at_address(&self, address: IpAddr) -> Option<&Arc<Host>> {
        let mut usable = self.usable.iter();
        usable.find(|host| host.endpoint.has_address(address))
    }

    /// The better of two.
    fn least_request<R: Rng + ?Sized>(&self, chooser: &Chooser<'_>, rng: &mut R) -> Option<usize> {
        let count = self.usable.len();
        let plain = chooser.tried.is_empty() && chooser.slow_start.is_none();
        let (first, second) = match &self.weights {
            _ if count == 1 => (self.draw(chooser, None, rng)?, None),
            // The common case: two different ones out of one random number.
            Weights::Equal if plain => {
                let random = rng.next_u64();
                let first = scale(random as u32, count);
                let second = (first + 1 + scale((random >> 32) as u32, count - 1)) % count;
                (first, Some(second))
            }
            _ => {
                let first = self.draw(chooser, None, rng)?;
                (first, self.draw(chooser, Some(first), rng))
            }
        };
        Some(match second {
            Some(second) if self.goes_to(second, first, chooser, rng) => second,
            _ => first,
        })
    }

    /// Whether `a` is taken rather than `b`, which was drawn first. Equals go to the one drawn
    /// first, which keeps the weights.
    fn goes_to<R: Rng + ?Sized>(
        &self,
        a: usize,
        b: usize,
        chooser: &Chooser<'_>,
        rng: &mut R,
    ) -> bool {
        let (load_a, load_b) = (self.load(a, chooser) + 1.0, self.load(b, chooser) + 1.0);
        let (state_a, state_b) = (self.state(a), self.state(b));
        if state_a.is_fast() && state_b.is_fast() {
            return load_a < load_b;
        }
        let now_ms = (chooser.now / 1_000_000) as u32;
        let a = state_a.latency(now_ms).max(LATENCY_FLOOR_US);
        let b = state_b.latency(now_ms).max(LATENCY_FLOOR_US);
        // load * max(1, own / (margin * other)), without the divisions.
        let cost_a = load_a * a.max(b * LATENCY_MARGIN) * a;
        let cost_b = load_b * b.max(a * LATENCY_MARGIN) * b;
        if load_a != load_b || cost_a == cost_b {
            return cost_a < cost_b;
        }
        // Where no load speaks, the slower one is asked now and then: what is known of it is
        // old, and calls one after the other must not all go to whoever was lucky once. Half
        // of the requests where it is as fast, a sixteenth where it costs twice as much.
        let (less, more) = (cost_a.min(cost_b), cost_a.max(cost_b));
        let share = 0.5 * (less / more).powi(3);
        let slower = rng.random::<f32>() < share;
        (cost_a < cost_b) != slower
    }

    fn state(&self, at: usize) -> &super::endpoint::EndpointState {
        &self.usable[at].state
    }

    /// Requests in flight, per weight.
    fn load(&self, at: usize, chooser: &Chooser<'_>) -> f32 {
        let active = self.state(at).active() as f32;
        let per_weight = match &self.weights {
            Weights::Equal => active,
            Weights::Unequal { inverse, .. } => active * inverse[at],
        };
        match chooser.slow_start {
            None => per_weight,
            Some(slow) => per_weight / self.warmth(at, slow, chooser.now).max(0.001),
        }
    }

    /// The next that may be taken.
    fn in_turn<R: Rng + ?Sized>(&self, chooser: &Chooser<'_>, rng: &mut R) -> Option<usize> {
        let length = match self.schedule.len() {
            0 => self.usable.len(),
            length => length,
        };
        let turn = chooser.turn.fetch_add(1, Relaxed);
        let mut cold = None;
        for step in 0..length {
            let at = (turn.wrapping_add(step as u64) % length as u64) as usize;
            let at = self.schedule.get(at).map_or(at, |at| *at as usize);
            if self.is_tried(at, chooser) {
                continue;
            }
            if self.is_warm(at, chooser, rng) {
                return Some(at);
            }
            cold = cold.or(Some(at));
        }
        cold
    }

    /// Draws by weight: not `other`, nor one that has been tried.
    fn draw<R: Rng + ?Sized>(
        &self,
        chooser: &Chooser<'_>,
        other: Option<usize>,
        rng: &mut R,
    ) -> Option<usize> {
        let skip = |at: usize| Some(at) == other || self.is_tried(at, chooser);
        let mut cold = None;
        for _ in 0..REDRAWS {
            let at = match &self.weights {
                Weights::Equal => scale(rng.next_u32(), self.usable.len()),
                Weights::Unequal { sums, .. } => {
                    let draw = rng.random_range(0..*sums.last()?);
                    sums.partition_point(|sum| *sum <= draw)
                }
            };
            if skip(at) {
                continue;
            }
            if self.is_warm(at, chooser, rng) {
                return Some(at);
            }
            cold = Some(at);
        }
        cold.or_else(|| {
            let left = || (0..self.usable.len()).filter(|at| !skip(*at));
            let weight = |at: usize| u64::from(self.usable[at].endpoint.weight);
            let total: u64 = left().map(weight).sum();
            let mut draw = match total {
                0 => return None,
                total => rng.random_range(0..total),
            };
            left().find(|at| {
                let hit = draw < weight(*at);
                draw = draw.saturating_sub(weight(*at));
                hit
            })
        })
    }

    fn is_tried(&self, at: usize, chooser: &Chooser<'_>) -> bool {
        !chooser.tried.is_empty() && chooser.tried.contains(&self.usable[at].endpoint.uid)
    }

    /// Whether an endpoint in slow start takes the request that it has drawn.
    fn is_warm<R: Rng + ?Sized>(&self, at: usize, chooser: &Chooser<'_>, rng: &mut R) -> bool {
        match chooser.slow_start {
            None => true,
            Some(slow) => match self.warmth(at, slow, chooser.now) {
                warmth if warmth >= 1.0 => true,
                warmth => rng.random::<f32>() < warmth,
            },
        }
    }

    /// The share of its weight that it has now.
    fn warmth(&self, at: usize, slow: SlowStart, now: u64) -> f32 {
        let age = now.saturating_sub(self.state(at).ready_since());
        let window = nanos(slow.window);
        if age >= window {
            return 1.0;
        }
        // Envoy counts at least a millisecond.
        let age = age.max(1_000_000) as f64 / window as f64;
        let minimum = f64::from(slow.minimum_percent) / 100.0;
        age.powf(1.0 / slow.aggression).clamp(minimum, 1.0) as f32
    }
}

impl Weights {
    fn new(weights: &[u32]) -> Self {
        if weights.windows(2).all(|pair| pair[0] == pair[1]) {
            return Self::Equal;
        }
        let mut sum = 0;
        let sums: Vec<u64> = weights
            .iter()
            .map(|weight| {
                sum += u64::from(*weight);
                sum
            })
            .collect();
        let mean = sum as f32 / weights.len() as f32;
        let inverse = weights.iter().map(|weight| mean / *weight as f32).collect();
        Self::Unequal { sums, inverse }
    }
}

/// A random number as one of `0..count`; the bias is below one in a million for as many
/// as four thousand.
fn scale(random: u32, count: usize) -> usize {
    ((u64::from(random) * count as u64) >> 32) as usize
}
