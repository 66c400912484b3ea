//! Whatever happens, a pick gives what a scan of all endpoints says may be given.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    /// Readiness and weight of each endpoint that is there.
    Update(Vec<Option<(bool, u32)>>),
    /// This one answers 500 once.
    Fail(usize),
    Wait(u64),
    /// Picks, with these tried and, where given, a hash and a sticky endpoint.
    Pick(Vec<usize>, Option<u64>, Option<usize>),
}

const COUNT: usize = 6;
const PLACES: [&str; 3] = ["eu/a", "eu/b", "us/a"];

fn name(n: usize) -> String {
    format!("pod-{n}")
}

fn step() -> impl Strategy<Value = Step> {
    let endpoint = prop::option::weighted(0.8, (prop::bool::weighted(0.8), 0u32..4));
    prop_oneof![
        1 => prop::collection::vec(endpoint, COUNT).prop_map(Step::Update),
        2 => (0..COUNT).prop_map(Step::Fail),
        1 => (0u64..20_000).prop_map(Step::Wait),
        6 => (
            prop::collection::vec(0..COUNT, 0..4),
            any::<Option<u64>>(),
            prop::option::of(0..COUNT),
        )
            .prop_map(|(tried, hash, sticky)| Step::Pick(tried, hash, sticky)),
    ]
}

fn algorithms() -> impl Strategy<Value = Algorithm> {
    prop::sample::select(vec![
        Algorithm::LeastRequest,
        Algorithm::RoundRobin,
        Algorithm::Random,
        Algorithm::RingHash {
            minimum_ring_size: 64,
        },
    ])
}

fn locality_policies() -> impl Strategy<Value = Option<LocalityPolicy>> {
    let pattern = LocalityPattern::new;
    prop::sample::select(vec![
        None,
        Some(LocalityPolicy::Failover(vec![])),
        Some(LocalityPolicy::Distribute(vec![Distribution {
            from: pattern("*"),
            to: vec![(pattern("eu/a"), 1), (pattern("*"), 2)],
        }])),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn picks_what_may_be_picked(
        steps in prop::collection::vec(step(), 1..80),
        algorithm in algorithms(),
        locality_policy in locality_policies(),
        warm in any::<bool>(),
    ) {
        let settings = TrafficSettings {
            load_balancer: LoadBalancer {
                algorithm,
                locality: locality_policy,
                slow_start: warm.then_some(SlowStart {
                    window: Duration::from_secs(10),
                    aggression: 1.0,
                    minimum_percent: 0,
                }),
                ..Default::default()
            },
            outlier_detection: Some(touchy()),
            ..Default::default()
        };
        let origin = Origin { locality: locality("eu/a"), ..Default::default() };
        let mut fixture = Fixture::with(settings, LoadBalancing::default(), origin, vec![]);
        let mut known: Vec<Option<(bool, u32)>> = vec![None; COUNT];
        for step in steps {
            match step {
                Step::Update(endpoints) => {
                    known = endpoints;
                    let of = known.iter().enumerate();
                    let endpoints = of.filter_map(|(n, state)| {
                        let (healthy, weight) = (*state)?;
                        Some(Endpoint { healthy, weight, ..at(&name(n), PLACES[n % 3]) })
                    });
                    fixture.update(endpoints.collect());
                }
                Step::Fail(n) => {
                    let name = name(n);
                    let sticky = PickRequest { sticky: Some(&name), ..Default::default() };
                    if let Ok(picked) = fixture.pick_for(sticky)
                        && **picked.uid() == *name
                    {
                        picked.finish(answer(500, 1), fixture.now);
                    }
                }
                Step::Wait(millis) => fixture.advance(Duration::from_millis(millis)),
                Step::Pick(tried, hash, sticky) => {
                    fixture.balancer.sweep(fixture.now);
                    let usable: Vec<String> = (0..COUNT)
                        .filter(|n| matches!(known[*n], Some((true, 1..))))
                        .map(name)
                        .filter(|name| !fixture.is_ejected(name))
                        .collect();
                    let tried: Vec<WorkloadUid> =
                        tried.iter().map(|n| name(*n).into()).collect();
                    let sticky = sticky.map(name);
                    let request = PickRequest {
                        tried: &tried,
                        hash,
                        sticky: sticky.as_deref(),
                        destination: None,
                    };
                    let untried = |uid: &String| !tried.iter().any(|other| **other == **uid);
                    match fixture.pick_for(request) {
                        Err(error) => {
                            prop_assert!(usable.is_empty(), "{} with {:?}", error, usable);
                            let any_ready = known.iter().any(|k| matches!(k, Some((true, 1..))));
                            let expected = if known.iter().all(Option::is_none) {
                                "no_endpoints"
                            } else if any_ready {
                                "all_ejected"
                            } else {
                                "no_healthy_endpoints"
                            };
                            prop_assert_eq!(error.reason(), expected);
                        }
                        Ok(picked) => {
                            let uid = picked.uid().to_string();
                            prop_assert!(usable.contains(&uid), "{} of {:?}", uid, usable);
                            if usable.iter().any(untried) {
                                prop_assert!(untried(&uid), "{} again", uid);
                            }
                            if let Some(sticky) = sticky.filter(untried)
                                && usable.contains(&sticky)
                            {
                                prop_assert_eq!(uid, sticky);
                            }
                        }
                    }
                }
            }
        }
    }
}
