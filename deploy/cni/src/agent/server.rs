//! What the plugin is answered.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::model::enrolment::Decision;
use adit_shared::net::handoff::{Answer, Call};
use http::{Method, StatusCode};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::cluster::{Cluster, Found, Presence};
use super::decide::{decide, sandbox_pod};
use super::metrics::{Metrics, Outcome};
use super::ztunnel::{Ztunnel, ZtunnelError};
use crate::protocol::{Added, Sandbox};

/// Answers the plugin.
pub(super) struct Server {
    pub(super) cluster: Cluster,
    pub(super) metrics: Arc<Metrics>,
    pub(super) ztunnel: Ztunnel,
    pub(super) root_namespace: String,
    pub(super) exclude_namespaces: Vec<String>,
    /// Where both DaemonSets are, and their names.
    pub(super) namespace: String,
    pub(super) daemon_sets: [String; 2],
}

/// The two DaemonSets of a mesh that is removed go one after the other, and each look takes
/// two seconds when our rights have gone before them.
const LEAVING_WAIT: Duration = Duration::from_secs(6);
const LEAVING_LOOK: Duration = Duration::from_millis(200);

/// What is to be done with a sandbox.
enum Verdict {
    Enrol(Box<adit_shared::model::enrolment::SandboxPod>),
    Leave(String),
    /// It cannot be said.
    Unknown(Answer),
}

impl Server {
    pub(super) async fn answer(&self, call: Call) -> Answer {
        match (&call.method, call.path.as_str()) {
            (&Method::POST, "/add") => {
                let started = Instant::now();
                let answer = match serde_json::from_slice(&call.body) {
                    Ok(sandbox) => self.add(sandbox, call.descriptor).await,
                    Err(e) => no(StatusCode::BAD_REQUEST, e),
                };
                if answer.status != StatusCode::OK {
                    self.metrics.count(Outcome::Failed, started.elapsed());
                }
                answer
            }
            (&Method::POST, "/check") => match serde_json::from_slice(&call.body) {
                Ok(sandbox) => self.check(&sandbox).await,
                Err(e) => no(StatusCode::BAD_REQUEST, e),
            },
            (&Method::POST, "/del") => match serde_json::from_slice::<Sandbox>(&call.body) {
                Ok(sandbox) => self.told(self.ztunnel.end(&sandbox).await),
                Err(e) => no(StatusCode::BAD_REQUEST, e),
            },
            (&Method::POST, "/gc") => self.told(self.ztunnel.retain(call.body.to_vec()).await),
            (&Method::GET, "/leaving") => {
                let leaving = timeout(LEAVING_WAIT, self.is_leaving()).await;
                ok(&leaving.unwrap_or_default())
            }
            _ => no(StatusCode::NOT_FOUND, "there is no such call"),
        }
    }

    async fn add(&self, sandbox: Sandbox, netns: Option<OwnedFd>) -> Answer {
        let Some(netns) = netns else {
            return no(StatusCode::BAD_REQUEST, "no network namespace came along");
        };
        let (namespace, name) = (&sandbox.namespace, &sandbox.name);
        let started = Instant::now();
        let pod = match self.judge(&sandbox).await {
            Verdict::Enrol(pod) => pod,
            Verdict::Leave(reason) => {
                self.metrics.count(Outcome::Left, started.elapsed());
                info!(%namespace, pod = %name, reason, "pod left alone");
                return ok(&Added {
                    enrolled: false,
                    reason,
                });
            }
            Verdict::Unknown(answer) => return answer,
        };
        match self.ztunnel.enrol(&pod, netns).await {
            Ok(()) => {
                self.metrics.count(Outcome::Enrolled, started.elapsed());
                info!(%namespace, pod = %name, uid = pod.uid, "pod enrolled before its start");
                ok(&Added {
                    enrolled: true,
                    reason: String::new(),
                })
            }
            Err(error) => {
                warn!(%namespace, pod = %name, uid = pod.uid, "pod held up: {error}");
                let why =
                    format!("pod {namespace}/{name} belongs to the mesh and is held up: {error}");
                no(StatusCode::SERVICE_UNAVAILABLE, why)
            }
        }
    }

    /// Whether the mesh is being removed. ztunnel alone is not the mesh: without it nothing
    /// passes, which is what its pods were promised.
    async fn is_leaving(&self) -> bool {
        let [ztunnel, own] = &self.daemon_sets;
        let is_leaving = async |name: &str| {
            self.cluster.daemon_set(&self.namespace, name).await == Presence::Leaving
        };
        if !is_leaving(ztunnel).await {
            return false;
        }
        while !is_leaving(own).await {
            sleep(LEAVING_LOOK).await;
        }
        true
    }

    async fn check(&self, sandbox: &Sandbox) -> Answer {
        let pod = match self.judge(sandbox).await {
            Verdict::Enrol(pod) => pod,
            Verdict::Leave(reason) => {
                return ok(&Added {
                    enrolled: false,
                    reason,
                });
            }
            Verdict::Unknown(answer) => return answer,
        };
        match self.ztunnel.has(&pod.uid).await {
            Ok(true) => ok(&Added {
                enrolled: true,
                reason: String::new(),
            }),
            Ok(false) => no(
                StatusCode::CONFLICT,
                format!("pod {}/{} is not captured", pod.namespace, pod.name),
            ),
            Err(error) => no(StatusCode::SERVICE_UNAVAILABLE, error),
        }
    }

    async fn judge(&self, sandbox: &Sandbox) -> Verdict {
        let Sandbox {
            namespace, name, ..
        } = sandbox;
        if self.exclude_namespaces.contains(namespace) {
            return Verdict::Leave("the namespace is excluded from the mesh".into());
        }
        let unknown = |what: &str, error: &str| {
            let why = format!(
                "the Kubernetes API cannot be asked whether {what} belongs to the mesh: {error}"
            );
            Verdict::Unknown(no(StatusCode::SERVICE_UNAVAILABLE, why))
        };
        let pod = match self.cluster.pod(sandbox).await {
            Found::Yes(pod) => pod,
            // Static pods start without an API server: they may be what makes it one.
            _ if is_static(sandbox) => {
                return Verdict::Leave("a static pod that the API server does not know".into());
            }
            Found::No => {
                let why = format!("pod {namespace}/{name} is not there any more");
                return Verdict::Unknown(no(StatusCode::GONE, why));
            }
            Found::Unknown(error) => return unknown(&format!("pod {namespace}/{name}"), &error),
        };
        let labels = match self.cluster.namespace_labels(namespace).await {
            Found::Yes(labels) => Some(labels),
            Found::No => None,
            Found::Unknown(error) => return unknown(&format!("namespace {namespace}"), &error),
        };
        let decision = decide(
            &pod,
            labels.as_ref(),
            sandbox,
            &self.root_namespace,
            &self.exclude_namespaces,
        );
        match decision {
            Decision::Leave(reason) => Verdict::Leave(reason.to_string()),
            Decision::Enrol => match sandbox_pod(&pod, sandbox) {
                Some(pod) => Verdict::Enrol(Box::new(pod)),
                None => Verdict::Unknown(no(StatusCode::BAD_GATEWAY, "the pod has no uid")),
            },
        }
    }

    /// What cannot be told now ends by itself.
    fn told(&self, told: Result<(), ZtunnelError>) -> Answer {
        if let Err(error) = told {
            debug!("not told of sandboxes that ended: {error}");
        }
        Answer::new(StatusCode::OK, "")
    }
}

/// The kubelet gives a pod of its own directory a hash as uid.
fn is_static(sandbox: &Sandbox) -> bool {
    let is_hash = |uid: &String| uid.len() == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit());
    sandbox.uid.as_ref().is_some_and(is_hash)
}

fn ok(body: &impl Serialize) -> Answer {
    match serde_json::to_vec(body) {
        Ok(body) => Answer::new(StatusCode::OK, body),
        Err(e) => no(StatusCode::INTERNAL_SERVER_ERROR, e),
    }
}

fn no(status: StatusCode, why: impl ToString) -> Answer {
    Answer::new(status, why.to_string())
}
