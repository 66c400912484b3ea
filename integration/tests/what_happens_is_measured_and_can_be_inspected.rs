//! Metrics with Istio's names and labels, the same figures at both ends; the configuration
//! dump that `istioctl ztunnel-config` reads; readiness; log level at run time.

use std::io::{Read, Write};
use std::net::Shutdown;

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::{Metrics, TestMesh, pod};
use anyhow::Context;

const OPENED: &str = "istio_tcp_connections_opened_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";
const SENT: &str = "istio_tcp_sent_bytes_total";

/// The label set of Istio's ztunnel, in full.
const LABELS: [&str; 27] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];

#[test]
fn both_reporters_agree_on_what_a_connection_carried() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default().files(SAMPLE_MESH).up()?;
    let listener = mesh.listen(pod("shop/web-b"), 7300)?;
    let target = mesh.at(pod("shop/web-b"), 7300)?;
    // From a pod of the mesh, and from outside: 1000 bytes up, 70,000 down.
    for (from, security) in [("shop/client", "mutual_tls"), ("legacy/client", "unknown")] {
        let mut client = mesh.connect(pod(from), target)??;
        client.write_all(&[1; 1000])?;
        client.shutdown(Shutdown::Write)?;
        let (mut server, _) = listener.accept()?;
        let mut up = Vec::new();
        server.read_to_end(&mut up)?;
        assert_eq!(up.len(), 1000);
        server.write_all(&[2; 70_000])?;
        drop(server);
        let mut down = Vec::new();
        client.read_to_end(&mut down)?;
        assert_eq!(down.len(), 70_000);
        drop(client);

        let mutual = security == "mutual_tls";
        let reporters: &[(&str, &str)] = if mutual {
            &[("node1", "source"), ("node2", "destination")]
        } else {
            &[("node2", "destination")]
        };
        for (node, reporter) in reporters {
            let of = [
                ("reporter", *reporter),
                ("connection_security_policy", security),
                ("destination_workload", "web-b"),
                ("request_protocol", "tcp"),
                ("response_flags", "-"),
            ];
            let metrics = mesh.eventually("a closed connection", || {
                let metrics = mesh.metrics(node)?;
                anyhow::ensure!(metrics.sum(CLOSED, &of) == 1.0, "{}", metrics.text());
                Ok(metrics)
            })?;
            assert_eq!(metrics.sum(OPENED, &of), 1.0, "{node}");
            assert_eq!(
                metrics.sum(RECEIVED, &of),
                1000.0,
                "{node}: what the server received"
            );
            assert_eq!(
                metrics.sum(SENT, &of),
                70_000.0,
                "{node}: what the server sent"
            );
            let series = series(&metrics, OPENED, &of)?;
            for label in LABELS {
                assert!(
                    series.contains(&format!("{label}=\"")),
                    "{node}: no {label} in {series}"
                );
            }
            let mut expected = vec![
                ("source_workload", "client"),
                (
                    "source_workload_namespace",
                    if mutual { "shop" } else { "legacy" },
                ),
                ("source_canonical_service", "client"),
                ("source_cluster", "Kubernetes"),
                ("source_zone", "a"),
                ("source_region", "local"),
                ("destination_workload_namespace", "shop"),
                ("destination_canonical_service", "web"),
                ("destination_canonical_revision", "v2"),
                ("destination_version", "v2"),
                ("destination_app", "web"),
                ("destination_cluster", "Kubernetes"),
                ("destination_zone", "b"),
                // Called by the pod's address, not by the Service's.
                ("destination_service_name", "unknown"),
            ];
            if mutual {
                expected.push((
                    "source_principal",
                    "spiffe://cluster.local/ns/shop/sa/client",
                ));
                expected.push((
                    "destination_principal",
                    "spiffe://cluster.local/ns/shop/sa/web",
                ));
            } else {
                expected.push(("source_principal", "unknown"));
            }
            for (label, value) in expected {
                assert!(
                    series.contains(&format!("{label}=\"{value}\"")),
                    "{node}, {from}: {label} is not {value:?} in {series}"
                );
            }
        }
    }

    // By the Service.
    let vip = mesh.service("shop", "web", 80)?;
    for _ in 0..20 {
        assert!(mesh.http_get(pod("shop/client"), vip)?.is_ok());
    }
    let of = [
        ("destination_service", "web.shop.svc.cluster.local"),
        ("destination_service_name", "web"),
        ("destination_service_namespace", "shop"),
    ];
    mesh.eventually("service labels at both reporters", || {
        let (near, far) = (mesh.metrics("node1")?, mesh.metrics("node2")?);
        let sources = near.sum(CLOSED, &[&of[..], &[("reporter", "source")]].concat());
        let by = [&of[..], &[("reporter", "destination")]].concat();
        let destinations = near.sum(CLOSED, &by) + far.sum(CLOSED, &by);
        anyhow::ensure!(
            sources == 20.0 && destinations == 20.0,
            "{sources}, {destinations}"
        );
        let sent = near.sum(SENT, &by) + far.sum(SENT, &by);
        let at_source = near.sum(SENT, &[&of[..], &[("reporter", "source")]].concat());
        anyhow::ensure!(
            sent == at_source,
            "{sent} bytes sent, {at_source} at the source"
        );
        Ok(())
    })?;

    // The other metrics that dashboards use, by name; and the second path.
    let metrics = mesh.metrics("node1")?;
    for name in [
        "istio_build{",
        "istio_xds_message_total{",
        "istio_xds_message_bytes_total{",
        "workload_manager_active_proxy_count",
        "workload_manager_pending_proxy_count",
        "workload_manager_proxies_started_total",
        "workload_manager_proxies_stopped_total",
        "process_open_fds",
        "process_max_fds",
        "adit_tunnels_open{",
        "adit_tls_handshake_duration_seconds",
    ] {
        assert!(metrics.text().contains(name), "no {name}");
    }
    // What the workers' pools did reaches the metrics within seconds.
    mesh.eventually("counts of the tunnels", || {
        let metrics = mesh.metrics("node1")?;
        for name in [
            "adit_tunnel_pool_connections",
            "adit_tunnel_pool_connected_total",
            "adit_buffer_pool_bytes",
        ] {
            anyhow::ensure!(metrics.sum(name, &[]) > 0.0, "{name}");
        }
        assert_eq!(
            metrics.sum("workload_manager_pending_proxy_count", &[]),
            0.0
        );
        Ok(())
    })?;
    assert_eq!(mesh.get("node1", 15020, "/stats/prometheus")?.status, 200);
    assert_eq!(mesh.get("node1", 15020, "/nothing")?.status, 404);
    Ok(())
}

fn series(metrics: &Metrics, name: &str, of: &[(&str, &str)]) -> anyhow::Result<String> {
    let found = metrics.text().lines().find(|line| {
        line.starts_with(name)
            && of
                .iter()
                .all(|(k, v)| line.contains(&format!("{k}=\"{v}\"")))
    });
    Ok(found.context("no such series")?.to_owned())
}

#[test]
fn the_configuration_dump_has_what_istioctl_reads() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default().files(SAMPLE_MESH).up()?;
    let web_b = pod("shop/web-b");
    let open = mesh.stream(
        pod("shop/client"),
        &format!("{}:9090", mesh.address(web_b)?),
    )?;
    open.wait("echo", std::time::Duration::from_secs(5))?;
    let (near, far) = (mesh.config_dump("node1")?, mesh.config_dump("node2")?);
    for key in [
        "workloads",
        "services",
        "policies",
        "stagedServices",
        "staticConfig",
        "version",
        "config",
        "certificates",
        "workloadState",
    ] {
        assert!(near.get(key).is_some(), "no {key}");
    }

    // Certificates: of this node's pods, and of no others.
    let identities = |dump: &serde_json::Value| -> Vec<String> {
        let all = dump["certificates"].as_array().into_iter().flatten();
        let mut all: Vec<_> = all
            .filter_map(|c| c["identity"].as_str().map(str::to_owned))
            .collect();
        all.sort();
        all
    };
    let sa = |name: &str| format!("spiffe://cluster.local/ns/shop/sa/{name}");
    assert_eq!(identities(&near), [sa("client"), sa("visitor"), sa("web")]);
    assert_eq!(identities(&far), [sa("web")]);
    for certificate in near["certificates"].as_array().into_iter().flatten() {
        assert_eq!(certificate["state"], "Available", "{certificate}");
        for part in ["certChain", "rootCerts"] {
            let first = &certificate[part][0];
            for field in ["pem", "serialNumber", "validFrom", "expirationTime"] {
                let value = first[field].as_str().unwrap_or_default();
                assert!(!value.is_empty(), "{part}[0].{field} in {certificate}");
            }
        }
        assert!(
            !certificate.to_string().contains("PRIVATE KEY"),
            "no key leaves the process"
        );
    }

    // Connections, at both ends.
    let uid = |name: &str| -> anyhow::Result<String> {
        let status = mesh.status()?;
        Ok(status.pod("shop", name).context("no such pod")?.uid.clone())
    };
    let ends = [(&near, "client", "outbound"), (&far, "web-b", "inbound")];
    for (dump, name, direction) in ends {
        let state = &dump["workloadState"][uid(name)?];
        let all = state["connections"][direction]
            .as_array()
            .context("connections")?;
        assert_eq!(all.len(), 1, "{name}: {state}");
    }

    // Readiness, wrong paths, wrong methods.
    let ready = mesh.get("node1", 15021, "/healthz/ready")?;
    assert_eq!((ready.status, ready.text().trim()), (200, "ready"));
    assert_eq!(mesh.get("node1", 15000, "/nothing")?.status, 404);
    assert_eq!(
        mesh.http("node1", "POST", 15000, "/config_dump")?.status,
        405
    );
    assert_eq!(mesh.get("node1", 15000, "/quitquitquit")?.status, 405);
    // Admin is for the node alone.
    let node = mesh.status()?.node("node1").context("node1")?.addresses[0].clone();
    let admin = std::net::SocketAddr::new(node.parse()?, 15000);
    assert!(mesh.http_get(pod("legacy/client"), admin)?.is_denied());
    Ok(())
}

#[test]
fn the_log_level_changes_at_run_time() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default().files(SAMPLE_MESH).up()?;
    let client = pod("shop/client");
    let target = mesh.at(pod("shop/web-a"), 8080)?;
    let opened = |mesh: &TestMesh| -> anyhow::Result<usize> {
        let log = std::fs::read_to_string(mesh.component_log("ztunnel-node1")?)?;
        Ok(log
            .lines()
            .filter(|l| l.contains("connection opened"))
            .count())
    };
    let complete = |mesh: &TestMesh| -> anyhow::Result<usize> {
        let lines = mesh.access_log("node1")?;
        Ok(lines
            .iter()
            .filter(|l| l.message == "connection complete")
            .count())
    };
    // Two lines for each call: both ends are on this node.
    let mut calls = 0;
    let mut call = |mesh: &TestMesh| -> anyhow::Result<()> {
        assert!(mesh.http_get(client, target)?.is_ok());
        calls += 2;
        mesh.eventually("access log", || {
            anyhow::ensure!(complete(mesh)? == calls);
            Ok(())
        })
    };
    call(&mesh)?;
    assert_eq!(opened(&mesh)?, 0);
    let set = |query: &str| mesh.http("node1", "POST", 15000, &format!("/logging{query}"));
    let answer = set("?level=access=debug,info")?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.text().contains("access=debug"), "{}", answer.text());
    call(&mesh)?;
    assert_eq!(opened(&mesh)?, 2);
    // What is not understood changes nothing.
    assert_eq!(set("?level=access=loud")?.status, 400);
    call(&mesh)?;
    assert_eq!(opened(&mesh)?, 4);
    assert_eq!(set("?reset")?.status, 200);
    call(&mesh)?;
    assert_eq!(opened(&mesh)?, 4);
    Ok(())
}
