//! AuthorizationPolicies from YAML to a verdict at the destination's node proxy. Numbers
//! are those of the test table in the Istio reference (5.7).

use adit_controlplane::compile::MeshConfig;

use crate::harness::{Mesh, mesh, mesh_with, read, trust_domain};

const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: srv, labels: {app: web}}
spec: {nodeName: n1, containers: []}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: srv, labels: {app: other}}
spec: {nodeName: n1, containers: []}
status: {phase: Running, podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: far, labels: {app: web}}
spec: {nodeName: n1, containers: []}
status: {phase: Running, podIP: 10.0.0.3}
";

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn with(policies: &[(&str, &str)]) -> Mesh {
    let mut yaml = PODS.to_owned();
    for (index, (namespace, spec)) in policies.iter().enumerate() {
        yaml += &policy(namespace, &format!("p{index}"), spec);
    }
    mesh(&yaml)
}

/// `caller[@ip] pod[:port] expected`; the caller `-` has no identity.
fn check(label: &str, mesh: &Mesh, calls: &[&str]) {
    for call in calls {
        let parts: Vec<&str> = call.split(' ').collect();
        let (caller, ip) = parts[0].split_once('@').unwrap_or((parts[0], "10.1.1.1"));
        let caller = if caller == "-" { "" } else { caller };
        let (to, port) = parts[1].split_once(':').unwrap_or((parts[1], "8080"));
        let expected = parts[2] == "200";
        let admitted = mesh.admits(caller, ip, to, port.parse().unwrap());
        assert_eq!(admitted, expected, "{label}: {call}");
    }
}

#[test]
fn the_l4_rows_of_the_table() {
    let web = "selector: {matchLabels: {app: web}}";
    let deny = |rules: &str| format!("{{action: DENY, rules: {rules}}}");
    let allow = |rules: &str| format!("{{rules: {rules}}}");
    let from = |source: &str| format!("[{{from: [{{source: {source}}}]}}]");
    let a1 = "principals: [cluster.local/ns/A/sa/sa1]";
    type Row = (&'static str, Vec<(&'static str, String)>, Vec<&'static str>);
    let rows: Vec<Row> = vec![
        ("1", vec![], vec!["A/sa1 srv/web 200", "- srv/web 200"]),
        (
            "2",
            vec![("srv", "{}".into())],
            vec!["A/sa1 srv/web DENY", "- srv/web DENY", "A/sa1 far/web 200"],
        ),
        ("3", vec![("srv", allow("[{}]"))], vec!["- srv/web 200"]),
        (
            "4, 5",
            vec![("srv", format!("{{{web}, action: DENY, rules: [{{}}]}}"))],
            vec![
                "A/sa1 srv/web DENY",
                "A/sa1 srv/other 200",
                "A/sa1 far/web 200",
            ],
        ),
        (
            "6-8",
            vec![("srv", allow(&from(&format!("{{{a1}}}"))))],
            vec!["A/sa1 srv/web 200", "A/sa2 srv/web DENY", "- srv/web DENY"],
        ),
        (
            "9, 10",
            vec![("srv", allow(&from("{principals: ['*']}")))],
            vec!["A/sa2 srv/web 200", "- srv/web DENY"],
        ),
        (
            "11",
            vec![("srv", allow(&from("{principals: ['*/sa/sa1']}")))],
            vec!["B/sa1 srv/web 200", "B/sa2 srv/web DENY"],
        ),
        (
            "12",
            vec![(
                "srv",
                allow(&from("{principals: ['cluster.local/ns/A/*']}")),
            )],
            vec!["A/any srv/web 200", "B/any srv/web DENY"],
        ),
        (
            "13, 14",
            vec![(
                "srv",
                deny(&from("{notPrincipals: [cluster.local/ns/A/sa/sa1]}")),
            )],
            vec!["- srv/web DENY", "A/sa1 srv/web 200"],
        ),
        (
            "15",
            vec![("srv", allow(&from("{namespaces: [A]}")))],
            vec!["A/sa9 srv/web 200", "B/sa9 srv/web DENY"],
        ),
        (
            "16",
            vec![("srv", allow(&from("{namespaces: ['team-*']}")))],
            vec!["team-x/s srv/web 200", "xteam-x/s srv/web DENY"],
        ),
        (
            "17, 18",
            vec![("srv", allow(&from("{notNamespaces: [A]}")))],
            vec!["A/s srv/web DENY", "- srv/web 200"],
        ),
        (
            "19",
            vec![("srv", allow(&from("{serviceAccounts: [a/sa1]}")))],
            vec!["a/sa1 srv/web 200", "b/sa1 srv/web DENY"],
        ),
        (
            "20",
            vec![("srv", allow(&from("{serviceAccounts: [sa1]}")))],
            vec!["srv/sa1 srv/web 200", "a/sa1 srv/web DENY"],
        ),
        (
            "22",
            vec![("srv", allow(&from("{ipBlocks: [10.0.0.0/8]}")))],
            vec!["-@10.1.1.1 srv/web 200", "-@192.168.1.1 srv/web DENY"],
        ),
        (
            "23",
            vec![(
                "srv",
                allow(&from("{ipBlocks: [10.1.1.1], notIpBlocks: [10.1.1.0/24]}")),
            )],
            vec!["-@10.1.1.1 srv/web DENY"],
        ),
        (
            "24",
            vec![("srv", allow("[{to: [{operation: {ports: ['80']}}]}]"))],
            vec!["A/s srv/web:8080 DENY"],
        ),
        (
            "25",
            vec![("srv", allow("[{to: [{operation: {ports: ['8080']}}]}]"))],
            vec!["A/s srv/web:8080 200"],
        ),
        (
            "26",
            vec![("srv", deny("[{to: [{operation: {ports: ['9090']}}]}]"))],
            vec!["A/s srv/web:8080 200", "A/s srv/web:9090 DENY"],
        ),
        (
            "27",
            vec![(
                "srv",
                allow(
                    "[{from: [{source: {namespaces: [A]}}], to: [{operation: {ports: ['8080']}}]}]",
                ),
            )],
            vec!["A/s srv/web:9090 DENY", "A/s srv/web:8080 200"],
        ),
        (
            "28",
            vec![(
                "srv",
                allow(
                    "[{from: [{source: {namespaces: [A]}}]}, {to: [{operation: {ports: ['8080']}}]}]",
                ),
            )],
            vec!["A/s srv/web:9090 200"],
        ),
        (
            "29",
            vec![
                ("srv", allow(&from("{namespaces: [A]}"))),
                ("srv", deny(&from(&format!("{{{a1}}}")))),
            ],
            vec!["A/sa1 srv/web DENY", "A/sa2 srv/web 200"],
        ),
        (
            "30",
            vec![
                ("istio-system", "{}".into()),
                ("srv", allow(&from("{namespaces: [A]}"))),
            ],
            vec!["A/s srv/web 200", "A/s far/web DENY"],
        ),
        (
            "31",
            vec![
                ("istio-system", deny(&from("{namespaces: [B]}"))),
                ("srv", allow(&from("{namespaces: [B]}"))),
            ],
            vec!["B/s srv/web DENY"],
        ),
        ("32", vec![("far", "{}".into())], vec!["A/s srv/web 200"]),
        (
            "33",
            vec![("istio-system", format!("{{{web}}}"))],
            vec!["A/s srv/web DENY", "A/s far/web DENY", "A/s srv/other 200"],
        ),
        (
            "34",
            vec![(
                "srv",
                "{selector: {}, rules: [{from: [{source: {namespaces: [A]}}]}]}".into(),
            )],
            vec!["A/s srv/web 200", "B/s srv/other DENY", "B/s far/web 200"],
        ),
        (
            "35",
            vec![("srv", allow("[{to: [{operation: {methods: [GET]}}]}]"))],
            vec!["A/s srv/web DENY"],
        ),
        (
            "36",
            vec![(
                "srv",
                allow(&format!(
                    "[{{to: [{{operation: {{methods: [GET]}}}}]}}, {{from: [{{source: {{{a1}}}}}]}}]"
                )),
            )],
            vec!["A/sa1 srv/web 200", "A/sa2 srv/web DENY"],
        ),
        (
            "37",
            vec![("srv", deny("[{to: [{operation: {methods: [DELETE]}}]}]"))],
            vec!["A/s srv/web 200"],
        ),
        (
            "38",
            vec![(
                "srv",
                deny(
                    "[{from: [{source: {namespaces: [A]}}], to: [{operation: {methods: [DELETE]}}]}]",
                ),
            )],
            vec!["A/s srv/web 200"],
        ),
        (
            "39",
            vec![(
                "srv",
                deny("[{to: [{operation: {ports: ['8080'], methods: [DELETE]}}]}]"),
            )],
            vec!["A/s srv/web:8080 DENY", "A/s srv/web:9090 200"],
        ),
        (
            "40",
            vec![("srv", "{action: AUDIT, rules: [{}]}".into())],
            vec!["A/s srv/web 200"],
        ),
        (
            "41",
            vec![(
                "srv",
                format!("{{{web}, action: CUSTOM, provider: {{name: x}}, rules: [{{}}]}}"),
            )],
            vec!["A/s srv/web 200"],
        ),
        (
            "42",
            vec![(
                "srv",
                allow("[{when: [{key: source.namespace, values: [A]}]}]"),
            )],
            vec!["A/s srv/web 200", "B/s srv/web DENY"],
        ),
        (
            "43",
            vec![(
                "srv",
                allow("[{when: [{key: destination.port, values: ['8080'], notValues: ['8081']}]}]"),
            )],
            vec!["A/s srv/web:8080 200"],
        ),
        (
            "44",
            vec![(
                "srv",
                deny("[{when: [{key: source.ip, notValues: [10.0.0.0/8]}]}]"),
            )],
            vec!["-@172.16.0.1 srv/web DENY", "-@10.1.1.1 srv/web 200"],
        ),
        (
            "45",
            vec![(
                "srv",
                allow(
                    "[{when: [{key: source.namespace, values: [A]}, {key: destination.port, values: ['8080']}]}]",
                ),
            )],
            vec!["A/s srv/web:9090 DENY", "A/s srv/web:8080 200"],
        ),
        (
            "102",
            vec![("srv", allow(&from("{principals: [other.td/ns/A/sa/sa1]}")))],
            vec!["A/sa1 srv/web DENY"],
        ),
        (
            "103",
            vec![("srv", allow(&from("{trustDomains: [cluster.local]}")))],
            vec!["A/sa1 srv/web 200", "- srv/web DENY"],
        ),
        (
            "103, not",
            vec![("srv", deny(&from("{notTrustDomains: [cluster.local]}")))],
            vec!["A/sa1 srv/web 200", "spiffe://x.td/ns/A/sa/s srv/web DENY"],
        ),
        (
            "113",
            vec![(
                "srv",
                deny("[{to: [{operation: {ports: ['0', '70000']}}]}]"),
            )],
            vec!["A/s srv/web DENY"],
        ),
        (
            "when account",
            vec![(
                "srv",
                allow("[{when: [{key: source.serviceAccount, values: [a/s]}]}]"),
            )],
            vec!["a/s srv/web 200", "b/s srv/web DENY"],
        ),
        (
            "when destination.ip",
            vec![(
                "srv",
                deny("[{when: [{key: destination.ip, values: [10.0.0.1]}]}]"),
            )],
            vec!["A/s srv/web DENY"],
        ),
        (
            "principals and blocks",
            vec![(
                "srv",
                allow(&from("{namespaces: [A], ipBlocks: [10.1.1.1]}")),
            )],
            vec![
                "A/s@10.1.1.1 srv/web 200",
                "A/s@10.1.1.2 srv/web DENY",
                "B/s@10.1.1.1 srv/web DENY",
            ],
        ),
        (
            "targetRefs",
            vec![("srv", "{targetRefs: [{kind: Service, name: web}]}".into())],
            vec!["A/s srv/web 200"],
        ),
    ];
    for (label, policies, calls) in rows {
        let policies: Vec<_> = policies
            .iter()
            .map(|(ns, spec)| (*ns, spec.as_str()))
            .collect();
        check(label, &with(&policies), &calls);
    }
}

#[test]
fn conditions_say_what_is_in_force() {
    // Istio ConvertAuthorizationPolicyStatus, and ours for what is invalid.
    for (label, spec, expected) in [
        (
            "target ref",
            "{targetRefs: [{kind: Gateway, group: g, name: w}]}",
            // Said by waypoints' part of the compiler; node proxies do not see it.
            "false TargetNotFound",
        ),
        (
            "fine",
            "{rules: [{from: [{source: {namespaces: [a]}}]}]}",
            "true Accepted",
        ),
        (
            "audit",
            "{action: AUDIT, rules: [{}]}",
            "false UnsupportedValue",
        ),
        (
            "custom",
            "{action: CUSTOM, provider: {name: p}, rules: [{}]}",
            "false UnsupportedValue",
        ),
        (
            "methods",
            "{rules: [{to: [{operation: {methods: [GET]}}]}]}",
            "false UnsupportedValue",
        ),
        (
            "deny L4",
            "{action: DENY, rules: [{to: [{operation: {ports: ['80']}}]}]}",
            "true Accepted",
        ),
        (
            "deny L7",
            "{action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}",
            "false UnsupportedValue",
        ),
        (
            "bad port",
            "{rules: [{to: [{operation: {ports: ['70000']}}]}]}",
            "false Invalid",
        ),
        (
            "bad block",
            "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}",
            "false Invalid",
        ),
    ] {
        assert_eq!(
            with(&[("srv", spec)]).condition("srv/p0"),
            expected,
            "{label}"
        );
    }
    let message = |spec: &str| {
        let mesh = with(&[("srv", spec)]);
        mesh.compiled.statuses.values().next().unwrap().conditions[0]
            .message
            .clone()
    };
    let l7 = message("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}");
    assert!(l7.contains("methods") && l7.contains("no effect"), "{l7}");
    let mixed =
        message("{action: DENY, rules: [{to: [{operation: {ports: ['1'], methods: [GET]}}]}]}");
    assert!(mixed.contains("denies more"), "{mixed}");
    let separate = message("{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}, {}]}");
    assert!(separate.contains("denies more"), "{separate}");
    let blunted = message(
        "{action: DENY, rules: [{from: [{source: {namespaces: [a]}}], to: [{operation: {methods: [GET]}}]}]}",
    );
    assert!(blunted.contains("no effect"), "{blunted}");
}

/// Whatever is invalid is reported with its field, and denies.
#[test]
fn invalid_policies_fail_closed() {
    let many = |n: usize, item: &str| vec![item; n].join(", ");
    let rules = format!("{{rules: [{}]}}", many(513, "{}"));
    let targets = format!("{{targetRefs: [{}]}}", many(17, "{kind: Service, name: a}"));
    let accounts = format!(
        "{{rules: [{{from: [{{source: {{serviceAccounts: [{}]}}}}]}}]}}",
        many(17, "a")
    );
    let rows = [
        ("{action: MAYBE, rules: [{}]}", "spec.action"),
        ("{action: DENY}", "spec.rules"),
        ("{action: 5}", "spec.action"),
        ("{actoin: DENY}", "spec.actoin"),
        ("[]", "spec"),
        ("{rules: [[]]}", "spec.rules[0]"),
        ("{rules: [null]}", "spec.rules[0]"),
        ("{rules: {}}", "spec.rules"),
        ("{rules: [{from: [[]]}]}", "spec.rules[0].from[0]"),
        (
            "{rules: [{to: [{operation: []}]}]}",
            "spec.rules[0].to[0].operation",
        ),
        ("{selector: [], rules: [{}]}", "spec.selector"),
        (rules.as_str(), "spec.rules"),
        (
            "{rules: [{from: [{source: {}}]}]}",
            "spec.rules[0].from[0].source",
        ),
        ("{rules: [{from: [{}]}]}", "spec.rules[0].from[0].source"),
        (
            "{rules: [{to: [{operation: {}}]}]}",
            "spec.rules[0].to[0].operation",
        ),
        (
            "{rules: [{from: [{source: {principal: [a]}}]}]}",
            "spec.rules[0].from[0].source.principal",
        ),
        (
            "{rules: [{from: [{source: {principals: a}}]}]}",
            "spec.rules[0].from[0].source.principals",
        ),
        (
            "{rules: [{from: [{source: {principals: ['a*b']}}]}]}",
            "spec.rules[0].from[0].source.principals[0]",
        ),
        (
            "{rules: [{from: [{source: {principals: ['']}}]}]}",
            "spec.rules[0].from[0].source.principals[0]",
        ),
        (
            "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, x]}}]}]}",
            "spec.rules[0].from[0].source.ipBlocks[1]",
        ),
        (
            "{rules: [{from: [{source: {notRemoteIpBlocks: [x]}}]}]}",
            "spec.rules[0].from[0].source.notRemoteIpBlocks[0]",
        ),
        (
            "{rules: [{from: [{source: {serviceAccounts: ['a/*']}}]}]}",
            "spec.rules[0].from[0].source.serviceAccounts[0]",
        ),
        // 21
        (
            "{rules: [{from: [{source: {serviceAccounts: [a], principals: [b]}}]}]}",
            "spec.rules[0].from[0].source.serviceAccounts",
        ),
        (
            "{rules: [{from: [{source: {notServiceAccounts: [a], namespaces: [b]}}]}]}",
            "spec.rules[0].from[0].source.serviceAccounts",
        ),
        (
            accounts.as_str(),
            "spec.rules[0].from[0].source.serviceAccounts",
        ),
        (
            "{rules: [{to: [{operation: {ports: ['0']}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]",
        ),
        (
            "{rules: [{to: [{operation: {ports: ['+80']}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]",
        ),
        (
            "{rules: [{to: [{operation: {ports: [80]}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]",
        ),
        (
            "{rules: [{to: [{operation: {paths: ['/a/{**}/{*}']}}]}]}",
            "spec.rules[0].to[0].operation.paths[0]",
        ),
        (
            "{rules: [{to: [{operation: {paths: ['/a{*}']}}]}]}",
            "spec.rules[0].to[0].operation.paths[0]",
        ),
        (
            "{rules: [{when: [{key: source.ip}]}]}",
            "spec.rules[0].when[0]",
        ),
        (
            "{rules: [{when: [{key: source.nothing, values: [a]}]}]}",
            "spec.rules[0].when[0].key",
        ),
        (
            "{rules: [{when: [{key: destination.port, values: ['99999']}]}]}",
            "spec.rules[0].when[0].values[0]",
        ),
        (
            "{rules: [{when: [{key: 'request.headers[]', values: [a]}]}]}",
            "spec.rules[0].when[0].key",
        ),
        (
            "{selector: {matchLabels: {app: 'w*'}}}",
            "spec.selector.matchLabels.app",
        ),
        (
            "{selector: {matchLabels: {app: web}}, targetRefs: [{kind: Service, name: web}]}",
            "spec.selector",
        ),
        ("{provider: {name: x}}", "spec.provider"),
    ];
    for (spec, field) in rows {
        let yaml = format!("{PODS}{}", policy("srv", "p", spec));
        let (_, findings) = read(&yaml);
        assert!(
            findings.iter().any(|f| f.field == field),
            "{spec}: {findings:?}"
        );
        let mesh = mesh(&yaml);
        assert_eq!(mesh.condition("srv/p"), "false Invalid", "{spec}");
        let sent = &mesh.compiled.authorizations["srv/p"];
        assert!(
            sent.invalid_reason.contains(field),
            "{spec}: {}",
            sent.invalid_reason
        );
        check(spec, &mesh, &["A/s srv/web DENY", "A/s far/web 200"]);
        // Also where nobody reads `invalid_reason`.
        match sent.action() {
            adit_shared::proto::security::Action::Allow => assert!(sent.groups.is_empty()),
            adit_shared::proto::security::Action::Deny => {
                assert_eq!(sent.groups.len(), 1);
                assert!(sent.groups[0].rules.is_empty());
            }
        }
    }
    // Not for node proxies, valid or not.
    for spec in [
        targets.as_str(),
        "{action: CUSTOM}",
        "{action: CUSTOM, provider: {name: x}, rules: [{from: [{source: {namespaces: [a]}}]}]}",
        "{targetRefs: [{kind: Service}]}",
    ] {
        let yaml = format!("{PODS}{}", policy("srv", "p", spec));
        assert!(!read(&yaml).1.is_empty(), "{spec}");
        check(spec, &mesh(&yaml), &["A/s srv/web 200"]);
    }
    // A selector that can be read still limits an invalid policy.
    let narrow = with(&[(
        "srv",
        "{selector: {matchLabels: {app: web}}, action: DENY, rules: [{to: [{operation: {ports: [x]}}]}]}",
    )]);
    check(
        "narrow",
        &narrow,
        &["A/s srv/web DENY", "A/s srv/other 200"],
    );
}

#[test]
fn policies_of_another_revision_are_ignored() {
    let yaml = |rev: &str| {
        format!(
            "{PODS}---\napiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: srv, labels: {{istio.io/rev: {rev}}}}}\nspec: {{}}\n"
        )
    };
    check("112", &mesh(&yaml("canary")), &["A/s srv/web 200"]);
    check("ours", &mesh(&yaml("default")), &["A/s srv/web DENY"]);
}

#[test]
fn dry_run_enforces_nothing() {
    let yaml = |value: &str| {
        format!(
            "{PODS}---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: srv, annotations: {{istio.io/dry-run: '{value}'}}}}\nspec: {{action: DENY, rules: [{{}}]}}\n"
        )
    };
    let dry = mesh(&yaml("true"));
    assert!(dry.compiled.authorizations["srv/p"].dry_run);
    check("46", &dry, &["A/s srv/web 200"]);
    check("enforced", &mesh(&yaml("false")), &["A/s srv/web DENY"]);
    check("no boolean", &mesh(&yaml("perhaps")), &["A/s srv/web DENY"]);
}

#[test]
fn every_name_of_the_trust_domain_means_the_mesh() {
    let config = MeshConfig {
        trust_domain: trust_domain("new.td"),
        trust_domain_aliases: vec![trust_domain("old.td")],
        ..MeshConfig::default()
    };
    for domain in ["cluster.local", "new.td", "old.td"] {
        for text in [format!("{domain}/ns/A/sa/s"), format!("{domain}/ns/A/*")] {
            let spec = format!("{{rules: [{{from: [{{source: {{principals: ['{text}']}}}}]}}]}}");
            let mesh = mesh_with(
                &format!("{PODS}{}", policy("srv", "p", &spec)),
                config.clone(),
            );
            check(
                "101",
                &mesh,
                &[
                    "spiffe://new.td/ns/A/sa/s srv/web 200",
                    "spiffe://old.td/ns/A/sa/s srv/web 200",
                    "spiffe://x.td/ns/A/sa/s srv/web DENY",
                ],
            );
        }
    }
}
