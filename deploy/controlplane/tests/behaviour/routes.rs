//! Routes from manifests to what waypoints are sent, and what is told about them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use adit_controlplane::compile::l7::Resource;
use adit_controlplane::model::Kind;
use adit_controlplane::status::{Condition, ObjectStatus};
use adit_shared::proto::waypoint as wire;

use crate::harness::{Mesh, mesh, read};

/// Set `UPDATE_GOLDEN=1` to write what is found.
#[test]
fn everything_that_routes_can_say() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let input = fs::read_to_string(data.join("routes.yaml")).unwrap();
    let (_, findings) = read(&input);
    assert!(findings.is_empty(), "{findings:?}");
    let mesh = mesh(&input);
    let mut found = String::new();
    for (key, resource) in &mesh.compiled.waypoints {
        let kind = key.type_url.rsplit('.').next().unwrap();
        writeln!(found, "{} {kind} {}", key.waypoint, key.name).unwrap();
        let text = format!("{resource:#?}");
        // What says nothing.
        let defaults = [": None,", ": \"\",", ": 0,", ": [],", ": false,", ": 0.0,"];
        let brackets = |line: &str| line.trim_matches(|c| " ()[]{},".contains(c)).is_empty();
        let text = text.replace("Some(\n", "\n");
        for line in text
            .lines()
            .filter(|l| !brackets(l) && !defaults.iter().any(|d| l.ends_with(d)))
        {
            writeln!(found, "  {line}").unwrap();
        }
    }
    for (object, status) in &mesh.compiled.statuses {
        writeln!(found, "{object}: {}", shown(status)).unwrap();
    }
    let golden = data.join("routes.golden");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &found).unwrap();
    }
    let expected = fs::read_to_string(golden).unwrap();
    for (line, (expected, found)) in expected.lines().zip(found.lines()).enumerate() {
        assert_eq!(expected, found, "line {}", line + 1);
    }
    assert_eq!(expected.lines().count(), found.lines().count());
}

fn conditions(conditions: &[Condition]) -> String {
    let all = conditions.iter().map(|condition| {
        let not = if condition.status { "" } else { "!" };
        let kind = condition.kind.rsplit('/').next().unwrap();
        if *kind == *condition.reason {
            format!("{not}{kind}")
        } else {
            format!("{not}{kind}:{}", condition.reason)
        }
    });
    all.collect::<Vec<_>>().join(" ")
}

fn shown(status: &ObjectStatus) -> String {
    let mut text = conditions(&status.conditions);
    for address in &status.addresses {
        write!(text, " {}={}", address.kind, address.value).unwrap();
    }
    for listener in &status.listeners {
        write!(
            text,
            " [{}: {}]",
            listener.name,
            conditions(&listener.conditions)
        )
        .unwrap();
    }
    for parent in status.parents.iter().chain(&status.ancestors) {
        write!(
            text,
            " [{}: {}]",
            parent.reference.name,
            conditions(&parent.conditions)
        )
        .unwrap();
    }
    text.trim().to_owned()
}

fn status(mesh: &Mesh, kind: Kind, name: &str) -> String {
    let of = mesh.compiled.statuses.iter();
    let mut found = of.filter(|(object, _)| object.kind == kind && *object.name == *name);
    found
        .next()
        .map_or("nothing".into(), |(_, status)| shown(status))
}

/// A namespace with a waypoint, and services `s` and `b`.
fn shop(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/use-waypoint: w}}}}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: w, namespace: {name}}}\nspec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: w, namespace: {name}, labels: {{gateway.networking.k8s.io/gateway-name: w, gateway.istio.io/managed: istio.io-mesh-controller}}}}\nspec: {{clusterIP: 10.96.9.1, ports: [{{port: 15008, name: mesh}}]}}\n{}{}",
        service(
            name,
            "s",
            "{name: http, port: 80}, {name: x, port: 81}, {name: tcp, port: 82}"
        ),
        service(name, "b", "{name: http, port: 80}")
    )
}

fn service(namespace: &str, name: &str, ports: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{ports: [{ports}]}}\n"
    )
}

fn route(kind: &str, namespace: &str, name: &str, parents: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{parentRefs: [{parents}], rules: [{rules}]}}\n"
    )
}

const TO_B: &str = "{backendRefs: [{name: b, port: 80}]}";
const S: &str = "{group: '', kind: Service, name: s}";

/// `service:port` of each parent, `!` if it is rejected; of the route as a waypoint gets it.
fn parents(mesh: &Mesh, waypoint: &str, name: &str) -> String {
    let found = find(mesh, waypoint, name);
    let Some(route) = found else {
        return "-".into();
    };
    let parents = route.parents.iter().map(|parent| {
        let not = if parent.rejected.is_empty() { "" } else { "!" };
        let service = parent.service.as_ref().unwrap();
        let name = service.hostname.strip_suffix(".svc.cluster.local").unwrap();
        format!("{not}{name}:{}", parent.port)
    });
    parents.collect::<Vec<_>>().join(" ")
}

fn find<'a>(mesh: &'a Mesh, waypoint: &str, name: &str) -> Option<&'a wire::Route> {
    let mut all = mesh.compiled.waypoints.iter();
    let (_, resource) =
        all.find(|(key, _)| key.waypoint.to_string() == waypoint && key.name == name)?;
    match &**resource {
        Resource::Route(route) => Some(route),
        other => panic!("{other:?}"),
    }
}

/// Gateway API, GAMMA: what a `parentRef` to a Service means, and what is said about it.
#[test]
fn parents_and_their_status() {
    let ok = "[s: Accepted ResolvedRefs]";
    let table = [
        (S, "s.a:0", ok),
        (
            "{group: '', kind: Service, name: s, port: 80}",
            "s.a:80",
            ok,
        ),
        (
            "{group: '', kind: Service, name: s, sectionName: tcp}",
            "s.a:82",
            ok,
        ),
        (
            "{group: '', kind: Service, name: s, port: 80}, {group: '', kind: Service, name: s, port: 81}",
            "s.a:80 s.a:81",
            "[s: Accepted ResolvedRefs] [s: Accepted ResolvedRefs]",
        ),
        (
            "{group: '', kind: Service, name: s, port: 99}",
            "-",
            "[s: !Accepted:NoMatchingParent ResolvedRefs]",
        ),
        (
            "{group: '', kind: Service, name: s, port: 99}, {group: '', kind: Service, name: b}",
            "!s.a:99 b.a:0",
            "[s: !Accepted:NoMatchingParent ResolvedRefs] [b: Accepted ResolvedRefs]",
        ),
        (
            "{group: '', kind: Service, name: s, port: 80, sectionName: tcp}",
            "-",
            "[s: !Accepted:NoMatchingParent ResolvedRefs]",
        ),
        // No entry for what is not there, and none for what others serve.
        (
            "{group: '', kind: Service, name: missing}",
            "-",
            "!ResolvedWaypoints:NoMatchingParent",
        ),
        ("{name: ingress}", "-", ""),
        (
            "{name: w}",
            "-",
            "[w: !Accepted:NotAllowedByListeners ResolvedRefs]",
        ),
        (
            "{group: '', kind: Service, name: s, namespace: plain}",
            "-",
            "!ResolvedWaypoints:MissingUseWaypointLabel [s: Accepted ResolvedRefs]",
        ),
    ];
    for (refs, expected, told) in table {
        let yaml = shop("a")
            + &service("plain", "s", "{port: 80}")
            + &route("HTTPRoute", "a", "r", refs, TO_B);
        let mesh = mesh(&yaml);
        assert_eq!(parents(&mesh, "a/w", "HTTPRoute/a/r"), expected, "{refs}");
        assert_eq!(status(&mesh, Kind::HttpRoute, "r"), told, "{refs}");
    }
}

/// A consumer route goes to the waypoint of the service, whoever's namespace it is in.
#[test]
fn routes_go_to_the_waypoints_of_their_parents_and_to_no_other() {
    let both =
        "{group: '', kind: Service, name: s}, {group: '', kind: Service, name: s, namespace: b}";
    let yaml = shop("a") + &shop("b") + &shop("c") + &route("HTTPRoute", "a", "r", both, TO_B);
    let mesh = mesh(&yaml);
    for (waypoint, expected) in [("a/w", "s.a:0 s.b:0"), ("b/w", "s.a:0 s.b:0"), ("c/w", "-")] {
        assert_eq!(parents(&mesh, waypoint, "HTTPRoute/a/r"), expected);
    }
}

/// GEP-1426: GRPCRoute before HTTPRoute before TLSRoute before TCPRoute at one port.
#[test]
fn of_several_kinds_at_a_port_the_highest_is_in_force() {
    let s80 = "{group: '', kind: Service, name: s, port: 80}";
    let s81 = "{group: '', kind: Service, name: s, port: 81}";
    let attach = |routes: &[(&str, &str)]| {
        let routes = routes.iter();
        let yaml = routes
            .map(|(kind, parent)| route(kind, "a", &kind.to_lowercase(), parent, TO_B))
            .collect::<String>();
        mesh(&(shop("a") + &yaml))
    };
    let of = |mesh: &Mesh, kind: &str| {
        parents(mesh, "a/w", &format!("{kind}/a/{}", kind.to_lowercase()))
    };
    let mesh = attach(&[
        ("HTTPRoute", s80),
        ("GRPCRoute", s80),
        ("TCPRoute", s80),
        ("TLSRoute", s80),
    ]);
    assert_eq!(of(&mesh, "GRPCRoute"), "s.a:80");
    for (kind, name) in [
        (Kind::HttpRoute, "HTTPRoute"),
        (Kind::TcpRoute, "TCPRoute"),
        (Kind::TlsRoute, "TLSRoute"),
    ] {
        assert_eq!(of(&mesh, name), "-");
        let told = status(&mesh, kind, &name.to_lowercase());
        assert_eq!(told, "[s: !Accepted:Conflicted ResolvedRefs]");
    }
    // Where only some ports are taken, the others remain.
    let mesh = attach(&[("HTTPRoute", S), ("GRPCRoute", s81)]);
    assert_eq!(
        (of(&mesh, "HTTPRoute"), of(&mesh, "GRPCRoute")),
        ("s.a:80".into(), "s.a:81".into())
    );
    // A TCPRoute for every port is for those that are declared so, or not at all.
    let mesh = attach(&[("HTTPRoute", S), ("TCPRoute", S)]);
    assert_eq!(
        (of(&mesh, "HTTPRoute"), of(&mesh, "TCPRoute")),
        ("s.a:0".into(), "s.a:82".into())
    );
    // Those of another namespace are for other callers.
    let consumer = route(
        "HTTPRoute",
        "c",
        "r",
        "{group: '', kind: Service, name: s, namespace: a}",
        "{}",
    );
    let mesh =
        crate::harness::mesh(&(shop("a") + &consumer + &route("GRPCRoute", "a", "g", S, TO_B)));
    assert_eq!(parents(&mesh, "a/w", "HTTPRoute/c/r"), "s.a:0");
}

/// Gateway API, `backendRefs`: what cannot be used answers 500 with its share.
#[test]
fn backends_and_their_status() {
    let grant = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: z}\nspec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}], to: [{group: '', kind: Service, name: open}]}\n";
    let others = service("z", "open", "{port: 80}")
        + &service("z", "shut", "{port: 80}")
        + grant
        + "---\napiVersion: v1\nkind: Service\nmetadata: {name: alias, namespace: a}\nspec: {type: ExternalName, externalName: x.example, ports: [{port: 80}]}\n";
    let table = [
        ("{name: b, port: 80}", "b.a:80*1", "ResolvedRefs"),
        ("{name: b, port: 80, weight: 0}", "b.a:80*0", "ResolvedRefs"),
        (
            "{name: missing, port: 80, weight: 3}",
            "!*3",
            "!ResolvedRefs:BackendNotFound",
        ),
        (
            "{name: b, port: 81}",
            "!*1",
            "!ResolvedRefs:BackendNotFound",
        ),
        (
            "{name: alias, port: 80}",
            "!*1",
            "!ResolvedRefs:InvalidKind",
        ),
        ("{kind: Pod, name: b}", "!*1", "!ResolvedRefs:InvalidKind"),
        (
            "{group: x.example, kind: Service, name: b}",
            "!*1",
            "!ResolvedRefs:InvalidKind",
        ),
        (
            "{name: open, namespace: z, port: 80}",
            "open.z:80*1",
            "ResolvedRefs",
        ),
        (
            "{name: shut, namespace: z, port: 80}",
            "!*1",
            "!ResolvedRefs:RefNotPermitted",
        ),
        (
            "{name: missing, namespace: z, port: 80}",
            "!*1",
            "!ResolvedRefs:RefNotPermitted",
        ),
        (
            "{name: b, port: 80}, {name: missing, port: 80}",
            "b.a:80*1 !*1",
            "!ResolvedRefs:BackendNotFound",
        ),
    ];
    for (refs, expected, told) in table {
        let rule = format!("{{backendRefs: [{refs}]}}");
        let mesh = mesh(&(shop("a") + &others + &route("HTTPRoute", "a", "r", S, &rule)));
        let wire::route::Kind::Http(rules) = find(&mesh, "a/w", "HTTPRoute/a/r")
            .unwrap()
            .kind
            .as_ref()
            .unwrap()
        else {
            panic!("not HTTP")
        };
        let backends = rules.rules[0].backends.iter().map(|backend| {
            let to = match backend.to.as_ref().unwrap() {
                wire::backend::To::Service(to) => {
                    let host = &to.service.as_ref().unwrap().hostname;
                    format!(
                        "{}:{}",
                        host.strip_suffix(".svc.cluster.local").unwrap(),
                        to.port
                    )
                }
                wire::backend::To::Invalid(_) => "!".into(),
            };
            format!("{to}*{}", backend.weight)
        });
        assert_eq!(backends.collect::<Vec<_>>().join(" "), expected, "{refs}");
        let told = format!("[s: Accepted {told}]");
        assert_eq!(status(&mesh, Kind::HttpRoute, "r"), told, "{refs}");
    }
}

/// A consumer's route may send what is addressed to a service of others to that service, and to
/// no other of its namespace (the Gateway API suite's MeshConsumerRoute).
#[test]
fn a_consumer_route_needs_no_grant_for_its_own_parent() {
    let own = "{group: '', kind: Service, name: s, namespace: a}";
    // What is addressed to the other parent would go there too.
    let and_another = "{group: '', kind: Service, name: s, namespace: a}, {group: '', kind: Service, name: b, namespace: a}";
    let at_two_ports = "{group: '', kind: Service, name: s, namespace: a, port: 80}, {group: '', kind: Service, name: s, namespace: a, port: 81}";
    for (parents, name, failing) in [
        (own, "s", None),
        (own, "b", Some("RefNotPermitted")),
        (at_two_ports, "s", None),
        (and_another, "s", Some("RefNotPermitted")),
    ] {
        let rule = format!("{{backendRefs: [{{name: {name}, namespace: a, port: 80}}]}}");
        let mesh = mesh(&(shop("a") + &shop("c") + &route("HTTPRoute", "c", "r", parents, &rule)));
        let found = find(&mesh, "a/w", "HTTPRoute/c/r").unwrap();
        let wire::route::Kind::Http(rules) = found.kind.as_ref().unwrap() else {
            panic!("not HTTP")
        };
        let to = rules.rules[0].backends[0].to.as_ref().unwrap();
        let invalid = matches!(to, wire::backend::To::Invalid(_));
        assert_eq!(invalid, failing.is_some(), "{parents} {name}: {to:?}");
    }
}

/// What cannot be understood is said, field by field, and what it matches is answered with
/// an error; the other rules hold.
#[test]
fn invalid_rules_fail_closed_and_name_the_field() {
    let table = [
        (
            "{matches: [{path: {value: x}}]}",
            "spec.rules[1].matches[0].path.value",
        ),
        (
            "{matches: [{path: {type: Glob, value: /x}}]}",
            "spec.rules[1].matches[0].path.type",
        ),
        (
            "{matches: [{path: {type: RegularExpression, value: '('}}]}",
            "spec.rules[1].matches[0].path.value",
        ),
        (
            "{matches: [{path: {value: /a/../b}}]}",
            "spec.rules[1].matches[0].path.value",
        ),
        (
            "{matches: [{method: get}]}",
            "spec.rules[1].matches[0].method",
        ),
        (
            "{matches: [{headers: [{name: 'a b', value: x}]}]}",
            "spec.rules[1].matches[0].headers[0].name",
        ),
        (
            "{matches: [{header: []}]}",
            "spec.rules[1].matches[0].header",
        ),
        (
            "{filters: [{type: Teapot}]}",
            "spec.rules[1].filters[0].type",
        ),
        (
            "{filters: [{type: ExtensionRef, extensionRef: {}}]}",
            "spec.rules[1].filters[0].type",
        ),
        (
            "{filters: [{type: ExternalAuth}]}",
            "spec.rules[1].filters[0].externalAuth",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, http: {}}}]}",
            "spec.rules[1].filters[0].externalAuth.backendRef",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {backendRef: {name: b, port: 80}, http: {}}}]}",
            "spec.rules[1].filters[0].externalAuth.protocol",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: TCP, backendRef: {name: b, port: 80}}}]}",
            "spec.rules[1].filters[0].externalAuth.protocol",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: b, port: 80}}}]}",
            "spec.rules[1].filters[0].externalAuth.grpc",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}}}]}",
            "spec.rules[1].filters[0].externalAuth.http",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: b, port: 80}, http: {}}}]}",
            "spec.rules[1].filters[0].externalAuth.http",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, grpc: {}, http: {}}}]}",
            "spec.rules[1].filters[0].externalAuth.grpc",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, http: {}, backendRef: {name: b}}}]}",
            "spec.rules[1].filters[0].externalAuth.backendRef.port",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, http: {}, backendRef: {name: b, port: 80, weight: 1}}}]}",
            "spec.rules[1].filters[0].externalAuth.backendRef.weight",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {path: check}}}]}",
            "spec.rules[1].filters[0].externalAuth.http.path",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {path: '/check?a=b'}}}]}",
            "spec.rules[1].filters[0].externalAuth.http.path",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {path: /check%2}}}]}",
            "spec.rules[1].filters[0].externalAuth.http.path",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {path: /check/..}}}]}",
            "spec.rules[1].filters[0].externalAuth.http.path",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {allowedHeaders: [a, 'b c']}}}]}",
            "spec.rules[1].filters[0].externalAuth.http.allowedHeaders[1]",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {allowedResponseHeaders: ['x-*']}}}]}",
            "spec.rules[1].filters[0].externalAuth.http.allowedResponseHeaders[0]",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: b, port: 80}, grpc: {allowedHeaders: ['']}}}]}",
            "spec.rules[1].filters[0].externalAuth.grpc.allowedHeaders[0]",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: b, port: 80}, grpc: {path: /x}}}]}",
            "spec.rules[1].filters[0].externalAuth.grpc.path",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {}, forwardBody: {maxSize: -1}}}]}",
            "spec.rules[1].filters[0].externalAuth.forwardBody.maxSize",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {}, forwardBody: {maxSize: 16777217}}}]}",
            "spec.rules[1].filters[0].externalAuth.forwardBody.maxSize",
        ),
        (
            "{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {}}}, {type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: b, port: 80}, grpc: {}}}]}",
            "spec.rules[1].filters[1].type",
        ),
        (
            "{backendRefs: [{name: b, port: 80, filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: b, port: 80}, http: {}}}]}]}",
            "spec.rules[1].backendRefs[0].filters[0].type",
        ),
        (
            "{filters: [{type: URLRewrite}]}",
            "spec.rules[1].filters[0].urlRewrite",
        ),
        (
            "{matches: [{path: {type: Exact, value: /x}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]}",
            "spec.rules[1].filters[0].urlRewrite.path.type",
        ),
        (
            "{filters: [{type: RequestRedirect, requestRedirect: {statusCode: 200}}]}",
            "spec.rules[1].filters[0].requestRedirect.statusCode",
        ),
        (
            "{backendRefs: [{name: b, port: 80}], filters: [{type: RequestRedirect, requestRedirect: {}}]}",
            "spec.rules[1].backendRefs",
        ),
        (
            "{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: b, port: 80}, percent: 101}}]}",
            "spec.rules[1].filters[0].requestMirror.percent",
        ),
        (
            "{backendRefs: [{name: b, port: 80, filters: [{type: RequestRedirect, requestRedirect: {}}]}]}",
            "spec.rules[1].backendRefs[0].filters[0].type",
        ),
        (
            "{backendRefs: [{name: b}]}",
            "spec.rules[1].backendRefs[0].port",
        ),
        (
            "{backendRefs: [{name: b, port: 80, weight: -1}]}",
            "spec.rules[1].backendRefs[0].weight",
        ),
        (
            "{timeouts: {request: 1m1}}",
            "spec.rules[1].timeouts.request",
        ),
        (
            "{timeouts: {request: 1s, backendRequest: 2s}}",
            "spec.rules[1].timeouts.backendRequest",
        ),
        ("{retry: {codes: [200]}}", "spec.rules[1].retry.codes[0]"),
        ("{retry: {attempts: -1}}", "spec.rules[1].retry.attempts"),
        (
            "{sessionPersistence: {type: Header}}",
            "spec.rules[1].sessionPersistence.header.name",
        ),
        ("{name: first}", "spec.rules[1].name"),
        ("[]", "spec.rules[1]"),
    ];
    for (rule, field) in table {
        let rules = format!("{{name: first, backendRefs: [{{name: b, port: 80}}]}}, {rule}");
        let yaml = shop("a") + &route("HTTPRoute", "a", "r", S, &rules);
        let (_, findings) = read(&yaml);
        let fields: Vec<&str> = findings.iter().map(|f| f.field.as_str()).collect();
        assert_eq!(fields, [field], "{rule}: {findings:?}");
        assert!(findings[0].line > 1 && findings[0].object.is_some());
        let mesh = mesh(&yaml);
        let wire::route::Kind::Http(http) = find(&mesh, "a/w", "HTTPRoute/a/r")
            .unwrap()
            .kind
            .as_ref()
            .unwrap()
        else {
            panic!("not HTTP")
        };
        assert_eq!(http.rules[0].invalid, "", "{rule}");
        assert!(
            http.rules[1].invalid.starts_with(field),
            "{rule}: {:?}",
            http.rules[1].invalid
        );
        let told = status(&mesh, Kind::HttpRoute, "r");
        assert!(told.starts_with("[s: Accepted "), "{rule}: {told}");
        assert!(
            told.ends_with(" PartiallyInvalid:UnsupportedValue]"),
            "{rule}: {told}"
        );
    }
    // What is wrong with the whole is wrong with each rule.
    let whole = route("HTTPRoute", "a", "r", S, TO_B).replace("spec: {", "spec: {timeout: 1s, ");
    let mesh = mesh(&(shop("a") + &whole));
    let wire::route::Kind::Http(http) = find(&mesh, "a/w", "HTTPRoute/a/r")
        .unwrap()
        .kind
        .as_ref()
        .unwrap()
    else {
        panic!("not HTTP")
    };
    assert!(
        http.rules[0]
            .invalid
            .starts_with("spec.timeout: unknown field")
    );
    assert_eq!(
        status(&mesh, Kind::HttpRoute, "r"),
        "[s: !Accepted:UnsupportedValue ResolvedRefs]"
    );
}

/// `HTTPExternalAuthFilter`: what waypoints get of it, and what is said about the service.
#[test]
fn external_auth_and_its_service() {
    let grant = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: z}\nspec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}], to: [{group: '', kind: Service, name: open}]}\n";
    let others = shop("z") + &service("z", "open", "{port: 80}") + grant;
    let of_z = "{group: '', kind: Service, name: s, namespace: z}";
    let both = format!("{S}, {of_z}");
    let ok = None;
    for (parents, reference, reason) in [
        (S, "name: b", ok),
        (S, "name: missing", Some("BackendNotFound")),
        (S, "kind: Pod, name: b", Some("InvalidKind")),
        (S, "name: open, namespace: z", ok),
        (S, "name: b, namespace: z", Some("RefNotPermitted")),
        // A consumer's route: of the service's own namespace nobody is asked in the
        // waypoint's name, whatever else the route may refer to.
        (of_z, "name: b", ok),
        (of_z, "name: s, namespace: z", Some("RefNotPermitted")),
        (of_z, "name: open, namespace: z", Some("RefNotPermitted")),
        (&both, "name: open, namespace: z", Some("RefNotPermitted")),
    ] {
        let rule = format!(
            "{{backendRefs: [{{name: b, port: 80}}], filters: [{{type: ExternalAuth, externalAuth: {{protocol: HTTP, backendRef: {{{reference}, port: 80}}, http: {{path: /check, allowedHeaders: [X-A], allowedResponseHeaders: [x-b]}}, forwardBody: {{maxSize: 7}}}}}}]}}"
        );
        let yaml = shop("a") + &others + &route("HTTPRoute", "a", "r", parents, &rule);
        let (_, findings) = read(&yaml);
        assert!(findings.is_empty(), "{reference}: {findings:?}");
        let mesh = mesh(&yaml);
        let waypoint = if parents == of_z { "z/w" } else { "a/w" };
        let wire::route::Kind::Http(rules) = find(&mesh, waypoint, "HTTPRoute/a/r")
            .unwrap()
            .kind
            .as_ref()
            .unwrap()
        else {
            panic!("not HTTP")
        };
        let Some(wire::filter::Kind::ExternalAuth(auth)) = &rules.rules[0].filters[0].kind else {
            panic!("{rules:?}")
        };
        let http = wire::ExternalAuthHttp {
            path_prefix: "/check".into(),
            allowed_headers: vec!["X-A".into()],
            allowed_response_headers: vec!["x-b".into()],
        };
        assert_eq!(auth.body_max_bytes, 7);
        let protocol = wire::external_auth::Protocol::Http(http);
        assert_eq!(auth.protocol, Some(protocol));
        let to = auth.backend.as_ref().unwrap().to.as_ref().unwrap();
        let invalid = matches!(to, wire::backend::To::Invalid(_));
        assert_eq!(invalid, reason.is_some(), "{parents} {reference}: {to:?}");
        let told = match reason {
            None => "Accepted ResolvedRefs]".to_owned(),
            Some(reason) => format!("Accepted !ResolvedRefs:{reason}]"),
        };
        let shown = status(&mesh, Kind::HttpRoute, "r");
        assert!(shown.ends_with(&told), "{parents} {reference}: {shown}");
    }
    // Nothing of the body by default; and what is not a filter of GRPCRoutes.
    let grpc = "{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: b, port: 80}, grpc: {}, forwardBody: {maxSize: 0}}}]}";
    let mesh_of = |kind| mesh(&(shop("a") + &route(kind, "a", "r", S, grpc)));
    let http = mesh_of("HTTPRoute");
    assert_eq!(
        status(&http, Kind::HttpRoute, "r"),
        "[s: Accepted ResolvedRefs]"
    );
    let Some(wire::route::Kind::Http(rules)) = &find(&http, "a/w", "HTTPRoute/a/r").unwrap().kind
    else {
        panic!("not HTTP")
    };
    let Some(wire::filter::Kind::ExternalAuth(auth)) = &rules.rules[0].filters[0].kind else {
        panic!("{rules:?}")
    };
    assert_eq!(auth.body_max_bytes, 0);
    let nothing = wire::ExternalAuthGrpc::default();
    let protocol = wire::external_auth::Protocol::Grpc(nothing);
    assert_eq!(auth.protocol, Some(protocol));
    assert_eq!(
        status(&mesh_of("GRPCRoute"), Kind::GrpcRoute, "r"),
        "[s: !Accepted:UnsupportedValue ResolvedRefs]"
    );
}

/// Gateway API, BackendTLSPolicy: the oldest is in force, one for a port beside it.
#[test]
fn tls_towards_backends() {
    let policy = |name: &str, created: &str, target: &str, validation: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {{name: {name}, namespace: a, creationTimestamp: '{created}'}}\nspec: {{targetRefs: [{{group: '', kind: Service, name: b{target}}}], validation: {{hostname: b.example, {validation}}}}}\n"
        )
    };
    let system = "wellKnownCACertificates: System";
    let ca = rcgen::generate_simple_self_signed(vec!["x".into()])
        .unwrap()
        .cert
        .pem();
    let map = |name: &str, text: &str| {
        let text = text.replace('\n', "\\n");
        format!(
            "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: a}}\ndata: {{ca.crt: \"{text}\"}}\n"
        )
    };
    let refs = |names: &str| format!("caCertificateRefs: [{names}]");
    let good = "{group: '', kind: ConfigMap, name: good}";
    let bad = "{group: '', kind: ConfigMap, name: bad}";
    let missing = "{group: '', kind: Secret, name: none}";
    let yaml = shop("a")
        + &map("good", &ca)
        + &map("bad", "no PEM")
        + &policy("p-older", "2026-01-01T00:00:00Z", "", system)
        + &policy("newer", "2026-01-02T00:00:00Z", "", system)
        + &policy(
            "port",
            "2026-01-03T00:00:00Z",
            ", sectionName: http",
            &refs(good),
        )
        + &policy(
            "bad-port",
            "2026-01-03T00:00:00Z",
            ", sectionName: none",
            system,
        )
        + &policy(
            "half",
            "2026-01-03T00:00:00Z",
            "2",
            &refs(&format!("{bad}, {good}")),
        )
        + &service("a", "b2", "{port: 80}")
        + &policy("none", "2026-01-03T00:00:00Z", "3", &refs(missing))
        + &service("a", "b3", "{port: 80}")
        + &policy("wrong", "2026-01-03T00:00:00Z", "4", "foo: bar")
        + &service("a", "b4", "{port: 80}");
    let mesh = mesh(&yaml);
    for (name, told) in [
        ("p-older", "[b: Accepted ResolvedRefs]"),
        ("newer", "[b: !Accepted:Conflicted ResolvedRefs]"),
        ("port", "[b: Accepted ResolvedRefs]"),
        ("bad-port", "[b: !Accepted:TargetNotFound ResolvedRefs]"),
        (
            "half",
            "[b2: Accepted !ResolvedRefs:InvalidCACertificateRef]",
        ),
        (
            "none",
            "[b3: !Accepted:NoValidCACertificate !ResolvedRefs:InvalidCACertificateRef]",
        ),
        ("wrong", "[b4: !Accepted:Invalid ResolvedRefs]"),
    ] {
        assert_eq!(status(&mesh, Kind::BackendTlsPolicy, name), told, "{name}");
    }
    let sent: Vec<String> = mesh
        .compiled
        .waypoints
        .values()
        .filter_map(|resource| match &**resource {
            Resource::BackendTls(of) => Some(of),
            _ => None,
        })
        .map(|of| {
            let tls = of.tls.as_ref().unwrap();
            let target = &of.targets[0];
            format!(
                "{} {}{} {} {}",
                of.object.as_ref().unwrap().name,
                target.port,
                if target.rejected.is_empty() {
                    ""
                } else {
                    " rejected"
                },
                if tls.invalid.is_empty() {
                    "valid"
                } else {
                    "invalid"
                },
                if tls.system_roots {
                    "system"
                } else {
                    tls.ca_certificates.lines().next().unwrap_or("-")
                },
            )
        })
        .collect();
    assert_eq!(
        sent,
        [
            "bad-port 0 rejected valid system",
            "half 0 valid -----BEGIN CERTIFICATE-----",
            "newer 0 rejected valid system",
            "none 0 invalid -",
            "p-older 0 valid system",
            "port 80 valid -----BEGIN CERTIFICATE-----",
            "wrong 0 invalid -",
        ]
    );
}
