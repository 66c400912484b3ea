//! The life of one pod: its containers started, started again, probed, and at last
//! ended and cleared away.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::{Container, Pod};
use nix::sys::signal::Signal;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::event::{Event, Update};
use super::probe::{self, KubeletHandle};
use crate::address::Pair;
use crate::manifest::{self, Launch, PodFacts};
use crate::state::ProcessId;
use crate::system::layout::Layout;
use crate::system::process::{self, find_program};
use crate::system::sandbox::Sandbox;
use crate::system::{cgroup, links};

/// Kubernetes waits 10 s to 5 min; on a laptop somebody is watching.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(20));
/// A program that ran this long is given a fresh start.
const STABLE: Duration = Duration::from_secs(10);
/// The mesh goes on without a pod that does not end; this bounds its grace.
const MAX_GRACE: Duration = Duration::from_secs(30);
/// How long killed processes may take to go.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A pod that runs.
pub(super) struct PodRun {
    pub(super) object: Pod,
    pub(super) uid: String,
    pub(super) node: String,
    pub(super) addresses: Pair,
    pub(super) facts: PodFacts,
    pub(super) sandbox: Sandbox,
    pub(super) layout: Layout,
    pub(super) dirs: Vec<PathBuf>,
    pub(super) kubelet: KubeletHandle,
    /// Its program is a component's: nothing is started here.
    pub(super) held: bool,
    pub(super) default_grace: Duration,
    pub(super) events: mpsc::Sender<Event>,
}

/// What a pod is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Go on.
    No,
    /// End, and clear everything away.
    End,
    /// The whole mesh goes: its processes are killed already, only wait for them.
    Abandon,
}

/// How a container's life ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Success,
    Failure,
    /// The pod was told to stop.
    Stopped,
}

impl PodRun {
    /// Lives until it is told to end and everything of the pod is gone.
    pub(super) async fn run(self: Rc<Self>, stop: watch::Receiver<Stop>) {
        self.containers(&stop).await;
        let mut stop = stop;
        if stopped(&mut stop).await == Stop::Abandon {
            return;
        }
        self.clear_away().await;
        let uid = self.uid.clone();
        self.tell(Event::Gone { uid }).await;
    }

    async fn containers(&self, stop: &watch::Receiver<Stop>) {
        if self.held {
            return self.phase("Running").await;
        }
        let spec = self.object.spec.clone().unwrap_or_default();
        let policy = spec.restart_policy.as_deref().unwrap_or("Always");
        let mut sidecars = Vec::new();
        for container in spec.init_containers.iter().flatten() {
            // A sidecar in Kubernetes' sense; here it starts with the others.
            if container.restart_policy.as_deref() == Some("Always") {
                sidecars.push(self.container(None, container.clone(), "Always", stop.clone()));
                continue;
            }
            let policy = if policy == "Never" {
                "Never"
            } else {
                "OnFailure"
            };
            let end = self.container(None, container.clone(), policy, stop.clone());
            match end.await {
                End::Success => {}
                End::Failure => return self.phase("Failed").await,
                End::Stopped => return,
            }
        }
        self.phase("Running").await;
        let all = spec
            .containers
            .iter()
            .enumerate()
            .map(|(index, container)| {
                self.container(Some(index), container.clone(), policy, stop.clone())
            });
        let ends = join_all(all.chain(sidecars)).await;
        if ends.contains(&End::Stopped) {
            return;
        }
        let failed = ends.contains(&End::Failure);
        self.phase(if failed { "Failed" } else { "Succeeded" })
            .await;
    }

    /// Runs a container by its restart policy. `index` is its place in the status; init
    /// containers have none.
    async fn container(
        &self,
        index: Option<usize>,
        container: Container,
        policy: &str,
        mut stop: watch::Receiver<Stop>,
    ) -> End {
        let planned = manifest::launch(&self.object, &container, &self.facts)
            .and_then(|launch| Ok((launch, manifest::probe(&container)?)));
        let (launch, plan) = match planned {
            Ok((Some(launch), plan)) => (launch, plan),
            Ok((None, _)) => {
                self.started(index, None, false).await;
                self.update(index, Update::Ready(true)).await;
                stopped(&mut stop).await;
                return End::Stopped;
            }
            Err(problem) => {
                self.update(index, Update::Ended(problem)).await;
                stopped(&mut stop).await;
                return End::Stopped;
            }
        };
        let mut backoff = BACKOFF.0;
        let mut again = false;
        loop {
            let begin = Instant::now();
            let ended = match self.spawn(&container.name, &launch) {
                Err(problem) => Err(problem),
                Ok(mut child) => {
                    let process = child.id().and_then(process::identify);
                    self.started(index, process, again).await;
                    let ready = async {
                        match &plan {
                            Some(plan) => {
                                let tell =
                                    async |ready, message| self.ready(index, ready, message).await;
                                probe::follow(self, plan, tell).await;
                            }
                            None => {
                                self.update(index, Update::Ready(true)).await;
                                std::future::pending::<()>().await;
                            }
                        }
                    };
                    tokio::select! {
                        status = child.wait() => status.map_err(|error| error.to_string()),
                        () = ready => Err("its probe ended".into()),
                        stop = stopped(&mut stop) => {
                            self.terminate(&mut child, stop).await;
                            return End::Stopped;
                        }
                    }
                }
            };
            again = true;
            let success = matches!(&ended, Ok(status) if status.success());
            let message = describe(ended);
            tracing::info!(
                pod = self.name(),
                container = container.name,
                message,
                "ended"
            );
            self.update(index, Update::Ended(message)).await;
            match policy {
                "Never" if success => return End::Success,
                "Never" => return End::Failure,
                "OnFailure" if success => return End::Success,
                _ => {}
            }
            if begin.elapsed() >= STABLE {
                backoff = BACKOFF.0;
            }
            tokio::select! {
                () = sleep(backoff) => backoff = (backoff * 2).min(BACKOFF.1),
                _ = stopped(&mut stop) => return End::Stopped,
            }
        }
    }

    fn spawn(&self, container: &str, launch: &Launch) -> Result<Child, String> {
        let mut command = self.command(launch)?;
        let (namespace, name) = self.key();
        let path = self.layout.container_log(namespace, name, container);
        let log = open_log(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let errors = log.try_clone().map_err(|error| error.to_string())?;
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        let program = &launch.argv[0];
        command
            .spawn()
            .map_err(|error| format!("cannot run {program}: {error}"))
    }

    /// A command inside the pod.
    pub(super) fn command(&self, launch: &Launch) -> Result<Command, String> {
        let (program, args) = launch.argv.split_first().ok_or("the command is empty")?;
        let path = find_program(program, &self.dirs)
            .ok_or_else(|| format!("there is no program {program}"))?;
        let mut command = self.sandbox.command(&path);
        command.args(args).env_clear().envs(&launch.env);
        command.current_dir(launch.directory.as_deref().unwrap_or("/"));
        Ok(Command::from(command))
    }

    async fn terminate(&self, child: &mut Child, stop: Stop) {
        if stop == Stop::End
            && let Some(process) = child.id().and_then(process::identify)
        {
            process::signal(process, Signal::SIGTERM);
        }
        let spec = self.object.spec.as_ref();
        let asked = spec.and_then(|s| s.termination_grace_period_seconds);
        let asked = asked
            .and_then(|s| u64::try_from(s).ok())
            .map(Duration::from_secs);
        let grace = asked.unwrap_or(self.default_grace).min(MAX_GRACE);
        // What is left is killed with the cgroup.
        let _ = timeout(grace, child.wait()).await;
    }

    async fn clear_away(&self) {
        let (layout, node, uid) = (self.layout.clone(), self.node.clone(), self.uid.clone());
        let addresses = self.addresses;
        let cleared = tokio::task::spawn_blocking(move || {
            let killed = cgroup::kill_and_remove(&layout.pod_cgroup(&node, &uid), KILL_DEADLINE);
            links::remove_pod(&layout, &node, &uid, addresses).and(killed)
        });
        match cleared.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(pod = self.name(), %error, "not cleared away"),
            Err(error) => tracing::warn!(pod = self.name(), %error, "not cleared away"),
        }
    }

    async fn started(&self, index: Option<usize>, process: Option<ProcessId>, again: bool) {
        self.update(index, Update::Started { process, again }).await;
    }

    async fn ready(&self, index: Option<usize>, ready: bool, message: String) {
        if !ready {
            tracing::info!(pod = self.name(), message, "not ready");
        }
        self.update(index, Update::Ready(ready)).await;
    }

    async fn update(&self, index: Option<usize>, update: Update) {
        if let Some(index) = index {
            let uid = self.uid.clone();
            self.tell(Event::Container { uid, index, update }).await;
        }
    }

    async fn phase(&self, phase: &'static str) {
        let uid = self.uid.clone();
        self.tell(Event::Phase { uid, phase }).await;
    }

    async fn tell(&self, event: Event) {
        // The loop has ended: nobody wants to know.
        let _ = self.events.send(event).await;
    }

    fn key(&self) -> (&str, &str) {
        let metadata = &self.object.metadata;
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        (namespace, metadata.name.as_deref().unwrap_or_default())
    }

    fn name(&self) -> String {
        let (namespace, name) = self.key();
        format!("{namespace}/{name}")
    }
}

/// Waits until the pod is told to end. A sender that is gone means that the mesh is.
async fn stopped(stop: &mut watch::Receiver<Stop>) -> Stop {
    let told = stop.wait_for(|stop| *stop != Stop::No).await;
    told.map_or(Stop::Abandon, |stop| *stop)
}

/// Opens a log to append to; appending is what makes cutting it short safe.
pub(super) fn open_log(path: &std::path::Path) -> std::io::Result<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    File::options().create(true).append(true).open(path)
}

pub(super) fn describe(ended: Result<ExitStatus, String>) -> String {
    match ended {
        Ok(status) => format!("ended with {status}"),
        Err(problem) => problem,
    }
}
