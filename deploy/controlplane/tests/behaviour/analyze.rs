//! `adit analyze`.

use std::fs;

use adit_controlplane::analyze::{Finding, analyze_paths};
use adit_controlplane::compile::MeshConfig;

fn findings(yaml: &str) -> Vec<Finding> {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("all.yaml"), yaml).unwrap();
    analyze_paths(vec![directory.path().into()], &MeshConfig::default())
}

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a, labels: {app: x}}\nspec: {containers: [{name: c, ports: [{name: web, containerPort: 8080}]}]}\n---\n";

#[test]
fn every_check_finds_its_case() {
    let policy = |meta: &str, spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: q\n  namespace: a\n  {meta}\nspec:\n  {spec}\n"
        )
    };
    let peer = |name: &str, namespace: &str, spec: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: {name}\n  namespace: {namespace}\nspec:\n  {spec}\n"
        )
    };
    let service = |spec: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: a}}\nspec:\n  {spec}\n"
        )
    };
    // POD has 5 lines; a policy's spec is on line 13.
    for (yaml, expected) in [
        (policy("", "selector: {matchLabels: {app: y}}"), "13 spec.selector IST0127"),
        (policy("", "rules: [{to: [{operation: {methods: [GET]}}]}]"), "12 spec IST0171"),
        (policy("", "rules: [{from: [{source: {namespaces: [b]}}]}]"), "13 spec.rules[0].from[0].source.namespaces[0] IST0101"),
        (policy("", "rules: [{from: [{source: {serviceAccounts: [t]}}]}]"), "13 spec.rules[0].from[0].source.serviceAccounts[0] IST0101"),
        (policy("", "targetRefs: [{kind: Service, name: s}]"), "13 spec.targetRefs IST0101"),
        (policy("labels: {istio.io/rev: other}", "rules: []"), "11 metadata.labels[\"istio.io/rev\"] IST0167"),
        (policy("", "rules: [{to: [{operation: {ports: ['x']}}]}]"), "13 spec.rules[0].to[0].operation.ports[0] IST0106"),
        (policy("annotations: {istio.io/dryrun: 'true'}", "rules: []"), "11 metadata.annotations[\"istio.io/dryrun\"] IST0108"),
        (format!("{}---\n{}", policy("", "rules: [{to: [{operation: {ports: ['80']}}]}]"), service("ports: [{name: http, port: 80, targetPort: 8080}]")), "13 spec.rules[0].to[0].operation.ports[0] ADIT0005"),
        (service("selector: {app: x}\n  ports: [{name: http, port: 80, targetPort: nope}]"), "11 spec.ports[0].targetPort IST0101"),
        (service("ports: [{name: web, port: 80}]"), "10 spec.ports[0] IST0118"),
        (peer("a", "a", "mtls: {}") + &peer("b", "a", "mtls: {mode: STRICT}"), "20 spec ADIT0004"),
        (peer("a", "a", "selector: {matchLabels: {app: x}}") + &peer("b", "a", "selector: {matchLabels: {app: x}}"), "21 spec.selector ADIT0004"),
        (peer("a", "a", "selector: {matchLabels: {app: y}}"), "13 spec.selector IST0127"),
        (peer("a", "istio-system", "selector: {matchLabels: {app: x}}"), "13 spec.selector IST0167"),
        ("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: b\n  labels: {istio.io/dataplane-mode: Ambient}\n".into(), "10 metadata.labels[\"istio.io/dataplane-mode\"] IST0125"),
        ("apiVersion: v1\nkind: Pod\nmetadata:\n  name: b\n  annotations: {ambient.istio.io/redirection: enabled}\n".into(), "10 metadata.annotations[\"ambient.istio.io/redirection\"] IST0107"),
        ("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: b\n  labels: {kubernetes.io/service-name: gone}\naddressType: IPv4\nendpoints: []\n".into(), "10 metadata.labels[\"kubernetes.io/service-name\"] IST0101"),
        (service("ports: [{name: http, port: 80}]") + "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: b, namespace: a, labels: {kubernetes.io/service-name: s}}\naddressType: FQDN\nendpoints: [{addresses: [x.example]}]\n", "15 addressType IST0101"),
        (POD.trim_end_matches("---\n").into(), "6 metadata.name ADIT0002"),
        ("a: [".into(), "6  ADIT0001"),
        ("apiVersion: x.org/v1\nkind: Y\n".into(), "6 kind ADIT0003"),
    ] {
        let found = findings(&format!("{POD}{yaml}"));
        let texts: Vec<_> = found
            .iter()
            .map(|f| format!("{} {} {}", f.line, f.field, f.code.as_str()))
            .collect();
        assert_eq!(texts, [expected], "{yaml}\n{found:#?}");
    }
}

#[test]
fn a_healthy_mesh_has_no_findings() {
    let yaml = format!(
        "{POD}apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: a}}\nspec: {{selector: {{app: x}}, ports: [{{name: http, port: 80, targetPort: web}}]}}\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: q, namespace: a}}\nspec: {{selector: {{matchLabels: {{app: x}}}}, rules: [{{from: [{{source: {{namespaces: [a, 'b-*']}}}}], to: [{{operation: {{ports: ['8080']}}}}]}}]}}\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d}}\n"
    );
    assert_eq!(findings(&yaml), []);
}

#[test]
fn a_finding_can_be_silenced_and_reads_well() {
    let yaml = |annotation: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: q\n  namespace: a\n  annotations: {{galley.istio.io/analyze-suppress: '{annotation}'}}\nspec:\n  selector: {{matchLabels: {{app: y}}}}\n"
        )
    };
    for (annotation, count) in [
        ("IST0127", 0),
        ("IST0101, IST0127", 0),
        ("*", 0),
        ("IST0101", 1),
    ] {
        assert_eq!(findings(&yaml(annotation)).len(), count, "{annotation}");
    }
    let finding = findings(&yaml("-")).remove(0);
    let text = finding.to_string();
    assert!(
        text.starts_with("Warning [IST0127] (AuthorizationPolicy a/q "),
        "{text}"
    );
    assert!(
        text.ends_with("all.yaml:8) spec.selector: selects no pod"),
        "{text}"
    );
    let json = serde_json::to_value(&finding).unwrap();
    assert_eq!(json["code"], "IST0127");
    assert_eq!(json["object"], "AuthorizationPolicy a/q");
    assert_eq!(json["line"], 8);
}

#[test]
fn waypoints_and_routes() {
    let gateway = |listener: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: w, namespace: a}}\nspec:\n  gatewayClassName: istio-waypoint\n  listeners: [{listener}]\n---\n"
        )
    };
    let mesh = gateway("{name: mesh, port: 15008, protocol: HBONE}");
    let service = |labels: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: s\n  namespace: a\n  labels: {{{labels}}}\nspec: {{ports: [{{name: http, port: 80}}]}}\n"
        )
    };
    let route = |parent: &str, backend: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: a}}\nspec:\n  parentRefs: [{{group: '', kind: Service, name: {parent}}}]\n  rules: [{{backendRefs: [{{{backend}}}]}}]\n"
        )
    };
    let asking = |service: &str| {
        route("s", "name: s, port: 80").replace(
            "rules: [{",
            &format!("rules: [{{filters: [{{type: ExternalAuth, externalAuth: {{protocol: HTTP, backendRef: {{name: {service}, port: 80}}, http: {{}}}}}}], "),
        )
    };
    let bound = "istio.io/use-waypoint: w";
    for (yaml, expected) in [
        // An unready waypoint is no mistake: manifests hold no generated objects.
        (mesh.clone() + &service(bound) + &route("s", "name: s, port: 80"), ""),
        (mesh.clone() + &service("istio.io/use-waypoint: x"), "13 metadata.labels[\"istio.io/use-waypoint\"] IST0101"),
        (mesh.clone() + &service("istio.io/use-waypoint-namespace: x"), "13 metadata.labels[\"istio.io/use-waypoint-namespace\"] IST0125"),
        (mesh.replace("metadata: {", "metadata: {labels: {istio.io/waypoint-for: workload}, ") + &service(bound), "13 metadata.labels[\"istio.io/use-waypoint\"] IST0171"),
        (mesh.replace("namespace: a", "namespace: b") + &service("istio.io/use-waypoint: w, istio.io/use-waypoint-namespace: b"), "13 metadata.labels[\"istio.io/use-waypoint\"] IST0171"),
        (gateway("{name: http, port: 80, protocol: HTTP}"), "4 spec IST0171"),
        (mesh.clone() + &service(bound) + &route("s", "name: x, port: 80"), "21 spec.rules[0].backendRefs[0] IST0101"),
        (mesh.clone() + &service(bound) + &route("s", "name: x, namespace: b, port: 80"), "21 spec.rules[0].backendRefs[0] IST0171"),
        (mesh.clone() + &service(bound) + &asking("x"), "21 spec.rules[0].filters[0].externalAuth.backendRef IST0101"),
        (mesh.clone() + &service(bound) + &asking("s").replace("http: {}", "grpc: {}"), "21 spec.rules[0].filters[0].externalAuth.grpc IST0106"),
        (mesh.clone() + &service(bound) + &route("x", "name: s, port: 80"), "20 spec.parentRefs IST0101"),
        (mesh.clone() + &service(bound) + &route("s, port: 81", "name: s, port: 80"), "20 spec.parentRefs IST0171"),
        (mesh.clone() + &service(bound) + &route("e, kind: ServiceEntry", "name: s, port: 80").replace("kind: Service,", ""), "20 spec.parentRefs IST0167"),
        (mesh.clone() + &service("a: b") + &route("s", "name: s, port: 80"), "20 spec.parentRefs IST0171"),
        (mesh.clone() + &service(bound) + &route("s", "name: s, prt: 80"), "21 spec.rules[0].backendRefs[0].prt IST0106"),
        ("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v}\nspec: {}\n".into(), "4 spec IST0167"),
        ("apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: v}\nspec: {}\n".into(), "4 spec IST0167"),
    ] {
        let found = findings(&yaml);
        let texts: Vec<_> = found
            .iter()
            .map(|f| format!("{} {} {}", f.line, f.field, f.code.as_str()))
            .collect();
        assert_eq!(texts.join(" | "), expected, "{yaml}\n{found:#?}");
    }
}
