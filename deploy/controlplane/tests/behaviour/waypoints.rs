//! Waypoints: who is bound to which, and where clients are sent.

use adit_controlplane::compile::MeshConfig;
use adit_shared::proto::workload::{GatewayAddress, gateway_address::Destination};

use crate::harness::{Mesh, mesh, mesh_with};

const READY: &str = "conditions: [{type: Ready, status: 'True'}]";

/// A Gateway with what is generated for it.
fn waypoint(namespace: &str, name: &str, metadata: &str, listener: &str) -> String {
    format!(
        "{}---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{gateway.networking.k8s.io/gateway-name: {name}, gateway.istio.io/managed: istio.io-mesh-controller}}}}\nspec: {{clusterIP: 10.96.9.1, selector: {{gateway.networking.k8s.io/gateway-name: {name}}}, ports: [{{port: 15008, name: mesh}}]}}\n---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}-1, namespace: {namespace}, labels: {{gateway.networking.k8s.io/gateway-name: {name}, gateway.istio.io/managed: istio.io-mesh-controller}}}}\nspec: {{serviceAccountName: {name}, containers: []}}\nstatus: {{phase: Running, podIP: 10.9.9.9, {READY}}}\n",
        gateway(namespace, name, metadata, listener)
    )
}

fn gateway(namespace: &str, name: &str, metadata: &str, listener: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: {name}, namespace: {namespace}, {metadata}}}\nspec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE, {listener}}}]}}\n"
    )
}

/// Namespace `a` with a service and a pod.
fn shop(namespace: &str, service: &str, pod: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {{{namespace}}}}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: a, labels: {{{service}}}}}\nspec: {{clusterIP: 10.96.0.1, selector: {{app: s}}, ports: [{{port: 80, name: http}}]}}\n---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: a, labels: {{app: s, {pod}}}}}\nspec: {{containers: []}}\nstatus: {{phase: Running, podIP: 10.0.0.1, {READY}}}\n"
    )
}

fn shown(address: Option<&GatewayAddress>) -> String {
    let Some(address) = address else {
        return "-".into();
    };
    assert_eq!(address.hbone_mtls_port, 15008);
    match address.destination.as_ref().unwrap() {
        Destination::Hostname(name) => {
            let short = name.hostname.strip_suffix(".svc.cluster.local");
            match short {
                Some(name) => name.to_owned(),
                None if name.hostname.ends_with(".waypoint.invalid") => "closed".into(),
                None => name.hostname.clone(),
            }
        }
        Destination::Address(address) => format!("{:?}@{}", address.address, address.network),
    }
}

fn bound(mesh: &Mesh) -> (String, String, String) {
    let service = mesh.service("a/s.a.svc.cluster.local");
    let condition = mesh.condition("a/s");
    (
        shown(service.waypoint.as_ref()),
        shown(mesh.workload("a/p").waypoint.as_ref()),
        condition.replace("true ", "").replace("false ", "!"),
    )
}

/// Istio's waypoint resolution and precedence (`istio.io/use-waypoint`), with what Adit
/// does where the waypoint cannot be used.
#[test]
fn precedence() {
    let use_w = "istio.io/use-waypoint: w";
    let none = "istio.io/use-waypoint: none";
    let other = "istio.io/use-waypoint: missing";
    let for_workload = "labels: {istio.io/waypoint-for: workload}";
    let for_all = "labels: {istio.io/waypoint-for: all}";
    let for_none = "labels: {istio.io/waypoint-for: none}";
    let table = [
        // (Gateway's metadata, namespace, service, pod) -> (service, pod, condition)
        ("", "", "", "", "-", "-", "none"),
        ("", use_w, "", "", "w.a", "-", "WaypointAccepted"),
        ("", "", use_w, "", "w.a", "-", "WaypointAccepted"),
        ("", use_w, none, "", "-", "-", "none"),
        ("", none, use_w, "", "w.a", "-", "WaypointAccepted"),
        ("", none, "", "", "-", "-", "none"),
        // No falling back to the namespace's.
        ("", use_w, other, "", "closed", "-", "!WaypointIsNotReady"),
        ("", other, "", "", "closed", "-", "!WaypointIsNotReady"),
        ("", other, none, "", "-", "-", "none"),
        // A namespace without a name means nothing.
        (
            "",
            "istio.io/use-waypoint-namespace: b",
            "",
            "",
            "-",
            "-",
            "none",
        ),
        // Traffic types.
        (
            for_workload,
            use_w,
            "",
            "",
            "-",
            "w.a",
            "!UnsupportedTrafficType",
        ),
        (
            for_workload,
            "",
            use_w,
            "",
            "-",
            "-",
            "!UnsupportedTrafficType",
        ),
        (for_workload, "", "", use_w, "-", "w.a", "none"),
        (for_all, use_w, "", "", "w.a", "w.a", "WaypointAccepted"),
        (for_all, use_w, "", none, "w.a", "-", "WaypointAccepted"),
        (for_all, use_w, none, "", "-", "w.a", "none"),
        (for_all, "", "", use_w, "-", "w.a", "none"),
        (
            for_all,
            use_w,
            "",
            other,
            "w.a",
            "closed",
            "WaypointAccepted",
        ),
        (
            for_none,
            use_w,
            "",
            use_w,
            "-",
            "-",
            "!UnsupportedTrafficType",
        ),
        ("", "", "", use_w, "-", "-", "none"),
        (
            "labels: {istio.io/waypoint-for: everything}",
            use_w,
            "",
            "",
            "closed",
            "closed",
            "!WaypointIsNotReady",
        ),
        // The Gateway is another control plane's.
        (
            "labels: {istio.io/rev: canary}",
            use_w,
            "",
            "",
            "closed",
            "-",
            "!WaypointIsNotReady",
        ),
    ];
    for (gateway, namespace, service, pod, to_service, to_pod, condition) in table {
        let yaml = shop(namespace, service, pod) + &waypoint("a", "w", gateway, "");
        let expected = (to_service.into(), to_pod.into(), condition.into());
        let row = format!("{gateway} | {namespace} | {service} | {pod}");
        assert_eq!(bound(&mesh(&yaml)), expected, "{row}");
    }
}

/// `allowedRoutes` of the listener says who may bind; only the own namespace by default.
#[test]
fn other_namespaces_have_to_be_admitted() {
    let there = "istio.io/use-waypoint: w, istio.io/use-waypoint-namespace: b";
    let selector =
        "allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {team: x}}}}";
    let table = [
        ("", "closed", "!AttachmentDenied"),
        (
            "allowedRoutes: {namespaces: {from: Same}}",
            "closed",
            "!AttachmentDenied",
        ),
        (
            "allowedRoutes: {namespaces: {from: All}}",
            "w.b",
            "WaypointAccepted",
        ),
        (selector, "closed", "!AttachmentDenied"),
    ];
    for (listener, to, condition) in table {
        let yaml = shop(there, "", "") + &waypoint("b", "w", "", listener);
        let expected = (to.into(), "-".into(), condition.into());
        assert_eq!(bound(&mesh(&yaml)), expected, "{listener}");
    }
    let yaml = shop(&format!("team: x, {there}"), "", "") + &waypoint("b", "w", "", selector);
    assert_eq!(bound(&mesh(&yaml)).0, "w.b");
}

#[test]
fn a_waypoint_is_where_its_service_is_and_refused_until_then() {
    let shop = shop("istio.io/use-waypoint: w", "", "");
    let closed = ("closed".into(), "-".into(), "!WaypointIsNotReady".into());
    let without_service = shop.clone() + &gateway("a", "w", "", "");
    assert_eq!(bound(&mesh(&without_service)), closed);
    let open = MeshConfig {
        waypoint_fail_open: true,
        ..MeshConfig::default()
    };
    assert_eq!(bound(&mesh_with(&without_service, open)).0, "-");
    // A Service of that name that nobody generated is not the waypoint's.
    let foreign = without_service.clone()
        + "---\napiVersion: v1\nkind: Service\nmetadata: {name: w, namespace: a}\nspec: {clusterIP: 10.96.7.7, selector: {app: x}, ports: [{port: 15008}]}\n";
    assert_eq!(bound(&mesh(&foreign)), closed);
    // Somebody else runs it.
    let fixed = |addresses: &str| {
        let gateway = gateway("a", "w", "", "").replace(
            "gatewayClassName",
            &format!("addresses: [{addresses}], gatewayClassName"),
        );
        bound(&mesh(&(shop.clone() + &gateway))).0
    };
    assert_eq!(fixed("{value: 10.0.0.7}"), "[10, 0, 0, 7]@");
    assert_eq!(
        fixed("{value: 10.0.0.7}, {type: Hostname, value: w.example.com}"),
        "w.example.com"
    );
}

#[test]
fn a_gateway_that_is_no_waypoint_is_not_accepted() {
    for listeners in [
        "",
        "{name: mesh, port: 15008, protocol: HTTP}",
        "{name: mesh, port: 15009, protocol: HBONE}",
        "{name: http, port: 15008, protocol: HBONE}",
        "{name: mesh, port: 15008, protocol: HBONE}, {name: more, port: 80, protocol: HTTP}",
        "{name: mesh, port: 15008, protocol: HBONE, nonsense: 1}",
    ] {
        let yaml = shop("istio.io/use-waypoint: w", "", "")
            + &waypoint("a", "w", "", "")
                .replace("{name: mesh, port: 15008, protocol: HBONE, }", listeners);
        let mesh = mesh(&yaml);
        assert_eq!(bound(&mesh).0, "closed", "{listeners}");
        let accepted = mesh.condition("a/w");
        assert!(accepted.starts_with("false "), "{listeners}: {accepted}");
    }
}

#[test]
fn waypoints_have_no_waypoint() {
    let yaml = shop("istio.io/use-waypoint: w", "", "")
        + &waypoint("a", "w", "labels: {istio.io/waypoint-for: all}", "");
    let mesh = mesh(&yaml);
    assert_eq!(bound(&mesh).1, "w.a");
    assert_eq!(mesh.service("a/w.a.svc.cluster.local").waypoint, None);
    assert_eq!(mesh.workload("a/w-1").waypoint, None);
}

/// What a waypoint gets: itself, and the services that are bound to it, with what is
/// spoken on their ports.
#[test]
fn resources_of_a_waypoint() {
    let ports = "{port: 1, name: http-a}, {port: 2, name: x, appProtocol: http2}, {port: 3, name: grpc}, {port: 4, name: tcp-x}, {port: 5, name: tls}, {port: 6, name: https-x}, {port: 7, name: web}, {port: 8, name: http-x, appProtocol: tcp}, {port: 3306, name: db}, {port: 9, name: u, protocol: UDP}, {port: 10, name: grpc-web}, {port: 11, name: ws, appProtocol: kubernetes.io/ws}, {port: 12, name: h2c, appProtocol: kubernetes.io/h2c}";
    let yaml = shop("istio.io/use-waypoint: w", "", "").replace("{port: 80, name: http}", ports)
        + &waypoint("a", "w", "", "")
        + &waypoint("b", "w", "labels: {istio.io/waypoint-for: workload}", "")
        + "---\napiVersion: v1\nkind: Service\nmetadata: {name: other, namespace: a, labels: {istio.io/use-waypoint: none}}\nspec: {ports: [{port: 80}]}\n";
    let mesh = mesh(&yaml);
    let found: Vec<String> = mesh
        .compiled
        .waypoints
        .iter()
        .map(|(key, resource)| {
            let kind = key.type_url.rsplit('.').next().unwrap();
            format!("{} {kind} {}: {resource:?}", key.waypoint, key.name)
        })
        .collect();
    assert_eq!(found.len(), 3, "{found:#?}");
    assert!(
        found[0].starts_with("a/w Service a/s.a.svc.cluster.local"),
        "{found:#?}"
    );
    let protocols: Vec<&str> = found[0]
        .split("protocol: ")
        .skip(1)
        .map(|rest| rest.split(' ').next().unwrap())
        .collect();
    assert_eq!(
        protocols,
        [
            "Http",
            "Http2",
            "Grpc",
            "Tcp",
            "Tls",
            "Tls",
            "Undeclared",
            "Tcp",
            "Tcp",
            "Http",
            "Http",
            "Http2"
        ]
    );
    assert!(found[1].starts_with("a/w Waypoint a/w") && found[1].contains("Service"));
    assert!(found[2].starts_with("b/w Waypoint b/w") && found[2].contains("Workload"));
}

/// Istio `istio.io/use-waypoint-canary`: a share of the traffic takes a second waypoint.
#[test]
fn a_canary_takes_its_share() {
    let w = "istio.io/use-waypoint: w";
    let canary = "istio.io/use-waypoint-canary: c";
    let weight =
        |weight: &str| format!("annotations: {{istio.io/use-waypoint-canary-weight: '{weight}'}}");
    let both = format!("{w}, {canary}");
    let same = format!("{w}, istio.io/use-waypoint-canary: w");
    let none = String::new();
    let table = [
        // (namespace's labels and annotations, service's) -> (shares, told)
        (
            &both,
            weight("10"),
            "",
            &none,
            "w.a 90, c.a 10",
            "10 % to canary a/c",
        ),
        (
            &none,
            none.clone(),
            &*both,
            &weight("100"),
            "w.a 0, c.a 100",
            "100 % to canary",
        ),
        (
            &w.to_owned(),
            none.clone(),
            canary,
            &weight("5"),
            "w.a 95, c.a 5",
            "5 % to canary",
        ),
        (&both, weight("10"), w, &none, "", "bound to waypoint a/w"),
        (&both, none.clone(), "", &none, "", "bound to waypoint a/w"),
        (&both, weight("0"), "", &none, "", "bound to waypoint a/w"),
        (&both, weight("101"), "", &none, "", "CanaryInvalidWeight"),
        (&both, weight("x"), "", &none, "", "CanaryInvalidWeight"),
        (&same, weight("10"), "", &none, "", "CanarySameAsPrimary"),
        (
            &format!("{w}, istio.io/use-waypoint-canary: missing"),
            weight("10"),
            "",
            &none,
            "",
            "CanaryIsNotReady",
        ),
    ];
    for (labels, annotations, of_service, service_annotations, shares, told) in table {
        let yaml = shop(labels, of_service, "")
            .replacen("labels: {", &format!("{annotations}, labels: {{"), 1)
            .replace(
                "name: s, namespace: a, ",
                &format!("name: s, namespace: a, {service_annotations}, "),
            )
            .replace(", , ", ", ")
            + &waypoint("a", "w", "", "")
            + &waypoint("a", "c", "", "");
        let mesh = mesh(&yaml);
        let service = mesh.service("a/s.a.svc.cluster.local");
        assert_eq!(shown(service.waypoint.as_ref()), "w.a");
        let found: Vec<String> = service
            .weighted_waypoints
            .iter()
            .map(|share| format!("{} {}", shown(share.destination.as_ref()), share.weight))
            .collect();
        assert_eq!(found.join(", "), shares, "{labels} | {of_service}");
        let statuses = &mesh.compiled.statuses;
        let status = statuses.iter().find(|(object, _)| &*object.name == "s");
        let message = &status.unwrap().1.conditions[0].message;
        assert!(message.contains(told), "{message}");
        // Both have to know what to do.
        let knows = |name: &str| {
            mesh.compiled
                .waypoints
                .keys()
                .any(|key| &*key.waypoint.name == name && key.name == "a/s.a.svc.cluster.local")
        };
        assert_eq!((knows("w"), knows("c")), (true, !shares.is_empty()));
    }
}
