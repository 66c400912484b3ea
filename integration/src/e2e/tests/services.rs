//! Every way of Kubernetes to reach a pod, with both ends in the mesh.

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::e2e::case::{Case, cases};
use crate::e2e::{App, SOON, Test, eventually, host};

pub(super) const TESTS: &[Case] = cases![Shared: [
    services_of_all_types_are_reached,
    pods_of_stateful_sets_are_reached_by_name_and_known_by_account,
    the_api_server_is_reached_from_captured_pods,
    a_service_without_endpoints_refuses,
]];

async fn services_of_all_types_are_reached(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[
        App::server("web-a").on(0).label("tier", "web"),
        App::server("web-b").on(1).label("tier", "web"),
        App::server("client").on(0),
    ])
    .await?;
    let ns = t.namespace();
    t.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec:\n  selector: {{tier: web}}\n  \
         ports: [{{name: http, port: 80, targetPort: 8080}}]\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: headless}}\nspec:\n  clusterIP: None\n  \
         selector: {{tier: web}}\n  ports: [{{name: http, port: 8080}}]\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: port}}\nspec:\n  type: NodePort\n  \
         selector: {{tier: web}}\n  ports: [{{name: http, port: 80, targetPort: 8080}}]\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: alias}}\nspec:\n  type: ExternalName\n  \
         externalName: web.{ns}.svc.cluster.local\n"
    ))
    .await?;
    for url in [
        "http://web/".to_owned(),
        format!("http://web.{ns}/"),
        format!("http://web.{ns}.svc.cluster.local/"),
        "http://headless:8080/".into(),
        "http://port/".into(),
        "http://alias/".into(),
    ] {
        t.reaches("client", &url).await?;
    }
    // Both endpoints have their turns: connections are spread.
    let calls = t.calls("client", "http://web/", 40).await?;
    for server in ["web-a", "web-b"] {
        let count = calls
            .iter()
            .filter(|call| call.ok() == Some(server))
            .count();
        ensure!(count > 0, "{server} answered none of 40 calls");
    }
    // From outside the mesh, over the port of either node.
    let port = t.cluster().get(ns, "v1", "Service", "port").await?;
    let port = port.and_then(|service| service["spec"]["ports"][0]["nodePort"].as_u64());
    let port = port.context("the Service has no node port")?;
    let outside = t.beside("outside").await?;
    outside.run(&[App::server("client").on(0)]).await?;
    for node in t.cluster().nodes() {
        let found = t
            .cluster()
            .get("", "v1", "Node", node)
            .await?
            .context("no such node")?;
        let addresses = found["status"]["addresses"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let internal = addresses.iter().find(|a| a["type"] == "InternalIP");
        let address = internal.and_then(|a| a["address"].as_str());
        let address = address.context("a node has no address")?.parse()?;
        outside
            .reaches("client", &format!("http://{}:{port}/", host(address)))
            .await?;
    }
    Ok(())
}

async fn pods_of_stateful_sets_are_reached_by_name_and_known_by_account(
    t: Test,
) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.apply(&format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: store}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: store}}\nspec:\n  clusterIP: None\n  \
         selector: {{app: store}}\n  ports: [{{name: http, port: 8080}}]\n---\n\
         apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {{name: store}}\nspec:\n  serviceName: store\n  \
         replicas: 2\n  podManagementPolicy: Parallel\n  selector: {{matchLabels: {{app: store}}}}\n  \
         template:\n    metadata: {{labels: {{app: store}}}}\n    spec:\n      serviceAccountName: store\n      \
         terminationGracePeriodSeconds: 1\n      containers:\n      - name: app\n        image: {:?}\n        \
         imagePullPolicy: IfNotPresent\n        args: [serve]\n        env: [{{name: POD_NAME, valueFrom: \
         {{fieldRef: {{fieldPath: metadata.name}}}}}}]\n        readinessProbe: {{httpGet: {{path: /, \
         port: 8080}}, periodSeconds: 1}}\n",
        t.environment().app_image()
    ))
    .await?;
    t.run(&[App::server("client").on(0)]).await?;
    t.ready("app=store", 2).await?;
    for pod in ["store-0", "store-1"] {
        let call = t
            .reaches("client", &format!("http://{pod}.store:8080/"))
            .await?;
        ensure!(call.ok() == Some(pod), "{call:?}");
    }
    // One of them calls: it has its account's identity.
    t.reaches("store-0", "http://client/").await?;
    let line = t
        .access_line(t.node(0), |line| {
            line.get("direction") == "inbound" && line.get("dst.workload") == "client"
        })
        .await?;
    ensure!(line.get("src.identity").ends_with("/sa/store"), "{line:?}");
    Ok(())
}

async fn the_api_server_is_reached_from_captured_pods(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("client").on(1)]).await?;
    let service = t
        .cluster()
        .get("default", "v1", "Service", "kubernetes")
        .await?;
    let address = service.and_then(|s| s["spec"]["clusterIP"].as_str().map(str::to_owned));
    let address: std::net::IpAddr = address.context("no Service kubernetes")?.parse()?;
    // It speaks TLS: an answer to plain HTTP is one of it, with status 400.
    let url = format!("http://{}:443/", host(address));
    eventually("the API server answers", SOON, async || {
        let call = t.call("client", &url).await?;
        ensure!(call.status == Some(400), "{call:?}");
        Ok(())
    })
    .await
}

async fn a_service_without_endpoints_refuses(t: Test) -> anyhow::Result<()> {
    t.ambient(true).await?;
    t.run(&[App::server("client").on(0)]).await?;
    t.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: nobody}\nspec:\n  selector: {app: nobody}\n  \
         ports: [{name: http, port: 80, targetPort: 8080}]\n",
    )
    .await?;
    // Its name and its address are known everywhere a little later.
    eventually("calls are refused at once", SOON, async || {
        let lines: Vec<Value> = t
            .sample("client", &["call", "http://nobody/", "--timeout", "5000"])
            .await?;
        let error = lines[0]["error"].as_str().unwrap_or_default();
        ensure!(!error.contains("lookup"), "{error}");
        ensure!(lines[0]["status"].is_null(), "{}", lines[0]);
        let took = lines[0]["latency_ms"].as_f64().unwrap_or(f64::MAX);
        ensure!(took < 1000.0, "the refusal took {took} ms: {}", lines[0]);
        Ok(())
    })
    .await?;
    Ok(())
}
