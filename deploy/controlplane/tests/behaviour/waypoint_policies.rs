//! Policies, telemetry and rules as waypoints get them, and what node proxies do then.

use std::net::IpAddr;

use adit_controlplane::compile::l7::Resource;
use adit_controlplane::model::Kind;
use adit_shared::identity::SpiffeId;
use adit_shared::policy::TrustDomains;
use adit_shared::policy::http::{
    HttpFields, HttpPolicies, HttpPolicy, HttpRequest, HttpUpdate, PathNormalization, normalize,
};
use adit_shared::proto::waypoint as wire;

use crate::harness::{Mesh, mesh};

/// Namespace `a` with the waypoint `w` (or none), a service `s` with the pod `p`, and the
/// pod `q` of no service.
fn shop(bound: bool) -> String {
    let label = if bound {
        "istio.io/use-waypoint: w"
    } else {
        ""
    };
    let ready = "conditions: [{type: Ready, status: 'True'}]";
    let ambient = "istio.io/dataplane-mode: ambient";
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {{{label}}}}}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: w, namespace: a}}\nspec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: w, namespace: a, labels: {{gateway.networking.k8s.io/gateway-name: w, gateway.istio.io/managed: istio.io-mesh-controller}}}}\nspec: {{clusterIP: 10.96.9.1, ports: [{{port: 15008, name: mesh}}]}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: a}}\nspec: {{clusterIP: 10.96.0.1, selector: {{app: s}}, ports: [{{port: 80, name: http}}]}}\n---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: a, labels: {{app: s, version: v1, {ambient}}}}}\nspec: {{containers: []}}\nstatus: {{phase: Running, podIP: 10.0.0.1, {ready}}}\n---\napiVersion: v1\nkind: Pod\nmetadata: {{name: q, namespace: a, labels: {{app: q, {ambient}}}}}\nspec: {{containers: []}}\nstatus: {{phase: Running, podIP: 10.0.0.2, {ready}}}\n"
    )
}

fn object(api: &str, kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    object(
        "security.istio.io/v1",
        "AuthorizationPolicy",
        namespace,
        name,
        spec,
    )
}

fn resources(mesh: &Mesh) -> impl Iterator<Item = &Resource> {
    let all = mesh.compiled.waypoints.iter();
    all.filter(|(key, _)| &*key.waypoint.name == "w")
        .map(|(_, resource)| &**resource)
}

fn policies(mesh: &Mesh) -> HttpPolicies {
    let mut policies = HttpPolicies::new();
    for resource in resources(mesh) {
        if let Resource::AuthorizationPolicy(of) = resource {
            let policy = HttpPolicy::from_resource(&resource.name(), of);
            assert!(policy.problems().is_empty(), "{:?}", policy.problems());
            policies.apply([HttpUpdate::Upsert(policy)]);
        }
    }
    policies
}

/// Whether the waypoint lets `from` (`ns/sa`) send a request to pod `p` by its service.
fn forwards(mesh: &Mesh, from: &str, method: &str, path: &str) -> bool {
    let policies = policies(mesh);
    let (namespace, account) = from.split_once('/').unwrap();
    let id: SpiffeId = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
        .parse()
        .unwrap();
    let path = normalize(path, PathNormalization::Base).unwrap();
    let headers = http::HeaderMap::new();
    let request = HttpRequest {
        source_identity: Some(&id),
        source_ip: IpAddr::from([10, 0, 9, 9]),
        remote_ip: IpAddr::from([10, 0, 9, 9]),
        destination_ip: IpAddr::from([10, 0, 0, 1]),
        destination_port: 80,
        sni: None,
        http: Some(HttpFields {
            method,
            path: &path,
            query: None,
            host: "s",
            headers: &headers,
            claims: None,
        }),
    };
    let trust = TrustDomains::default();
    [
        policies.for_service("a/w", "a", "s.a.svc.cluster.local"),
        policies.for_workload("Kubernetes//Pod/a/p"),
    ]
    .iter()
    .all(|set| {
        set.evaluate_deny_allow(&request, &trust)
            .verdict
            .is_permitted()
    })
}

const ALLOW_C: &str = "{selector: {matchLabels: {app: s}}, rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/c]}}]}]}";

/// mission.md: deny-all plus allow-one-caller works with and without a waypoint.
#[test]
fn deny_all_and_allow_one_caller() {
    let both = policy("a", "nothing", "{}") + &policy("a", "one", ALLOW_C);
    let without = mesh(&(shop(false) + &both));
    assert!(without.admits("a/c", "10.0.9.9", "a/p", 80));
    assert!(!without.admits("a/d", "10.0.9.9", "a/p", 80));
    assert!(!without.admits("a/w", "10.0.9.9", "a/p", 80));
    assert!(resources(&without).all(|of| !matches!(of, Resource::AuthorizationPolicy(_))));

    let with = mesh(&(shop(true) + &both));
    assert!(with.admits("a/w", "10.0.9.9", "a/p", 80), "the waypoint");
    assert!(
        with.admits("a/c", "10.0.9.9", "a/p", 80),
        "past the waypoint"
    );
    assert!(!with.admits("a/d", "10.0.9.9", "a/p", 80));
    assert!(!with.admits("", "10.0.9.9", "a/p", 80), "plaintext");
    assert!(
        !with.admits("a/w", "10.0.9.9", "a/q", 80),
        "a pod that it does not serve"
    );
    assert!(forwards(&with, "a/c", "GET", "/"));
    assert!(!forwards(&with, "a/d", "GET", "/"));

    // Nothing but deny-all: nobody comes through.
    let closed = mesh(&(shop(true) + &policy("a", "nothing", "{}")));
    assert!(!forwards(&closed, "a/c", "GET", "/"));
    assert!(!closed.admits("a/c", "10.0.9.9", "a/p", 80));
}

/// The node proxy judges the caller that a waypoint of the pod names; what L4 does not know is
/// the waypoint's to decide, which has the whole policy.
#[test]
fn behind_a_waypoint_the_caller_is_judged_by_what_l4_knows() {
    let selector = "selector: {matchLabels: {app: s}}";
    for (spec, admitted) in [
        // It denies everybody but c; the waypoint itself is not meant.
        (
            "action: DENY, rules: [{from: [{source: {notPrincipals: [cluster.local/ns/a/sa/c]}}]}]",
            "c w-for-c w",
        ),
        (
            "action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/c]}}]}]",
            "d w-for-d w",
        ),
        (
            "rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/c]}}]}]",
            "c w-for-c w",
        ),
        // Without the fields that L4 does not know the rule would deny everybody.
        (
            "action: DENY, rules: [{to: [{operation: {ports: ['80'], methods: [DELETE]}}]}]",
            "w-for-c w-for-d w",
        ),
        (
            "rules: [{to: [{operation: {methods: [GET]}}]}]",
            "w-for-c w-for-d w",
        ),
        (
            "rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/c]}}], to: [{operation: {methods: [GET]}}]}]",
            "w-for-c w",
        ),
        (
            "rules: [{to: [{operation: {ports: ['81'], methods: [GET]}}]}]",
            "",
        ),
        // Who names the waypoint means what comes through it.
        (
            "rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/w]}}]}]",
            "w-for-c w-for-d w",
        ),
        // But its namespace is not the caller's.
        ("rules: [{from: [{source: {namespaces: [z]}}]}]", "w"),
        ("rules: []", ""),
    ] {
        let mesh = mesh(&(shop(true) + &policy("a", "o", &format!("{{{selector}, {spec}}}"))));
        let callers = ["c", "d", "w-for-c", "w-for-d", "w"];
        let admits = |caller: &&str| {
            let from = format!("a/{}", caller.replace("-for-", " for a/"));
            mesh.admits(&from, "10.0.9.9", "a/p", 80)
        };
        let found: Vec<_> = callers.into_iter().filter(admits).collect();
        assert_eq!(found.join(" "), admitted, "{spec}");
        // Nobody else's word counts.
        let lies = mesh.admits("a/d for a/c", "10.0.9.9", "a/p", 80);
        assert_eq!(lies, found.contains(&"d"), "{spec}");
    }
}

#[test]
fn callers_are_kept_apart_only_where_some_policy_depends_on_them() {
    let about = |objects: &str| {
        let mesh = mesh(&(shop(true) + objects));
        let p = mesh.workload("a/p");
        assert_eq!(p.served_by, ["spiffe://cluster.local/ns/a/sa/w"]);
        assert!(mesh.workload("a/q").served_by.is_empty());
        p.callers_matter
    };
    let get = "[{to: [{operation: {methods: [GET]}}]}]";
    let from = "[{from: [{source: {namespaces: [z]}}]}]";
    let when = "[{when: [{key: source.ip, values: [10.0.0.0/8]}]}]";
    let other = "selector: {matchLabels: {app: q}}";
    for (objects, expected) in [
        (String::new(), false),
        (policy("a", "o", &format!("{{rules: {get}}}")), false),
        (policy("a", "o", &format!("{{rules: {from}}}")), true),
        (policy("a", "o", &format!("{{rules: {when}}}")), true),
        (
            policy("istio-system", "o", &format!("{{rules: {from}}}")),
            true,
        ),
        (
            policy("a", "o", &format!("{{{other}, rules: {from}}}")),
            false,
        ),
        (
            policy(
                "a",
                "o",
                &format!("{{targetRefs: [{{kind: Service, name: s}}], rules: {from}}}"),
            ),
            false,
        ),
    ] {
        assert_eq!(about(&objects), expected, "{objects}");
    }
    let unserved = mesh(&(shop(false) + &policy("a", "o", &format!("{{rules: {from}}}"))));
    let p = unserved.workload("a/p");
    assert!(p.served_by.is_empty() && !p.callers_matter);
}

#[test]
fn a_workload_that_is_marked_takes_only_what_has_passed_its_waypoint() {
    let mark = |value: &str| format!("istio.io/require-waypoint: '{value}', ");
    for (pod, service, namespace, required) in [
        ("", "", "", false),
        ("true", "", "", true),
        ("", "true", "", true),
        ("", "", "true", true),
        ("false", "true", "true", false),
        ("", "false", "true", false),
        ("yes", "", "", false),
    ] {
        let [pod, service, namespace] = [pod, service, namespace].map(|value| match value {
            "" => String::new(),
            value => mark(value),
        });
        let yaml = shop(true)
            .replace(
                "{name: p, namespace: a, labels: {",
                &format!("{{name: p, namespace: a, labels: {{{pod}"),
            )
            .replace(
                "{name: s, namespace: a}",
                &format!("{{name: s, namespace: a, labels: {{{service}}}}}"),
            )
            .replace(
                "{name: a, labels: {",
                &format!("{{name: a, labels: {{{namespace}"),
            );
        let mesh = mesh(&yaml);
        let label = format!("{pod}{service}{namespace}");
        assert_eq!(mesh.workload("a/p").require_waypoint, required, "{label}");
        assert!(mesh.admits("a/w for a/c", "10.0.9.9", "a/p", 80), "{label}");
        assert!(mesh.admits("a/w", "10.0.9.9", "a/p", 80), "{label}");
        for past in ["a/c", "", "a/c for a/w"] {
            let admitted = mesh.admits(past, "10.0.9.9", "a/p", 80);
            assert_eq!(admitted, !required, "{label}: {past}");
        }
    }
}

#[test]
fn a_waypoint_is_not_admitted_where_nothing_is_refused() {
    let open = mesh(
        &(shop(true)
            + &policy(
                "a",
                "d",
                "{action: DENY, rules: [{from: [{source: {namespaces: [z]}}]}]}",
            )
            + &policy(
                "a",
                "t",
                "{targetRefs: [{kind: Service, name: s}], rules: []}",
            )),
    );
    assert!(open.admits("x/y", "10.0.9.9", "a/p", 80));
    let names: Vec<_> = open.compiled.authorizations.keys().collect();
    assert_eq!(names, ["a/d"]);
}

/// Istio's rules for policies without `targetRefs`, and its points of enforcement.
#[test]
fn policies_are_combined_as_node_proxies_do_it() {
    let from = |caller: &str| {
        format!("[{{from: [{{source: {{principals: ['cluster.local/ns/a/sa/{caller}']}}}}]}}]")
    };
    let selector = "selector: {matchLabels: {app: s}}";
    let target = "targetRefs: [{kind: Service, group: '', name: s}]";
    let get = "[{to: [{operation: {methods: [GET]}}]}]";
    for (label, objects, allowed) in [
        ("none", String::new(), "c-get c-post d-get d-post"),
        (
            "root allows nothing, the namespace one",
            policy("istio-system", "n", "{}")
                + &policy("a", "o", &format!("{{rules: {}}}", from("c"))),
            "c-get c-post",
        ),
        (
            "root denies what the namespace allows",
            policy(
                "istio-system",
                "n",
                &format!("{{action: DENY, rules: {}}}", from("c")),
            ) + &policy("a", "o", "{rules: [{}]}"),
            "d-get d-post",
        ),
        (
            "a selector of the root namespace",
            policy(
                "istio-system",
                "n",
                &format!("{{{selector}, rules: {}}}", from("c")),
            ),
            "c-get c-post",
        ),
        (
            "L7 with a selector",
            policy("a", "o", &format!("{{{selector}, rules: {get}}}")),
            "c-get d-get",
        ),
        (
            "L7 DENY with a selector",
            policy(
                "a",
                "o",
                &format!("{{{selector}, action: DENY, rules: {get}}}"),
            ),
            "c-post d-post",
        ),
        (
            "both points have to permit",
            policy("a", "o", &format!("{{{target}, rules: {get}}}"))
                + &policy("a", "p", &format!("{{{selector}, rules: {}}}", from("c"))),
            "c-get",
        ),
        (
            "the waypoint is named, as Istio's users do: its callers are the other point's",
            policy("a", "o", &format!("{{{target}, rules: {}}}", from("d")))
                + &policy("a", "p", &format!("{{{selector}, rules: {}}}", from("w"))),
            "d-get d-post",
        ),
        (
            "class from the root namespace",
            policy(
                "istio-system",
                "o",
                "{targetRefs: [{kind: GatewayClass, group: gateway.networking.k8s.io, name: istio-waypoint}]}",
            ),
            "",
        ),
        (
            "invalid",
            policy(
                "a",
                "o",
                &format!(
                    "{{{selector}, rules: [{{to: [{{operation: {{paths: ['/{{**}}/x/{{*}}']}}}}]}}]}}"
                ),
            ),
            "",
        ),
        (
            "invalid targets are all services",
            policy("a", "o", "{targetRefs: [{kind: 1}], rules: [{}]}"),
            "",
        ),
        (
            "dry run",
            format!(
                "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: o, namespace: a, annotations: {{istio.io/dry-run: 'true'}}}}\nspec: {{{selector}}}\n"
            ),
            "c-get c-post d-get d-post",
        ),
    ] {
        let mesh = mesh(&(shop(true) + &objects));
        let mut found = Vec::new();
        for caller in ["c", "d"] {
            for method in ["GET", "POST"] {
                if forwards(&mesh, &format!("a/{caller}"), method, "/") {
                    found.push(format!("{caller}-{}", method.to_ascii_lowercase()));
                }
            }
        }
        assert_eq!(found.join(" "), allowed, "{label}");
    }
}

fn conditions(mesh: &Mesh, kind: Kind, name: &str) -> String {
    let of = mesh.compiled.statuses.iter();
    let mut found = of.filter(|(object, _)| object.kind == kind && *object.name == *name);
    let status = found.next().map(|(_, status)| status);
    let all = status.into_iter().flat_map(|of| &of.conditions);
    let all = all.map(|of| {
        format!(
            "{}{}:{}",
            if of.status { "" } else { "!" },
            of.kind,
            of.reason
        )
    });
    all.collect::<Vec<_>>().join(" ")
}

#[test]
fn conditions_name_what_targets_lead_to() {
    let gateway = "group: gateway.networking.k8s.io, kind: Gateway";
    let class = "group: gateway.networking.k8s.io, kind: GatewayClass";
    for (bound, namespace, targets, expected) in [
        (true, "a", "{kind: Service, name: s}".to_owned(), "Accepted"),
        (
            true,
            "a",
            "{kind: Service, name: t}".into(),
            "!TargetNotFound",
        ),
        (
            true,
            "b",
            "{kind: Service, name: s}".into(),
            "!TargetNotFound",
        ),
        (
            true,
            "b",
            "{kind: Service, name: s, namespace: a}".into(),
            "!TargetNotFound",
        ),
        (
            false,
            "a",
            "{kind: Service, name: s}".into(),
            "!AncestorNotBound",
        ),
        (
            true,
            "a",
            "{kind: Service, name: s}, {kind: Service, name: t}".into(),
            "PartiallyInvalid",
        ),
        (true, "a", format!("{{{gateway}, name: w}}"), "Accepted"),
        (
            true,
            "a",
            format!("{{{gateway}, name: x}}"),
            "!TargetNotFound",
        ),
        (
            true,
            "istio-system",
            format!("{{{class}, name: istio-waypoint}}"),
            "Accepted",
        ),
        (
            true,
            "istio-system",
            format!("{{{class}, name: other}}"),
            "!TargetNotFound",
        ),
        (
            true,
            "a",
            format!("{{{class}, name: istio-waypoint}}"),
            "!Invalid",
        ),
        (true, "a", "{kind: Pod, name: p}".into(), "!TargetNotFound"),
    ] {
        let spec = format!("{{targetRefs: [{targets}], rules: []}}");
        let mesh = mesh(&(shop(bound) + &policy(namespace, "o", &spec)));
        let expected = match expected.strip_prefix('!') {
            Some(reason) => format!("!WaypointAccepted:{reason}"),
            None => format!("WaypointAccepted:{expected}"),
        };
        let found = conditions(&mesh, Kind::AuthorizationPolicy, "o");
        assert_eq!(found, expected, "{namespace} {targets}");
    }
    let l7 = "{selector: {matchLabels: {app: s}}, rules: [{to: [{operation: {methods: [GET]}}]}]}";
    let found = |bound| {
        let mesh = mesh(&(shop(bound) + &policy("a", "o", l7)));
        conditions(&mesh, Kind::AuthorizationPolicy, "o")
    };
    assert_eq!(found(false), "!ZtunnelAccepted:UnsupportedValue");
    assert_eq!(
        found(true),
        "!ZtunnelAccepted:UnsupportedValue WaypointAccepted:Accepted"
    );
}

fn targets(targets: &[wire::Target]) -> String {
    let all = targets.iter().map(|of| match of.kind.as_ref().unwrap() {
        wire::target::Kind::Service(of) => of.hostname.split('.').next().unwrap().to_owned(),
        wire::target::Kind::Gateway(of) => format!("gateway {of}"),
        wire::target::Kind::Workload(of) => of.replace("Kubernetes//", ""),
    });
    all.collect::<Vec<_>>().join(" ")
}

#[test]
fn request_authentications_go_to_services_where_they_can() {
    let rule = "jwtRules: [{issuer: i, jwksUri: 'https://x/keys', fromHeaders: [{name: x-t, prefix: 'T '}], timeout: 2s}]";
    for (namespace, spec, expected) in [
        ("a", format!("{{{rule}}}"), Some("s w")),
        ("istio-system", format!("{{{rule}}}"), Some("")),
        (
            "a",
            format!("{{selector: {{matchLabels: {{app: s}}}}, {rule}}}"),
            Some("s"),
        ),
        (
            "a",
            format!("{{selector: {{matchLabels: {{version: v1}}}}, {rule}}}"),
            Some("s"),
        ),
        (
            "a",
            format!("{{selector: {{matchLabels: {{app: q}}}}, {rule}}}"),
            None,
        ),
        (
            "a",
            format!("{{targetRefs: [{{kind: Service, name: s}}], {rule}}}"),
            Some("s"),
        ),
        (
            "a",
            "{jwtRules: [{issuer: '', jwksUri: nope}]}".into(),
            Some("s w"),
        ),
    ] {
        let yaml = object(
            "security.istio.io/v1",
            "RequestAuthentication",
            namespace,
            "r",
            &spec,
        );
        let mesh = mesh(&(shop(true) + &yaml));
        let found = resources(&mesh).find_map(|of| match of {
            Resource::RequestAuthentication(of) => Some(of),
            _ => None,
        });
        // The waypoint's own service is bound to nothing.
        let expected = expected.map(|of| of.replace(" w", ""));
        assert_eq!(found.map(|of| targets(&of.targets)), expected, "{spec}");
        if let Some(found) = found {
            let invalid = spec.contains("nope");
            // Those of an invalid one, too: for the headers that they write.
            assert_eq!(found.rules.len(), 1, "{spec}");
            assert_eq!(!found.invalid.is_empty(), invalid, "{spec}");
            if let ([rule], false) = (&found.rules[..], invalid) {
                assert_eq!(rule.from_headers[0].prefix, "T ");
                assert_eq!(rule.timeout.unwrap().seconds, 2);
            }
        }
    }
}

#[test]
fn telemetry_has_a_scope() {
    use wire::telemetry::Scope;
    let said = "tracing: [{randomSamplingPercentage: 50, customTags: {t: {literal: {value: v}}}}], metrics: [{overrides: [{match: {metric: REQUEST_COUNT}, tagOverrides: {x: {operation: REMOVE}}}]}], accessLogging: [{filter: {expression: 'response.code >= 400'}}, {match: {mode: CLIENT}}]";
    for (namespace, spec, scope, expected) in [
        ("istio-system", format!("{{{said}}}"), Scope::Root, ""),
        ("a", format!("{{{said}}}"), Scope::Namespace, ""),
        (
            "a",
            format!("{{targetRefs: [{{kind: Service, name: s}}], {said}}}"),
            Scope::Target,
            "s",
        ),
        (
            "a",
            format!("{{selector: {{matchLabels: {{app: s}}}}, {said}}}"),
            Scope::Target,
            "s",
        ),
    ] {
        let yaml = object("telemetry.istio.io/v1", "Telemetry", namespace, "t", &spec);
        let mesh = mesh(&(shop(true) + &yaml));
        let found = resources(&mesh).find_map(|of| match of {
            Resource::Telemetry(of) => Some(of),
            _ => None,
        });
        let found = found.unwrap_or_else(|| panic!("{spec}"));
        assert_eq!(found.invalid, "");
        assert_eq!(found.scope(), scope);
        assert_eq!(targets(&found.targets), expected, "{spec}");
        assert_eq!(found.access_logging.len(), 1, "CLIENT is not a waypoint's");
        assert!(found.tracing[0].random_sampling_percentage_set);
        assert!(found.metrics[0].overrides[0].tags["x"].remove);
    }
}

fn rule(namespace: &str, name: &str, spec: &str) -> String {
    object(
        "networking.istio.io/v1",
        "DestinationRule",
        namespace,
        name,
        spec,
    )
}

fn traffic(objects: &str) -> Option<wire::TrafficPolicy> {
    let mesh = mesh(&(shop(true) + objects));
    resources(&mesh).find_map(|of| match of {
        Resource::TrafficPolicy(of) => Some((**of).clone()),
        _ => None,
    })
}

#[test]
fn everything_that_a_destination_rule_can_say() {
    let found = traffic(&rule(
        "a",
        "r",
        "{host: s, trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: c, ttl: 0s}, maglev: {}}}, connectionPool: {tcp: {maxConnections: 5, connectTimeout: 30ms}, http: {http1MaxPendingRequests: 7, h2UpgradePolicy: UPGRADE}}, outlierDetection: {consecutive5xxErrors: 0, interval: 1m, maxEjectionPercent: 50}, retryBudget: {percent: 10}, portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: ROUND_ROBIN}}]}, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}, trafficPolicy: {tls: {mode: SIMPLE, sni: x}}}]}",
    ))
    .unwrap();
    assert_eq!(found.invalid, "");
    assert_eq!(found.host, "s.a.svc.cluster.local");
    let settings = found.settings.unwrap();
    let pool = settings.connection_pool.unwrap();
    assert_eq!((pool.max_connections, pool.max_pending_requests), (5, 7));
    assert_eq!(pool.connect_timeout.unwrap().nanos, 30_000_000);
    let outlier = settings.outlier_detection.unwrap();
    assert!(outlier.consecutive_5xx_set && outlier.consecutive_5xx == 0);
    assert_eq!(settings.retry_budget.unwrap().percent, 10.0);
    use wire::load_balancer::Algorithm;
    assert_eq!(
        settings.load_balancer.unwrap().algorithm(),
        Algorithm::Maglev
    );
    let port = found.port_settings[&80].load_balancer.clone().unwrap();
    assert_eq!(port.algorithm(), Algorithm::RoundRobin);
    assert_eq!(found.subsets[0].workloads, ["Kubernetes//Pod/a/p"]);
    assert!(found.subsets[1].workloads.is_empty());
    let tls = found.subsets[1].settings.clone().unwrap().tls.unwrap();
    assert!(tls.system_roots && tls.sni == "x");
}

/// The client's namespace, which at a waypoint is the waypoint's, then the service's, then
/// the root namespace; the closest host; the oldest.
#[test]
fn which_destination_rule_is_in_force() {
    let s = "{host: s.a.svc.cluster.local}";
    for (objects, expected) in [
        (rule("a", "r", "{host: s}"), "a/r"),
        (rule("a", "r", "{host: other}"), "-"),
        (rule("b", "r", s), "-"),
        (rule("istio-system", "r", s), "istio-system/r"),
        (
            rule("istio-system", "r", s) + &rule("a", "q", "{host: '*.svc.cluster.local'}"),
            "a/q",
        ),
        (
            rule("a", "wide", "{host: '*.cluster.local'}")
                + &rule("a", "close", "{host: '*.a.svc.cluster.local'}"),
            "a/close",
        ),
        (
            rule("a", "wide", "{host: '*.cluster.local'}") + &rule("a", "exact", "{host: s}"),
            "a/exact",
        ),
        (
            rule(
                "istio-system",
                "r",
                "{host: s.a.svc.cluster.local, exportTo: ['.']}",
            ),
            "-",
        ),
        (
            rule(
                "istio-system",
                "r",
                "{host: s.a.svc.cluster.local, exportTo: [a]}",
            ),
            "istio-system/r",
        ),
        (
            rule(
                "a",
                "r",
                "{host: s, workloadSelector: {matchLabels: {app: c}}}",
            ),
            "-",
        ),
    ] {
        let found = traffic(&objects).and_then(|of| of.object);
        let found = found.map_or("-".into(), |of| format!("{}/{}", of.namespace, of.name));
        assert_eq!(found, expected, "{objects}");
    }
    let merged = traffic(
        &(rule(
            "a",
            "r1",
            "{host: s, subsets: [{name: v1, labels: {version: v1}}]}",
        ) + &rule(
            "a",
            "r2",
            "{host: s.a.svc.cluster.local, subsets: [{name: v2, labels: {}}]}",
        )),
    );
    let subsets = merged.unwrap().subsets;
    assert_eq!(
        subsets.iter().map(|of| &*of.name).collect::<Vec<_>>(),
        ["v1", "v2"]
    );
}

#[test]
fn what_a_destination_rule_gets_wrong_fails() {
    for spec in [
        "{host: s, trafficPolicy: {loadBalancer: {simple: FASTEST}}}",
        "{host: s, trafficPolicy: {tls: {mode: SIMPLE, caCertificates: /etc/ca.pem}}}",
        "{host: s, trafficPolicy: {tls: {mode: MUTUAL}}}",
        "{host: s, trafficPolicy: {unknown: 1}}",
        "{host: s, trafficPolicy: {connectionPool: {tcp: {connectTimeout: soon}}}}",
        "{host: s, subsets: [{name: v1}, {name: v1}]}",
    ] {
        let found = traffic(&rule("a", "r", spec)).unwrap();
        assert_ne!(found.invalid, "", "{spec}");
    }
    let missing = "{host: s, trafficPolicy: {tls: {mode: SIMPLE, credentialName: none}}}";
    let found = traffic(&rule("a", "r", missing)).unwrap();
    assert_eq!(found.invalid, "");
    let tls = found.settings.unwrap().tls.unwrap();
    assert_eq!(tls.invalid, "there is no Secret \"none\"");
}

/// A Secret with certificates, a rule that names it, in `namespace`.
fn mutual(namespace: &str, keys: &str) -> String {
    let secret = format!(
        "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: client, namespace: {namespace}}}\nstringData: {{{keys}}}\n"
    );
    let spec = "{host: s.a.svc.cluster.local, trafficPolicy: {tls: {mode: MUTUAL, credentialName: client, sni: x}}}";
    secret + &rule(namespace, "r", spec)
}

/// The certificate of a client goes to waypoints that a rule of their own namespace leads to
/// it, in a resource of its own, and is shown by nothing.
#[test]
fn a_client_certificate_goes_to_the_waypoint_that_needs_it() {
    let ca = rcgen::generate_simple_self_signed(vec!["x".to_owned()]).unwrap();
    let ca = ca.cert.pem().replace('\n', "\\n");
    let all = format!("ca.crt: \"{ca}\", tls.crt: CHAIN, tls.key: PRIVATE");
    let istio = format!("cacert: \"{ca}\", cert: CHAIN, key: PRIVATE");
    let without = format!("ca.crt: \"{ca}\", tls.crt: CHAIN");
    for (objects, expected) in [
        (mutual("a", &all), Ok("a/client")),
        (mutual("a", &istio), Ok("a/client")),
        (
            mutual("a", &without),
            Err("Secret \"client\" has no tls.crt with a tls.key"),
        ),
        // Whoever runs the waypoint would have the key.
        (
            mutual("istio-system", &all),
            Err("Secret \"client\" is not of the waypoint's namespace"),
        ),
    ] {
        let mesh = mesh(&(shop(true) + &objects));
        let policy = resources(&mesh).find_map(|of| match of {
            Resource::TrafficPolicy(of) => Some(of),
            _ => None,
        });
        let tls = policy.unwrap().settings.clone().unwrap().tls.unwrap();
        let secrets: Vec<_> = resources(&mesh)
            .filter_map(|of| match of {
                Resource::Secret(of) => Some(of),
                _ => None,
            })
            .collect();
        match expected {
            Ok(name) => {
                assert_eq!((&*tls.invalid, &*tls.client_secret), ("", name));
                let [secret] = secrets[..] else {
                    panic!("{secrets:?}");
                };
                assert_eq!(secret.name, name);
                assert_eq!(secret.certificate_chain, "CHAIN");
                assert_eq!(secret.private_key, "PRIVATE");
            }
            Err(why) => {
                assert_eq!(tls.invalid, why);
                assert!(secrets.is_empty(), "{secrets:?}");
            }
        }
        let read = crate::harness::read(&(shop(true) + &objects)).0;
        let shown = format!("{secrets:?} {read:?}");
        assert!(!shown.contains("PRIVATE"), "{shown}");
        assert!(!serde_json::to_string(&secrets).unwrap().contains("PRIVATE"));
    }
}

/// Gateway API, Gateway.spec.tls.backend: what a waypoint shows to backends with a
/// BackendTLSPolicy.
#[test]
fn a_gateway_says_what_its_waypoint_shows_to_backends() {
    let made = rcgen::generate_simple_self_signed(vec!["x".to_owned()]).unwrap();
    let line = |text: String| text.replace('\n', "\\n");
    let (chain, key) = (
        line(made.cert.pem()),
        line(made.signing_key.serialize_pem()),
    );
    let secret = |namespace: &str, chain: &str| {
        format!(
            "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: client, namespace: {namespace}}}\nstringData: {{tls.crt: \"{chain}\", tls.key: \"{key}\"}}\n"
        )
    };
    let policy = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {name: p, namespace: a}\nspec: {targetRefs: [{group: '', kind: Service, name: s}], validation: {hostname: s.example, wellKnownCACertificates: System}}\n";
    let grant = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: z}\nspec: {from: [{group: gateway.networking.k8s.io, kind: Gateway, namespace: a}], to: [{group: '', kind: Secret}]}\n";
    let own = secret("a", &chain);
    let other = secret("z", &chain);
    for (reference, objects, expected) in [
        ("{name: client}", own.clone(), Ok("a/client")),
        (
            "{name: client, namespace: z}",
            other.clone() + grant,
            Ok("z/client"),
        ),
        (
            "{name: client, namespace: z}",
            other,
            Err("RefNotPermitted"),
        ),
        (
            "{name: none}",
            own.clone(),
            Err("InvalidClientCertificateRef"),
        ),
        (
            "{kind: ConfigMap, name: client}",
            own,
            Err("InvalidClientCertificateRef"),
        ),
        (
            "{name: client}",
            secret("a", "no certificate"),
            Err("InvalidClientCertificateRef"),
        ),
    ] {
        let tls = format!("tls: {{backend: {{clientCertificateRef: {reference}}}}}, listeners:");
        let yaml = shop(true).replacen("listeners:", &tls, 1) + policy + &objects;
        assert!(yaml.contains("clientCertificateRef"));
        let mesh = mesh(&yaml);
        let sent = resources(&mesh).find_map(|of| match of {
            Resource::BackendTls(of) => of.tls.clone(),
            _ => None,
        });
        let tls = sent.unwrap();
        let secrets: Vec<_> = resources(&mesh)
            .filter_map(|of| match of {
                Resource::Secret(of) => Some(of.name.as_str()),
                _ => None,
            })
            .collect();
        let gateway = mesh
            .compiled
            .statuses
            .iter()
            .find(|(object, _)| object.kind == Kind::Gateway);
        let conditions = &gateway.unwrap().1.conditions;
        let resolved = conditions.iter().find(|of| of.kind == "ResolvedRefs");
        let resolved = resolved.unwrap();
        let accepted = conditions.iter().find(|of| of.kind == "Accepted");
        assert!(accepted.unwrap().status, "{reference}");
        match expected {
            Ok(name) => {
                assert_eq!((&*tls.invalid, &*tls.client_secret), ("", name));
                assert_eq!(tls.mode(), wire::client_tls::Mode::Mutual);
                assert_eq!(secrets, [name]);
                assert!(resolved.status);
            }
            Err(reason) => {
                assert_ne!(tls.invalid, "", "{reference}");
                assert!(secrets.is_empty(), "{secrets:?}");
                assert_eq!((resolved.status, &*resolved.reason), (false, reason));
            }
        }
    }
}

/// All replicas of a waypoint get one key, other waypoints another, and a restart of the control
/// plane changes nothing.
#[test]
fn the_key_of_sessions_is_one_for_each_gateway() {
    use adit_controlplane::compile::MeshConfig;
    use adit_shared::identity::DerivedSecret;
    let key = |secret: &[u8], waypoint: &str| {
        let config = MeshConfig {
            shared_secret: Some(DerivedSecret::of(secret, "test")),
            ..MeshConfig::default()
        };
        let yaml = shop(true).replace("use-waypoint: w", &format!("use-waypoint: {waypoint}"));
        let yaml = yaml.replace("name: w,", &format!("name: {waypoint},"));
        let yaml = yaml.replace("gateway-name: w,", &format!("gateway-name: {waypoint},"));
        let mesh = crate::harness::mesh_with(&yaml, config);
        let mut secrets = mesh
            .compiled
            .waypoints
            .values()
            .filter_map(|of| match &**of {
                Resource::Secret(of) => Some(of.session_key.clone()),
                _ => None,
            });
        let key = secrets.next().expect("a key");
        assert_eq!(key.len(), 32);
        assert!(secrets.next().is_none());
        key
    };
    assert_eq!(key(b"one", "w"), key(b"one", "w"));
    assert_ne!(key(b"one", "w"), key(b"one", "v"));
    assert_ne!(key(b"one", "w"), key(b"two", "w"));
    assert!(resources(&mesh(&shop(true))).all(|of| !matches!(of, Resource::Secret(_))));
}
