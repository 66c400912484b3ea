//! The event loop: takes in what happens, has the manifests followed, and publishes what became
//! of it.

use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::component::{Component, Order};
use super::event::{Answer, Event, Update};
use super::pod::Stop;
use super::reconcile::{PodEntry, Reconciler};
use crate::config::DataPlane;
use crate::control::Request;
use crate::state::ComponentStatus;
use crate::system::cgroup;

/// Editors write a file in several steps; this long after the first they are taken
/// together.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// Manifests are looked at this often whatever inotify says, and logs are cut.
const REGULAR: Duration = Duration::from_secs(5);
/// How long killed processes may take to end.
const REAP_DEADLINE: Duration = Duration::from_secs(5);
/// Half the life of a token.
const TOKEN_RENEWAL: Duration = Duration::from_secs(crate::token::LIFETIME / 2);

impl Reconciler {
    /// Runs until told to stop, then kills every process of the mesh.
    pub(super) async fn follow(mut self, mut inbox: mpsc::Receiver<Event>) {
        self.follow_events(&mut inbox).await;
        // Nobody must wait for a place in the queue any more.
        drop(inbox);
        if let Err(error) = cgroup::kill(&self.layout.cgroup) {
            tracing::warn!(mesh = self.config.name, %error, "not killed");
        }
        // Waiting for our own processes is what keeps zombies from piling up in a
        // program that makes one mesh after the other.
        let all = async {
            let mut waypoints = Vec::new();
            for entry in self.pods.values_mut() {
                entry.stop.send_replace(Stop::Abandon);
                waypoints.extend(entry.waypoint.take().and_then(|w| w.component));
            }
            for component in waypoints {
                component.abandon().await;
            }
            for component in std::mem::take(&mut self.components).into_values() {
                component.abandon().await;
            }
            while self.tasks.join_next().await.is_some() {}
            for kubelet in std::mem::take(&mut self.kubelets) {
                kubelet.abandon().await;
            }
        };
        if timeout(REAP_DEADLINE, all).await.is_err() {
            tracing::warn!(mesh = self.config.name, "some processes do not end");
        }
    }

    async fn follow_events(&mut self, inbox: &mut mpsc::Receiver<Event>) {
        let mut regular = interval(REGULAR);
        regular.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut signals: Option<Signals> = None;
        loop {
            let signalled = async {
                match signals.as_mut() {
                    Some(signals) => signals.any().await,
                    None => std::future::pending().await,
                }
            };
            let mut event = tokio::select! {
                event = inbox.recv() => event,
                _ = regular.tick() => {
                    self.housekeep();
                    Some(Event::Manifests)
                }
                () = signalled => return,
            };
            let mut reload = None;
            let mut replies = Vec::new();
            // Everything that has happened meanwhile is published once.
            while let Some(next) = event.take() {
                match next {
                    Event::Stop => return,
                    Event::ObeySignals => signals = Signals::new().ok(),
                    Event::Manifests => reload = reload.or(Some(DEBOUNCE)),
                    Event::Request {
                        request: Request::Reload,
                        reply,
                    } => {
                        reload = Some(Duration::ZERO);
                        replies.push((reply, serde_json::Value::Null));
                    }
                    Event::Request {
                        request:
                            request @ (Request::Apply { .. }
                            | Request::Delete { .. }
                            | Request::Label { .. }),
                        reply,
                    } => match self.change(request) {
                        Ok(value) => {
                            reload = Some(Duration::ZERO);
                            replies.push((reply, value));
                        }
                        Err(error) => {
                            // The client may be gone.
                            let _ = reply.send(Err(error.to_string()));
                        }
                    },
                    other => self.handle(other),
                }
                event = inbox.try_recv().ok();
            }
            let mut outcome = Ok(());
            if let Some(pause) = reload {
                sleep(pause).await;
                outcome = self.read_files().and_then(|changed| match changed {
                    true => self.follow_manifests(),
                    false => Ok(()),
                });
            }
            let outcome = outcome.and_then(|()| self.publish());
            if let Err(error) = &outcome {
                tracing::error!(mesh = self.config.name, %error, "cannot follow");
            }
            for (reply, value) in replies {
                let answer = outcome.as_ref().map_err(ToString::to_string);
                // The client may be gone.
                let _ = reply.send(answer.map(|()| value));
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Container { uid, index, update } => {
                if let Some(entry) = self.pods.get_mut(&uid) {
                    entry.update(index, update);
                }
            }
            Event::Phase { uid, phase } => {
                if let Some(entry) = self.pods.get_mut(&uid) {
                    entry.view.phase = phase;
                }
            }
            Event::Gone { uid } => {
                let Some(entry) = self.pods.remove(&uid) else {
                    return;
                };
                if let Some(index) = self.node_index(&entry.view.node) {
                    self.ranges[index].release(entry.view.addresses);
                }
                if entry.waypoint.is_some() {
                    // It ends by itself as well.
                    let _ = std::fs::remove_file(self.layout.pod_token(&uid));
                }
            }
            Event::Component { name, pod, update } => {
                if let Some(uid) = pod {
                    match self.pods.get_mut(&uid) {
                        Some(entry) if !entry.view.terminating => entry.update(0, update.clone()),
                        // Its successor has the name now.
                        _ => return,
                    }
                }
                let mut all = self.component_status.iter_mut();
                if let Some(status) = all.find(|status| status.name == name) {
                    update_component(status, update);
                }
            }
            Event::RootCertificate => {
                self.start_ztunnels();
                self.start_waypoints();
            }
            Event::Request { request, reply } => self.obey(request, reply),
            Event::Manifests | Event::ObeySignals | Event::Stop => {}
        }
    }

    fn obey(&mut self, request: Request, reply: Answer) {
        let (component, order) = match request {
            Request::Start { component } => (component, Order::Start),
            Request::Stop { component } => (component, Order::Stop),
            Request::Kill { component } => (component, Order::Kill),
            Request::Restart { component } => (component, Order::Restart),
            Request::Replace { component } => (component, Order::Replace),
            Request::RestartPod { namespace, name } => {
                let outcome = self.restart_pod((namespace, name));
                let _ = reply.send(outcome.map(|()| serde_json::Value::Null));
                return;
            }
            // The loop answers these itself.
            Request::Reload
            | Request::Apply { .. }
            | Request::Delete { .. }
            | Request::Label { .. } => return,
        };
        match self.component(&component) {
            Some(found) => found.order(order, self.after_publishing(reply)),
            None => {
                let all = self.component_status.iter();
                let names: Vec<&str> = all.map(|status| status.name.as_str()).collect();
                let _ = reply.send(Err(format!(
                    "mesh {} runs no component {component}; it runs {}",
                    self.config.name,
                    names.join(", ")
                )));
            }
        }
    }

    fn component(&self, name: &str) -> Option<&Component> {
        let waypoint = |entry: &PodEntry| entry.component_name().as_deref() == Some(name);
        let mut live = self.pods.values().filter(|entry| !entry.view.terminating);
        let waypoint = live.find(|entry| waypoint(entry));
        let waypoint = waypoint.and_then(|entry| entry.waypoint.as_ref()?.component.as_ref());
        self.components.get(name).or(waypoint)
    }

    /// A client that has its answer must find the new state in the status file: the
    /// answer waits behind the events that the component sent before.
    fn after_publishing(&self, reply: Answer) -> oneshot::Sender<Result<(), String>> {
        let (first, outcome) = oneshot::channel::<Result<(), String>>();
        let events = self.events.clone();
        tokio::task::spawn_local(async move {
            let Ok(outcome) = outcome.await else { return };
            let (published, done) = oneshot::channel();
            let request = Request::Reload;
            let reply_after = published;
            let _ = events
                .send(Event::Request {
                    request,
                    reply: reply_after,
                })
                .await;
            // Whatever became of the manifests, the component did what it did.
            let _ = done.await;
            let _ = reply.send(outcome.map(|()| serde_json::Value::Null));
        });
        first
    }

    fn housekeep(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        super::publish::cut_logs(&self.layout.logs_dir());
        let due = self.tokens_issued.elapsed() >= TOKEN_RENEWAL;
        if due && self.config.data_plane == DataPlane::On {
            match self.issue_tokens() {
                Ok(()) => self.tokens_issued = Instant::now(),
                Err(error) => tracing::warn!(%error, "tokens are not renewed"),
            }
        }
    }
}

fn update_component(status: &mut ComponentStatus, update: Update) {
    match update {
        Update::Started { process, again } => {
            status.process = process;
            status.restarts += u32::from(again);
            status.message.clear();
        }
        Update::Ready(ready) => status.ready = ready,
        Update::Ended(message) => {
            status.process = None;
            status.ready = false;
            status.message = message;
        }
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
