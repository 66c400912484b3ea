//! New endpoints get their share step by step.

use super::*;

fn settings(algorithm: Algorithm, aggression: f64, minimum_percent: u8) -> TrafficSettings {
    let mut settings = super::algorithm(algorithm);
    settings.load_balancer.slow_start = Some(SlowStart {
        window: Duration::from_secs(100),
        aggression,
        minimum_percent,
    });
    settings
}

/// Share of a newcomer beside three old ones, by its age in seconds.
#[test]
fn a_newcomer_warms_up() {
    let expected = [
        // aggression, minimum, age, weight
        (1.0, 10, 0, 0.1),
        (1.0, 10, 5, 0.1),
        (1.0, 10, 25, 0.25),
        (1.0, 10, 50, 0.5),
        (1.0, 10, 90, 0.9),
        (1.0, 10, 100, 1.0),
        (2.0, 10, 25, 0.5),
        (0.5, 10, 50, 0.25),
        (1.0, 100, 0, 1.0),
        (1.0, 50, 25, 0.5),
    ];
    for algorithm in [Algorithm::Random, Algorithm::LeastRequest] {
        for (aggression, minimum, age, weight) in expected {
            let settings = settings(algorithm, aggression, minimum);
            let mut fixture = Fixture::new(settings, many(3));
            fixture.advance(Duration::from_secs(1_000));
            fixture.update(many(4));
            fixture.advance(Duration::from_secs(age));
            let shares = [
                ("pod-0", 1.0),
                ("pod-1", 1.0),
                ("pod-2", 1.0),
                ("pod-3", weight),
            ];
            assert_shares(&fixture.spread(10_000), &shares);
        }
    }
}

#[test]
fn round_robin_warms_up_too() {
    let mut fixture = Fixture::new(settings(Algorithm::RoundRobin, 1.0, 10), many(1));
    fixture.advance(Duration::from_secs(1_000));
    fixture.update(many(2));
    let cold = fixture.spread(10_000)["pod-1"];
    // Every other turn is its own, one of ten of them is taken.
    assert!((400..600).contains(&cold), "{cold}");
    fixture.advance(Duration::from_secs(100));
    assert_eq!(fixture.spread(100)["pod-1"], 50);
}

#[test]
fn when_all_are_new_all_are_equal() {
    let mut fixture = Fixture::new(settings(Algorithm::LeastRequest, 1.0, 0), many(4));
    let shares = ["pod-0", "pod-1", "pod-2", "pod-3"].map(|name| (name, 1.0));
    assert_shares(&fixture.spread(10_000), &shares);
}

#[test]
fn an_endpoint_that_becomes_ready_again_is_new() {
    let mut fixture = Fixture::new(settings(Algorithm::Random, 1.0, 10), many(2));
    fixture.advance(Duration::from_secs(1_000));
    fixture.update(vec![endpoint("pod-0"), unready("pod-1")]);
    assert_shares(&fixture.spread(100), &[("pod-0", 1.0)]);
    fixture.update(many(2));
    assert_shares(&fixture.spread(10_000), &[("pod-0", 1.0), ("pod-1", 0.1)]);
    // An update that does not concern it changes nothing.
    fixture.advance(Duration::from_secs(50));
    fixture.update(many(2));
    assert_shares(&fixture.spread(10_000), &[("pod-0", 1.0), ("pod-1", 0.5)]);
}
