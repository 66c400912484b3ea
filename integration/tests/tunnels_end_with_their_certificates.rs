//! A key is good for as long as its certificate says, also on a connection that is open.

use std::time::{Duration, Instant};

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::{TestMesh, pod};

/// Validity of every certificate here.
const TTL: Duration = Duration::from_secs(12);

fn handshakes(mesh: &TestMesh, node: &str) -> anyhow::Result<f64> {
    let metrics = mesh.get(node, 15020, "/metrics")?.text();
    let name = "adit_tls_handshake_duration_seconds_count{reporter=\"source\"} ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    Ok(line.map_or(Ok(0.0), str::parse)?)
}

#[test]
fn a_connection_ends_when_its_callers_certificate_does_and_new_ones_use_the_new_one()
-> anyhow::Result<()> {
    let mesh = MeshBuilder::default()
        .files(SAMPLE_MESH)
        .ztunnel_env("SECRET_TTL", &format!("{}s", TTL.as_secs()))
        .up()?;
    let (client, web_b) = (pod("shop/client"), pod("shop/web-b"));
    let address = mesh.address(web_b)?;
    let node = mesh.node_of(client)?;
    let begin = Instant::now();
    let stream = mesh.stream(client, &format!("{address}:9090"))?;
    stream.wait("echo", Duration::from_secs(5))?;
    let caller = mesh.caller(client, &format!("http://{address}:8080/"), 2)?;
    caller.wait_more(20)?;

    // A renewal: calls go over a new tunnel although the one before has room.
    let before = handshakes(&mesh, &node)?;
    mesh.eventually("a tunnel with the new certificate", || {
        let now = handshakes(&mesh, &node)?;
        anyhow::ensure!(now > before, "{now} handshakes");
        Ok(())
    })?;
    // It is not the renewal that ends what is open.
    if begin.elapsed() < TTL / 2 {
        stream.skip_old();
        stream.wait("echo", Duration::from_secs(5))?;
    }

    let log = mesh.component_log(&format!("ztunnel-{}", mesh.node_of(web_b)?))?;
    mesh.eventually("the end of the stream", || {
        let log = std::fs::read_to_string(&log)?;
        anyhow::ensure!(log.contains("closed: the caller's certificate has expired"));
        Ok(())
    })?;
    let lived = begin.elapsed();
    assert!(lived < TTL + Duration::from_secs(8), "{lived:?}");
    stream.wait("ended", Duration::from_secs(5))?;

    // Nobody who makes new connections has noticed anything.
    caller.wait_more(50)?;
    let calls = caller.stop();
    let failed: Vec<_> = calls.iter().filter(|c| c.ok().is_none()).collect();
    assert!(
        failed.is_empty(),
        "{} of {} failed: {:?}",
        failed.len(),
        calls.len(),
        failed[0]
    );
    Ok(())
}
