//! Puts the proxy together, in the order in which its parts need each other, and takes it
//! apart again.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_ebpf::socket::PortRotor;
use adit_ebpf::{NodeConfig, Redirector};
use adit_shared::identity::{
    CaClient, CaClientOptions, CacheOptions, CertificateCache, ControlPlaneEndpoint, TokenSource,
    TrustBundle,
};
use adit_shared::model::SharedModel;
use adit_shared::net::drain::{self, DrainMode};
use adit_shared::net::handoff::HandoffListener;
use adit_shared::policy::TrustDomains;
use adit_shared::proto::enrolment::EnrolmentReport;
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ENROLMENT_TYPE};
use adit_shared::telemetry::{LogWriter, Metrics, Readiness, Telemetry, http as status_http};
use adit_shared::xds::client::{
    Client, ClientConfig, NodeMetadata, NodeType, Subscription, TransportConfig,
};
use anyhow::{Context, bail};
use http::{HeaderName, HeaderValue};
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::admin::Admin;
use crate::config::{Config, PodDiscovery};
use crate::control::{Addresses, Enrolments, Policies, XdsEvents, report_enrolments};
use crate::discovery::{CgroupDiscovery, Discovery, find_kubelet, follow_kubelet, kubepods};
use crate::enrolment::{EarlyRecords, EnrolledPods, EnrolmentManager, EnrolmentSocket, Wanted};
use crate::process;
use crate::worker::{Shared, WorkerHandle};

/// Series of workloads that have been gone for so long are dropped.
const SERIES_IDLE: Duration = Duration::from_secs(600);
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// What starting has left is looked at after so long, and then what bursts leave so often.
const TIDY_FIRST: Duration = Duration::from_secs(1);
const TIDY_INTERVAL: Duration = Duration::from_secs(15);
/// The least time over which it is judged whether the process is idle.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How often readiness is looked at until it is there for the first time.
const READY_POLL: Duration = Duration::from_millis(20);
/// After the drain the last log lines get so long to be written.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// Runs the proxy until a signal or `/quitquitquit`.
///
/// # Errors
/// What keeps it from starting; nothing that happens later.
pub async fn run(config: Config, log: LogWriter) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new("ztunnel", env!("CARGO_PKG_VERSION")));
    metrics.watch_log(log.clone());
    let telemetry = Telemetry::new(metrics.clone(), Some(log.clone()), Vec::new());
    let readiness = Readiness::new();
    let mut synced = readiness.task("xds");
    let mut settled = readiness.task("enrolment");
    let accepted = readiness.task("acceptance by the control plane");

    // The status ports first: whoever waits for readiness gets an answer from the start.
    let stats = listen(config.stats_address, "STATS_ADDRESS").await?;
    let ready = listen(config.readiness_address, "READINESS_ADDRESS").await?;
    let admin = listen(config.admin_address, "ADMIN_ADDRESS").await?;
    tokio::spawn(status_http::serve_metrics(stats, metrics.clone()));
    tokio::spawn(status_http::serve_readiness(ready, readiness.clone()));

    let redirector = open_redirector(&config)?;
    let token = TokenSource::File(config.auth_token.clone());
    let ca = ControlPlaneEndpoint::new(
        &config.ca_address,
        Arc::new(TrustBundle::from_file(&config.ca_root_ca)),
        config.alt_ca_hostname.as_deref(),
    )
    .context("CA_ADDRESS")?;
    let authority = CaClient::new(
        &ca,
        CaClientOptions {
            token: token.clone(),
            cluster_id: config.cluster.clone(),
            impersonate: true,
            headers: Vec::new(),
        },
    );
    let options = CacheOptions {
        ttl: config.certificate_ttl,
        ..CacheOptions::default()
    };
    let certificates = CertificateCache::new(Arc::new(authority), options);
    metrics.watch_certificates(certificates.clone());

    let model = Arc::new(SharedModel::new());
    let (drain_trigger, drain_watcher) = drain::channel();
    let shared = Arc::new(Shared {
        model: model.clone(),
        trust_domains: TrustDomains::new(config.trust_domain.clone(), Vec::new()),
        certificates: certificates.clone(),
        telemetry: telemetry.clone(),
        ports: PortRotor::starting_at(rand::random()),
        failing_waypoints: Default::default(),
        drain: drain_watcher,
        config,
    });
    let config = &shared.config;
    let workers: Arc<[WorkerHandle]> = (0..config.workers)
        .map(|index| WorkerHandle::start(index, shared.clone()))
        .collect::<Result<Vec<_>, _>>()
        .context("start workers")?
        .into();

    let wanted = Arc::new(Wanted::default());
    let discovery = Arc::new(open_discovery(config)?);
    let socket = open_socket(config, &wanted)?;
    let pods = Arc::new(EnrolledPods::default());
    let (reports, report_reader) = watch::channel(EnrolmentReport {
        node: config.node.clone(),
        pods: Vec::new(),
    });
    let first = Mutex::new(Some(move || settled.done()));
    let checked = Arc::new(Notify::new());
    let after_check = checked.clone();
    let manager = EnrolmentManager {
        node: config.node.clone(),
        discovery: discovery.clone(),
        records: socket.as_ref().map(|(_, records)| records.clone()),
        ipv6: config.ipv6,
        drain_deadline: config.termination_deadline,
        wanted: wanted.clone(),
        pods: pods.clone(),
        certificates,
        redirector: redirector.clone(),
        workers: workers.clone(),
        telemetry: telemetry.clone(),
        reports,
        settled: Box::new(move || {
            if let Some(mut done) = first.lock().take() {
                done();
            }
            after_check.notify_one();
        }),
    };
    // Whatever of these ends, ends the process: what is captured is then refused, and a new
    // process does better than half of one.
    let mut essential = JoinSet::new();
    let managing = essential.spawn(named("enrolment", manager.run()));
    let socket = socket.map(|(listener, records)| {
        let socket = Arc::new(EnrolmentSocket {
            wanted: wanted.clone(),
            records,
            discovery,
            pods: pods.clone(),
            redirector: redirector.clone(),
            manager: managing.clone(),
            leaving: Default::default(),
        });
        // To the end of the process: the node may leave the mesh while we drain.
        let answering = socket.clone();
        tokio::spawn(listener.serve_at(move |call| {
            let socket = answering.clone();
            async move { socket.answer(call).await }
        }));
        socket
    });
    if config.pod_discovery == PodDiscovery::Cgroup && config.kubelet_cgroup.is_none() {
        let port = config.kubelet_port;
        tokio::spawn(follow_kubelet(
            redirector.clone(),
            adit_ebpf::cgroup2_mount()?,
            port,
        ));
    }

    let trust = Arc::new(TrustBundle::from_file(&config.xds_root_ca));
    let xds = ControlPlaneEndpoint::new(
        &config.xds_address,
        trust.clone(),
        config.alt_xds_hostname.as_deref(),
    )
    .context("XDS_ADDRESS")?;
    // Policies before what refers to them.
    let types: Vec<(&str, Subscription, Arc<dyn adit_shared::xds::Handler>)> = vec![
        (
            AUTHORIZATION_TYPE,
            Subscription::Wildcard,
            Arc::new(Policies(model.clone())),
        ),
        (
            ADDRESS_TYPE,
            Subscription::Wildcard,
            Arc::new(Addresses(model.clone())),
        ),
        (
            ENROLMENT_TYPE,
            Subscription::Wildcard,
            Arc::new(Enrolments {
                wanted: wanted.clone(),
                trust_domain: config.trust_domain.clone(),
                cluster: config.cluster.clone(),
            }),
        ),
    ];
    let (client, subscriber) = Client::new(
        xds_config(config, trust)?,
        types,
        Arc::new(XdsEvents(telemetry.clone())),
    )
    .context("XDS_ADDRESS")?;
    essential.spawn(named("xDS client", client.run(std::future::pending())));
    let mut status = subscriber.status();
    let mut connected = subscriber.status();
    tokio::spawn(async move {
        loop {
            wanted.set_connected(connected.borrow_and_update().connected);
            if connected.changed().await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        // The client lives as long as the process.
        if status.wait_for(|status| status.ready).await.is_ok() {
            synced.done();
        }
        std::future::pending::<()>().await;
        drop(subscriber);
    });
    essential.spawn(named(
        "enrolment reports",
        report_enrolments(xds, token, telemetry.clone(), accepted, report_reader),
    ));
    tokio::spawn(notify_when_ready(readiness));
    tokio::spawn(tidy(checked));
    tokio::spawn(sweep(metrics, shared.clone()));

    let quit = Arc::new(Notify::new());
    let page = Arc::new(Admin {
        shared: shared.clone(),
        workers: workers.clone(),
        pods,
        quit: quit.clone(),
        profiling: Semaphore::new(1),
    });
    tokio::spawn(status_http::serve(admin, move |request| {
        page.clone().handle(request)
    }));
    info!(node = %config.node, workers = config.workers, "ztunnel started");

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let failed = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        () = quit.notified() => None,
        what = first_end(&mut essential) => Some(what),
        () = WorkerHandle::any_stopped(&workers) => Some("a worker has stopped".to_owned()),
    };
    if let Some(what) = &failed {
        error!("{what}; the proxy ends");
    }
    // A successor may be enrolling pods already: from here on they are its own.
    managing.abort();
    let deadline = config.termination_deadline;
    info!(?deadline, "draining");
    let until = tokio::time::Instant::now() + deadline;
    drain_trigger.signal(DrainMode::Graceful { deadline: until });
    let drained = async {
        WorkerHandle::all_stopped(&workers).await;
    };
    let left = async {
        if let (None, Some(socket), Some(path)) = (&failed, &socket, &config.socket) {
            socket.leave_with_the_mesh(path).await;
        }
    };
    // A second signal does not wait.
    tokio::select! {
        _ = async { tokio::join!(drained, left) } => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    log.flush(FLUSH_DEADLINE);
    match failed {
        None => Ok(()),
        Some(what) => bail!(what),
    }
}

async fn named<T>(name: &'static str, task: impl Future<Output = T>) -> &'static str {
    task.await;
    name
}

/// Waits for the first of the tasks to end and tells which and how. One that we end ourselves
/// is no failure: when the node leaves the mesh, the enrolment manager ends before the capture
/// of its pods is removed, and the process must live to do that.
async fn first_end(tasks: &mut JoinSet<&'static str>) -> String {
    loop {
        match tasks.join_next().await {
            Some(Ok(name)) => return format!("{name}: ended by itself"),
            Some(Err(error)) if error.is_cancelled() => {}
            Some(Err(panicked)) => return format!("an essential task failed: {panicked}"),
            None => std::future::pending().await,
        }
    }
}

async fn listen(
    address: std::net::SocketAddr,
    variable: &str,
) -> anyhow::Result<tokio::net::TcpListener> {
    status_http::listen(address)
        .await
        .with_context(|| format!("{variable}: listen on {address}"))
}

fn open_discovery(config: &Config) -> anyhow::Result<Discovery> {
    Ok(match config.pod_discovery {
        PodDiscovery::Directory => Discovery::Directory(config.netns_dir.clone()),
        PodDiscovery::Cgroup => {
            let hierarchy = adit_ebpf::cgroup2_mount().context("find cgroup v2")?;
            let root = config.cgroup.clone().or_else(|| kubepods(&hierarchy));
            let discovery = CgroupDiscovery::new(&root.unwrap_or(hierarchy));
            Discovery::Cgroups(discovery.context("our own network namespace")?)
        }
    })
}

/// The socket of the node agent, with what earlier processes heard over it.
fn open_socket(
    config: &Config,
    wanted: &Wanted,
) -> anyhow::Result<Option<(HandoffListener, Arc<EarlyRecords>)>> {
    let Some(path) = &config.socket else {
        return Ok(None);
    };
    let directory = path.with_file_name("pods");
    let (trust_domain, cluster) = (config.trust_domain.clone(), config.cluster.clone());
    let records = EarlyRecords::open(&directory, trust_domain, cluster)
        .with_context(|| format!("ADIT_SOCKET: {}", directory.display()))?;
    // Bound first: what a predecessor is told from now on, we are told.
    let listener = HandoffListener::bind(path)
        .with_context(|| format!("ADIT_SOCKET: listen at {}", path.display()))?;
    records.reconcile(wanted);
    Ok(Some((listener, Arc::new(records))))
}

fn open_redirector(config: &Config) -> anyhow::Result<Arc<Mutex<Redirector>>> {
    let mut node = NodeConfig::detect(&config.node).context("find cgroup v2")?;
    let in_cluster = config.pod_discovery == PodDiscovery::Cgroup;
    let hierarchy = node.cgroup.clone();
    match &config.cgroup {
        Some(cgroup) => node.cgroup.clone_from(cgroup),
        None if in_cluster => match kubepods(&hierarchy) {
            Some(cgroup) => node.cgroup = cgroup,
            None => warn!(
                cgroup = %hierarchy.display(),
                "no kubepods cgroup (is the host's /sys/fs/cgroup mounted?); all of it is watched"
            ),
        },
        None => {}
    }
    node.bpffs.clone_from(&config.bpffs);
    node.kubelet_cgroup.clone_from(&config.kubelet_cgroup);
    if in_cluster && config.kubelet_cgroup.is_none() {
        // From the start, so that no probe is missed while a process takes over from another.
        match find_kubelet(&hierarchy, config.kubelet_port) {
            Ok(kubelet) => {
                node.kubelet_netns = Some(kubelet.netns);
                node.kubelet_cgroup = Some(kubelet.cgroup);
            }
            Err(e) => warn!("probes of pods may fail until the kubelet is found: {e}"),
        }
    }
    info!(cgroup = %node.cgroup.display(), kubelet = ?node.kubelet_cgroup, "capture attaches");
    for program in adit_ebpf::foreign_programs(&node.cgroup).unwrap_or_default() {
        warn!(
            program = program.name,
            cgroup = program.cgroup,
            owner = program.owner,
            "another program may rewrite service addresses before the mesh sees them: {}",
            program.remedy
        );
    }
    let redirector = Redirector::open(node).context("set up capture (`adit check` says more)")?;
    Ok(Arc::new(Mutex::new(redirector)))
}

fn xds_config(config: &Config, trust: Arc<TrustBundle>) -> anyhow::Result<ClientConfig> {
    let address = config
        .xds_address
        .parse()
        .context("XDS_ADDRESS is not a URL")?;
    let Ok(cluster) = HeaderValue::try_from(&config.cluster) else {
        bail!("CLUSTER_ID={:?} cannot stand in a header", config.cluster);
    };
    Ok(ClientConfig {
        transport: TransportConfig {
            address,
            trust: Some(trust),
            server_name: config.alt_xds_hostname.clone(),
            allow_plaintext: false,
        },
        token: Some(TokenSource::File(config.auth_token.clone())),
        headers: vec![(HeaderName::from_static("clusterid"), cluster)],
        node: NodeMetadata {
            node_type: NodeType::Ztunnel,
            pod_name: config.own_pod.name.clone(),
            namespace: config.own_pod.namespace.clone(),
            service_account: config.own_pod.service_account.clone(),
            instance_ip: config.own_pod.ip.map(|ip| ip.to_string()),
            node_name: config.node.clone(),
            cluster_id: config.cluster.clone(),
            network: config.network.clone(),
            extra: config.metadata.clone(),
        },
    })
}

async fn notify_when_ready(readiness: Readiness) {
    while !readiness.pending().is_empty() {
        tokio::time::sleep(READY_POLL).await;
    }
    process::notify_ready();
}

/// Lets go of what only starting needed, and later of what a burst has left and of what each
/// check of the capture has touched.
async fn tidy(checked: Arc<Notify>) {
    tokio::time::sleep(TIDY_FIRST).await;
    let mut memory = process::IdleMemory::default();
    let mut returned = Instant::now();
    process::return_free_memory();
    loop {
        // In the rhythm of the checks: they are what an idle proxy does, and touch a third of its
        // code.
        checked.notified().await;
        if memory.looked().elapsed() >= LOOK_INTERVAL {
            memory.look();
        }
        if returned.elapsed() >= TIDY_INTERVAL {
            process::return_free_memory();
            returned = Instant::now();
        }
    }
}

/// Drops what is known of workloads that are gone from time to time.
async fn sweep(metrics: Arc<Metrics>, shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        let snapshot = shared.model.load_full();
        shared
            .failing_waypoints
            .forget(|uid| snapshot.workload(uid).is_some());
        let names: std::collections::HashSet<_> = snapshot
            .workloads()
            .map(|w| (w.namespace.clone(), w.workload_name.clone()))
            .collect();
        metrics.sweep(SERIES_IDLE, &|labels| {
            [&labels.source, &labels.destination]
                .into_iter()
                .all(|side| {
                    side.workload.is_empty()
                        || names.contains(&(side.namespace.clone(), side.workload.clone()))
                })
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_an_essential_task_is_told() {
        let mut tasks = JoinSet::new();
        tasks.spawn(named("endless", std::future::pending::<()>()));
        tasks.spawn(named("enrolment", async {}));
        assert_eq!(
            first_end(&mut tasks).await,
            "enrolment: ended by itself".to_owned()
        );
        tasks.spawn(named("xDS client", async { panic!("on purpose") }));
        let told = first_end(&mut tasks).await;
        assert!(told.contains("on purpose"), "{told}");
    }

    /// What the socket does when the node leaves the mesh.
    #[tokio::test]
    async fn the_process_outlives_a_manager_that_is_stopped() {
        let mut tasks = JoinSet::new();
        let managing = tasks.spawn(named("enrolment", std::future::pending::<()>()));
        managing.abort();
        while !managing.is_finished() {
            tokio::task::yield_now().await;
        }
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn(named("xDS client", ended));
        let mut told = std::pin::pin!(first_end(&mut tasks));
        let now = std::future::poll_fn(|context| {
            std::task::Poll::Ready(told.as_mut().poll(context).is_ready())
        });
        assert!(!now.await, "taken for a failure");
        drop(end);
        assert_eq!(told.await, "xDS client: ended by itself");
    }
}
