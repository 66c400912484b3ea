//! The mesh cases of the Gateway API's conformance suite, as behaviours of routes whose parent
//! is a Service. They share one mesh: every behaviour has a service of its own, and all
//! services have the same endpoints.

use std::sync::Arc;

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Pod, SharedMesh, TestMesh, pod};
use anyhow::{Context, ensure};

static MESH: SharedMesh = SharedMesh::new();

const CLIENT: Pod<'_> = Pod {
    namespace: "mesh",
    name: "client",
};
const CONSUMER: Pod<'_> = Pod {
    namespace: "consumer",
    name: "client",
};
const PORTS: &str = "{ name: http, port: 80, targetPort: 8080 }, { name: http-alt, port: 8080, \
                     targetPort: 8080 }, { name: grpc, port: 7070, targetPort: 8080 }";
/// Who adds this header to an answer is the route.
const MARK: &str = "filters: [{ type: ResponseHeaderModifier, responseHeaderModifier: { set: [{ \
                    name: x-mark, value: set }] } }]";

/// A service per behaviour; its HTTPRoute.
const HTTP: &[(&str, &str)] = &[
    (
        "matching",
        "{ matches: [{ path: { type: PathPrefix, value: / } }, { headers: [{ name: version, value: \
         one }] }], backendRefs: [{ name: v1, port: 80 }] },
         { matches: [{ path: { type: PathPrefix, value: /v2 } }, { headers: [{ name: version, \
         value: two }] }], backendRefs: [{ name: v2, port: 80 }] }",
    ),
    (
        "split",
        "{ matches: [{ path: { type: Exact, value: /v1 } }], backendRefs: [{ name: v1, port: 80 }] },
         { matches: [{ path: { type: Exact, value: /v2 } }], backendRefs: [{ name: v2, port: 80 }] }",
    ),
    (
        "weight",
        "{ backendRefs: [{ name: v1, port: 80, weight: 70 }, { name: v2, port: 80, weight: 30 }, \
         { name: nowhere, port: 80, weight: 0 }] }",
    ),
    (
        "modified",
        "{ matches: [{ path: { type: PathPrefix, value: /set } }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { set: [{ name: X-Header-Set, value: \
         set-overwrites-values }] } }], backendRefs: [{ name: v1, port: 80 }] },
         { matches: [{ path: { type: PathPrefix, value: /add } }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { add: [{ name: X-Header-Add, value: \
         add-appends-values }] } }], backendRefs: [{ name: v1, port: 80 }] },
         { matches: [{ path: { type: PathPrefix, value: /remove } }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { remove: [X-Header-Remove] } }], \
         backendRefs: [{ name: v1, port: 80 }] },
         { matches: [{ path: { type: PathPrefix, value: /multiple } }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { set: [{ name: X-Set-1, value: set-1 }, { \
         name: X-Set-2, value: set-2 }], add: [{ name: X-Add-1, value: add-1 }, { name: X-Add-2, \
         value: add-2 }], remove: [X-Remove-1, X-Remove-2] } }], backendRefs: [{ name: v1, port: 80 \
         }] },
         { matches: [{ path: { type: PathPrefix, value: /case } }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { set: [{ name: x-HEADER-set, value: \
         lower }], add: [{ name: X-hEADER-aDD, value: lower }], remove: [x-header-REMOVE] } }], \
         backendRefs: [{ name: v1, port: 80 }] }",
    ),
    (
        "per-backend",
        "{ matches: [{ path: { type: PathPrefix, value: /one } }], backendRefs: [{ name: v1, port: \
         80, filters: [{ type: RequestHeaderModifier, requestHeaderModifier: { set: [{ name: \
         x-backend, value: one }], add: [{ name: x-added, value: one }], remove: [x-gone] } }] }] },
         { backendRefs: [{ name: v1, port: 80, filters: [{ type: RequestHeaderModifier, \
         requestHeaderModifier: { set: [{ name: x-backend, value: one }] } }] }, { name: v2, port: \
         80, filters: [{ type: RequestHeaderModifier, requestHeaderModifier: { set: [{ name: \
         x-backend, value: two }] } }] }] }",
    ),
    (
        "query",
        "{ matches: [{ queryParams: [{ name: animal, value: whale }] }], backendRefs: [{ name: v1, \
         port: 80 }] },
         { matches: [{ queryParams: [{ name: animal, value: dolphin }] }], backendRefs: [{ name: \
         v2, port: 80 }] },
         { matches: [{ queryParams: [{ name: animal, value: dolphin }, { name: color, value: blue \
         }] }], backendRefs: [{ name: v1, port: 80 }] },
         { matches: [{ queryParams: [{ name: ANIMAL, value: Whale }] }], backendRefs: [{ name: v2, \
         port: 80 }] },
         { matches: [{ path: { type: PathPrefix, value: /path }, queryParams: [{ name: animal, \
         value: whale }] }, { headers: [{ name: version, value: two }], queryParams: [{ name: \
         animal, value: shark }] }], backendRefs: [{ name: v2, port: 80 }] }",
    ),
    (
        "redirect",
        "{ matches: [{ path: { value: /host-and-status } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { hostname: example.org, statusCode: 301 } }] },
         { matches: [{ path: { value: /host } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { hostname: example.org } }] },
         { matches: [{ path: { value: /prefix } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { path: { type: ReplacePrefixMatch, replacePrefixMatch: /new } } }] },
         { matches: [{ path: { value: /full } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { path: { type: ReplaceFullPath, replaceFullPath: /full-path } } }] },
         { matches: [{ path: { value: /port } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { port: 8083 } }] },
         { matches: [{ path: { value: /scheme } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { scheme: https } }] },
         { matches: [{ path: { value: /both } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { scheme: https, port: 8443, hostname: example.org } }] },
         { matches: [{ path: { value: /303 } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { hostname: example.org, statusCode: 303 } }] },
         { matches: [{ path: { value: /307 } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { hostname: example.org, statusCode: 307 } }] },
         { matches: [{ path: { value: /308 } }], filters: [{ type: RequestRedirect, \
         requestRedirect: { hostname: example.org, statusCode: 308 } }] }",
    ),
    (
        "rewrite",
        "{ matches: [{ path: { value: /prefix/one } }], filters: [{ type: URLRewrite, urlRewrite: { \
         path: { type: ReplacePrefixMatch, replacePrefixMatch: /one } } }], backendRefs: [{ name: \
         v1, port: 80 }] },
         { matches: [{ path: { value: /strip-prefix } }], filters: [{ type: URLRewrite, urlRewrite: \
         { path: { type: ReplacePrefixMatch, replacePrefixMatch: / } } }], backendRefs: [{ name: \
         v1, port: 80 }] },
         { matches: [{ path: { value: /full } }], filters: [{ type: URLRewrite, urlRewrite: { path: \
         { type: ReplaceFullPath, replaceFullPath: /replaced }, hostname: other.example } }], \
         backendRefs: [{ name: v1, port: 80 }] },
         { matches: [{ path: { value: /headers } }], filters: [{ type: URLRewrite, urlRewrite: { \
         path: { type: ReplacePrefixMatch, replacePrefixMatch: /plain } } }, { type: \
         RequestHeaderModifier, requestHeaderModifier: { set: [{ name: x-header-set, value: here \
         }] } }], backendRefs: [{ name: v2, port: 80 }] }",
    ),
    (
        "named",
        "{ name: named-rule, matches: [{ path: { value: / } }], backendRefs: [{ name: v1, port: 80 \
         }] },
         { matches: [{ path: { value: /unnamed } }], backendRefs: [{ name: v2, port: 80 }] }",
    ),
    (
        "broken",
        "{ matches: [{ path: { value: /missing } }], backendRefs: [{ name: nowhere, port: 80 }] },
         { matches: [{ path: { value: /port } }], backendRefs: [{ name: v1, port: 81 }] },
         { matches: [{ path: { value: /kind } }], backendRefs: [{ group: example.org, kind: \
         Cloud, name: v1 }] },
         { matches: [{ path: { value: /other-namespace } }], backendRefs: [{ name: private, \
         namespace: consumer, port: 80 }] },
         { matches: [{ path: { value: /half } }], backendRefs: [{ name: v1, port: 80, weight: 1 }, { \
         name: nowhere, port: 80, weight: 1 }] }",
    ),
];

/// The GRPCRoutes.
const GRPC: &[(&str, &str)] = &[
    (
        "grpc-weight",
        "{ backendRefs: [{ name: v1, port: 7070, weight: 70 }, { name: v2, port: 7070, weight: 30 \
         }] }",
    ),
    (
        "grpc-modified",
        "{ matches: [{ headers: [{ name: x-test-case, value: set }] }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { set: [{ name: X-Header-Set, value: \
         set-overwrites-values }] } }], backendRefs: [{ name: v1, port: 7070 }] },
         { matches: [{ headers: [{ name: x-test-case, value: add }] }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { add: [{ name: X-Header-Add, value: \
         add-appends-values }] } }], backendRefs: [{ name: v1, port: 7070 }] },
         { matches: [{ headers: [{ name: x-test-case, value: remove }] }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { remove: [X-Header-Remove] } }], \
         backendRefs: [{ name: v2, port: 7070 }] },
         { matches: [{ headers: [{ name: x-test-case, value: all }] }], filters: [{ type: \
         RequestHeaderModifier, requestHeaderModifier: { set: [{ name: X-Header-Set, value: set }], \
         add: [{ name: X-Header-Add, value: add }], remove: [X-Header-Remove] } }], backendRefs: [{ \
         name: v2, port: 7070 }] }",
    ),
    (
        "grpc-methods",
        "{ matches: [{ method: { service: adit.samples.v1.Other } }], backendRefs: [{ name: v1, \
         port: 7070 }] },
         { matches: [{ headers: [{ name: broken, value: 'yes' }] }], backendRefs: [{ name: nowhere, \
         port: 7070 }] }",
    ),
];

fn manifests() -> Manifest {
    let mut all = Manifest::two_nodes()
        .namespace(
            "mesh",
            "istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint",
        )
        .ambient("consumer")
        .waypoint(pod("mesh/waypoint"), "service")
        .client(CLIENT, "node1", "client")
        .client(CONSUMER, "node2", "client")
        .versioned(pod("mesh/echo-v1"), "node1", "echo", "v1")
        .versioned(pod("mesh/echo-v2"), "node2", "echo", "v2")
        .service_of(
            pod("mesh/v1"),
            "",
            "app: echo, version: v1",
            "{ name: http, port: 80, targetPort: 8080 }, { name: grpc, port: 7070, targetPort: \
             8080 }",
        )
        .service_of(
            pod("mesh/v2"),
            "",
            "app: echo, version: v2",
            "{ name: http, port: 80, targetPort: 8080 }, { name: grpc, port: 7070, targetPort: \
             8080 }",
        )
        .service_of(
            pod("consumer/private"),
            "",
            "app: none",
            "{ name: http, port: 80, targetPort: 8080 }",
        );
    for name in ["plain", "frontend", "ports", "consumed"] {
        all = all.service_of(
            Pod {
                namespace: "mesh",
                name,
            },
            "",
            "app: echo",
            PORTS,
        );
    }
    for (kind, routes) in [("HTTPRoute", HTTP), ("GRPCRoute", GRPC)] {
        for (name, rules) in routes {
            let service = Pod {
                namespace: "mesh",
                name,
            };
            all = all.service_of(service, "", "app: echo", PORTS);
            all = all.route(kind, "mesh", name, rules);
        }
    }
    let mark = |value: &str, backend: &str| {
        format!(
            "{{ filters: [{{ type: ResponseHeaderModifier, responseHeaderModifier: {{ add: [{{ \
             name: x-mark, value: {value} }}] }} }}], backendRefs: [{backend}] }}"
        )
    };
    all.route(
        "HTTPRoute",
        "mesh",
        "frontend",
        &format!("{{ {MARK}, backendRefs: [{{ name: v1, port: 80 }}] }}"),
    )
    .route_of(
        "HTTPRoute",
        "mesh",
        "ports-80",
        "{ group: '', kind: Service, name: ports, port: 80 }",
        &mark("eighty", "{ name: v1, port: 80 }"),
    )
    .route_of(
        "HTTPRoute",
        "mesh",
        "every-port",
        "{ group: '', kind: Service, name: named-ports }",
        &mark("every", "{ name: v1, port: 80 }"),
    )
    .service_of(pod("mesh/named-ports"), "", "app: echo", PORTS)
    .route_of(
        "HTTPRoute",
        "consumer",
        "consumed",
        "{ group: '', kind: Service, name: consumed, namespace: mesh }",
        // No backend: the service itself.
        &mark("consumer", ""),
    )
}

fn mesh() -> anyhow::Result<Arc<TestMesh>> {
    MESH.get(|| {
        let all = manifests();
        let mesh = MeshBuilder::default()
            .files(&[("all.yaml", all.yaml())])
            .up()?;
        mesh.wait_waypoint("waypoint.mesh")?;
        for (name, _) in HTTP.iter().chain(GRPC) {
            mesh.wait_bound(&format!("{name}.mesh.svc.cluster.local"), true)?;
        }
        Ok(mesh)
    })
}

/// GETs of a service's paths with options, and the version that must answer.
fn answered_by(
    mesh: &TestMesh,
    service: &str,
    cases: &[(&str, &[&str], &str)],
) -> anyhow::Result<()> {
    for (path, options, version) in cases {
        let url = format!("http://{service}.mesh{path}");
        mesh.asks(CLIENT, &url, options, |answer| answer.is_of(version))?;
    }
    Ok(())
}

/// 30 % to the second version, within five standard deviations.
fn is_three_in_ten(count: u64, of: u64) -> anyhow::Result<()> {
    let deviation = (of as f64 * 0.3 * 0.7).sqrt();
    let expected = of as f64 * 0.3;
    ensure!(
        (count as f64 - expected).abs() < 5.0 * deviation,
        "{count} of {of}"
    );
    Ok(())
}

#[test]
fn without_a_route_every_endpoint_answers() -> anyhow::Result<()> {
    let mesh = mesh()?;
    mesh.asks(CLIENT, "http://plain.mesh/", &[], |a| a.has_status(200))?;
    let counted = mesh.requests(CLIENT, "http://plain.mesh/", &["-n", "200", "-c", "8"])?;
    assert_eq!(counted.status("200"), 200, "{counted:?}");
    assert_eq!(counted.servers.len(), 2, "{counted:?}");
    Ok(())
}

#[test]
fn the_most_specific_of_paths_and_headers_wins() -> anyhow::Result<()> {
    let one: &[&str] = &["-H", "Version: one"];
    let two: &[&str] = &["-H", "Version: two"];
    let cases: &[(&str, &[&str], &str)] = &[
        ("/", &[], "v1"),
        ("/example", &[], "v1"),
        ("/", one, "v1"),
        ("/v2", &[], "v2"),
        // The longer path is more than the header.
        ("/v2", one, "v2"),
        ("/v2/", &[], "v2"),
        ("/v2/example", &[], "v2"),
        ("/", two, "v2"),
        ("/v2example", &[], "v1"),
        ("/foo/v2/example", &[], "v1"),
    ];
    answered_by(&*mesh()?, "matching", cases)?;
    let cases: &[(&str, &[&str], &str)] = &[("/v1", &[], "v1"), ("/v2", &[], "v2")];
    answered_by(&*mesh()?, "split", cases)
}

#[test]
fn weights_hold_for_the_requests_of_one_connection() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://weight.mesh/";
    mesh.asks(CLIENT, url, &[], |a| a.has_status(200))?;
    let counted = mesh.requests(CLIENT, url, &["-n", "1000"])?;
    assert_eq!(counted.status("200"), 1000, "{counted:?}");
    assert_eq!(counted.connections_opened, 1, "{counted:?}");
    is_three_in_ten(counted.version("v2"), 1000)?;
    let counted = mesh.requests(CLIENT, url, &["-n", "1000", "--http2", "-c", "4"])?;
    assert_eq!(counted.status("200"), 1000, "{counted:?}");
    is_three_in_ten(counted.version("v2"), 1000)
}

#[test]
fn request_headers_are_set_added_and_removed() -> anyhow::Result<()> {
    let mesh = mesh()?;
    type Headers<'a> = &'a [(&'a str, Option<&'a str>)];
    let cases: &[(&str, &[&str], Headers<'_>)] = &[
        (
            "modified.mesh/set",
            &["Some-Other-Header: val"],
            &[
                ("some-other-header", Some("val")),
                ("x-header-set", Some("set-overwrites-values")),
            ],
        ),
        (
            "modified.mesh/set",
            &["X-Header-Set: some-value"],
            &[("x-header-set", Some("set-overwrites-values"))],
        ),
        (
            "modified.mesh/add",
            &[],
            &[("x-header-add", Some("add-appends-values"))],
        ),
        (
            "modified.mesh/add",
            &["X-Header-Add: some-value"],
            &[("x-header-add", Some("some-value,add-appends-values"))],
        ),
        (
            "modified.mesh/remove",
            &["X-Header-Remove: val"],
            &[("x-header-remove", None)],
        ),
        (
            "modified.mesh/multiple",
            &[
                "X-Set-1: old",
                "X-Add-1: old",
                "X-Remove-1: old",
                "X-Remove-2: old",
                "Another: val",
            ],
            &[
                ("x-set-1", Some("set-1")),
                ("x-set-2", Some("set-2")),
                ("x-add-1", Some("old,add-1")),
                ("x-add-2", Some("add-2")),
                ("x-remove-1", None),
                ("x-remove-2", None),
                ("another", Some("val")),
            ],
        ),
        (
            "modified.mesh/case",
            &[
                "X-Header-Set: old",
                "X-Header-Add: old",
                "X-Header-Remove: old",
            ],
            &[
                ("x-header-set", Some("lower")),
                ("x-header-add", Some("old,lower")),
                ("x-header-remove", None),
            ],
        ),
        (
            "per-backend.mesh/one",
            &["X-Backend: old", "X-Added: old", "X-Gone: old"],
            &[
                ("x-backend", Some("one")),
                ("x-added", Some("old,one")),
                ("x-gone", None),
            ],
        ),
    ];
    for (target, sent, expected) in cases {
        let mut options = Vec::new();
        for header in *sent {
            options.extend(["-H", *header]);
        }
        mesh.asks(CLIENT, &format!("http://{target}"), &options, |answer| {
            answer.is_of("v1")?;
            for (name, value) in *expected {
                let found = answer.received(name);
                ensure!(found.as_deref() == *value, "{name}: {found:?}");
            }
            Ok(())
        })?;
    }
    // Each backend has its own.
    for _ in 0..10 {
        let answer = mesh.ask(CLIENT, "http://per-backend.mesh/any", &[])?;
        let expected = match answer.version.as_deref() {
            Some("v1") => "one",
            _ => "two",
        };
        assert_eq!(
            answer.received("x-backend").as_deref(),
            Some(expected),
            "{answer:?}"
        );
    }
    Ok(())
}

#[test]
fn query_parameters_choose_and_what_no_rule_matches_is_not_found() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let two: &[&str] = &["-H", "version: two"];
    let cases: &[(&str, &[&str], &str)] = &[
        ("/?animal=whale", &[], "v1"),
        ("/?animal=dolphin", &[], "v2"),
        ("/?animal=dolphin&color=blue", &[], "v1"),
        ("/?color=blue&animal=dolphin", &[], "v1"),
        ("/?animal=dolphin&color=red", &[], "v2"),
        ("/?ANIMAL=Whale", &[], "v2"),
        ("/path?animal=whale", &[], "v2"),
        ("/?animal=shark", two, "v2"),
        // The first of several counts.
        ("/?animal=whale&otherparam=irrelevant", &[], "v1"),
    ];
    answered_by(&mesh, "query", cases)?;
    for path in [
        "/",
        "/?animal=",
        "/?animal=Whale",
        "/?animal=shark",
        "/?animal=hamster&name=whale",
    ] {
        let url = format!("http://query.mesh{path}");
        let answer = mesh.ask(CLIENT, &url, &[])?;
        answer.has_status(404)?;
        assert_eq!(answer.server, None, "{answer:?}");
    }
    Ok(())
}

#[test]
fn redirects_say_where_to() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let host = "http://redirect.mesh";
    let cases = [
        (
            "/host-and-status",
            301,
            "http://example.org/host-and-status",
        ),
        ("/host?a=b", 302, "http://example.org/host?a=b"),
        (
            "/prefix/lemon?a=b",
            302,
            "http://redirect.mesh/new/lemon?a=b",
        ),
        ("/full/path", 302, "http://redirect.mesh/full-path"),
        ("/port", 302, "http://redirect.mesh:8083/port"),
        ("/scheme", 302, "https://redirect.mesh/scheme"),
        ("/both", 302, "https://example.org:8443/both"),
        ("/303", 303, "http://example.org/303"),
        ("/307", 307, "http://example.org/307"),
        ("/308", 308, "http://example.org/308"),
    ];
    for (path, status, location) in cases {
        mesh.asks(CLIENT, &format!("{host}{path}"), &[], |answer| {
            answer.has_status(status)?;
            let found = answer.header("location");
            ensure!(found.as_deref() == Some(location), "{path}: {found:?}");
            Ok(())
        })?;
    }
    // The port that was dialled stays, where nothing else is said.
    let answer = mesh.ask(CLIENT, "http://redirect.mesh:8080/prefix", &[])?;
    let location = answer.header("location");
    assert_eq!(location.as_deref(), Some("http://redirect.mesh:8080/new"));
    Ok(())
}

#[test]
fn paths_and_hosts_are_rewritten() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let cases = [
        ("/prefix/one/two?a=b", "v1", "/one/two?a=b"),
        ("/strip-prefix/three", "v1", "/three"),
        ("/strip-prefix", "v1", "/"),
        ("/full/path?a=b", "v1", "/replaced?a=b"),
        ("/headers/x", "v2", "/plain/x"),
    ];
    for (path, version, seen) in cases {
        mesh.asks(
            CLIENT,
            &format!("http://rewrite.mesh{path}"),
            &[],
            |answer| {
                answer.is_of(version)?;
                ensure!(answer.path() == seen, "{path}: {:?}", answer.path());
                Ok(())
            },
        )?;
    }
    let answer = mesh.ask(CLIENT, "http://rewrite.mesh/full", &[])?;
    assert_eq!(answer.received("host").as_deref(), Some("other.example"));
    let answer = mesh.ask(CLIENT, "http://rewrite.mesh/headers", &["-H", "x-kept: 1"])?;
    assert_eq!(answer.received("x-header-set").as_deref(), Some("here"));
    assert_eq!(answer.received("x-kept").as_deref(), Some("1"));
    Ok(())
}

#[test]
fn a_rule_may_have_a_name() -> anyhow::Result<()> {
    let cases: &[(&str, &[&str], &str)] = &[("/", &[], "v1"), ("/unnamed", &[], "v2")];
    answered_by(&*mesh()?, "named", cases)
}

#[test]
fn a_route_is_for_the_service_that_was_dialled_and_not_for_its_pods() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let marked = |url: &str, options: &[&str]| -> anyhow::Result<bool> {
        let answer = mesh.ask(CLIENT, url, options)?;
        answer.has_status(200)?;
        Ok(answer.header("x-mark").is_some())
    };
    mesh.asks(CLIENT, "http://frontend.mesh/", &[], |answer| {
        ensure!(
            answer.header("x-mark").as_deref() == Some("set"),
            "{answer:?}"
        );
        Ok(())
    })?;
    // Whatever the Host header says.
    let other = ["-H", "host: plain.mesh"];
    assert!(marked("http://frontend.mesh/", &other)?);
    assert!(marked(
        "http://frontend.mesh/",
        &["-H", "host: nowhere.example:99"]
    )?);
    let other = ["-H", "host: frontend.mesh"];
    assert!(!marked("http://plain.mesh/", &other)?);
    // Past the service, there is neither its route nor its waypoint.
    let direct = format!("http://{}:8080/", mesh.address(pod("mesh/echo-v2"))?);
    let answer = mesh.ask(CLIENT, &direct, &["-H", "host: frontend.mesh"])?;
    answer.is_of("v2")?;
    assert_eq!(answer.header("x-mark"), None, "{answer:?}");
    assert_eq!(
        answer.answer["identity"],
        serde_json::Value::Null,
        "{answer:?}"
    );
    // As a backend a service is its endpoints, and not what its own routes make of it.
    let counted = mesh.requests(CLIENT, "http://v2.mesh/", &["-n", "20"])?;
    assert_eq!(counted.version("v2"), 20, "{counted:?}");
    Ok(())
}

#[test]
fn a_parent_with_a_port_is_that_port_only() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let cases = [
        ("http://ports.mesh/", Some("eighty")),
        ("http://ports.mesh:8080/", None),
        ("http://named-ports.mesh/", Some("every")),
        ("http://named-ports.mesh:8080/", Some("every")),
    ];
    for (url, mark) in cases {
        mesh.asks(CLIENT, url, &[], |answer| {
            answer.has_status(200)?;
            let found = answer.header("x-mark");
            ensure!(found.as_deref() == mark, "{url}: {found:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_route_of_the_consumer_is_for_its_own_namespace_only() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://consumed.mesh/";
    mesh.asks(CONSUMER, url, &[], |answer| {
        answer.has_status(200)?;
        let found = answer.header("x-mark");
        ensure!(found.as_deref() == Some("consumer"), "{answer:?}");
        Ok(())
    })?;
    let answer = mesh.ask(CLIENT, url, &[])?;
    answer.has_status(200)?;
    assert_eq!(answer.header("x-mark"), None, "{answer:?}");
    Ok(())
}

#[test]
fn backends_that_are_not_there_are_errors_of_their_share() -> anyhow::Result<()> {
    let mesh = mesh()?;
    for path in ["/missing", "/port", "/kind", "/other-namespace"] {
        let url = format!("http://broken.mesh{path}");
        mesh.asks(CLIENT, &url, &[], |answer| answer.has_status(500))?;
    }
    let counted = mesh.requests(CLIENT, "http://broken.mesh/half", &["-n", "200"])?;
    let (good, bad) = (counted.status("200"), counted.status("500"));
    // Five standard deviations of a fair coin.
    assert!(good + bad == 200 && good.abs_diff(100) < 36, "{counted:?}");
    mesh.ask(CLIENT, "http://broken.mesh/", &[])?
        .has_status(404)
}

#[test]
fn grpc_has_weights_and_header_modifiers() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://grpc-weight.mesh:7070";
    let counted = mesh.eventually("the route", || {
        let counted = mesh.requests(CLIENT, url, &["--grpc", "-n", "500"])?;
        ensure!(counted.status("0") == 500, "{counted:?}");
        Ok(counted)
    })?;
    is_three_in_ten(counted.version("v2"), 500)?;
    let from_v2 = pod("mesh/echo-v2");
    type Headers<'a> = &'a [(&'a str, Option<&'a str>)];
    let cases: &[(Pod<'_>, &str, &str, Headers<'_>)] = &[
        (
            CLIENT,
            "set",
            "v1",
            &[
                ("x-header-set", Some("set-overwrites-values")),
                ("x-header-add", Some("old")),
            ],
        ),
        (
            CLIENT,
            "add",
            "v1",
            &[("x-header-add", Some("old,add-appends-values"))],
        ),
        (CLIENT, "remove", "v2", &[("x-header-remove", None)]),
        (
            from_v2,
            "all",
            "v2",
            &[
                ("x-header-set", Some("set")),
                ("x-header-add", Some("old,add")),
                ("x-header-remove", None),
            ],
        ),
    ];
    for (from, case, version, expected) in cases {
        let case = format!("x-test-case: {case}");
        let mut options = vec!["-H", case.as_str()];
        for header in [
            "X-Header-Set: old",
            "X-Header-Add: old",
            "X-Header-Remove: old",
        ] {
            options.extend(["-H", header]);
        }
        mesh.eventually(&case, || {
            let answer = mesh.ask_grpc(*from, "http://grpc-modified.mesh:7070", &options)?;
            answer.has_status(0)?;
            ensure!(answer.version.as_deref() == Some(*version), "{answer:?}");
            for (name, value) in *expected {
                let found = answer.received(name);
                ensure!(found.as_deref() == *value, "{name}: {found:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn grpc_that_no_rule_matches_is_unimplemented() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://grpc-methods.mesh:7070";
    mesh.eventually("the route", || {
        let answer = mesh.ask_grpc(CLIENT, url, &[])?;
        answer.has_status(12)
    })?;
    let answer = mesh.ask_grpc(CLIENT, url, &["-H", "broken: yes"])?;
    // What gRPC makes of a 500 (gRPC over HTTP/2: the mapping of HTTP statuses).
    ensure!(matches!(answer.status, Some(2 | 13 | 14)), "{answer:?}");
    let status = answer.status.context("no status")?;
    assert_ne!(status, 0);
    Ok(())
}
