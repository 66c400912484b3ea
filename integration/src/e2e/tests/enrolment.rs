//! Joining and leaving the mesh.

use std::time::{Duration, SystemTime};

use anyhow::ensure;

use crate::e2e::case::{Case, cases};
use crate::e2e::{App, SOON, Test, eventually, host};

pub(super) const TESTS: &[Case] = cases![
    Shared: [
        a_namespace_joins_and_leaves_without_a_failed_call,
        pods_of_one_node_and_of_two_talk_mutual_tls,
        labels_of_pods_outweigh_those_of_their_namespace,
        pods_that_start_in_the_mesh_are_in_it_from_the_first_call,
        host_network_pods_are_left_alone,
        probes_of_all_kinds_pass_in_the_mesh,
    ],
    // Others' load would be measured too.
    Alone: [the_label_takes_effect_within_a_second],
];

/// Between two calls of a client under load.
const PACE: Duration = Duration::from_millis(20);

/// Istio's TestServiceDynamicEnroll asks for half of the calls; here it is all.
async fn a_namespace_joins_and_leaves_without_a_failed_call(t: Test) -> anyhow::Result<()> {
    t.run(&[
        App::server("web-a").on(0).label("tier", "web"),
        App::server("web-b").on(1).label("tier", "web"),
        App::server("client").on(0),
    ])
    .await?;
    t.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {tier: web}\n  \
         ports: [{name: http, port: 80, targetPort: 8080}]\n",
    )
    .await?;
    t.reaches("client", "http://web/").await?;
    let near = t.caller("near", 0, "http://web/", PACE).await?;
    let far = t.caller("far", 1, "http://web/", PACE).await?;
    let pods = t.incarnations().await?;

    for _ in 0..2 {
        t.ambient(true).await?;
        t.is_mtls("client", "web-a", t.node(0)).await?;
        t.is_mtls("client", "web-b", t.node(1)).await?;
        near.more(20).await?;
        t.ambient(false).await?;
        t.is_plaintext("client", "web-b").await?;
        far.more(20).await?;
    }

    ensure!(t.incarnations().await? == pods, "a pod was restarted");
    near.without_failure().await?;
    far.without_failure().await?;
    Ok(())
}

async fn pods_of_one_node_and_of_two_talk_mutual_tls(t: Test) -> anyhow::Result<()> {
    t.needs_nodes(2)?;
    t.ambient(true).await?;
    t.run(&[
        App::server("client").on(0).account("client"),
        App::server("near").on(0).account("near"),
        App::server("far").on(1).account("far"),
    ])
    .await?;
    let identity =
        |account: &str| format!("spiffe://cluster.local/ns/{}/sa/{account}", t.namespace());
    for (from, to, node) in [
        ("client", "near", 0),
        ("client", "far", 1),
        ("far", "client", 0),
        ("near", "far", 1),
    ] {
        let line = t.is_mtls(from, to, t.node(node)).await?;
        ensure!(line.get("src.identity") == identity(from), "{line:?}");
        ensure!(line.get("dst.identity") == identity(to), "{line:?}");
        // The application sees the client's own address, as without a mesh.
        let call = t.reaches(from, &format!("http://{to}/")).await?;
        let seen = call.peer.map(|peer| peer.ip());
        ensure!(
            seen == Some(t.address(from).await?),
            "{from} is seen as {seen:?}"
        );
        // Raw TCP, through the Service.
        let lines: Vec<serde_json::Value> = t
            .sample(
                from,
                &[
                    "tcp",
                    &format!("{to}:9090"),
                    "--count",
                    "3",
                    "--interval",
                    "10",
                ],
            )
            .await?;
        let echoes = lines.iter().filter(|l| l["event"] == "echo").count();
        ensure!(echoes == 3, "{lines:?}");
    }
    // To itself, by address and by name.
    let own = format!("http://{}:8080/", host(t.address("client").await?));
    t.reaches("client", &own).await?;
    // (The short name is in the pod's own hosts file.)
    t.reaches("client", &format!("http://client.{}/", t.namespace()))
        .await?;
    Ok(())
}

async fn labels_of_pods_outweigh_those_of_their_namespace(t: Test) -> anyhow::Result<()> {
    const MODE: &str = "istio.io/dataplane-mode";
    t.ambient(true).await?;
    t.run(&[
        App::server("inside").on(0),
        App::server("out").on(1).label(MODE, "none"),
    ])
    .await?;
    let other = t.beside("plain").await?;
    other
        .run(&[
            App::server("in").on(1).label(MODE, "ambient"),
            App::server("plain").on(0),
        ])
        .await?;
    t.is_plaintext("inside", "out").await?;
    other.is_plaintext("in", "plain").await?;
    // From one namespace to the other, both in the mesh.
    let url = format!("http://in.{}/", other.namespace());
    t.reaches("inside", &url).await?;
    let line = t
        .access_line(t.node(1), |line| {
            line.get("dst.workload") == "in" && line.get("direction") == "inbound"
        })
        .await?;
    let expected = format!("spiffe://cluster.local/ns/{}/sa/default", t.namespace());
    ensure!(line.get("src.identity") == expected, "{line:?}");
    Ok(())
}

/// A Job's only call is its first: it must be captured already (the CNI plugin holds the
/// container until capture is in place).
async fn pods_that_start_in_the_mesh_are_in_it_from_the_first_call(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("web").on(1)]).await?;
    t.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )
    .await?;
    let outside = t.beside("outside").await?;
    outside.run(&[App::server("client").on(0)]).await?;
    let url = format!("http://web.{}/", t.namespace());
    outside.refused("client", &url).await?;
    for round in 0..5 {
        let name = format!("first-{round}");
        let pod = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{restartPolicy: Never, \
             terminationGracePeriodSeconds: 1, containers: [{{name: app, image: {:?}, \
             imagePullPolicy: IfNotPresent, args: [call, \"http://web/\"]}}]}}}}",
            t.environment().app_image()
        );
        t.apply(&pod).await?;
        eventually(&format!("{name} ends"), SOON, async || {
            let pod = t.cluster().get(t.namespace(), "v1", "Pod", &name).await?;
            let phase = pod.map(|pod| pod["status"]["phase"].clone());
            ensure!(
                phase == Some("Succeeded".into()) || phase == Some("Failed".into()),
                "{phase:?}"
            );
            Ok(())
        })
        .await?;
        let log = t.cluster().logs(t.namespace(), &name, false).await?;
        ensure!(log.contains("\"status\":200"), "round {round}: {log}");
    }
    Ok(())
}

async fn host_network_pods_are_left_alone(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[
        App::server("web").on(1),
        App::command(
            "host",
            &[
                "serve",
                "--http",
                "[::]:18080",
                "--tcp",
                "[::]:19090",
                "--sink",
                "[::]:19091",
                "--source",
                "[::]:19092",
            ],
        )
        .on(0)
        .host_network(),
    ])
    .await?;
    let node = t.address("host").await?;
    t.reaches("web", &format!("http://{}:18080/", host(node)))
        .await?;
    let url = format!("http://{}:8080/", host(t.address("web").await?));
    t.reaches("host", &url).await?;
    let lines = t.access_lines(t.node(1)).await?;
    let mtls = lines
        .iter()
        .find(|line| line.get("src.workload") == "host" && !line.get("src.identity").is_empty());
    ensure!(mtls.is_none(), "{mtls:?}");
    Ok(())
}

async fn probes_of_all_kinds_pass_in_the_mesh(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    // A probe that came as plaintext from outside the mesh would be refused by this.
    t.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )
    .await?;
    let probes = [
        ("http", "httpGet: {path: /, port: 8080}"),
        ("tcp", "tcpSocket: {port: 9090}"),
        ("grpc", "grpc: {port: 8080}"),
        (
            "exec",
            "exec: {command: [adit-sample, call, \"http://127.0.0.1:8080/\"]}",
        ),
    ];
    for (name, probe) in probes {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  \
             terminationGracePeriodSeconds: 1\n  containers:\n  - name: app\n    image: {:?}\n    \
             imagePullPolicy: IfNotPresent\n    args: [serve]\n    readinessProbe: {{{probe}, \
             periodSeconds: 1}}\n    livenessProbe: {{{probe}, periodSeconds: 1, failureThreshold: 2}}\n    \
             startupProbe: {{{probe}, periodSeconds: 1, failureThreshold: 10}}\n",
            t.environment().app_image()
        );
        t.apply(&pod).await?;
    }
    for (name, _) in probes {
        t.ready(&format!("app={name}"), 1).await?;
    }
    let before = t.incarnations().await?;
    // The liveness probes have had their turns by then, more than failing twice takes.
    tokio::time::sleep(Duration::from_secs(5)).await;
    for (name, _) in probes {
        t.ready(&format!("app={name}"), 1).await?;
    }
    ensure!(
        t.incarnations().await? == before,
        "a container was restarted"
    );
    Ok(())
}

/// The time from the label to the first call that is mutual TLS, for pods that run.
async fn the_label_takes_effect_within_a_second(t: Test) -> anyhow::Result<()> {
    const PODS: usize = 100;
    const BAR: Duration = Duration::from_secs(1);
    /// Others may have the machine's time in one of them.
    const ROUNDS: usize = 3;
    // In the mesh from the start, and it takes mutual TLS only: an answer is a proof.
    let mesh = t.beside("mesh").await?;
    mesh.ambient(true).await?;
    mesh.run(&[App::server("web").on(1)]).await?;
    mesh.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )
    .await?;
    let url = format!("http://web.{}/", mesh.namespace());
    t.run(&[App::server("probe").on(0)]).await?;
    t.refused("probe", &url).await?;
    // A hundred pods that call more often have no time left for anything else.
    let pace = Duration::from_millis(200);
    let clients: Vec<_> = (0..PODS)
        .map(|n| App::caller(&format!("client-{n}"), &url, pace).on(n))
        .collect();
    t.run(&clients).await?;
    let mut best = BAR;
    for round in 0..ROUNDS {
        let labelled = SystemTime::now();
        t.ambient(true).await?;
        // Who reads a hundred logs meanwhile is measured too.
        tokio::time::sleep(2 * BAR).await;
        let mut times = Vec::new();
        for client in &clients {
            let taken = eventually(&format!("{} is answered", client.name), SOON, async || {
                let first = t.first_answer(&client.name, labelled).await?;
                Ok(first.duration_since(labelled).unwrap_or_default())
            })
            .await?;
            times.push(taken);
        }
        times.sort();
        let (median, p99, last) = (times[PODS / 2], times[PODS * 99 / 100 - 1], times[PODS - 1]);
        println!(
            "{PODS} pods: first answer over mutual TLS {median:.2?} (median), {p99:.2?} (p99), \
             {last:.2?} (last) after the label"
        );
        best = match round {
            0 => p99,
            _ => best.min(p99),
        };
        if best <= BAR {
            break;
        }
        t.ambient(false).await?;
        t.refused("probe", &url).await?;
        tokio::time::sleep(2 * BAR).await;
    }
    ensure!(
        best <= BAR,
        "99 of {PODS} pods took {best:.2?} in the best of {ROUNDS} rounds; the bar is {BAR:?}"
    );
    Ok(())
}
