//! From the wire to settings.

use std::num::NonZeroU32;

use adit_shared::proto::waypoint as proto;
use prost_types::Duration as Wire;

use super::*;

fn seconds(seconds: i64) -> Option<Wire> {
    Some(Wire { seconds, nanos: 0 })
}

#[test]
fn what_is_not_said_is_as_in_istio() {
    let (settings, problems) = TrafficSettings::from_proto(&proto::TrafficSettings::default());
    assert_eq!(settings, TrafficSettings::default());
    assert!(problems.is_empty());
    assert_eq!(settings.load_balancer.algorithm, Algorithm::LeastRequest);
    assert_eq!(settings.outlier_detection, None);
    assert_eq!(settings.panic_threshold(), 0);
    assert_eq!(
        settings.connection_pool.connect_timeout,
        Duration::from_secs(10)
    );

    let (settings, _) = TrafficSettings::from_proto(&proto::TrafficSettings {
        outlier_detection: Some(proto::OutlierDetection::default()),
        connection_pool: Some(proto::ConnectionPool::default()),
        load_balancer: Some(proto::LoadBalancer::default()),
        ..Default::default()
    });
    assert_eq!(
        settings.outlier_detection,
        Some(OutlierDetection::default())
    );
    assert_eq!(settings.connection_pool, ConnectionPool::default());
    assert_eq!(settings.load_balancer, LoadBalancer::default());
}

#[test]
fn every_field_arrives() {
    let wire = proto::TrafficSettings {
        load_balancer: Some(proto::LoadBalancer {
            algorithm: proto::load_balancer::Algorithm::RingHash.into(),
            hash_key: Some(proto::load_balancer::HashKey::Cookie(proto::HashCookie {
                name: "user".into(),
                path: "/".into(),
                ttl: seconds(0),
            })),
            minimum_ring_size: 4096,
            warmup: seconds(60),
            warmup_aggression: 2.0,
            warmup_minimum_percent: 20,
            locality_enabled: true,
            distribute: vec![proto::LocalityDistribute {
                from: "eu/a/*".into(),
                to: [("eu/a/1".into(), 90), ("us/*".into(), 10)].into(),
            }],
            panic_threshold_percent: 30,
            panic_threshold_set: true,
            ..Default::default()
        }),
        connection_pool: Some(proto::ConnectionPool {
            max_connections: 1,
            connect_timeout: seconds(2),
            tcp_idle_timeout: seconds(3),
            max_pending_requests: 4,
            max_requests: 5,
            max_requests_per_connection: 6,
            max_retries: 7,
            http_idle_timeout: seconds(0),
            h2_upgrade: proto::connection_pool::H2Upgrade::Upgrade.into(),
            use_client_protocol: false,
            max_concurrent_streams: 9,
            max_connection_duration: seconds(10),
        }),
        outlier_detection: Some(proto::OutlierDetection {
            consecutive_5xx: 0,
            consecutive_5xx_set: true,
            consecutive_gateway_errors: 2,
            consecutive_gateway_errors_set: true,
            consecutive_local_origin_failures: 3,
            split_external_local_origin_errors: true,
            interval: seconds(4),
            base_ejection_time: seconds(5),
            max_ejection_percent: 0,
            max_ejection_percent_set: true,
            min_health_percent: 6,
        }),
        tls: Some(proto::ClientTls {
            mode: proto::client_tls::Mode::Simple.into(),
            sni: "s".into(),
            subject_alt_names: vec!["n".into()],
            ca_certificates: "pem".into(),
            system_roots: true,
            insecure_skip_verify: true,
            client_secret: "shop/client".into(),
            invalid: "broken".into(),
        }),
        retry_budget: Some(proto::RetryBudget {
            percent: 12.5,
            min_retries: 3,
        }),
    };
    let (settings, problems) = TrafficSettings::from_proto(&wire);
    assert!(problems.is_empty(), "{problems:?}");
    let expected = TrafficSettings {
        load_balancer: LoadBalancer {
            algorithm: Algorithm::RingHash {
                minimum_ring_size: 4096,
            },
            hash_key: Some(HashKey::Cookie(HashCookie {
                name: "user".into(),
                path: "/".into(),
                ttl: Some(Duration::ZERO),
            })),
            slow_start: Some(SlowStart {
                window: Duration::from_secs(60),
                aggression: 2.0,
                minimum_percent: 20,
            }),
            locality: Some(LocalityPolicy::Distribute(vec![Distribution {
                from: LocalityPattern {
                    parts: [Some("eu".into()), Some("a".into()), None],
                },
                to: vec![
                    (
                        LocalityPattern {
                            parts: [Some("eu".into()), Some("a".into()), Some("1".into())],
                        },
                        90,
                    ),
                    (
                        LocalityPattern {
                            parts: [Some("us".into()), None, None],
                        },
                        10,
                    ),
                ],
            }])),
            panic_threshold: Some(30),
        },
        connection_pool: ConnectionPool {
            max_connections: NonZeroU32::new(1),
            connect_timeout: Duration::from_secs(2),
            tcp_idle_timeout: Some(Duration::from_secs(3)),
            max_pending_requests: NonZeroU32::new(4),
            max_requests: NonZeroU32::new(5),
            max_requests_per_connection: NonZeroU32::new(6),
            max_retries: NonZeroU32::new(7),
            http_idle_timeout: None,
            protocol: UpstreamProtocol::Http2,
            max_concurrent_streams: NonZeroU32::new(9),
            max_connection_duration: Some(Duration::from_secs(10)),
        },
        outlier_detection: Some(OutlierDetection {
            consecutive_5xx: 0,
            consecutive_gateway_errors: 2,
            consecutive_local_origin_failures: 3,
            split_local_origin_errors: true,
            interval: Duration::from_secs(4),
            base_ejection_time: Duration::from_secs(5),
            max_ejection_percent: 0,
            min_health_percent: 6,
        }),
        tls: Some(ClientTls {
            mode: TlsMode::Simple,
            sni: "s".into(),
            subject_alt_names: ["n".into()].into(),
            ca_certificates: "pem".into(),
            system_roots: true,
            insecure_skip_verify: true,
            client_secret: "shop/client".into(),
            invalid: Some("broken".into()),
        }),
        retry_budget: Some(RetryBudget {
            percent: 12.5,
            min_retries: 3,
        }),
        invalid: None,
    };
    assert_eq!(settings, expected);
    assert_eq!(settings.panic_threshold(), 30);
}

fn round_robin() -> Option<proto::LoadBalancer> {
    Some(proto::LoadBalancer {
        algorithm: proto::load_balancer::Algorithm::RoundRobin.into(),
        ..Default::default()
    })
}

fn connections(max_connections: u32) -> Option<proto::ConnectionPool> {
    Some(proto::ConnectionPool {
        max_connections,
        ..Default::default()
    })
}

/// Istio's `MergeSubsetTrafficPolicy`.
#[test]
fn ports_replace_and_subsets_override() {
    let policy = TrafficPolicy::from_proto(&proto::TrafficPolicy {
        host: "reviews.shop.svc.cluster.local".into(),
        settings: Some(proto::TrafficSettings {
            load_balancer: round_robin(),
            connection_pool: connections(1),
            ..Default::default()
        }),
        port_settings: [(
            8080,
            proto::TrafficSettings {
                connection_pool: connections(2),
                ..Default::default()
            },
        )]
        .into(),
        subsets: vec![
            proto::Subset {
                name: "v1".into(),
                settings: None,
                workloads: vec!["a".into()],
            },
            proto::Subset {
                name: "v2".into(),
                settings: Some(proto::TrafficSettings {
                    connection_pool: connections(3),
                    ..Default::default()
                }),
                workloads: vec![],
            },
        ],
        ..Default::default()
    });
    assert!(policy.problems().is_empty());
    let (rr, lr) = (Algorithm::RoundRobin, Algorithm::LeastRequest);
    for (port, subset, algorithm, connections) in [
        (80, None, rr, 1),
        // Nothing of the whole host is inherited.
        (8080, None, lr, 2),
        (80, Some("v1"), rr, 1),
        (80, Some("v2"), rr, 3),
        (8080, Some("v1"), lr, 2),
        (8080, Some("v2"), lr, 3),
    ] {
        let selection = policy.select(port, subset).expect("a subset");
        let settings = &selection.settings;
        let found = (
            settings.load_balancer.algorithm,
            settings.connection_pool.max_connections,
        );
        assert_eq!(
            found,
            (algorithm, NonZeroU32::new(connections)),
            "{port} {subset:?}"
        );
        let members = selection.members.map(|members| members.len());
        assert_eq!(members, subset.map(|name| usize::from(name == "v1")));
    }
    let error = policy.select(80, Some("v3")).expect_err("no such subset");
    assert_eq!(
        (error.reason(), error.response_flag()),
        ("unknown_subset", "NC")
    );
}

#[test]
fn what_cannot_be_understood_fails_closed_by_name() {
    type Change = fn(&mut proto::TrafficSettings);
    fn lb(settings: &mut proto::TrafficSettings) -> &mut proto::LoadBalancer {
        settings.load_balancer.get_or_insert_default()
    }
    fn pool(settings: &mut proto::TrafficSettings) -> &mut proto::ConnectionPool {
        settings.connection_pool.get_or_insert_default()
    }
    fn outlier(settings: &mut proto::TrafficSettings) -> &mut proto::OutlierDetection {
        settings.outlier_detection.get_or_insert_default()
    }
    use proto::load_balancer::HashKey as Key;
    let table: [(&str, Change); 18] = [
        ("load_balancer.algorithm", |s| lb(s).algorithm = 99),
        ("load_balancer.hash_key", |s| lb(s).algorithm = 6),
        ("load_balancer.header", |s| {
            lb(s).hash_key = Some(Key::Header("a b".into()))
        }),
        ("load_balancer.query_parameter", |s| {
            lb(s).hash_key = Some(Key::QueryParameter(String::new()));
        }),
        ("load_balancer.cookie.name", |s| {
            lb(s).hash_key = Some(Key::Cookie(Default::default()));
        }),
        ("load_balancer.cookie.path", |s| {
            lb(s).hash_key = Some(Key::Cookie(proto::HashCookie {
                name: "a".into(),
                path: "/; Domain=evil".into(),
                ttl: None,
            }));
        }),
        ("load_balancer.minimum_ring_size", |s| {
            lb(s).minimum_ring_size = 9_000_000
        }),
        ("load_balancer.warmup", |s| lb(s).warmup = seconds(-1)),
        ("load_balancer.warmup_aggression", |s| {
            lb(s).warmup = seconds(1);
            lb(s).warmup_aggression = f64::NAN;
        }),
        ("load_balancer.panic_threshold_percent", |s| {
            lb(s).panic_threshold_set = true;
            lb(s).panic_threshold_percent = 101;
        }),
        ("load_balancer.distribute[0].to", |s| {
            lb(s).locality_enabled = true;
            lb(s).distribute.push(Default::default());
        }),
        ("connection_pool.connect_timeout", |s| {
            pool(s).connect_timeout = seconds(0)
        }),
        ("connection_pool.h2_upgrade", |s| pool(s).h2_upgrade = 99),
        ("outlier_detection.interval", |s| {
            outlier(s).interval = seconds(0)
        }),
        ("outlier_detection.base_ejection_time", |s| {
            outlier(s).base_ejection_time = seconds(-5);
        }),
        ("outlier_detection.min_health_percent", |s| {
            outlier(s).min_health_percent = 300
        }),
        ("tls.mode", |s| s.tls.get_or_insert_default().mode = 99),
        ("retry_budget.percent", |s| {
            s.retry_budget.get_or_insert_default().percent = f64::INFINITY;
        }),
    ];
    for (field, change) in table {
        let mut settings = proto::TrafficSettings::default();
        change(&mut settings);
        let policy = TrafficPolicy::from_proto(&proto::TrafficPolicy {
            host: "a".into(),
            port_settings: [(80, settings)].into(),
            ..Default::default()
        });
        let expected = format!("port_settings[80].{field}");
        let fields: Vec<_> = policy.problems().iter().map(|p| p.field.as_str()).collect();
        assert!(fields.contains(&expected.as_str()), "{field}: {fields:?}");
        let settings = policy.select(80, None).expect("settings").settings;
        let mut fixture = Fixture::new((*settings).clone(), many(1));
        let error = fixture.pick().expect_err("fails closed");
        assert!(error.to_string().contains(&expected), "{error}");
        // Other ports are none of its business.
        let other = policy.select(81, None).expect("settings").settings;
        assert_eq!(other.invalid, None);
    }
}

#[test]
fn an_invalid_policy_fails_everywhere() {
    let policy = TrafficPolicy::from_proto(&proto::TrafficPolicy {
        host: "a".into(),
        subsets: vec![proto::Subset {
            name: "v1".into(),
            ..Default::default()
        }],
        invalid: "spec.host is missing".into(),
        ..Default::default()
    });
    // The user's fault, not the control plane's.
    assert!(policy.problems().is_empty());
    for subset in [None, Some("v1")] {
        let settings = policy.select(80, subset).expect("settings").settings;
        assert_eq!(settings.invalid.as_deref(), Some("spec.host is missing"));
    }
}

#[test]
fn structure_is_checked() {
    let subset = |name: &str| proto::Subset {
        name: name.into(),
        ..Default::default()
    };
    let policy = TrafficPolicy::from_proto(&proto::TrafficPolicy {
        port_settings: [(70_000, Default::default())].into(),
        subsets: vec![subset(""), subset("v1"), subset("v1")],
        ..Default::default()
    });
    let fields: Vec<_> = policy.problems().iter().map(|p| p.field.as_str()).collect();
    assert_eq!(
        fields,
        ["host", "port_settings[70000]", "subsets[]", "subsets[v1]"]
    );
}
