//! What a test gets: the cluster, a namespace of its own, and words for what tests do.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::rc::Rc;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Event, Namespace, Pod};
use kube::api::{Api, DeleteParams, ListParams, LogParams};
use serde_json::json;
use tokio::time::{sleep, timeout};

use super::app::{App, Caller};
use super::cluster::Cluster;
use super::environment::Environment;
use crate::call::Call;
use crate::observe::AccessLine;

/// How long a condition may take to become true, unless a test says otherwise.
pub const SOON: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);
/// A namespace with all its pods is gone by then.
const NAMESPACE_GONE: Duration = Duration::from_secs(90);
/// The namespaces of tests have it.
pub(crate) const TEST_LABEL: &str = "adit.dev/e2e";
/// The label that makes a namespace part of the mesh.
const MODE: &str = "istio.io/dataplane-mode";

/// One test's view of the world. Clones are the same test.
#[derive(Clone)]
pub struct Test {
    environment: Rc<Environment>,
    namespace: String,
    /// Namespaces to remove at the end.
    made: Rc<Mutex<BTreeSet<String>>>,
}

impl Test {
    /// Makes the test's namespace.
    pub(crate) async fn new(environment: Rc<Environment>, name: &str) -> anyhow::Result<Self> {
        // A namespace's name is a DNS label.
        let name: String = name.replace('_', "-").chars().take(50).collect();
        let test = Self {
            environment,
            namespace: format!("e2e-{}", name.trim_end_matches('-')),
            made: Rc::default(),
        };
        test.make_namespace(&test.namespace).await?;
        Ok(test)
    }

    async fn make_namespace(&self, name: &str) -> anyhow::Result<()> {
        self.made().insert(name.to_owned());
        let api = Api::<Namespace>::all(self.cluster().client());
        // A run that was killed may have left one.
        if api.get_opt(name).await?.is_some() {
            remove_namespace(self.cluster(), name).await?;
        }
        let object = json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {TEST_LABEL: "true"}}});
        self.cluster().apply("", &object.to_string()).await?;
        // Pods cannot be made before this exists.
        eventually("ServiceAccount default", SOON, async || {
            let found = self.cluster().get(name, "v1", "ServiceAccount", "default");
            found.await?.context("not there").map(drop)
        })
        .await
    }

    fn made(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.made.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Removes the test's namespaces.
    pub(crate) async fn clean(&self) -> anyhow::Result<()> {
        let names = self.made().clone();
        for name in &names {
            remove_namespace(self.cluster(), name).await?;
        }
        Ok(())
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.environment.cluster
    }

    /// What the tests stand on.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The test's namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The same test in a further namespace, which is removed with it.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn beside(&self, suffix: &str) -> anyhow::Result<Self> {
        let namespace = format!("{}-{suffix}", self.namespace);
        self.make_namespace(&namespace).await?;
        Ok(Self {
            environment: self.environment.clone(),
            namespace,
            made: self.made.clone(),
        })
    }

    /// A node by number; numbers beyond the last begin again at the first.
    pub fn node(&self, number: usize) -> &str {
        let nodes = self.cluster().nodes();
        &nodes[number % nodes.len()]
    }

    /// Nodes that differ.
    ///
    /// # Errors
    /// [`super::Skip`]: the cluster has fewer.
    pub fn needs_nodes(&self, count: usize) -> anyhow::Result<()> {
        match self.cluster().nodes().len() {
            n if n < count => {
                Err(super::Skip(format!("needs {count} nodes, there are {n}")).into())
            }
            _ => Ok(()),
        }
    }

    /// Puts the namespace into the mesh, or takes it out.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn ambient(&self, on: bool) -> anyhow::Result<()> {
        let value = on.then_some("ambient");
        self.cluster()
            .label_namespace(&self.namespace, MODE, value)
            .await
    }

    /// Applies YAML in the namespace.
    ///
    /// # Errors
    /// It is not accepted.
    pub async fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        self.cluster().apply(&self.namespace, yaml).await
    }

    /// Makes pods, waits until they are ready.
    ///
    /// # Errors
    /// They do not become ready; the error says why.
    pub async fn run(&self, apps: &[App]) -> anyhow::Result<()> {
        let image = self.environment.app_image();
        for app in apps {
            self.apply(&app.yaml(&image, |node| self.node(node).to_owned()))
                .await?;
        }
        for app in apps {
            self.ready(&format!("app={}", app.name), app.replicas)
                .await?;
        }
        Ok(())
    }

    /// Waits until so many pods with a label are ready, and no others.
    ///
    /// # Errors
    /// They do not become ready.
    pub async fn ready(&self, selector: &str, count: usize) -> anyhow::Result<Vec<Pod>> {
        eventually(
            &format!("{count} pods {selector} ready"),
            SOON,
            async || {
                let pods = self.cluster().pods(&self.namespace, selector).await?;
                let waiting: Vec<_> = pods.iter().filter_map(unready).collect();
                anyhow::ensure!(waiting.is_empty(), "{}", waiting.join("; "));
                anyhow::ensure!(pods.len() == count, "{} pods", pods.len());
                Ok(pods)
            },
        )
        .await
    }

    /// A pod's address.
    ///
    /// # Errors
    /// There is no such pod, or it has none yet.
    pub async fn address(&self, pod: &str) -> anyhow::Result<std::net::IpAddr> {
        let found = self.cluster().api::<Pod>(&self.namespace).get(pod).await?;
        let address = found.status.and_then(|status| status.pod_ip);
        let address = address.with_context(|| format!("{pod} has no address"))?;
        Ok(address.parse()?)
    }

    /// Runs `adit-sample` in a pod: its JSON lines.
    ///
    /// # Errors
    /// It could not be run. That it failed is no error.
    pub async fn sample<T: serde::de::DeserializeOwned>(
        &self,
        pod: &str,
        arguments: &[&str],
    ) -> anyhow::Result<Vec<T>> {
        let command: Vec<_> = std::iter::once("adit-sample")
            .chain(arguments.iter().copied())
            .collect();
        let done = self.cluster().exec(&self.namespace, pod, &command).await?;
        let lines: Result<Vec<_>, _> = done.stdout.lines().map(serde_json::from_str).collect();
        let lines = lines.with_context(|| format!("{command:?} in {pod}: {done:?}"))?;
        if lines.is_empty() {
            bail!("{command:?} in {pod}: {}", done.stderr.trim());
        }
        Ok(lines)
    }

    /// HTTP calls out of a pod, each on its own connection.
    ///
    /// # Errors
    /// The client could not be run. A call without an answer is no error.
    pub async fn calls(&self, pod: &str, url: &str, count: usize) -> anyhow::Result<Vec<Call>> {
        let count = count.to_string();
        let arguments = ["call", url, "--count", &count, "--timeout", "3000"];
        self.sample(pod, &arguments).await
    }

    /// One HTTP call out of a pod.
    ///
    /// # Errors
    /// The client could not be run.
    pub async fn call(&self, pod: &str, url: &str) -> anyhow::Result<Call> {
        let calls = self.calls(pod, url, 1).await?;
        calls.into_iter().next().context("no call")
    }

    /// Waits until a call out of a pod is answered 200.
    ///
    /// # Errors
    /// It is not in time.
    pub async fn reaches(&self, pod: &str, url: &str) -> anyhow::Result<Call> {
        eventually(&format!("{pod} reaches {url}"), SOON, async || {
            let call = self.call(pod, url).await?;
            anyhow::ensure!(call.ok().is_some(), "{call:?}");
            Ok(call)
        })
        .await
    }

    /// Waits until a call out of a pod gets no answer, or one that refuses (403).
    ///
    /// # Errors
    /// It is still answered.
    pub async fn refused(&self, pod: &str, url: &str) -> anyhow::Result<Call> {
        eventually(&format!("{pod} is refused at {url}"), SOON, async || {
            let call = self.call(pod, url).await?;
            anyhow::ensure!(call.status.is_none_or(|s| s == 403), "{call:?}");
            Ok(call)
        })
        .await
    }

    /// A pod on a node that calls all the time.
    ///
    /// # Errors
    /// It does not start.
    pub async fn caller(
        &self,
        name: &str,
        node: usize,
        url: &str,
        interval: Duration,
    ) -> anyhow::Result<Caller> {
        let caller = self.caller_that_fails(name, node, url, interval).await?;
        let first = caller.more(3).await?;
        anyhow::ensure!(first[2].ok().is_some(), "{name}: {:?}", first[2]);
        Ok(caller)
    }

    /// The same where calls may be refused from the first.
    ///
    /// # Errors
    /// It does not start.
    pub async fn caller_that_fails(
        &self,
        name: &str,
        node: usize,
        url: &str,
        interval: Duration,
    ) -> anyhow::Result<Caller> {
        let app = App::caller(name, url, interval).on(node);
        self.run(&[app]).await?;
        Ok(Caller::new(self.clone(), name))
    }

    /// Waits for a line in the access log of a node's ztunnel that concerns this
    /// namespace (as source or destination) and that `wanted` says yes to.
    ///
    /// # Errors
    /// It does not come.
    pub async fn access_line(
        &self,
        node: &str,
        wanted: impl Fn(&AccessLine) -> bool,
    ) -> anyhow::Result<AccessLine> {
        eventually("access log line", SOON, async || {
            let lines = self.access_lines(node).await?;
            let last = lines.last().cloned();
            let found = lines.into_iter().rev().find(|line| wanted(line));
            found.with_context(|| format!("none fits; the last is {last:?}"))
        })
        .await
    }

    /// The lines of a node's access log that concern this namespace.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn access_lines(&self, node: &str) -> anyhow::Result<Vec<AccessLine>> {
        let ours = |line: &AccessLine| {
            line.get("src.namespace") == self.namespace
                || line.get("dst.namespace") == self.namespace
        };
        let lines = self.cluster().access_log(node).await?;
        Ok(lines.into_iter().filter(ours).collect())
    }

    /// Waits until a pod's new connections to another are mutual TLS: the ztunnel of the
    /// destination's node reports one of them with the source's identity.
    ///
    /// # Errors
    /// They are not.
    pub async fn is_mtls(&self, from: &str, to: &str, node: &str) -> anyhow::Result<AccessLine> {
        let url = format!("http://{}:8080/", host(self.address(to).await?));
        eventually(
            &format!("mutual TLS from {from} to {to}"),
            SOON,
            async || {
                let call = self.call(from, &url).await?;
                anyhow::ensure!(call.ok().is_some(), "{call:?}");
                let lines = self.access_lines(node).await?;
                let peer = call
                    .peer
                    .map(|peer| peer.ip().to_string())
                    .unwrap_or_default();
                lines
                    .into_iter()
                    .rev()
                    .find(|line| {
                        line.get("direction") == "inbound"
                            && line.get("dst.workload") == to
                            && line.get("src.addr").contains(&peer)
                            && line.get("src.identity").starts_with("spiffe://")
                    })
                    .context("no inbound connection with an identity")
            },
        )
        .await
    }

    /// Waits until a pod's new connections to another are plaintext: no ztunnel reports
    /// any of them.
    ///
    /// # Errors
    /// They are still carried by the mesh.
    pub async fn is_plaintext(&self, from: &str, to: &str) -> anyhow::Result<()> {
        let url = format!("http://{}:8080/", host(self.address(to).await?));
        eventually(
            &format!("plaintext from {from} to {to}"),
            SOON,
            async || {
                let calls = self.calls(from, &url, 3).await?;
                let peers: Vec<_> = calls.iter().filter_map(|call| call.peer).collect();
                anyhow::ensure!(peers.len() == 3, "{calls:?}");
                // A line is written when its connection ends, which these have; a moment for
                // the log's way through the kubelet.
                sleep(Duration::from_millis(300)).await;
                for node in self.cluster().nodes() {
                    let lines = self.access_lines(node).await?;
                    let carried = lines.iter().find(|line| {
                        peers
                            .iter()
                            .any(|peer| line.get("src.addr") == peer.to_string())
                    });
                    anyhow::ensure!(carried.is_none(), "carried: {carried:?}");
                }
                Ok(())
            },
        )
        .await
    }

    /// When the first call after a moment, of a pod that calls all the time, was answered, by
    /// the clock of its node.
    ///
    /// # Errors
    /// None has been.
    pub async fn first_answer(&self, pod: &str, after: SystemTime) -> anyhow::Result<SystemTime> {
        let api = self.cluster().api::<Pod>(&self.namespace);
        let parameters = LogParams {
            timestamps: true,
            ..LogParams::default()
        };
        let log = api.logs(pod, &parameters).await?;
        for line in log.lines().filter(|line| line.contains("\"status\":200")) {
            let time = line.split(' ').next().unwrap_or_default();
            let time = humantime::parse_rfc3339(time);
            let time = time.with_context(|| format!("time of {line:?}"))?;
            if time > after {
                return Ok(time);
            }
        }
        bail!("no call was answered yet")
    }

    /// UIDs and restarts of the namespace's pods: what must not change when the
    /// namespace joins or leaves the mesh.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn incarnations(&self) -> anyhow::Result<Vec<String>> {
        let pods = self.cluster().pods(&self.namespace, "").await?;
        Ok(pods.iter().map(incarnation).collect())
    }

    /// `adit` as a user of this namespace runs it; its standard output.
    ///
    /// # Errors
    /// It fails.
    pub async fn adit(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = self.environment.adit(arguments)?;
        command.kill_on_drop(true);
        let line = arguments.join(" ");
        let output = timeout(Duration::from_secs(180), command.output())
            .await
            .with_context(|| format!("adit {line}: no end"))??;
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        anyhow::ensure!(output.status.success(), "adit {line}: {out}{err}");
        Ok(out.into_owned())
    }

    /// Gives the namespace a waypoint, and waits until it serves.
    ///
    /// # Errors
    /// It does not come.
    pub async fn waypoint(&self) -> anyhow::Result<()> {
        let namespace = self.namespace();
        self.adit(&[
            "waypoint",
            "apply",
            "-n",
            namespace,
            "--enroll-namespace",
            "--wait",
        ])
        .await
        .map(drop)
    }

    /// What a reader of a failure wants to know: pods that are not ready, warnings.
    pub(crate) async fn explain(&self) -> String {
        let mut text = String::new();
        let names = self.made().clone();
        for name in names {
            for pod in self.cluster().pods(&name, "").await.unwrap_or_default() {
                if let Some(why) = unready(&pod) {
                    let _ = writeln!(text, "{name}: {why}");
                }
            }
            let events = Api::<Event>::namespaced(self.cluster().client(), &name);
            let warnings = ListParams::default().fields("type=Warning").limit(20);
            for event in events.list(&warnings).await.into_iter().flatten() {
                let object = event.involved_object.name.unwrap_or_default();
                let message = event.message.unwrap_or_default();
                let _ = writeln!(text, "{name}: event of {object}: {message}");
            }
        }
        text
    }
}

/// A host as a URL has it.
pub fn host(address: std::net::IpAddr) -> String {
    match address {
        std::net::IpAddr::V4(v4) => v4.to_string(),
        std::net::IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

/// Repeats a check until it succeeds.
///
/// # Errors
/// What the check said last, when the time is up.
pub async fn eventually<T>(
    what: &str,
    limit: Duration,
    check: impl AsyncFn() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let error = match timeout(left.max(POLL), check()).await {
            Ok(Ok(value)) => return Ok(value),
            // That a test cannot run here does not change.
            Ok(Err(error)) if error.is::<super::Skip>() => return Err(error),
            Ok(Err(error)) => error,
            Err(_) => anyhow::anyhow!("a check had no answer in time"),
        };
        if Instant::now() >= end {
            return Err(error.context(format!("{what}: not within {limit:?}")));
        }
        sleep(POLL).await;
    }
}

pub(crate) fn incarnation(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let restarts: Vec<_> = status
        .container_statuses
        .unwrap_or_default()
        .into_iter()
        .map(|c| (c.name, c.restart_count, c.container_id))
        .collect();
    format!(
        "{} {} {restarts:?}",
        pod.metadata.name.as_deref().unwrap_or_default(),
        pod.metadata.uid.as_deref().unwrap_or_default()
    )
}

/// Why a pod is not ready; `None` when it is.
fn unready(pod: &Pod) -> Option<String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    if pod.metadata.deletion_timestamp.is_some() {
        return Some(format!("{name} is being deleted"));
    }
    let status = pod.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    if conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True")
    {
        return None;
    }
    let states = status.container_statuses.unwrap_or_default();
    let why = states.into_iter().find_map(|container| {
        let state = container.state?;
        let waiting = state.waiting.map(|w| (w.reason, w.message));
        let (reason, message) = waiting.or(state.terminated.map(|t| (t.reason, t.message)))?;
        Some(format!(
            "{}: {}",
            reason.unwrap_or_default(),
            message.unwrap_or_default()
        ))
    });
    let phase = status
        .phase
        .unwrap_or_else(|| "not seen by its node".into());
    Some(format!(
        "{name} is {phase}, not ready {}",
        why.unwrap_or_default()
    ))
}

/// Deletes a namespace and waits until it is gone.
pub(crate) async fn remove_namespace(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let api = Api::<Namespace>::all(cluster.client());
    match api.delete(name, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        // It is being deleted already.
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        done => drop(done.with_context(|| format!("delete namespace {name}"))?),
    }
    eventually(
        &format!("namespace {name} gone"),
        NAMESPACE_GONE,
        async || match api.get_opt(name).await? {
            None => Ok(()),
            Some(found) => {
                let conditions = found.status.and_then(|status| status.conditions);
                let reasons: Vec<_> = conditions
                    .into_iter()
                    .flatten()
                    .filter(|c| c.status == "True")
                    .filter_map(|c| c.message)
                    .collect();
                bail!("{}", reasons.join("; "))
            }
        },
    )
    .await
}
