//! A control plane that does not take a proxy for its node's gives it no pods. The proxy must
//! not say that it is ready then: whoever rolls it out has to notice.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::{TestMesh, pod};
use adit_local::Request;

fn readiness(mesh: &TestMesh, node: &str) -> anyhow::Result<(u16, String)> {
    let answer = mesh.get(node, 15021, "/healthz/ready")?;
    Ok((answer.status, answer.text()))
}

/// Starts `aditd` again, which reads whom it trusts at its start only.
fn restart_aditd(mesh: &TestMesh) -> anyhow::Result<()> {
    let component = "aditd".to_owned();
    mesh.request(&Request::Kill {
        component: component.clone(),
    })?;
    Ok(mesh.request(&Request::Start { component })?)
}

/// An `aditd` that trusts the accounts in `accounts`.
fn aditd_trusting(accounts: &Path, script: &Path) -> anyhow::Result<()> {
    let text = format!(
        "#!/bin/sh\nexport CA_TRUSTED_NODE_ACCOUNTS=\"$(cat {})\"\nexec \"$ADITD\" \"$@\"\n",
        accounts.display()
    );
    std::fs::write(script, text)?;
    std::fs::set_permissions(script, PermissionsExt::from_mode(0o755))?;
    Ok(())
}

#[test]
fn it_is_ready_once_it_is_trusted_and_stays_so() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let accounts = directory.path().join("accounts");
    let script = directory.path().join("aditd-wrapper");
    std::fs::write(&accounts, "istio-system/ztunnel")?;
    aditd_trusting(&accounts, &script)?;
    let wrapper = script.clone();
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        .config(move |config| {
            let real = config
                .binary_dirs
                .iter()
                .map(|dir| dir.join("aditd"))
                .find(|path| path.exists());
            let real = real.unwrap_or_else(|| "aditd".into());
            config
                .aditd_env
                .insert("ADITD".into(), real.display().to_string());
            config.aditd = wrapper.display().to_string();
            config.restart_components = false;
        })
        .up()?;
    let target = mesh.at(pod("shop/web-b"), 8080)?;
    assert!(mesh.http_get(pod("shop/client"), target)?.is_ok());

    std::fs::write(&accounts, "istio-system/somebody-else")?;
    restart_aditd(&mesh)?;
    mesh.kill_ztunnel("node1")?;
    mesh.request(&Request::Start {
        component: "ztunnel-node1".into(),
    })?;
    // The stream of configuration is answered, and still: not ready, for a reason that it tells.
    let why = mesh.eventually("configuration at the ztunnel", || {
        let (status, why) = readiness(&mesh, "node1")?;
        anyhow::ensure!(status == 500, "{status}: {why}");
        anyhow::ensure!(!why.contains("xds"), "{why}");
        Ok(why)
    })?;
    assert!(why.contains("acceptance by the control plane"), "{why}");
    let refusals = |mesh: &TestMesh| -> anyhow::Result<f64> {
        let metrics = mesh.get("node1", 15020, "/metrics")?.text();
        let name = "adit_enrolment_report_failures_total{reason=\"refused\"} ";
        let line = metrics.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.map_or(Ok(0.0), str::parse)?)
    };
    mesh.eventually("refused reports", || {
        let count = refusals(&mesh)?;
        anyhow::ensure!(count >= 2.0, "{count}");
        Ok(())
    })?;
    let log = std::fs::read_to_string(mesh.component_log("ztunnel-node1")?)?;
    let told = "the control plane does not accept this proxy";
    assert_eq!(log.matches(told).count(), 1, "{log}");
    // After all of that, and for good: not ready.
    assert_eq!(readiness(&mesh, "node1")?.0, 500);
    // The one that was ready before has lost the control plane, and stays ready.
    assert_eq!(readiness(&mesh, "node2")?.0, 200);

    std::fs::write(&accounts, "istio-system/ztunnel")?;
    restart_aditd(&mesh)?;
    mesh.eventually("readiness", || {
        let (status, why) = readiness(&mesh, "node1")?;
        anyhow::ensure!(status == 200, "{status}: {why}");
        Ok(())
    })?;
    mesh.eventually("calls", || {
        let outcome = mesh.http_get(pod("shop/client"), target)?;
        anyhow::ensure!(outcome.is_ok(), "{outcome:?}");
        Ok(())
    })
}
