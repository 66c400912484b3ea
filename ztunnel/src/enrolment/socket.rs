//! The node's socket: what the CNI plugin, by way of the node agent, tells of pods whose
//! sandboxes are being made or have ended.
//!
//! | call | meaning | answer |
//! | --- | --- | --- |
//! | `POST /pods` ([`SandboxPod`], the namespace as a descriptor) | enrol before anything runs | 200 when capture is in place, else why not |
//! | `DELETE /sandboxes/ID?uid=UID` | it has ended | 200 when its capture is gone, before its network is |
//! | `GET /pods/UID` | is it enrolled? | 200, 404 |
//! | `POST /pods/retain` (a list of sandboxes) | no others are left | 200 |
//! | `POST /leave` | the node leaves the mesh | 200 when nothing of it is left |
//!
//! Answers of 4xx are the caller's fault, and trying again does not help; 5xx may pass.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use adit_ebpf::{NetnsFd, Redirector};
use adit_shared::model::enrolment::{AGENT_REMOVED, SandboxPod};
use adit_shared::net::handoff::{self, Answer, Call};
use http::{Method, StatusCode};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::EnrolledPods;
use super::records::EarlyRecords;
use super::wanted::{EarlyPod, Wanted};
use crate::discovery::{CgroupDiscovery, Discovery, DiscoveryError, has_address};
use crate::pod::netns_id;

/// For an enrolment, which takes milliseconds unless an IPv6 address is still being checked.
/// Below the node agent's own deadline, so that it is told why.
const ENROL_DEADLINE: Duration = Duration::from_secs(12);
/// For the capture of a pod that has ended to be removed.
const REMOVE_DEADLINE: Duration = Duration::from_secs(2);
/// How long connections may go on when the node leaves the mesh.
const LEAVE_LINGER: Duration = Duration::from_secs(3);
/// The node agent's socket, beside ours.
const AGENT_SOCKET: &str = "cni.sock";
/// It answers within six seconds.
const ASK_DEADLINE: Duration = Duration::from_secs(8);
/// A second look for what was set up while the first was under way.
const LEAVE_AGAIN: Duration = Duration::from_millis(200);

/// Answers the calls.
pub struct EnrolmentSocket {
    /// Where pods are admitted.
    pub wanted: Arc<Wanted>,
    /// What is written down of them.
    pub records: Arc<EarlyRecords>,
    /// Finds namespaces.
    pub discovery: Arc<Discovery>,
    /// Those that are enrolled.
    pub pods: Arc<EnrolledPods>,
    /// Capture.
    pub redirector: Arc<Mutex<Redirector>>,
    /// Ends the enrolment manager.
    pub manager: AbortHandle,
    /// The node has been told to leave the mesh.
    pub leaving: AtomicBool,
}

impl EnrolmentSocket {
    /// Answers one call.
    pub async fn answer(&self, call: Call) -> Answer {
        let path: Vec<&str> = call.path.split('/').skip(1).collect();
        match (&call.method, path.as_slice()) {
            (&Method::POST, ["pods"]) => self.admit(call).await,
            (&Method::POST, ["pods", "retain"]) => self.retain(&call),
            (&Method::DELETE, ["sandboxes", sandbox]) => self.dismiss(sandbox, &call.query).await,
            (&Method::GET, ["pods", uid]) if self.pods.contains(uid) => ok(),
            (&Method::GET, ["pods", _]) => no(StatusCode::NOT_FOUND, "the pod is not enrolled"),
            (&Method::POST, ["leave"]) => self.leave().await,
            _ => no(StatusCode::NOT_FOUND, "there is no such call"),
        }
    }

    async fn admit(&self, call: Call) -> Answer {
        let pod: SandboxPod = match serde_json::from_slice(&call.body) {
            Ok(pod) => pod,
            Err(e) => return no(StatusCode::BAD_REQUEST, e),
        };
        let spec = match self.records.spec(&pod) {
            Ok(spec) => spec,
            Err(e) => return no(StatusCode::BAD_REQUEST, e),
        };
        let Some(netns) = call.descriptor else {
            return no(StatusCode::BAD_REQUEST, "no network namespace came along");
        };
        let addresses = spec.addresses.clone();
        let netns = match spawn_blocking(move || verify(netns, &addresses)).await {
            Ok(Ok(netns)) => netns,
            Ok(Err(why)) => return no(StatusCode::UNPROCESSABLE_ENTITY, why),
            Err(e) => return no(StatusCode::INTERNAL_SERVER_ERROR, e),
        };
        let early = EarlyPod {
            spec,
            sandbox: pod.sandbox.as_str().into(),
            netns: Some(Arc::new(netns)),
        };
        let enrolled = match self.wanted.admit(early) {
            Ok(enrolled) => timeout(ENROL_DEADLINE, enrolled).await,
            Err(e) => return no(StatusCode::SERVICE_UNAVAILABLE, e),
        };
        let failed = match enrolled {
            Ok(Ok(Ok(()))) => {
                return match self.records.save(&pod) {
                    Ok(()) => ok(),
                    // A ztunnel that follows would let the pod out of the mesh for a moment.
                    Err(e) => {
                        self.wanted.dismiss(&pod.sandbox);
                        no(
                            StatusCode::SERVICE_UNAVAILABLE,
                            format!("cannot be written down: {e}"),
                        )
                    }
                };
            }
            Ok(Ok(Err(why))) => why,
            Ok(Err(_)) => "another sandbox of the pod has taken its place".to_owned(),
            Err(_) => format!("not enrolled within {ENROL_DEADLINE:?}"),
        };
        // The runtime takes the sandbox down again and tries with another one.
        self.wanted.dismiss(&pod.sandbox);
        no(StatusCode::SERVICE_UNAVAILABLE, failed)
    }

    async fn dismiss(&self, sandbox: &str, query: &str) -> Answer {
        let removed = match self.wanted.dismiss(sandbox) {
            Some((uid, removed)) => {
                self.records.remove(&uid);
                Some(removed)
            }
            None => match query.strip_prefix("uid=") {
                Some(uid) => self.end(uid).await,
                None => None,
            },
        };
        if let Some(removed) = removed {
            // The network of the sandbox goes with or without us.
            let _ = timeout(REMOVE_DEADLINE, removed).await;
        }
        ok()
    }

    /// A sandbox that we never heard of has ended: of a pod that joined while it ran. It may
    /// be one before the pod's last, so the pod's processes are asked.
    async fn end(&self, uid: &str) -> Option<oneshot::Receiver<()>> {
        let known = self.redirector.lock().pods();
        let pod = known.into_iter().find(|pod| pod.uid == uid)?;
        if self.wanted.knows_sandbox_of(uid) {
            return None;
        }
        let (discovery, uid) = (self.discovery.clone(), pod.uid);
        let gone = spawn_blocking(move || {
            let gone = match discovery.find(&uid, &pod.addresses) {
                Ok(_) | Err(DiscoveryError::Unreadable { .. }) => false,
                Err(_) => true,
            };
            gone.then_some(uid)
        });
        let uid = gone.await.ok().flatten()?;
        Some(self.wanted.end(&uid))
    }

    fn retain(&self, call: &Call) -> Answer {
        let sandboxes: HashSet<String> = match serde_json::from_slice(&call.body) {
            Ok(sandboxes) => sandboxes,
            Err(e) => return no(StatusCode::BAD_REQUEST, e),
        };
        for uid in self.wanted.retain(&sandboxes) {
            info!(target: "enrolment", %uid, "the sandbox is gone");
            self.records.remove(&uid);
        }
        ok()
    }

    /// This process ends. If the whole mesh is being removed, which the node agent can ask the
    /// Kubernetes API, or if the agent was removed before, capture goes with it; else it stays for
    /// the process that follows.
    pub async fn leave_with_the_mesh(&self, own: &Path) {
        let agent = own.with_file_name(AGENT_SOCKET);
        let asked = spawn_blocking(move || {
            handoff::call(&agent, &Method::GET, "/leaving", &[], None, ASK_DEADLINE)
        });
        let removed = own.with_file_name(AGENT_REMOVED);
        let leaving = match asked.await {
            Ok(Ok(answer)) => answer.text() == "true",
            _ => removed.exists(),
        };
        // What has been begun is not left half done.
        if leaving || self.leaving.load(Ordering::Relaxed) {
            let answer = self.leave().await;
            if answer.status != StatusCode::OK {
                warn!(target: "enrolment", "capture is not removed: {}", answer.text());
            }
            // There is none, unless the agent went first.
            let _ = std::fs::remove_file(removed);
        }
    }

    /// New connections first, then, after a moment for the open ones, everything.
    async fn leave(&self) -> Answer {
        info!(target: "enrolment", "the node leaves the mesh");
        self.leaving.store(true, Ordering::Relaxed);
        self.manager.abort();
        let release = |redirector: &mut Redirector| {
            for pod in redirector.pods() {
                let released = redirector
                    .release(&pod.uid)
                    .and_then(|()| redirector.unsteer(&pod.uid));
                if let Err(e) = released {
                    warn!(target: "enrolment", uid = %pod.uid, "not released: {e}");
                }
            }
            Ok(())
        };
        if let Err(why) = self.capture(release).await {
            warn!(target: "enrolment", "{why}");
        }
        sleep(LEAVE_LINGER).await;
        let removed = self
            .capture(|r| r.remove_all().map_err(|e| e.to_string()))
            .await;
        sleep(LEAVE_AGAIN).await;
        let left = self.capture(|r| match r.pods().is_empty() {
            true => Ok(()),
            false => r.remove_all().map_err(|e| e.to_string()),
        });
        let left = left.await;
        self.records.clear();
        match removed.and(left) {
            Ok(()) => ok(),
            Err(why) => no(StatusCode::INTERNAL_SERVER_ERROR, why),
        }
    }

    async fn capture(
        &self,
        change: impl FnOnce(&mut Redirector) -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        let redirector = self.redirector.clone();
        let changed = spawn_blocking(move || change(&mut redirector.lock()));
        changed.await.map_err(|e| e.to_string()).flatten()
    }
}

/// What was passed must be the namespace of a pod, and have one of its addresses.
fn verify(
    descriptor: std::os::fd::OwnedFd,
    addresses: &[std::net::IpAddr],
) -> Result<File, String> {
    use std::os::fd::AsFd as _;
    let readable = |e: std::io::Error| format!("the network namespace cannot be used: {e}");
    let netns = NetnsFd::try_from(descriptor).map_err(readable)?;
    let file = File::from(netns.as_fd().try_clone_to_owned().map_err(readable)?);
    let id = file
        .metadata()
        .map(|found| netns_id(&found))
        .map_err(readable)?;
    if CgroupDiscovery::is_the_nodes(id).map_err(readable)? {
        return Err("the network namespace is the node's own".to_owned());
    }
    if !has_address(&file, addresses).map_err(readable)? {
        return Err("the network namespace has none of the pod's addresses".to_owned());
    }
    Ok(file)
}

fn ok() -> Answer {
    Answer::new(StatusCode::OK, "")
}

fn no(status: StatusCode, why: impl ToString) -> Answer {
    Answer::new(status, why.to_string())
}
