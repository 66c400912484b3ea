//! Istio's L7 policy semantics, one line per case. The numbers are those of the table of
//! AuthorizationPolicy cases that Adit is held to; those of L4 are beside the L4 policy,
//! those of token checks (79 to 83, 91 to 96) and of providers (75, 77, 78) beside the code
//! that does them.

use serde_json::json;

use super::support::*;
use crate::policy::http::{HttpAction, PathNormalization};
use crate::policy::{DenyReason, DryRunOutcome, Verdict};
use crate::proto::waypoint as proto;
use crate::proto::waypoint::authorization_policy::Action;

const SA1: &str = "cluster.local/ns/A/sa/sa1";

type Case = (u32, Vec<proto::AuthorizationPolicy>, Call, bool);

fn check(cases: Vec<Case>) {
    for (at, (number, policies, call, permitted)) in cases.into_iter().enumerate() {
        let evaluation = call.evaluate(&policies);
        assert_eq!(
            evaluation.verdict.is_permitted(),
            permitted,
            "line {at}, case {number}: {} {} {:?}: {:?}",
            call.method,
            call.target,
            call.by,
            evaluation.verdict
        );
    }
}

#[test]
fn sources_and_rules_as_at_l4() {
    let sa1 = || vec![allow(vec![principals(&[SA1])])];
    let namespaces = |yes: &[&str], no: &[&str]| {
        from(proto::Source {
            namespaces: list(yes),
            not_namespaces: list(no),
            ..Default::default()
        })
    };
    let accounts = |values: &[&str]| {
        vec![allow(vec![from(proto::Source {
            service_accounts: list(values),
            ..Default::default()
        })])]
    };
    let ips = |yes: &[&str], no: &[&str]| {
        from(proto::Source {
            ip_blocks: list(yes),
            not_ip_blocks: list(no),
            ..Default::default()
        })
    };
    let not_sa1 = || {
        vec![deny(vec![from(proto::Source {
            not_principals: list(&[SA1]),
            ..Default::default()
        })])]
    };
    let ports = |ports: &[u32]| {
        to(proto::Operation {
            ports: ports.to_vec(),
            ..Default::default()
        })
    };
    let both =
        |a: proto::AuthorizationRule, b: proto::AuthorizationRule| proto::AuthorizationRule {
            from: [a.from, b.from].concat(),
            to: [a.to, b.to].concat(),
            when: [a.when, b.when].concat(),
        };
    let port_9090 = Call {
        port: 9090,
        ..get("/").by("A/sa1")
    };
    let from_172 = Call {
        ip: [172, 16, 0, 1].into(),
        ..get("/")
    };
    check(vec![
        (1, vec![], get("/").by("A/sa1"), true),
        (2, vec![allow(vec![])], get("/").by("A/sa1"), false),
        (3, vec![allow(vec![everything()])], get("/"), true),
        (
            4,
            vec![deny(vec![everything()])],
            get("/").by("A/sa1"),
            false,
        ),
        (6, sa1(), get("/").by("A/sa1"), true),
        (7, sa1(), get("/").by("A/sa2"), false),
        (8, sa1(), get("/"), false),
        (
            9,
            vec![allow(vec![principals(&["*"])])],
            get("/").by("A/sa2"),
            true,
        ),
        (10, vec![allow(vec![principals(&["*"])])], get("/"), false),
        (
            11,
            vec![allow(vec![principals(&["*/sa/sa1"])])],
            get("/").by("B/sa1"),
            true,
        ),
        (13, not_sa1(), get("/"), false),
        (14, not_sa1(), get("/").by("A/sa1"), true),
        (
            15,
            vec![allow(vec![namespaces(&["A"], &[])])],
            get("/").by("B/x"),
            false,
        ),
        (
            16,
            vec![allow(vec![namespaces(&["team-*"], &[])])],
            get("/").by("team-x/a"),
            true,
        ),
        (
            16,
            vec![allow(vec![namespaces(&["team-*"], &[])])],
            get("/").by("xteam-x/a"),
            false,
        ),
        (
            17,
            vec![allow(vec![namespaces(&[], &["A"])])],
            get("/").by("A/a"),
            false,
        ),
        (
            18,
            vec![allow(vec![namespaces(&[], &["A"])])],
            get("/"),
            true,
        ),
        (19, accounts(&["A/sa1"]), get("/").by("A/sa1"), true),
        (19, accounts(&["A/sa1"]), get("/").by("B/sa1"), false),
        (20, accounts(&["sa1"]), get("/").by("srv/sa1"), true),
        (20, accounts(&["sa1"]), get("/").by("A/sa1"), false),
        (
            22,
            vec![allow(vec![ips(&["10.0.0.0/8"], &[])])],
            get("/"),
            true,
        ),
        (
            22,
            vec![allow(vec![ips(&["10.0.0.0/8"], &[])])],
            from_172.clone(),
            false,
        ),
        (
            23,
            vec![allow(vec![ips(&["10.1.1.1"], &["10.1.1.0/24"])])],
            get("/"),
            false,
        ),
        (
            27,
            vec![allow(vec![both(principals(&[SA1]), ports(&[80]))])],
            port_9090.clone(),
            false,
        ),
        (
            28,
            vec![allow(vec![principals(&[SA1]), ports(&[80])])],
            port_9090,
            true,
        ),
        (
            29,
            vec![allow(vec![namespaces(&["A"], &[])]), not_sa1().remove(0)],
            get("/").by("A/sa2"),
            false,
        ),
        (
            44,
            vec![deny(vec![when("source.ip", &[], &["10.0.0.0/8"])])],
            from_172,
            false,
        ),
        (
            44,
            vec![deny(vec![when("source.ip", &[], &["10.0.0.0/8"])])],
            get("/"),
            true,
        ),
        (
            45,
            vec![allow(vec![both(
                when("source.namespace", &["A"], &[]),
                when("destination.port", &["8080"], &[]),
            )])],
            get("/").by("A/a"),
            false,
        ),
        (70, sa1(), get("/").by("A/sa1"), true),
        (
            103,
            vec![allow(vec![from(proto::Source {
                trust_domains: list(&["cluster.local"]),
                ..Default::default()
            })])],
            get("/").by("A/sa1"),
            true,
        ),
        (
            103,
            vec![allow(vec![when("source.trustDomain", &["far.td"], &[])])],
            get("/").by("A/sa1"),
            false,
        ),
        (
            103,
            vec![deny(vec![when("source.serviceAccount", &["A/sa1"], &[])])],
            get("/").by("A/sa1"),
            false,
        ),
    ]);
}

#[test]
fn operations() {
    let only_get = || vec![allow(vec![methods(&["GET"])])];
    let allow_paths = |values: &[&str]| vec![allow(vec![paths(values)])];
    let no_admin = || vec![deny(vec![paths(&["/admin"])])];
    let grpc = || {
        vec![allow(vec![to(proto::Operation {
            paths: list(&["/pkg.Svc/Get"]),
            methods: list(&["POST"]),
            ..Default::default()
        })])]
    };
    use PathNormalization::*;
    check(vec![
        (51, only_get(), get("/"), true),
        (51, only_get(), get("/").method("POST"), false),
        (52, allow_paths(&["/api/*"]), get("/api/x"), true),
        (52, allow_paths(&["/api/*"]), get("/apix"), false),
        (53, allow_paths(&["*/info"]), get("/v1/info"), true),
        (53, allow_paths(&["*/info"]), get("/info/x"), false),
        (54, allow_paths(&["/t/{*}/x"]), get("/t/1/x"), true),
        (54, allow_paths(&["/t/{*}/x"]), get("/t/1/2/x"), false),
        (54, allow_paths(&["/t/{*}/x"]), get("/t//x"), false),
        (55, allow_paths(&["/t/{**}"]), get("/t/1/2/x"), true),
        (55, allow_paths(&["/t/{**}"]), get("/t"), false),
        // From Istio's reference of Operation.paths.
        (55, allow_paths(&["/foo/{**}/"]), get("/foo/bar/"), true),
        (55, allow_paths(&["/foo/{**}/"]), get("/foo/bar"), false),
        (
            55,
            allow_paths(&["/foo/{*}/bar/{**}"]),
            get("/foo/buzz/bar/baz"),
            true,
        ),
        (
            55,
            allow_paths(&["/foo/{*}/bar/{**}"]),
            get("/foo/buzz/bar/"),
            true,
        ),
        (56, no_admin(), get("/x/../admin"), false),
        (56, no_admin(), get("//admin").mode(MergeSlashes), false),
        (56, no_admin(), get("/x/../admin").mode(None), true),
        (56, no_admin(), get("//admin").mode(None), true),
        (57, no_admin(), get("/admin?x=1"), false),
        (57, no_admin(), get("/public?/admin"), true),
        (
            58,
            vec![allow(vec![hosts(&["Web.srv.*"])])],
            get("/").host("web.srv.svc"),
            true,
        ),
        (
            58,
            vec![allow(vec![hosts(&["Web.srv.*"])])],
            get("/").host("WEB.SRV.svc"),
            true,
        ),
        (
            59,
            vec![deny(vec![to(proto::Operation {
                not_hosts: list(&["web.example"]),
                ..Default::default()
            })])],
            get("/").host("other"),
            false,
        ),
        (
            59,
            vec![deny(vec![to(proto::Operation {
                not_hosts: list(&["web.example"]),
                ..Default::default()
            })])],
            get("/").host("web.example"),
            true,
        ),
        (99, grpc(), get("/pkg.Svc/Get").method("POST"), true),
        (99, grpc(), get("/pkg.Svc/Put").method("POST"), false),
        // Stricter than Istio, which compares the text: a name is meant at any port.
        (
            100,
            vec![deny(vec![hosts(&["web.srv"])])],
            get("/").host("web.srv"),
            false,
        ),
        (
            100,
            vec![deny(vec![hosts(&["web.srv"])])],
            get("/").host("web.srv:80"),
            false,
        ),
        (
            100,
            vec![deny(vec![hosts(&["web.srv:80"])])],
            get("/").host("web.srv:81"),
            true,
        ),
        // As the data path presents both forms of a WebSocket handshake.
        (
            115,
            only_get(),
            get("/socket").header("upgrade", "websocket"),
            true,
        ),
    ]);
}

#[test]
fn conditions() {
    let team = || {
        vec![allow(vec![when(
            "request.headers[x-team]",
            &["a", "b"],
            &[],
        )])]
    };
    let not_a = || vec![deny(vec![when("request.headers[X-Team]", &[], &["a"])])];
    let id = || vec![allow(vec![when("request.headers[x-id]", &["v*"], &[])])];
    let present = || vec![deny(vec![when("request.headers[x-id]", &["*"], &[])])];
    let sni = || vec![allow(vec![when("connection.sni", &["a.ex"], &[])])];
    let tls = |sni| Call {
        sni: Some(sni),
        ..tcp(443)
    };
    let remote = || {
        vec![allow(vec![from(proto::Source {
            remote_ip_blocks: list(&["203.0.113.0/24"]),
            ..Default::default()
        })])]
    };
    let through_proxy = |line: &str| Call {
        trusted_proxies: 1,
        ..get("/").header("x-forwarded-for", line)
    };
    let authority = || {
        vec![deny(vec![when(
            "request.headers[:authority]",
            &["web.srv"],
            &[],
        )])]
    };
    let path = || vec![deny(vec![when("request.headers[:path]", &["/a?b=1"], &[])])];
    let verb = || vec![allow(vec![when("request.headers[:method]", &["GET"], &[])])];
    check(vec![
        (60, team(), get("/").header("x-team", "b"), true),
        (60, team(), get("/"), false),
        // Each line of a repeated header is compared on its own.
        (
            60,
            team(),
            get("/").header("x-team", "c").header("x-team", "b"),
            true,
        ),
        (60, team(), get("/").header("x-team", "a,b"), false),
        (61, not_a(), get("/"), false),
        (61, not_a(), get("/").header("x-team", "a"), true),
        (62, id(), get("/").header("x-id", "v2"), true),
        (62, id(), get("/").header("x-id", "2v"), false),
        (62, present(), get("/").header("x-id", ""), false),
        (62, present(), get("/"), true),
        (73, remote(), through_proxy("203.0.113.9"), true),
        (
            73,
            remote(),
            through_proxy("203.0.113.9, 198.51.100.1"),
            false,
        ),
        (
            73,
            remote(),
            get("/").header("x-forwarded-for", "203.0.113.9"),
            false,
        ),
        (
            73,
            vec![deny(vec![when("remote.ip", &[], &["203.0.113.0/24"])])],
            through_proxy("198.51.100.1, 203.0.113.9"),
            true,
        ),
        (116, sni(), tls("a.ex"), true),
        (116, sni(), tls("A.EX"), true),
        (116, sni(), tls("b.ex"), false),
        (116, sni(), tcp(443), false),
        (0, authority(), get("/").host("WEB.srv."), false),
        (0, path(), get("/a?b=1"), false),
        (0, path(), get("/a?b=2"), true),
        (0, verb(), get("/"), true),
        (0, verb(), get("/").method("PUT"), false),
    ]);
}

#[test]
fn tokens() {
    let bob = || json!({"iss": "X", "sub": "bob"});
    let required = || {
        vec![deny(vec![from(proto::Source {
            not_request_principals: list(&["*"]),
            ..Default::default()
        })])]
    };
    let principals = |values: &[&str]| {
        vec![allow(vec![from(proto::Source {
            request_principals: list(values),
            ..Default::default()
        })])]
    };
    let claim = |key: &str, values: &[&str]| vec![allow(vec![when(key, values, &[])])];
    let with = |payload| get("/").claims(payload);
    check(vec![
        (84, required(), get("/"), false),
        (84, required(), with(bob()), true),
        // A token without a subject is no request principal.
        (84, required(), with(json!({"iss": "X"})), false),
        (85, principals(&["X/*"]), with(bob()), true),
        (85, principals(&["X/*"]), get("/"), false),
        (86, principals(&["X/bob"]), with(bob()), true),
        (
            86,
            principals(&["https://a/b/bob"]),
            with(json!({"iss": "https://a/b", "sub": "bob"})),
            true,
        ),
        // A subject with a slash is not taken for another issuer's.
        (
            86,
            principals(&["X/y/bob"]),
            with(json!({"iss": "X", "sub": "y/bob"})),
            false,
        ),
        (
            86,
            principals(&["X/y/*"]),
            with(json!({"iss": "X", "sub": "y/bob"})),
            false,
        ),
        (86, principals(&["*/bob"]), with(bob()), true),
        (86, principals(&["*ob"]), with(bob()), true),
        (
            86,
            claim("request.auth.principal", &["X/bob"]),
            with(bob()),
            true,
        ),
        (
            87,
            claim("request.auth.claims[role]", &["admin"]),
            with(json!({"role": ["dev", "admin"]})),
            true,
        ),
        (
            87,
            claim("request.auth.claims[role]", &["admin"]),
            with(json!({"role": ["dev"]})),
            false,
        ),
        (
            87,
            claim("request.auth.claims[role]", &["admin"]),
            with(json!({"role": "admin"})),
            true,
        ),
        (
            88,
            claim("request.auth.claims[a][b]", &["x"]),
            with(json!({"a": {"b": "x"}})),
            true,
        ),
        (
            88,
            claim("request.auth.claims[a][b]", &["x"]),
            with(json!({"a.b": "x"})),
            false,
        ),
        (
            88,
            claim("request.auth.claims[a][b]", &["x"]),
            with(json!({"a": "x"})),
            false,
        ),
        (
            89,
            claim("request.auth.claims[scope]", &["read"]),
            with(json!({"scope": "read write"})),
            true,
        ),
        (
            89,
            claim("request.auth.claims[other]", &["read"]),
            with(json!({"other": "read write"})),
            false,
        ),
        (
            90,
            claim("request.auth.audiences", &["api"]),
            with(json!({"aud": ["api", "b"]})),
            true,
        ),
        (
            90,
            claim("request.auth.audiences", &["api"]),
            with(json!({"aud": "api"})),
            true,
        ),
        (
            90,
            claim("request.auth.audiences", &["api"]),
            with(json!({"aud": ["b"]})),
            false,
        ),
        (
            90,
            claim("request.auth.presenter", &["cli"]),
            with(json!({"azp": "cli"})),
            true,
        ),
        (
            90,
            claim("request.auth.presenter", &["cli"]),
            get("/"),
            false,
        ),
    ]);
}

#[test]
fn connections_that_are_not_http() {
    let ports_and_methods = || {
        vec![deny(vec![to(proto::Operation {
            ports: vec![9000],
            methods: list(&["GET"]),
            ..Default::default()
        })])]
    };
    let either = || {
        vec![allow(vec![proto::AuthorizationRule {
            to: vec![
                proto::Operation {
                    ports: vec![9000],
                    ..Default::default()
                },
                proto::Operation {
                    methods: list(&["GET"]),
                    ..Default::default()
                },
            ],
            ..Default::default()
        }])]
    };
    check(vec![
        (97, vec![allow(vec![methods(&["GET"])])], tcp(9000), false),
        (
            97,
            vec![allow(vec![methods(&["GET"]), principals(&[SA1])])],
            tcp(9000).by("A/sa1"),
            true,
        ),
        // A rule that asks for HTTP anywhere is out as a whole.
        (97, either(), tcp(9000), false),
        (
            97,
            vec![allow(vec![when("request.auth.claims[a]", &[], &["x"])])],
            tcp(9000),
            false,
        ),
        (98, ports_and_methods(), tcp(9000), false),
        (98, ports_and_methods(), tcp(9001), true),
        (
            98,
            vec![deny(vec![when("request.headers[a]", &["b"], &[])])],
            tcp(1),
            false,
        ),
    ]);
}

#[test]
fn targets() {
    let b = || get("/").by("B/b");
    let only_a = |target| {
        vec![proto::AuthorizationPolicy {
            targets: vec![target],
            ..allow(vec![principals(&[SA1])])
        }]
    };
    let root = |targets| {
        vec![proto::AuthorizationPolicy {
            targets,
            ..named("istio-system", "class", Action::Allow, vec![])
        }]
    };
    check(vec![
        (
            63,
            only_a(gateway("srv/waypoint")),
            get("/").by("A/sa1"),
            true,
        ),
        (63, only_a(gateway("srv/waypoint")), b(), false),
        (63, only_a(gateway("srv/other")), b(), true),
        (64, root(vec![]), b(), false),
        (67, only_a(service("other", "web")), b(), true),
        (5, only_a(service("srv", "other")), b(), true),
    ]);
    // 66: selector form, at the waypoint that serves the pods.
    let store = store(&only_a(workload("uid-1")));
    let denied = b().with(|request| {
        let set = store.for_workload("uid-1");
        let evaluation = set.evaluate_deny_allow(request, &Default::default());
        (evaluation.verdict, store.for_workload("uid-2").is_empty())
    });
    assert!(matches!(denied, Ok((Verdict::Denied(_), true))));
    // 114: a waypoint in `infra` for services elsewhere.
    let shared = super::support::store(&only_a(gateway("infra/waypoint")));
    for namespace in ["srv", "app"] {
        let set = shared.for_service("infra/waypoint", namespace, "x");
        let verdict = |call: Call| {
            call.with(|request| {
                set.evaluate_deny_allow(request, &Default::default())
                    .verdict
            })
        };
        assert!(matches!(verdict(b()), Ok(Verdict::Denied(_))));
        assert!(matches!(
            verdict(get("/").by("A/sa1")),
            Ok(Verdict::Permitted(_))
        ));
    }
}

#[test]
fn who_decided_is_said() {
    let policies = vec![
        allow(vec![methods(&["PUT"]), methods(&["GET"])]),
        deny(vec![paths(&["/a"]), paths(&["/admin"])]),
    ];
    match get("/").evaluate(&policies).verdict {
        Verdict::Permitted(permitted) => {
            assert_eq!(permitted.policy().map(|key| &**key), Some("srv/allow"));
            assert_eq!(permitted.rule(), Some(1));
        }
        other => panic!("{other:?}"),
    }
    match get("/admin").evaluate(&policies).verdict {
        Verdict::Denied(denied) => {
            assert_eq!(denied.policy.as_deref(), Some("srv/deny"));
            assert_eq!(denied.reason, DenyReason::Matched(1));
        }
        other => panic!("{other:?}"),
    }
    match get("/").method("HEAD").evaluate(&policies).verdict {
        Verdict::Denied(denied) => assert_eq!(denied.reason, DenyReason::NotAllowed),
        other => panic!("{other:?}"),
    }
}

#[test]
fn custom_audit_and_dry_run() {
    let custom = policy(Action::Custom, vec![paths(&["/admin*"])]);
    let same_provider = named("srv", "custom-2", Action::Custom, vec![everything()]);
    let checks = |call: Call, policies: &[proto::AuthorizationPolicy]| {
        let set = set(policies);
        call.with(|request| {
            let checks = set.custom(request, &Default::default());
            let of = checks
                .iter()
                .map(|c| (c.provider.to_owned(), c.policy.to_string()));
            of.collect::<Vec<_>>()
        })
        .expect("a path")
    };
    // 74
    let ext = |policy: &str| vec![("ext".to_owned(), policy.to_owned())];
    assert_eq!(
        checks(get("/admin/x"), std::slice::from_ref(&custom)),
        ext("srv/custom")
    );
    assert_eq!(checks(get("/pub"), std::slice::from_ref(&custom)), vec![]);
    // A provider is asked once.
    let two = [custom.clone(), same_provider];
    assert_eq!(checks(get("/admin/x"), &two), ext("srv/custom"));
    assert_eq!(checks(get("/pub"), &two), ext("srv/custom-2"));
    // On TCP the path is left out, and the provider asked more often.
    assert_eq!(
        checks(tcp(1), std::slice::from_ref(&custom)),
        ext("srv/custom")
    );
    // 76: what the provider allows is still denied.
    assert!(!get("/admin").permitted(&[custom.clone(), deny(vec![everything()])]));
    // A CUSTOM policy alone decides nothing here.
    assert!(get("/admin").permitted(&[custom]));

    let audit = policy(
        Action::Audit,
        vec![methods(&["PUT"]), methods(&["GET"]), everything()],
    );
    let evaluation = get("/").evaluate(&[audit]);
    assert!(evaluation.verdict.is_permitted());
    assert_eq!(evaluation.audit.len(), 1);
    assert_eq!(evaluation.audit[0].rule, 1);

    let dry = |policy| proto::AuthorizationPolicy {
        dry_run: true,
        ..policy
    };
    // 46
    let evaluation = get("/").evaluate(&[dry(deny(vec![everything()]))]);
    assert!(evaluation.verdict.is_permitted());
    assert_eq!(evaluation.dry_run[0].outcome, DryRunOutcome::WouldDeny);
    let evaluation = get("/").evaluate(&[dry(allow(vec![methods(&["GET"])]))]);
    assert_eq!(evaluation.dry_run[0].outcome, DryRunOutcome::WouldAllow);
    let evaluation = get("/")
        .method("PUT")
        .evaluate(&[dry(allow(vec![methods(&["GET"])]))]);
    assert!(evaluation.verdict.is_permitted());
    assert_eq!(evaluation.dry_run[0].outcome, DryRunOutcome::WouldDeny);
}

#[test]
fn invalid_policies_deny_whatever_they_were_to_do() {
    for action in [Action::Allow, Action::Deny, Action::Audit, Action::Custom] {
        let broken = policy(
            action,
            vec![when("experimental.envoy.filters.a.b[c]", &["d"], &[])],
        );
        let evaluation = get("/").evaluate(std::slice::from_ref(&broken));
        let Verdict::Denied(denied) = evaluation.verdict else {
            panic!("{action:?} permits");
        };
        let DenyReason::Invalid(reason) = denied.reason else {
            panic!("{:?}", denied.reason);
        };
        assert!(reason.contains("rules[0].when[0].key"), "{reason}");
        assert!(reason.contains("srv/"), "{reason}");
        // Beside an ALLOW that matches, too.
        let beside = named("srv", "other", Action::Allow, vec![everything()]);
        assert!(!get("/").permitted(&[broken.clone(), beside]));
        // A dry run only says so.
        let dry = proto::AuthorizationPolicy {
            dry_run: true,
            ..broken
        };
        let evaluation = get("/").evaluate(&[dry]);
        assert!(evaluation.verdict.is_permitted());
        assert_eq!(evaluation.dry_run[0].outcome, DryRunOutcome::WouldDeny);
    }
    let told = proto::AuthorizationPolicy {
        invalid: "file x: line 3".into(),
        ..allow(vec![everything()])
    };
    assert!(!get("/").permitted(std::slice::from_ref(&told)));
    let policy = convert(&told);
    assert_eq!(policy.action(), HttpAction::Allow);
    // Not for the NACK: the control plane said it.
    assert!(policy.problems().is_empty());
}
