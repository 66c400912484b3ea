//! Consistent hashing: stable, even, and little moved by changes.

use std::collections::BTreeSet;

use proptest::prelude::*;
use xxhash_rust::xxh64::xxh64;

use super::*;
use crate::balance::hash::{HashTable, Maglev, Ring};

fn table(kind: Kind, members: &[(String, u32)]) -> HashTable {
    let members: Vec<(&str, u32)> = members.iter().map(|(n, w)| (n.as_str(), *w)).collect();
    match kind {
        Kind::Ring => HashTable::Ring(Ring::new(&members, 1024)),
        Kind::Maglev => HashTable::Maglev(Maglev::new(&members)),
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Ring,
    Maglev,
}

const KINDS: [Kind; 2] = [Kind::Ring, Kind::Maglev];

fn members(count: usize) -> Vec<(String, u32)> {
    (0..count).map(|n| (format!("uid-{n}"), 1)).collect()
}

fn hashes(count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(|n| xxh64(&n.to_le_bytes(), 99))
}

/// Where each hash goes, by name.
fn homes(table: &HashTable, members: &[(String, u32)], count: u64) -> Vec<String> {
    hashes(count)
        .map(|hash| {
            let at = table.find(hash, |_| true).expect("an owner");
            members[at].0.clone()
        })
        .collect()
}

#[test]
fn load_follows_weight() {
    for kind in KINDS {
        for weights in [vec![1; 10], vec![1, 2, 3, 4], vec![100, 100, 50], vec![7]] {
            let members: Vec<_> = weights
                .iter()
                .enumerate()
                .map(|(n, weight)| (format!("uid-{n}"), *weight))
                .collect();
            let homes = homes(&table(kind, &members), &members, 50_000);
            let total: u32 = weights.iter().sum();
            for (name, weight) in &members {
                let share = homes.iter().filter(|home| *home == name).count() as f64 / 50_000.0;
                let expected = f64::from(*weight) / f64::from(total);
                // A ring of n points per endpoint is uneven by about 1/sqrt(n).
                let tolerance = if kind == Kind::Ring { 0.25 } else { 0.03 };
                assert!(
                    (share / expected - 1.0).abs() < tolerance,
                    "{kind:?} {weights:?} {name}: {share} instead of {expected}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// When endpoints go, their hashes move and, on a ring, no others; when they come back,
    /// everything is as before.
    #[test]
    fn churn_moves_little(count in 2usize..60, gone in prop::collection::btree_set(0usize..60, 1..4)) {
        let all = members(count);
        let gone: BTreeSet<String> = gone.iter().map(|n| format!("uid-{}", n % count)).collect();
        let left: Vec<_> = all.iter().filter(|(name, _)| !gone.contains(name)).cloned().collect();
        prop_assume!(!left.is_empty());
        for kind in KINDS {
            let before = homes(&table(kind, &all), &all, 5_000);
            let after = homes(&table(kind, &left), &left, 5_000);
            let mut moved = 0;
            for (before, after) in before.iter().zip(&after) {
                prop_assert!(!gone.contains(after));
                if before != after && !gone.contains(before) {
                    moved += 1;
                }
            }
            match kind {
                Kind::Ring => prop_assert_eq!(moved, 0),
                // The paper measures some per cent.
                Kind::Maglev => prop_assert!(moved < 5_000 / 10, "{} moved", moved),
            }
        }
    }

    /// The order in which endpoints are listed does not matter: replicas agree.
    #[test]
    fn order_does_not_matter(count in 1usize..40, seed in any::<u64>()) {
        let all = members(count);
        let mut shuffled = all.clone();
        shuffled.sort_by_key(|(name, _)| xxh64(name.as_bytes(), seed));
        for kind in KINDS {
            prop_assert_eq!(
                homes(&table(kind, &all), &all, 1_000),
                homes(&table(kind, &shuffled), &shuffled, 1_000)
            );
        }
    }

    /// A closed endpoint's hashes go elsewhere, spread over the others; nobody else's move.
    #[test]
    fn closed_endpoints_are_walked_past(count in 2usize..40, closed in 0usize..40) {
        let closed = closed % count;
        let all = members(count);
        for kind in KINDS {
            let table = table(kind, &all);
            for hash in hashes(2_000) {
                let home = table.find(hash, |_| true).expect("an owner");
                let found = table.find(hash, |at| at != closed).expect("another");
                prop_assert!(found != closed);
                if home != closed {
                    prop_assert_eq!(found, home);
                }
            }
            for only in 0..count.min(5) {
                prop_assert_eq!(table.find(12345, |at| at == only), Some(only));
            }
            prop_assert_eq!(table.find(12345, |_| false), None);
        }
    }

    /// A ring lookup is what a scan of all points would find.
    #[test]
    fn a_ring_agrees_with_a_scan(weights in prop::collection::vec(1u32..50, 1..20)) {
        let members: Vec<_> = weights.iter().enumerate()
            .map(|(n, weight)| (format!("uid-{n}"), *weight)).collect();
        let heaviest = u64::from(weights.iter().max().copied().unwrap_or(1)).next_power_of_two();
        let lightest = 1 << weights.iter().min().copied().unwrap_or(1).ilog2();
        let unit = 256u64.max(16 * heaviest / lightest);
        let mut points = Vec::new();
        for (at, (name, weight)) in members.iter().enumerate() {
            let count = (unit * u64::from(*weight)).div_ceil(heaviest);
            for n in 0..count {
                let key = [name.as_bytes(), b"_", &n.to_le_bytes()].concat();
                points.push((xxh64(&key, 0), at));
            }
        }
        let table = table(Kind::Ring, &members);
        let extremes = [0, 1, u64::MAX, u64::MAX - 1];
        for hash in hashes(500).chain(extremes) {
            let next = points.iter().filter(|(point, _)| *point >= hash).min();
            let expected = next.or(points.iter().min()).expect("a point").1;
            prop_assert_eq!(table.find(hash, |_| true), Some(expected));
        }
    }
}

#[test]
fn requests_keep_their_endpoint_through_ejection_and_back() {
    for algorithm in [
        Algorithm::Maglev,
        Algorithm::RingHash {
            minimum_ring_size: 1024,
        },
    ] {
        let mut settings = super::algorithm(algorithm);
        settings.outlier_detection = Some(touchy());
        let mut fixture = Fixture::new(settings, many(10));
        let homes = |fixture: &mut Fixture| -> Vec<WorkloadUid> {
            let pick = |hash| {
                let request = PickRequest {
                    hash: Some(hash),
                    ..Default::default()
                };
                let picked = fixture.pick_for(request).expect("an endpoint");
                picked.uid().clone()
            };
            hashes(500).map(pick).collect()
        };
        let before = homes(&mut fixture);
        assert_eq!(homes(&mut fixture), before);
        fixture.fail("pod-3", 500);
        for (before, during) in before.iter().zip(homes(&mut fixture)) {
            assert_ne!(&*during, "pod-3");
            assert!(*before == during || &**before == "pod-3");
        }
        fixture.advance(Duration::from_secs(30));
        assert_eq!(homes(&mut fixture), before);
        // Not ready, and ready again.
        let mut endpoints = many(10);
        endpoints[5].healthy = false;
        fixture.update(endpoints);
        fixture.update(many(10));
        assert_eq!(homes(&mut fixture), before);
    }
}

#[test]
fn a_ring_is_bounded() {
    let many: Vec<_> = (0..5_000).map(|n| (format!("uid-{n}"), 1)).collect();
    let huge: Vec<_> = [("a", 1), ("b", u32::MAX)]
        .map(|(n, w)| (n.to_owned(), w))
        .to_vec();
    for (members, size) in [(many, 8 << 20), (huge, 1024)] {
        let members: Vec<(&str, u32)> = members.iter().map(|(n, w)| (n.as_str(), *w)).collect();
        let ring = Ring::new(&members, size);
        assert!(ring.points.len() <= 1 << 20, "{}", ring.points.len());
        assert!(ring.points.len() >= members.len());
    }
}

#[test]
fn a_balancer_hashes_only_where_it_is_asked_to() {
    let mut headers = http::HeaderMap::new();
    headers.insert("x-user", http::HeaderValue::from_static("a"));
    let uri = http::Uri::from_static("/");
    for (algorithm, hashes) in [(Algorithm::Maglev, true), (Algorithm::Random, false)] {
        let mut settings = super::algorithm(algorithm);
        let name = http::HeaderName::from_static("x-user");
        settings.load_balancer.hash_key = Some(HashKey::Header(name));
        let mut fixture = Fixture::new(settings, many(3));
        let source = [10, 0, 0, 1].into();
        let hashed = fixture
            .balancer
            .hash(&headers, &uri, source, &mut fixture.rng);
        assert_eq!(hashed.hash.is_some(), hashes);
    }
}

#[test]
fn without_a_hash_requests_go_anywhere() {
    let mut fixture = Fixture::new(algorithm(Algorithm::Maglev), many(3));
    let shares = ["pod-0", "pod-1", "pod-2"].map(|name| (name, 1.0));
    assert_shares(&fixture.spread(3_000), &shares);
}
