//! Outlier detection.

use proptest::prelude::*;

use super::*;

fn settings(outlier: OutlierDetection) -> TrafficSettings {
    TrafficSettings {
        outlier_detection: Some(outlier),
        ..Default::default()
    }
}

fn outcome(result: RequestResult) -> Outcome {
    Outcome::new(result, Duration::from_millis(1))
}

/// Sends answers to the only endpoint of a hundred that is asked, and says after how many
/// of them it was out.
fn ejected_after(outlier: OutlierDetection, results: &[RequestResult]) -> Option<usize> {
    let mut fixture = Fixture::new(settings(outlier), many(100));
    for (at, result) in results.iter().enumerate() {
        let request = PickRequest {
            sticky: Some("pod-0"),
            ..Default::default()
        };
        let picked = fixture.pick_for(request).expect("an endpoint");
        picked.finish(outcome(*result), fixture.now);
        if fixture.is_ejected("pod-0") {
            return Some(at + 1);
        }
    }
    None
}

#[test]
fn what_counts() {
    use RequestResult::{ConnectFailed, Reset, Status, Timeout};
    let defaults = OutlierDetection::default;
    let gateway = || OutlierDetection {
        consecutive_5xx: 0,
        consecutive_gateway_errors: 3,
        ..defaults()
    };
    let split = || OutlierDetection {
        split_local_origin_errors: true,
        consecutive_local_origin_failures: 2,
        ..defaults()
    };
    let (ok, bad, client) = (Status(200), Status(500), Status(404));
    let table = [
        (defaults(), vec![bad; 5], Some(5)),
        (defaults(), vec![bad, bad, bad, bad, ok, bad], None),
        (defaults(), vec![bad, bad, bad, bad, client, bad], None),
        (
            defaults(),
            vec![bad, Status(503), Reset, Timeout, ConnectFailed],
            Some(5),
        ),
        (defaults(), vec![Status(599); 5], Some(5)),
        (defaults(), vec![Status(600); 9], None),
        (gateway(), vec![bad; 9], None),
        (
            gateway(),
            vec![Status(502), Status(503), Status(504)],
            Some(3),
        ),
        (
            gateway(),
            vec![Status(502), Status(503), bad, Status(504)],
            None,
        ),
        (gateway(), vec![ConnectFailed, Reset, Timeout], Some(3)),
        (split(), vec![ConnectFailed, Timeout], Some(2)),
        (split(), vec![ConnectFailed, ok, Reset], None),
        // It answered, if badly.
        (split(), vec![ConnectFailed, bad, Reset], None),
        (
            split(),
            vec![bad, bad, bad, ConnectFailed, bad, bad],
            Some(6),
        ),
        (
            OutlierDetection {
                consecutive_5xx: 0,
                ..defaults()
            },
            vec![bad; 99],
            None,
        ),
        (
            OutlierDetection {
                consecutive_5xx: 1,
                ..defaults()
            },
            vec![bad],
            Some(1),
        ),
    ];
    for (outlier, results, expected) in table {
        let found = ejected_after(outlier.clone(), &results);
        assert_eq!(found, expected, "{outlier:?} {results:?}");
    }
}

#[test]
fn grpc_answers_count_by_their_status() {
    for (status, http) in [
        (0, 200),
        (5, 404),
        (4, 504),
        (14, 503),
        (13, 500),
        (99, 500),
    ] {
        assert_eq!(
            RequestResult::from_grpc(status),
            RequestResult::Status(http)
        );
    }
}

#[test]
fn without_settings_nobody_is_ejected() {
    let mut fixture = Fixture::new(TrafficSettings::default(), many(1));
    for _ in 0..100 {
        fixture.fail("pod-0", 500);
    }
    assert!(!fixture.is_ejected("pod-0"));
}

#[test]
fn ejected_endpoints_return_in_time_and_stay_out_longer_each_time() {
    let mut fixture = Fixture::new(settings(touchy()), many(2));
    for times in 1..=3 {
        fixture.fail("pod-0", 500);
        assert_shares(&fixture.spread(50), &[("pod-1", 1.0)]);
        fixture.advance(Duration::from_secs(30 * times) - Duration::from_millis(1));
        assert_shares(&fixture.spread(50), &[("pod-1", 1.0)]);
        fixture.advance(Duration::from_millis(1));
        assert!(
            fixture.spread(200).contains_key("pod-0"),
            "after {times} times"
        );
    }
    let events = fixture.balancer.take_events();
    let ejections: Vec<_> = events
        .iter()
        .filter_map(|event| match event.change {
            EjectionChange::Ejected {
                duration, times, ..
            } => Some((duration.as_secs(), times)),
            _ => None,
        })
        .collect();
    assert_eq!(ejections, [(30, 1), (60, 2), (90, 3)]);
    let returns = events
        .iter()
        .filter(|event| event.change == EjectionChange::Returned);
    assert_eq!(returns.count(), 3);
    assert!(fixture.balancer.take_events().is_empty());
}

#[test]
fn good_behaviour_is_remembered() {
    let mut fixture = Fixture::new(settings(touchy()), many(2));
    for _ in 0..3 {
        fixture.fail("pod-0", 500);
        fixture.advance(Duration::from_secs(300));
        fixture.balancer.sweep(fixture.now);
        // One of the intervals of 10 s forgives each ejection; 25 s forgive two at most.
        fixture.advance(Duration::from_secs(25));
        fixture.balancer.sweep(fixture.now);
    }
    let events = fixture.balancer.take_events();
    let times: Vec<u32> = events
        .iter()
        .filter_map(|event| match event.change {
            EjectionChange::Ejected { times, .. } => Some(times),
            _ => None,
        })
        .collect();
    assert_eq!(times, [1, 1, 1]);
}

#[test]
fn an_ejection_has_a_longest_time() {
    let mut fixture = Fixture::new(settings(touchy()), many(2));
    for _ in 0..20 {
        fixture.fail("pod-0", 500);
        fixture.advance(Duration::from_secs(300));
        fixture.balancer.sweep(fixture.now);
        assert!(!fixture.is_ejected("pod-0"));
    }
    let hour = OutlierDetection {
        base_ejection_time: Duration::from_secs(3600),
        ..touchy()
    };
    let mut fixture = Fixture::new(settings(hour), many(2));
    fixture.fail("pod-0", 500);
    fixture.advance(Duration::from_secs(3599));
    fixture.balancer.sweep(fixture.now);
    assert!(fixture.is_ejected("pod-0"));
}

/// Envoy since 1.31 counts the one that is to be ejected.
#[test]
fn no_more_than_the_percentage_is_out() {
    for (count, percent, expected) in [
        (10, 10, 1),
        (9, 10, 0),
        (20, 10, 2),
        (19, 10, 1),
        (3, 34, 1),
        (3, 33, 0),
        (4, 100, 4),
        (4, 0, 0),
    ] {
        let outlier = OutlierDetection {
            max_ejection_percent: percent,
            ..touchy()
        };
        // One that is not ready does not count.
        let mut endpoints = many(count);
        endpoints.push(unready("not-ready"));
        let mut fixture = Fixture::new(settings(outlier), endpoints);
        for n in 0..count {
            fixture.fail(&format!("pod-{n}"), 500);
        }
        let status = fixture.balancer.ejections();
        assert_eq!(status.active, expected, "{percent} % of {count}");
        assert_eq!(status.consecutive_5xx, expected as u64);
        assert_eq!(status.refused, (count - expected) as u64);
    }
}

#[test]
fn all_ejected_is_said_or_panicked_about() {
    let mut fixture = Fixture::new(settings(touchy()), many(2));
    fixture.fail("pod-0", 500);
    fixture.fail("pod-1", 500);
    let error = fixture.pick().expect_err("all are out");
    assert_eq!(
        (error.reason(), error.response_flag()),
        ("all_ejected", "UH")
    );
    fixture.advance(Duration::from_secs(30));
    assert!(fixture.pick().is_ok());

    let outlier = OutlierDetection {
        min_health_percent: 50,
        ..touchy()
    };
    let mut endpoints = many(4);
    endpoints.push(unready("not-ready"));
    let mut fixture = Fixture::new(settings(outlier), endpoints);
    fixture.fail("pod-0", 500);
    fixture.fail("pod-1", 500);
    assert_shares(&fixture.spread(1_000), &[("pod-2", 1.0), ("pod-3", 1.0)]);
    fixture.fail("pod-2", 500);
    let all = ["pod-0", "pod-1", "pod-2", "pod-3"].map(|name| (name, 1.0));
    assert_shares(&fixture.spread(4_000), &all);
}

#[test]
fn updates_keep_ejections_of_those_who_stay() {
    let mut fixture = Fixture::new(settings(touchy()), many(4));
    fixture.fail("pod-0", 500);
    fixture.fail("pod-1", 500);
    fixture.update(many(3).split_off(1));
    assert!(fixture.is_ejected("pod-1"));
    assert_eq!(fixture.balancer.ejections().active, 1);
    // Gone and come back: another one.
    fixture.update(many(4));
    assert!(!fixture.is_ejected("pod-0"));
    // Switched off.
    fixture.settings.outlier_detection = None;
    fixture.update(many(4));
    assert!(!fixture.is_ejected("pod-1"));
    assert_eq!(fixture.balancer.ejections().active, 0);
    assert!(fixture.spread(500).contains_key("pod-1"));
}

#[test]
fn an_answer_that_comes_after_the_endpoint_went_is_ignored() {
    let mut fixture = Fixture::new(settings(touchy()), many(1));
    let picked = fixture.pick().expect("one");
    fixture.update(vec![endpoint("other")]);
    picked.finish(answer(500, 1), fixture.now);
    assert_eq!(fixture.balancer.ejections(), EjectionStatus::default());
    let picked = fixture.pick().expect("one");
    drop(fixture.balancer);
    picked.finish(answer(500, 1), fixture.now);
}

/// What outlier detection comes to, written down without any cleverness.
#[derive(Default, Clone)]
struct Oracle {
    failures: u32,
    until: Option<u64>,
    times: u64,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Ejected are exactly those that failed `threshold` times in a row, as long as room
    /// was left, until their time is over.
    #[test]
    fn agrees_with_an_oracle(
        steps in prop::collection::vec((0usize..5, any::<bool>(), 0u64..8_000), 1..200),
        threshold in 1u32..4,
        percent in prop::sample::select(vec![20u8, 40, 60, 100]),
    ) {
        let outlier = OutlierDetection {
            consecutive_5xx: threshold,
            max_ejection_percent: percent,
            // Never forgives here.
            interval: Duration::from_secs(100_000),
            base_ejection_time: Duration::from_secs(10),
            ..Default::default()
        };
        let mut fixture = Fixture::new(settings(outlier), many(5));
        let mut oracle = vec![Oracle::default(); 5];
        let mut now = 0;
        for (at, good, pause) in steps {
            now += pause;
            fixture.advance(Duration::from_millis(pause));
            fixture.balancer.sweep(fixture.now);
            for state in &mut oracle {
                if state.until.is_some_and(|until| until <= now) {
                    state.until = None;
                    state.failures = 0;
                }
            }
            for (n, state) in oracle.iter().enumerate() {
                prop_assert_eq!(fixture.is_ejected(&format!("pod-{n}")), state.until.is_some());
            }
            if oracle[at].until.is_some() {
                continue;
            }
            fixture.fail(&format!("pod-{at}"), if good { 200 } else { 500 });
            let out = oracle.iter().filter(|state| state.until.is_some()).count();
            let state = &mut oracle[at];
            state.failures = if good { 0 } else { state.failures + 1 };
            if state.failures == threshold {
                state.failures = 0;
                if (out + 1) * 20 <= usize::from(percent) {
                    state.times += 1;
                    state.until = Some(now + (10_000 * state.times).min(300_000));
                }
            }
        }
    }
}
