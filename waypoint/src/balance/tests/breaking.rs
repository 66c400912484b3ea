//! Circuit breakers and the retry budget.

use std::num::NonZeroU32;

use super::*;

fn limited(max: u32) -> TrafficSettings {
    let max = NonZeroU32::new(max);
    TrafficSettings {
        connection_pool: ConnectionPool {
            max_connections: max,
            max_pending_requests: max,
            max_requests: max,
            max_retries: max,
            ..Default::default()
        },
        ..Default::default()
    }
}

#[test]
fn a_limit_holds_and_places_come_back() {
    let fixture = Fixture::new(limited(2), many(1));
    let limits = fixture.balancer.limits();
    for (resource, reason, flag) in [
        (Resource::Connections, "connection_limit", "UO"),
        (Resource::Pending, "pending_limit", "UO"),
        (Resource::Requests, "request_limit", "UO"),
        (Resource::Retries, "retry_limit", "URX"),
    ] {
        let first = limits.acquire(resource).expect("the first");
        let _second = limits.acquire(resource).expect("the second");
        let error = limits.acquire(resource).expect_err("full");
        assert_eq!((error.reason(), error.response_flag()), (reason, flag));
        drop(first);
        let _third = limits.acquire(resource).expect("a place is free");
        let status = limits.status(resource);
        assert_eq!((status.active, status.max, status.refused), (2, 2, 1));
    }
}

#[test]
fn picks_count_as_requests() {
    let mut fixture = Fixture::new(limited(2), many(3));
    let first = fixture.pick().expect("the first");
    let _second = fixture.pick().expect("the second");
    let error = fixture.pick().expect_err("full");
    assert_eq!(error, PickError::Overflow(Resource::Requests));
    first.finish(answer(200, 1), fixture.now);
    let third = fixture.pick().expect("a place is free");
    // Raised, lowered and lifted while requests are in flight.
    fixture.settings = limited(1);
    fixture.update(many(3));
    drop(third);
    assert!(fixture.pick().is_err(), "one is still there");
    fixture.settings = TrafficSettings::default();
    fixture.update(many(3));
    let unlimited: Vec<_> = (0..100)
        .map(|_| fixture.pick().expect("no limit"))
        .collect();
    drop(unlimited);
    fixture.settings = limited(2);
    fixture.update(many(3));
    assert_eq!(
        fixture.balancer.limits().status(Resource::Requests).active,
        1
    );
}

/// A request that gets no endpoint gives its place back.
#[test]
fn a_failed_pick_holds_no_place() {
    let mut fixture = Fixture::new(limited(2), vec![]);
    for _ in 0..10 {
        assert_eq!(fixture.pick().expect_err("nothing"), PickError::NoEndpoints);
    }
    assert_eq!(
        fixture.balancer.limits().status(Resource::Requests).active,
        0
    );
}

#[test]
fn a_retry_budget_follows_the_load() {
    let settings = TrafficSettings {
        retry_budget: Some(RetryBudget {
            percent: 20.0,
            min_retries: 3,
        }),
        // Does not count beside a budget.
        connection_pool: ConnectionPool {
            max_retries: NonZeroU32::new(1),
            ..Default::default()
        },
        ..Default::default()
    };
    let mut fixture = Fixture::new(settings, many(3));
    // Requests in flight, retries among them.
    for (requests, retries) in [(0, 3), (10, 3), (15, 3), (20, 4), (100, 20)] {
        let _requests: Vec<_> = (0..requests)
            .map(|_| fixture.pick().expect("one"))
            .collect();
        let limits = fixture.balancer.limits();
        let mut permits = Vec::new();
        let error = loop {
            match limits.acquire(Resource::Retries) {
                Ok(permit) => permits.push(permit),
                Err(error) => break error,
            }
        };
        assert_eq!(permits.len(), retries, "with {requests} requests");
        assert_eq!(
            (error.reason(), error.response_flag()),
            ("retry_budget", "URX")
        );
    }
}

#[test]
fn by_default_only_waiting_is_bounded() {
    let fixture = Fixture::new(TrafficSettings::default(), many(1));
    let limits = fixture.balancer.limits();
    for resource in [Resource::Connections, Resource::Requests, Resource::Retries] {
        assert_eq!(limits.status(resource).max, u32::MAX);
    }
    assert_eq!(limits.status(Resource::Pending).max, DEFAULT_MAX_PENDING);
    assert_eq!(limits.max_requests_per_connection(), None);
}
