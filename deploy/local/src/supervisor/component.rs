//! `aditd`, a ztunnel or a waypoint: started, watched, started again when it falls over, and
//! stopped, killed or replaced on request.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::event::{Event, Update};
use super::pod::{describe, open_log};
use crate::system::http;
use crate::system::process::{self, find_program};
use crate::system::sandbox::Sandbox;

const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// One that ran this long is given a fresh start.
const STABLE: Duration = Duration::from_secs(10);
/// How often readiness is asked for before and after it is there.
const EAGER: Duration = Duration::from_millis(50);
const CALM: Duration = Duration::from_secs(1);
/// How long a second instance may take until the first is stopped.
const REPLACE_DEADLINE: Duration = Duration::from_secs(15);
const MAX_COMMANDS: usize = 16;

/// How to run a component.
#[derive(Debug, Clone)]
pub(super) struct ComponentPlan {
    pub(super) name: String,
    /// The pod that it runs in, for a waypoint.
    pub(super) pod: Option<String>,
    /// Whether a second instance may run beside the first.
    pub(super) replaceable: bool,
    pub(super) program: String,
    pub(super) args: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) sandbox: Sandbox,
    pub(super) dirs: Vec<PathBuf>,
    pub(super) log: PathBuf,
    pub(super) ready: ReadyCheck,
    pub(super) restart: bool,
    pub(super) grace: Duration,
}

/// A GET that answers 200 when a component is ready.
#[derive(Debug, Clone)]
pub(super) struct ReadyCheck {
    pub(super) netns: PathBuf,
    pub(super) address: SocketAddr,
    pub(super) path: &'static str,
}

impl ReadyCheck {
    async fn passes(&self) -> bool {
        let check = self.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let limit = Duration::from_secs(1);
            http::request(&check.netns, check.address, "GET", check.path, limit)
        });
        matches!(asked.await, Ok(Ok(answer)) if answer.status == 200)
    }
}

/// What a component can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Start,
    Stop,
    Kill,
    Restart,
    Replace,
}

/// The handle of a component's task.
#[derive(Debug)]
pub(super) struct Component {
    orders: mpsc::Sender<(Order, oneshot::Sender<Result<(), String>>)>,
    task: JoinHandle<()>,
}

impl Component {
    /// Starts the task and the program.
    pub(super) fn new(plan: ComponentPlan, events: mpsc::Sender<Event>) -> Self {
        let (orders, inbox) = mpsc::channel(MAX_COMMANDS);
        let task = Task {
            plan,
            events,
            child: None,
            begin: Instant::now(),
            backoff: BACKOFF.0,
            again: false,
            wanted: true,
        };
        let task = tokio::task::spawn_local(task.run(inbox));
        Self { orders, task }
    }

    /// Ends the program in good order, with its grace, and the task with it.
    pub(super) async fn end(self) {
        let (reply, done) = oneshot::channel();
        self.order(Order::Stop, reply);
        // A task that is gone has ended its program.
        let _ = done.await;
        self.abandon().await;
    }

    /// Waits for a program that has been killed with its cgroup.
    pub(super) async fn abandon(self) {
        drop(self.orders);
        // A panic has been reported by its hook.
        let _ = self.task.await;
    }

    /// Passes an order on; `reply` hears when it is done.
    pub(super) fn order(&self, order: Order, reply: oneshot::Sender<Result<(), String>>) {
        if let Err(error) = self.orders.try_send((order, reply)) {
            let (_, reply) = error.into_inner();
            // The client may be gone.
            let _ = reply.send(Err("too many requests wait for this component".into()));
        }
    }
}

struct Task {
    plan: ComponentPlan,
    events: mpsc::Sender<Event>,
    child: Option<Child>,
    begin: Instant,
    backoff: Duration,
    again: bool,
    wanted: bool,
}

impl Task {
    async fn run(
        mut self,
        mut orders: mpsc::Receiver<(Order, oneshot::Sender<Result<(), String>>)>,
    ) {
        let mut ready = false;
        let mut pause = Duration::ZERO;
        loop {
            if self.child.is_none() && self.wanted {
                ready = false;
                tokio::select! {
                    () = sleep(pause) => {
                        if let Err(problem) = self.start().await {
                            self.tell(Update::Ended(problem)).await;
                            pause = self.next_pause();
                            continue;
                        }
                    }
                    order = orders.recv() => {
                        let Some((order, reply)) = order else { return };
                        pause = Duration::ZERO;
                        let _ = reply.send(self.obey(order).await);
                        continue;
                    }
                }
            }
            let ended = async {
                match self.child.as_mut() {
                    Some(child) => child.wait().await,
                    None => std::future::pending().await,
                }
            };
            let check = self.plan.ready.clone();
            let running = self.wanted;
            let look = async {
                sleep(if ready { CALM } else { EAGER }).await;
                check.passes().await
            };
            tokio::select! {
                status = ended => {
                    self.child = None;
                    let message = describe(status.map_err(|error| error.to_string()));
                    tracing::warn!(component = self.plan.name, message, "ended by itself");
                    self.tell(Update::Ended(message)).await;
                    self.wanted = self.plan.restart;
                    pause = self.next_pause();
                }
                now = look, if running => {
                    if now != ready {
                        ready = now;
                        self.tell(Update::Ready(ready)).await;
                    }
                }
                order = orders.recv() => {
                    let Some((order, reply)) = order else {
                        return self.last_wait().await;
                    };
                    let outcome = self.obey(order).await;
                    ready = false;
                    pause = Duration::ZERO;
                    // The client may be gone.
                    let _ = reply.send(outcome);
                }
            }
        }
    }

    async fn obey(&mut self, order: Order) -> Result<(), String> {
        match order {
            Order::Start if self.child.is_some() => {}
            Order::Start => {
                self.wanted = true;
                self.start().await?;
            }
            Order::Stop => {
                self.wanted = false;
                self.end(Signal::SIGTERM).await;
            }
            Order::Kill => {
                self.wanted = false;
                self.end(Signal::SIGKILL).await;
            }
            Order::Restart => {
                self.end(Signal::SIGTERM).await;
                self.wanted = true;
                self.start().await?;
            }
            Order::Replace => self.replace().await?,
        }
        Ok(())
    }

    async fn start(&mut self) -> Result<(), String> {
        self.child = Some(self.spawn(None)?);
        self.announce().await;
        Ok(())
    }

    async fn announce(&mut self) {
        self.begin = Instant::now();
        let pid = self.child.as_ref().and_then(Child::id);
        let process = pid.and_then(process::identify);
        let again = std::mem::replace(&mut self.again, true);
        self.tell(Update::Started { process, again }).await;
    }

    fn spawn(&self, notify: Option<&Path>) -> Result<Child, String> {
        let plan = &self.plan;
        let path = find_program(&plan.program, &plan.dirs)
            .ok_or_else(|| format!("there is no program {}", plan.program))?;
        let log = open_log(&plan.log).map_err(|error| error.to_string())?;
        let errors = log.try_clone().map_err(|error| error.to_string())?;
        let mut command = plan.sandbox.command(&path);
        command
            .args(&plan.args)
            .env_clear()
            .envs(&plan.env)
            .envs(notify.map(|socket| ("NOTIFY_SOCKET", socket)))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let spawned = Command::from(command).spawn();
        spawned.map_err(|error| format!("cannot run {}: {error}", path.display()))
    }

    /// A rolling update: the new instance first, then the old one's end.
    async fn replace(&mut self) -> Result<(), String> {
        if !self.plan.replaceable {
            return Err(format!(
                "{} cannot be replaced under way; restart it",
                self.plan.name
            ));
        }
        // Both instances answer at the readiness port; each is asked to tell by itself.
        let path = self.plan.log.with_extension("notify");
        let _ = std::fs::remove_file(&path);
        let told = UnixDatagram::bind(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut new = self.spawn(Some(&path))?;
        let settled = self.settle(&mut new, &told).await;
        let _ = std::fs::remove_file(&path);
        if let Err(problem) = settled {
            end(&mut new, Signal::SIGKILL, self.plan.grace).await;
            return Err(problem);
        }
        let old = self.child.replace(new);
        self.wanted = true;
        self.announce().await;
        if let Some(mut old) = old {
            end(&mut old, Signal::SIGTERM, self.plan.grace).await;
        }
        Ok(())
    }

    /// Waits until a second instance is ready.
    async fn settle(&self, new: &mut Child, told: &UnixDatagram) -> Result<(), String> {
        let name = &self.plan.name;
        let mut message = [0; 64];
        tokio::select! {
            status = new.wait() => {
                let how = describe(status.map_err(|error| error.to_string()));
                Err(format!("the new {name} {how}"))
            }
            received = timeout(REPLACE_DEADLINE, told.recv(&mut message)) => match received {
                Ok(Ok(length)) if message[..length].starts_with(b"READY=1") => Ok(()),
                Ok(Ok(_)) => Err(format!("the new {name} says something else than READY=1")),
                Ok(Err(error)) => Err(format!("the new {name} cannot be heard: {error}")),
                Err(_) => Err(format!("the new {name} did not get ready")),
            }
        }
    }

    async fn end(&mut self, signal: Signal) {
        if let Some(mut child) = self.child.take() {
            end(&mut child, signal, self.plan.grace).await;
            let how = if signal == Signal::SIGKILL {
                "killed"
            } else {
                "stopped"
            };
            self.tell(Update::Ended(how.into())).await;
        }
    }

    async fn last_wait(&mut self) {
        if let Some(child) = self.child.as_mut() {
            // It is killed already; a zombie is not worth more.
            let _ = timeout(self.plan.grace, child.wait()).await;
        }
    }

    fn next_pause(&mut self) -> Duration {
        if self.begin.elapsed() >= STABLE {
            self.backoff = BACKOFF.0;
        }
        let pause = self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        pause
    }

    async fn tell(&self, update: Update) {
        let event = Event::Component {
            name: self.plan.name.clone(),
            pod: self.plan.pod.clone(),
            update,
        };
        // The loop has ended: nobody wants to know.
        let _ = self.events.send(event).await;
    }
}

/// Returns when the process has ended.
async fn end(child: &mut Child, signal: Signal, grace: Duration) {
    if let Some(process) = child.id().and_then(process::identify) {
        process::signal(process, signal);
    }
    if timeout(grace, child.wait()).await.is_err() {
        // It cannot refuse this one.
        let _ = child.kill().await;
    }
}
