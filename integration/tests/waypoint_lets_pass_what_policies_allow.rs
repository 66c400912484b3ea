//! Policies at a waypoint: by target and by selector, with methods and paths, for the caller
//! whom ztunnel vouches for; tokens; and what is left of them for those who go past it.

use std::sync::Arc;

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Pod, SAMPLE_TOKEN, SharedMesh, TestMesh, pod, sample_waypoint};
use anyhow::ensure;

static MESH: SharedMesh = SharedMesh::new();

const ALICE: Pod<'_> = Pod {
    namespace: "mesh",
    name: "alice",
};
const BOB: Pod<'_> = Pod {
    namespace: "mesh",
    name: "bob",
};
const PORTS: &str = "{ name: http, port: 80, targetPort: 8080 }";
const IS_ALICE: &str = "from: [{ source: { principals: [cluster.local/ns/mesh/sa/alice] } }]";

const JUDGE: Pod<'_> = Pod {
    namespace: "mesh",
    name: "judge",
};
const KEEPER: Pod<'_> = Pod {
    namespace: "mesh",
    name: "keeper",
};
const PROVIDERS: &str = "
apiVersion: v1
kind: ConfigMap
metadata: { name: istio, namespace: istio-system }
data:
  mesh: |
    extensionProviders:
      - name: judge
        envoyExtAuthzHttp:
          service: judge.mesh.svc.cluster.local
          port: 80
          timeout: 2s
          includeRequestHeadersInCheck: [x-key]
          headersToUpstreamOnAllow: [x-judged]
          headersToDownstreamOnDeny: [x-why]
";

fn at(service: &str) -> String {
    format!("targetRefs: [{{ kind: Service, group: '', name: {service} }}]")
}

fn manifests() -> Manifest {
    let enrolled = "istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint";
    let mut all = Manifest::two_nodes()
        .namespace("mesh", enrolled)
        .namespace("closed", enrolled)
        .namespace("guarded", enrolled)
        .waypoint(pod("mesh/waypoint"), "service")
        .waypoint(pod("closed/waypoint"), "service")
        .waypoint(pod("guarded/waypoint"), "service")
        .client(ALICE, "node1", "alice")
        .client(BOB, "node1", "bob")
        .versioned(pod("mesh/echo"), "node2", "echo", "v1")
        .versioned(pod("mesh/picked"), "node2", "picked", "v1")
        .versioned(pod("closed/server"), "node2", "server", "v1")
        .versioned(pod("guarded/server"), "node2", "server", "v1")
        .service_of(pod("mesh/picked"), "", "app: picked", PORTS)
        .service_of(pod("closed/server"), "", "app: server", PORTS)
        .service_of(pod("guarded/server"), "", "app: server", PORTS);
    for name in ["open", "readers", "denied", "dry", "tokens", "asked"] {
        let service = Pod {
            namespace: "mesh",
            name,
        };
        all = all.service_of(service, "", "app: echo", PORTS);
    }
    let policies = [
        (
            "mesh",
            "readers",
            "",
            format!(
                "{{ {}, rules: [{{ {IS_ALICE}, to: [{{ operation: {{ methods: [GET], notPaths: \
                 [/private*] }} }}] }}] }}",
                at("readers")
            ),
        ),
        (
            "mesh",
            "denied",
            "",
            format!(
                "{{ {}, action: DENY, rules: [{{ {IS_ALICE}, to: [{{ operation: {{ paths: \
                 [/admin/*] }} }}], when: [{{ key: 'request.headers[x-admin]', notValues: ['yes'] \
                 }}] }}] }}",
                at("denied")
            ),
        ),
        (
            "mesh",
            "dry",
            "annotations: { istio.io/dry-run: 'true' }",
            format!("{{ {}, action: DENY, rules: [{{}}] }}", at("dry")),
        ),
        (
            "mesh",
            "picked",
            "",
            format!(
                "{{ selector: {{ matchLabels: {{ app: picked }} }}, rules: [{{ {IS_ALICE}, to: [{{ \
                 operation: {{ methods: [GET] }} }}] }}] }}"
            ),
        ),
        ("closed", "nothing", "", "{ }".to_owned()),
        (
            "closed",
            "alice",
            "",
            format!(
                "{{ selector: {{ matchLabels: {{ app: server }} }}, rules: [{{ {IS_ALICE} }}] }}"
            ),
        ),
        (
            "guarded",
            "gateway",
            "",
            format!(
                "{{ targetRefs: [{{ kind: Gateway, group: gateway.networking.k8s.io, name: \
                 waypoint }}], rules: [{{ {IS_ALICE} }}] }}"
            ),
        ),
        (
            "mesh",
            "asked",
            "",
            format!(
                "{{ {}, action: CUSTOM, provider: {{ name: nobody }}, rules: [{{ to: [{{ \
                 operation: {{ paths: [/asked] }} }}] }}] }}",
                at("asked")
            ),
        ),
    ];
    for (namespace, name, metadata, spec) in &policies {
        all = all.policy("AuthorizationPolicy", namespace, name, metadata, spec);
    }
    all = all
        .document(PROVIDERS)
        .pod(
            JUDGE,
            "node2",
            "judge",
            "app: judge",
            "{ name: pause, image: pause }",
        )
        .pod(
            KEEPER,
            "node1",
            "keeper",
            "app: keeper",
            "{ name: pause, image: pause }",
        )
        .service_of(pod("mesh/keeper"), "", "app: keeper", PORTS)
        .service_of(pod("mesh/kept"), "", "app: echo", PORTS)
        .route(
            "HTTPRoute",
            "mesh",
            "kept",
            "{ filters: [{ type: URLRewrite, urlRewrite: { path: { type: ReplaceFullPath, \
             replaceFullPath: /inner } } }, { type: ExternalAuth, externalAuth: { protocol: HTTP, \
             backendRef: { name: keeper, port: 80 }, http: { path: /check, allowedHeaders: \
             [x-key], allowedResponseHeaders: [x-kept] } } }], backendRefs: [{ name: kept, port: \
             80 }] }",
        )
        .service_of(pod("mesh/judge"), "", "app: judge", PORTS)
        .service_of(pod("mesh/judged"), "", "app: echo", PORTS)
        .policy(
            "AuthorizationPolicy",
            "mesh",
            "judged",
            "",
            &format!(
                "{{ {}, action: CUSTOM, provider: {{ name: judge }}, rules: [{{ to: [{{ operation: \
                 {{ paths: [/judged/*] }} }}] }}] }}",
                at("judged")
            ),
        );
    let jwt = sample_waypoint("jwt.yaml")
        .replace("namespace: shop", "namespace: mesh")
        .replace("name: reviews }", "name: tokens }");
    all.document(jwt.trim_start_matches("---"))
}

fn mesh() -> anyhow::Result<Arc<TestMesh>> {
    MESH.get(|| {
        let all = manifests();
        let mesh = MeshBuilder::default()
            .files(&[("all.yaml", all.yaml())])
            .up()?;
        for namespace in ["mesh", "closed", "guarded"] {
            mesh.wait_waypoint(&format!("waypoint.{namespace}"))?;
        }
        for service in [
            "open.mesh",
            "picked.mesh",
            "server.closed",
            "server.guarded",
        ] {
            mesh.wait_bound(&format!("{service}.svc.cluster.local"), true)?;
        }
        Ok(mesh)
    })
}

/// The status that each caller gets; 403 is the waypoint's own.
fn answers(mesh: &TestMesh, cases: &[(Pod<'_>, &str, &[&str], u16)]) -> anyhow::Result<()> {
    for (from, url, options, status) in cases {
        mesh.asks(*from, url, options, |answer| {
            answer.has_status(*status)?;
            ensure!(
                answer.server.is_some() == (*status == 200),
                "who answered? {answer:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_policy_of_a_service_knows_the_caller_the_method_and_the_path() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let post: &[&str] = &["-X", "POST"];
    answers(
        &mesh,
        &[
            (ALICE, "http://readers.mesh/", &[], 200),
            (BOB, "http://readers.mesh/", &[], 403),
            (ALICE, "http://readers.mesh/", post, 403),
            (ALICE, "http://readers.mesh/private", &[], 403),
            // Another spelling of the same.
            (ALICE, "http://readers.mesh//private", &[], 403),
            (ALICE, "http://readers.mesh/a/../private", &[], 403),
            (BOB, "http://open.mesh/", post, 200),
            (ALICE, "http://denied.mesh/admin/x", &[], 403),
            (
                ALICE,
                "http://denied.mesh/admin/x",
                &["-H", "x-admin: yes"],
                200,
            ),
            (ALICE, "http://denied.mesh/other", &[], 200),
            (BOB, "http://denied.mesh/admin/x", &[], 200),
        ],
    )?;
    // Who one is does not stand in a header.
    let claimed = "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/mesh/sa/alice";
    answers(
        &mesh,
        &[(BOB, "http://readers.mesh/", &["-H", claimed], 403)],
    )
}

#[test]
fn a_policy_by_selector_holds_at_the_waypoint_and_past_it() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let post: &[&str] = &["-X", "POST"];
    answers(
        &mesh,
        &[
            (ALICE, "http://picked.mesh/", &[], 200),
            (ALICE, "http://picked.mesh/", post, 403),
            (BOB, "http://picked.mesh/", &[], 403),
        ],
    )?;
    // The destination's ztunnel cannot read methods, so nothing is allowed by that rule.
    let target = mesh.at(pod("mesh/picked"), 8080)?;
    for from in [ALICE, BOB] {
        let outcome = mesh.http_get(from, target)?;
        assert!(outcome.is_denied(), "{outcome:?}");
    }
    Ok(())
}

#[test]
fn all_denied_but_one_caller_works_with_a_waypoint_between() -> anyhow::Result<()> {
    let mesh = mesh()?;
    answers(
        &mesh,
        &[
            (ALICE, "http://server.closed/", &[], 200),
            (BOB, "http://server.closed/", &[], 403),
        ],
    )?;
    // And as before where the waypoint is gone past.
    let target = mesh.at(pod("closed/server"), 8080)?;
    assert!(mesh.http_get(ALICE, target)?.is_ok());
    let outcome = mesh.http_get(BOB, target)?;
    assert!(outcome.is_denied(), "{outcome:?}");
    Ok(())
}

#[test]
fn a_policy_of_the_gateway_is_for_all_that_it_serves() -> anyhow::Result<()> {
    let mesh = mesh()?;
    answers(
        &mesh,
        &[
            (ALICE, "http://server.guarded/", &[], 200),
            (BOB, "http://server.guarded/", &[], 403),
        ],
    )
}

#[test]
fn a_token_opens_what_is_closed() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://tokens.mesh/";
    let bearer = format!("authorization: Bearer {}", SAMPLE_TOKEN.trim());
    let changed = format!("{}AAAA", &bearer[..bearer.len() - 4]);
    answers(
        &mesh,
        &[
            (ALICE, url, &["-X", "POST", "-H", &bearer], 200),
            (ALICE, url, &["-X", "POST"], 403),
            (ALICE, url, &["-X", "GET", "-H", &bearer], 403),
            (ALICE, url, &["-X", "POST", "-H", &changed], 401),
            (
                ALICE,
                url,
                &["-X", "POST", "-H", "authorization: Bearer nonsense"],
                401,
            ),
        ],
    )
}

#[test]
fn a_dry_run_denies_nobody_and_an_unknown_provider_everybody() -> anyhow::Result<()> {
    let mesh = mesh()?;
    answers(
        &mesh,
        &[
            (ALICE, "http://dry.mesh/", &[], 200),
            (ALICE, "http://asked.mesh/asked", &[], 403),
            (ALICE, "http://asked.mesh/other", &[], 200),
        ],
    )?;
    // What it would have done is told.
    mesh.eventually("the log of the dry run", || {
        let log = std::fs::read_to_string(mesh.component_log("waypoint.mesh")?)?;
        ensure!(log.contains("dry-run policy"), "nothing of it");
        Ok(())
    })
}

#[test]
fn an_external_authorizer_is_asked_and_obeyed() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://judged.mesh/judged/a?b=c";
    // Nobody answers there yet: closed.
    mesh.asks(ALICE, url, &[], |answer| answer.has_status(403))?;
    let app = mesh.http_app(JUDGE, 8080, |asked| match asked.header("x-key") {
        Some("good") => (200, vec![("x-judged", "well".into())], String::new()),
        _ => (401, vec![("x-why", "key".into())], "no key".into()),
    })?;
    let answer = mesh.asks(ALICE, url, &["-H", "x-key: good"], |answer| {
        answer.has_status(200)
    })?;
    assert_eq!(
        answer.received("x-judged").as_deref(),
        Some("well"),
        "{answer:?}"
    );
    let answer = mesh.ask(ALICE, url, &["-H", "x-key: bad"])?;
    answer.has_status(401)?;
    assert_eq!(answer.server, None, "{answer:?}");
    assert_eq!(answer.header("x-why").as_deref(), Some("key"), "{answer:?}");
    assert!(app.count("/judged/a?b=c") >= 2, "{:?}", app.requests());
    // What the policy does not name is not asked about.
    mesh.ask(ALICE, "http://judged.mesh/free", &[])?
        .has_status(200)?;
    assert_eq!(app.count("/free"), 0, "{:?}", app.requests());
    Ok(())
}

/// The same by a route: the filter ExternalAuth of the Gateway API.
#[test]
fn a_routes_external_authorization_is_asked_and_obeyed() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://kept.mesh/a?b=c";
    // Nobody answers there yet: closed.
    mesh.asks(ALICE, url, &[], |answer| answer.has_status(403))?;
    let app = mesh.http_app(KEEPER, 8080, |asked| match asked.header("x-key") {
        Some("good") => (200, vec![("x-kept", "well".into())], String::new()),
        _ => (401, vec![("x-why", "key".into())], "no key".into()),
    })?;
    let answer = mesh.asks(ALICE, url, &["-H", "x-key: good"], |answer| {
        answer.has_status(200)
    })?;
    assert_eq!(
        answer.received("x-kept").as_deref(),
        Some("well"),
        "{answer:?}"
    );
    let answer = mesh.ask(ALICE, url, &["-H", "x-key: bad"])?;
    answer.has_status(401)?;
    assert_eq!(answer.server, None, "{answer:?}");
    assert_eq!(answer.header("x-why").as_deref(), Some("key"), "{answer:?}");
    // As the request came, before the rewrite.
    assert!(app.count("/check/a?b=c") >= 2, "{:?}", app.requests());
    Ok(())
}
