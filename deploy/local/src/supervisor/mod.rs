//! The thread that keeps a mesh as its manifests say: reads them, starts and ends pods
//! and components, and publishes what became of it.
//!
//! One event loop owns all state; pods, components and probes are tasks that tell it
//! what happened. It ends when its handle says so, or on SIGTERM where it runs in the
//! foreground. A supervisor that is killed leaves everything running; `down` removes it
//! by cgroup and mounts, without its help.

mod change;
mod component;
mod control_socket;
mod event;
mod event_loop;
mod files;
mod pod;
mod probe;
mod publish;
mod reconcile;
mod setup;
mod watch;
mod waypoint;

use std::thread;

use tokio::sync::mpsc;
use tokio::task::LocalSet;

use self::event::Event;
use self::reconcile::Reconciler;
use crate::config::MeshConfig;
use crate::error::LocalError;
use crate::system::layout::Layout;

/// Events that wait for the loop. Senders wait when it is full.
const MAX_EVENTS: usize = 1024;

/// The running supervisor.
#[derive(Debug)]
pub(crate) struct Supervision {
    thread: Option<thread::JoinHandle<()>>,
    events: mpsc::Sender<Event>,
}

impl Supervision {
    /// Builds the mesh and starts following its manifests. Returns when nodes and pods
    /// are made and the components have been started.
    pub(crate) fn start(config: MeshConfig, layout: Layout) -> Result<Self, LocalError> {
        let (events, inbox) = mpsc::channel(MAX_EVENTS);
        let (made, outcome) = std::sync::mpsc::sync_channel(1);
        let own = events.clone();
        let thread = thread::Builder::new()
            .name(format!("mesh-{}", config.name))
            .spawn(move || run(config, layout, own, inbox, made))
            .map_err(LocalError::system("cannot start the supervisor's thread"))?;
        let gone = || LocalError::Config("the supervisor's thread panicked".into());
        match outcome.recv().unwrap_or_else(|_| Err(gone())) {
            Ok(()) => Ok(Self {
                thread: Some(thread),
                events,
            }),
            Err(error) => {
                // It has nothing left to do.
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// Ends the loop; pods and components are the caller's to remove.
    pub(crate) fn stop(mut self) {
        self.tell(|| Event::Stop);
        self.join();
    }

    /// Waits for SIGTERM or SIGINT, then ends the loop.
    pub(crate) fn until_signalled(mut self) {
        self.tell(|| Event::ObeySignals);
        self.join();
    }

    /// Not by `blocking_send`, which panics inside a runtime, where tests may be.
    fn tell(&self, event: impl Fn() -> Event) {
        while let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event()) {
            thread::sleep(std::time::Duration::from_millis(1));
        }
        // Closed means that it has ended already.
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by its hook.
            let _ = thread.join();
        }
    }
}

fn run(
    config: MeshConfig,
    layout: Layout,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    made: std::sync::mpsc::SyncSender<Result<(), LocalError>>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = LocalError::system("cannot start a runtime")(error);
            let _ = made.send(Err(error));
            return;
        }
    };
    LocalSet::new().block_on(&runtime, async move {
        let started = async {
            let mut reconciler = Reconciler::create(config, layout, events)?;
            reconciler.begin().await?;
            Ok(reconciler)
        };
        match started.await {
            Ok(reconciler) => {
                let _ = made.send(Ok(()));
                reconciler.follow(inbox).await;
            }
            Err(error) => {
                let _ = made.send(Err(error));
            }
        }
    });
    // Its tasks wait for processes that `remove` ends.
    runtime.shutdown_background();
}
