//! Without its ztunnel an enrolled pod is cut off at once, in both directions, and nothing of
//! it is on the wire; with a new ztunnel it is back, without having noticed more.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, Outcome, TestMesh, pod};

/// "At once", on a machine that does other things too.
const AT_ONCE: Duration = Duration::from_millis(500);

fn mesh() -> anyhow::Result<TestMesh> {
    let all = Manifest::two_nodes()
        .ambient("shop")
        .namespace("out", "")
        .client(pod("shop/client"), "node1", "client")
        .client(pod("shop/far"), "node2", "far")
        .client(pod("out/client"), "node1", "client")
        .server(pod("shop/near"), "node1", "web", "web")
        .server(pod("shop/web"), "node2", "web", "web");
    MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .config(|config| config.restart_components = false)
        .up()
}

#[test]
fn connections_are_refused_at_once_and_come_back_with_the_proxy() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let (client, web) = (pod("shop/client"), pod("shop/web"));
    let far_http = mesh.at(web, 8080)?;
    let near_http = mesh.at(pod("shop/near"), 8080)?;
    assert!(mesh.http_get(client, far_http)?.is_ok());
    assert!(mesh.http_get(pod("out/client"), near_http)?.is_ok());
    let mut open = mesh.connect(client, mesh.at(web, 9090)?)??;
    adit_integration::socket::echo_once(&mut open, b"before\n")?;
    let pods = |mesh: &TestMesh| -> anyhow::Result<Vec<_>> {
        let all = mesh.status()?.pods;
        Ok(all
            .into_iter()
            .map(|p| (p.uid, p.containers[0].process))
            .collect())
    };
    let before = pods(&mesh)?;

    mesh.kill_ztunnel("node1")?;
    mesh.count_packets(client)?;
    mesh.count_packets(web)?;
    let refused = |from: &str, to: SocketAddr| -> anyhow::Result<()> {
        let begin = Instant::now();
        let outcome = mesh.http_get(pod(from), to)?;
        let took = begin.elapsed();
        assert_eq!(outcome, Outcome::Refused, "{from} to {to}");
        assert!(took < AT_ONCE, "{from} to {to}: {took:?}");
        Ok(())
    };
    for _ in 0..20 {
        // Out of the pod: to a pod of the mesh, to one outside, to nobody.
        refused("shop/client", far_http)?;
        refused("shop/client", mesh.at(pod("out/client"), 8080)?)?;
        refused("shop/client", mesh.at_v6(web, 8080)?)?;
        refused("shop/client", "192.0.2.1:80".parse()?)?;
        // Into a pod: from outside the mesh, on the same node.
        refused("out/client", near_http)?;
        refused("out/client", mesh.at_v6(pod("shop/near"), 8080)?)?;
    }
    // From a pod of the mesh whose own proxy lives: that one is told so.
    let begin = Instant::now();
    let outcome = mesh.http_get(pod("shop/far"), near_http)?;
    assert!(outcome.is_denied(), "{outcome:?}");
    assert!(begin.elapsed() < Duration::from_secs(5));
    // What was open is gone: the app is not left with a connection into nowhere.
    let ended = adit_integration::socket::echo_once(&mut open, b"after\n");
    assert!(
        ended.is_err(),
        "an open connection went on without its proxy"
    );
    for who in [client, web] {
        let packets = mesh.packets(who)?;
        assert_eq!(packets.plaintext, 0, "{who:?}: {packets:?}");
    }
    // The other node has not noticed.
    assert!(mesh.http_get(pod("shop/far"), far_http)?.is_ok());

    mesh.start_ztunnel("node1")?;
    mesh.eventually("the way back", || {
        for (from, to) in [("shop/client", far_http), ("shop/far", near_http)] {
            let outcome = mesh.http_get(pod(from), to)?;
            anyhow::ensure!(outcome.is_ok(), "{from}: {outcome:?}");
        }
        Ok(())
    })?;
    assert!(mesh.http_get(pod("out/client"), near_http)?.is_ok());
    for who in [client, web] {
        let packets = mesh.packets(who)?;
        assert_eq!(packets.plaintext, 0, "{who:?}: {packets:?}");
    }
    assert_eq!(pods(&mesh)?, before, "no pod was restarted");
    Ok(())
}

/// A crash loop under load: whatever a caller sees, it is never plaintext on the wire.
#[test]
fn restarts_under_load_never_leak_plaintext() -> anyhow::Result<()> {
    let mesh = mesh()?;
    let (client, web) = (pod("shop/client"), pod("shop/web"));
    mesh.count_packets(client)?;
    mesh.count_packets(web)?;
    let url = format!("http://{}:8080/", mesh.address(web)?);
    let caller = mesh.caller(client, &url, 1)?;
    for node in ["node1", "node2", "node1"] {
        caller.wait_more(10)?;
        mesh.kill_ztunnel(node)?;
        caller.wait_more(5)?;
        mesh.start_ztunnel(node)?;
        mesh.eventually("calls", || {
            let last = caller.calls().last().is_some_and(|c| c.ok().is_some());
            anyhow::ensure!(last, "the last call failed");
            Ok(())
        })?;
    }
    let calls = caller.stop();
    assert!(
        calls.iter().any(|c| c.ok().is_none()),
        "some calls were refused"
    );
    for who in [client, web] {
        let packets = mesh.packets(who)?;
        assert_eq!(packets.plaintext, 0, "{who:?}: {packets:?}");
        assert!(packets.hbone > 0, "{who:?}: {packets:?}");
    }
    Ok(())
}
