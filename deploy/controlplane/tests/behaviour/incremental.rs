//! A change of one object is a change of one resource.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use adit_controlplane::compile::l7::WaypointName;
use adit_controlplane::compile::{Compiler, MeshConfig, Redirections};
use adit_controlplane::serve::ResourceSnapshot;
use adit_controlplane::source::Directory;
use adit_shared::proto::waypoint::TYPES;
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use adit_shared::xds::{Change, ResourceSet};
use tempfile::TempDir;

struct Plane {
    directory: TempDir,
    source: Directory,
    compiler: Compiler,
    snapshot: ResourceSnapshot,
}

impl Plane {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            source: Directory::new(vec![directory.path().into()]),
            directory,
            compiler: Compiler::new(MeshConfig::default()),
            snapshot: ResourceSnapshot::default(),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Compiles what changed; says what is different, as `type +name` and `type -name`,
    /// with the waypoint for its own types.
    fn update(&mut self) -> Vec<String> {
        self.source.reload();
        let mut edit = self.snapshot.edit();
        let objects = self.source.objects();
        self.compiler
            .update(objects, &Redirections::default(), &mut edit);
        let before = std::mem::replace(&mut self.snapshot, edit.build());
        let mut found = Vec::new();
        for url in [ADDRESS_TYPE, AUTHORIZATION_TYPE].iter().chain(&TYPES) {
            let sets = (before.resources(url), self.snapshot.resources(url));
            differences("", url, sets, &mut found);
            for namespace in ["a", "b"] {
                let waypoint = WaypointName {
                    namespace: namespace.into(),
                    name: "w".into(),
                };
                let sets = (
                    before.of_waypoint(&waypoint, url),
                    self.snapshot.of_waypoint(&waypoint, url),
                );
                differences(namespace, url, sets, &mut found);
            }
        }
        found
    }

    fn write(&mut self, name: &str, text: &str) -> Vec<String> {
        fs::write(self.file(name), text).unwrap();
        self.update()
    }

    fn remove(&mut self, name: &str) -> Vec<String> {
        fs::remove_file(self.file(name)).unwrap();
        self.update()
    }
}

fn differences(
    waypoint: &str,
    url: &str,
    (before, now): (Option<&ResourceSet>, Option<&ResourceSet>),
    found: &mut Vec<String>,
) {
    let nothing = ResourceSet::default();
    let now = now.unwrap_or(&nothing);
    let kind = url.rsplit('.').next().unwrap();
    for change in now.changes_since(before.unwrap_or(&nothing)) {
        found.push(match change {
            Change::Updated(name, _) => format!("{waypoint} {kind} +{name}"),
            Change::Removed(name) => format!("{waypoint} {kind} -{name}"),
        });
    }
}

/// A namespace with a waypoint and a service `s`.
fn shop(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/use-waypoint: w}}}}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: w, namespace: {name}}}\nspec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: w, namespace: {name}, labels: {{gateway.networking.k8s.io/gateway-name: w, gateway.istio.io/managed: istio.io-mesh-controller}}}}\nspec: {{clusterIP: 10.96.9.1, ports: [{{port: 15008, name: mesh}}]}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: {name}}}\nspec: {{ports: [{{port: 80, name: http}}]}}\n"
    )
}

fn route(namespace: &str, name: &str, service: &str, path: &str, backend: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{parentRefs: [{{group: '', kind: Service, name: {service}}}], rules: [{{matches: [{{path: {{value: {path}}}}}], backendRefs: [{{name: {backend}, port: 80}}]}}]}}\n"
    )
}

#[test]
fn a_changed_route_is_one_resource() {
    let mut plane = Plane::new();
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: z, namespace: z}\nspec: {ports: [{port: 80, name: http}]}\n";
    plane.write("a.yaml", &shop("a"));
    plane.write("b.yaml", &shop("b"));
    plane.write("z.yaml", service);
    let added = plane.write("r1.yaml", &route("a", "r1", "s", "/1", "s"));
    assert_eq!(added, ["a Route +HTTPRoute/a/r1"]);
    plane.write("r2.yaml", &route("a", "r2", "s", "/2", "z, namespace: z"));
    let changed = plane.write("r1.yaml", &route("a", "r1", "s", "/one", "s"));
    assert_eq!(changed, ["a Route +HTTPRoute/a/r1"]);
    // What a reference leads to is in another namespace.
    let grant = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: z}\nspec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}], to: [{group: '', kind: Service}]}\n";
    let granted = plane.write("grant.yaml", grant);
    assert_eq!(granted, ["a Route +HTTPRoute/a/r2"]);
    let withdrawn = plane.remove("grant.yaml");
    assert_eq!(withdrawn, ["a Route +HTTPRoute/a/r2"]);
    // A consumer's route, and then not any more.
    let theirs = route("b", "r3", "s, namespace: a", "/3", "s");
    assert_eq!(plane.write("r3.yaml", &theirs), ["a Route +HTTPRoute/b/r3"]);
    let moved = plane.write("r3.yaml", &route("b", "r3", "s", "/3", "s"));
    assert_eq!(
        moved,
        ["a Route -HTTPRoute/b/r3", "b Route +HTTPRoute/b/r3"]
    );
    assert_eq!(plane.remove("r1.yaml"), ["a Route -HTTPRoute/a/r1"]);
    assert_eq!(plane.update(), [""; 0]);
}

/// What belongs to a backend goes to whoever sends there, for as long as somebody does.
#[test]
fn what_a_backend_brings_along_stays_while_anybody_sends_there() {
    let mut plane = Plane::new();
    plane.write("a.yaml", &shop("a"));
    plane.write("b.yaml", &shop("b"));
    plane.write("z.yaml", "---\napiVersion: v1\nkind: Service\nmetadata: {name: z, namespace: z}\nspec: {ports: [{port: 80, name: http}]}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: z}\nspec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}, {group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: b}], to: [{group: '', kind: Service}]}\n");
    let tls = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {name: t, namespace: z}\nspec: {targetRefs: [{group: '', kind: Service, name: z}], validation: {hostname: z.example, wellKnownCACertificates: System}}\n";
    assert_eq!(plane.write("tls.yaml", tls), [""; 0], "nobody sends there");
    let to_z = "z, namespace: z";
    let first = plane.write("r1.yaml", &route("a", "r1", "s", "/1", to_z));
    let given = "a BackendTls +BackendTLSPolicy/z/t";
    assert_eq!(first, [given, "a Route +HTTPRoute/a/r1"]);
    // Of another namespace, at the same waypoint.
    let second = plane.write("r2.yaml", &route("b", "r2", "s, namespace: a", "/2", to_z));
    assert_eq!(second, ["a Route +HTTPRoute/b/r2"]);
    assert_eq!(plane.remove("r1.yaml"), ["a Route -HTTPRoute/a/r1"]);
    let changed = plane.write("tls.yaml", &tls.replace("z.example", "y.example"));
    assert_eq!(changed, [given]);
    let last = plane.remove("r2.yaml");
    assert_eq!(
        last,
        [
            "a BackendTls -BackendTLSPolicy/z/t",
            "a Route -HTTPRoute/b/r2"
        ]
    );
}

#[test]
fn a_waypoint_comes_and_goes() {
    let mut plane = Plane::new();
    plane.write("a.yaml", &shop("a"));
    let gone = plane.write(
        "a.yaml",
        &shop("a").replace("{istio.io/use-waypoint: w}", "{}"),
    );
    assert_eq!(
        gone,
        [
            "Address +a/s.a.svc.cluster.local",
            "a Service -a/s.a.svc.cluster.local"
        ]
        .map(|line| if line.starts_with('A') {
            format!(" {line}")
        } else {
            line.into()
        })
    );
    let back = plane.write("a.yaml", &shop("a"));
    assert_eq!(back.len(), 2, "{back:?}");
    let all = plane.remove("a.yaml");
    let removed: BTreeMap<_, _> = all.iter().map(|line| (line.clone(), ())).collect();
    assert_eq!(removed.len(), 4, "{all:?}");
    assert!(all.iter().all(|line| line.contains(" -")), "{all:?}");
}

/// One object of a user is one resource, also of policies, rules and telemetry.
#[test]
fn a_changed_policy_is_one_resource() {
    let mut plane = Plane::new();
    plane.write("a.yaml", &shop("a"));
    plane.write("b.yaml", &shop("b"));
    let object = |api: &str, kind: &str, spec: &str| {
        format!(
            "---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: o, namespace: a}}\nspec: {spec}\n"
        )
    };
    let target = "targetRefs: [{kind: Service, name: s}]";
    for (api, kind, before, after, named) in [
        (
            "security.istio.io/v1",
            "AuthorizationPolicy",
            format!("{{{target}}}"),
            format!("{{{target}, rules: [{{}}]}}"),
            "AuthorizationPolicy",
        ),
        (
            "security.istio.io/v1",
            "RequestAuthentication",
            format!("{{{target}}}"),
            format!("{{{target}, jwtRules: [{{issuer: i}}]}}"),
            "RequestAuthentication",
        ),
        (
            "telemetry.istio.io/v1",
            "Telemetry",
            format!("{{{target}}}"),
            format!("{{{target}, accessLogging: [{{disabled: true}}]}}"),
            "Telemetry",
        ),
        (
            "networking.istio.io/v1",
            "DestinationRule",
            "{host: s}".into(),
            "{host: s, trafficPolicy: {loadBalancer: {simple: RANDOM}}}".into(),
            "TrafficPolicy",
        ),
    ] {
        let given = format!("a {named} +{kind}/a/o");
        assert_eq!(
            plane.write("o.yaml", &object(api, kind, &before)),
            [given.as_str()]
        );
        assert_eq!(
            plane.write("o.yaml", &object(api, kind, &after)),
            [given.as_str()]
        );
        let gone = format!("a {named} -{kind}/a/o");
        assert_eq!(plane.remove("o.yaml"), [gone]);
    }
    let map = |text: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: '{text}'}}\n"
        )
    };
    let logged = plane.write("m.yaml", &map("accessLogFile: /dev/stdout"));
    assert_eq!(logged, [" Settings +mesh"]);
    let provided = "extensionProviders: [{name: p, prometheus: {}}]";
    let provided = plane.write("m.yaml", &map(provided));
    assert_eq!(provided, [" Settings +mesh", " Provider +p"]);
    assert_eq!(plane.remove("m.yaml"), [" Provider -p"]);
}

/// The last good version of a route stays in force when an edit breaks it.
#[test]
fn a_broken_edit_changes_nothing() {
    let mut plane = Plane::new();
    plane.write("a.yaml", &shop("a"));
    plane.write("r.yaml", &route("a", "r", "s", "/1", "s"));
    let broken = plane.write("r.yaml", &route("a", "r", "s", "nonsense", "s"));
    assert_eq!(broken, [""; 0]);
    assert_eq!(plane.source.findings().len(), 1);
    // One that was never good is in force, and fails.
    let new = plane.write("q.yaml", &route("a", "q", "s", "nonsense", "s"));
    assert_eq!(new, ["a Route +HTTPRoute/a/q"]);
}

#[test]
fn five_thousand_routes() {
    let mut plane = Plane::new();
    plane.write("a.yaml", &shop("a"));
    let mut all = String::new();
    for index in 0..5_000 {
        write!(
            all,
            "{}",
            route("a", &format!("r{index}"), "s", &format!("/{index}"), "s")
        )
        .unwrap();
    }
    let start = Instant::now();
    assert_eq!(plane.write("all.yaml", &all).len(), 5_000);
    let full = start.elapsed();
    fs::write(plane.file("one.yaml"), route("a", "one", "s", "/one", "s")).unwrap();
    plane.source.reload();
    let start = Instant::now();
    let mut edit = plane.snapshot.edit();
    plane
        .compiler
        .update(plane.source.objects(), &Redirections::default(), &mut edit);
    let small = start.elapsed();
    println!("reading and compiling all {full:?}, compiling after one change {small:?}");
    assert!(small < Duration::from_secs(2), "{small:?}");
}
