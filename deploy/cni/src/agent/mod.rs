//! The node agent: keeps the plugin installed, and answers it.
//!
//! It watches the Namespaces and its own node's Pods. For a sandbox it decides by the same
//! function as the control plane, and if the pod belongs to the mesh it hands the sandbox's
//! network namespace to ztunnel before it answers. Pods that already run are none of its
//! business: those the control plane tells ztunnel of.

mod cluster;
mod decide;
mod metrics;
mod server;
mod ztunnel;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use adit_shared::model::enrolment::AGENT_REMOVED;
use adit_shared::net::handoff::HandoffListener;
use adit_shared::net::socket::any_address;
use adit_shared::telemetry::http as status_http;
use anyhow::Context as _;
use http::StatusCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::install::{self, Installer};
use crate::plugin::{self, NetConf};
use crate::protocol::{AGENT_SOCKET, ZTUNNEL_SOCKET};
use cluster::{Cluster, Presence};
use metrics::Metrics;
use server::Server;
use ztunnel::Ztunnel;

/// When the mesh is being removed, ztunnel's DaemonSet may go a little later than ours.
const LEAVE_WAIT: Duration = Duration::from_secs(15);
const LEAVE_LOOK: Duration = Duration::from_millis(500);

/// Settings of the agent.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The node's name.
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// The agent's own namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = "istio-system")]
    pub namespace: String,
    /// Where the mesh's own programs run; its pods start also when the mesh is down. Default:
    /// the agent's namespace.
    #[arg(long, env = "ROOT_NAMESPACE")]
    pub root_namespace: Option<String>,
    /// Namespaces whose pods never join.
    #[arg(
        long,
        env = "EXCLUDE_NAMESPACES",
        value_delimiter = ',',
        default_value = "kube-system"
    )]
    pub exclude_namespaces: Vec<String>,
    /// The agent's DaemonSet.
    #[arg(long, env = "ADIT_DAEMONSET", default_value = "istio-cni-node")]
    pub daemon_set: String,
    /// ztunnel's DaemonSet, in the same namespace.
    #[arg(long, env = "ADIT_ZTUNNEL_DAEMONSET", default_value = "ztunnel")]
    pub ztunnel_daemon_set: String,
    /// The runtime's directory of plugins, as mounted here.
    #[arg(long, env = "ADIT_CNI_BIN_DIR", default_value = "/host/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// The runtime's directory of configurations, as mounted here.
    #[arg(long, env = "ADIT_CNI_CONF_DIR", default_value = "/host/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// The configuration that the plugin joins; default: the one that the runtime uses.
    #[arg(long, env = "ADIT_CNI_CONF_NAME")]
    pub conf_name: Option<String>,
    /// Where the plugin finds the agent; the same path on the host and here.
    #[arg(long, env = "ADIT_CNI_SOCKET", default_value = AGENT_SOCKET)]
    pub socket: PathBuf,
    /// Where the agent finds ztunnel.
    #[arg(long, env = "ADIT_ZTUNNEL_SOCKET", default_value = ZTUNNEL_SOCKET)]
    pub ztunnel_socket: PathBuf,
    /// Where the plugin writes down its calls, on the host; empty: nowhere.
    #[arg(long, env = "ADIT_CNI_LOG", default_value = "/var/run/adit/cni.log")]
    pub plugin_log: String,
    /// `json`, or text.
    #[arg(long, env = "LOG_FORMAT", default_value = "plain")]
    pub log_format: String,
    /// `/healthz`, `/readyz` and `/metrics`.
    #[arg(long, env = "ADIT_CNI_STATUS_ADDRESS", default_value_t = any_address(8000))]
    pub status_address: SocketAddr,
}

/// Runs the agent until a signal.
///
/// # Errors
/// What keeps it from starting.
pub fn main(options: Options) -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "info,kube_client=warn".into());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false);
    match options.log_format.as_str() {
        "json" => log.json().init(),
        _ => log.init(),
    }
    // Watches, small requests, and files on the threads for blocking work.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(run(options))
}

async fn run(options: Options) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let root_namespace = options
        .root_namespace
        .clone()
        .unwrap_or_else(|| options.namespace.clone());

    let cluster = Cluster::start(&options.node).await?;
    let daemon_sets = [
        options.ztunnel_daemon_set.clone(),
        options.daemon_set.clone(),
    ];
    tokio::spawn(
        cluster
            .clone()
            .learn(options.namespace.clone(), daemon_sets.clone()),
    );
    let ztunnel = Ztunnel::new(&options.ztunnel_socket);
    let metrics = Arc::new(Metrics::default());
    let server = Arc::new(Server {
        metrics: metrics.clone(),
        cluster: cluster.clone(),
        ztunnel: ztunnel.clone(),
        root_namespace: root_namespace.clone(),
        exclude_namespaces: options.exclude_namespaces.clone(),
        namespace: options.namespace.clone(),
        daemon_sets,
    });
    // Of an agent before this one.
    let _ = std::fs::remove_file(options.socket.with_file_name(AGENT_REMOVED));
    // The plugin is installed only when it will be answered.
    let listener = bind(&options.socket)?;
    tokio::spawn(listener.serve_at(move |call| {
        let server = server.clone();
        async move { server.answer(call).await }
    }));

    let installed = Arc::new(AtomicBool::new(false));
    let installer = Installer {
        bin_dir: options.bin_dir.clone(),
        conf_dir: options.conf_dir.clone(),
        binary: std::env::current_exe().context("find our own binary")?,
        entry: plugin::entry(&NetConf::new(
            options.socket.display().to_string(),
            options.exclude_namespaces.clone(),
            vec![root_namespace],
            options.plugin_log.clone(),
        )),
        conf_name: options.conf_name.clone(),
        in_place: install::InPlace::default(),
    };
    let wanted = install::Wanted::default();
    let keeping = tokio::spawn(install::keep(installer, installed.clone(), wanted.clone()));

    let status = status_http::listen(options.status_address)
        .await
        .with_context(|| format!("listen on {}", options.status_address))?;
    let watched = cluster.clone();
    tokio::spawn(status_http::serve(status, move |request| {
        let pending = [
            ("plugin not installed", installed.load(Ordering::Relaxed)),
            ("Kubernetes API not read yet", watched.is_synced()),
        ];
        let answer = match request.uri().path() {
            "/healthz" => status_http::text(StatusCode::OK, "ok\n"),
            "/readyz" => readiness(&pending),
            "/metrics" => status_http::text(StatusCode::OK, metrics.text(&pending)),
            _ => status_http::not_found(),
        };
        std::future::ready(answer)
    }));
    info!(node = options.node, "node agent started");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // A second signal does not wait.
    tokio::select! {
        () = end(&options, &cluster, &ztunnel, (keeping, wanted)) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn readiness(conditions: &[(&str, bool)]) -> status_http::HttpResponse {
    let pending: Vec<&str> = conditions
        .iter()
        .filter(|(_, done)| !done)
        .map(|(what, _)| *what)
        .collect();
    if pending.is_empty() {
        return status_http::text(StatusCode::OK, "ready\n");
    }
    let text = format!("not ready: {}\n", pending.join(", "));
    status_http::text(StatusCode::SERVICE_UNAVAILABLE, text)
}

fn bind(path: &Path) -> anyhow::Result<HandoffListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("make {}", directory.display()))?;
    }
    HandoffListener::bind(path).with_context(|| format!("listen at {}", path.display()))
}

/// What a signal means: a new agent follows and everything stays, so that pods meanwhile
/// wait instead of starting outside the mesh; or the mesh leaves the node.
async fn end(
    options: &Options,
    cluster: &Cluster,
    ztunnel: &Ztunnel,
    (keeping, wanted): (tokio::task::JoinHandle<()>, install::Wanted),
) {
    match cluster
        .daemon_set(&options.namespace, &options.daemon_set)
        .await
    {
        Presence::Leaving => {}
        Presence::Stays => {
            info!("the DaemonSet is still there: the plugin stays installed");
            return;
        }
        Presence::Forbidden(error) | Presence::Unknown(error) => {
            warn!("the plugin stays installed, for nobody says that the mesh is removed: {error}");
            return;
        }
    }
    info!("the DaemonSet is being removed: so is the plugin");
    keeping.abort();
    let (bin_dir, conf_dir) = (options.bin_dir.clone(), options.conf_dir.clone());
    let removed = tokio::task::spawn_blocking(move || wanted.uninstall(&bin_dir, &conf_dir));
    match removed.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!("the plugin is not removed: {error}"),
        Err(error) => warn!("the plugin is not removed: {error}"),
    }
    for log in [
        options.plugin_log.clone(),
        format!("{}.1", options.plugin_log),
    ] {
        let _ = std::fs::remove_file(log);
    }
    // Capture goes only when ztunnel goes as well, which may be long after us.
    let mark = options.socket.with_file_name(AGENT_REMOVED);
    if let Err(error) = std::fs::write(&mark, "") {
        warn!("ztunnel will not know that the agent was removed: {error}");
    }
    let until = Instant::now() + LEAVE_WAIT;
    while Instant::now() < until {
        let found = cluster
            .daemon_set(&options.namespace, &options.ztunnel_daemon_set)
            .await;
        if found != Presence::Leaving {
            sleep(LEAVE_LOOK).await;
            continue;
        }
        if ztunnel.is_there().await
            && let Err(error) = ztunnel.leave().await
        {
            // With the mark it tries once more when it ends.
            warn!("the node's capture is not removed: {error}");
            return;
        }
        info!("the node's capture is removed");
        let _ = std::fs::remove_file(mark);
        return;
    }
}
