//! What is refused, and that what is refused fails closed.

use super::wire::*;
use crate::policy::{Action, Policy, Scope};
use crate::proto::security as proto;

fn bad_match() -> Vec<(&'static str, proto::Match)> {
    use proto::Match;
    let unset = || vec![proto::StringMatch { match_type: None }];
    let address = |bytes: &[u8], length| {
        vec![proto::Address {
            address: bytes.to_vec(),
            length,
        }]
    };
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 0];
    vec![
        (
            "namespaces[0]",
            Match {
                namespaces: unset(),
                ..Default::default()
            },
        ),
        (
            "not_namespaces[0]",
            Match {
                not_namespaces: unset(),
                ..Default::default()
            },
        ),
        (
            "principals[0]",
            Match {
                principals: unset(),
                ..Default::default()
            },
        ),
        (
            "not_principals[1]",
            Match {
                not_principals: vec![pattern("a"), pattern("")],
                ..Default::default()
            },
        ),
        (
            "source_ips[0]",
            Match {
                source_ips: address(&[1, 2, 3], 24),
                ..Default::default()
            },
        ),
        (
            "not_source_ips[0]",
            Match {
                not_source_ips: address(&[1, 2, 3, 4], 33),
                ..Default::default()
            },
        ),
        (
            "destination_ips[0]",
            Match {
                destination_ips: address(&[0; 16], 129),
                ..Default::default()
            },
        ),
        (
            "not_destination_ips[0]",
            Match {
                not_destination_ips: address(&mapped, 95),
                ..Default::default()
            },
        ),
        (
            "destination_ports[1]",
            Match {
                destination_ports: vec![80, 65_536],
                ..Default::default()
            },
        ),
        (
            "not_destination_ports[0]",
            Match {
                not_destination_ports: vec![0],
                ..Default::default()
            },
        ),
        (
            "service_accounts[0]",
            Match {
                service_accounts: vec![account("", "a")],
                ..Default::default()
            },
        ),
        (
            "not_service_accounts[0]",
            Match {
                not_service_accounts: vec![account("a", "")],
                ..Default::default()
            },
        ),
        (
            "trust_domains[0]",
            Match {
                trust_domains: unset(),
                ..Default::default()
            },
        ),
        (
            "not_trust_domains[0]",
            Match {
                not_trust_domains: unset(),
                ..Default::default()
            },
        ),
    ]
}

#[test]
fn errors_name_policy_and_field() {
    for (field, one) in bad_match() {
        let wire = allow([proto::Group::default(), group([ports(&[1]), one])]);
        let error = Policy::try_from(&wire).expect_err(field);
        assert_eq!(error.policy, "srv/allow");
        assert_eq!(
            error.field,
            format!("groups[1].rules[1].matches[0].{field}")
        );
    }
    for (field, wire) in [
        (
            "scope",
            proto::Authorization {
                scope: 9,
                ..allow([])
            },
        ),
        (
            "action",
            proto::Authorization {
                action: 9,
                ..allow([])
            },
        ),
        (
            "name",
            proto::Authorization {
                name: String::new(),
                ..allow([])
            },
        ),
        (
            "namespace",
            proto::Authorization {
                namespace: String::new(),
                ..allow([])
            },
        ),
    ] {
        assert_eq!(Policy::try_from(&wire).expect_err(field).field, field);
    }
}

#[test]
fn an_invalid_policy_fails_closed() {
    for (field, one) in bad_match() {
        let wire = deny([group([one.clone()])]);
        let policy = Policy::from_resource("srv/deny", &wire);
        assert!(policy.invalid.is_some_and(|reason| reason.contains(field)));
        assert_eq!(policy.groups.len(), 1);
        assert!(policy.groups[0].clauses.is_empty(), "it must always match");
        let wire = allow([proto::Group::default(), group([one])]);
        let policy = Policy::from_resource("srv/allow", &wire);
        assert!(policy.invalid.is_some_and(|reason| reason.contains(field)));
        assert!(policy.groups.is_empty(), "it must never match");
    }
}

#[test]
fn what_is_unknown_is_taken_for_the_narrower_choice() {
    let wire = proto::Authorization {
        scope: 9,
        action: 9,
        ..allow([])
    };
    let policy = Policy::from_resource("srv/allow", &wire);
    assert_eq!(
        (policy.scope, policy.action),
        (Scope::Namespace, Action::Deny)
    );
    assert_eq!(policy.groups.len(), 1);
    let policy = Policy::unreadable("srv/torn", "not a protobuf");
    assert_eq!(
        (policy.scope, policy.action),
        (Scope::Namespace, Action::Deny)
    );
    assert_eq!(&*policy.namespace, "srv");
    assert_eq!(policy.groups.len(), 1);
}

#[test]
fn a_policy_under_another_name_is_invalid_under_that_name() {
    let policy = Policy::from_resource("srv/other", &allow([proto::Group::default()]));
    assert_eq!(&*policy.key, "srv/other");
    assert!(policy.invalid.is_some());
    assert!(policy.groups.is_empty());
}

/// The control plane has already made the groups fail closed.
#[test]
fn the_reason_of_the_control_plane_is_kept_with_the_groups() {
    let wire = proto::Authorization {
        invalid_reason: "spec.rules[1]: no".into(),
        ..allow([group([ports(&[80])])])
    };
    let policy = Policy::try_from(&wire).expect("convertible");
    assert_eq!(policy.invalid.as_deref(), Some("spec.rules[1]: no"));
    assert_eq!(policy.groups.len(), 1);
}

#[test]
fn values_are_shown_as_they_are_written() {
    let texts = [
        "a.b/ns/c/sa/d",
        "x/ns/*",
        "x*",
        "*/sa/y",
        "*l/ns/c/sa/d",
        "*",
        "odd",
    ];
    let wire = allow([group([principals(&texts)])]);
    let policy = Policy::try_from(&wire).expect("convertible");
    let mut shown = policy.groups[0].clauses[0].matches[0].principals.values();
    let mut expected = texts.map(str::to_owned).to_vec();
    shown.sort();
    expected.sort();
    assert_eq!(shown, expected);
}
