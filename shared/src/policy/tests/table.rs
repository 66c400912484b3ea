//! Istio's policy semantics, one line per case. The numbers are those of the table of
//! AuthorizationPolicy cases that Adit is held to; what the control plane makes of a
//! policy (L7 fields, selectors, PeerAuthentication) is written here as it arrives.

use std::net::IpAddr;

use super::wire::*;
use crate::identity::{SpiffeId, TrustDomain};
use crate::model::{Store, Update, Workload};
use crate::policy::{
    Connection, DenyReason, DryRun, DryRunOutcome, Evaluation, Policy, TrustDomains, Verdict,
};
use crate::proto::security as proto;
use crate::proto::workload as workload_proto;

/// Who calls `srv/web`, from where, at which port of the pod.
#[derive(Clone, Copy)]
struct Call {
    identity: Option<&'static str>,
    from: &'static str,
    port: u16,
}

/// A call over mTLS by `namespace/account` of `cluster.local`.
fn by(account: &'static str) -> Call {
    Call {
        identity: Some(account),
        ..plaintext()
    }
}

fn plaintext() -> Call {
    Call {
        identity: None,
        from: "10.1.1.1",
        port: 8080,
    }
}

impl Call {
    fn port(self, port: u16) -> Self {
        Self { port, ..self }
    }

    fn from(self, from: &'static str) -> Self {
        Self { from, ..self }
    }
}

/// The workload `srv/web`, or another, with the policies that it lists.
fn workload(namespace: &str, listed: &[&str]) -> Workload {
    let wire = workload_proto::Workload {
        uid: format!("Kubernetes//Pod/{namespace}/web"),
        name: "web".into(),
        namespace: namespace.into(),
        authorization_policies: listed.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    Workload::try_from(&wire).expect("a workload")
}

fn evaluate(
    policies: &[proto::Authorization],
    workload: &Workload,
    call: Call,
    trust: &TrustDomains,
) -> Evaluation {
    let mut store = Store::new();
    store.apply(policies.iter().map(|wire| {
        let name = format!("{}/{}", wire.namespace, wire.name);
        Update::UpsertPolicy(Policy::from_resource(&name, wire))
    }));
    let identity: Option<SpiffeId> =
        call.identity
            .map(|text| match text.split('/').collect::<Vec<_>>()[..] {
                [namespace, account] => {
                    SpiffeId::new(TrustDomain::default(), namespace, account).expect("an id")
                }
                _ => text.parse().expect("an id"),
            });
    let connection = Connection {
        source_identity: identity.as_ref(),
        source_ip: call.from.parse().expect("an address"),
        destination_ip: IpAddr::from([10, 2, 2, 2]),
        destination_port: call.port,
        origin: None,
    };
    store
        .snapshot()
        .policies_for(workload)
        .evaluate(&connection, trust)
}

fn scoped(
    scope: proto::Scope,
    namespace: &str,
    policy: proto::Authorization,
) -> proto::Authorization {
    proto::Authorization {
        scope: scope.into(),
        namespace: namespace.into(),
        ..policy
    }
}

fn global(policy: proto::Authorization) -> proto::Authorization {
    scoped(proto::Scope::Global, "istio-system", policy)
}

fn selector(policy: proto::Authorization) -> proto::Authorization {
    scoped(proto::Scope::WorkloadSelector, "srv", policy)
}

const SA1: &str = "cluster.local/ns/A/sa/sa1";

/// PeerAuthentication STRICT as the control plane sends it.
fn strict(exceptions: &[u32]) -> proto::Authorization {
    let mut matches = vec![not_principals(&["*"])];
    if !exceptions.is_empty() {
        matches.push(proto::Match {
            not_destination_ports: exceptions.to_vec(),
            ..Default::default()
        });
    }
    policy("strict", proto::Action::Deny, [group(matches)])
}

#[test]
fn policies_of_the_namespace() {
    use proto::Match;
    let empty = || proto::Group::default();
    let never = Match::default;
    let any = || vec![allow([empty()])];
    let sa1 = || vec![allow([group([principals(&[SA1])])])];
    let ips = |yes: &[&str], no: &[&str]| Match {
        source_ips: blocks(yes),
        not_source_ips: blocks(no),
        ..Default::default()
    };
    let accounts = |namespace, account_| Match {
        service_accounts: vec![account(namespace, account_)],
        ..Default::default()
    };
    let not_a = || Match {
        not_namespaces: patterns(&["A"]),
        ..Default::default()
    };
    let in_a = || namespaces(&["A"]);
    let trust_domains = |texts| Match {
        trust_domains: patterns(texts),
        ..Default::default()
    };
    let ports_not = |yes: &[u32], no: &[u32]| Match {
        destination_ports: yes.to_vec(),
        not_destination_ports: no.to_vec(),
        ..Default::default()
    };
    let (served, refused) = (true, false);
    let cases: Vec<(u32, Vec<proto::Authorization>, Call, bool)> = vec![
        (1, vec![], by("A/sa1"), served),
        (2, vec![allow([])], by("A/sa1"), refused),
        (3, any(), plaintext(), served),
        (6, sa1(), by("A/sa1"), served),
        (7, sa1(), by("A/sa2"), refused),
        (8, sa1(), plaintext(), refused),
        (
            9,
            vec![allow([group([principals(&["*"])])])],
            by("A/sa2"),
            served,
        ),
        (
            10,
            vec![allow([group([principals(&["*"])])])],
            plaintext(),
            refused,
        ),
        (
            11,
            vec![allow([group([principals(&["*/sa/sa1"])])])],
            by("B/sa1"),
            served,
        ),
        (
            11,
            vec![allow([group([principals(&["*/sa/sa1"])])])],
            by("B/xsa1"),
            refused,
        ),
        (
            12,
            vec![allow([group([principals(&["cluster.local/ns/A/*"])])])],
            by("A/any"),
            served,
        ),
        (
            12,
            vec![allow([group([principals(&["cluster.local/ns/A/*"])])])],
            by("B/any"),
            refused,
        ),
        (
            12,
            vec![allow([group([principals(&["cluster.local/ns/A/*"])])])],
            by("AA/any"),
            refused,
        ),
        (
            13,
            vec![deny([group([not_principals(&[SA1])])])],
            plaintext(),
            refused,
        ),
        (
            14,
            vec![deny([group([not_principals(&[SA1])])])],
            by("A/sa1"),
            served,
        ),
        (
            14,
            vec![deny([group([not_principals(&[SA1])])])],
            by("A/sa2"),
            refused,
        ),
        (15, vec![allow([group([in_a()])])], by("A/sa9"), served),
        (15, vec![allow([group([in_a()])])], by("B/sa9"), refused),
        (
            16,
            vec![allow([group([namespaces(&["team-*"])])])],
            by("team-x/s"),
            served,
        ),
        (
            16,
            vec![allow([group([namespaces(&["team-*"])])])],
            by("xteam-x/s"),
            refused,
        ),
        (17, vec![allow([group([not_a()])])], by("A/s"), refused),
        (17, vec![allow([group([not_a()])])], by("B/s"), served),
        (18, vec![allow([group([not_a()])])], plaintext(), served),
        (
            19,
            vec![allow([group([accounts("A", "sa1")])])],
            by("A/sa1"),
            served,
        ),
        (
            19,
            vec![allow([group([accounts("A", "sa1")])])],
            by("B/sa1"),
            refused,
        ),
        (
            19,
            vec![allow([group([accounts("A", "sa1")])])],
            plaintext(),
            refused,
        ),
        (
            20,
            vec![allow([group([accounts("srv", "sa1")])])],
            by("srv/sa1"),
            served,
        ),
        (
            20,
            vec![allow([group([accounts("srv", "sa1")])])],
            by("A/sa1"),
            refused,
        ),
        (
            22,
            vec![allow([group([ips(&["10.0.0.0/8"], &[])])])],
            plaintext(),
            served,
        ),
        (
            22,
            vec![allow([group([ips(&["10.0.0.0/8"], &[])])])],
            plaintext().from("::ffff:10.9.9.9"),
            served,
        ),
        (
            22,
            vec![allow([group([ips(&["10.0.0.0/8"], &[])])])],
            plaintext().from("192.168.1.1"),
            refused,
        ),
        (
            22,
            vec![allow([group([ips(&["::ffff:10.0.0.0/104"], &[])])])],
            plaintext(),
            served,
        ),
        (
            22,
            vec![allow([group([ips(&["fd00::/8", "fd00:1::/32"], &[])])])],
            plaintext().from("fd12::1"),
            served,
        ),
        (
            22,
            vec![allow([group([ips(&["::/0"], &[])])])],
            plaintext(),
            refused,
        ),
        (
            23,
            vec![allow([group([ips(&["10.1.1.1"], &["10.1.1.0/24"])])])],
            plaintext(),
            refused,
        ),
        (
            24,
            vec![allow([group([ports(&[80])])])],
            by("A/sa1"),
            refused,
        ),
        (
            25,
            vec![allow([group([ports(&[8080])])])],
            by("A/sa1"),
            served,
        ),
        (
            26,
            vec![deny([group([ports(&[9090])])])],
            by("A/sa1"),
            served,
        ),
        (
            26,
            vec![deny([group([ports(&[9090])])])],
            by("A/sa1").port(9090),
            refused,
        ),
        (
            27,
            vec![allow([group([in_a(), ports(&[8080])])])],
            by("A/sa1").port(9090),
            refused,
        ),
        (
            27,
            vec![allow([group([in_a(), ports(&[8080])])])],
            by("A/sa1"),
            served,
        ),
        (
            28,
            vec![allow([group([in_a()]), group([ports(&[8080])])])],
            by("A/sa1").port(9090),
            served,
        ),
        (
            28,
            vec![allow([group([in_a()]), group([ports(&[8080])])])],
            by("B/sa1").port(9090),
            refused,
        ),
        (
            29,
            vec![
                allow([group([in_a()])]),
                deny([group([principals(&[SA1])])]),
            ],
            by("A/sa1"),
            refused,
        ),
        (
            29,
            vec![
                allow([group([in_a()])]),
                deny([group([principals(&[SA1])])]),
            ],
            by("A/sa2"),
            served,
        ),
        // A rule with an L7 field does not arrive; an L7-only clause arrives empty.
        (35, vec![allow([])], by("A/sa1"), refused),
        (36, sa1(), by("A/sa1"), served),
        (36, sa1(), by("A/sa2"), refused),
        (37, vec![deny([group([never()])])], by("A/sa1"), served),
        (
            38,
            vec![deny([group([in_a(), never()])])],
            by("A/sa1"),
            served,
        ),
        (
            39,
            vec![deny([group([ports(&[8080])])])],
            by("A/sa1"),
            refused,
        ),
        // AUDIT and CUSTOM do not arrive.
        (40, vec![], by("A/sa1"), served),
        (41, vec![], by("A/sa1"), served),
        (42, vec![allow([group([in_a()])])], by("B/sa1"), refused),
        (
            43,
            vec![allow([group([ports_not(&[8080], &[8081])])])],
            by("A/sa1"),
            served,
        ),
        (
            43,
            vec![allow([group([ports_not(&[], &[8081])])])],
            by("A/sa1").port(8081),
            refused,
        ),
        (
            44,
            vec![deny([group([ips(&[], &["10.0.0.0/8"])])])],
            plaintext().from("172.16.0.1"),
            refused,
        ),
        (
            44,
            vec![deny([group([ips(&[], &["10.0.0.0/8"])])])],
            plaintext(),
            served,
        ),
        (
            45,
            vec![allow([group([in_a(), ports(&[8080])])])],
            by("A/sa1").port(9090),
            refused,
        ),
        (
            48,
            vec![allow([group([accounts("srv", "waypoint")])])],
            by("srv/waypoint"),
            served,
        ),
        (49, sa1(), by("srv/waypoint"), refused),
        (
            50,
            vec![allow([group([accounts("srv", "waypoint")])])],
            by("A/sa1"),
            refused,
        ),
        (
            102,
            vec![allow([group([principals(&["other.td/ns/A/sa/sa1"])])])],
            by("A/sa1"),
            refused,
        ),
        (
            103,
            vec![allow([group([trust_domains(&["cluster.local"])])])],
            by("A/sa1"),
            served,
        ),
        (
            103,
            vec![allow([group([trust_domains(&["cluster.local"])])])],
            plaintext(),
            refused,
        ),
        (
            103,
            vec![allow([group([trust_domains(&["*.local"])])])],
            by("A/sa1"),
            served,
        ),
        (
            103,
            vec![allow([group([trust_domains(&["other.td"])])])],
            by("A/sa1"),
            refused,
        ),
        (104, vec![strict(&[])], plaintext(), refused),
        (104, vec![strict(&[])], by("A/sa1"), served),
        (105, vec![strict(&[9000])], plaintext().port(9000), served),
        (105, vec![strict(&[9000])], plaintext(), refused),
        (
            106,
            vec![deny([group([not_principals(&["*"]), ports(&[8080])])])],
            plaintext(),
            refused,
        ),
        (
            106,
            vec![deny([group([not_principals(&["*"]), ports(&[8080])])])],
            plaintext().port(9000),
            served,
        ),
        (
            110,
            vec![strict(&[]), allow([empty()])],
            plaintext(),
            refused,
        ),
        // Invalid: a DENY denies, an ALLOW allows nothing.
        (
            113,
            vec![deny([group([ports(&[0, 70_000])])])],
            by("A/sa1"),
            refused,
        ),
        (
            113,
            vec![allow([group([ports(&[8080, 70_000])])])],
            by("A/sa1"),
            refused,
        ),
        (
            113,
            vec![
                allow([empty()]),
                policy("other", proto::Action::Allow, [group([ports(&[0])])]),
            ],
            by("A/sa1"),
            served,
        ),
    ];
    for (row, policies, call, expected) in cases {
        let evaluation = evaluate(
            &policies,
            &workload("srv", &[]),
            call,
            &TrustDomains::default(),
        );
        assert_eq!(
            evaluation.verdict.is_permitted(),
            expected,
            "row {row}, {:?} from {} to {}: {:?} under {policies:#?}",
            call.identity,
            call.from,
            call.port,
            evaluation.verdict,
        );
    }
}

#[test]
fn scopes() {
    let all = || proto::Group::default();
    let from = |namespace: &str| group([namespaces(&[namespace])]);
    let listed: &[&str] = &["srv/deny", "srv/allow"];
    let none: &[&str] = &[];
    let in_root: &[&str] = &["istio-system/deny"];
    let root_selector = |policy| scoped(proto::Scope::WorkloadSelector, "istio-system", policy);
    // Row, policies, what the workload lists, its namespace, who calls, served.
    let cases = [
        (
            4,
            vec![selector(deny([all()])), allow([all()])],
            listed,
            "srv",
            "A/sa1",
            false,
        ),
        (5, vec![selector(deny([all()]))], none, "srv", "A/sa1", true),
        (
            30,
            vec![global(allow([])), allow([from("A")])],
            none,
            "srv",
            "A/sa1",
            true,
        ),
        (
            31,
            vec![global(deny([from("B")])), allow([from("B")])],
            none,
            "srv",
            "B/sa1",
            false,
        ),
        (32, vec![allow([])], none, "elsewhere", "A/sa1", true),
        (
            33,
            vec![root_selector(deny([all()]))],
            in_root,
            "anywhere",
            "A/sa1",
            false,
        ),
        (
            33,
            vec![root_selector(deny([all()]))],
            none,
            "anywhere",
            "A/sa1",
            true,
        ),
        (
            34,
            vec![selector(allow([from("A")])), selector(deny([]))],
            listed,
            "srv",
            "A/s",
            true,
        ),
        (
            34,
            vec![selector(allow([from("A")])), selector(deny([]))],
            listed,
            "srv",
            "B/s",
            false,
        ),
    ];
    for (row, policies, listed, namespace, caller, expected) in cases {
        let workload = workload(namespace, listed);
        let evaluation = evaluate(&policies, &workload, by(caller), &TrustDomains::default());
        let served = evaluation.verdict.is_permitted();
        assert_eq!(served, expected, "row {row}: {:?}", evaluation.verdict);
    }
}

#[test]
fn trust_domain_aliases() {
    let domain = |text| TrustDomain::new(text).expect("a trust domain");
    let old = TrustDomains::new(domain("cluster.local"), vec![domain("old.td")]);
    let own = TrustDomains::new(domain("td.one"), vec![domain("old.td")]);
    let cases = [
        (
            101,
            &old,
            "cluster.local/ns/A/sa/sa1",
            "spiffe://old.td/ns/A/sa/sa1",
            true,
        ),
        (
            101,
            &old,
            "old.td/ns/A/sa/sa1",
            "spiffe://cluster.local/ns/A/sa/sa1",
            true,
        ),
        (
            101,
            &own,
            "cluster.local/ns/A/sa/sa1",
            "spiffe://td.one/ns/A/sa/sa1",
            true,
        ),
        (
            101,
            &own,
            "cluster.local/ns/A/sa/sa1",
            "spiffe://old.td/ns/A/sa/sa1",
            true,
        ),
        (
            101,
            &own,
            "cluster.local/ns/A/*",
            "spiffe://old.td/ns/A/sa/sa1",
            true,
        ),
        (
            101,
            &own,
            "*.one/ns/A/sa/sa1",
            "spiffe://old.td/ns/A/sa/sa1",
            true,
        ),
        (
            101,
            &own,
            "*cal/ns/A/sa/sa1",
            "spiffe://td.one/ns/A/sa/sa1",
            false,
        ),
        // `cluster.local` means the mesh's own domain, not one that has that name.
        (
            101,
            &own,
            "cluster.local/ns/A/sa/sa1",
            "spiffe://cluster.local/ns/A/sa/sa1",
            false,
        ),
        (
            102,
            &old,
            "other.td/ns/A/sa/sa1",
            "spiffe://cluster.local/ns/A/sa/sa1",
            false,
        ),
        (
            102,
            &old,
            "other.td/ns/A/sa/sa1",
            "spiffe://other.td/ns/A/sa/sa1",
            true,
        ),
    ];
    for (row, trust, principal, identity, expected) in cases {
        let policies = [allow([group([principals(&[principal])])])];
        let call = by(identity);
        let evaluation = evaluate(&policies, &workload("srv", &[]), call, trust);
        let served = evaluation.verdict.is_permitted();
        assert_eq!(served, expected, "row {row}: {principal} for {identity}");
        let policies = [allow([group([proto::Match {
            trust_domains: patterns(&[principal.split('/').next().expect("a part")]),
            ..Default::default()
        }])])];
        if !principal.starts_with('*') {
            let evaluation = evaluate(&policies, &workload("srv", &[]), call, trust);
            let served = evaluation.verdict.is_permitted();
            assert_eq!(
                served, expected,
                "row {row}: domain of {principal} for {identity}"
            );
        }
    }
}

/// Row 46, and what stands beside it.
#[test]
fn dry_run_is_reported_and_not_enforced() {
    let dry = |policy| proto::Authorization {
        dry_run: true,
        ..policy
    };
    let from = |namespace: &str| group([namespaces(&[namespace])]);
    let outcome = |policy: &str, outcome| DryRun {
        policy: policy.into(),
        outcome,
    };
    let would_deny = |policy| vec![outcome(policy, DryRunOutcome::WouldDeny)];
    let would_allow = |policy| vec![outcome(policy, DryRunOutcome::WouldAllow)];
    let cases = [
        (
            vec![dry(deny([from("A")]))],
            "A/s",
            true,
            would_deny("srv/deny"),
        ),
        (vec![dry(deny([from("A")]))], "B/s", true, vec![]),
        (
            vec![dry(allow([from("A")]))],
            "A/s",
            true,
            would_allow("srv/allow"),
        ),
        (
            vec![dry(allow([from("A")]))],
            "B/s",
            true,
            would_deny("srv/allow"),
        ),
        (
            vec![
                dry(allow([from("A")])),
                policy("real", proto::Action::Allow, [from("B")]),
            ],
            "B/s",
            true,
            vec![],
        ),
        (
            vec![
                dry(allow([from("A")])),
                policy("real", proto::Action::Allow, [from("B")]),
            ],
            "A/s",
            false,
            would_allow("srv/allow"),
        ),
    ];
    for (policies, caller, served, dry_run) in cases {
        let workload = workload("srv", &[]);
        let evaluation = evaluate(&policies, &workload, by(caller), &TrustDomains::default());
        assert_eq!(evaluation.verdict.is_permitted(), served, "{policies:#?}");
        assert_eq!(evaluation.dry_run, dry_run, "{policies:#?}");
    }
}

/// Unknown policy is not absent policy.
#[test]
fn a_listed_policy_that_has_not_arrived_denies() {
    let workload = workload("srv", &["srv/late"]);
    let policies = [allow([proto::Group::default()])];
    let evaluation = evaluate(&policies, &workload, by("A/s"), &TrustDomains::default());
    let Verdict::Denied(denied) = evaluation.verdict else {
        panic!("it was permitted");
    };
    assert_eq!(denied.policy.as_deref(), Some("srv/late"));
    assert_eq!(denied.reason, DenyReason::Missing);
}

#[test]
fn a_verdict_names_policy_and_rule() {
    let groups = || [group([namespaces(&["B"])]), group([namespaces(&["A"])])];
    let trust = TrustDomains::default();
    let workload = workload("srv", &[]);
    let permitted = evaluate(&[allow(groups())], &workload, by("A/s"), &trust);
    let permitted = permitted.verdict.into_result().expect("permitted");
    assert_eq!(permitted.policy().map(|key| &**key), Some("srv/allow"));
    assert_eq!(permitted.rule(), Some(1));
    let permitted = evaluate(&[], &workload, by("A/s"), &trust);
    let permitted = permitted.verdict.into_result().expect("permitted");
    assert_eq!((permitted.policy(), permitted.rule()), (None, None));
    let denied = evaluate(&[deny(groups())], &workload, by("A/s"), &trust);
    let denied = denied.verdict.into_result().expect_err("denied");
    assert_eq!(denied.policy.as_deref(), Some("srv/deny"));
    assert_eq!(denied.reason, DenyReason::Matched(1));
    let bad = deny([group([ports(&[70_000])])]);
    let denied = evaluate(&[bad], &workload, by("A/s"), &trust);
    let denied = denied.verdict.into_result().expect_err("denied");
    assert_eq!(
        denied.to_string(),
        "policy srv/deny is invalid and fails closed: authorization policy srv/deny: \
         groups[0].rules[0].matches[0].destination_ports[0]: 70000 is not a port: 1 to 65535"
    );
}

/// Row 47: what a proxy compares to know that open connections need a new verdict.
#[test]
fn sets_differ_exactly_when_their_policies_do() {
    let mut store = Store::new();
    let web = workload("srv", &[]);
    let upsert =
        |wire: &proto::Authorization| Update::UpsertPolicy(Policy::from_resource("srv/deny", wire));
    let before = store.snapshot().policies_for(&web);
    store.apply([upsert(&deny([group([namespaces(&["A"])])]))]);
    let after = store.snapshot().policies_for(&web);
    assert_ne!(before, after);
    let unchanged = store.apply([upsert(&deny([group([namespaces(&["A"])])]))]);
    assert!(!unchanged);
    assert_eq!(store.snapshot().policies_for(&web), after);
    assert_eq!(
        store.snapshot().policies_for(&workload("other", &[])),
        before
    );
}
