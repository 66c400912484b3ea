//! In what order endpoints of unequal weight have their turns.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Turns of a schedule beyond those that every endpoint has; weights are rounded to fit.
const MAX_TURNS: u64 = 4096;

/// Precision of phases.
const PHASE_BITS: u32 = 16;

/// A sequence in which each index stands in proportion to its weight and as evenly
/// spread as can be (earliest deadline first); empty when all weights are equal.
pub(super) fn schedule(weights: &[u32]) -> Vec<u32> {
    let divisor = weights.iter().fold(0, |a, b| gcd(a, u64::from(*b))).max(1);
    let mut turns: Vec<u64> = weights.iter().map(|w| u64::from(*w) / divisor).collect();
    if turns.iter().all(|turns| *turns == 1) {
        return Vec::new();
    }
    let total: u64 = turns.iter().sum();
    if total > MAX_TURNS {
        for turns in &mut turns {
            let rounded = u128::from(*turns) * u128::from(MAX_TURNS) / u128::from(total);
            *turns = (rounded as u64).max(1);
        }
    }
    // The kth of n turns is due at (k + phase) / n. Phases differ, by multiples of the
    // golden ratio, lest endpoints of one weight stand together.
    let due = |at: usize, k: u64| {
        let phase = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - PHASE_BITS);
        Reverse((Due((k << PHASE_BITS) + phase, turns[at]), at))
    };
    let mut heap: BinaryHeap<_> = (0..turns.len())
        .filter(|at| turns[*at] > 0)
        .map(|at| due(at, 0))
        .collect();
    let mut order = Vec::new();
    while let Some(Reverse((Due(numerator, n), at))) = heap.pop() {
        order.push(at as u32);
        let k = (numerator >> PHASE_BITS) + 1;
        if k < n {
            heap.push(due(at, k));
        }
    }
    order
}

/// A fraction, ordered by value.
struct Due(u64, u64);

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0 * other.1).cmp(&(other.0 * self.1))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

fn gcd(a: u64, b: u64) -> u64 {
    match b {
        0 => a,
        b => gcd(b, a % b),
    }
}
