//! Least request over smoothed latency.

use rand::Rng as _;

use super::*;

#[test]
fn idle_endpoints_share_by_weight() {
    for weights in [[1, 1, 1], [1, 2, 7], [100, 200, 300]] {
        let names = ["a", "b", "c"];
        let of = || names.iter().zip(weights);
        let endpoints = of().map(|(name, weight)| weighted(name, weight)).collect();
        let mut fixture = Fixture::new(TrafficSettings::default(), endpoints);
        let shares: Vec<_> = of().map(|(name, w)| (*name, f64::from(w))).collect();
        assert_shares(&fixture.spread(20_000), &shares);
    }
}

#[test]
fn small_differences_of_latency_do_not_matter() {
    let mut fixture = Fixture::new(TrafficSettings::default(), many(2));
    let mut counts = BTreeMap::new();
    for _ in 0..10_000 {
        let picked = fixture.pick().expect("one");
        let micros = if &**picked.uid() == "pod-0" {
            1_000
        } else {
            1_900
        };
        *counts.entry(picked.uid().to_string()).or_default() += 1;
        let outcome = Outcome::new(RequestResult::Status(200), Duration::from_micros(micros));
        fixture.advance(Duration::from_millis(1));
        picked.finish(outcome, fixture.now);
    }
    assert_shares(&counts, &[("pod-0", 1.0), ("pod-1", 1.0)]);
}

/// Requests in flight settle in proportion to weight.
#[test]
fn load_settles_by_weight() {
    let endpoints = vec![weighted("a", 1), weighted("b", 3)];
    let mut fixture = Fixture::new(TrafficSettings::default(), endpoints);
    let held: Vec<Picked> = (0..400).map(|_| fixture.pick().expect("one")).collect();
    let a = held.iter().filter(|picked| &**picked.uid() == "a").count();
    assert!(
        (95..=105).contains(&a),
        "{a} of 400 at a quarter of the weight"
    );
}

#[test]
fn the_busier_of_two_is_avoided() {
    let mut fixture = Fixture::new(TrafficSettings::default(), many(2));
    let sticky = PickRequest {
        sticky: Some("pod-0"),
        ..Default::default()
    };
    let _held: Vec<Picked> = (0..5)
        .map(|_| fixture.pick_for(sticky).expect("it"))
        .collect();
    assert_shares(&fixture.spread(100), &[("pod-1", 1.0)]);
}

/// Drives `count` requests, one each millisecond, of which `pod-0` answers after
/// `millis`, the others after 2 ms; the share that goes to it.
fn share_of_first(fixture: &mut Fixture, count: usize, outcome: Outcome) -> f64 {
    let mut hits = 0;
    for _ in 0..count {
        let picked = fixture.pick().expect("one");
        fixture.advance(Duration::from_millis(1));
        if &**picked.uid() == "pod-0" {
            hits += 1;
            picked.finish(outcome, fixture.now);
        } else {
            picked.finish(answer(200, 2), fixture.now);
        }
    }
    hits as f64 / count as f64
}

#[test]
fn a_slow_endpoint_gets_little_and_comes_back_when_it_is_fast_again() {
    let mut fixture = Fixture::new(TrafficSettings::default(), many(3));
    let slow = share_of_first(&mut fixture, 3_000, answer(200, 300));
    assert!(slow < 0.02, "{slow} to the slow one");
    assert!(slow > 0.0, "never tried");
    fixture.advance(Duration::from_secs(25));
    let _ = share_of_first(&mut fixture, 1_000, answer(200, 2));
    let fast = share_of_first(&mut fixture, 9_000, answer(200, 2));
    assert!(
        (0.30..0.37).contains(&fast),
        "{fast} when all are equal again"
    );
}

/// Answers of `pod-0` that take `millis`, whoever would be picked.
fn slow_answers(fixture: &mut Fixture, count: usize, millis: u64) {
    for _ in 0..count {
        let picked = fixture
            .pick_for(PickRequest {
                sticky: Some("pod-0"),
                ..Default::default()
            })
            .expect("it");
        picked.finish(answer(200, millis), fixture.now);
    }
}

#[test]
fn one_hiccup_turns_nobody_away() {
    let mut fixture = Fixture::new(TrafficSettings::default(), many(2));
    let _ = share_of_first(&mut fixture, 100, answer(200, 2));
    slow_answers(&mut fixture, 1, 5_000);
    let at_once = share_of_first(&mut fixture, 1_000, answer(200, 2));
    assert!((0.4..0.6).contains(&at_once), "{at_once}");
}

/// Calls one after the other, as a person at a terminal makes them: the spread of equal
/// endpoints is even, however their answers scatter, and no run of calls goes to one alone.
#[test]
fn sequential_calls_are_spread_evenly_over_equal_endpoints() {
    for (count, usual, seed) in [(2, 3, 1), (2, 20, 2), (3, 8, 3), (5, 50, 4)] {
        let mut fixture = Fixture::new(TrafficSettings::default(), many(count));
        fixture.rng = SmallRng::seed_from_u64(seed);
        let mut dice = SmallRng::seed_from_u64(seed + 100);
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let (mut last, mut run, mut longest) = (String::new(), 0, 0);
        let calls = 4_000;
        for call in 0..calls {
            let picked = fixture.pick().expect("one");
            let uid = picked.uid().to_string();
            // Half as long to half as long again; one in twenty five times, the first much more.
            let scatter = dice.random_range(50..150);
            let peak = if dice.random_ratio(1, 20) { 5 } else { 1 };
            let first = if call < count { 10 } else { 1 };
            let micros = usual * 10 * scatter * peak * first;
            fixture.advance(Duration::from_micros(micros));
            let outcome = Outcome::new(RequestResult::Status(200), Duration::from_micros(micros));
            picked.finish(outcome, fixture.now);
            run = if uid == last { run + 1 } else { 1 };
            longest = longest.max(run);
            last.clone_from(&uid);
            *counts.entry(uid).or_default() += 1;
        }
        let even = calls as f64 / count as f64;
        for (uid, got) in &counts {
            let share = *got as f64 / even;
            assert!(
                (0.85..1.15).contains(&share),
                "{uid}: {share} of its share: {counts:?}"
            );
        }
        assert_eq!(counts.len(), count);
        assert!(longest < 40, "{longest} calls in a row to one of {count}");
    }
}

#[test]
fn a_row_of_slow_answers_is_avoided_and_forgotten_in_seconds() {
    let mut fixture = Fixture::new(TrafficSettings::default(), many(2));
    let _ = share_of_first(&mut fixture, 100, answer(200, 2));
    slow_answers(&mut fixture, 3, 5_000);
    let at_once = share_of_first(&mut fixture, 100, answer(200, 2));
    assert!(at_once < 0.1, "{at_once}");
    fixture.advance(Duration::from_secs(4));
    let later = share_of_first(&mut fixture, 1_000, answer(200, 2));
    assert!(later > 0.4, "{later}");
}

/// Without this an endpoint that refuses connections would be the fastest of all.
#[test]
fn failing_fast_does_not_attract() {
    for result in [RequestResult::ConnectFailed, RequestResult::Reset] {
        let mut fixture = Fixture::new(TrafficSettings::default(), many(3));
        let failure = Outcome::new(result, Duration::from_micros(50));
        let share = share_of_first(&mut fixture, 2_000, failure);
        assert!(share < 0.05, "{share} to the one that fails");
    }
}

#[test]
fn dropping_a_pick_ends_its_request() {
    let mut fixture = Fixture::new(TrafficSettings::default(), many(1));
    let picked = fixture.pick().expect("one");
    let status = &fixture.balancer.endpoints(fixture.now)[0];
    assert_eq!((status.active, status.requests), (1, 1));
    picked.report(answer(200, 1), fixture.now);
    assert_eq!(fixture.balancer.endpoints(fixture.now)[0].active, 1);
    drop(picked);
    let status = &fixture.balancer.endpoints(fixture.now)[0];
    assert_eq!(status.active, 0);
    assert_eq!(status.latency, Some(Duration::from_millis(1)));
}
