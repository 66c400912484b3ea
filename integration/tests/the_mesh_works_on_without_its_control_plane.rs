//! aditd is needed for changes, not for traffic; and its return opens no plaintext window.

use std::time::{Duration, Instant};

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::{Manifest, TestMesh, pod};
use adit_local::Request;

fn order(mesh: &TestMesh, request: fn(String) -> Request) -> anyhow::Result<()> {
    Ok(mesh.request(&request("aditd".into()))?)
}

fn kill(component: String) -> Request {
    Request::Kill { component }
}

fn start(component: String) -> Request {
    Request::Start { component }
}

#[test]
fn traffic_goes_on_and_configuration_continues_after_its_return() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default().files(SAMPLE_MESH).up()?;
    mesh.apply(
        "mark.yaml",
        Manifest::default().namespace("mark", "").yaml(),
    )?;
    let (client, web_b) = (pod("shop/client"), pod("shop/web-b"));
    let url = format!("http://{}:8080/", mesh.address(web_b)?);
    mesh.count_packets(web_b)?;
    let caller = mesh.caller(client, &url, 3)?;
    let open = mesh.stream(client, &format!("{}:9090", mesh.address(web_b)?))?;
    open.wait("echo", Duration::from_secs(5))?;

    order(&mesh, kill)?;
    caller.wait_more(50)?;
    // A pair of pods that had no tunnel yet: the certificate is there already.
    assert!(
        mesh.http_get(pod("shop/visitor"), mesh.at(web_b, 8080)?)?
            .is_ok()
    );
    // What is written meanwhile waits.
    let deny = "{ action: DENY, rules: [{ from: [{ source: { principals: \
                [cluster.local/ns/shop/sa/visitor] } }] }] }";
    mesh.apply(
        "policies.yaml",
        Manifest::default()
            .policy("AuthorizationPolicy", "shop", "p", "", deny)
            .yaml(),
    )?;
    caller.wait_more(20)?;

    order(&mesh, start)?;
    mesh.eventually("what was written meanwhile", || {
        let outcome = mesh.http_get(pod("shop/visitor"), mesh.at(web_b, 8080)?)?;
        anyhow::ensure!(outcome.is_denied(), "{outcome:?}");
        Ok(())
    })?;
    // All workloads stayed HBONE, or there would be plaintext.
    caller.wait_more(100)?;
    open.skip_old();
    open.wait("echo", Duration::from_secs(5))?;
    let calls = caller.stop();
    let failed: Vec<_> = calls.iter().filter(|c| c.ok().is_none()).collect();
    assert!(
        failed.is_empty(),
        "{} of {} failed: {:?}",
        failed.len(),
        calls.len(),
        failed[0]
    );
    let packets = mesh.packets(web_b)?;
    assert_eq!(packets.plaintext, 0, "{packets:?}");
    assert!(packets.hbone > 100, "{packets:?}");

    // And further changes arrive.
    mesh.set_policies(Manifest::default())?;
    assert!(
        mesh.http_get(pod("shop/visitor"), mesh.at(web_b, 8080)?)?
            .is_ok()
    );
    Ok(())
}

/// A ztunnel that starts while the control plane is away knows nothing: its pods stay cut off,
/// and come when the control plane does.
#[test]
fn a_ztunnel_without_control_plane_keeps_its_pods_waiting_not_talking() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        .config(|config| config.restart_components = false)
        .up()?;
    let (client, web_b) = (pod("shop/client"), pod("shop/web-b"));
    let target = mesh.at(web_b, 8080)?;
    assert!(mesh.http_get(client, target)?.is_ok());
    order(&mesh, kill)?;
    mesh.kill_ztunnel("node1")?;
    mesh.count_packets(client)?;
    mesh.count_packets(web_b)?;
    mesh.request(&Request::Start {
        component: "ztunnel-node1".into(),
    })?;
    // It runs and says that it is not ready; its pods are as cut off as before.
    let not_ready = mesh.eventually("readiness page", || {
        let answer = mesh.get("node1", 15021, "/healthz/ready")?;
        anyhow::ensure!(answer.status == 500, "{}", answer.text());
        Ok(answer.text())
    })?;
    assert!(not_ready.contains("xds"), "{not_ready}");
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1500) {
        let outcome = mesh.http_get(client, target)?;
        assert!(outcome.is_denied(), "{outcome:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(mesh.packets(client)?.plaintext, 0);

    order(&mesh, start)?;
    mesh.eventually("calls", || {
        let outcome = mesh.http_get(client, target)?;
        anyhow::ensure!(outcome.is_ok(), "{outcome:?}");
        Ok(())
    })?;
    for who in [client, web_b] {
        let packets = mesh.packets(who)?;
        assert_eq!(packets.plaintext, 0, "{who:?}: {packets:?}");
    }
    let ready = mesh.eventually("readiness", || {
        let answer = mesh.get("node1", 15021, "/healthz/ready")?;
        anyhow::ensure!(answer.status == 200, "{}", answer.text());
        Ok(answer.text())
    })?;
    assert_eq!(ready.trim(), "ready");
    Ok(())
}

/// The certificate service is away: enrolled pods are captured all the same, their connections
/// wait for a certificate and then fail; nothing leaves in plaintext.
#[test]
fn without_a_certificate_service_pods_are_captured_and_fail_closed() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        // Nobody listens there.
        .ztunnel_env("CA_ADDRESS", "https://istiod.istio-system.svc:9")
        .up()?;
    let (client, web_b) = (pod("shop/client"), pod("shop/web-b"));
    let target = mesh.at(web_b, 8080)?;
    mesh.count_packets(client)?;
    mesh.count_packets(web_b)?;
    let outcome = mesh.http_get(client, target)?;
    assert!(!outcome.is_ok(), "{outcome:?}");
    let packets = [mesh.packets(client)?, mesh.packets(web_b)?];
    assert!(packets.iter().all(|p| p.plaintext == 0), "{packets:?}");
    // Plaintext from outside needs no certificate.
    let outcome = mesh.http_get(pod("legacy/client"), target)?;
    assert!(outcome.is_ok(), "{outcome:?}");
    let log = std::fs::read_to_string(mesh.component_log("ztunnel-node1")?)?;
    assert!(
        log.contains("spiffe://cluster.local/ns/shop/sa/client"),
        "{log}"
    );
    let dump = mesh.config_dump("node1")?;
    let states: Vec<_> = dump["certificates"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|c| c["state"].to_string())
        .collect();
    assert!(
        !states.is_empty()
            && states
                .iter()
                .all(|s| !s.contains("Available") || s.contains("Unavailable")),
        "{states:?}"
    );
    Ok(())
}
