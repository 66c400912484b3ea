//! What a pick costs: `cargo test --release -p adit-waypoint balance::tests::cost -- --ignored --nocapture`

use super::*;

/// Aims at less than 100 ns for a pick and the end of its request.
#[test]
#[ignore = "measures, and means something in a release build only"]
fn cost_of_a_pick() {
    const PICKS: u32 = 20_000;
    const BATCHES: usize = 50;
    let ring = Algorithm::RingHash {
        minimum_ring_size: 1024,
    };
    for algorithm in [
        Algorithm::LeastRequest,
        Algorithm::RoundRobin,
        Algorithm::Random,
        ring,
        Algorithm::Maglev,
    ] {
        for count in [3, 100, 1000] {
            for (weights, latency) in [("equal", 1), ("unequal", 1), ("equal", 50)] {
                let mut endpoints = many(count);
                if weights == "unequal" {
                    for (n, endpoint) in endpoints.iter_mut().enumerate() {
                        endpoint.weight = 1 + n as u32 % 5;
                    }
                }
                let mut fixture = Fixture::new(super::algorithm(algorithm), endpoints);
                let mut hash = 1u64;
                // The best of many: what is added to it is the machine's other business.
                let mut best = Duration::MAX;
                for _ in 0..BATCHES {
                    let start = Instant::now();
                    for _ in 0..PICKS {
                        hash = hash.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let request = PickRequest {
                            hash: Some(hash),
                            ..Default::default()
                        };
                        let picked = fixture.pick_for(request).expect("an endpoint");
                        picked.finish(answer(200, latency), fixture.now);
                    }
                    best = best.min(start.elapsed());
                }
                let each = best.as_secs_f64() * 1e9 / f64::from(PICKS);
                println!("{algorithm:?} of {count}, {weights} weights, {latency} ms: {each:.0} ns");
            }
        }
    }
}
