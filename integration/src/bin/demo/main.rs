//! `make demo`: a mesh on this machine, and a tour of it. Every line that is shown is
//! checked; the exit status says whether all were as expected.

mod waypoint;

use std::cell::Cell;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use adit_integration::{Call, Pod, TestMesh, pod};
use anyhow::{Context, bail};

/// An open connection that a policy denies ends within this time of the policy being written.
const AT_ONCE: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the demo makes network namespaces and loads BPF programs: run it as root");
        return ExitCode::FAILURE;
    }
    let tour = Tour::default();
    if let Err(error) = walk(&tour) {
        println!("\nthe tour ended early: {error:#}");
        return ExitCode::FAILURE;
    }
    match tour.failed.get() {
        0 => {
            println!("\n{} checks, all as expected.", tour.checks.get());
            print!("{GO_ON}");
            ExitCode::SUCCESS
        }
        failed => {
            println!(
                "\n{failed} of {} checks were not as expected.",
                tour.checks.get()
            );
            ExitCode::FAILURE
        }
    }
}

const GO_ON: &str = "
Go on by hand (the YAML is in deploy/samples/mesh; edit it and the mesh follows):
  target/debug/adit local up -f deploy/samples/mesh --detach
  target/debug/adit local status
  target/debug/adit local exec shop/client -- adit-sample call http://web.shop/ --count 3
  target/debug/adit local logs ztunnel-node1
  target/debug/adit ztunnel-config workloads
  target/debug/adit local down
L7 (deploy/samples/waypoint has the YAML and a README):
  target/debug/adit local apply -f deploy/samples/waypoint/reviews.yaml
  target/debug/adit waypoint apply -n shop --enroll-namespace --wait
  target/debug/adit local apply -f deploy/samples/waypoint/route.yaml
  target/debug/adit local exec shop/client -- adit-sample requests http://reviews.shop/
  target/debug/adit proxy-config routes
Metrics: port 15020 of each node, /metrics and /stats/prometheus; admin: port 15000, from
inside the node:
  target/debug/adit local exec node:node1 -- curl -s localhost:15020/metrics
";

#[derive(Default)]
struct Tour {
    checks: Cell<usize>,
    failed: Cell<usize>,
}

impl Tour {
    fn chapter(&self, title: &str) {
        println!("\n{title}");
    }

    fn check(&self, text: impl AsRef<str>, holds: bool) {
        self.checks.set(self.checks.get() + 1);
        if !holds {
            self.failed.set(self.failed.get() + 1);
        }
        println!(
            "  {} {}",
            if holds { "ok  " } else { "FAIL" },
            text.as_ref()
        );
    }
}

fn walk(tour: &Tour) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mesh = TestMesh::sample()?;
    tour.chapter("1. Two nodes, six pods, two of them outside the mesh");
    for pod in &mesh.status()?.pods {
        println!(
            "       {:<14} {:<6} {}",
            format!("{}/{}", pod.namespace, pod.name),
            pod.node,
            pod.addresses.join(" ")
        );
    }
    tour.check(
        format!("up and enrolled in {:.1} s", begin.elapsed().as_secs_f64()),
        mesh.status()?.pods.len() == 6,
    );
    paths(tour, &mesh)?;
    opt_out_and_in(tour, &mesh)?;
    deny_a_caller(tour, &mesh)?;
    strict(tour, &mesh)?;
    ztunnel_dies(tour, &mesh)?;
    waypoint::walk(tour, &mesh)
}

/// Who called whom, over which path, as whom, and how long it took.
fn paths(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("2. Who calls whom, over which path, and as whom");
    let routes = [
        ("shop/client", "shop/web-a", true),
        ("shop/client", "shop/web-b", true),
        ("legacy/client", "shop/web-b", false),
        ("shop/client", "legacy/server", false),
        ("legacy/client", "legacy/server", false),
    ];
    for (from, to, tunnelled) in routes {
        let (client, server) = (pod(from), pod(to));
        let url = format!("http://{}:8080/", mesh.address(server)?);
        let calls = mesh.calls_with(client, &url, &["--count", "40", "--keepalive"])?;
        let answered = calls.iter().all(|c| c.ok() == Some(server.name));
        let seen = calls
            .first()
            .and_then(|c| c.peer)
            .context("no answer")?
            .ip()
            .to_string();
        let identity = identity_seen(mesh, client, server)?;
        let path = if identity.is_some() {
            "HBONE mTLS"
        } else {
            "plaintext"
        };
        let expected =
            tunnelled.then(|| format!("spiffe://cluster.local/ns/{}/sa/client", client.namespace));
        tour.check(
            format!(
                "{from:<13} -> {to:<13} {path:<10} as {:<42} app sees {seen:<11} p50 {:.2} ms",
                identity.as_deref().unwrap_or("nobody"),
                median(&calls)
            ),
            answered && identity == expected && seen == mesh.address(client)?,
        );
    }
    let calls = mesh.calls(pod("shop/client"), "http://web.shop/", 40)?;
    let (a, b) = (count(&calls, "web-a"), count(&calls, "web-b"));
    tour.check(
        format!("shop/client   -> service web.shop: {a} answers of web-a, {b} of web-b"),
        a + b == 40 && a > 0 && b > 0,
    );
    let mesh_metrics = mesh.metrics("node2")?;
    let mtls = mesh_metrics.sum(
        "istio_tcp_connections_opened_total",
        &[
            ("reporter", "destination"),
            ("connection_security_policy", "mutual_tls"),
        ],
    );
    tour.check(
        format!("metrics of node2 count {mtls} mutual TLS connections"),
        mtls > 0.0,
    );
    Ok(())
}

/// The identity that the destination's proxy logged for the client; `None`: plaintext. A pod
/// outside the mesh has no proxy; then the client's own says which path it took.
fn identity_seen(
    mesh: &TestMesh,
    client: Pod<'_>,
    server: Pod<'_>,
) -> anyhow::Result<Option<String>> {
    if client.namespace == "legacy" && server.namespace == "legacy" {
        return Ok(None);
    }
    let (direction, node) = if server.namespace == "shop" {
        ("inbound", mesh.node_of(server)?)
    } else {
        ("outbound", mesh.node_of(client)?)
    };
    let address = mesh.address(client)?;
    let line = mesh.access_line(&node, |line| {
        line.get("direction") == direction
            && line.get("dst.workload") == server.name
            && line.get("src.addr").starts_with(&format!("{address}:"))
    })?;
    Ok(Some(line.get("src.identity").to_owned()).filter(|id| !id.is_empty()))
}

/// The label goes and comes back while a client goes on calling.
fn opt_out_and_in(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("3. The namespace's label is removed and set again, under way");
    let before: Vec<_> = processes(mesh)?;
    let server = pod("shop/web-b");
    let url = format!("http://{}:8080/", mesh.address(server)?);
    let stop = AtomicBool::new(false);
    let made = AtomicUsize::new(0);
    let calls = std::thread::scope(|scope| -> anyhow::Result<Vec<Call>> {
        let caller = scope.spawn(|| -> anyhow::Result<Vec<Call>> {
            let mut all = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let options = ["--count", "20", "--interval", "5"];
                all.extend(mesh.calls_with(pod("shop/client"), &url, &options)?);
                made.store(all.len(), Ordering::Relaxed);
            }
            Ok(all)
        });
        // Each state lasts for so many calls of the client.
        let some_calls = || {
            let enough = made.load(Ordering::Relaxed) + 200;
            mesh.eventually("calls", || match made.load(Ordering::Relaxed) {
                n if n < enough => bail!("{n} calls so far"),
                _ => Ok(()),
            })
        };
        let changed = (|| {
            some_calls()?;
            mesh.label_namespace("shop", None)?;
            mesh.wait_enrolled()?;
            let out = mesh.eventually("a plaintext call", || plaintext_call(mesh, &url));
            tour.check(
                "without the label the same pods talk plaintext",
                out.is_ok(),
            );
            some_calls()?;
            mesh.label_namespace("shop", Some("ambient"))?;
            mesh.wait_enrolled()?;
            let back = mesh.eventually("a call over HBONE", || match plaintext_call(mesh, &url) {
                Ok(()) => bail!("still plaintext"),
                Err(_) => Ok(()),
            });
            tour.check("with it they talk mutual TLS again", back.is_ok());
            some_calls()
        })();
        stop.store(true, Ordering::Relaxed);
        let calls = caller
            .join()
            .map_err(|_| anyhow::anyhow!("the caller panicked"))??;
        changed.map(|()| calls)
    })?;
    let failed: Vec<&Call> = calls.iter().filter(|c| c.ok().is_none()).collect();
    tour.check(
        format!(
            "{} calls meanwhile, {} failed {}",
            calls.len(),
            failed.len(),
            failed.first().map_or(String::new(), |c| format!("({c:?})"))
        ),
        failed.is_empty(),
    );
    tour.check("no pod was restarted", processes(mesh)? == before);
    Ok(())
}

/// Succeeds if a call now reaches the server without a tunnel.
fn plaintext_call(mesh: &TestMesh, url: &str) -> anyhow::Result<()> {
    let server = pod("shop/web-b");
    let tunnelled = |mesh: &TestMesh| -> anyhow::Result<f64> {
        let labels = [
            ("reporter", "destination"),
            ("connection_security_policy", "mutual_tls"),
        ];
        Ok(mesh
            .metrics(&mesh.node_of(server)?)?
            .sum("istio_tcp_connections_opened_total", &labels))
    };
    let before = tunnelled(mesh)?;
    let call = mesh.call(pod("shop/visitor"), url)?;
    if call.ok() != Some(server.name) {
        bail!("{call:?}");
    }
    // The client that goes on calling is counted too: no change means that it is plain as well.
    let after = tunnelled(mesh)?;
    if after > before {
        bail!("{} connections came over HBONE", after - before);
    }
    Ok(())
}

fn processes(mesh: &TestMesh) -> anyhow::Result<Vec<(String, Option<u32>, u32)>> {
    Ok(mesh
        .status()?
        .pods
        .iter()
        .flat_map(|p| {
            p.containers.iter().map(|c| {
                (
                    p.uid.clone(),
                    c.process.as_ref().map(|process| process.pid),
                    c.restarts,
                )
            })
        })
        .collect())
}

/// A policy denies one caller, at once, on open connections too.
fn deny_a_caller(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("4. An AuthorizationPolicy denies one caller");
    let target = format!("{}:9090", mesh.address(pod("shop/web-b"))?);
    let url = format!("http://{}:8080/", mesh.address(pod("shop/web-b"))?);
    let visitor = mesh.stream(pod("shop/visitor"), &target)?;
    let client = mesh.stream(pod("shop/client"), &target)?;
    visitor.wait("echo", AT_ONCE)?;
    client.wait("echo", AT_ONCE)?;
    let written = Instant::now();
    mesh.apply("deny.yaml", DENY_VISITOR)?;
    let ended = visitor.wait("ended", AT_ONCE);
    tour.check(
        format!(
            "the visitor's open connection ends {} ms after the policy is written",
            written.elapsed().as_millis()
        ),
        ended.is_ok(),
    );
    let call = mesh.call(pod("shop/visitor"), &url)?;
    tour.check(
        format!("a new one of the visitor is refused ({})", told(&call)),
        call.ok().is_none(),
    );
    client.skip_old();
    let goes_on = client.wait("echo", AT_ONCE).is_ok();
    let call = mesh.call(pod("shop/client"), &url)?;
    tour.check(
        "the other client's open and new connections go on",
        goes_on && call.ok().is_some(),
    );
    let line = mesh.access_line("node2", |l| l.get("error").contains("shop/no-visitors"));
    tour.check(
        format!(
            "the log of node2 names the policy: {}",
            line.as_ref().map_or("-", |l| l.get("error"))
        ),
        line.is_ok(),
    );
    mesh.delete("deny.yaml")?;
    let again = mesh.eventually("the visitor is let in again", || {
        let call = mesh.call(pod("shop/visitor"), &url)?;
        call.ok().map(drop).with_context(|| format!("{call:?}"))
    });
    tour.check(
        "the policy is deleted, and the visitor is let in again",
        again.is_ok(),
    );
    Ok(())
}

const DENY_VISITOR: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-visitors, namespace: shop }
spec:
  selector: { matchLabels: { app: web } }
  action: DENY
  rules:
    - from: [{ source: { principals: [cluster.local/ns/shop/sa/visitor] } }]
";

/// STRICT mutual TLS refuses the client without the label.
fn strict(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("5. PeerAuthentication STRICT");
    let url = format!("http://{}:8080/", mesh.address(pod("shop/web-b"))?);
    mesh.apply("strict.yaml", STRICT)?;
    let refused = mesh.eventually("plaintext is refused", || {
        let call = mesh.call(pod("legacy/client"), &url)?;
        match call.ok() {
            Some(_) => bail!("still answered"),
            None => Ok(call),
        }
    });
    tour.check(
        format!(
            "legacy/client is refused ({})",
            refused.as_ref().map_or("no".into(), told)
        ),
        refused.is_ok(),
    );
    let call = mesh.call(pod("shop/client"), &url)?;
    tour.check("shop/client is not", call.ok().is_some());
    mesh.delete("strict.yaml")?;
    let again = mesh.eventually("plaintext is let in again", || {
        let call = mesh.call(pod("legacy/client"), &url)?;
        call.ok().map(drop).with_context(|| format!("{call:?}"))
    });
    tour.check("PERMISSIVE again: legacy/client is answered", again.is_ok());
    Ok(())
}

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: shop }
spec: { mtls: { mode: STRICT } }
";

/// A dead ztunnel means refused, not plaintext.
fn ztunnel_dies(tour: &Tour, mesh: &TestMesh) -> anyhow::Result<()> {
    tour.chapter("6. kill -9 of ztunnel on the client's node");
    let (client, server) = (pod("shop/client"), pod("shop/web-b"));
    let url = format!("http://{}:8080/", mesh.address(server)?);
    mesh.count_packets(client)?;
    let node = mesh.node_of(client)?;
    mesh.kill_ztunnel(&node)?;
    let before = mesh.packets(client)?;
    let call = mesh.call(client, &url)?;
    tour.check(
        format!(
            "a new connection is refused in {:.1} ms ({})",
            call.latency_ms,
            told(&call)
        ),
        call.ok().is_none() && call.latency_ms < 100.0,
    );
    let inbound = mesh.call(
        pod("legacy/server"),
        &format!("http://{}:8080/", mesh.address(pod("shop/web-a"))?),
    )?;
    tour.check(
        format!("so is one to a pod of that node ({})", told(&inbound)),
        inbound.ok().is_none(),
    );
    let after = mesh.packets(client)?;
    tour.check(
        format!(
            "packets that left or reached the pod in plaintext meanwhile: {}",
            after.plaintext - before.plaintext
        ),
        after.plaintext == before.plaintext,
    );
    mesh.start_ztunnel(&node)?;
    let again = mesh.eventually("traffic flows again", || {
        let call = mesh.call(client, &url)?;
        call.ok().map(drop).with_context(|| format!("{call:?}"))
    });
    tour.check(
        "started again: traffic flows again, no pod was touched",
        again.is_ok(),
    );
    let now = mesh.packets(client)?;
    tour.check(
        format!(
            "and over HBONE alone ({} packets, {} in plaintext)",
            now.hbone, now.plaintext
        ),
        now.hbone > after.hbone && now.plaintext == 0,
    );
    Ok(())
}

fn told(call: &Call) -> String {
    match (&call.error, call.status) {
        (Some(error), _) => error.clone(),
        (None, Some(status)) => format!("status {status}"),
        (None, None) => "nothing".into(),
    }
}

fn count(calls: &[Call], server: &str) -> usize {
    calls.iter().filter(|c| c.ok() == Some(server)).count()
}

fn median(calls: &[Call]) -> f64 {
    let mut all: Vec<f64> = calls.iter().map(|c| c.latency_ms).collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or_default()
}
