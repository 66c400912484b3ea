//! The enrolment decision (reference: istio.md 1.3), over real pods: what the control plane
//! says, and what is on the wire.

use adit_integration::mesh::MeshBuilder;
use adit_integration::{Manifest, pod};

const SERVE: &str = "{ name: server, image: adit-sample, command: [adit-sample, serve] }";

#[test]
fn pod_labels_win_and_some_pods_are_never_captured() -> anyhow::Result<()> {
    let mut all = Manifest::two_nodes()
        .ambient("in")
        .namespace("out", "")
        .namespace("opted", "istio.io/dataplane-mode: none")
        .ambient("kube-system")
        .client(pod("in/client"), "node1", "client");
    // (pod, labels, captured)
    let table = [
        ("in/plain-label", "app: x", true),
        ("in/none", "istio.io/dataplane-mode: none", false),
        ("in/sidecar", "app: sidecar", false),
        (
            "in/gateway",
            "gateway.istio.io/managed: istio.io-gateway-controller",
            false,
        ),
        ("out/unlabelled", "app: x", false),
        ("out/ambient", "istio.io/dataplane-mode: ambient", true),
        ("opted/unlabelled", "app: x", false),
        ("opted/ambient", "istio.io/dataplane-mode: ambient", true),
        ("kube-system/inherits", "app: x", false),
        (
            "kube-system/labelled",
            "istio.io/dataplane-mode: ambient",
            false,
        ),
    ];
    for (path, labels, _) in table {
        let target = pod(path);
        if path == "in/sidecar" {
            all = all.document(&format!(
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: sidecar\n  namespace: in\n  \
                 annotations: {{ sidecar.istio.io/status: '{{}}' }}\nspec: {{ nodeName: node2, \
                 containers: [{SERVE}] }}"
            ));
        } else {
            all = all.pod(target, "node2", "default", labels, SERVE);
        }
    }
    // A job that ends.
    all = all.document(
        "apiVersion: v1\nkind: Pod\nmetadata: { name: job, namespace: in }\nspec: { nodeName: \
         node2, restartPolicy: Never, containers: [{ name: job, image: x, command: ['true'] }] }",
    );
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", all.yaml())])
        .do_not_wait()
        .up()?;
    mesh.wait_pods_ready(adit_integration::mesh::DEADLINE)?;

    mesh.eventually("the enrolment decisions", || {
        for node in ["node1", "node2"] {
            let dump = mesh.config_dump(node)?;
            let all = dump["workloads"].as_array().into_iter().flatten();
            let protocol = |path: &str| {
                let wanted = pod(path);
                let mut all = all.clone();
                all.find(|w| w["namespace"] == wanted.namespace && w["name"] == wanted.name)
                    .map(|w| w["protocol"].as_str().unwrap_or("").to_owned())
            };
            for (path, _, captured) in table {
                let expected = if captured { "HBONE" } else { "TCP" };
                let found = protocol(path);
                anyhow::ensure!(
                    found.as_deref() == Some(expected),
                    "{path} is {found:?} at {node}, not {expected}"
                );
            }
            let job = protocol("in/job");
            anyhow::ensure!(
                job.as_deref() != Some("HBONE"),
                "a job that ended is {job:?}"
            );
        }
        Ok(())
    })?;

    // What the wire says.
    for (path, _, captured) in table {
        let target = pod(path);
        mesh.count_packets(target)?;
        let call = mesh.http_get(pod("in/client"), mesh.at(target, 8080)?)?;
        assert!(call.is_ok(), "{path}: {call:?}");
        let packets = mesh.packets(target)?;
        if captured {
            assert_eq!(packets.plaintext, 0, "{path}: {packets:?}");
            assert!(packets.hbone > 0, "{path}: {packets:?}");
        } else {
            assert!(packets.plaintext > 0, "{path}: {packets:?}");
            assert_eq!(packets.hbone, 0, "{path}: {packets:?}");
        }
    }
    // And from them: a pod that is left alone sends plaintext to a captured one.
    mesh.count_packets(pod("out/unlabelled"))?;
    let call = mesh.http_get(pod("out/unlabelled"), mesh.at(pod("in/plain-label"), 8080)?)?;
    assert!(call.is_ok(), "{call:?}");
    assert_eq!(mesh.packets(pod("out/unlabelled"))?.hbone, 0);
    Ok(())
}

#[test]
fn a_pod_follows_its_own_label_without_a_restart() -> anyhow::Result<()> {
    let manifest = |label: &str| {
        let mut all = Manifest::two_nodes().namespace("ns", "");
        for name in ["client", "server"] {
            all = all.pod(pod(&format!("ns/{name}")), "node1", "x", label, SERVE);
        }
        all
    };
    let off = manifest("app: x");
    let on = manifest("app: x, istio.io/dataplane-mode: ambient");
    let mesh = MeshBuilder::default()
        .files(&[("all.yaml", off.yaml())])
        .config(|config| {
            config
                .aditd_env
                .insert("ADIT_WITHDRAW_DELAY".into(), "100ms".into());
        })
        .up()?;
    let before = mesh.status()?.pods;
    let target = mesh.at(pod("ns/server"), 8080)?;
    for (manifest, hbone) in [(&on, true), (&off, false), (&on, true)] {
        mesh.apply("all.yaml", manifest.yaml())?;
        mesh.wait_enrolled()?;
        mesh.eventually("the path", || {
            mesh.count_packets(pod("ns/server"))?;
            let call = mesh.http_get(pod("ns/client"), target)?;
            assert!(call.is_ok(), "{call:?}");
            let packets = mesh.packets(pod("ns/server"))?;
            anyhow::ensure!((packets.plaintext == 0) == hbone, "{packets:?}");
            anyhow::ensure!((packets.hbone > 0) == hbone, "{packets:?}");
            Ok(())
        })?;
    }
    let same = |a: &adit_local::PodStatus, b: &adit_local::PodStatus| {
        a.uid == b.uid && a.containers[0].process == b.containers[0].process
    };
    let after = mesh.status()?.pods;
    assert!(
        before.iter().zip(&after).all(|(a, b)| same(a, b)),
        "{after:?}"
    );
    Ok(())
}
