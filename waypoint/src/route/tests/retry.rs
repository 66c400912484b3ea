//! HTTPRouteRetry and Envoy's `retry_on`.

use std::time::Duration;

use super::*;

fn policy(attempts: u32, codes: &[u32], conditions: &[&str]) -> RetryPolicy {
    let policy = proto::Retry {
        attempts,
        codes: codes.to_vec(),
        conditions: conditions.iter().map(|word| (*word).into()).collect(),
        ..Default::default()
    };
    RetryPolicy::from_proto(&policy).expect("understood")
}

const fn status(status: u16) -> Attempt {
    Attempt::Response {
        status,
        grpc_status: None,
    }
}

const fn grpc(code: u32) -> Attempt {
    Attempt::Response {
        status: 200,
        grpc_status: Some(code),
    }
}

const ALL: [(&str, Attempt); 18] = [
    ("connect", Attempt::ConnectFailed),
    ("before", Attempt::ResetBeforeRequest),
    ("refused", Attempt::Refused),
    ("reset", Attempt::Reset),
    ("timeout", Attempt::TimedOut),
    ("200", status(200)),
    ("404", status(404)),
    ("409", status(409)),
    ("500", status(500)),
    ("502", status(502)),
    ("503", status(503)),
    ("504", status(504)),
    ("grpc 0", grpc(0)),
    ("grpc 1", grpc(1)),
    ("grpc 4", grpc(4)),
    ("grpc 8", grpc(8)),
    ("grpc 13", grpc(13)),
    ("grpc 14", grpc(14)),
];

/// Envoy's table of `x-envoy-retry-on` and `x-envoy-retry-grpc-on`.
#[test]
fn what_each_word_means() {
    let lost = ["connect", "before", "refused", "reset", "timeout"];
    let with = |more: &[&'static str]| [&lost[..], more].concat();
    for (word, expected) in [
        ("5xx", with(&["500", "502", "503", "504"])),
        ("gateway-error", with(&["502", "503", "504"])),
        ("reset", with(&[])),
        ("reset-before-request", vec!["connect", "before"]),
        ("connect-failure", vec!["connect"]),
        ("refused-stream", vec!["refused"]),
        ("retriable-4xx", vec!["409"]),
        ("retriable-status-codes", vec![]),
        ("cancelled", vec!["grpc 1"]),
        ("deadline-exceeded", vec!["grpc 4"]),
        ("resource-exhausted", vec!["grpc 8"]),
        ("internal", vec!["grpc 13"]),
        ("unavailable", vec!["grpc 14"]),
        // Istio: codes among the words, several words in one text.
        (
            "connect-failure, 404,unavailable",
            vec!["connect", "404", "grpc 14"],
        ),
        ("nonsense", vec![]),
    ] {
        let policy = policy(2, &[], &[word]);
        let meant: Vec<_> = ALL
            .iter()
            .filter(|(_, attempt)| policy.means(*attempt))
            .collect();
        let meant: Vec<_> = meant.into_iter().map(|(name, _)| *name).collect();
        assert_eq!(meant, expected, "{word}");
    }
}

/// HTTPRouteRetry: without conditions what was certainly not processed, and the listed codes.
#[test]
fn what_a_route_means_that_names_no_condition() {
    for (codes, expected) in [
        (&[][..], &["connect", "refused", "grpc 14"][..]),
        (
            &[500, 503],
            &["connect", "refused", "500", "503", "grpc 14"],
        ),
        // A try whose time is over would be answered with 504.
        (&[504], &["connect", "refused", "timeout", "504", "grpc 14"]),
    ] {
        let policy = policy(1, codes, &[]);
        let meant = ALL.iter().filter(|(_, attempt)| policy.means(*attempt));
        assert_eq!(meant.map(|(name, _)| *name).collect::<Vec<_>>(), expected);
    }
}

/// "attempts counts tries beyond the first, 0 MUST disable".
#[test]
fn attempts() {
    let decide = |policy: &RetryPolicy, made| policy.decide(Attempt::Refused, made, true, None, 0);
    assert_eq!(decide(&policy(0, &[], &[]), 1), RetryDecision::Exhausted);
    let two = policy(2, &[], &[]);
    assert_eq!(decide(&two, 1), RetryDecision::After(Duration::ZERO));
    assert_eq!(decide(&two, 2), RetryDecision::After(Duration::ZERO));
    assert_eq!(decide(&two, 3), RetryDecision::Exhausted);
    assert_eq!(decide(&two, u32::MAX), RetryDecision::Exhausted);
}

#[test]
fn what_stands_in_the_way() {
    let policy = policy(3, &[500], &[]);
    let fails = status(500);
    let time = Some(Duration::from_millis(20));
    assert_eq!(
        policy.decide(status(501), 1, true, None, 0),
        RetryDecision::NotRetriable
    );
    assert_eq!(
        policy.decide(fails, 1, false, None, 0),
        RetryDecision::NotReplayable
    );
    assert_eq!(
        policy.decide(fails, 1, true, time, u64::MAX),
        RetryDecision::NoTime
    );
    let zero = Some(Duration::ZERO);
    assert_eq!(
        policy.decide(fails, 1, true, zero, 0),
        RetryDecision::NoTime
    );
    let soon = policy.decide(fails, 1, true, time, u64::MAX / 2);
    assert!(matches!(soon, RetryDecision::After(pause) if pause < Duration::from_millis(13)));
}

/// Envoy: "the range [0, (2^N-1)B)", at most ten base intervals.
#[test]
fn pauses() {
    let ceiling = |base: Option<prost_types::Duration>, made| {
        let policy = RetryPolicy::from_proto(&proto::Retry {
            attempts: u32::MAX,
            backoff: base,
            ..Default::default()
        });
        let policy = policy.expect("understood");
        let decide = |random| match policy.decide(Attempt::Refused, made, true, None, random) {
            RetryDecision::After(pause) => pause,
            other => panic!("{other:?}"),
        };
        assert_eq!(decide(0), Duration::ZERO);
        decide(u64::MAX).as_secs_f64()
    };
    let second = || {
        Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        })
    };
    for (base, made, expected) in [
        (None, 1, 0.025),
        (None, 2, 0.075),
        (None, 3, 0.175),
        (None, 4, 0.25),
        (None, 31, 0.25),
        (None, 32, 0.25),
        (None, u32::MAX - 1, 0.25),
        (second(), 1, 1.0),
        (second(), 9, 10.0),
    ] {
        let pause = ceiling(base, made);
        assert!((pause - expected).abs() < 1e-6, "{made}: {pause}");
    }
    let forever = Some(prost_types::Duration {
        seconds: 315_576_000_000,
        nanos: 0,
    });
    assert!(ceiling(forever, 9) > 1e9);
}

#[test]
fn what_cannot_be_understood() {
    let negative = Some(prost_types::Duration {
        seconds: -1,
        nanos: 0,
    });
    let policy = proto::Retry {
        attempts: 1,
        backoff: negative,
        ..Default::default()
    };
    assert!(RetryPolicy::from_proto(&policy).is_err());
    let route = http_route(
        "r",
        vec![proto::HttpRule {
            retry: Some(proto::Retry {
                codes: vec![7, 500, 70_000],
                conditions: vec!["5xx,nonsense".into()],
                ..Default::default()
            }),
            ..rule("r", vec![])
        }],
    );
    let route = Route::from_proto(&route);
    let problems: Vec<_> = route.problems().iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "http.rules[0].retry.codes: 7 is no status",
            "http.rules[0].retry.codes: 70000 is no status",
            "http.rules[0].retry.conditions: \"nonsense\" is not known",
        ]
    );
    let retry = route.rules()[0].retry().expect("policy");
    assert_eq!(
        (&*retry.codes, retry.on),
        (&[500][..], RetryOn::SERVER_ERROR)
    );
}
