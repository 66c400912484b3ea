//! A waypoint carries on without its control plane, loses no request when its configuration
//! changes all the time, and lets nothing past when it dies.

use std::sync::atomic::{AtomicBool, Ordering};

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Pod, TestMesh, pod};
use adit_local::Request;
use anyhow::ensure;

const CLIENT: Pod<'_> = Pod {
    namespace: "mesh",
    name: "client",
};
const PORTS: &str = "{ name: http, port: 80, targetPort: 8080 }";
const URL: &str = "http://echo.mesh/";

fn to(version: &str) -> Manifest {
    let rules =
        format!("{{ retry: {{ attempts: 1 }}, backendRefs: [{{ name: {version}, port: 80 }}] }}");
    Manifest::default().route("HTTPRoute", "mesh", "echo", &rules)
}

fn mesh() -> anyhow::Result<TestMesh> {
    let all = Manifest::two_nodes()
        .namespace(
            "mesh",
            "istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint",
        )
        .waypoint(pod("mesh/waypoint"), "service")
        .client(CLIENT, "node1", "client")
        .versioned(pod("mesh/echo-v1"), "node1", "echo", "v1")
        .versioned(pod("mesh/echo-v2"), "node2", "echo", "v2")
        .service_of(pod("mesh/echo"), "", "app: echo", PORTS)
        .service_of(pod("mesh/v1"), "", "app: echo, version: v1", PORTS)
        .service_of(pod("mesh/v2"), "", "app: echo, version: v2", PORTS);
    let route = to("v1");
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", all.yaml()), ("route.yaml", route.yaml())])
        .up()?;
    mesh.wait_waypoint("waypoint.mesh")?;
    mesh.wait_bound("echo.mesh.svc.cluster.local", true)?;
    mesh.asks(CLIENT, URL, &[], |answer| answer.is_of("v1"))?;
    Ok(mesh)
}

#[test]
fn routes_hold_while_the_control_plane_is_away() -> anyhow::Result<()> {
    let mesh = mesh()?;
    mesh.kill_component("aditd")?;
    let counted = mesh.requests(CLIENT, URL, &["-n", "200", "-c", "4"])?;
    assert_eq!(counted.version("v1"), 200, "{counted:?}");
    // What is written meanwhile is taken up by the next.
    mesh.apply("route.yaml", to("v2").yaml())?;
    let counted = mesh.requests(CLIENT, URL, &["-n", "50"])?;
    assert_eq!(counted.version("v1"), 50, "{counted:?}");

    // Without a waypoint nothing passes, not even with nobody to say that it is gone.
    mesh.kill_component("waypoint.mesh")?;
    let counted = mesh.requests(CLIENT, URL, &["-n", "10", "--timeout", "2000"])?;
    assert_eq!(counted.status("200"), 0, "{counted:?}");

    mesh.request(&Request::Start {
        component: "aditd".into(),
    })?;
    mesh.start_component("waypoint.mesh")?;
    mesh.asks(CLIENT, URL, &[], |answer| answer.is_of("v2"))?;
    Ok(())
}

#[test]
fn no_request_is_lost_while_routes_and_policies_change() -> anyhow::Result<()> {
    const CHANGES: usize = 40;
    let mesh = mesh()?;
    let policy = |number: usize| {
        let spec = format!(
            "{{ targetRefs: [{{ kind: Service, group: '', name: echo }}], rules: [{{ to: [{{ \
             operation: {{ methods: [GET] }} }}] }}, {{ to: [{{ operation: {{ paths: [/{number}] \
             }} }}] }}] }}"
        );
        Manifest::default().policy("AuthorizationPolicy", "mesh", "readers", "", &spec)
    };
    let stop = AtomicBool::new(false);
    let counts = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut all = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                all.push(mesh.requests(CLIENT, URL, &["-n", "300", "-c", "8"])?);
            }
            anyhow::Ok(all)
        });
        let changed = (0..CHANGES).try_for_each(|number| {
            let version = if number % 2 == 0 { "v2" } else { "v1" };
            mesh.apply("route.yaml", to(version).yaml())?;
            mesh.apply("policy.yaml", policy(number).yaml())?;
            // Every tenth is waited for: that they arrive at all is part of it.
            if number % 10 == 0 {
                mesh.asks(CLIENT, URL, &[], |answer| answer.is_of(version))?;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            anyhow::Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        let counts = load
            .join()
            .map_err(|_| anyhow::anyhow!("a client panicked"));
        changed.and_then(|()| counts?)
    })?;
    let mut both = [0; 2];
    for counted in &counts {
        ensure!(counted.status("200") == 300, "{counted:?}");
        both[0] += counted.version("v1");
        both[1] += counted.version("v2");
    }
    ensure!(both.iter().all(|count| *count > 0), "{both:?}");
    Ok(())
}
