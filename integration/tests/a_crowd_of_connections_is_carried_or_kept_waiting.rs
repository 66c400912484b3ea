//! Ten thousand connections at once are ten thousand connections; a ztunnel that runs out of
//! file descriptors keeps new ones waiting, counts that, and recovers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use adit_integration::mesh::MeshBuilder;
use adit_integration::socket::{connect_socket, echo_once};
use adit_integration::{Manifest, TestMesh, pod};
use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const WANTED: usize = 10_000;
/// A ztunnel needs one descriptor for a connection, and so does the server; some are for the
/// rest.
const RESERVE: u64 = 500;

fn manifest() -> Manifest {
    Manifest::two_nodes()
        .ambient("shop")
        .client(pod("shop/client"), "node1", "client")
        .client(pod("shop/other"), "node1", "other")
        .server(pod("shop/web"), "node2", "web", "web")
}

#[test]
fn ten_thousand_connections_at_once() -> anyhow::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let count = WANTED.min(usize::try_from(hard.saturating_sub(RESERVE)).unwrap_or(WANTED));
    if count < WANTED {
        eprintln!("ONLY {count} CONNECTIONS: the limit of open files is {hard}");
    }
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", manifest().yaml())])
        .up()?;
    let target = mesh.at(pod("shop/web"), 9090)?;
    let sockets = mesh.sockets(pod("shop/client"), false, count)?;
    let mut streams: Vec<TcpStream> = Vec::with_capacity(count);
    for (index, socket) in sockets.into_iter().enumerate() {
        let stream = connect_socket(socket, target, Duration::from_secs(20))
            .with_context(|| format!("connection {index}"))?;
        streams.push(stream);
    }
    // Everyone says something, then everyone hears it.
    for (index, stream) in streams.iter_mut().enumerate() {
        stream.write_all(format!("{index:08}").as_bytes())?;
    }
    let mut failed = 0;
    for (index, stream) in streams.iter_mut().enumerate() {
        let mut back = [0; 8];
        match stream.read_exact(&mut back) {
            Ok(()) => assert_eq!(back, format!("{index:08}").as_bytes()),
            Err(_) => {
                failed += 1;
            }
        }
    }
    assert_eq!(failed, 0, "{failed} of {count} connections failed");
    // All of them are there at the same time, and somebody else gets his turn.
    let open = |mesh: &TestMesh, node: &str, reporter: &str| -> anyhow::Result<f64> {
        let metrics = mesh.metrics(node)?;
        let of = [("reporter", reporter)];
        let opened = metrics.sum("istio_tcp_connections_opened_total", &of);
        Ok(opened - metrics.sum("istio_tcp_connections_closed_total", &of))
    };
    assert_eq!(open(&mesh, "node1", "source")?, count as f64);
    assert_eq!(open(&mesh, "node2", "destination")?, count as f64);
    assert!(
        mesh.http_get(pod("shop/other"), mesh.at(pod("shop/web"), 8080)?)?
            .is_ok()
    );
    drop(streams);
    for (node, reporter) in [("node1", "source"), ("node2", "destination")] {
        mesh.eventually("all closed", || {
            let left = open(&mesh, node, reporter)?;
            anyhow::ensure!(left == 0.0, "{left} are open at {node}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_ztunnel_out_of_file_descriptors_recovers() -> anyhow::Result<()> {
    const LIMIT: usize = 160;
    let directory = tempfile::tempdir()?;
    let wrapper = directory.path().join("ztunnel");
    let real = std::env::current_exe()?;
    let real = real
        .parent()
        .and_then(|deps| deps.parent())
        .context("target directory")?
        .join("ztunnel");
    let script = format!("#!/bin/sh\nulimit -n {LIMIT}\nexec {}\n", real.display());
    std::fs::write(&wrapper, script)?;
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755))?;
    let program = wrapper.display().to_string();
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", manifest().yaml())])
        .config(move |config| config.ztunnel = program)
        .up()?;
    let target = mesh.at(pod("shop/web"), 9090)?;
    let sockets = mesh.sockets(pod("shop/client"), false, 2 * LIMIT)?;
    // More than there are descriptors; the kernel takes them, the proxy cannot.
    let mut streams = Vec::new();
    for socket in sockets {
        if let Ok(mut stream) = connect_socket(socket, target, Duration::from_millis(500)) {
            // It may have been reset meanwhile: then there was no descriptor for its other side.
            let _ = stream.write_all(b"x");
            streams.push(stream);
        }
    }
    let pid = mesh.pid("ztunnel-node1")?;
    let log = mesh.component_log("ztunnel-node1")?;
    mesh.eventually("a line that says so", || {
        let text = std::fs::read_to_string(&log)?;
        anyhow::ensure!(text.contains("Too many open files"), "{text}");
        Ok(())
    })?;
    drop(streams);
    mesh.eventually("recovery", || {
        let mut stream = mesh.connect(pod("shop/client"), target)??;
        echo_once(&mut stream, b"again\n")?;
        Ok(())
    })?;
    let failures = mesh
        .metrics("node1")?
        .sum("adit_accept_failures_total", &[]);
    assert!(failures > 0.0, "it is counted");
    assert_eq!(mesh.pid("ztunnel-node1")?, pid, "it is the same process");
    // The pods are captured as before.
    mesh.count_packets(pod("shop/client"))?;
    assert!(
        mesh.http_get(pod("shop/client"), mesh.at(pod("shop/web"), 8080)?)?
            .is_ok()
    );
    assert_eq!(mesh.packets(pod("shop/client"))?.plaintext, 0);
    Ok(())
}
