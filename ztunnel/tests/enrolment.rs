//! The enrolment manager on the real kernel: pods are network namespaces of this test, and the
//! control plane is what it says.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use adit_ebpf::socket::PortRotor;
use adit_ebpf::{NetnsFd, NodeConfig, Redirector, in_netns};
use adit_shared::hbone::Settings;
use adit_shared::identity::{
    CacheOptions, CertificateAuthority, CertificateCache, SignError, SignedChain, SpiffeId,
    TrustDomain,
};
use adit_shared::model::enrolment::{AGENT_REMOVED, SandboxPod};
use adit_shared::model::{SharedModel, address_from_resource};
use adit_shared::net::drain::{self, DrainTrigger};
use adit_shared::net::handoff::{self, Answer, HandoffListener};
use adit_shared::policy::TrustDomains;
use adit_shared::proto::enrolment::{Enrolment, EnrolmentReport, EnrolmentState};
use adit_shared::proto::workload as wire;
use adit_shared::telemetry::{Metrics, Telemetry};
use adit_ztunnel::config::{Config, OwnPod, PodDiscovery};
use adit_ztunnel::discovery::Discovery;
use adit_ztunnel::enrolment::{
    EarlyRecords, EnrolledPods, EnrolmentManager, EnrolmentSocket, Wanted,
};
use adit_ztunnel::pod::PodSpec;
use adit_ztunnel::worker::{Shared, WorkerHandle};
use futures_util::future::BoxFuture;
use http::{Method, StatusCode};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(20);
const WORKERS: usize = 2;
/// Of one enrolment: outbound, plaintext and HBONE at each worker.
const LISTENERS: usize = 3 * WORKERS;
const UID: &str = "7d0c";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// One that says no at once, so that nothing waits for it.
struct NoCertificates;

impl CertificateAuthority for NoCertificates {
    fn sign<'a>(
        &'a self,
        _: &'a SpiffeId,
        _: &'a str,
        _: Duration,
    ) -> BoxFuture<'a, Result<SignedChain, SignError>> {
        Box::pin(async { Err(SignError::Refused("not in this test".into())) })
    }
}

/// One that never answers.
struct SilentAuthority;

impl CertificateAuthority for SilentAuthority {
    fn sign<'a>(
        &'a self,
        _: &'a SpiffeId,
        _: &'a str,
        _: Duration,
    ) -> BoxFuture<'a, Result<SignedChain, SignError>> {
        Box::pin(std::future::pending())
    }
}

/// A network namespace with [`ADDRESS`], deleted with this.
struct Netns(String);

impl Netns {
    fn new(lab: &str, name: &str) -> Self {
        let netns = Self(format!("{lab}-{name}"));
        ip(&["netns", "add", &netns.0]);
        for arguments in [
            "link set lo up",
            "link add eth0 type veth peer name eth1",
            "link set eth1 up",
            "addr add 10.9.0.2/24 dev eth0",
            "link set eth0 up",
        ] {
            let mut all = vec!["-n", &netns.0];
            all.extend(arguments.split(' '));
            ip(&all);
        }
        netns
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    fn fd(&self) -> NetnsFd {
        NetnsFd::open(self.path()).expect("it is there")
    }

    /// The sockets that listen there.
    fn listeners(&self) -> usize {
        const LISTEN: &str = "0A";
        let tables = in_netns(self.fd().as_fd(), || {
            ["tcp", "tcp6"]
                .map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")))
        });
        let tables = tables.expect("entered");
        let lines = tables.iter().flatten().flat_map(|table| table.lines());
        lines
            .filter(|line| line.split_whitespace().nth(3) == Some(LISTEN))
            .count()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output();
    let output = output.expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments:?}: {output:?}");
}

/// A node with its manager.
struct Node {
    name: String,
    directory: PathBuf,
    cgroup: PathBuf,
    wanted: Arc<Wanted>,
    shared: Arc<Shared>,
    redirector: Arc<Mutex<Redirector>>,
    reports: watch::Receiver<EnrolmentReport>,
    /// How often the manager has worked off what is wanted.
    rounds: Arc<AtomicUsize>,
    manager: JoinHandle<()>,
    socket: Arc<EnrolmentSocket>,
    serving: JoinHandle<()>,
    _drain: DrainTrigger,
}

impl Node {
    fn start() -> Self {
        Self::start_with(NoCertificates)
    }

    fn start_with(authority: impl CertificateAuthority + 'static) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("zt{}-{number}", std::process::id());
        let directory = Path::new("/run").join(&name);
        let netns_dir = directory.join("netns");
        for needed in [&netns_dir, &directory.join("bpf")] {
            std::fs::create_dir_all(needed).expect("a directory");
        }
        let detected = NodeConfig::detect(&name).expect("cgroup v2");
        let cgroup = detected.cgroup.join(&name);
        std::fs::create_dir(&cgroup).expect("a cgroup");
        let redirector = Redirector::open(NodeConfig {
            cgroup: cgroup.clone(),
            bpffs: directory.join("bpf"),
            ..detected
        });
        let redirector = Arc::new(Mutex::new(redirector.expect("this kernel can")));

        let certificates = CertificateCache::new(Arc::new(authority), CacheOptions::default());
        let metrics = Arc::new(Metrics::new("ztunnel", "test"));
        let telemetry = Telemetry::new(metrics, None, Vec::new());
        let (drain, watcher) = drain::channel();
        let shared = Arc::new(Shared {
            config: config(&name, &netns_dir),
            model: Arc::new(SharedModel::new()),
            trust_domains: TrustDomains::new(TrustDomain::default(), Vec::new()),
            certificates: certificates.clone(),
            telemetry: telemetry.clone(),
            ports: PortRotor::default(),
            failing_waypoints: Default::default(),
            drain: watcher,
        });
        let workers: Arc<[WorkerHandle]> = (0..WORKERS)
            .map(|index| WorkerHandle::start(index, shared.clone()).expect("a worker"))
            .collect();
        let wanted = Arc::new(Wanted::default());
        let rounds = Arc::new(AtomicUsize::new(0));
        let counted = rounds.clone();
        let (sender, reports) = watch::channel(EnrolmentReport::default());
        let records = EarlyRecords::open(
            &directory.join("pods"),
            TrustDomain::default(),
            "Kubernetes".to_owned(),
        );
        let records = Arc::new(records.expect("a directory"));
        let pods = Arc::new(EnrolledPods::default());
        let discovery = Arc::new(Discovery::Directory(netns_dir));
        let manager = EnrolmentManager {
            node: name.clone(),
            discovery: discovery.clone(),
            records: Some(records.clone()),
            ipv6: false,
            drain_deadline: Duration::ZERO,
            wanted: wanted.clone(),
            certificates,
            redirector: redirector.clone(),
            workers,
            pods: pods.clone(),
            telemetry,
            reports: sender,
            settled: Box::new(move || {
                counted.fetch_add(1, Ordering::Relaxed);
            }),
        };
        let manager = tokio::spawn(manager.run());
        let socket = Arc::new(EnrolmentSocket {
            wanted: wanted.clone(),
            records,
            discovery,
            pods,
            redirector: redirector.clone(),
            manager: manager.abort_handle(),
            leaving: Default::default(),
        });
        let listener = HandoffListener::bind(&directory.join("ztunnel.sock")).expect("bound");
        let answering = socket.clone();
        let serving = tokio::spawn(listener.serve(move |call| {
            let socket = answering.clone();
            async move { socket.answer(call).await }
        }));
        Self {
            name,
            directory,
            cgroup,
            wanted,
            shared,
            redirector,
            reports,
            rounds,
            manager,
            socket,
            serving,
            _drain: drain,
        }
    }

    /// Names the pod's namespace from now on.
    fn set_netns(&self, netns: &Netns) {
        let (path, temporary) = (
            self.directory.join("netns").join(UID),
            self.directory.join("next"),
        );
        std::os::unix::fs::symlink(netns.path(), &temporary).expect("a link");
        std::fs::rename(&temporary, &path).expect("in its place");
    }

    fn want(&self, address: Ipv4Addr) {
        let enrolment = Enrolment {
            uid: UID.into(),
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            addresses: vec![address.octets().to_vec()],
            outbound_only: false,
        };
        let spec = PodSpec::new(&enrolment, &TrustDomain::default(), "Kubernetes");
        self.wanted.update(vec![spec.expect("valid")], &[]);
    }

    /// What the node agent calls.
    async fn call(
        &self,
        method: Method,
        target: &str,
        body: &impl serde::Serialize,
        netns: Option<NetnsFd>,
    ) -> Answer {
        let (path, target) = (self.directory.join("ztunnel.sock"), target.to_owned());
        let body = serde_json::to_vec(body).expect("JSON");
        let called = tokio::task::spawn_blocking(move || {
            let netns = netns.as_ref().map(|netns| netns.as_fd());
            handoff::call(&path, &method, &target, &body, netns, PATIENCE)
        });
        called.await.expect("no panic").expect("an answer")
    }

    /// A sandbox of the pod is being made.
    async fn make_sandbox(&self, sandbox: &str, netns: &Netns) -> Answer {
        self.make_sandbox_of(UID, sandbox, netns).await
    }

    async fn make_sandbox_of(&self, uid: &str, sandbox: &str, netns: &Netns) -> Answer {
        let body = SandboxPod {
            uid: uid.into(),
            ..pod(sandbox, ADDRESS)
        };
        self.call(Method::POST, "/pods", &body, Some(netns.fd()))
            .await
    }

    fn captured(&self) -> Vec<u64> {
        let pods = self.redirector.lock().pods();
        pods.iter().map(|pod| pod.netns_inode).collect()
    }

    /// Waits until the manager has worked off what is wanted once more.
    async fn another_round(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_for("a round", || self.rounds.load(Ordering::Relaxed) > before).await;
    }

    async fn is_reported(&mut self, state: EnrolmentState, why: &str) {
        let fits = |report: &EnrolmentReport| {
            let mut pods = report.pods.iter();
            pods.any(|pod| pod.state() == state && pod.message.contains(why))
        };
        let waiting = self.reports.wait_for(fits);
        let told = tokio::time::timeout(PATIENCE, waiting).await.is_ok();
        assert!(told, "{:?}", *self.reports.borrow());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.manager.abort();
        self.serving.abort();
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.directory.join("bpf"))
            .output();
        let _ = std::fs::remove_dir_all(&self.directory);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

fn config(node: &str, netns_dir: &Path) -> Config {
    let nowhere = || SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Config {
        node: node.to_owned(),
        network: String::new(),
        cluster: "Kubernetes".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        trust_domain: TrustDomain::default(),
        own_pod: OwnPod {
            name: String::new(),
            namespace: String::new(),
            service_account: String::new(),
            ip: None,
        },
        xds_address: String::new(),
        xds_root_ca: PathBuf::new(),
        alt_xds_hostname: None,
        ca_address: String::new(),
        ca_root_ca: PathBuf::new(),
        alt_ca_hostname: None,
        auth_token: PathBuf::new(),
        certificate_ttl: Duration::from_secs(600),
        workers: WORKERS,
        admin_address: nowhere(),
        stats_address: nowhere(),
        readiness_address: nowhere(),
        ipv6: false,
        pool_max_streams: 100,
        pool_unused_release: Duration::from_secs(300),
        http2: Settings::default(),
        termination_deadline: Duration::ZERO,
        max_connections: 1024,
        idle_timeout: None,
        cgroup: None,
        bpffs: PathBuf::new(),
        kubelet_cgroup: None,
        kubelet_port: 10250,
        pod_discovery: PodDiscovery::Directory,
        netns_dir: netns_dir.to_owned(),
        socket: None,
        metadata: Default::default(),
    }
}

fn pod(sandbox: &str, address: Ipv4Addr) -> SandboxPod {
    SandboxPod {
        uid: UID.into(),
        name: "web-1".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        addresses: vec![address.into()],
        outbound_only: false,
        sandbox: sandbox.into(),
    }
}

async fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_enrolment_that_fails_leaves_no_listener() {
    let mut node = Node::start();
    let netns = Netns::new(&node.name, "a");
    node.set_netns(&netns);
    // Listeners are opened before capture, which does not find this address.
    let nobodys = Ipv4Addr::new(10, 9, 0, 99);
    for _ in 0..4 {
        node.want(nobodys);
        node.another_round().await;
    }
    node.is_reported(EnrolmentState::Failed, "10.9.0.99").await;
    wait_for("the end of its listeners", || netns.listeners() == 0).await;

    node.want(ADDRESS);
    node.is_reported(EnrolmentState::Enrolled, "").await;
    wait_for("one set of listeners", || netns.listeners() == LISTENERS).await;
    // A change that cannot be put into force leaves what is in force.
    node.want(nobodys);
    node.is_reported(EnrolmentState::Failed, "10.9.0.99").await;
    node.another_round().await;
    wait_for("that set of listeners", || netns.listeners() == LISTENERS).await;
}

/// A sandbox that was made anew has the same uid, and nothing in it is captured.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_with_a_new_network_namespace_is_enrolled_in_that() {
    let mut node = Node::start();
    let (old, new) = (Netns::new(&node.name, "a"), Netns::new(&node.name, "b"));
    node.set_netns(&old);
    node.want(ADDRESS);
    node.is_reported(EnrolmentState::Enrolled, "").await;
    assert_eq!(old.listeners(), LISTENERS);
    assert_eq!(node.captured(), [old.fd().inode()]);

    // The control plane does not say a word about that.
    node.set_netns(&new);
    wait_for("capture in the new one", || {
        node.captured() == [new.fd().inode()] && new.listeners() == LISTENERS
    })
    .await;
    wait_for("the end of the listeners in the old one", || {
        old.listeners() == 0
    })
    .await;
    let rules = Command::new("ip")
        .args(["-n", &old.0, "rule", "show", "pref", "5"])
        .output()
        .expect("iproute2 is installed");
    assert!(rules.stdout.is_empty(), "{rules:?}");
}

/// Nothing runs in the sandbox yet, and the control plane has not heard of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_is_captured_before_the_plugin_is_answered() {
    let node = Node::start();
    let netns = Netns::new(&node.name, "a");
    let target = format!("/pods/{UID}");
    let unknown = node.call(Method::GET, &target, &(), None).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    let answer = node.make_sandbox("s1", &netns).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(node.captured(), [netns.fd().inode()]);
    assert_eq!(netns.listeners(), LISTENERS);
    assert!(node.directory.join("pods").join(UID).exists());
    let known = node.call(Method::GET, &target, &(), None).await;
    assert_eq!(known.status, StatusCode::OK);

    // The control plane takes it over, and lets it go.
    node.want(ADDRESS);
    node.another_round().await;
    assert_eq!(node.captured(), [netns.fd().inode()]);
    assert_eq!(netns.listeners(), LISTENERS);
    wait_for("the end of its record", || {
        !node.directory.join("pods").join(UID).exists()
    })
    .await;
    node.wanted.update(Vec::new(), &[UID.into()]);
    wait_for("the end of its capture", || {
        node.captured().is_empty() && netns.listeners() == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_that_ends_takes_its_capture_along() {
    let node = Node::start();
    let (first, second) = (Netns::new(&node.name, "a"), Netns::new(&node.name, "b"));
    assert_eq!(node.make_sandbox("s1", &first).await.status, StatusCode::OK);
    // The runtime makes another one before it tells of the end of the first.
    assert_eq!(
        node.make_sandbox("s2", &second).await.status,
        StatusCode::OK
    );
    assert_eq!(node.captured(), [second.fd().inode()]);
    node.call(Method::DELETE, "/sandboxes/s1", &(), None).await;
    wait_for("the end of the first", || first.listeners() == 0).await;
    assert_eq!(node.captured(), [second.fd().inode()]);
    assert_eq!(second.listeners(), LISTENERS);
    node.call(Method::POST, "/pods/retain", &["s2"], None).await;
    assert_eq!(node.captured(), [second.fd().inode()]);
    // Also when the control plane still names it: it is answered when nothing is left.
    node.want(ADDRESS);
    node.another_round().await;
    node.call(Method::DELETE, "/sandboxes/s2", &(), None).await;
    assert!(node.captured().is_empty());
    wait_for("the end of its listeners", || second.listeners() == 0).await;
    node.another_round().await;
    assert!(node.captured().is_empty(), "it came back");
    assert!(!node.directory.join("pods").join(UID).exists());
}

/// It joined while it ran, so that nobody has told of its sandbox.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_an_unknown_sandbox_is_the_pods_if_nothing_runs_in_it() {
    let mut node = Node::start();
    let netns = Netns::new(&node.name, "a");
    node.set_netns(&netns);
    node.want(ADDRESS);
    node.is_reported(EnrolmentState::Enrolled, "").await;
    let target = format!("/sandboxes/s1?uid={UID}");
    // One before the last.
    node.call(Method::DELETE, &target, &(), None).await;
    assert_eq!(node.captured(), [netns.fd().inode()]);
    std::fs::remove_file(node.directory.join("netns").join(UID)).expect("a link");
    node.call(Method::DELETE, &target, &(), None).await;
    assert!(node.captured().is_empty());
    wait_for("the end of its listeners", || netns.listeners() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_pods_sandbox_is_refused() {
    let node = Node::start();
    let netns = Netns::new(&node.name, "a");
    let pods = |body, netns| {
        let node = &node;
        async move { node.call(Method::POST, "/pods", &body, netns).await }
    };
    let none = pods(pod("s1", ADDRESS), None).await;
    assert_eq!(none.status, StatusCode::BAD_REQUEST);
    let own = NetnsFd::current().expect("readable");
    let own = pods(pod("s1", ADDRESS), Some(own)).await;
    assert_eq!(own.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(own.text().contains("node's own"), "{}", own.text());
    let other = pods(pod("s1", Ipv4Addr::new(10, 9, 0, 99)), Some(netns.fd())).await;
    assert_eq!(other.status, StatusCode::UNPROCESSABLE_ENTITY);
    let nobody = SandboxPod {
        service_account: String::new(),
        ..pod("s1", ADDRESS)
    };
    let nobody = pods(nobody, Some(netns.fd())).await;
    assert_eq!(nobody.status, StatusCode::BAD_REQUEST);
    assert!(node.captured().is_empty());
    assert_eq!(netns.listeners(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_leaves_the_mesh_has_no_capture() {
    let node = Node::start();
    let netns = Netns::new(&node.name, "a");
    assert_eq!(node.make_sandbox("s1", &netns).await.status, StatusCode::OK);
    let pins = node.directory.join("bpf/adit");
    assert_eq!(std::fs::read_dir(&pins).expect("pins").count(), 1);
    let answer = node.call(Method::POST, "/leave", &(), None).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert!(node.captured().is_empty());
    assert!(!pins.exists());
    assert!(!node.directory.join("pods").exists());
    let rules = Command::new("ip")
        .args(["-n", &netns.0, "rule", "show", "pref", "5"])
        .output()
        .expect("iproute2 is installed");
    assert!(rules.stdout.is_empty(), "{rules:?}");
}

/// As the charts are removed one by one: first the node agent's, later ztunnel's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ztunnel_that_ends_after_its_agent_was_removed_takes_capture_with_it() {
    let node = Node::start();
    let netns = Netns::new(&node.name, "a");
    assert_eq!(node.make_sandbox("s1", &netns).await.status, StatusCode::OK);
    let own = node.directory.join("ztunnel.sock");
    // An agent that is not there may be one that is started again.
    node.socket.leave_with_the_mesh(&own).await;
    assert_eq!(node.captured(), [netns.fd().inode()]);
    let removed = node.directory.join(AGENT_REMOVED);
    std::fs::write(&removed, "").expect("written");
    node.socket.leave_with_the_mesh(&own).await;
    assert!(node.captured().is_empty() && !node.directory.join("bpf/adit").exists());
    assert!(!removed.exists());
}

/// Certificates do not come; what has waited for them once does not hold up what starts now,
/// and does not wait again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_the_certificates_of_others_or_twice_for_its_own() {
    let mut node = Node::start_with(SilentAuthority);
    let (running, starting) = (Netns::new(&node.name, "a"), Netns::new(&node.name, "b"));
    node.set_netns(&running);
    node.want(ADDRESS);
    let answer = node.make_sandbox_of("other", "s1", &starting).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(node.captured(), [starting.fd().inode()]);
    // The first one still gets its time, and then goes on without.
    node.is_reported(EnrolmentState::Enrolled, "").await;
    wait_for("the pod that waits", || node.captured().len() == 2).await;

    // One whose capture fails is tried in every round.
    let started = Instant::now();
    node.want(Ipv4Addr::new(10, 9, 0, 99));
    node.is_reported(EnrolmentState::Failed, "10.9.0.99").await;
    for _ in 0..4 {
        node.want(Ipv4Addr::new(10, 9, 0, 99));
        node.another_round().await;
    }
    // Less than it takes to wait once.
    assert!(started.elapsed() < Duration::from_secs(5));
}

/// The pod's own certificate is missing: that is no failure of the waypoint.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waypoint_is_not_blamed_for_a_certificate_that_is_missing() {
    let mut node = Node::start();
    let netns = Netns::new(&node.name, "a");
    node.set_netns(&netns);
    let address = |last: u8| vec![10, 9, 0, last];
    let workload = |name: &str, last: u8| wire::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.into(),
        addresses: vec![address(last)],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        ..wire::Workload::default()
    };
    let waypoint = wire::NetworkAddress {
        network: String::new(),
        address: address(60),
        length: None,
    };
    let behind = wire::Workload {
        waypoint: Some(wire::GatewayAddress {
            destination: Some(wire::gateway_address::Destination::Address(waypoint)),
            hbone_mtls_port: 15008,
        }),
        ..workload("server", 50)
    };
    for workload in [workload("web-1", 2), behind, workload("waypoint", 60)] {
        let uid = workload.uid.clone();
        let resource = wire::Address {
            r#type: Some(wire::address::Type::Workload(workload)),
        };
        let update = address_from_resource(&uid, &resource).expect("valid");
        node.shared.model.apply([update]);
    }
    node.want(ADDRESS);
    node.is_reported(EnrolmentState::Enrolled, "").await;

    let call = format!(
        "echo $$ >{}/cgroup.procs && exec nsenter --net={} timeout 20 bash -c '\
         exec 3<>/dev/tcp/10.9.0.50/80; printf \"GET / HTTP/1.1\\r\\nhost: server\\r\\n\\r\\n\" >&3; cat <&3'",
        node.cgroup.display(),
        netns.path().display()
    );
    let called = tokio::task::spawn_blocking(move || {
        let output = Command::new("sh").args(["-c", &call]).output();
        output.expect("a shell is installed")
    });
    let output = called.await.expect("no panic");
    let answer = String::from_utf8_lossy(&output.stdout);
    let reason = "x-adit-reason: no_certificate";
    assert!(answer.contains(reason), "{answer} {output:?}");
    let failing = node.shared.failing_waypoints.snapshot(|_| true);
    assert!(failing.is_empty(), "{failing:?}");
}
