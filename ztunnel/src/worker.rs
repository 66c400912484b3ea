//! A worker: one thread, one single-threaded runtime, and everything that a connection
//! needs. Its listeners, TLS connections, tunnels, pools and buffers belong to it alone,
//! so that bytes never cross threads and moving them takes no lock. What all workers share
//! while a connection is opened is the sequence of source ports towards apps.
//!
//! The rest of the process talks to it by commands.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use adit_ebpf::NetnsFd;
use adit_ebpf::socket::PortRotor;
use adit_shared::hbone::buffer::BufferPool;
use adit_shared::identity::CertificateCache;
use adit_shared::model::SharedModel;
use adit_shared::net::drain::{DrainMode, DrainWatcher};
use adit_shared::policy::TrustDomains;
use adit_shared::telemetry::Telemetry;
use socket2::Socket;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, LocalSet, spawn_local};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, error};

use crate::config::Config;
use crate::connections::{Closed, ConnectionView, Connections};
use crate::listeners::PodListeners;
use crate::pod::Pod;
use crate::proxy;
use crate::waypoints::FailingWaypoints;

/// Commands that may wait for a worker. Only the enrolment and the admin endpoint send
/// any, one pod or one request at a time.
const COMMAND_QUEUE: usize = 64;
/// A pod that leaves has its listeners served at least so long.
const DRAIN_LINGER: Duration = Duration::from_millis(300);
/// Listeners that others have replaced, or that a stop closes, are served so much longer: what
/// was steered to them a moment before is in their queues, and would be reset.
const LISTENER_LINGER: Duration = Duration::from_millis(100);
/// A stop waits so long for peers to hear that their tunnels take no new streams: a stream that
/// is on its way is lost, or opened anew elsewhere, with them.
const TUNNEL_LINGER: Duration = Duration::from_millis(500);
/// How long streams of a tunnel go on that was made to an enrolment which another one of the
/// same pod has replaced.
const REPLACED_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// How long a buffer that nobody needs stays with its worker, at the most twice that.
const TRIM_INTERVAL: Duration = Duration::from_secs(30);

/// What all workers share.
pub struct Shared {
    /// Configuration.
    pub config: Config,
    /// Workloads, services, policies.
    pub model: Arc<SharedModel>,
    /// Which trust domains are ours.
    pub trust_domains: TrustDomains,
    /// Certificates of this node's pods.
    pub certificates: CertificateCache,
    /// Metrics and access log.
    pub telemetry: Telemetry,
    /// Source ports for connections to apps. One sequence for all workers: each would run into
    /// the ports that another has in use, and could not know a client's own ports that another
    /// holds.
    pub ports: PortRotor,
    /// Waypoints that connections fail at.
    pub failing_waypoints: FailingWaypoints,
    /// Says when to stop.
    pub drain: DrainWatcher,
}

/// What is asked of a worker.
enum Command {
    AddPod {
        pod: Arc<Pod>,
        listeners: PodListeners,
        done: oneshot::Sender<io::Result<()>>,
    },
    KeepNewest {
        uid: Arc<str>,
        done: oneshot::Sender<()>,
    },
    Discard {
        pod: Arc<Pod>,
        done: oneshot::Sender<()>,
    },
    DrainPod {
        uid: Arc<str>,
        deadline: Duration,
        done: oneshot::Sender<()>,
    },
    RemovePod {
        uid: Arc<str>,
        done: oneshot::Sender<()>,
    },
    Connections {
        reply: oneshot::Sender<Vec<ConnectionView>>,
    },
}

/// The outside of a worker, which ends when it is told to drain.
pub struct WorkerHandle {
    commands: mpsc::Sender<Command>,
}

/// The worker's thread has ended.
#[derive(Debug, thiserror::Error)]
#[error("the worker has stopped")]
pub struct Stopped;

/// Why a pod could not be added.
#[derive(Debug, thiserror::Error)]
pub enum AddPodError {
    /// The worker is gone.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// Its runtime refused the sockets.
    #[error("register listeners: {0}")]
    Register(#[from] io::Error),
}

impl WorkerHandle {
    /// Starts worker number `index`.
    ///
    /// # Errors
    /// The thread or its runtime could not be made.
    pub fn start(index: usize, shared: Arc<Shared>) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        // That of this thread, which the worker's will inherit.
        let home = NetnsFd::current()?;
        std::thread::Builder::new()
            .name(format!("worker-{index}"))
            .spawn(move || {
                shared
                    .telemetry
                    .metrics()
                    .watch_runtime(runtime.handle().clone());
                let local = LocalSet::new();
                local.block_on(&runtime, Worker::run(shared, home, inbox));
            })?;
        Ok(Self { commands })
    }

    /// Serves a pod from now on, beside an older generation of its listeners.
    ///
    /// # Errors
    /// [`AddPodError`].
    pub async fn add_pod(&self, pod: Arc<Pod>, listeners: PodListeners) -> Result<(), AddPodError> {
        self.ask(|done| Command::AddPod {
            pod,
            listeners,
            done,
        })
        .await??;
        Ok(())
    }

    /// Closes older generations of a pod's listeners, once capture points to the newest.
    pub async fn keep_newest(&self, uid: Arc<str>) {
        // A worker that has stopped has no listeners either.
        let _ = self.ask(|done| Command::KeepNewest { uid, done }).await;
    }

    /// Takes back an [`Self::add_pod`] whose capture failed: older generations stay.
    pub async fn discard(&self, pod: Arc<Pod>) {
        let _ = self.ask(|done| Command::Discard { pod, done }).await;
    }

    /// Returns when the pod has no open connections, or at the deadline.
    pub async fn drain_pod(&self, uid: Arc<str>, deadline: Duration) {
        let _ = self
            .ask(|done| Command::DrainPod {
                uid,
                deadline,
                done,
            })
            .await;
    }

    /// Closes the pod's listeners and what is still open.
    pub async fn remove_pod(&self, uid: Arc<str>) {
        let _ = self.ask(|done| Command::RemovePod { uid, done }).await;
    }

    /// The open connections.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn connections(&self) -> Result<Vec<ConnectionView>, Stopped> {
        self.ask(|reply| Command::Connections { reply }).await
    }

    /// Completes when all have ended, some time after the drain signal has been given.
    pub async fn all_stopped(workers: &[Self]) {
        for worker in workers {
            worker.commands.closed().await;
        }
    }

    /// Completes when one of them has ended. Before a drain that is a fault: the pods' share
    /// of connections that it served is served by nobody.
    pub async fn any_stopped(workers: &[Self]) {
        let ends = workers
            .iter()
            .map(|worker| Box::pin(worker.commands.closed()));
        if workers.is_empty() {
            std::future::pending::<()>().await;
        }
        futures_util::future::select_all(ends).await;
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }
}

/// The inside of a worker; shared by its connections.
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// Open connections.
    pub connections: Rc<Connections>,
    /// Tunnels to other pods.
    pub pool: proxy::TunnelPool,
    /// Held by each tunnel that a peer has to one of our pods, from its accept.
    pub tunnels: Rc<()>,
    /// How this node's pods describe themselves to peers.
    pub descriptions: proxy::Descriptions,
    /// The namespace of the worker's thread, which leaves it to open sockets in pods.
    pub home: NetnsFd,
    pods: RefCell<HashMap<Arc<str>, Vec<Generation>>>,
}

/// One set of a pod's listeners. Dropping it closes them.
struct Generation {
    pod: Arc<Pod>,
    accepting: [AbortHandle; 3],
}

impl Drop for Generation {
    fn drop(&mut self) {
        for task in &self.accepting {
            task.abort();
        }
    }
}

impl Worker {
    async fn run(shared: Arc<Shared>, home: NetnsFd, mut inbox: mpsc::Receiver<Command>) {
        let worker = Rc::new(Self {
            connections: Rc::default(),
            tunnels: Rc::default(),
            descriptions: proxy::Descriptions::default(),
            pool: proxy::new_pool(&shared.config),
            home,
            pods: RefCell::default(),
            shared,
        });
        let trimming = spawn_local(trim_buffers());
        let mut policies = spawn_local(proxy::recheck::run(worker.clone()));
        let mut drain = worker.shared.drain.clone();
        loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => worker.obey(command),
                    None => break,
                },
                mode = drain.signalled() => {
                    worker.stop(mode).await;
                    break;
                }
                // Policies would not be enforced on open connections any more: rather none.
                _ = &mut policies => {
                    error!("policies are not followed any more; this worker stops");
                    break;
                }
            }
        }
        policies.abort();
        trimming.abort();
    }

    fn obey(self: &Rc<Self>, command: Command) {
        match command {
            Command::AddPod {
                pod,
                listeners,
                done,
            } => {
                let _ = done.send(self.add_pod(pod, listeners));
            }
            Command::KeepNewest { uid, done } => {
                self.keep_newest(&uid);
                let _ = done.send(());
            }
            Command::Discard { pod, done } => {
                let emptied = match self.pods.borrow_mut().get_mut(&pod.spec.uid) {
                    Some(generations) => {
                        generations.retain(|g| g.pod.incarnation != pod.incarnation);
                        generations.is_empty()
                    }
                    None => false,
                };
                if emptied {
                    self.pods.borrow_mut().remove(&pod.spec.uid);
                }
                self.end(&pod);
                let _ = done.send(());
            }
            Command::DrainPod {
                uid,
                deadline,
                done,
            } => {
                let worker = self.clone();
                spawn_local(async move {
                    let until = Instant::now() + deadline;
                    // What was captured a moment ago may still wait to be accepted.
                    sleep_until(until.min(Instant::now() + DRAIN_LINGER)).await;
                    let rest = until.saturating_duration_since(Instant::now());
                    worker
                        .drained(rest, || {
                            worker.connections.count(&uid) == 0 && !worker.is_busy(&uid)
                        })
                        .await;
                    let _ = done.send(());
                });
            }
            Command::RemovePod { uid, done } => {
                for generation in self.pods.borrow_mut().remove(&uid).unwrap_or_default() {
                    self.end(&generation.pod);
                    self.descriptions.forget(&generation.pod.spec.workload);
                }
                // Those of earlier generations, too.
                self.connections.for_each(|live| {
                    if live.pod.spec.uid == uid {
                        live.close(Closed::PodGone);
                    }
                });
                let _ = done.send(());
            }
            Command::Connections { reply } => {
                let _ = reply.send(self.connections.views());
            }
        }
    }

    /// Whether a connection of the pod is being opened or open.
    fn is_busy(&self, uid: &str) -> bool {
        let pods = self.pods.borrow();
        let mut generations = pods.get(uid).into_iter().flatten();
        generations.any(|g| g.pod.is_busy())
    }

    /// Listeners of older generations close. Their connections go on where the pod is still
    /// the same one; in another network namespace there is nobody left to talk to. Tunnels
    /// take no new streams in either case: they were made with the older generation's
    /// certificate and addresses.
    fn keep_newest(&self, uid: &str) {
        let mut pods = self.pods.borrow_mut();
        let Some(generations) = pods.get_mut(uid) else {
            return;
        };
        let old = generations.len().saturating_sub(1);
        let replaced: Vec<_> = generations.drain(..old).collect();
        let Some(newest) = generations.last().map(|g| g.pod.clone()) else {
            return;
        };
        drop(pods);
        for generation in replaced {
            let pod = &generation.pod;
            if pod.netns_id() == newest.netns_id() && pod.spec.identity == newest.spec.identity {
                let deadline = Instant::now() + REPLACED_DEADLINE;
                pod.drain.signal(DrainMode::Graceful { deadline });
                self.pool.evict(|key| key.source == pod.incarnation);
                spawn_local(async move {
                    sleep(LISTENER_LINGER).await;
                    drop(generation);
                });
            } else {
                self.end(pod);
            }
        }
    }

    /// Ends everything of one generation of a pod.
    fn end(&self, pod: &Pod) {
        pod.drain.signal(DrainMode::Immediate);
        self.connections.for_each(|live| {
            if live.pod.incarnation == pod.incarnation {
                live.close(Closed::PodGone);
            }
        });
        self.pool.evict(|key| key.source == pod.incarnation);
    }

    fn add_pod(self: &Rc<Self>, pod: Arc<Pod>, listeners: PodListeners) -> io::Result<()> {
        let register = |socket: Socket| {
            socket.set_nonblocking(true)?;
            TcpListener::from_std(socket.into())
        };
        let outbound = register(listeners.outbound)?;
        let plaintext = register(listeners.plaintext)?;
        let hbone = register(listeners.hbone)?;
        debug!(pod = %pod.spec.name, namespace = %pod.spec.namespace, "listening");
        let accepting = [
            spawn_local(proxy::outbound::accept(self.clone(), pod.clone(), outbound))
                .abort_handle(),
            spawn_local(proxy::plaintext::accept(
                self.clone(),
                pod.clone(),
                plaintext,
            ))
            .abort_handle(),
            spawn_local(proxy::inbound::accept(self.clone(), pod.clone(), hbone)).abort_handle(),
        ];
        self.pods
            .borrow_mut()
            .entry(pod.spec.uid.clone())
            .or_default()
            .push(Generation { pod, accepting });
        Ok(())
    }

    /// Listeners close as soon as their queues are empty; connections get the deadline, those
    /// that are only being opened as well.
    async fn stop(self: &Rc<Self>, mode: DrainMode) {
        let generations: Vec<Generation> = std::mem::take(&mut *self.pods.borrow_mut())
            .into_values()
            .flatten()
            .collect();
        let pods: Vec<_> = generations.iter().map(|g| g.pod.clone()).collect();
        for pod in &pods {
            pod.drain.signal(mode);
        }
        let deadline = match mode {
            DrainMode::Graceful { deadline } => deadline,
            DrainMode::Immediate => Instant::now(),
        };
        let left = || deadline.saturating_duration_since(Instant::now());
        sleep(LISTENER_LINGER.min(left())).await;
        drop(generations);
        let done = || self.connections.is_empty() && !pods.iter().any(|pod| pod.is_busy());
        self.drained(left(), done).await;
        let told = || done() && Rc::strong_count(&self.tunnels) == 1;
        self.drained(TUNNEL_LINGER.min(left()), told).await;
        self.connections
            .for_each(|live| live.close(Closed::Shutdown));
        // Their tasks get a turn to reset their peers and to write their log lines.
        self.drained(Duration::from_millis(500), || self.connections.is_empty())
            .await;
    }

    async fn drained(&self, deadline: Duration, done: impl Fn() -> bool) {
        let deadline = Instant::now() + deadline;
        while !done() && Instant::now() < deadline {
            let next = Instant::now() + Duration::from_millis(20);
            sleep_until(next.min(deadline)).await;
        }
    }
}

/// Gives back the buffers that a burst left and nobody has needed since.
async fn trim_buffers() {
    loop {
        sleep(TRIM_INTERVAL).await;
        BufferPool::local().trim();
    }
}
