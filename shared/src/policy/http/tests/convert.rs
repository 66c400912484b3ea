//! What is refused, where, and with what effect; and that no message panics.

use proptest::prelude::*;

use super::support::*;
use crate::policy::http::{HttpPolicy, HttpTarget};
use crate::proto::waypoint as proto;
use crate::proto::waypoint::authorization_policy::Action;

#[test]
fn problems_name_the_field() {
    let source = |source| deny(vec![everything(), from(source)]);
    let operation = |operation| deny(vec![to(operation)]);
    use proto::{Operation, Source};
    let cases = [
        (source(Source::default()), "rules[1].from[0]"),
        (operation(Operation::default()), "rules[0].to[0]"),
        (
            source(Source {
                ip_blocks: list(&["10.0.0.0/8", "10.0.0.0/33"]),
                ..Default::default()
            }),
            "rules[1].from[0].ip_blocks[1]",
        ),
        (
            source(Source {
                not_remote_ip_blocks: list(&["host"]),
                ..Default::default()
            }),
            "rules[1].from[0].not_remote_ip_blocks[0]",
        ),
        (
            source(Source {
                principals: list(&[""]),
                ..Default::default()
            }),
            "rules[1].from[0].principals[0]",
        ),
        (
            source(Source {
                service_accounts: list(&["a/*"]),
                ..Default::default()
            }),
            "rules[1].from[0].service_accounts[0]",
        ),
        (
            operation(Operation {
                ports: vec![80, 70000],
                ..Default::default()
            }),
            "rules[0].to[0].ports[1]",
        ),
        (
            operation(Operation {
                not_ports: vec![0],
                ..Default::default()
            }),
            "rules[0].to[0].not_ports[0]",
        ),
        (
            operation(Operation {
                paths: list(&["/a/{**}/{*}"]),
                ..Default::default()
            }),
            "rules[0].to[0].paths[0]",
        ),
        (
            operation(Operation {
                paths: list(&["/a{*}"]),
                ..Default::default()
            }),
            "rules[0].to[0].paths[0]",
        ),
        (
            operation(Operation {
                not_paths: list(&["/*/{*}"]),
                ..Default::default()
            }),
            "rules[0].to[0].not_paths[0]",
        ),
        (deny(vec![when("source.ip", &[], &[])]), "rules[0].when[0]"),
        (
            deny(vec![when("source.ipp", &["1"], &[])]),
            "rules[0].when[0].key",
        ),
        (
            deny(vec![when("request.headers[]", &["1"], &[])]),
            "rules[0].when[0].key",
        ),
        (
            deny(vec![when("request.headers[a][b]", &["1"], &[])]),
            "rules[0].when[0].key",
        ),
        (
            deny(vec![when("request.headers[:scheme]", &["1"], &[])]),
            "rules[0].when[0].key",
        ),
        (
            deny(vec![when("request.auth.claims", &["1"], &[])]),
            "rules[0].when[0].key",
        ),
        (
            deny(vec![when("request.auth.claims[a][]", &["1"], &[])]),
            "rules[0].when[0].key",
        ),
        (
            deny(vec![when("destination.port", &["8080", "x"], &[])]),
            "rules[0].when[0].values[1]",
        ),
        (
            policy(Action::Custom, vec![principals(&["*"])]),
            "rules[0].from[0]",
        ),
        (
            policy(
                Action::Custom,
                vec![when("request.auth.claims[a]", &["b"], &[])],
            ),
            "rules[0].when[0]",
        ),
        (policy(Action::Custom, vec![]), "rules"),
        (
            proto::AuthorizationPolicy {
                provider: String::new(),
                ..policy(Action::Custom, vec![everything()])
            },
            "provider",
        ),
        (
            proto::AuthorizationPolicy {
                targets: vec![proto::Target::default()],
                ..deny(vec![everything()])
            },
            "targets[0]",
        ),
        (
            proto::AuthorizationPolicy {
                action: 17,
                ..deny(vec![everything()])
            },
            "action",
        ),
        (deny(vec![everything(); 513]), "rules"),
    ];
    for (wire, field) in cases {
        let policy = convert(&wire);
        let fields: Vec<_> = policy.problems().iter().map(|p| p.field.as_str()).collect();
        assert_eq!(fields, [field]);
        assert!(
            policy
                .invalid()
                .is_some_and(|reason| reason.contains(field))
        );
        assert!(!get("/").permitted(&[wire]), "{field}");
    }
}

#[test]
fn a_policy_that_cannot_be_read_denies_its_namespace() {
    for policy in [
        HttpPolicy::unreadable("AuthorizationPolicy/srv/x", "garbage"),
        HttpPolicy::from_resource(
            "AuthorizationPolicy/srv/x",
            &proto::AuthorizationPolicy {
                targets: vec![proto::Target::default()],
                ..named("srv", "x", Action::Allow, vec![everything()])
            },
        ),
    ] {
        assert_eq!(policy.targets(), [HttpTarget::Namespace("srv".into())]);
        assert_eq!(policy.problems().len(), 1);
    }
    // Another name than the object's own: nobody knows which is meant.
    let wire = named("srv", "x", Action::Allow, vec![everything()]);
    let policy = HttpPolicy::from_resource("AuthorizationPolicy/srv/y", &wire);
    assert!(policy.invalid().is_some());
    assert!(HttpPolicy::from_resource("", &wire).invalid().is_some());
    let nameless = proto::AuthorizationPolicy {
        object: None,
        ..wire
    };
    let policy = HttpPolicy::from_resource("AuthorizationPolicy/srv/x", &nameless);
    assert!(policy.invalid().is_some());
}

#[test]
fn valid_fields_have_no_problems() {
    for key in ["source.ip", "remote.ip", "destination.ip"] {
        let policy = convert(&deny(vec![when(
            key,
            &["10.0.0.1", "::1/64"],
            &["::ffff:1.2.3.4"],
        )]));
        assert_eq!(policy.problems(), []);
    }
    for key in [
        "source.namespace",
        "source.trustDomain",
        "source.principal",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "connection.sni",
        "request.headers[X-A]",
        "request.headers[:path]",
        "request.auth.claims[a]",
        "request.auth.claims[https://example.com/groups][b]",
    ] {
        let policy = convert(&deny(vec![when(key, &["a", "b*", "*c", "*"], &["*d*"])]));
        assert_eq!(policy.problems(), [], "{key}");
    }
}

fn word() -> BoxedStrategy<String> {
    prop_oneof![
        any::<String>(),
        "[a-z*/{}\\[\\]:.%;]{0,12}",
        prop::sample::select(
            &[
                "*",
                "**",
                "",
                "/{*}",
                "/{**}",
                "/a/{*}/b/{**}/c",
                "source.ip",
                "10.0.0.0/8",
                "request.headers[",
                "request.headers[x]",
                "request.auth.claims[a][b]",
                "request.auth.claims[][]",
                "ns/sa",
                "::ffff:1.2.3.4/96",
                "::ffff:0:0/95",
                "80",
            ][..]
        )
        .prop_map(str::to_owned),
    ]
    .boxed()
}

fn words() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(word(), 0..3)
}

proptest! {
    #[test]
    fn no_message_panics(
        (a, b, c, d) in (words(), words(), words(), words()),
        (e, f, g, h) in (words(), words(), words(), words()),
        (ports, action, key) in (prop::collection::vec(any::<u32>(), 0..3), any::<i32>(), word()),
        (name, target, host) in (word(), "/[a-z%;./]{0,9}", word()),
    ) {
        let wire = proto::AuthorizationPolicy {
            action: action % 6,
            rules: vec![proto::AuthorizationRule {
                from: vec![proto::Source {
                    principals: a.clone(), not_principals: b.clone(),
                    request_principals: c.clone(), not_request_principals: d.clone(),
                    namespaces: e.clone(), not_namespaces: f.clone(),
                    ip_blocks: g.clone(), not_ip_blocks: h.clone(),
                    remote_ip_blocks: a.clone(), not_remote_ip_blocks: c.clone(),
                    service_accounts: b.clone(), not_service_accounts: d.clone(),
                    trust_domains: e.clone(), not_trust_domains: f.clone(),
                }],
                to: vec![proto::Operation {
                    hosts: g.clone(), not_hosts: h.clone(), ports: ports.clone(), not_ports: ports,
                    methods: a.clone(), not_methods: b.clone(),
                    paths: c.clone(), not_paths: d.clone(),
                }],
                when: vec![proto::Condition { key, values: e, not_values: f }],
            }],
            ..deny(vec![])
        };
        let policy = HttpPolicy::from_resource(&name, &wire);
        let call = get(&target).host(&host).by("A/sa1");
        let mut store = crate::policy::http::HttpPolicies::new();
        let targets = policy.targets().to_vec();
        let broken = policy.invalid().is_some() && !targets.is_empty();
        store.apply([crate::policy::http::HttpUpdate::Upsert(policy)]);
        let set = store.for_service("srv/waypoint", "srv", "web.srv.svc.cluster.local");
        let permitted = call.with(|request| {
            let _ = set.custom(request, &Default::default());
            set.evaluate_deny_allow(request, &Default::default()).verdict.is_permitted()
        });
        prop_assert!(!(broken && permitted == Ok(true)));
    }
}
