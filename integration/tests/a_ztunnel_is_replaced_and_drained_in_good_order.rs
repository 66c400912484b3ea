//! A new ztunnel beside the old one takes over without a failed connection; one that is told
//! to end lets open connections go on until its deadline and lets nothing new in.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::socket::echo_once;
use adit_integration::{Outcome, TestMesh, pod};
use adit_local::Request;
use nix::sys::socket::{Backlog, listen};

fn mesh(deadline: &str) -> anyhow::Result<TestMesh> {
    MeshBuilder::default()
        .files(SAMPLE_MESH)
        .ztunnel_env("CONNECTION_TERMINATION_DEADLINE", deadline)
        .config(|config| config.grace = Duration::from_secs(10))
        .up()
}

#[test]
fn replacing_every_ztunnel_under_load_fails_no_new_connection() -> anyhow::Result<()> {
    let mesh = mesh("2s")?;
    let (client, web_b) = (pod("shop/client"), pod("shop/web-b"));
    mesh.count_packets(web_b)?;
    let callers = [
        mesh.caller(client, "http://web.shop/", 3)?,
        mesh.caller(
            pod("shop/visitor"),
            &format!("http://{}:8080/", mesh.address(web_b)?),
            3,
        )?,
    ];
    let outside = mesh.caller(
        pod("legacy/client"),
        &format!("http://{}:8080/", mesh.address(pod("shop/web-a"))?),
        5,
    )?;
    for caller in &callers {
        caller.wait_more(20)?;
    }
    for node in ["node1", "node2"] {
        let component = format!("ztunnel-{node}");
        let before = mesh.pid(&component)?;
        mesh.request(&Request::Replace {
            component: component.clone(),
        })?;
        mesh.wait_for("the new ztunnel", Duration::from_secs(20), |status| {
            let new = status.component(&component)?;
            (new.ready && new.process.as_ref().is_some_and(|p| p.pid != before)).then_some(())
        })?;
        for caller in &callers {
            caller.wait_more(20)?;
        }
    }
    let named = callers.into_iter().zip(["service", "far pod"]);
    for (caller, name) in named.chain([(outside, "outside")]) {
        let calls = caller.stop();
        let failed: Vec<_> = calls.iter().filter(|c| c.ok().is_none()).collect();
        assert!(
            failed.is_empty(),
            "{name}: {} of {} failed, for example {:?}",
            failed.len(),
            calls.len(),
            failed[0]
        );
    }
    assert_eq!(mesh.packets(web_b)?.plaintext, 0);
    Ok(())
}

#[test]
fn open_connections_survive_a_stop_until_the_deadline() -> anyhow::Result<()> {
    let mesh = mesh("3s")?;
    let client = pod("shop/client");
    let target = mesh.at(pod("shop/web-b"), 9090)?;
    let mut open = mesh.connect(client, target)??;
    echo_once(&mut open, b"before\n")?;
    let begin = Instant::now();
    let stopping = std::thread::scope(|scope| -> anyhow::Result<Duration> {
        let stop = scope.spawn(|| {
            mesh.request(&Request::Stop {
                component: "ztunnel-node1".into(),
            })
        });
        // Nothing new, at once.
        mesh.eventually("closed listeners", || {
            let outcome = mesh.echo(client, target)?;
            anyhow::ensure!(outcome == Outcome::Refused, "{outcome:?}");
            Ok(())
        })?;
        assert!(
            begin.elapsed() < Duration::from_secs(2),
            "{:?}",
            begin.elapsed()
        );
        // What is open goes on...
        let mut last = begin.elapsed();
        while echo_once(&mut open, b"still\n").is_ok() {
            last = begin.elapsed();
            assert!(
                last < Duration::from_secs(8),
                "the deadline passed unnoticed"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.join().map_err(|_| anyhow::anyhow!("panic"))??;
        Ok(last)
    })?;
    // ...until the deadline.
    assert!(
        stopping > Duration::from_millis(2500),
        "it ended after {stopping:?}"
    );
    assert!(
        stopping < Duration::from_secs(6),
        "it ended after {stopping:?}"
    );
    assert_eq!(mesh.echo(client, target)?, Outcome::Refused);
    mesh.start_ztunnel("node1")?;
    mesh.eventually("calls again", || {
        let outcome = mesh.echo(client, target)?;
        anyhow::ensure!(outcome.is_ok(), "{outcome:?}");
        Ok(())
    })
}

#[test]
fn a_stop_without_open_connections_does_not_wait() -> anyhow::Result<()> {
    let mesh = mesh("30s")?;
    assert!(
        mesh.http_get(pod("shop/client"), mesh.at(pod("shop/web-b"), 8080)?)?
            .is_ok()
    );
    let begin = Instant::now();
    mesh.request(&Request::Stop {
        component: "ztunnel-node2".into(),
    })?;
    assert!(
        begin.elapsed() < Duration::from_secs(3),
        "{:?}",
        begin.elapsed()
    );
    Ok(())
}

#[test]
fn a_connection_that_is_being_opened_survives_a_stop() -> anyhow::Result<()> {
    let mesh = mesh("10s")?;
    let (client, outside) = (pod("shop/client"), pod("legacy/client"));
    // An app that is late to accept: the kernel keeps one connection for it and leaves further
    // SYNs without an answer.
    let app = mesh.listen(outside, 7070)?;
    listen(&app, Backlog::new(0)?)?;
    app.set_nonblocking(true)?;
    let first = mesh.in_pod(outside, || TcpStream::connect((Ipv4Addr::LOCALHOST, 7070)))??;
    let (target, web) = (mesh.at(outside, 7070)?, mesh.at(pod("shop/web-b"), 9090)?);
    // To its app it is open.
    let mut second = mesh.connect(client, target)??;
    second.write_all(b"hello")?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let stop = scope.spawn(|| {
            mesh.request(&Request::Stop {
                component: "ztunnel-node1".into(),
            })
        });
        mesh.eventually("closed listeners", || {
            let outcome = mesh.echo(client, web)?;
            anyhow::ensure!(outcome == Outcome::Refused, "{outcome:?}");
            Ok(())
        })?;
        let mut accepted = Vec::new();
        mesh.eventually("the second connection", || {
            accepted.push(app.accept()?.0);
            anyhow::ensure!(accepted.len() == 2, "only the first one");
            Ok(())
        })?;
        let mut heard = [0; 5];
        accepted[1].set_nonblocking(false)?;
        accepted[1].set_read_timeout(Some(Duration::from_secs(5)))?;
        accepted[1].read_exact(&mut heard)?;
        assert_eq!(&heard, b"hello");
        drop((accepted, first, second));
        stop.join().map_err(|_| anyhow::anyhow!("panic"))??;
        Ok(())
    })
}
