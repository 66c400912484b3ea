//! Pods, services and slices on the wire, against a golden file; and what decides.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use adit_controlplane::compile::{MeshConfig, Redirection, compile};
use adit_shared::model::address_from_resource;
use adit_shared::proto::workload::address;

use crate::harness::{mesh, mesh_with, read, trust_domain};

/// Set `UPDATE_GOLDEN=1` to write what is found.
#[test]
fn everything_of_a_shop() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let input = fs::read_to_string(data.join("shop.yaml")).unwrap();
    let mesh = mesh(&input);
    let mut found = String::new();
    for (name, resource) in &mesh.compiled.addresses {
        // Node proxies accept it.
        address_from_resource(name, resource).unwrap();
        match &resource.r#type {
            Some(address::Type::Workload(w)) => {
                writeln!(found, "{name}: {:?} {:?}", w.tunnel_protocol(), w.status()).unwrap();
                let ips: Vec<_> = w.addresses.iter().map(|a| ip(a)).collect();
                writeln!(found, "  addresses {}", ips.join(" ")).unwrap();
                writeln!(found, "  network {:?} {:?}", w.network, w.network_mode()).unwrap();
                writeln!(
                    found,
                    "  account {:?} node {:?} native {}",
                    w.service_account, w.node, w.native_tunnel
                )
                .unwrap();
                writeln!(
                    found,
                    "  canonical {}/{} workload {}",
                    w.canonical_name, w.canonical_revision, w.workload_name
                )
                .unwrap();
                if let Some(l) = &w.locality {
                    writeln!(found, "  locality {}/{}/{}", l.region, l.zone, l.subzone).unwrap();
                }
                for (service, ports) in &w.services {
                    let ports: Vec<_> = ports
                        .ports
                        .iter()
                        .map(|p| {
                            format!(
                                "{}->{} {:?}",
                                p.service_port,
                                p.target_port,
                                p.app_protocol()
                            )
                        })
                        .collect();
                    writeln!(found, "  in {service}: {}", ports.join(", ")).unwrap();
                }
                for policy in &w.authorization_policies {
                    writeln!(found, "  policy {policy}").unwrap();
                }
            }
            Some(address::Type::Service(s)) => {
                writeln!(
                    found,
                    "{name}: {:?} canonical {}",
                    s.ip_families(),
                    s.canonical
                )
                .unwrap();
                let ips: Vec<_> = s
                    .addresses
                    .iter()
                    .map(|a| format!("{}{}", a.network, ip(&a.address)))
                    .collect();
                writeln!(found, "  addresses {}", ips.join(" ")).unwrap();
                let ports: Vec<_> = s
                    .ports
                    .iter()
                    .map(|p| {
                        format!(
                            "{}->{} {:?}",
                            p.service_port,
                            p.target_port,
                            p.app_protocol()
                        )
                    })
                    .collect();
                writeln!(found, "  ports {}", ports.join(", ")).unwrap();
                if let Some(lb) = &s.load_balancing {
                    let scopes: Vec<_> =
                        lb.routing_preference().map(|s| format!("{s:?}")).collect();
                    writeln!(
                        found,
                        "  balancing {:?} [{}] {:?}",
                        lb.mode(),
                        scopes.join(","),
                        lb.health_policy()
                    )
                    .unwrap();
                }
            }
            None => panic!("{name}"),
        }
    }
    for (uid, (node, e)) in &mesh.compiled.enrolments {
        writeln!(
            found,
            "enrolment {uid} on {node}: {}/{} as {} outbound only {}",
            e.namespace, e.name, e.service_account, e.outbound_only
        )
        .unwrap();
    }
    let golden = data.join("shop.golden");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &found).unwrap();
    }
    similar(&fs::read_to_string(golden).unwrap(), &found);
}

fn similar(expected: &str, found: &str) {
    for (number, pair) in expected.lines().zip(found.lines()).enumerate() {
        assert_eq!(pair.0, pair.1, "line {}", number + 1);
    }
    assert_eq!(expected.lines().count(), found.lines().count());
}

fn ip(bytes: &[u8]) -> String {
    match bytes.len() {
        4 => std::net::IpAddr::from(<[u8; 4]>::try_from(bytes).unwrap()).to_string(),
        _ => std::net::IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap()).to_string(),
    }
}

fn pod(metadata: &str, status: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: a{metadata}}}\nspec: {{nodeName: n1, containers: []}}\nstatus: {{{status}}}\n"
    )
}

#[test]
fn only_a_reported_pod_says_hbone() {
    use adit_shared::proto::workload::TunnelProtocol::{Hbone, None};
    let ambient = ", uid: u, labels: {istio.io/dataplane-mode: ambient}";
    let annotated = ", uid: u, labels: {istio.io/dataplane-mode: ambient}, annotations: {ambient.istio.io/redirection: enabled}";
    let native = ", uid: u, labels: {networking.istio.io/tunnel: http}";
    for (metadata, reported, expected, is_native) in [
        (ambient, false, None, false),
        (ambient, true, Hbone, false),
        // Only nodes may say so.
        (annotated, false, None, false),
        (native, false, Hbone, true),
    ] {
        let (objects, _) = read(&pod(metadata, "phase: Running, podIP: 10.0.0.1"));
        let mut redirection = Redirection::default();
        if reported {
            redirection.hbone.insert("u".into());
        }
        let compiled = compile(&objects, &redirection, &MeshConfig::default());
        let mesh = crate::harness::Mesh {
            compiled,
            config: MeshConfig::default(),
        };
        let workload = mesh.workload("a/p");
        assert_eq!(
            workload.tunnel_protocol(),
            expected,
            "{metadata} {reported}"
        );
        assert_eq!(workload.native_tunnel, is_native, "{metadata} {reported}");
    }
}

/// Istio PodLifecycleWorkloadGates.
#[test]
fn which_pods_are_workloads() {
    use adit_shared::proto::workload::WorkloadStatus::{Healthy, Unhealthy};
    let ready = "conditions: [{type: Ready, status: 'True'}]";
    for (metadata, status, expected) in [
        (
            "",
            format!("phase: Running, podIP: 10.0.0.1, {ready}"),
            Some(Healthy),
        ),
        (
            "",
            "phase: Running, podIP: 10.0.0.1".into(),
            Some(Unhealthy),
        ),
        (
            "",
            "phase: Running, podIP: 10.0.0.1, conditions: [{type: Ready, status: 'False'}]".into(),
            Some(Unhealthy),
        ),
        (
            "",
            "phase: Pending, podIP: 10.0.0.1".into(),
            Some(Unhealthy),
        ),
        ("", "phase: Pending".into(), None),
        ("", format!("phase: Running, {ready}"), None),
        (
            "",
            format!("phase: Succeeded, podIP: 10.0.0.1, {ready}"),
            None,
        ),
        ("", format!("phase: Failed, podIP: 10.0.0.1, {ready}"), None),
        (
            ", deletionTimestamp: '2025-01-01T00:00:00Z'",
            format!("phase: Running, podIP: 10.0.0.1, {ready}"),
            Some(Unhealthy),
        ),
    ] {
        let mesh = mesh(&pod(metadata, &status));
        let found = mesh.compiled.addresses.contains_key("Kubernetes//Pod/a/p");
        let found = found.then(|| mesh.workload("a/p").status());
        assert_eq!(found, expected, "{metadata} {status}");
    }
}

#[test]
fn settings_of_the_mesh_reach_every_resource() {
    let config = MeshConfig {
        trust_domain: trust_domain("acme.td"),
        cluster_id: "east".into(),
        cluster_domain: "corp".into(),
        network: "n0".into(),
        ..MeshConfig::default()
    };
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: a}\nspec: {clusterIP: 10.9.0.1, ports: [{port: 80}]}\n";
    let label = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: n1}}\n";
    for (more, network) in [("", "n0"), (label, "n1")] {
        let yaml = format!(
            "{}{service}{more}",
            pod("", "phase: Running, podIP: 10.0.0.1")
        );
        let mesh = mesh_with(&yaml, config.clone());
        let Some(address::Type::Workload(workload)) =
            &mesh.compiled.addresses["east//Pod/a/p"].r#type
        else {
            panic!("no workload");
        };
        assert_eq!(
            (
                &*workload.trust_domain,
                &*workload.cluster_id,
                &*workload.network
            ),
            ("acme.td", "east", network)
        );
        assert_eq!(mesh.service("a/s.a.svc.corp").addresses[0].network, network);
    }
}
