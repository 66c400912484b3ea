//! PeerAuthentications: Istio's golden cases, by its names, and who wins.

use adit_shared::proto::security::Authorization;

use crate::harness::{Mesh, mesh};

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: ns1, labels: {app: a}}
spec: {nodeName: n1, containers: []}
status: {phase: Running, podIP: 10.0.0.1}
";
const STATIC: &str = "istio-system/istio_converted_static_strict";
const CONVERTED: &str = "ns1/converted_peer_authentication_selector";

fn peer(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

/// Groups as `clause & clause`; `!id` means no identity.
fn render(authorization: &Authorization) -> Vec<String> {
    let group = |group: &adit_shared::proto::security::Group| {
        let clauses = group.rules.iter().map(|rules| {
            let m = &rules.matches[0];
            let mut parts = Vec::new();
            if !m.not_principals.is_empty() {
                parts.push("!id".to_owned());
            }
            parts.extend(
                m.destination_ports
                    .iter()
                    .map(|port| format!("port={port}")),
            );
            parts.extend(
                m.not_destination_ports
                    .iter()
                    .map(|port| format!("port!={port}")),
            );
            parts.join(",")
        });
        clauses.collect::<Vec<_>>().join(" & ")
    };
    authorization.groups.iter().map(group).collect()
}

/// What is listed on the pod, and the groups of the converted policy.
fn outcome(mesh: &Mesh) -> (Vec<String>, Vec<String>) {
    let listed = mesh.workload("ns1/a").authorization_policies.clone();
    let body = mesh.compiled.authorizations.get(CONVERTED).map(render);
    (listed, body.unwrap_or_default())
}

fn golden(root: &str, namespace: &str, selector: &str, listed: &[&str], groups: &[&str]) {
    let mut yaml = POD.to_owned();
    for (at, name, spec) in [("istio-system", "root", root), ("ns1", "ns", namespace)] {
        if !spec.is_empty() {
            yaml += &peer(at, name, spec);
        }
    }
    if !selector.is_empty() {
        let spec = format!("selector: {{matchLabels: {{app: a}}}}, {selector}");
        yaml += &peer("ns1", "selector", &spec);
    }
    let mesh = mesh(&yaml);
    let (found, body) = outcome(&mesh);
    assert_eq!(found, listed);
    assert_eq!(body, groups);
    // What is listed is there, and the static policy whenever there is any object.
    assert!(
        listed
            .iter()
            .all(|name| mesh.compiled.authorizations.contains_key(*name))
    );
    assert_eq!(render(&mesh.compiled.authorizations[STATIC]), ["!id"]);
}

macro_rules! golden {
    ($($name:ident: [$root:expr, $ns:expr, $selector:expr] => $listed:expr, $groups:expr;)*) => {
        $(#[test] fn $name() { golden($root, $ns, $selector, &$listed, &$groups); })*
    };
}

golden! {
    peer_authn_disable: ["", "", "mtls: {mode: DISABLE}"] => [], [];
    peer_authn_disable_port_mtls_strict: ["", "", "mtls: {mode: DISABLE}, portLevelMtls: {9080: {mode: STRICT}}"] => [CONVERTED], ["!id,port=9080"];
    peer_authn_permissive: ["", "", "mtls: {mode: PERMISSIVE}"] => [], [];
    peer_authn_permissive_port_mtls_strict: ["", "", "mtls: {mode: PERMISSIVE}, portLevelMtls: {9080: {mode: STRICT}}"] => [CONVERTED], ["!id,port=9080"];
    peer_authn_permissive_port_mtls_strict_and_permissive: ["", "", "mtls: {mode: PERMISSIVE}, portLevelMtls: {9080: {mode: STRICT}, 9090: {mode: PERMISSIVE}}"] => [CONVERTED], ["!id,port=9080"];
    peer_authn_strict: ["", "mtls: {mode: STRICT}", ""] => [STATIC], [];
    peer_authn_strict_and_permissive_port_mtls: ["", "", "mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: PERMISSIVE}}"] => [CONVERTED], ["!id & port!=9090"];
    peer_authn_strict_and_disable_port_mtls: ["", "", "mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: DISABLE}}"] => [CONVERTED], ["!id & port!=9090"];
    peer_authn_strict_and_strict_port_mtls: ["", "", "mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: STRICT}}"] => [STATIC], [];
    peer_authn_strict_and_strict_and_permissive_port_mtls: ["", "", "mtls: {mode: STRICT}, portLevelMtls: {9080: {mode: STRICT}, 9090: {mode: PERMISSIVE}}"] => [CONVERTED], ["!id & port!=9090"];
    peer_authn_strict_workload: ["", "", "mtls: {mode: STRICT}"] => [STATIC], [];
    peer_authn_unset_port_mtls_strict: ["", "", "portLevelMtls: {9080: {mode: STRICT}}"] => [CONVERTED], ["!id,port=9080"];
    peer_authn_unset_port_mtls_permissive: ["", "", "mtls: {mode: UNSET}, portLevelMtls: {9080: {mode: PERMISSIVE}}"] => [], [];
    peer_authn_permissive_root_permissive_namespace_strict_workload_ports: ["mtls: {mode: PERMISSIVE}", "mtls: {mode: PERMISSIVE}", "portLevelMtls: {9080: {mode: STRICT}, 9090: {mode: STRICT}}"] => [CONVERTED], ["!id,port=9080", "!id,port=9090"];
    peer_authn_permissive_root_permissive_workload: ["mtls: {mode: PERMISSIVE}", "", "mtls: {mode: PERMISSIVE}"] => [], [];
    peer_authn_permissive_root_strict_namespace_permissive_workload: ["mtls: {mode: PERMISSIVE}", "mtls: {mode: STRICT}", "mtls: {mode: PERMISSIVE}"] => [], [];
    peer_authn_permissive_root_unset_namespace_mixed_workload_ports: ["mtls: {mode: PERMISSIVE}", "mtls: {mode: UNSET}", "portLevelMtls: {9080: {mode: STRICT}, 9090: {mode: PERMISSIVE}}"] => [CONVERTED], ["!id,port=9080"];
    peer_authn_strict_root_permissive_namespace_strict_workload: ["mtls: {mode: STRICT}", "mtls: {mode: PERMISSIVE}", "mtls: {mode: STRICT}"] => [STATIC], [];
    peer_authn_strict_root_permissive_workload: ["mtls: {mode: STRICT}", "", "mtls: {mode: PERMISSIVE}"] => [], [];
    peer_authn_strict_root_unset_workload_mixed_ports: ["mtls: {mode: STRICT}", "", "portLevelMtls: {9080: {mode: STRICT}, 9090: {mode: PERMISSIVE}}"] => [CONVERTED], ["!id & port!=9090"];
    // Istio looks for PERMISSIVE alone when it inherits; DISABLE means the same.
    peer_authn_strict_root_unset_workload_disabled_port: ["mtls: {mode: STRICT}", "", "portLevelMtls: {9090: {mode: DISABLE}}"] => [CONVERTED], ["!id & port!=9090"];
    // 107: nothing but PERMISSIVE is below STRICT.
    peer_authn_strict_root_disabled_namespace: ["mtls: {mode: STRICT}", "mtls: {mode: DISABLE}", ""] => [], [];
    peer_authn_nothing_set: ["", "mtls: {}", ""] => [], [];
}

#[test]
fn the_oldest_of_a_level_wins() {
    let at = |name: &str, time: &str, spec: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: ns1, creationTimestamp: {time}}}\nspec: {{{spec}}}\n"
        )
    };
    let old = "'2024-01-01T00:00:00Z'";
    let new = "'2025-01-01T00:00:00Z'";
    let strict = "mtls: {mode: STRICT}";
    let permissive = "mtls: {mode: PERMISSIVE}";
    // 108, in both orders of names and of documents.
    for (first, second) in [("a", "b"), ("b", "a")] {
        let yaml = format!(
            "{POD}{}{}",
            at(first, new, strict),
            at(second, old, permissive)
        );
        assert!(outcome(&mesh(&yaml)).0.is_empty());
    }
    // Without a time: the one that stands first, and after all with a time.
    let yaml = format!(
        "{POD}{}{}",
        peer("ns1", "z", permissive),
        peer("ns1", "a", strict)
    );
    assert!(outcome(&mesh(&yaml)).0.is_empty());
    let yaml = format!(
        "{POD}{}{}",
        peer("ns1", "z", permissive),
        at("a", new, strict)
    );
    assert_eq!(outcome(&mesh(&yaml)).0, [STATIC]);
}

#[test]
fn selectors_in_the_root_namespace_are_ignored() {
    let yaml = format!(
        "{POD}{}",
        peer(
            "istio-system",
            "x",
            "selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}"
        )
    );
    assert!(outcome(&mesh(&yaml)).0.is_empty());
}

#[test]
fn what_a_proxy_does_with_it() {
    let strict = mesh(&format!(
        "{POD}{}",
        peer("ns1", "n", "mtls: {mode: STRICT}")
    ));
    assert!(!strict.admits("", "10.9.9.9", "ns1/a", 8080));
    assert!(strict.admits("b/s", "10.9.9.9", "ns1/a", 8080));
    let ports = "selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {9000: {mode: PERMISSIVE}}";
    let excepted = mesh(&format!("{POD}{}", peer("ns1", "selector", ports)));
    assert!(excepted.admits("", "10.9.9.9", "ns1/a", 9000));
    assert!(!excepted.admits("", "10.9.9.9", "ns1/a", 8080));
    let ports = "selector: {matchLabels: {app: a}}, portLevelMtls: {8080: {mode: STRICT}}";
    let required = mesh(&format!("{POD}{}", peer("ns1", "selector", ports)));
    assert!(!required.admits("", "10.9.9.9", "ns1/a", 8080));
    assert!(required.admits("", "10.9.9.9", "ns1/a", 9000));
    let allow_all = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: ns1}\nspec: {rules: [{}]}\n";
    let yaml = format!(
        "{POD}{}{allow_all}",
        peer("ns1", "n", "mtls: {mode: STRICT}")
    );
    assert!(!mesh(&yaml).admits("", "10.9.9.9", "ns1/a", 8080), "110");
}

#[test]
fn an_invalid_one_is_strict() {
    for spec in [
        "mtls: {mode: PERMISIVE}",
        "mtls: {mod: PERMISSIVE}",
        "mtls: []",
        "portLevelMtls: {80: {mode: PERMISSIVE}}",
        "selector: {matchLabels: {app: a}}, portLevelMtls: {99999: {mode: PERMISSIVE}}",
    ] {
        let mesh = mesh(&format!("{POD}{}", peer("ns1", "n", spec)));
        assert_eq!(outcome(&mesh).0, [STATIC], "{spec}");
    }
}

#[test]
fn no_object_no_static_policy() {
    assert!(mesh(POD).compiled.authorizations.is_empty());
}
