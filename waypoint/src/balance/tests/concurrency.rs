//! All workers at once, while endpoints come and go.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use super::*;

/// Nothing is lost: when everybody has gone, nothing is in use; limits are never
/// exceeded; no pick returns an endpoint that was gone before the pick began.
#[test]
fn counts_are_right_under_churn() {
    let settings = TrafficSettings {
        outlier_detection: Some(OutlierDetection {
            base_ejection_time: Duration::from_millis(2),
            interval: Duration::from_millis(1),
            max_ejection_percent: 50,
            ..touchy()
        }),
        connection_pool: ConnectionPool {
            max_requests: std::num::NonZeroU32::new(64),
            ..Default::default()
        },
        ..Default::default()
    };
    let fixture = Fixture::new(settings, many(8));
    let balancer = &fixture.balancer;
    let done = AtomicBool::new(false);
    let (picks, refusals) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let (done, picks, refusals) = (&done, &picks, &refusals);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(worker);
                let mut held = std::collections::VecDeque::new();
                for round in 0..50_000u64 {
                    match balancer.pick(&PickRequest::default(), Instant::now(), &mut rng) {
                        Ok(picked) => {
                            assert!(&**picked.uid() != "never");
                            held.push_back(picked);
                            picks.fetch_add(1, Relaxed);
                        }
                        Err(PickError::Overflow(Resource::Requests)) => {
                            refusals.fetch_add(1, Relaxed);
                        }
                        Err(error) => panic!("{error}"),
                    }
                    let active = balancer.limits().status(Resource::Requests).active;
                    assert!(active <= 64, "{active} of 64");
                    if held.len() > 20
                        && let Some(picked) = held.pop_front()
                    {
                        let status = if round % 50 == 0 { 503 } else { 200 };
                        picked.finish(answer(status, 1), Instant::now());
                    }
                }
                drop(held);
                done.store(true, Relaxed);
            });
        }
        let fixture = &fixture;
        let done = &done;
        scope.spawn(move || {
            let mut round = 0usize;
            while !done.load(Relaxed) {
                let mut endpoints = many(8 + round % 5);
                endpoints.push(unready("never"));
                endpoints[round % 8].healthy = false;
                fixture.update(endpoints);
                round += 1;
                std::thread::yield_now();
            }
        });
    });
    assert!(picks.load(Relaxed) > 50_000);
    assert!(refusals.load(Relaxed) > 0, "the limit was never met");
    assert_eq!(balancer.limits().status(Resource::Requests).active, 0);
    for status in balancer.endpoints(Instant::now()) {
        assert_eq!(status.active, 0, "{}", status.endpoint.uid);
    }
    let ejections = balancer.ejections();
    assert!(ejections.consecutive_5xx > 0, "{ejections:?}");
}
