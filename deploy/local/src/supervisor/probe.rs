//! Readiness: the schedule of a container's probe, and the kubelet stand-in of each
//! node that carries the network probes out.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::pod::PodRun;
use crate::kubelet::{HttpProbe, ProbeAnswer, ProbeRequest};
use crate::manifest::{Launch, ProbeAction, ProbePlan};
use crate::system::process::find_program;
use crate::system::sandbox::Sandbox;

/// Until the first success a probe is tried this often, whatever its period: a mesh on
/// a laptop should not wait ten seconds for a server that needs ten milliseconds.
const EAGER_PERIOD: Duration = Duration::from_millis(200);
/// How long a kubelet that died stays away.
const RESPAWN: Duration = Duration::from_millis(500);
const MAX_WAITING: usize = 256;

type Job = (ProbeRequest, oneshot::Sender<Result<(), String>>);

/// The kubelet stand-in of a node.
#[derive(Debug)]
pub(super) struct Kubelet {
    jobs: mpsc::Sender<Job>,
    task: JoinHandle<()>,
}

/// Where a pod sends its probes.
#[derive(Debug, Clone)]
pub(super) struct KubeletHandle {
    jobs: mpsc::Sender<Job>,
}

impl Kubelet {
    /// Starts it with the first probe.
    pub(super) fn new(sandbox: Sandbox, dirs: Vec<PathBuf>) -> Self {
        let (jobs, inbox) = mpsc::channel(MAX_WAITING);
        let task = tokio::task::spawn_local(work(sandbox, dirs, inbox));
        Self { jobs, task }
    }

    pub(super) fn handle(&self) -> KubeletHandle {
        let jobs = self.jobs.clone();
        KubeletHandle { jobs }
    }

    /// Waits for it to end, once no pod has a handle any more.
    pub(super) async fn abandon(self) {
        drop(self.jobs);
        // A panic has been reported by its hook.
        let _ = self.task.await;
    }
}

impl KubeletHandle {
    async fn ask(&self, request: ProbeRequest) -> Result<(), String> {
        let limit = Duration::from_millis(request.timeout_ms) + Duration::from_secs(1);
        let (reply, outcome) = oneshot::channel();
        let gone = || "the kubelet stand-in is gone".to_owned();
        self.jobs.send((request, reply)).await.map_err(|_| gone())?;
        match timeout(limit, outcome).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err("the kubelet stand-in does not answer".into()),
        }
    }
}

async fn work(sandbox: Sandbox, dirs: Vec<PathBuf>, mut inbox: mpsc::Receiver<Job>) {
    let mut next_id = 0;
    while let Some(first) = inbox.recv().await {
        let mut child = match spawn(&sandbox, &dirs) {
            Ok(child) => child,
            Err(error) => {
                // Whoever asked asks again.
                let _ = first.1.send(Err(error));
                sleep(RESPAWN).await;
                continue;
            }
        };
        if let Err(error) = converse(&mut child, first, &mut inbox, &mut next_id).await {
            tracing::warn!(%error, "a kubelet stand-in ended");
        }
        // It may have ended by itself.
        let _ = child.kill().await;
        if !inbox.is_closed() {
            sleep(RESPAWN).await;
        }
    }
}

fn spawn(sandbox: &Sandbox, dirs: &[PathBuf]) -> Result<Child, String> {
    let program = find_program("adit-kubelet", dirs).ok_or("adit-kubelet is not to be found")?;
    let mut command = Command::from(sandbox.command(&program));
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    command
        .spawn()
        .map_err(|error| format!("adit-kubelet: {error}"))
}

/// Until it or the supervisor ends. Whoever waits then learns it by a dropped sender.
async fn converse(
    child: &mut Child,
    first: Job,
    inbox: &mut mpsc::Receiver<Job>,
    next_id: &mut u64,
) -> std::io::Result<()> {
    let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(std::io::ErrorKind::BrokenPipe.into());
    };
    let mut lines = BufReader::new(stdout).lines();
    let mut waiting = HashMap::new();
    let mut job = Some(first);
    loop {
        if let Some((mut request, reply)) = job.take() {
            *next_id += 1;
            request.id = *next_id;
            let mut line = serde_json::to_vec(&request)?;
            line.push(b'\n');
            stdin.write_all(&line).await?;
            waiting.insert(request.id, reply);
            // Those that gave up need no entry.
            waiting.retain(|_, reply: &mut oneshot::Sender<_>| !reply.is_closed());
        }
        tokio::select! {
            next = inbox.recv() => match next {
                Some(next) => job = Some(next),
                None => return Ok(()),
            },
            line = lines.next_line() => {
                let Some(line) = line? else {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                };
                let answer: ProbeAnswer = serde_json::from_str(&line)?;
                if let Some(reply) = waiting.remove(&answer.id) {
                    let _ = reply.send(answer.failure.map_or(Ok(()), Err));
                }
            }
        }
    }
}

/// Probes for ever and says so when the result changes.
pub(super) async fn follow(
    pod: &PodRun,
    plan: &ProbePlan,
    mut changed: impl AsyncFnMut(bool, String),
) -> std::convert::Infallible {
    sleep(plan.initial_delay).await;
    let (mut ready, mut ever) = (false, false);
    let (mut successes, mut failures) = (0, 0);
    loop {
        match once(pod, plan).await {
            Ok(()) => {
                (successes, failures) = (successes + 1, 0);
                if !ready && successes >= plan.successes {
                    (ready, ever) = (true, true);
                    changed(true, String::new()).await;
                }
            }
            Err(failure) => {
                (successes, failures) = (0, failures + 1);
                if (ready && failures >= plan.failures) || failures == plan.failures {
                    ready = false;
                    changed(false, format!("readiness probe: {failure}")).await;
                }
            }
        }
        sleep(if ever {
            plan.period
        } else {
            plan.period.min(EAGER_PERIOD)
        })
        .await;
    }
}

async fn once(pod: &PodRun, plan: &ProbePlan) -> Result<(), String> {
    let (port, http) = match &plan.action {
        ProbeAction::Exec { argv } => return exec(pod, argv, plan.timeout).await,
        ProbeAction::Tcp { port } => (*port, None),
        ProbeAction::Http {
            port,
            path,
            headers,
        } => {
            let (path, headers) = (path.clone(), headers.clone());
            (*port, Some(HttpProbe { path, headers }))
        }
    };
    let request = ProbeRequest {
        id: 0,
        address: pod.addresses.v4.into(),
        port,
        http,
        timeout_ms: u64::try_from(plan.timeout.as_millis()).unwrap_or(u64::MAX),
    };
    pod.kubelet.ask(request).await
}

async fn exec(pod: &PodRun, argv: &[String], limit: Duration) -> Result<(), String> {
    let launch = Launch {
        argv: argv.to_vec(),
        env: [("PATH".to_owned(), pod.facts.search_path.clone())].into(),
        directory: None,
    };
    let mut command = pod.command(&launch)?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    match timeout(limit, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("{}: {status}", argv[0])),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("{}: no end within {limit:?}", argv[0])),
    }
}
