//! Conditions, parents and annotations.

use adit_controlplane::driver::ControlPlane;
use adit_shared::proto::enrolment::{EnrolmentState, PodEnrolment};
use adit_shared::proto::{ADDRESS_TYPE, ENROLMENT_TYPE};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::cluster::{Cluster, has, leadership, until};

const GATEWAY: &str = "gateway.networking.k8s.io/v1";
const OURS: &str = "istio.io/mesh-controller";
const REDIRECTION: &str = "ambient.istio.io/redirection";

fn service(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"ports": [{"name": "http", "port": 80}], "selector": {"app": name}}})
}

fn ours(route: &Value) -> Option<Value> {
    let parents = route["status"]["parents"].as_array()?;
    parents
        .iter()
        .find(|entry| entry["controllerName"] == OURS)
        .cloned()
}

#[tokio::test]
async fn a_route_keeps_what_others_say_and_loses_what_we_said() {
    let Some((_alone, cluster)) = Cluster::connect("route").await else {
        return;
    };
    let foreign = json!({"parentRef": {"group": GATEWAY.split('/').next(), "kind": "Gateway", "name": "x"},
        "controllerName": "example.com/other", "conditions": [{"type": "Accepted", "status": "True",
        "reason": "Accepted", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    cluster.create(service("web")).await;
    let route = cluster
        .create(
            json!({"apiVersion": GATEWAY, "kind": "HTTPRoute", "metadata": {"name": "r"},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
                "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}}),
        )
        .await;
    cluster
        .patch(&route, json!({"status": {"parents": [foreign]}}))
        .await;
    let leading = leadership(true);
    let _control_plane = cluster.control_plane(&leading).await;
    let accepted = |route: &Value| {
        ours(route).is_some_and(|entry| has(&entry["conditions"], "Accepted", "True", "Accepted"))
    };
    let first = cluster.until("accepted", &route, accepted).await;
    assert_eq!(first["status"]["parents"][0], foreign);
    let entry = ours(&first).expect("an entry");
    for condition in entry["conditions"].as_array().expect("conditions") {
        assert_eq!(
            condition["observedGeneration"],
            first["metadata"]["generation"]
        );
    }

    // Another spec: every condition tells so, and the times stay.
    let rules = json!([{"backendRefs": [{"name": "nowhere", "port": 80}]}]);
    let edited = cluster
        .patch(&route, json!({"spec": {"rules": rules}}))
        .await;
    let generation = edited["metadata"]["generation"].clone();
    let followed = |route: &Value| {
        let entry = ours(route).unwrap_or_default();
        entry["conditions"].as_array().is_some_and(|all| {
            all.iter()
                .all(|condition| condition["observedGeneration"] == generation)
        }) && has(
            &entry["conditions"],
            "ResolvedRefs",
            "False",
            "BackendNotFound",
        )
    };
    let second = cluster
        .until("the new version is described", &route, followed)
        .await;
    let time =
        |of: &Value| ours(of).expect("an entry")["conditions"][0]["lastTransitionTime"].clone();
    assert_eq!(time(&first), time(&second), "it is accepted as before");
    assert_eq!(second["status"]["parents"][0], foreign);

    // The parent is not ours any more.
    let refs = json!([{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "x"}]);
    cluster
        .patch(&route, json!({"spec": {"parentRefs": refs}}))
        .await;
    let left = cluster
        .until("our entry goes", &route, |route| ours(route).is_none())
        .await;
    assert_eq!(left["status"]["parents"], json!([foreign]));
    cluster.remove().await;
}

#[tokio::test]
async fn who_does_not_lead_writes_nothing_and_who_begins_to_catches_up() {
    let Some((_alone, cluster)) = Cluster::connect("standby").await else {
        return;
    };
    let web = cluster.create(service("web")).await;
    let bound = json!({"metadata": {"labels": {"istio.io/use-waypoint": "nobody"}}});
    cluster.patch(&web, bound).await;
    let leading = leadership(false);
    let control_plane = cluster.control_plane(&leading).await;
    let mut snapshots = control_plane.snapshots();
    let ready = tokio::time::timeout(
        crate::cluster::PATIENCE,
        snapshots.wait_for(|snapshot| snapshot.generation() > 0),
    );
    ready.await.expect("in time").expect("runs");
    let idle = cluster.get(&web).await.expect("there");
    assert!(idle["status"].get("conditions").is_none(), "{idle}");

    leading.send_replace(true);
    let told = |service: &Value| {
        has(
            &service["status"]["conditions"],
            "istio.io/WaypointBound",
            "False",
            "WaypointIsNotReady",
        )
    };
    let first = cluster.until("the condition", &web, told).await;
    // Another who says the same writes nothing: the version stays.
    let other = leadership(true);
    let _other = cluster.control_plane(&other).await;
    // The other has looked at everything when it has written about something of its own.
    let also = cluster.create(service("also")).await;
    leading.send_replace(false);
    cluster
        .patch(
            &also,
            json!({"metadata": {"labels": {"istio.io/use-waypoint": "nobody"}}}),
        )
        .await;
    cluster.until("the other writes", &also, told).await;
    let second = cluster.get(&web).await.expect("there");
    assert_eq!(
        first["metadata"]["resourceVersion"],
        second["metadata"]["resourceVersion"]
    );

    // Nothing is bound any more: the condition goes, also for one who has not written it.
    let unbound = json!({"metadata": {"labels": {"istio.io/use-waypoint": null}}});
    cluster.patch(&web, unbound).await;
    cluster
        .until("the condition goes", &web, |of| {
            !has(
                &of["status"]["conditions"],
                "istio.io/WaypointBound",
                "False",
                "WaypointIsNotReady",
            )
        })
        .await;
    cluster.remove().await;
}

struct Captured {
    control_plane: ControlPlane,
    uid: String,
    address: String,
}

impl Captured {
    /// Whether clients are told to use HBONE with the pod.
    fn hbone(&self) -> bool {
        use adit_shared::proto::workload::{Address, TunnelProtocol, address::Type};
        use prost::Message as _;
        let snapshots = self.control_plane.snapshots();
        let snapshot = snapshots.borrow().clone();
        let Some(resources) = snapshot.resources(ADDRESS_TYPE) else {
            return false;
        };
        resources.iter().any(|(name, resource)| {
            name.ends_with(&self.address)
                && matches!(
                    Address::decode(&resource.body()[..]).ok().and_then(|address| address.r#type),
                    Some(Type::Workload(workload))
                        if workload.tunnel_protocol() == TunnelProtocol::Hbone
                )
        })
    }

    async fn is_hbone(&self, value: bool) {
        until("HBONE", || {
            (self.hbone() == value).then_some(()).ok_or("the other")
        })
        .await;
    }

    async fn is_enrolled(&self) {
        let snapshots = self.control_plane.snapshots();
        until("the enrolment", || {
            let snapshot = snapshots.borrow().clone();
            let resources = snapshot.enrolments("node-x");
            let found = resources.is_some_and(|of| of.get(&self.uid).is_some());
            found.then_some(()).ok_or(ENROLMENT_TYPE)
        })
        .await;
    }
}

async fn capture(cluster: &Cluster, leading: &watch::Sender<bool>, pod: &Value) -> Captured {
    Captured {
        control_plane: cluster.control_plane(leading).await,
        uid: pod["metadata"]["uid"].as_str().expect("a uid").into(),
        address: format!("/{}", pod["metadata"]["name"].as_str().expect("a name")),
    }
}

#[tokio::test]
async fn a_captured_pod_is_annotated_and_stays_captured_over_a_restart() {
    let Some((_alone, cluster)) = Cluster::connect("capture").await else {
        return;
    };
    cluster
        .label(json!({"istio.io/dataplane-mode": "ambient"}))
        .await;
    let account =
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "own"}});
    cluster.create(account).await;
    let pod = cluster
        .create(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
            "spec": {"nodeName": "node-x", "serviceAccountName": "own", "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "c", "image": "i"}]}}))
        .await;
    cluster
        .patch(&pod, json!({"status": {"phase": "Running", "podIP": "10.9.8.7", "podIPs": [{"ip": "10.9.8.7"}],
            "conditions": [{"type": "Ready", "status": "True"}]}}))
        .await;
    // The annotation is the business of whoever knows, whether it leads or not.
    let leading = leadership(false);
    let first = capture(&cluster, &leading, &pod).await;
    first.is_enrolled().await;
    assert!(!first.hbone());
    let report = PodEnrolment {
        uid: first.uid.clone(),
        state: EnrolmentState::Enrolled.into(),
        message: String::new(),
    };
    first.control_plane.reports().report("node-x", vec![report]);
    let annotated = |pod: &Value| pod["metadata"]["annotations"][REDIRECTION] == "enabled";
    cluster.until("the annotation", &pod, annotated).await;
    first.is_hbone(true).await;

    // Another replica, or the same one after a restart, knows it without a report.
    let second = capture(&cluster, &leading, &pod).await;
    second.is_hbone(true).await;
    drop(second);

    leading.send_replace(true);
    cluster
        .label(json!({"istio.io/dataplane-mode": null}))
        .await;
    first.is_hbone(false).await;
    cluster
        .until("the annotation goes", &pod, |pod| !annotated(pod))
        .await;
    cluster.delete(&pod).await;
    cluster.remove().await;
}
