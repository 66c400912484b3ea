//! The objects of a large cluster, and the changes of its endpoints.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::client::NodeProxy;

/// Where the mesh is installed.
pub(super) const SYSTEM: &str = "istio-system";
/// Service account of node proxies.
pub(super) const ZTUNNEL: &str = "ztunnel";
/// Requests at a time: more do not make the API server faster on two cores.
const CONCURRENCY: usize = 24;
/// For one request.
const REQUEST: Duration = Duration::from_secs(30);
const ROOT: Duration = Duration::from_secs(30);
/// Pods have addresses from here on.
const POD_NETWORK: u32 = u32::from_be_bytes([10, 128, 0, 0]);
/// Endpoints that are no pods (TEST-NET-3 is too small).
const OUTSIDE: u32 = u32::from_be_bytes([198, 18, 0, 0]);

/// How large the cluster is.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Size {
    /// Pods, without those of node proxies.
    pub pods: usize,
    /// Services, without those whose endpoints are outside.
    pub services: usize,
    /// Nodes, each with a node proxy.
    pub nodes: usize,
    /// Namespaces.
    pub namespaces: usize,
}

impl Size {
    /// The cluster that everybody must be able to run.
    pub const USUAL: Self = Self::new(10_000, 1000, 500, 40);
    /// One that few have.
    pub const LARGE: Self = Self::new(100_000, 10_000, 500, 100);
    /// Shows that everything works.
    pub const QUICK: Self = Self::new(500, 50, 25, 5);

    const fn new(pods: usize, services: usize, nodes: usize, namespaces: usize) -> Self {
        Self {
            pods,
            services,
            nodes,
            namespaces,
        }
    }
}

/// A pod or endpoint whose readiness changes.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// Its name in xDS.
    pub(super) resource: String,
    path: String,
    patch: Value,
}

/// The API server with its objects.
pub(super) struct World {
    client: Client,
    size: Size,
}

impl World {
    pub(super) async fn connect(kubeconfig: &Path, size: Size) -> anyhow::Result<Self> {
        let file = Kubeconfig::read_from(kubeconfig)
            .with_context(|| format!("read {}", kubeconfig.display()))?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        Ok(Self { client, size })
    }

    /// Whether an earlier run has created everything.
    pub(super) async fn is_complete(&self) -> anyhow::Result<bool> {
        let last = self.size.pods.saturating_sub(1);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace_of_pod(last));
        Ok(api.get_opt(&pod_name(last)).await?.is_some())
    }

    /// Creates everything.
    pub(super) async fn create(&self) -> anyhow::Result<()> {
        let size = self.size;
        self.all(0..1, |_| {
            vec![post("/api/v1/namespaces", namespace(SYSTEM, false))]
        })
        .await?;
        let account = json!({"metadata": {"name": ZTUNNEL}});
        let accounts = format!("/api/v1/namespaces/{SYSTEM}/serviceaccounts");
        self.all(0..1, |_| vec![post(&accounts, account.clone())])
            .await?;
        self.all(0..size.nodes, |number| {
            vec![post("/api/v1/nodes", node(number))]
        })
        .await?;
        self.all(0..size.namespaces, |number| {
            let namespace = namespace(&namespace_name(number), true);
            vec![post("/api/v1/namespaces", namespace)]
        })
        .await?;
        self.all(0..size.nodes, |number| {
            let address = Ipv4Addr::from_bits(POD_NETWORK + (size.pods + number) as u32);
            let pod = json!({
                "metadata": {"name": proxy_name(number), "labels": {"app": ZTUNNEL}},
                "spec": {
                    "nodeName": node_name(number), "serviceAccountName": ZTUNNEL,
                    "containers": [{"name": "istio-proxy", "image": "ztunnel"}],
                },
            });
            pod_with_status(SYSTEM, &proxy_name(number), pod, address)
        })
        .await?;
        self.all(0..size.services, |number| {
            let (namespace, service) = (self.namespace_of_service(number), service_name(number));
            vec![
                post(&services(&namespace), self.service(&service)),
                post(&slices(&namespace), self.slice(number)),
            ]
        })
        .await?;
        self.all(0..size.namespaces, |number| self.outside(number))
            .await?;
        self.all(0..size.pods, |number| self.pod(number)).await
    }

    /// A node proxy of each node, with a token as kubelets get it for the pod.
    pub(super) async fn proxies(&self) -> anyhow::Result<Vec<NodeProxy>> {
        let path = format!("/api/v1/namespaces/{SYSTEM}/serviceaccounts/{ZTUNNEL}/token");
        let pods = format!("/api/v1/namespaces/{SYSTEM}/pods");
        stream::iter(0..self.size.nodes)
            .map(async |number| {
                let pod = proxy_name(number);
                let object = get(&format!("{pods}/{pod}"));
                let object: Value = serde_json::from_str(&self.request(&object).await?)?;
                let request = json!({"spec": {
                    "audiences": ["istio-ca"], "expirationSeconds": 7200,
                    "boundObjectRef": {
                        "apiVersion": "v1", "kind": "Pod", "name": pod,
                        "uid": object["metadata"]["uid"],
                    },
                }});
                let answer = self.request(&post(&path, request)).await?;
                let answer: Value = serde_json::from_str(&answer)?;
                let token = answer["status"]["token"].as_str().context("no token")?;
                anyhow::Ok(NodeProxy {
                    node: node_name(number),
                    pod,
                    token: token.to_owned(),
                })
            })
            .buffer_unordered(CONCURRENCY)
            .try_collect()
            .await
    }

    /// The mesh's root certificate, as pods find it.
    pub(super) async fn roots(&self) -> anyhow::Result<String> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), SYSTEM);
        let found = timeout(ROOT, async {
            loop {
                let map = api.get_opt("istio-ca-root-cert").await?;
                let data = map.and_then(|map| map.data).unwrap_or_default();
                if let Some(roots) = data.get("root-cert.pem") {
                    return anyhow::Ok(roots.clone());
                }
                sleep(Duration::from_millis(50)).await;
            }
        });
        found
            .await
            .context("there is no ConfigMap istio-ca-root-cert")?
    }

    /// The changes, all of different objects: mostly pods whose readiness changes, and every
    /// fourth an endpoint outside of the cluster.
    pub(super) async fn changes(&self, count: usize) -> anyhow::Result<Vec<Change>> {
        let change = async |index: usize| {
            let outside = index / 4;
            if index % 4 == 3 && outside < self.size.namespaces {
                self.outside_changes(outside).await
            } else {
                let apart = (self.size.pods / count.max(1)).max(1);
                self.pod_changes(index * apart % self.size.pods).await
            }
        };
        let all = stream::iter(0..count).map(change);
        all.buffered(CONCURRENCY).try_collect().await
    }

    /// Makes a change.
    pub(super) async fn make(&self, change: &Change) -> anyhow::Result<()> {
        self.request(&patch(&change.path, change.patch.clone()))
            .await
            .map(drop)
    }

    async fn pod_changes(&self, number: usize) -> anyhow::Result<Change> {
        let (namespace, name) = (self.namespace_of_pod(number), pod_name(number));
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/status");
        let pod: Value = serde_json::from_str(&self.request(&get(&path)).await?)?;
        let ready = pod["status"]["conditions"][0]["status"] == "True";
        let status = if ready { "False" } else { "True" };
        let conditions = json!([{"type": "Ready", "status": status}]);
        Ok(Change {
            resource: format!("Kubernetes//Pod/{namespace}/{name}"),
            path,
            patch: json!({"status": {"conditions": conditions}}),
        })
    }

    async fn outside_changes(&self, number: usize) -> anyhow::Result<Change> {
        let namespace = namespace_name(number);
        let address = outside_address(number);
        let name = format!("discovery.k8s.io/EndpointSlice/{namespace}/outside-1");
        let path = format!("{}/outside-1", slices(&namespace));
        let slice: Value = serde_json::from_str(&self.request(&get(&path)).await?)?;
        let ready = slice["endpoints"][0]["conditions"]["ready"] == true;
        Ok(Change {
            resource: format!("Kubernetes/{name}/{address}"),
            path,
            patch: json!({"endpoints": [outside_endpoint(number, !ready)]}),
        })
    }

    /// Services of a namespace are next to each other, and so are pods of a service.
    fn namespace_of_service(&self, service: usize) -> String {
        namespace_name(service * self.size.namespaces / self.size.services)
    }

    fn service_of(&self, pod: usize) -> usize {
        pod * self.size.services / self.size.pods
    }

    fn namespace_of_pod(&self, pod: usize) -> String {
        self.namespace_of_service(self.service_of(pod))
    }

    fn pod(&self, number: usize) -> Vec<Call> {
        let service = service_name(self.service_of(number));
        let pod = json!({
            "metadata": {
                "name": pod_name(number),
                "labels": {
                    "app": service, "app.kubernetes.io/name": service, "version": "v1",
                    "pod-template-hash": "5d8c7f6b9d",
                },
                // Its node has captured it.
                "annotations": {"ambient.istio.io/redirection": "enabled"},
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "controller": true,
                    "name": format!("{service}-5d8c7f6b9d"), "uid": format!("owner-{service}"),
                }],
            },
            "spec": {
                "nodeName": node_name(number % self.size.nodes), "serviceAccountName": service,
                "containers": [{
                    "name": "app", "image": "registry.example.com/shop/app:1.2.3",
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "env": [{"name": "LOG_LEVEL", "value": "info"}],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
                }],
            },
        });
        pod_with_status(
            &self.namespace_of_pod(number),
            &pod_name(number),
            pod,
            pod_address(number),
        )
    }

    fn service(&self, name: &str) -> Value {
        json!({
            "metadata": {"name": name},
            "spec": {
                "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            },
        })
    }

    fn slice(&self, service: usize) -> Value {
        let first = (service * self.size.pods).div_ceil(self.size.services);
        let endpoint = |pod: usize| {
            json!({
                "addresses": [pod_address(pod)], "conditions": {"ready": true},
                "nodeName": node_name(pod % self.size.nodes),
                "targetRef": {
                    "kind": "Pod", "name": pod_name(pod),
                    "namespace": self.namespace_of_pod(pod),
                },
            })
        };
        let pods = (first..self.size.pods).take_while(|pod| self.service_of(*pod) == service);
        let endpoints: Vec<_> = pods.map(endpoint).collect();
        slice_of(&service_name(service), endpoints)
    }

    /// A service whose endpoints are not pods.
    fn outside(&self, number: usize) -> Vec<Call> {
        let namespace = namespace_name(number);
        let service = json!({
            "metadata": {"name": "outside"},
            "spec": {"ports": [{"name": "http", "port": 80}]},
        });
        let slice = slice_of("outside", vec![outside_endpoint(number, true)]);
        vec![
            post(&services(&namespace), service),
            post(&slices(&namespace), slice),
        ]
    }

    /// The calls for each of `numbers`, those of one in their order.
    async fn all(
        &self,
        numbers: std::ops::Range<usize>,
        calls: impl Fn(usize) -> Vec<Call>,
    ) -> anyhow::Result<()> {
        stream::iter(numbers.map(|number| anyhow::Ok(calls(number))))
            .try_for_each_concurrent(CONCURRENCY, async |calls| {
                for call in &calls {
                    self.request(call).await?;
                }
                Ok(())
            })
            .await
    }

    async fn request(&self, call: &Call) -> anyhow::Result<String> {
        let content = match call.method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let body = match &call.body {
            Some(body) => serde_json::to_vec(body)?,
            None => Vec::new(),
        };
        let request = http::Request::builder()
            .method(call.method)
            .uri(&call.path)
            .header("content-type", content)
            .body(body)?;
        timeout(REQUEST, self.client.request_text(request))
            .await
            .with_context(|| format!("{} {}: no answer", call.method, call.path))?
            .with_context(|| format!("{} {}", call.method, call.path))
    }
}

/// A request to the API server.
struct Call {
    method: &'static str,
    path: String,
    body: Option<Value>,
}

fn get(path: &str) -> Call {
    Call {
        method: "GET",
        path: path.to_owned(),
        body: None,
    }
}

fn post(path: &str, body: Value) -> Call {
    Call {
        method: "POST",
        path: path.to_owned(),
        body: Some(body),
    }
}

fn patch(path: &str, body: Value) -> Call {
    Call {
        method: "PATCH",
        path: path.to_owned(),
        body: Some(body),
    }
}

fn pod_with_status(namespace: &str, name: &str, pod: Value, address: Ipv4Addr) -> Vec<Call> {
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let status = json!({"status": {
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }});
    vec![
        post(&pods, pod),
        patch(&format!("{pods}/{name}/status"), status),
    ]
}

fn slice_of(service: &str, endpoints: Vec<Value>) -> Value {
    json!({
        "metadata": {
            "name": format!("{service}-1"),
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": endpoints,
    })
}

fn outside_endpoint(number: usize, ready: bool) -> Value {
    json!({"addresses": [outside_address(number)], "conditions": {"ready": ready}})
}

fn namespace(name: &str, ambient: bool) -> Value {
    let labels = match ambient {
        true => json!({"istio.io/dataplane-mode": "ambient"}),
        false => json!({}),
    };
    json!({"metadata": {"name": name, "labels": labels}})
}

fn node(number: usize) -> Value {
    let zone = format!("zone-{}", number % 3);
    json!({"metadata": {"name": node_name(number), "labels": {
        "topology.kubernetes.io/region": "region", "topology.kubernetes.io/zone": zone,
    }}})
}

fn services(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/services")
}

fn slices(namespace: &str) -> String {
    format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices")
}

fn namespace_name(number: usize) -> String {
    format!("team-{number}")
}

fn node_name(number: usize) -> String {
    format!("node-{number}")
}

fn proxy_name(number: usize) -> String {
    format!("ztunnel-{number}")
}

fn service_name(number: usize) -> String {
    format!("service-{number}")
}

fn pod_name(number: usize) -> String {
    format!("pod-{number}")
}

fn pod_address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(POD_NETWORK + number as u32)
}

fn outside_address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(OUTSIDE + number as u32)
}
