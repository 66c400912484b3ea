//! Fifty pods are created in a meshed namespace, used, and deleted: no rule, link, pin,
//! listener, certificate or memory of them stays.

use std::time::{Duration, Instant};

use adit_integration::mesh::{DEADLINE, MeshBuilder};
use adit_integration::{Manifest, TestMesh, pod};
use anyhow::Context;

const PODS: usize = 50;

/// What a node holds.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: u64,
    pins: usize,
    links: usize,
    captured: u64,
    certificates: usize,
    workloads: usize,
    /// To other pods.
    tunnels: u64,
}

fn holdings(mesh: &TestMesh, node: &str) -> anyhow::Result<Holdings> {
    let metrics = mesh.metrics(node)?;
    let dump = mesh.config_dump(node)?;
    let count = |key: &str| dump[key].as_array().map_or(0, Vec::len);
    let pid = mesh.pid(&format!("ztunnel-{node}"))?;
    // Sockets, netns handles, programs and maps; without the pipes of a request under way.
    let mut descriptors = 0;
    let mut links = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let Ok(target) = std::fs::read_link(entry?.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        descriptors += 1;
        links += usize::from(target.contains("bpf"));
    }
    // A pod that vanishes says no farewell: its peers' keepalive ends the tunnels from it, 30
    // seconds later. They are one descriptor each.
    let tunnels = |reporter| metrics.sum("adit_tunnels_open", &[("reporter", reporter)]) as u64;
    Ok(Holdings {
        descriptors: descriptors - tunnels("destination"),
        pins: files(&mesh.bpffs(node))?,
        links,
        captured: metrics.sum("workload_manager_active_proxy_count", &[]) as u64,
        certificates: count("certificates"),
        workloads: count("workloads"),
        tunnels: tunnels("source"),
    })
}

fn files(directory: &std::path::Path) -> anyhow::Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        count += if path.is_dir() { files(&path)? } else { 1 };
    }
    Ok(count)
}

/// What a component has allocated, in kB. Pages of its program are not counted: the kernel
/// maps and ztunnel lets go of them as it likes, some 9 MB in a debug build.
fn allocated(mesh: &TestMesh, component: &str) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", mesh.pid(component)?))?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    Ok(line
        .context("RssAnon")?
        .trim()
        .trim_end_matches(" kB")
        .parse()?)
}

#[test]
fn fifty_pods_leave_no_trace() -> anyhow::Result<()> {
    let base = Manifest::two_nodes()
        .ambient("shop")
        .client(pod("shop/client"), "node1", "client")
        .server(pod("shop/web"), "node2", "web", "web");
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", base.yaml())])
        .ztunnel_env("CONNECTION_TERMINATION_DEADLINE", "1s")
        .config(|config| {
            config
                .aditd_env
                .insert("ADIT_WITHDRAW_DELAY".into(), "100ms".into());
        })
        .up()?;
    let web = mesh.at(pod("shop/web"), 8080)?;
    let crowd = |round: usize| {
        let mut all = Manifest::default();
        for index in 0..PODS {
            let node = if index % 2 == 0 { "node1" } else { "node2" };
            let name = format!("p{round}-{index}");
            all = all.client(
                pod(&format!("shop/{name}")),
                node,
                &format!("sa{}", index % 5),
            );
        }
        all
    };
    let settle = |what: &str, captured: u64| {
        mesh.eventually(what, || {
            let now: u64 = ["node1", "node2"]
                .iter()
                .map(|node| Ok(holdings(&mesh, node)?.captured))
                .sum::<anyhow::Result<u64>>()?;
            anyhow::ensure!(now == captured, "{now} pods are captured");
            Ok(())
        })
    };
    let round = |number: usize| -> anyhow::Result<()> {
        mesh.apply("crowd.yaml", crowd(number).yaml())?;
        settle("all captured", PODS as u64 + 2)?;
        mesh.wait_pods_ready(DEADLINE)?;
        mesh.wait_enrolled()?;
        for index in (0..PODS).step_by(5) {
            let name = format!("shop/p{number}-{index}");
            let outcome = mesh.http_get(pod(&name), web)?;
            assert!(outcome.is_ok(), "{name}: {outcome:?}");
        }
        mesh.delete("crowd.yaml")?;
        settle("all gone", 2)?;
        // Sockets that the test made in those pods would keep their namespaces.
        mesh.forget_sockets();
        Ok(())
    };
    assert!(mesh.http_get(pod("shop/client"), web)?.is_ok());
    // The first round fills what is kept on purpose: buffers, threads, series.
    round(0)?;
    let nodes = ["node1", "node2"];
    let mut before = Vec::new();
    for node in nodes {
        let quiet = quiet(&mesh, node)?;
        before.push((quiet, allocated(&mesh, &format!("ztunnel-{node}"))?));
    }
    let aditd = allocated(&mesh, "aditd")?;

    round(1)?;
    round(2)?;

    for (node, (was, memory)) in nodes.into_iter().zip(before) {
        mesh.eventually("nothing is left", || {
            let now = holdings(&mesh, node)?;
            anyhow::ensure!(now == was, "{node}: {now:?}, was {was:?}");
            Ok(())
        })?;
        let now = allocated(&mesh, &format!("ztunnel-{node}"))?;
        assert!(
            now < memory + 4096,
            "ztunnel-{node}: {memory} kB, now {now} kB"
        );
    }
    let now = allocated(&mesh, "aditd")?;
    assert!(now < aditd + 8192, "aditd: {aditd} kB, now {now} kB");
    // A pod that was there all the time has not noticed.
    assert!(mesh.http_get(pod("shop/client"), web)?.is_ok());
    Ok(())
}

/// What a node holds when that has stopped changing.
fn quiet(mesh: &TestMesh, node: &str) -> anyhow::Result<Holdings> {
    let mut last = holdings(mesh, node)?;
    let mut since = Instant::now();
    let until = Instant::now() + DEADLINE;
    while since.elapsed() < Duration::from_millis(1500) {
        anyhow::ensure!(
            Instant::now() < until,
            "{node} does not come to rest: {last:?}"
        );
        std::thread::sleep(Duration::from_millis(100));
        let now = holdings(mesh, node)?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(last)
}
