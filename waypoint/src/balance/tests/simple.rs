//! Round robin, random, passthrough; sticky sessions, retries, and why there is nothing.

use super::*;

#[test]
fn random_follows_weights() {
    for weights in [&[1, 1, 1, 1][..], &[1, 2, 3, 4], &[100, 1, 100], &[5]] {
        let names: Vec<String> = (0..weights.len()).map(|n| format!("e{n}")).collect();
        let of = names.iter().zip(weights);
        let endpoints = of.clone().map(|(name, w)| weighted(name, *w)).collect();
        let mut fixture = Fixture::new(algorithm(Algorithm::Random), endpoints);
        let shares: Vec<_> = of.map(|(name, w)| (name.as_str(), f64::from(*w))).collect();
        assert_shares(&fixture.spread(20_000), &shares);
    }
}

#[test]
fn round_robin_is_exact_and_smooth() {
    let endpoints = vec![weighted("a", 50), weighted("b", 10), weighted("c", 10)];
    let mut fixture = Fixture::new(algorithm(Algorithm::RoundRobin), endpoints);
    let round: Vec<String> = (0..7).map(|_| fixture.request()).collect();
    for _ in 0..10 {
        let next: Vec<String> = (0..7).map(|_| fixture.request()).collect();
        assert_eq!(next, round);
    }
    for (name, count) in [("a", 5), ("b", 1), ("c", 1)] {
        assert_eq!(round.iter().filter(|other| *other == name).count(), count);
    }
    let others: Vec<usize> = (0..7).filter(|at| round[*at] != "a").collect();
    assert!(
        others[1] - others[0] > 1,
        "b and c stand together: {round:?}"
    );
}

#[test]
fn round_robin_with_odd_weights_gives_everyone_a_turn() {
    let weights = [1, 1_000_000, 999_983, 7];
    let schedule = crate::balance::turns::schedule(&weights);
    for at in 0..weights.len() as u32 {
        assert!(schedule.contains(&at), "{at} has no turn");
    }
    assert!(schedule.len() <= 4096 + weights.len(), "{}", schedule.len());
    let heavy = schedule.iter().filter(|at| **at == 1).count() as f64;
    let other = schedule.iter().filter(|at| **at == 2).count() as f64;
    assert!((heavy / other - 1.0).abs() < 0.01);
}

#[test]
fn round_robin_skips_what_has_been_tried() {
    let mut fixture = Fixture::new(algorithm(Algorithm::RoundRobin), many(3));
    let tried = uids(&["pod-0", "pod-2"]);
    for _ in 0..10 {
        let request = PickRequest {
            tried: &tried,
            ..Default::default()
        };
        assert_eq!(
            &**fixture.pick_for(request).expect("one is left").uid(),
            "pod-1"
        );
    }
}

#[test]
fn a_retry_goes_elsewhere_if_there_is_an_elsewhere() {
    let settings = [
        Algorithm::LeastRequest,
        Algorithm::RoundRobin,
        Algorithm::Random,
        Algorithm::RingHash {
            minimum_ring_size: 1024,
        },
        Algorithm::Maglev,
    ];
    for algorithm in settings {
        let endpoints = vec![weighted("a", 1000), weighted("b", 1), weighted("c", 3)];
        let mut fixture = Fixture::new(super::algorithm(algorithm), endpoints);
        for (tried, left) in [
            (vec!["a"], vec!["b", "c"]),
            (vec!["a", "b"], vec!["c"]),
            (vec!["a", "c"], vec!["b"]),
            (vec!["a", "b", "c"], vec!["a", "b", "c"]),
        ] {
            let tried = uids(&tried);
            for hash in 0..50u64 {
                let request = PickRequest {
                    tried: &tried,
                    hash: Some(hash.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                    ..Default::default()
                };
                let picked = fixture.pick_for(request).expect("an endpoint");
                assert!(left.contains(&&**picked.uid()), "{algorithm:?} {tried:?}");
            }
        }
    }
}

#[test]
fn a_session_stays_while_its_endpoint_can_be_used() {
    let mut settings = algorithm(Algorithm::RoundRobin);
    settings.outlier_detection = Some(touchy());
    let mut fixture = Fixture::new(settings, many(3));
    let sticky = PickRequest {
        sticky: Some("pod-1"),
        ..Default::default()
    };
    for _ in 0..5 {
        assert_eq!(&**fixture.pick_for(sticky).expect("it").uid(), "pod-1");
    }
    let tried = uids(&["pod-1"]);
    let retry = PickRequest {
        tried: &tried,
        ..sticky
    };
    assert_ne!(&**fixture.pick_for(retry).expect("another").uid(), "pod-1");
    fixture.fail("pod-1", 500);
    assert_ne!(&**fixture.pick_for(sticky).expect("another").uid(), "pod-1");
    fixture.advance(Duration::from_secs(30));
    assert_eq!(&**fixture.pick_for(sticky).expect("it").uid(), "pod-1");
    fixture.update(vec![endpoint("pod-0"), unready("pod-1")]);
    assert_eq!(&**fixture.pick_for(sticky).expect("another").uid(), "pod-0");
    fixture.update(vec![endpoint("pod-0")]);
    assert_eq!(&**fixture.pick_for(sticky).expect("another").uid(), "pod-0");
}

#[test]
fn passthrough_goes_where_the_client_wanted() {
    let endpoints = many(20);
    let mut fixture = Fixture::new(algorithm(Algorithm::Passthrough), endpoints.clone());
    for endpoint in &endpoints {
        let request = PickRequest {
            destination: Some(endpoint.workload.addresses[0]),
            ..Default::default()
        };
        assert_eq!(fixture.pick_for(request).expect("it").uid(), &endpoint.uid);
    }
    // A virtual address is none of them.
    let vip = PickRequest {
        destination: Some([192, 0, 2, 1].into()),
        ..Default::default()
    };
    assert!(fixture.pick_for(vip).is_ok());
}

#[test]
fn says_why_there_is_nothing() {
    let ready = || vec![endpoint("a")];
    let settings = TrafficSettings::default();
    let reason = |settings: &TrafficSettings, endpoints| {
        let mut fixture = Fixture::new(settings.clone(), endpoints);
        let error = fixture.pick().expect_err("nothing");
        (
            error.reason(),
            error.response_flag(),
            error.status().as_u16(),
        )
    };
    assert_eq!(reason(&settings, vec![]), ("no_endpoints", "UH", 503));
    let not_ready = vec![unready("a"), weighted("b", 0)];
    assert_eq!(
        reason(&settings, not_ready),
        ("no_healthy_endpoints", "UH", 503)
    );
    let invalid = TrafficSettings::invalid("x");
    assert_eq!(
        reason(&invalid, ready()),
        ("invalid_traffic_policy", "NC", 500)
    );

    let service = LoadBalancing::default();
    let subset = SubsetMembers::from(["b".into()]);
    let update = Update {
        settings: Arc::new(settings),
        subset: Some(&subset),
        load_balancing: &service,
        origin: &Origin::default(),
        endpoints: ready(),
    };
    let now = Instant::now();
    let balancer = Balancer::new(update, now);
    let mut rng = SmallRng::seed_from_u64(1);
    let picked = balancer.pick(&PickRequest::default(), now, &mut rng);
    assert_eq!(picked.expect_err("nothing"), PickError::SubsetEmpty);
}

#[test]
fn unready_endpoints_are_used_where_the_service_says_so() {
    let service = LoadBalancing {
        allow_unhealthy: true,
        ..Default::default()
    };
    let settings = TrafficSettings::default();
    let endpoints = vec![unready("a"), weighted("b", 0)];
    let mut fixture = Fixture::with(settings, service, Origin::default(), endpoints);
    assert_shares(&fixture.spread(100), &[("a", 1.0)]);
}

#[test]
fn state_survives_updates_for_the_same_workload_only() {
    let mut fixture = Fixture::new(TrafficSettings::default(), many(2));
    let held: Vec<Picked> = (0..10).map(|_| fixture.pick().expect("one")).collect();
    let active = |fixture: &Fixture| -> u32 {
        let all = fixture.balancer.endpoints(fixture.now);
        all.iter().map(|status| status.active).sum()
    };
    fixture.update(many(3));
    assert_eq!(active(&fixture), 10);
    // Both are others now, under their old names.
    let moved = many(2).into_iter().map(|endpoint| {
        let workload = Workload {
            addresses: vec![[10, 9, 9, 9].into()],
            ..(*endpoint.workload).clone()
        };
        Endpoint::new(Arc::new(workload), 8080)
    });
    fixture.update(moved.collect());
    assert_eq!(active(&fixture), 0);
    drop(held);
    assert_eq!(active(&fixture), 0);
}
