//! A pod that is enrolled again while its withdrawal still drains connections: the withdrawal
//! must not end by removing the capture that has been set up meanwhile, nor the connections.

use std::time::{Duration, Instant};

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::{TestMesh, pod};

const DRAIN: Duration = Duration::from_secs(4);

/// `shop` pods that ztunnels say they have enrolled.
fn enrolled(mesh: &TestMesh) -> anyhow::Result<f64> {
    ["node1", "node2"]
        .iter()
        .map(|node| {
            Ok(mesh
                .metrics(node)?
                .sum("workload_manager_active_proxy_count", &[]))
        })
        .sum()
}

#[test]
fn an_old_withdrawal_leaves_the_new_enrolment_alone() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        .ztunnel_env(
            "CONNECTION_TERMINATION_DEADLINE",
            &format!("{}s", DRAIN.as_secs()),
        )
        .config(|config| {
            let delay = "100ms".to_owned();
            config.aditd_env.insert("ADIT_WITHDRAW_DELAY".into(), delay);
        })
        .up()?;
    let (client, web_b) = (pod("shop/client"), pod("shop/web-b"));
    // A captured connection keeps the withdrawals of both its ends draining.
    let long = mesh.stream(client, &format!("{}:9090", mesh.address(web_b)?))?;
    long.wait("echo", Duration::from_secs(5))?;

    mesh.label_namespace("shop", None)?;
    mesh.eventually("all pods withdrawn", || {
        let enrolled = enrolled(&mesh)?;
        anyhow::ensure!(enrolled == 0.0, "{enrolled} pods are enrolled");
        Ok(())
    })?;
    let withdrawn = Instant::now();
    mesh.label_namespace("shop", Some("ambient"))?;
    mesh.wait_enrolled()?;
    anyhow::ensure!(
        withdrawn.elapsed() < DRAIN,
        "the machine is too slow for this test: {:?}",
        withdrawn.elapsed()
    );

    // Beyond the end of the withdrawals.
    std::thread::sleep((DRAIN * 2 + Duration::from_secs(1)).saturating_sub(withdrawn.elapsed()));
    mesh.count_packets(web_b)?;
    let url = format!("http://{}:8080/", mesh.address(web_b)?);
    for call in mesh.calls(client, &url, 20)? {
        assert_eq!(call.ok(), Some("web-b"), "{call:?}");
    }
    let packets = mesh.packets(web_b)?;
    assert_eq!(packets.plaintext, 0, "{packets:?}");
    long.skip_old();
    long.wait("echo", Duration::from_secs(5))?;
    Ok(())
}
