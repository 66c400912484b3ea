//! The whole of it: files and reports in, snapshots out.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_controlplane::auth::Caller;
use adit_controlplane::ca::CurrentCa;
use adit_controlplane::compile::l7::WaypointName;
use adit_controlplane::driver::{ControlPlane, Input, Options};
use adit_controlplane::model::Kind;
use adit_controlplane::serve::ResourceSnapshot;
use adit_controlplane::source::WatchOptions;
use adit_controlplane::status::read_statuses;
use adit_shared::identity::{LocalCa, TrustDomain};
use adit_shared::proto::enrolment::{EnrolmentState, PodEnrolment};
use adit_shared::proto::waypoint::{SECRET_TYPE, SERVICE_TYPE};
use adit_shared::proto::workload::{Address, TunnelProtocol, address};
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use prost::Message;
use tempfile::TempDir;
use tokio::sync::watch;

const DEADLINE: Duration = Duration::from_secs(10);
const DELAY: Duration = Duration::from_millis(700);

struct Running {
    directory: TempDir,
    plane: ControlPlane,
    snapshots: watch::Receiver<Arc<ResourceSnapshot>>,
}

fn options(directory: &TempDir) -> Options {
    Options {
        input: Input::Directories {
            roots: vec![directory.path().join("config")],
            watch: WatchOptions::default(),
        },
        status: Some(directory.path().join("status")),
        withdraw_delay: DELAY,
        ..Options::default()
    }
}

fn namespace(mode: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {{istio.io/dataplane-mode: {mode}}}}}\n"
    )
}

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a, uid: u1}\nspec: {nodeName: n1, serviceAccountName: s, containers: []}\nstatus: {phase: Running, podIP: 10.0.0.1}\n";

impl Running {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("config")).unwrap();
        let write = |name: &str, text: &str| {
            fs::write(directory.path().join("config").join(name), text).unwrap()
        };
        write("ns.yaml", &namespace("ambient"));
        write("pod.yaml", POD);
        let plane = ControlPlane::start(options(&directory)).await.unwrap();
        let snapshots = plane.snapshots();
        Self {
            directory,
            plane,
            snapshots,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join("config").join(name)
    }

    async fn wait(&mut self, what: &str, mut condition: impl FnMut(&ResourceSnapshot) -> bool) {
        let waited = tokio::time::timeout(DEADLINE, self.snapshots.wait_for(|s| condition(s)))
            .await
            .is_ok();
        if !waited {
            panic!("{what}: {:?}", self.snapshots.borrow());
        }
    }

    fn report(&self, node: &str, state: EnrolmentState) {
        let pod = PodEnrolment {
            uid: "u1".into(),
            state: state.into(),
            message: String::new(),
        };
        self.plane.reports().report(node, vec![pod]);
    }
}

fn says_hbone(snapshot: &ResourceSnapshot) -> bool {
    let resource = snapshot
        .resources(ADDRESS_TYPE)
        .and_then(|set| set.get("Kubernetes//Pod/a/p").cloned())
        .unwrap();
    match Address::decode(resource.body().clone()).unwrap().r#type {
        Some(address::Type::Workload(workload)) => {
            workload.tunnel_protocol() == TunnelProtocol::Hbone
        }
        other => panic!("{other:?}"),
    }
}

fn is_enrolled(snapshot: &ResourceSnapshot) -> bool {
    snapshot
        .enrolments("n1")
        .is_some_and(|set| set.get("u1").is_some())
}

#[tokio::test]
async fn enrolment_from_label_to_withdrawal() {
    let mut running = Running::start().await;
    let first = running.snapshots.borrow().clone();
    assert!(first.is_ready() && is_enrolled(&first) && !says_hbone(&first));
    running.report("n2", EnrolmentState::Enrolled);
    running.report("n1", EnrolmentState::Pending);
    running.report("n1", EnrolmentState::Enrolled);
    running.wait("HBONE after the report", says_hbone).await;

    // NONE first; the enrolment follows when clients have had their time.
    fs::write(running.file("ns.yaml"), namespace("none")).unwrap();
    running
        .wait("NONE after the opt-out", |s| !says_hbone(s))
        .await;
    let since = Instant::now();
    assert!(is_enrolled(&running.snapshots.borrow()));
    running.wait("the withdrawal", |s| !is_enrolled(s)).await;
    // The label was seen before NONE was.
    assert!(since.elapsed() >= DELAY / 2, "{:?}", since.elapsed());

    // And back: the node says so again.
    fs::write(running.file("ns.yaml"), namespace("ambient")).unwrap();
    running.wait("the second enrolment", is_enrolled).await;
}

#[tokio::test]
async fn a_restart_opens_no_window_for_plaintext() {
    let mut running = Running::start().await;
    running.report("n1", EnrolmentState::Enrolled);
    running.wait("HBONE", says_hbone).await;
    let Running {
        directory, plane, ..
    } = running;
    drop(plane);
    let plane = ControlPlane::start(options(&directory)).await.unwrap();
    let first = plane.snapshots().borrow().clone();
    assert!(says_hbone(&first), "before any report");
    // A proxy that restarted with it has nothing yet.
    plane.reports().report("n1", Vec::new());
    let mut snapshots = plane.snapshots();
    fs::write(directory.path().join("config/more.yaml"), "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: a}\nspec: {action: AUDIT, rules: [{}]}\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: q, namespace: a}\n").unwrap();
    let waited = tokio::time::timeout(
        DEADLINE,
        snapshots.wait_for(|s| {
            s.resources(AUTHORIZATION_TYPE)
                .is_some_and(|set| set.get("a/q").is_some())
        }),
    );
    let snapshot = waited.await.unwrap().unwrap().clone();
    assert!(says_hbone(&snapshot));
    // Conditions are written as well.
    let written =
        fs::read_to_string(directory.path().join("status/AuthorizationPolicy.json")).unwrap();
    assert!(
        written.contains("UnsupportedValue") && written.contains("Accepted"),
        "{written}"
    );
}

#[tokio::test]
async fn the_certificate_service_learns_who_runs_where() {
    let running = Running::start().await;
    let pods = running.plane.pods();
    for (node, namespace, account, expected) in [
        ("n1", "a", "s", true),
        ("n2", "a", "s", false),
        ("n1", "b", "s", false),
        ("n1", "a", "t", false),
    ] {
        assert_eq!(
            pods.runs_on(node, namespace, account),
            expected,
            "{node} {namespace} {account}"
        );
    }
    fs::write(running.file("pod.yaml"), POD.replace("Running", "Failed")).unwrap();
    let end = Instant::now() + DEADLINE;
    while pods.runs_on("n1", "a", "s") {
        assert!(Instant::now() < end, "a failed pod still counts");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_change_without_effect_is_no_new_snapshot() {
    let mut running = Running::start().await;
    let before = running.snapshots.borrow_and_update().generation();
    fs::write(running.file("pod.yaml"), format!("# more\n{POD}")).unwrap();
    fs::write(
        running.file("other.yaml"),
        namespace("ambient").replace("name: a", "name: b"),
    )
    .unwrap();
    fs::write(
        running.file("last.yaml"),
        "apiVersion: v1\nkind: Service\nmetadata: {name: z, namespace: c}\n",
    )
    .unwrap();
    running
        .wait("the service", |s| {
            s.resources(ADDRESS_TYPE)
                .is_some_and(|set| set.get("c/z.c.svc.cluster.local").is_some())
        })
        .await;
    // The writes may have been seen one by one, but only the last has an effect.
    assert_eq!(running.snapshots.borrow().generation(), before + 1);
}

/// From manifests to the waypoint: its pod is known, it gets its resources, and a user can
/// read what came of it.
#[tokio::test]
async fn a_waypoint_is_known_served_and_reported() {
    let mut running = Running::start().await;
    let manifest = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: a}\nspec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: w, namespace: a, labels: {gateway.networking.k8s.io/gateway-name: w, gateway.istio.io/managed: istio.io-mesh-controller}}\nspec: {clusterIP: 10.96.9.1, ports: [{port: 15008, name: mesh}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: a, labels: {istio.io/use-waypoint: w}}\nspec: {ports: [{port: 80, name: http}]}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: w-1, namespace: a, uid: u7, labels: {gateway.networking.k8s.io/gateway-name: w, gateway.istio.io/managed: istio.io-mesh-controller}}\nspec: {serviceAccountName: w, nodeName: n1, containers: []}\nstatus: {phase: Running, podIP: 10.0.0.7}\n";
    fs::write(running.file("waypoint.yaml"), manifest).unwrap();
    let name = WaypointName {
        namespace: "a".into(),
        name: "w".into(),
    };
    running
        .wait("the waypoint's service", |snapshot| {
            let services = snapshot.of_waypoint(&name, SERVICE_TYPE);
            services.is_some_and(|set| set.get("a/s.a.svc.cluster.local").is_some())
        })
        .await;
    let pods = running.plane.pods();
    let caller = |account: &str, pod: &str, uid: &str| Caller {
        namespace: "a".into(),
        service_account: account.into(),
        pod_name: pod.into(),
        pod_uid: uid.into(),
        node: "n1".into(),
    };
    let gateway = |caller| pods.gateway_of(&caller);
    assert_eq!(gateway(caller("w", "w-1", "u7")).as_deref(), Some("w"));
    for other in [
        caller("w", "w-1", "u8"),
        caller("x", "w-1", "u7"),
        caller("w", "w-2", "u7"),
        caller("s", "p", "u1"),
    ] {
        assert_eq!(gateway(other.clone()), None, "{other}");
    }
    let status = running.directory.path().join("status");
    let read = |kind| read_statuses(&status, kind).unwrap().remove(0);
    let gateway = read(Kind::Gateway);
    assert_eq!(gateway.addresses[0].value, "w.a.svc.cluster.local");
    let programmed = &gateway.conditions[1];
    assert_eq!(
        (programmed.kind.as_str(), programmed.reason.as_str()),
        ("Programmed", "Pending")
    );
    assert_eq!(read(Kind::Service).conditions[0].reason, "WaypointAccepted");
    // When a pod of it is ready, so is the waypoint.
    let ready = manifest.replace(
        "podIP: 10.0.0.7",
        "podIP: 10.0.0.7, conditions: [{type: Ready, status: 'True'}]",
    );
    fs::write(running.file("waypoint.yaml"), ready).unwrap();
    let end = Instant::now() + DEADLINE;
    while read(Kind::Gateway).conditions[1].status != "True" {
        assert!(Instant::now() < end, "the waypoint is not programmed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Replicas follow the authority's replacement each in its own time, and a restarted one sees
/// the new one only: all end up with the same keys.
#[tokio::test]
async fn the_keys_of_sessions_follow_the_authority() {
    let authority = || Arc::new(LocalCa::generate(&TrustDomain::default()).unwrap());
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("config")).unwrap();
    fs::write(directory.path().join("config/waypoint.yaml"), "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: a}\nspec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n").unwrap();
    let name = WaypointName {
        namespace: "a".into(),
        name: "w".into(),
    };
    let key = |snapshot: &ResourceSnapshot| {
        let secrets = snapshot.of_waypoint(&name, SECRET_TYPE)?;
        let (_, secret) = secrets.iter().next()?;
        Some(secret.body().clone())
    };
    let start = async |authority: &Arc<LocalCa>| {
        let (publish, follow) = watch::channel(authority.clone());
        let options = Options {
            authority: Some(CurrentCa::new(follow)),
            status: None,
            ..options(&directory)
        };
        let plane = ControlPlane::start(options).await.unwrap();
        (plane, publish)
    };
    let (old, new) = (authority(), authority());
    let (before, replace) = start(&old).await;
    let (restarted, _keep) = start(&new).await;
    let mut snapshots = before.snapshots();
    let first = key(&snapshots.borrow()).expect("a key");
    let wanted = key(&restarted.snapshots().borrow()).expect("a key");
    assert_ne!(first, wanted);
    replace.send_replace(new);
    let followed = snapshots.wait_for(|snapshot| key(snapshot).as_ref() == Some(&wanted));
    let followed = tokio::time::timeout(DEADLINE, followed).await;
    assert!(
        followed.is_ok(),
        "the replica keeps the old authority's key"
    );
}
