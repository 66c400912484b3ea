//! Waypoints for Gateways.

use std::time::Duration;

use adit_controlplane::driver::ControlPlane;
use adit_controlplane::provision::{PodDefaults, Provisioner, WaypointSettings};
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::cluster::{Cluster, PATIENCE, has, leadership};

const GATEWAY: &str = "gateway.networking.k8s.io/v1";

struct Running {
    _control_plane: ControlPlane,
    _tasks: JoinSet<()>,
}

/// A leader whose ROOT_NAMESPACE is the test's own.
async fn run(cluster: &Cluster) -> Running {
    let leading = leadership(true);
    let control_plane = cluster.control_plane(&leading).await;
    let settings = WaypointSettings {
        image: "registry/waypoint:1".into(),
        pull_policy: "IfNotPresent".into(),
        pull_secrets: Vec::new(),
        defaults: PodDefaults::default(),
        control_plane: "https://istiod.istio-system.svc:15012".into(),
        trust_domain: "cluster.local".into(),
        cluster_id: "Kubernetes".into(),
        cluster_domain: "cluster.local".into(),
        network: String::new(),
        revision: "default".into(),
        root_namespace: cluster.namespace.clone(),
        node_accounts: format!("{}/ztunnel", cluster.namespace)
            .parse()
            .expect("legal"),
    };
    let faults = control_plane.faults().expect("a cluster");
    let provisioner = Provisioner::new(&cluster.handle(), settings, faults);
    let mut tasks = JoinSet::new();
    let receiver = leading.subscribe();
    tasks.spawn(async move {
        provisioner.run(receiver).await;
        drop(leading);
    });
    Running {
        _control_plane: control_plane,
        _tasks: tasks,
    }
}

fn gateway(name: &str, more: Value) -> Value {
    let mut spec = json!({"gatewayClassName": "istio-waypoint",
        "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]});
    for (key, value) in more.as_object().expect("a map") {
        spec[key] = value.clone();
    }
    json!({"apiVersion": GATEWAY, "kind": "Gateway", "metadata": {"name": name}, "spec": spec})
}

fn made(kind: &str, name: &str) -> Value {
    let api_version = match kind {
        "Deployment" => "apps/v1",
        "HorizontalPodAutoscaler" => "autoscaling/v2",
        "PodDisruptionBudget" => "policy/v1",
        _ => "v1",
    };
    Cluster::named(api_version, kind, name)
}

fn any(_: &Value) -> bool {
    true
}

#[tokio::test]
async fn a_waypoint_is_made_repaired_and_removed_with_its_gateway() {
    let Some((_alone, cluster)) = Cluster::connect("waypoint").await else {
        return;
    };
    let _running = run(&cluster).await;
    let infrastructure = json!({"labels": {"team": "a"}, "annotations": {"note": "b"}});
    let gateway = cluster
        .create(gateway(
            "waypoint",
            json!({"infrastructure": infrastructure}),
        ))
        .await;
    let uid = &gateway["metadata"]["uid"];
    for kind in ["ServiceAccount", "Service", "Deployment"] {
        let object = cluster.until(kind, &made(kind, "waypoint"), any).await;
        let meta = &object["metadata"];
        assert_eq!(meta["ownerReferences"][0]["uid"], *uid, "{kind}");
        assert_eq!(
            meta["labels"]["gateway.istio.io/managed"],
            "istio.io-mesh-controller"
        );
        assert_eq!(
            (&meta["labels"]["team"], &meta["annotations"]["note"]),
            (&json!("a"), &json!("b"))
        );
    }
    let service = made("Service", "waypoint");
    let found = cluster.get(&service).await.expect("there");
    let address = found["spec"]["clusterIP"].clone();
    // No pod runs here: it has addresses and is not programmed.
    let told = |gateway: &Value| {
        let status = &gateway["status"];
        has(&status["conditions"], "Accepted", "True", "Accepted")
            && has(&status["conditions"], "Programmed", "False", "Pending")
            && status["addresses"].as_array().is_some_and(|all| {
                all.iter().any(|of| of["value"] == address)
                    && all.iter().any(|of| of["type"] == "Hostname")
            })
            && has(
                &status["listeners"][0]["conditions"],
                "Accepted",
                "True",
                "Accepted",
            )
    };
    cluster.until("its status", &gateway, told).await;

    // Drift is repaired, and what is a person's to say stays.
    let ports = json!([{"name": "x", "port": 1}]);
    cluster
        .patch(&service, json!({"spec": {"ports": ports}}))
        .await;
    cluster
        .until("the ports are back", &service, |of| {
            let ports = of["spec"]["ports"].as_array().cloned().unwrap_or_default();
            ports.iter().any(|port| port["port"] == 15008)
        })
        .await;
    let deployment = made("Deployment", "waypoint");
    let label = json!({"labels": {"gateway.istio.io/managed": null}});
    cluster
        .patch(
            &deployment,
            json!({"metadata": label, "spec": {"replicas": 3}}),
        )
        .await;
    let repaired = cluster
        .until("the label is back", &deployment, |of| {
            of["metadata"]["labels"]["gateway.istio.io/managed"] == "istio.io-mesh-controller"
        })
        .await;
    assert_eq!(repaired["spec"]["replicas"], 3);
    cluster.delete(&service).await;
    cluster
        .until("the Service is back", &service, |of| {
            of["metadata"]["uid"] != found["metadata"]["uid"]
        })
        .await;

    // The API server's garbage collector removes what belonged to it.
    cluster.delete(&gateway).await;
    for kind in ["ServiceAccount", "Service", "Deployment"] {
        cluster.until_gone(&made(kind, "waypoint")).await;
    }
    cluster.remove().await;
}

#[tokio::test]
async fn overlays_are_followed_and_a_wrong_one_is_told() {
    let Some((_alone, cluster)) = Cluster::connect("overlay").await else {
        return;
    };
    let _running = run(&cluster).await;
    let reference = json!({"group": "", "kind": "ConfigMap", "name": "params"});
    let gateway = cluster
        .create(gateway(
            "w",
            json!({"infrastructure": {"parametersRef": reference}}),
        ))
        .await;
    let invalid = |gateway: &Value| {
        has(
            &gateway["status"]["conditions"],
            "Accepted",
            "False",
            "InvalidParameters",
        )
    };
    cluster.until("the map is missing", &gateway, invalid).await;
    let map = cluster
        .create(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "params"},
            "data": {"deployment": "spec: {replicas: 2}",
                "service": "metadata: {labels: {first: x}}",
                "horizontalPodAutoscaler": "spec: {minReplicas: 2, maxReplicas: 4}",
                "podDisruptionBudget": "spec: {minAvailable: 1}"}}),
        )
        .await;
    let budget = made("PodDisruptionBudget", "w");
    let scaler = made("HorizontalPodAutoscaler", "w");
    cluster.until("the budget", &budget, any).await;
    cluster
        .until("the autoscaler", &scaler, |of| {
            of["spec"]["maxReplicas"] == 4
        })
        .await;
    let deployment = made("Deployment", "w");
    // What the first version had and the next has not goes, though it was created, not applied.
    cluster
        .until("the Service is ours", &made("Service", "w"), |of| {
            let managers = of["metadata"]["managedFields"].as_array();
            managers.is_some_and(|all| {
                let mut ours = all.iter().filter(|of| of["manager"] == "adit-gateway");
                ours.next().is_some_and(|of| of["operation"] == "Apply") && ours.next().is_none()
            })
        })
        .await;
    cluster
        .until("the replicas", &deployment, |of| {
            of["spec"]["replicas"] == 2
        })
        .await;
    cluster
        .until("it is accepted", &gateway, |of| {
            has(&of["status"]["conditions"], "Accepted", "True", "Accepted")
        })
        .await;

    cluster
        .patch(
            &map,
            json!({"data": {"podDisruptionBudget": null, "horizontalPodAutoscaler": null,
                "service": null}}),
        )
        .await;
    cluster
        .until(
            "the label of the first version goes",
            &made("Service", "w"),
            |of| of["metadata"]["labels"]["first"].is_null(),
        )
        .await;
    cluster.until_gone(&budget).await;
    cluster.until_gone(&scaler).await;
    cluster
        .patch(&map, json!({"data": {"deploymnet": "spec: {}"}}))
        .await;
    cluster.until("the typo is told", &gateway, invalid).await;
    // What cannot be laid over an object is told too, and holds up no other Gateway.
    cluster
        .patch(
            &map,
            json!({"data": {"deploymnet": null, "service": "spec: 5", "deployment": "spec: []"}}),
        )
        .await;
    cluster
        .until("the misfit is told", &gateway, |gateway| {
            invalid(gateway) && gateway["status"].to_string().contains(".spec")
        })
        .await;
    let another = cluster.create(self::gateway("another", json!({}))).await;
    cluster
        .until("another waypoint", &made("Deployment", "another"), any)
        .await;
    cluster.delete(&another).await;

    // Defaults of the class, from the root namespace.
    cluster
        .patch(
            &map,
            json!({"data": {"service": null, "deployment": "spec: {replicas: 2}"}}),
        )
        .await;
    cluster
        .create(json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "all", "labels": {"gateway.istio.io/defaults-for-class": "istio-waypoint"}},
            "data": {"service": "metadata: {labels: {everywhere: x}}"}}))
        .await;
    cluster
        .until("the defaults", &made("Service", "w"), |of| {
            of["metadata"]["labels"]["everywhere"] == "x"
        })
        .await;
    cluster.delete(&gateway).await;
    cluster.remove().await;
}

/// What a class names is for all of its Gateways, over what a label says for the class and
/// below what a Gateway names itself. What is wrong with it stands at both, and changes nothing
/// of what runs.
#[tokio::test]
async fn parameters_of_a_class_are_followed_and_wrong_ones_are_told() {
    let Some((_alone, cluster)) = Cluster::connect("class").await else {
        return;
    };
    let _running = run(&cluster).await;
    let class = Class::create(&cluster).await;
    let own = json!({"group": "", "kind": "ConfigMap", "name": "own"});
    let mut plain = gateway("plain", json!({}));
    let mut special = gateway("special", json!({"infrastructure": {"parametersRef": own}}));
    for gateway in [&mut plain, &mut special] {
        gateway["spec"]["gatewayClassName"] = class.name.as_str().into();
    }
    let map = |name: &str, labels: Value, data: Value| {
        json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": name, "labels": labels}, "data": data})
    };
    let own = map(
        "own",
        json!({}),
        json!({"deployment": "spec: {replicas: 3}"}),
    );
    cluster.create(own).await;
    let labels = json!({"gateway.istio.io/defaults-for-class": class.name});
    let data =
        json!({"deployment": "spec: {replicas: 1}", "service": "metadata: {labels: {lowest: x}}"});
    cluster.create(map("defaults", labels, data)).await;
    let (plain, special) = (cluster.create(plain).await, cluster.create(special).await);

    // The ConfigMap is not there yet.
    let missing = format!("there is no ConfigMap {}/params", cluster.namespace);
    class
        .until("it is missing", |status| is_invalid(status, &missing))
        .await;
    let at_gateway = format!("GatewayClass {}: spec.parametersRef: {missing}", class.name);
    cluster
        .until("it is told at the Gateway", &plain, |gateway| {
            is_invalid(&gateway["status"], &at_gateway)
        })
        .await;
    assert!(cluster.get(&made("Deployment", "plain")).await.is_none());

    let data =
        json!({"deployment": "spec: {replicas: 2}", "service": "metadata: {labels: {middle: x}}"});
    let params = cluster.create(map("params", json!({}), data)).await;
    class.until("it is accepted", is_accepted).await;
    for (gateway, replicas) in [(&plain, 2), (&special, 3)] {
        let name = gateway["metadata"]["name"].as_str().expect("a name");
        cluster
            .until(name, &made("Deployment", name), |of| {
                of["spec"]["replicas"] == replicas
            })
            .await;
        cluster
            .until(name, &made("Service", name), |of| {
                let labels = &of["metadata"]["labels"];
                labels["lowest"] == "x" && labels["middle"] == "x"
            })
            .await;
    }

    // One that cannot be laid over a waypoint: what runs stays as it was.
    let broken = json!({"data": {"deployment": "spec: []"}});
    cluster.patch(&params, broken).await;
    class
        .until("it does not fit", |status| {
            is_invalid(
                status,
                &format!("ConfigMap {}/params: deployment.spec", cluster.namespace),
            )
        })
        .await;
    for gateway in [&plain, &special] {
        cluster
            .until("it does not fit the Gateway", gateway, |gateway| {
                is_invalid(&gateway["status"], "deployment.spec")
            })
            .await;
    }
    let deployment = cluster
        .get(&made("Deployment", "plain"))
        .await
        .expect("there");
    assert_eq!(deployment["spec"]["replicas"], 2);

    let repaired = json!({"data": {"deployment": "spec: {replicas: 4}"}});
    cluster.patch(&params, repaired).await;
    class.until("it is accepted again", is_accepted).await;
    cluster
        .until(
            "the change is followed",
            &made("Deployment", "plain"),
            |of| of["spec"]["replicas"] == 4,
        )
        .await;

    // References that can lead nowhere, and none.
    for (reference, why) in [
        (
            json!({"group": "", "kind": "ConfigMap", "name": "params", "namespace": null}),
            "names no namespace",
        ),
        (
            json!({"group": "x.example", "kind": "Params", "name": "params", "namespace": "a"}),
            "names a Params of group \"x.example\"",
        ),
    ] {
        class.refer(Some(reference)).await;
        class.until(why, |status| is_invalid(status, why)).await;
        cluster
            .until(why, &plain, |gateway| is_invalid(&gateway["status"], why))
            .await;
    }
    class.refer(None).await;
    class.until("it asks for nothing", is_accepted).await;
    cluster
        .until("the label goes", &made("Service", "plain"), |of| {
            let labels = &of["metadata"]["labels"];
            labels["middle"].is_null() && labels["lowest"] == "x"
        })
        .await;
    for gateway in [&plain, &special] {
        cluster.delete(gateway).await;
    }
    class.remove().await;
    cluster.remove().await;
}

fn is_accepted(status: &Value) -> bool {
    has(&status["conditions"], "Accepted", "True", "Accepted")
}

fn is_invalid(status: &Value, why: &str) -> bool {
    let conditions = status["conditions"].as_array();
    has(
        &status["conditions"],
        "Accepted",
        "False",
        "InvalidParameters",
    ) && conditions.into_iter().flatten().any(|of| {
        let message = of["message"].as_str();
        of["type"] == "Accepted" && message.is_some_and(|message| message.contains(why))
    })
}

/// A class of a test's own, whose parameters are the ConfigMap `params` of its namespace.
struct Class {
    api: Api<DynamicObject>,
    name: String,
}

impl Class {
    async fn create(cluster: &Cluster) -> Self {
        let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "GatewayClass");
        let api = Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&kind));
        let name = cluster.namespace.clone();
        let class = json!({"apiVersion": GATEWAY, "kind": "GatewayClass",
            "metadata": {"name": name},
            "spec": {"controllerName": "istio.io/mesh-controller", "parametersRef":
                {"group": "", "kind": "ConfigMap", "name": "params", "namespace": name}}});
        let class = serde_json::from_value(class).expect("an object");
        let made = api.create(&PostParams::default(), &class).await;
        made.expect("created");
        Self { api, name }
    }

    /// Changes what it names.
    async fn refer(&self, reference: Option<Value>) {
        let patch = Patch::Merge(json!({"spec": {"parametersRef": reference}}));
        let params = PatchParams::default();
        let patched = self.api.patch(&self.name, &params, &patch).await;
        patched.expect("patched");
    }

    async fn until(&self, what: &str, is: impl Fn(&Value) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            let class = self.api.get(&self.name).await.expect("an answer");
            let status = &class.data["status"];
            if is(status) {
                return;
            }
            assert!(Instant::now() < end, "not in time: {what}: {status}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn remove(self) {
        let params = DeleteParams::background();
        self.api.delete(&self.name, &params).await.expect("deleted");
    }
}

#[tokio::test]
async fn a_service_of_somebody_else_is_not_taken_over() {
    let Some((_alone, cluster)) = Cluster::connect("foreign").await else {
        return;
    };
    let theirs = cluster
        .create(
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "w"},
            "spec": {"ports": [{"port": 80}]}}),
        )
        .await;
    let _running = run(&cluster).await;
    let gateway = cluster.create(gateway("w", json!({}))).await;
    let told = |gateway: &Value| {
        let conditions = gateway["status"]["conditions"].as_array();
        conditions.is_some_and(|all| {
            all.iter().any(|of| {
                of["type"] == "Programmed"
                    && of["reason"] == "Invalid"
                    && of["message"]
                        .as_str()
                        .is_some_and(|text| text.contains("Service"))
            })
        })
    };
    cluster.until("the condition", &gateway, told).await;
    let after = cluster.get(&theirs).await.expect("there");
    assert_eq!(
        after["metadata"]["resourceVersion"],
        theirs["metadata"]["resourceVersion"]
    );
    assert!(cluster.get(&made("Deployment", "w")).await.is_none());

    cluster.delete(&theirs).await;
    cluster
        .until("the waypoint's own", &made("Service", "w"), |of| {
            of["metadata"]["labels"]["gateway.istio.io/managed"] == "istio.io-mesh-controller"
        })
        .await;
    cluster
        .until("no fault is told any more", &gateway, |gateway| {
            !told(gateway)
        })
        .await;
    cluster.delete(&gateway).await;
    cluster.remove().await;
}

#[tokio::test]
async fn a_waypoint_does_not_run_as_a_node_proxy() {
    let Some((_alone, cluster)) = Cluster::connect("account").await else {
        return;
    };
    let _running = run(&cluster).await;
    let mut object = gateway("w", json!({}));
    object["metadata"]["annotations"] = json!({"gateway.istio.io/service-account": "ztunnel"});
    let gateway = cluster.create(object).await;
    cluster
        .until("it is told", &gateway, |gateway| {
            let status = &gateway["status"];
            has(
                &status["conditions"],
                "Accepted",
                "False",
                "InvalidParameters",
            ) && status.to_string().contains("/ztunnel")
        })
        .await;
    assert!(cluster.get(&made("Deployment", "w")).await.is_none());
    let own = json!({"metadata": {"annotations": {"gateway.istio.io/service-account": "own"}}});
    cluster.patch(&gateway, own).await;
    cluster
        .until("the waypoint", &made("Deployment", "w"), any)
        .await;
    cluster.delete(&gateway).await;
    cluster.remove().await;
}

#[tokio::test]
async fn the_class_tells_what_waypoints_can() {
    let Some((_alone, cluster)) = Cluster::connect("features").await else {
        return;
    };
    let _running = run(&cluster).await;
    let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "GatewayClass");
    let classes: Api<DynamicObject> =
        Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&kind));
    let end = Instant::now() + PATIENCE;
    loop {
        let class = classes.get_opt("istio-waypoint").await.expect("an answer");
        let status = class.map(|class| class.data["status"].clone());
        let status = status.unwrap_or_default();
        let features = status["supportedFeatures"].as_array();
        let names = features.into_iter().flatten().map(|of| of["name"].as_str());
        let names: Vec<_> = names.collect();
        // The other writer's part stays.
        let accepted = has(&status["conditions"], "Accepted", "True", "Accepted");
        let supported = has(
            &status["conditions"],
            "SupportedVersion",
            "True",
            "SupportedVersion",
        );
        let listed = names.contains(&Some("MeshConsumerRoute")) && names.is_sorted();
        if accepted && supported && listed {
            break;
        }
        assert!(Instant::now() < end, "not told: {status}");
        sleep(Duration::from_millis(50)).await;
    }
    cluster.remove().await;
}
