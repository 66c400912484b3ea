//! Puts the waypoint together, in the order in which its parts need each other, and takes it
//! apart again.

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::identity::{
    CaClient, CaClientOptions, CacheOptions, CertificateCache, ControlPlaneEndpoint, TokenSource,
    TrustBundle,
};
use adit_shared::model::pod_uid;
use adit_shared::net::drain::{self, DrainMode};
use adit_shared::process;
use adit_shared::proto::{ADDRESS_TYPE, waypoint};
use adit_shared::telemetry::{
    LogWriter, Metrics, Readiness, Telemetry, WorkloadLabels, http as status_http,
};
use adit_shared::xds::client::handlers::XdsEvents;
use adit_shared::xds::client::{
    Client, ClientConfig, Handler, NodeMetadata, NodeType, Subscription, TransportConfig,
};
use anyhow::{Context, bail};
use http::{HeaderName, HeaderValue};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::admin::{Admin, Received};
use crate::config::Config;
use crate::route::SessionKey;
use crate::state::{Addresses, Gateway, Resources, State};
use crate::telemetry::{MAX_SERIES, RequestCollector, RequestMetrics, RequestTableHealth};
use crate::worker::{Shared, WorkerHandle};

/// How often readiness is looked at until it is there for the first time.
const READY_POLL: Duration = Duration::from_millis(20);
/// Series of workloads that have been gone for so long are dropped.
const SERIES_IDLE: Duration = Duration::from_secs(600);
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// How often code that was needed once is forgotten.
const TIDY_INTERVAL: Duration = Duration::from_secs(5);
/// Pause between tries to get the first certificate.
const CERTIFICATE_RETRY: Duration = Duration::from_millis(500);
/// After the drain the last log lines get so long to be written.
const FLUSH_DEADLINE: Duration = Duration::from_secs(1);

/// Runs the waypoint until a signal or `/quitquitquit`.
///
/// # Errors
/// What keeps it from starting; nothing that happens later.
pub async fn run(config: Config, log: LogWriter) -> anyhow::Result<()> {
    let requests = Arc::new(RequestMetrics::new(MAX_SERIES));
    let mut metrics = Metrics::new("waypoint", env!("CARGO_PKG_VERSION"));
    metrics.register("istio", Box::new(RequestCollector(requests.clone())));
    metrics.register("adit", Box::new(RequestTableHealth(requests.clone())));
    let metrics = Arc::new(metrics);
    metrics.watch_log(log.clone());
    let telemetry = Telemetry::new(metrics.clone(), Some(log.clone()), Vec::new());
    let readiness = Readiness::new();
    let mut synced = readiness.task("xds");
    let mut certified = readiness.task("certificate");

    // The status ports first: whoever waits for readiness gets an answer from the start.
    let stats = listen(config.stats_address, "STATS_ADDRESS").await?;
    let ready = listen(config.readiness_address, "READINESS_ADDRESS").await?;
    let admin = listen(config.admin_address, "ADMIN_ADDRESS").await?;
    tokio::spawn(status_http::serve_metrics(stats, metrics.clone()));
    tokio::spawn(status_http::serve_readiness(ready, readiness.clone()));

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
            token,
            cluster_id: config.cluster.clone(),
            impersonate: false,
            headers: Vec::new(),
        },
    );
    let options = CacheOptions {
        ttl: config.certificate_ttl,
        ..CacheOptions::default()
    };
    let certificates = CertificateCache::new(Arc::new(authority), options);
    metrics.watch_certificates(certificates.clone());

    let state = Arc::new(State::new(
        Gateway::new(
            &config.gateway,
            &config.namespace,
            &config.cluster_domain,
            &config.network,
            config.trust_domain.clone(),
            &pod_uid(&config.cluster, &config.namespace, &config.pod),
        ),
        tokio::runtime::Handle::current(),
    ));
    let received = Arc::new(Received::default());
    let (drain_trigger, drain_watcher) = drain::channel();
    let shared = Arc::new(Shared {
        state: state.clone(),
        certificates: certificates.clone(),
        telemetry: telemetry.clone(),
        requests: requests.clone(),
        log: Some(log.clone()),
        spans: Arc::default(),
        // In place of the control plane's, should it give none: tokens of other replicas mean
        // nothing then.
        session_key: SessionKey::new(&rand::random()).context("session key")?,
        drain: drain_watcher,
        config,
    });
    let config = &shared.config;

    // Whatever of these ends, ends the process: a new process does better than half of one.
    let mut essential = JoinSet::new();
    let trust = Arc::new(TrustBundle::from_file(&config.xds_root_ca));
    let (client, subscriber) = Client::new(
        xds_config(config, trust)?,
        subscriptions(&state, &received),
        Arc::new(XdsEvents(telemetry.clone())),
    )
    .context("XDS_ADDRESS")?;
    essential.spawn(named("xDS client", client.run(std::future::pending())));
    let mut status = subscriber.status();
    let complete = state.clone();
    tokio::spawn(async move {
        // The client lives as long as the process.
        if status.wait_for(|status| status.ready).await.is_ok() {
            complete.completed();
            synced.done();
        }
        std::future::pending::<()>().await;
        drop(subscriber);
    });
    let identity = config.identity.clone();
    tokio::spawn(async move {
        while let Err(error) = certificates.get(&identity).await {
            warn!(%identity, "no certificate yet: {error}");
            tokio::time::sleep(CERTIFICATE_RETRY).await;
        }
        certified.done();
    });
    // The listener opens last: what is connected to is answered.
    let (workers, _) = WorkerHandle::start_all(&shared)
        .with_context(|| format!("listen on {}", config.hbone_address))?;
    let workers: Arc<[WorkerHandle]> = workers.into();
    tokio::spawn(async move {
        notify_when_ready(readiness).await;
        tidy().await;
    });
    tokio::spawn(sweep(requests, metrics, state));

    let quit = Arc::new(Notify::new());
    let page = Arc::new(Admin {
        shared: shared.clone(),
        received,
        workers: workers.clone(),
        quit: quit.clone(),
    });
    tokio::spawn(status_http::serve(admin, move |request| {
        page.clone().handle(request)
    }));
    info!(
        gateway = %config.gateway, namespace = %config.namespace, workers = config.workers,
        "waypoint started"
    );

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
        error!("{what}; the waypoint ends");
    }
    let deadline = config.termination_deadline;
    info!(?deadline, "draining");
    let until = tokio::time::Instant::now() + deadline;
    drain_trigger.signal(DrainMode::Graceful { deadline: until });
    // A second signal does not wait.
    tokio::select! {
        () = WorkerHandle::all_stopped(&workers) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    log.flush(FLUSH_DEADLINE);
    match failed {
        None => Ok(()),
        Some(what) => bail!(what),
    }
}

/// Everything that a waypoint asks for: what is referred to before what refers to it.
fn subscriptions(
    state: &Arc<State>,
    received: &Arc<Received>,
) -> Vec<(&'static str, Subscription, Arc<dyn Handler>)> {
    let addresses: Arc<dyn Handler> = Arc::new(Addresses(state.clone()));
    let mut all = vec![(ADDRESS_TYPE, Subscription::Wildcard, addresses)];
    for type_url in waypoint::TYPES {
        let handler: Arc<dyn Handler> = Arc::new(Resources {
            state: state.clone(),
            type_url,
        });
        // What is kept is shown.
        let handler = match type_url {
            waypoint::SECRET_TYPE => handler,
            type_url => received.keep(type_url, handler),
        };
        all.push((type_url, Subscription::Wildcard, handler));
    }
    all
}

async fn named<T>(name: &'static str, task: impl Future<Output = T>) -> &'static str {
    task.await;
    name
}

/// Waits for the first of the tasks to end and tells which and how.
async fn first_end(tasks: &mut JoinSet<&'static str>) -> String {
    match tasks.join_next().await {
        Some(Ok(name)) => format!("{name}: ended by itself"),
        Some(Err(panicked)) => format!("an essential task failed: {panicked}"),
        None => std::future::pending().await,
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

fn xds_config(config: &Config, trust: Arc<TrustBundle>) -> anyhow::Result<ClientConfig> {
    let address = config
        .xds_address
        .parse()
        .context("XDS_ADDRESS is not a URL")?;
    let Ok(cluster) = HeaderValue::try_from(&config.cluster) else {
        bail!("CLUSTER_ID={:?} cannot stand in a header", config.cluster);
    };
    let mut extra = config.metadata.clone();
    // How the control plane knows which waypoint asks.
    extra.insert("GATEWAY_NAME".into(), config.gateway.as_str().into());
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
            node_type: NodeType::Waypoint,
            pod_name: config.pod.clone(),
            namespace: config.namespace.clone(),
            service_account: config.service_account.clone(),
            instance_ip: config.ip.map(|ip| ip.to_string()),
            node_name: config.node.clone(),
            cluster_id: config.cluster.clone(),
            network: config.network.clone(),
            extra,
        },
    })
}

/// Lets go of the code that only starting needed, and later of what only the setting up of
/// connections or a burst needed: some hundred faults an interval, under load as well.
async fn tidy() {
    loop {
        process::forget_code();
        tokio::time::sleep(TIDY_INTERVAL).await;
    }
}

/// Drops the series of workloads that are gone, from time to time.
async fn sweep(requests: Arc<RequestMetrics>, metrics: Arc<Metrics>, state: Arc<State>) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        let view = state.load_full();
        let workloads = view.model().workloads();
        let names: HashSet<_> = workloads
            .map(|w| (w.namespace.clone(), w.workload_name.clone()))
            .collect();
        let keep = |side: &WorkloadLabels| {
            side.workload.is_empty()
                || names.contains(&(side.namespace.clone(), side.workload.clone()))
        };
        requests.sweep(SERIES_IDLE, &keep);
        metrics.sweep(SERIES_IDLE, &|labels| {
            keep(&labels.source) && keep(&labels.destination)
        });
    }
}

async fn notify_when_ready(readiness: Readiness) {
    while !readiness.pending().is_empty() {
        tokio::time::sleep(READY_POLL).await;
    }
    process::notify_ready();
}
