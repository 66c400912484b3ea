//! The label is set, removed and set again while clients keep calling: no call fails, no pod
//! restarts, the path really changes, and while both ends are enrolled nothing but HBONE is on
//! the wire (Istio's "added on namespace label", "removed on namespace unlabel").

use std::time::Duration;

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::{TestMesh, pod};

/// Protocols of all `shop` pods at all nodes are `protocol`, and every capture is done.
fn wait_protocol(mesh: &TestMesh, protocol: &str, captured: usize) -> anyhow::Result<()> {
    mesh.wait_enrolled()?;
    mesh.eventually("capture", || {
        for node in ["node1", "node2"] {
            let dump = mesh.config_dump(node)?;
            for workload in dump["workloads"].as_array().into_iter().flatten() {
                if workload["namespace"] == "shop" && workload["protocol"] != protocol {
                    anyhow::bail!("{} is {}", workload["name"], workload["protocol"]);
                }
            }
        }
        let active: f64 = ["node1", "node2"]
            .iter()
            .map(|node| {
                Ok(mesh
                    .metrics(node)?
                    .sum("workload_manager_active_proxy_count", &[]))
            })
            .sum::<anyhow::Result<f64>>()?;
        anyhow::ensure!(active == captured as f64, "{active} pods are captured");
        Ok(())
    })
}

#[test]
fn no_call_fails_no_pod_restarts_and_the_path_changes() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        .config(|config| {
            config
                .aditd_env
                .insert("ADIT_WITHDRAW_DELAY".into(), "500ms".into());
        })
        .up()?;
    mesh.label_namespace("shop", None)?;
    wait_protocol(&mesh, "TCP", 0)?;
    let pods_before = identities(&mesh)?;
    let (client, web_b) = (pod("shop/client"), pod("shop/web-b"));

    // New connections through the Service, all the time; and one that is as old as the hills.
    let by_service = mesh.caller(client, "http://web.shop/", 4)?;
    let from_outside = mesh.caller(pod("legacy/client"), "http://web.shop/", 7)?;
    let long = mesh.stream(
        client,
        &format!("{}:9090", mesh.address(pod("shop/web-a"))?),
    )?;
    long.wait("echo", Duration::from_secs(5))?;
    by_service.wait_more(30)?;

    for round in 0..2 {
        mesh.label_namespace("shop", Some("ambient"))?;
        wait_protocol(&mesh, "HBONE", 4)?;
        // What was open before goes on as it was, so this counts at the client's side only
        // what is new: calls of the client to the far server.
        let calls = mesh.calls(client, &format!("http://{}:8080/", mesh.address(web_b)?), 3)?;
        assert!(calls.iter().all(|c| c.ok() == Some("web-b")), "{calls:?}");
        let line = mesh.access_line("node2", |l| {
            l.get("direction") == "inbound"
                && l.get("src.namespace") == "shop"
                && !l.get("src.identity").is_empty()
        })?;
        assert_eq!(
            line.get("src.identity"),
            "spiffe://cluster.local/ns/shop/sa/client"
        );
        by_service.wait_more(30)?;
        let hbone = mesh.metrics("node2")?.sum(
            "istio_tcp_connections_opened_total",
            &[
                ("reporter", "destination"),
                ("connection_security_policy", "mutual_tls"),
            ],
        );
        assert!(hbone >= 3.0, "{hbone}");

        mesh.label_namespace("shop", None)?;
        wait_protocol(&mesh, "TCP", 0)?;
        mesh.count_packets(web_b)?;
        by_service.wait_more(30)?;
        let packets = mesh.packets(web_b)?;
        assert!(packets.plaintext > 0, "round {round}: {packets:?}");
        long.skip_old();
        long.wait("echo", Duration::from_secs(5))?;
    }

    // In the mesh again, for good: now every packet counts. The callers from outside stop.
    mesh.label_namespace("shop", Some("ambient"))?;
    wait_protocol(&mesh, "HBONE", 4)?;
    let outside = from_outside.stop();
    by_service.wait_more(10)?;
    mesh.count_packets(web_b)?;
    by_service.wait_more(60)?;
    let packets = mesh.packets(web_b)?;
    assert_eq!(packets.plaintext, 0, "{packets:?}");
    assert!(packets.hbone > 50, "{packets:?}");

    long.skip_old();
    long.wait("echo", Duration::from_secs(5))?;
    for (who, calls) in [("inside", by_service.stop()), ("outside", outside)] {
        let failed: Vec<_> = calls.iter().filter(|c| c.ok().is_none()).collect();
        assert!(
            failed.is_empty(),
            "{who}: {} of {} calls failed, for example {:?}",
            failed.len(),
            calls.len(),
            failed[0]
        );
    }
    assert_eq!(identities(&mesh)?, pods_before, "no pod was restarted");
    Ok(())
}

/// What would change if a pod or a container were made anew.
fn identities(mesh: &TestMesh) -> anyhow::Result<Vec<String>> {
    let pods = mesh.status()?.pods;
    let one = |p: &adit_local::PodStatus| {
        let containers: Vec<_> = p
            .containers
            .iter()
            .map(|c| (c.process, c.restarts))
            .collect();
        format!(
            "{}/{} {} {:?} {containers:?}",
            p.namespace, p.name, p.uid, p.addresses
        )
    };
    Ok(pods.iter().map(one).collect())
}
