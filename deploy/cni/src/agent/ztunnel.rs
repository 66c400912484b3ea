//! The calls to ztunnel.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use adit_shared::model::enrolment::SandboxPod;
use adit_shared::net::handoff::{self, Answer, CallError};
use http::{Method, StatusCode};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::protocol::{Sandbox, ZTUNNEL_DEADLINE, ZTUNNEL_WAIT};

/// How often a ztunnel that is not there is tried.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
pub(super) enum ZtunnelError {
    /// It does not run.
    #[error(
        "ztunnel does not run on this node (DaemonSet ztunnel), and pods of the mesh do not start \
         without it ({0})"
    )]
    Unreachable(CallError),
    /// It does not answer.
    #[error("ztunnel does not answer: {0}")]
    Failed(CallError),
    /// It says no.
    #[error("ztunnel could not enrol the pod: {0}")]
    Refused(String),
    /// The call itself failed.
    #[error("ztunnel was not asked: {0}")]
    Internal(String),
}

/// ztunnel, by its socket.
#[derive(Debug, Clone)]
pub(super) struct Ztunnel {
    socket: Arc<Path>,
}

impl Ztunnel {
    pub(super) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// Has the pod enrolled; returns when capture is in place.
    pub(super) async fn enrol(&self, pod: &SandboxPod, netns: OwnedFd) -> Result<(), ZtunnelError> {
        let body = serde_json::to_vec(pod).map_err(|e| ZtunnelError::Internal(e.to_string()))?;
        let netns = Arc::new(netns);
        let until = Instant::now() + ZTUNNEL_WAIT;
        loop {
            let call = self.call(
                Method::POST,
                "/pods".into(),
                body.clone(),
                Some(netns.clone()),
            );
            match call.await {
                // It may be restarting.
                Err(ZtunnelError::Unreachable(_)) if Instant::now() < until => {
                    sleep(TRY_AGAIN).await;
                }
                Err(error) => return Err(error),
                Ok(answer) if answer.status == StatusCode::OK => return Ok(()),
                Ok(answer) => return Err(ZtunnelError::Refused(answer.text())),
            }
        }
    }

    /// Whether the pod is enrolled.
    pub(super) async fn has(&self, uid: &str) -> Result<bool, ZtunnelError> {
        let answer = self.call(Method::GET, format!("/pods/{uid}"), Vec::new(), None);
        Ok(answer.await?.status == StatusCode::OK)
    }

    /// A sandbox has ended.
    pub(super) async fn end(&self, sandbox: &Sandbox) -> Result<(), ZtunnelError> {
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let uid = sandbox.uid.as_deref().filter(|uid| plain(uid));
        let uid = uid.map(|uid| format!("?uid={uid}")).unwrap_or_default();
        if !plain(&sandbox.id) {
            return Err(ZtunnelError::Internal("the sandbox's id is not one".into()));
        }
        let target = format!("/sandboxes/{}{uid}", sandbox.id);
        let answer = self.call(Method::DELETE, target, Vec::new(), None);
        answer.await.map(drop)
    }

    /// No other sandboxes are left.
    pub(super) async fn retain(&self, sandboxes: Vec<u8>) -> Result<(), ZtunnelError> {
        let answer = self.call(Method::POST, "/pods/retain".into(), sandboxes, None);
        answer.await.map(drop)
    }

    /// The node leaves the mesh.
    pub(super) async fn leave(&self) -> Result<(), ZtunnelError> {
        let answer = self
            .call(Method::POST, "/leave".into(), Vec::new(), None)
            .await?;
        match answer.status {
            StatusCode::OK => Ok(()),
            _ => Err(ZtunnelError::Refused(answer.text())),
        }
    }

    /// Whether anybody listens.
    pub(super) async fn is_there(&self) -> bool {
        let answer = self.call(Method::GET, "/".into(), Vec::new(), None);
        !matches!(answer.await, Err(ZtunnelError::Unreachable(_)))
    }

    async fn call(
        &self,
        method: Method,
        target: String,
        body: Vec<u8>,
        descriptor: Option<Arc<OwnedFd>>,
    ) -> Result<Answer, ZtunnelError> {
        let socket: PathBuf = self.socket.to_path_buf();
        let called = spawn_blocking(move || {
            let descriptor = descriptor.as_ref().map(|fd| fd.as_fd());
            handoff::call(
                &socket,
                &method,
                &target,
                &body,
                descriptor,
                ZTUNNEL_DEADLINE,
            )
        });
        match called.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error @ CallError::Unreachable { .. })) => Err(ZtunnelError::Unreachable(error)),
            Ok(Err(error)) => Err(ZtunnelError::Failed(error)),
            Err(error) => Err(ZtunnelError::Internal(error.to_string())),
        }
    }
}
