//! Annotates captured pods, and takes the annotation away from those that are so no more.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::{Api, Client};
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::{Mark, Shared};
use crate::kubernetes::apply::{Failure, Pace, RequestError, request};
use crate::kubernetes::{STATUS_MANAGER, explain};
use crate::status::{REDIRECTION, REDIRECTION_ENABLED};

/// Pods that are annotated at the same time.
const CONCURRENCY: usize = 16;
/// Requests a second, and at once after a pause: a namespace that joins waits for them.
const RATE: u32 = 200;
const BURST: u32 = 400;
/// What is refused is tried again that late.
const REFUSED: Duration = Duration::from_secs(15);
/// Of failures one is told in so long.
const COMPLAIN: Duration = Duration::from_secs(30);

/// Annotates for as long as it is polled.
pub(super) async fn run(client: Client, shared: Arc<Shared>) {
    let pace = Pace::new(RATE, BURST);
    let mut running = FuturesUnordered::new();
    let mut complained: Option<Instant> = None;
    loop {
        let mut due = None;
        while running.len() < CONCURRENCY {
            match shared.next_pod() {
                Ok((uid, Some(mark))) => running.push(annotate(&client, &pace, uid, mark)),
                // Nobody wants it any more.
                Ok((uid, None)) => shared.state.lock().pods.done(&uid),
                Err(next) => {
                    due = next;
                    break;
                }
            }
        }
        let wake = due.unwrap_or_else(Instant::now);
        tokio::select! {
            Some((uid, mark, result)) = running.next() => {
                if let Err(error) = &result
                    && complained.is_none_or(|last| last.elapsed() > COMPLAIN)
                {
                    complained = Some(Instant::now());
                    complain(&mark, error);
                }
                finish(&shared, uid, &mark, result);
            }
            () = shared.pods_changed.notified(), if running.len() < CONCURRENCY => {}
            () = sleep_until(wake), if due.is_some() => {}
        }
    }
}

async fn annotate(
    client: &Client,
    pace: &Pace,
    uid: Arc<str>,
    mark: Mark,
) -> (Arc<str>, Mark, Result<(), RequestError>) {
    pace.wait().await;
    let api: Api<PartialObjectMeta<Pod>> = Api::namespaced(client.clone(), &mark.namespace);
    let value = mark.enable.then_some(REDIRECTION_ENABLED);
    // With the uid: another pod of the same name is refused.
    let patch =
        Patch::Merge(json!({"metadata": {"uid": &*uid, "annotations": {REDIRECTION: value}}}));
    let params = PatchParams {
        field_manager: Some(STATUS_MANAGER.into()),
        ..PatchParams::default()
    };
    let answer = request(api.patch(&mark.name, &params, &patch)).await;
    let result = answer.map(|_| ());
    (uid, mark, result)
}

pub(super) fn finish(
    shared: &Shared,
    uid: Arc<str>,
    mark: &Mark,
    result: Result<(), RequestError>,
) {
    match &result {
        Ok(()) => shared.metrics.written.inc("Pod"),
        Err(_) => shared.metrics.failed.inc("Pod"),
    }
    let mut state = shared.state.lock();
    match result.map_err(|error| error.failure()) {
        Ok(()) => {
            state.pods.done(&uid);
            if mark.enable {
                state.confirmed.insert((mark.namespace.clone(), uid));
                shared.written.notify_one();
            }
        }
        // That pod is no more; the watch will say so.
        Err(Failure::Gone) => state.pods.done(&uid),
        // Somebody else has written in this moment, or another pod has the name. If it is
        // that, the watch takes the mark away, and nobody tries again.
        Err(Failure::Conflict) => {
            state.pods.failed(&uid, None, Instant::now());
        }
        Err(Failure::Refused) => {
            state.pods.failed(&uid, Some(REFUSED), Instant::now());
        }
        Err(Failure::Later(pause)) => {
            state.pods.failed(&uid, pause, Instant::now());
        }
    }
}

fn complain(mark: &Mark, error: &RequestError) {
    let reason = match error {
        RequestError::Api(error) => explain("patch", "pods", error),
        error => error.to_string(),
    };
    let Mark {
        namespace, name, ..
    } = mark;
    tracing::warn!(
        "pod {namespace}/{name} cannot be annotated as captured, so that clients do not use mTLS with it yet: {reason}"
    );
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    /// Nobody but us knows of such a pod: given up, it would never say HBONE.
    #[tokio::test(start_paused = true)]
    async fn a_conflict_is_tried_again_for_as_long_as_the_mark_stands() {
        let shared = Shared::default();
        let uid: Arc<str> = "u".into();
        let mark = Mark {
            namespace: "a".into(),
            name: "p".into(),
            enable: true,
        };
        let conflict = || {
            let status = Status::failure("another", "Conflict").with_code(409);
            Err(kube::Error::Api(status.boxed()).into())
        };
        {
            let mut state = shared.state.lock();
            state.marks.insert(uid.clone(), mark.clone());
            state.pods.add(uid.clone());
        }
        for _ in 0..3 {
            let (taken, known) = shared.next_pod().expect("to be tried");
            assert_eq!((&taken, known.as_ref()), (&uid, Some(&mark)));
            finish(&shared, taken, &mark, conflict());
            let due = shared.next_pod().expect_err("not at once").expect("later");
            sleep_until(due).await;
        }
        // The watch has said that this pod is no more.
        shared.state.lock().marks.clear();
        assert_eq!(shared.next_pod().expect("queued still").1, None);
        shared.state.lock().pods.done(&uid);
        assert_eq!(shared.next_pod().expect_err("nothing is left"), None);
        // Of what is gone nothing is left to be done.
        shared.state.lock().pods.add(uid.clone());
        let taken = shared.next_pod().expect("to be tried").0;
        let gone = Status::failure("gone", "NotFound").with_code(404);
        finish(
            &shared,
            taken,
            &mark,
            Err(kube::Error::Api(gone.boxed()).into()),
        );
        assert!(shared.state.lock().pods.is_empty());
    }
}
