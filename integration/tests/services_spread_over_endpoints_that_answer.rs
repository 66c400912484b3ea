//! What a Service address comes to: every ready endpoint gets its share, near ones first where
//! that is asked for, one that does not answer is replaced before the app notices, and where
//! nobody can answer the app is told at once.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Outcome, Pod, TestMesh, pod};

/// How often each server answered; every call has to be answered.
fn spread(
    mesh: &TestMesh,
    from: Pod<'_>,
    target: SocketAddr,
    calls: usize,
) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut servers = BTreeMap::new();
    for index in 0..calls {
        match mesh.http_get(from, target)? {
            Outcome::Answered(200, server) => *servers.entry(server).or_default() += 1,
            other => anyhow::bail!("call {index} of {calls}: {other:?}"),
        }
    }
    Ok(servers)
}

fn mesh() -> anyhow::Result<TestMesh> {
    let all = Manifest::two_nodes()
        .ambient("shop")
        .namespace("out", "")
        .client(pod("shop/client"), "node1", "client")
        .server(pod("shop/web-a"), "node1", "web", "web")
        .server(pod("shop/web-b"), "node2", "web", "web")
        .service(pod("shop/web"), "web", "ipFamilyPolicy: PreferDualStack")
        // Two endpoints, one of which has nobody at the port.
        .server(pod("shop/half"), "node1", "web", "half")
        .pod(
            pod("shop/half-dead"),
            "node2",
            "web",
            "app: half",
            "{ name: pause, image: pause }",
        )
        .service(pod("shop/half"), "half", "")
        .server(pod("out/half"), "node1", "web", "half")
        .pod(
            pod("out/half-dead"),
            "node2",
            "web",
            "app: half",
            "{ name: pause, image: pause }",
        )
        .service(pod("out/half"), "half", "")
        // Nobody at all.
        .pod(
            pod("shop/dead"),
            "node2",
            "web",
            "app: dead",
            "{ name: pause, image: pause }",
        )
        .service(pod("shop/dead"), "dead", "")
        .service(pod("shop/empty"), "nobody-has-this", "")
        .document(
            "apiVersion: v1\nkind: Service\nmetadata: { name: headless, namespace: shop }\nspec: { \
             clusterIP: None, selector: { app: web }, ports: [{ name: http, port: 8080 }] }",
        )
        .document(
            "apiVersion: v1\nkind: Service\nmetadata: { name: bare, namespace: shop }\nspec: { \
             ports: [{ name: http, port: 80, targetPort: 8080 }] }",
        )
        // A port by its name, which one of the pods does not have.
        .pod(
            pod("shop/named"),
            "node2",
            "web",
            "app: named",
            "{ name: s, image: adit-sample, command: [adit-sample, serve], ports: [{ name: www, \
             containerPort: 8080 }] }",
        )
        .pod(
            pod("shop/nameless"),
            "node1",
            "web",
            "app: named",
            "{ name: s, image: adit-sample, command: [adit-sample, serve] }",
        )
        .document(
            "apiVersion: v1\nkind: Service\nmetadata: { name: named, namespace: shop }\nspec: { \
             selector: { app: named }, ports: [{ name: http, port: 80, targetPort: www }] }",
        );
    MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()
}

#[test]
fn every_kind_of_service_comes_to_the_right_pods() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let client = pod("shop/client");

    // Both endpoints, by either family.
    for vip in mesh.vips("shop", "web")? {
        let servers = spread(&mesh, client, SocketAddr::new(vip, 80), 60)?;
        assert_eq!(servers.len(), 2, "{vip}: {servers:?}");
        assert!(
            servers.values().all(|count| *count >= 12),
            "{vip}: {servers:?}"
        );
    }

    // The app does not notice the endpoint that does not answer.
    for (namespace, name) in [("shop", "half"), ("out", "half")] {
        let retries = |mesh: &TestMesh| -> anyhow::Result<f64> {
            Ok(mesh
                .metrics("node1")?
                .sum("adit_endpoint_retries_total", &[]))
        };
        let before = retries(&mesh)?;
        let target = mesh.service(namespace, name, 80)?;
        let servers = spread(&mesh, client, target, 40)?;
        assert_eq!(servers.get("half"), Some(&40), "{namespace}: {servers:?}");
        assert!(retries(&mesh)? > before, "{namespace}: retries are counted");
    }

    // Nobody answers: the app hears of it at once.
    for (name, port) in [("dead", 80), ("empty", 80), ("web", 81)] {
        let target = mesh.service("shop", name, port)?;
        let begin = Instant::now();
        let outcome = mesh.http_get(client, target)?;
        assert!(outcome.is_denied(), "{name}:{port}: {outcome:?}");
        assert!(
            begin.elapsed() < Duration::from_secs(2),
            "{name}: {:?}",
            begin.elapsed()
        );
    }
    let line = mesh.access_line("node1", |l| l.get("dst.service").starts_with("empty."))?;
    assert!(!line.get("error").is_empty(), "{line:?}");

    // Headless: the name stands for the pods.
    let calls = mesh.calls(client, "http://headless.shop:8080/", 5)?;
    assert!(
        calls
            .iter()
            .all(|c| c.ok().is_some_and(|s| s.starts_with("web-"))),
        "{calls:?}"
    );

    // Only the pod that has the named port.
    let servers = spread(&mesh, client, mesh.service("shop", "named", 80)?, 20)?;
    assert_eq!(servers.get("named"), Some(&20), "{servers:?}");

    // Endpoints by hand: one that is a pod of the mesh, then one that is not.
    for target in [pod("shop/web-b"), pod("out/half")] {
        let address = mesh.address(target)?;
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{ name: bare-1, \
             namespace: shop, labels: {{ kubernetes.io/service-name: bare }} }}\naddressType: \
             IPv4\nendpoints: [{{ addresses: [{address}], conditions: {{ ready: true }} }}]\n\
             ports: [{{ name: http, port: 8080 }}]\n"
        );
        mesh.apply("slice.yaml", &slice)?;
        let vip = mesh.service("shop", "bare", 80)?;
        mesh.eventually("the endpoint", || {
            let outcome = mesh.http_get(client, vip)?;
            let expected = Outcome::Answered(200, target.name.to_owned());
            anyhow::ensure!(outcome == expected, "{outcome:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn near_endpoints_come_first_and_far_ones_when_those_are_gone() -> anyhow::Result<()> {
    // A pod is ready as long as its file is there.
    let files = tempfile::tempdir()?;
    let ready = |name: &str| files.path().join(name);
    let server = |name: &str| {
        format!(
            "{{ name: s, image: adit-sample, command: [adit-sample, serve], readinessProbe: {{ exec: {{ \
             command: [test, -e, {}] }}, periodSeconds: 1, failureThreshold: 1 }} }}",
            ready(name).display()
        )
    };
    for name in ["web-a", "web-b"] {
        std::fs::write(ready(name), "")?;
    }
    let all = Manifest::two_nodes()
        .ambient("shop")
        .client(pod("shop/near-a"), "node1", "client")
        .client(pod("shop/near-b"), "node2", "client")
        .pod(
            pod("shop/web-a"),
            "node1",
            "web",
            "app: web",
            &server("web-a"),
        )
        .pod(
            pod("shop/web-b"),
            "node2",
            "web",
            "app: web",
            &server("web-b"),
        )
        .service(pod("shop/web"), "web", "trafficDistribution: PreferClose");
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()?;
    let target = mesh.service("shop", "web", 80)?;
    let all_at = |from: &str, server: &str| -> anyhow::Result<()> {
        let servers = spread(&mesh, pod(from), target, 20)?;
        anyhow::ensure!(servers.get(server) == Some(&20), "{from}: {servers:?}");
        Ok(())
    };
    all_at("shop/near-a", "web-a")?;
    all_at("shop/near-b", "web-b")?;
    let caller = mesh.caller(pod("shop/near-a"), "http://web.shop/", 5)?;
    std::fs::remove_file(ready("web-a"))?;
    mesh.eventually("failover", || all_at("shop/near-a", "web-b"))?;
    std::fs::write(ready("web-a"), "")?;
    mesh.eventually("the way back", || all_at("shop/near-a", "web-a"))?;
    let calls = caller.stop();
    let failed: Vec<_> = calls.iter().filter(|c| c.ok().is_none()).collect();
    assert!(
        failed.is_empty(),
        "{} of {} failed: {:?}",
        failed.len(),
        calls.len(),
        failed[0]
    );
    // Nobody is ready: refused, not sent to whom is not ready.
    for name in ["web-a", "web-b"] {
        std::fs::remove_file(ready(name))?;
    }
    mesh.eventually("nobody", || {
        let outcome = mesh.http_get(pod("shop/near-a"), target)?;
        anyhow::ensure!(outcome.is_denied(), "{outcome:?}");
        Ok(())
    })
}
