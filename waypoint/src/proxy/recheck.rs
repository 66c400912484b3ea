//! What is under way when the policies change: a request that waits for its answer, a stream
//! (gRPC, server-sent events), an upgraded connection. What a policy does not allow any more is
//! ended, the rest is not touched. Connections that are not HTTP are asked about in
//! [`super::tcp`].
//!
//! Asked again are the DENY and ALLOW policies of the destination and of the endpoint, with the
//! request as it was when they allowed it. Tokens are not verified and external authorization is
//! not asked a second time: their answers were for that moment.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use adit_shared::policy::http::{HttpFields, HttpPolicySet, normalize};
use http::header::HOST;
use tokio::sync::futures::OwnedNotified;
use tokio::time::sleep;

use super::authorize::{Asked, Denied, authorize};
use super::destination::Target;
use super::exchange::Exchange;
use crate::state::View;
use crate::worker::Worker;

/// Changes that follow one another so closely are one to what is under way.
const PAUSE: Duration = Duration::from_millis(50);

/// Wakes what is under way on a worker after each change of the configuration.
pub async fn run(worker: Rc<Worker>) {
    let mut versions = worker.shared.state.subscribe();
    while versions.changed().await.is_ok() {
        sleep(PAUSE).await;
        versions.mark_unchanged();
        worker.changed.notify_waiters();
    }
}

/// Does `work` for a request, until it is done or a change of the policies denies what they have
/// allowed.
///
/// `work` is pinned where it was made: futures of requests are large, and one that is passed by
/// value is kept twice and copied in between.
///
/// # Errors
/// Which policy denies.
pub async fn unless_denied<T>(
    exchange: &Exchange,
    mut work: Pin<&mut impl Future<Output = T>>,
) -> Result<T, Denied> {
    let changed = &exchange.downstream.worker.changed;
    let mut waiting = pin!(changed.notified());
    poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(Ok(done));
        }
        // First, so that a change from here on wakes.
        while waiting.as_mut().poll(cx).is_ready() {
            waiting.set(changed.notified());
        }
        match exchange.judge_again() {
            Ok(()) => Poll::Pending,
            Err(denied) => Poll::Ready(Err(denied)),
        }
    })
    .await
}

/// The same for a body, which is polled and not awaited. Costs nothing until it has to wait.
#[derive(Default)]
pub struct Recheck(Option<Pin<Box<OwnedNotified>>>);

impl Recheck {
    /// Ready when a change of the policies denies what they have allowed.
    pub fn poll_denied(&mut self, exchange: &Exchange, cx: &mut Context<'_>) -> Poll<Denied> {
        let changed = &exchange.downstream.worker.changed;
        let new = || Box::pin(changed.clone().notified_owned());
        let waiting = self.0.get_or_insert_with(new);
        while waiting.as_mut().poll(cx).is_ready() {
            *waiting = new();
        }
        match exchange.judge_again() {
            Ok(()) => Poll::Pending,
            Err(denied) => Poll::Ready(denied),
        }
    }
}

/// How a request is judged.
#[derive(Clone, Copy)]
enum Form {
    /// As it came.
    Received,
    /// As it goes on.
    Sent,
}

impl Exchange {
    /// Asks the policies, if they may have changed since they were asked last.
    ///
    /// # Errors
    /// Which one denies.
    pub(super) fn judge_again(&self) -> Result<(), Denied> {
        let version = self.downstream.worker.shared.state.load().version();
        if self.judged.get() == version {
            return Ok(());
        }
        let (view, target) = self.downstream.target();
        self.judged.set(view.version());
        // A service that is gone has no policies any more; what is open goes on.
        let Some(target) = target else {
            return Ok(());
        };
        // What a change does not touch is the same value as before. The endpoint, and where a
        // consumer's route leads, may belong to another service, which is not.
        let same = match &target {
            Target::Service(port) => {
                let before = self.judged_by.replace(Some(port.clone()));
                before.is_some_and(|before| Arc::ptr_eq(&before, port))
            }
            Target::Workload { .. } => false,
        };
        let dialled = self.downstream.destination.dialled();
        if !same {
            self.judge(&view, target.policies(), dialled, Form::Received)?;
        }
        if let Some((service, number)) = self.consumer.as_deref()
            && let Some(port) = view.service(service).and_then(|of| of.port(*number))
        {
            let dialled = dialled.map(|address| SocketAddr::new(address.ip(), *number));
            self.judge(&view, &port.policies, dialled, Form::Sent)?;
        }
        let Some(workload) = &self.workload else {
            return Ok(());
        };
        let own = view.policies().for_workload(&workload.uid);
        self.judge(&view, &own, self.upstream_host, Form::Sent)
    }

    fn judge(
        &self,
        view: &View,
        policies: &HttpPolicySet,
        destination: Option<SocketAddr>,
        form: Form,
    ) -> Result<(), Denied> {
        if policies.is_empty() {
            return Ok(());
        }
        let mesh = view.mesh();
        let (headers, uri) = match form {
            Form::Received => (self.original.as_ref().unwrap_or(&self.headers), &self.uri),
            Form::Sent => (&self.headers, self.sent_uri.as_ref().unwrap_or(&self.uri)),
        };
        // It was a path when it was allowed; under another normalisation it may be none.
        let path = normalize(uri.path(), mesh.path_normalization);
        let path = path.map_err(|error| Denied {
            policy: None,
            error: error.to_string(),
        })?;
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        let caller = &self.downstream.caller;
        let asked = Asked {
            caller,
            destination: destination.unwrap_or(caller.peer),
            server_name: None,
            mesh,
        };
        let fields = HttpFields {
            method: self.method.as_str(),
            path: &path,
            query: uri.query(),
            host: host.unwrap_or_default(),
            headers,
            claims: self.claims.as_deref(),
        };
        authorize(policies, &asked.request(Some(fields)), &mesh.trust).map(|_| ())
    }
}
