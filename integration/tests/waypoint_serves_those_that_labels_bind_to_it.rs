//! Which waypoint traffic takes, or none: the labels of services, pods and namespaces decide,
//! and the address that the client dials. Each case says who answered the server: the pod whose
//! address it saw.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Pod, SharedMesh, TestMesh, pod};
use anyhow::{Context, ensure};

static MESH: SharedMesh = SharedMesh::new();

const CLIENT: Pod<'_> = Pod {
    namespace: "bound",
    name: "client",
};
const STRANGER: Pod<'_> = Pod {
    namespace: "outside",
    name: "client",
};
const PORTS: &str = "{ name: http, port: 80, targetPort: 8080 }";

fn manifests() -> Manifest {
    let bound = "istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint";
    let whole = "istio.io/dataplane-mode: ambient, istio.io/use-waypoint: all";
    let container = "{ name: server, image: adit-sample, command: [adit-sample, serve], ports: [{ \
                     name: http, containerPort: 8080 }], readinessProbe: { httpGet: { path: \
                     /healthz, port: 8080 }, periodSeconds: 1 } }";
    let mut all = Manifest::two_nodes()
        .namespace("bound", bound)
        .namespace("whole", whole)
        .namespace("outside", "")
        .waypoint(pod("bound/waypoint"), "service")
        .waypoint(pod("bound/second"), "service")
        .waypoint(pod("bound/pods"), "workload")
        .waypoint(pod("whole/all"), "all")
        .client(CLIENT, "node1", "client")
        .client(STRANGER, "node2", "client")
        .versioned(pod("bound/echo"), "node2", "echo", "v1")
        .pod(
            pod("bound/chosen"),
            "node1",
            "echo",
            "app: chosen, istio.io/use-waypoint: pods",
            container,
        )
        .versioned(pod("whole/server"), "node2", "server", "v1")
        .pod(
            pod("whole/opted-out"),
            "node1",
            "echo",
            "app: opted-out, istio.io/use-waypoint: none",
            container,
        );
    for (name, label) in [
        ("plain", ""),
        ("own", "istio.io/use-waypoint: second"),
        ("off", "istio.io/use-waypoint: none"),
        ("lost", "istio.io/use-waypoint: missing"),
        ("routed", ""),
    ] {
        let service = Pod {
            namespace: "bound",
            name,
        };
        all = all.service_of(service, label, "app: echo", PORTS);
    }
    all.service_of(pod("whole/server"), "", "app: server", PORTS)
        .service_of(
            pod("whole/loose"),
            "istio.io/use-waypoint: none",
            "app: server",
            PORTS,
        )
        .service_of(pod("whole/opted-out"), "", "app: opted-out", PORTS)
        .route(
            "HTTPRoute",
            "bound",
            "routed",
            "{ backendRefs: [{ name: server, namespace: whole, port: 80 }] }",
        )
        .document(
            "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: { \
             name: bound, namespace: whole }\nspec: { from: [{ group: gateway.networking.k8s.io, \
             kind: HTTPRoute, namespace: bound }], to: [{ group: '', kind: Service }] }",
        )
}

fn mesh() -> anyhow::Result<Arc<TestMesh>> {
    MESH.get(|| {
        let all = manifests();
        let mesh = MeshBuilder::default()
            .files(&[("all.yaml", all.yaml())])
            .up()?;
        for waypoint in ["waypoint.bound", "second.bound", "pods.bound", "all.whole"] {
            mesh.wait_waypoint(waypoint)?;
        }
        Ok(mesh)
    })
}

/// The pod that the server had before it: the client, or the waypoint, by the name of its
/// Gateway.
fn before_the_server(mesh: &TestMesh, from: Pod<'_>, url: &str) -> anyhow::Result<String> {
    let answer = mesh.ask(from, url, &[])?;
    answer.has_status(200)?;
    let peer = answer.answer["peer"].as_str().context("no peer")?;
    let (ip, _) = peer.rsplit_once(':').context("no port")?;
    let pods = mesh.status()?.pods;
    let found = pods
        .iter()
        .find(|pod| pod.addresses.iter().any(|a| a == ip));
    let name = &found.with_context(|| format!("whose is {peer}?"))?.name;
    // A caller whom a waypoint vouches for has come by one, and no other.
    let vouched = answer.received("x-forwarded-client-cert");
    let hops = vouched
        .as_deref()
        .map_or(0, |text| text.matches("By=").count());
    let gateway = ["waypoint", "second", "pods", "all"]
        .into_iter()
        .find(|gateway| name.starts_with(&format!("{gateway}-")));
    ensure!(
        hops == usize::from(gateway.is_some()),
        "{name}, but {vouched:?}"
    );
    Ok(gateway.unwrap_or(name).to_owned())
}

fn comes_by(mesh: &TestMesh, from: Pod<'_>, url: &str, by: &str) -> anyhow::Result<()> {
    mesh.eventually(&format!("{} calls {url}", from.name), || {
        let found = before_the_server(mesh, from, url)?;
        ensure!(found == by, "by {found}, not by {by}");
        Ok(())
    })
}

#[test]
fn the_nearest_label_decides() -> anyhow::Result<()> {
    let mesh = mesh()?;
    for (url, by) in [
        ("http://plain.bound/", "waypoint"),
        ("http://own.bound/", "second"),
        ("http://off.bound/", "client"),
        ("http://server.whole/", "all"),
        // The service is left alone, and its address is not that of a pod.
        ("http://opted-out.whole/", "all"),
    ] {
        comes_by(&mesh, CLIENT, url, by)?;
    }
    Ok(())
}

#[test]
fn the_address_that_is_dialled_decides_with_it() -> anyhow::Result<()> {
    let mesh = mesh()?;
    for (server, by) in [
        // A waypoint for services is not asked about pods.
        ("bound/echo", "client"),
        ("bound/chosen", "pods"),
        ("whole/server", "all"),
        ("whole/opted-out", "client"),
    ] {
        let url = format!("http://{}:8080/", mesh.address(pod(server))?);
        comes_by(&mesh, CLIENT, &url, by)?;
    }
    Ok(())
}

#[test]
fn who_is_not_captured_goes_past_every_waypoint() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let direct = format!("http://{}:8080/", mesh.address(pod("bound/chosen"))?);
    for url in ["http://plain.bound/", "http://lost.bound/", &direct] {
        comes_by(&mesh, STRANGER, url, "client")?;
    }
    Ok(())
}

#[test]
fn a_service_whose_waypoint_is_not_there_is_not_reached_past_it() -> anyhow::Result<()> {
    let mesh = mesh()?;
    comes_by(&mesh, CLIENT, "http://plain.bound/", "waypoint")?;
    let counted = mesh.requests(
        CLIENT,
        "http://lost.bound/",
        &["-n", "10", "--timeout", "1000"],
    )?;
    assert_eq!(counted.status("200"), 0, "{counted:?}");
    assert!(
        counted.servers.keys().all(|name| name == "-"),
        "{counted:?}"
    );
    Ok(())
}

#[test]
fn there_is_one_waypoint_on_a_way() -> anyhow::Result<()> {
    let mesh = mesh()?;
    // The backend has a waypoint of its own, as a service and as a pod.
    comes_by(&mesh, CLIENT, "http://routed.bound/", "waypoint")?;
    // By both rules the same waypoint, and yet once.
    comes_by(&mesh, CLIENT, "http://server.whole/", "all")?;
    // A pod that calls itself by its service does so by the waypoint.
    comes_by(&mesh, pod("whole/server"), "http://server.whole/", "all")?;
    Ok(())
}

#[test]
fn a_label_that_comes_and_goes_under_load_fails_no_request() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let url = "http://moving.bound/";
    let moving = |label: &str| {
        let all = Manifest::default();
        let all = all.service_of(pod("bound/moving"), label, "app: echo", PORTS);
        mesh.apply("moving.yaml", all.yaml())
    };
    moving("istio.io/use-waypoint: none")?;
    comes_by(&mesh, CLIENT, url, "client")?;
    let stop = AtomicBool::new(false);
    let moved = std::thread::scope(|scope| {
        // Connections that are kept over changes, and in `caller` new ones all the time.
        let kept = scope.spawn(|| {
            let mut all = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                all.push(mesh.requests(CLIENT, url, &["-n", "400", "-c", "4"])?);
            }
            anyhow::Ok(all)
        });
        let moved = || -> anyhow::Result<()> {
            let caller = mesh.caller(CLIENT, url, 2)?;
            caller.wait_more(20)?;
            for (label, by) in [
                ("", "waypoint"),
                ("istio.io/use-waypoint: second", "second"),
                ("istio.io/use-waypoint: none", "client"),
                ("", "waypoint"),
                ("istio.io/use-waypoint: none", "client"),
            ] {
                moving(label)?;
                comes_by(&mesh, CLIENT, url, by)?;
                caller.wait_more(20)?;
            }
            let calls = caller.stop();
            let failed: Vec<_> = calls.iter().filter(|call| call.ok().is_none()).collect();
            ensure!(
                failed.is_empty(),
                "{} of {}: {failed:?}",
                failed.len(),
                calls.len()
            );
            Ok(())
        };
        let moved = moved();
        stop.store(true, Ordering::Relaxed);
        let kept = kept
            .join()
            .map_err(|_| anyhow::anyhow!("a client panicked"))??;
        for counted in kept {
            ensure!(counted.status("200") == 400, "{counted:?}");
        }
        moved
    });
    mesh.delete("moving.yaml")?;
    moved
}
