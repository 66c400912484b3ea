//! HTTP to a port of a pod, through the API server (`pods/portforward` over a WebSocket).
//!
//! A connection is kept for the next request to the same port: commands that ask again and
//! again (`tap`) do not bother the API server each time.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::{self, FuturesUnordered};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::time::timeout;

use super::Kubernetes;
use crate::ztunnel::admin::MAX_ANSWER;

/// A dump of a large mesh is some ten megabytes, and a tap waits a while for news.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// What the kubelet has to say about a port comes at once, or it is nothing.
const REASON_DEADLINE: Duration = Duration::from_secs(1);
/// Pods that are asked at the same time.
const CONCURRENCY: usize = 16;

/// A port of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodPort {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Port, which may listen on loopback only.
    pub port: u16,
}

impl fmt::Display for PodPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "port {} of pod {}/{}",
            self.port, self.namespace, self.pod
        )
    }
}

/// A connection that a request can be sent on.
pub(super) struct Session {
    sender: SendRequest<Empty<Bytes>>,
    reason: Pin<Box<dyn Future<Output = Option<String>>>>,
}

impl Kubernetes {
    /// Sends a request without body.
    ///
    /// # Errors
    /// When the pod cannot be reached, in one sentence. Every status is an answer.
    pub fn http(
        &self,
        to: &PodPort,
        method: &Method,
        path: &str,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        self.block_on(self.request(to, method, path, ANSWER_DEADLINE))
    }

    /// Sends the same request to several, some at a time; answers in their order.
    pub fn http_to_all(
        &self,
        all: &[PodPort],
        method: &Method,
        path: &str,
    ) -> Vec<anyhow::Result<(StatusCode, Bytes)>> {
        let asked = all
            .iter()
            .map(|to| self.request(to, method, path, ANSWER_DEADLINE));
        self.block_on(stream::iter(asked).buffered(CONCURRENCY).collect())
    }

    /// Sends each its own request, all at once; answers in their order.
    pub fn http_each(
        &self,
        method: &Method,
        all: &[(PodPort, String)],
    ) -> Vec<anyhow::Result<(StatusCode, Bytes)>> {
        let asked = all
            .iter()
            .map(|(to, path)| self.request(to, method, path, ANSWER_DEADLINE));
        self.block_on(join_all(asked))
    }

    /// Sends the same request to several at once: which one answers first with success, else
    /// what the last says. An answer may take as long as `wait`.
    pub fn http_first(
        &self,
        all: &[PodPort],
        method: &Method,
        path: &str,
        wait: Duration,
    ) -> Option<(usize, anyhow::Result<(StatusCode, Bytes)>)> {
        let asked = all
            .iter()
            .enumerate()
            .map(|(index, to)| async move { (index, self.request(to, method, path, wait).await) });
        self.block_on(async {
            let mut asked: FuturesUnordered<_> = asked.collect();
            let mut last = None;
            while let Some(answer) = asked.next().await {
                let succeeded = matches!(&answer.1, Ok((status, _)) if status.is_success());
                last = Some(answer);
                if succeeded {
                    break;
                }
            }
            last
        })
    }

    async fn request(
        &self,
        to: &PodPort,
        method: &Method,
        path: &str,
        wait: Duration,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        // A connection that is reset takes the kubelet's reason with it, and one that was kept
        // may end under a request: what only reads is asked once more.
        let mut again = method.is_safe();
        loop {
            let mut session = self.session(to).await?;
            let answer = timeout(wait, exchange(&mut session.sender, to, method, path));
            let error = match answer.await {
                Ok(Ok(answer)) => {
                    self.0.sessions.borrow_mut().insert(to.clone(), session);
                    return Ok(answer);
                }
                Ok(Err(error)) => error,
                Err(_) => anyhow::bail!("{to}: no answer within {} s", wait.as_secs()),
            };
            match timeout(REASON_DEADLINE, session.reason)
                .await
                .ok()
                .flatten()
            {
                // The kubelet names namespaces, containers and address families here.
                Some(reason) if reason.contains("connection refused") => {
                    anyhow::bail!("nobody listens on {to}")
                }
                Some(reason) => anyhow::bail!("{to}: {}", reason.trim_end()),
                None if !again => return Err(error.context(to.to_string())),
                None => again = false,
            }
        }
    }

    /// The connection that was kept, unless it has ended since, or a new one.
    async fn session(&self, to: &PodPort) -> anyhow::Result<Session> {
        let kept = self.0.sessions.borrow_mut().remove(to);
        if let Some(mut kept) = kept
            && kept.sender.ready().await.is_ok()
        {
            return Ok(kept);
        }
        self.forward(to).await
    }

    async fn forward(&self, to: &PodPort) -> anyhow::Result<Session> {
        let pods: Api<Pod> = Api::namespaced(self.client().clone(), &to.namespace);
        let ports = [to.port];
        let what = || format!("forward {to}");
        let mut forwarder = self.call(what, pods.portforward(&to.pod, &ports)).await?;
        let stream = forwarder.take_stream(to.port);
        let stream = stream.context("the port was not forwarded")?;
        let reason = forwarder.take_error(to.port);
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .with_context(|| to.to_string())?;
        // Both end with the session: it holds the only sender.
        tokio::spawn(connection);
        tokio::spawn(forwarder.join());
        Ok(Session {
            sender,
            reason: match reason {
                Some(reason) => Box::pin(reason),
                None => Box::pin(std::future::ready(None)),
            },
        })
    }
}

async fn exchange(
    sender: &mut SendRequest<Empty<Bytes>>,
    to: &PodPort,
    method: &Method,
    path: &str,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        // Admin endpoints take no other name, so that no web page can use them.
        .header(header::HOST, format!("localhost:{}", to.port))
        .header(header::CONTENT_LENGTH, 0)
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok((status, body.to_bytes()))
}
