//! Servers of a Service are made anew one after the other while clients keep calling: every
//! call is answered, by whoever is there; and HTTP/2 and gRPC are carried as HTTP/1.1 is.

use std::time::Duration;

use adit_integration::mesh::{DEADLINE, MeshBuilder, SAMPLE_MESH};
use adit_integration::{Manifest, Outcome, pod};
use adit_local::Request;

/// A server that goes on for a second after SIGTERM, as `preStop: sleep` has it: who is told to
/// end and ends at once resets what waits in its backlog, mesh or not.
fn server() -> String {
    let script = "adit-sample serve & p=$!; trap 'sleep 1; kill -9 $p; exit 0' TERM; wait $p";
    format!(
        "{{ name: s, image: x, command: [sh, -c, \"{script}\"], readinessProbe: {{ httpGet: {{ path: \
         /healthz, port: 8080 }}, periodSeconds: 1 }} }}"
    )
}

#[test]
fn a_rolling_restart_fails_no_call() -> anyhow::Result<()> {
    let all = Manifest::two_nodes()
        .ambient("shop")
        .client(pod("shop/client"), "node1", "client")
        .client(pod("shop/visitor"), "node1", "visitor")
        .pod(pod("shop/web-a"), "node1", "web", "app: web", &server())
        .pod(pod("shop/web-b"), "node2", "web", "app: web", &server())
        .service(pod("shop/web"), "web", "");
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .up()?;
    let callers = [
        mesh.caller(pod("shop/client"), "http://web.shop/", 2)?,
        mesh.caller(pod("shop/visitor"), "http://web.shop/", 3)?,
    ];
    for name in ["web-a", "web-b"] {
        for caller in &callers {
            caller.wait_more(20)?;
        }
        let uid = |status: &adit_local::MeshStatus| status.pod("shop", name).map(|p| p.uid.clone());
        let before = uid(&mesh.status()?);
        mesh.request(&Request::RestartPod {
            namespace: "shop".into(),
            name: name.into(),
        })?;
        mesh.wait_for("another pod", DEADLINE, |status| {
            (uid(status)? != *before.as_ref()?).then_some(())
        })?;
        mesh.wait_pods_ready(DEADLINE)?;
        mesh.wait_enrolled()?;
        // It is used again.
        let address = mesh.address(pod(&format!("shop/{name}")))?;
        let call = mesh.call(pod("shop/client"), &format!("http://{address}:8080/"))?;
        assert_eq!(call.ok(), Some(name), "{call:?}");
    }
    for caller in callers {
        caller.wait_more(20)?;
        let calls = caller.stop();
        let failed: Vec<_> = calls.iter().filter(|c| c.ok().is_none()).collect();
        assert!(
            failed.is_empty(),
            "{} of {} failed, for example {:?}",
            failed.len(),
            calls.len(),
            failed[0]
        );
        let slowest = calls.iter().map(|c| c.latency_ms).fold(0.0, f64::max);
        assert!(slowest < 3000.0, "one call took {slowest} ms");
    }
    Ok(())
}

#[test]
fn http2_and_grpc_pass() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default().files(SAMPLE_MESH).up()?;
    let client = pod("shop/client");
    let place = mesh.place(client);
    for name in ["shop/web-a", "shop/web-b"] {
        let url = format!("http://{}:8080", mesh.address(pod(name))?);
        for options in [
            &["--http2"][..],
            &["--http2", "--keepalive"],
            &["--keepalive"],
        ] {
            let options = [options, &["--count", "5"]].concat();
            let calls = mesh.calls_with(client, &format!("{url}/"), &options)?;
            assert!(
                calls.len() == 5 && calls.iter().all(|c| c.ok().is_some()),
                "{calls:?}"
            );
        }
        let argv = ["adit-sample", "grpc", &url, "--count", "5"];
        let output = mesh.exec(&place, &argv, Duration::from_secs(20))?;
        assert!(
            output.status.success(),
            "{}{}",
            output.stdout,
            output.stderr
        );
        assert_eq!(
            output.stdout.matches("\"status\":0").count(),
            5,
            "{}",
            output.stdout
        );
    }
    Ok(())
}

/// A pod that vanishes says no farewell: what was on its way to it is answered by another as
/// soon as discovery says that it is gone, not when TCP or the keepalive notices.
#[test]
fn calls_under_way_to_a_pod_that_vanishes_are_answered_by_another() -> anyhow::Result<()> {
    let serve = "{ name: s, image: x, command: [adit-sample, serve] }";
    let base = Manifest::two_nodes()
        .ambient("shop")
        .client(pod("shop/client"), "node1", "client")
        .client(pod("shop/visitor"), "node1", "visitor")
        .pod(pod("shop/web-a"), "node1", "web", "app: web", serve)
        .service(pod("shop/web"), "web", "");
    let extra = Manifest::default().pod(pod("shop/web-b"), "node2", "web", "app: web", serve);
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", base.yaml()), ("extra.yaml", extra.yaml())])
        .up()?;
    let target = mesh.service("shop", "web", 80)?;
    // The client has a tunnel to the pod already, the visitor none.
    let far = mesh.at(pod("shop/web-b"), 8080)?;
    assert!(mesh.http_get(pod("shop/client"), far)?.is_ok());
    // From now on nothing reaches it.
    mesh.run_in(
        pod("shop/web-b"),
        &[
            "nft",
            "add table inet gone; add chain inet gone arriving { type filter hook prerouting \
           priority -500; }; add rule inet gone arriving iifname eth0 drop",
        ],
    )?;
    // Sockets first: making them waits for nobody.
    mesh.socket(pod("shop/client"), false)?;
    mesh.socket(pod("shop/visitor"), false)?;
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..16)
            .map(|index| {
                let from = pod(if index % 2 == 0 {
                    "shop/client"
                } else {
                    "shop/visitor"
                });
                let mesh = &mesh;
                scope.spawn(move || mesh.http_get(from, target))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        let waiting = calls.iter().filter(|c| !c.is_finished()).count();
        assert!(
            waiting > 0,
            "no call is under way to the pod that does not answer"
        );
        mesh.delete("extra.yaml")?;
        for call in calls {
            let outcome = call.join().map_err(|_| anyhow::anyhow!("panic"))??;
            assert_eq!(outcome, Outcome::Answered(200, "web-a".into()));
        }
        Ok(())
    })
}
