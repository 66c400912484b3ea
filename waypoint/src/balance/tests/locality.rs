//! Near endpoints first, overflow, and given shares.

use adit_shared::model::{LoadBalancingMode, LocalityScope};

use super::*;
use crate::balance::locality::{Availability, loads};

fn here(place: &str) -> Origin {
    Origin {
        locality: locality(place),
        node: "node-1".into(),
        cluster: "c1".into(),
        network: "".into(),
    }
}

fn failover(steps: &[(&str, &str)]) -> TrafficSettings {
    let steps = steps
        .iter()
        .map(|(from, to)| ((*from).into(), (*to).into()));
    let mut settings = algorithm(Algorithm::Random);
    settings.load_balancer.locality = Some(LocalityPolicy::Failover(steps.collect()));
    settings.outlier_detection = Some(touchy());
    settings
}

/// Envoy's documentation, "Priority levels": health of each level, load of each.
#[test]
fn tiers_take_load_by_health() {
    let table: [(&[usize], &[f64]); 11] = [
        (&[100], &[1.0]),
        (&[10], &[1.0]),
        (&[100, 100], &[1.0, 0.0]),
        (&[72, 72], &[1.0, 0.0]),
        (&[71, 71], &[0.994, 0.006]),
        (&[50, 50], &[0.70, 0.30]),
        (&[25, 100], &[0.35, 0.65]),
        (&[25, 25], &[0.5, 0.5]),
        (&[0, 100], &[0.0, 1.0]),
        (&[25, 25, 100], &[0.35, 0.35, 0.30]),
        (&[25, 25, 20], &[0.357, 0.357, 0.286]),
    ];
    for (health, expected) in table {
        let tiers: Vec<_> = health
            .iter()
            .map(|usable| Availability {
                usable: *usable,
                ready: 100,
                total: 100,
            })
            .collect();
        let loads = loads(&tiers, 0);
        for (load, expected) in loads.iter().zip(expected) {
            assert!(
                (load.share - expected).abs() < 0.001,
                "{health:?}: {loads:?}"
            );
            assert!(!load.panic);
        }
    }
}

#[test]
fn panic_is_for_when_nobody_has_room() {
    let tier = |usable| Availability {
        usable,
        ready: 100,
        total: 100,
    };
    // Usable in each tier, threshold, which tiers panic.
    for (usable, threshold, expected) in [
        (vec![40], 50, vec![true]),
        (vec![50], 50, vec![false]),
        (vec![10, 100], 50, vec![false, false]),
        (vec![10, 20], 15, vec![true, false]),
        (vec![0, 0], 0, vec![false, false]),
        (vec![0, 0], 1, vec![true, true]),
    ] {
        let tiers: Vec<_> = usable.iter().map(|usable| tier(*usable)).collect();
        let loads = loads(&tiers, threshold);
        let panics: Vec<bool> = loads.iter().map(|load| load.panic).collect();
        assert_eq!(panics, expected, "{usable:?} {threshold}");
        let sum: f64 = loads.iter().map(|load| load.share).sum();
        let some = usable.iter().sum::<usize>() > 0 || threshold > 0;
        assert!((sum - f64::from(u8::from(some))).abs() < 1e-9, "{loads:?}");
    }
}

/// Istio's `applyLocalityFailover`.
#[test]
fn nearest_locality_first() {
    let all = [
        ("subzone", "eu/a/1"),
        ("zone", "eu/a/2"),
        ("region", "eu/b/1"),
        ("target", "us/a/1"),
        ("other", "ap/a/1"),
    ];
    for (steps, order) in [
        (
            &[("eu", "us")][..],
            &[
                &["subzone"][..],
                &["zone"],
                &["region"],
                &["target"],
                &["other"],
            ][..],
        ),
        (
            &[],
            &[&["subzone"], &["zone"], &["region"], &["target", "other"]],
        ),
        (
            &[("ap", "eu")],
            &[&["subzone"], &["zone"], &["region"], &["target", "other"]],
        ),
    ] {
        let mut left: Vec<_> = all.to_vec();
        for expected in order {
            let endpoints = left.iter().map(|(name, place)| at(name, place)).collect();
            let service = LoadBalancing::default();
            let mut fixture = Fixture::with(failover(steps), service, here("eu/a/1"), endpoints);
            let shares: Vec<_> = expected.iter().map(|name| (*name, 1.0)).collect();
            assert_shares(&fixture.spread(500), &shares);
            left.retain(|(name, _)| !expected.contains(name));
        }
    }
}

#[test]
fn without_a_locality_of_our_own_all_are_near() {
    let endpoints = vec![at("a", "eu/a"), at("b", "us/a")];
    let service = LoadBalancing::default();
    let mut fixture = Fixture::with(failover(&[]), service, Origin::default(), endpoints);
    assert_shares(&fixture.spread(1_000), &[("a", 1.0), ("b", 1.0)]);
}

#[test]
fn ejections_overflow_and_flow_back() {
    let near = ["n0", "n1", "n2", "n3"];
    let mut endpoints: Vec<_> = near.iter().map(|name| at(name, "eu/a")).collect();
    endpoints.push(at("far", "us/a"));
    let service = LoadBalancing::default();
    let mut fixture = Fixture::with(failover(&[]), service, here("eu/a"), endpoints);
    // Ejected of four near ones, share of the far one: 1 - 1.4 * usable.
    for (ejected, far) in [(0, 0.0), (1, 0.0), (2, 0.3), (3, 0.65), (4, 1.0)] {
        if ejected > 0 {
            fixture.fail(near[ejected - 1], 500);
        }
        let counts = fixture.spread(5_000);
        let mut shares = vec![("far", far)];
        let rest = (1.0 - far) / (4 - ejected).max(1) as f64;
        shares.extend(near[ejected..].iter().map(|name| (*name, rest)));
        assert_shares(&counts, &shares);
    }
    fixture.advance(Duration::from_secs(31));
    assert!(!fixture.spread(1_000).contains_key("far"));
}

#[test]
fn capacity_that_is_missing_overflows_and_capacity_that_is_starting_does_not() {
    let service = LoadBalancing::default();
    let far = || at("far", "us/a");
    let near = |name: &str, healthy| Endpoint {
        healthy,
        ..at(name, "eu/a")
    };
    let starting = vec![near("a", true), near("b", false), far()];
    let mut fixture = Fixture::with(failover(&[]), service, here("eu/a"), starting.clone());
    assert_shares(&fixture.spread(200), &[("a", 1.0)]);
    fixture.update(vec![near("a", true), near("b", true), far()]);
    fixture.update(starting);
    assert_shares(&fixture.spread(5_000), &[("a", 0.7), ("far", 0.3)]);
}

#[test]
fn a_retry_leaves_the_tier_when_all_of_it_has_been_tried() {
    let endpoints = vec![at("near", "eu/a"), at("far", "us/a")];
    let service = LoadBalancing::default();
    let mut fixture = Fixture::with(failover(&[]), service, here("eu/a"), endpoints);
    for (tried, expected) in [
        (&[][..], "near"),
        (&["near"], "far"),
        (&["far"], "near"),
        (&["near", "far"], "near"),
    ] {
        let tried = uids(tried);
        let request = PickRequest {
            tried: &tried,
            ..Default::default()
        };
        assert_eq!(&**fixture.pick_for(request).expect("one").uid(), expected);
    }
}

#[test]
fn distribution_gives_shares() {
    let pattern = LocalityPattern::new;
    let distribution = |from: &str, to: &[(&str, u32)]| Distribution {
        from: pattern(from),
        to: to.iter().map(|(to, share)| (pattern(to), *share)).collect(),
    };
    let mut settings = algorithm(Algorithm::Random);
    settings.outlier_detection = Some(touchy());
    settings.load_balancer.locality = Some(LocalityPolicy::Distribute(vec![
        distribution("us/*", &[("us/*", 100)]),
        distribution("eu/a/*", &[("eu/a/*", 80), ("eu/*", 15), ("us/b", 5)]),
    ]));
    let endpoints = vec![
        at("ea1", "eu/a/1"),
        at("ea2", "eu/a/2"),
        at("eb", "eu/b/1"),
        at("ua", "us/a"),
        at("ub", "us/b/7"),
    ];
    let service = LoadBalancing::default();
    let expected = [
        (
            "eu/a/9",
            vec![("ea1", 40.0), ("ea2", 40.0), ("eb", 15.0), ("ub", 5.0)],
        ),
        ("us/b", vec![("ua", 50.0), ("ub", 50.0)]),
        (
            "ap/a",
            ["ea1", "ea2", "eb", "ua", "ub"]
                .map(|name| (name, 1.0))
                .to_vec(),
        ),
    ];
    for (place, shares) in expected {
        let (service, origin) = (service.clone(), here(place));
        let mut fixture = Fixture::with(settings.clone(), service, origin, endpoints.clone());
        assert_shares(&fixture.spread(10_000), &shares);
    }
    // Half of a locality is out: it takes 70 % of its share.
    let mut fixture = Fixture::with(settings, service, here("eu/a/9"), endpoints);
    fixture.fail("ea1", 500);
    let shares = [("ea2", 56.0), ("eb", 15.0), ("ub", 5.0)];
    assert_shares(&fixture.spread(10_000), &shares);
}

#[test]
fn traffic_distribution_of_the_service() {
    let endpoint = |name: &str, place: &str, node: &str| {
        let endpoint = at(name, place);
        let workload = Workload {
            node: node.into(),
            cluster_id: "c1".into(),
            ..(*endpoint.workload).clone()
        };
        Endpoint::new(Arc::new(workload), 8080)
    };
    let endpoints = vec![
        endpoint("node", "eu/a", "node-1"),
        endpoint("zone", "eu/a", "node-2"),
        endpoint("region", "eu/b", "node-3"),
        endpoint("far", "us/a", "node-4"),
    ];
    let zones = vec![LocalityScope::Region, LocalityScope::Zone];
    let nodes = [&zones[..], &[LocalityScope::Node]].concat();
    let run = |mode, scopes: &[LocalityScope], left: &[&str]| {
        let service = LoadBalancing {
            scopes: scopes.to_vec(),
            mode,
            allow_unhealthy: false,
        };
        let mut endpoints = endpoints.clone();
        endpoints.retain(|endpoint| left.contains(&&*endpoint.uid));
        let settings = algorithm(Algorithm::Random);
        let mut fixture = Fixture::with(settings, service, here("eu/a"), endpoints);
        match fixture.pick() {
            Err(error) => vec![error.reason().to_owned()],
            Ok(_) => fixture.spread(200).into_keys().collect(),
        }
    };
    use LoadBalancingMode::{Failover, Standard, Strict};
    let all = ["node", "zone", "region", "far"];
    assert_eq!(run(Failover, &nodes, &all), ["node"]);
    assert_eq!(run(Failover, &zones, &all), ["node", "zone"]);
    assert_eq!(run(Failover, &nodes, &all[1..]), ["zone"]);
    assert_eq!(run(Failover, &zones, &all[2..]), ["region"]);
    assert_eq!(run(Failover, &zones, &all[3..]), ["far"]);
    assert_eq!(run(Standard, &zones, &all).len(), 4);
    assert_eq!(run(Strict, &zones, &all), ["node", "zone"]);
    assert_eq!(run(Strict, &zones, &all[2..]), ["no_local_endpoints"]);
}

#[test]
fn the_traffic_policy_overrides_the_service() {
    let service = LoadBalancing {
        scopes: vec![LocalityScope::Region],
        mode: LoadBalancingMode::Strict,
        allow_unhealthy: false,
    };
    let endpoints = vec![at("far", "us/a")];
    let mut fixture = Fixture::with(failover(&[]), service, here("eu/a"), endpoints);
    assert!(fixture.pick().is_ok());
}
