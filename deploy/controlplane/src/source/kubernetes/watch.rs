//! Follows one kind of objects.
//!
//! kube's watcher lists (in pages, or as a stream where the API server can), watches with
//! bookmarks, and lists again when its place in history is gone (410). Added here: pauses
//! after failures, giving up a list that stands still, and what failures mean.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use kube::api::{Api, DynamicObject};
use kube::core::Status;
use kube::core::metadata::PartialObjectMeta;
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, DefaultBackoff};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};

use super::kinds::Resource;
use super::merge::Event;
use super::object::{read, reference};
use crate::kubernetes::explain;

/// Objects in one answer to a list request.
const PAGE: u32 = 500;
/// A list of which nothing comes for this long is started anew.
const LIST_STALL: Duration = Duration::from_secs(60);
/// A watch that goes on where it was says so by its next event, which may be long in coming.
/// If it does not fail again within this time, which is longer than a connection takes, it
/// works.
const MENDED: Duration = Duration::from_secs(12);
/// Lists that become worthless within this time are made more and more slowly.
const GONE_AGAIN: Duration = Duration::from_secs(30);
/// A permission that is not needed is not asked for often.
const PERMISSION_RETRY: Duration = Duration::from_secs(300);
/// After so many refusals in a row to go on from where we were, the list is made anew.
const MAX_RESUMES: u32 = 5;

/// What a watch works with.
pub(super) struct Watch {
    pub(super) resource: &'static Resource,
    pub(super) version: &'static str,
    pub(super) client: kube::Client,
    pub(super) events: mpsc::Sender<Event>,
    /// Told when the API server says that there is no such resource.
    pub(super) rediscover: Arc<Notify>,
}

/// How the first list is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lists {
    /// As a stream of events: the API server needs no memory for it (Kubernetes 1.32).
    Streamed,
    /// In pages.
    Paged,
}

/// The pauses between attempts.
#[derive(Default)]
struct Pace {
    backoff: DefaultBackoff,
    /// When history was gone for the last time.
    gone: Option<Instant>,
}

impl Pace {
    fn next(&mut self) -> Duration {
        self.backoff.next().unwrap_or(LIST_STALL)
    }

    /// Once is nothing special; again and again is an API server that would be asked for
    /// everything without end.
    async fn gone(&mut self) {
        if self.is_gone_again() {
            sleep(self.next()).await;
        }
        self.gone = Some(Instant::now());
    }

    fn listed(&mut self) {
        if !self.is_gone_again() {
            self.backoff.reset();
        }
    }

    fn is_gone_again(&self) -> bool {
        self.gone.is_some_and(|at| at.elapsed() < GONE_AGAIN)
    }
}

enum Ended {
    /// With another list the same again.
    Anew(Lists),
    /// Nobody wants to know any more.
    Done,
}

impl Watch {
    /// Follows until aborted.
    pub(super) async fn run(self) {
        let mut lists = Lists::Streamed;
        let mut pace = Pace::default();
        loop {
            let (client, named) = (
                self.client.clone(),
                self.resource.api_resource(self.version),
            );
            let config = self.config(lists);
            let ended = if self.resource.metadata_only {
                let api = Api::<PartialObjectMeta<DynamicObject>>::all_with(client, &named);
                let stream = watcher::watcher(api, config);
                let stream = stream.map(|event| event.map(from_metadata));
                self.follow(stream, lists, &mut pace).await
            } else {
                let api = Api::<DynamicObject>::all_with(client, &named);
                let stream = watcher::watcher(api, config);
                self.follow(stream, lists, &mut pace).await
            };
            match ended {
                Ended::Anew(next) => lists = next,
                Ended::Done => return,
            }
        }
    }

    fn config(&self, lists: Lists) -> watcher::Config {
        let config = watcher::Config {
            field_selector: self.resource.fields.map(str::to_owned),
            ..watcher::Config::default()
        };
        match lists {
            Lists::Streamed => config.streaming_lists(),
            Lists::Paged => config.page_size(PAGE),
        }
    }

    async fn follow(
        &self,
        stream: impl Stream<Item = watcher::Result<watcher::Event<DynamicObject>>>,
        lists: Lists,
        pace: &mut Pace,
    ) -> Ended {
        let mut stream = pin!(stream);
        let mut listing = Some(HashSet::new());
        let mut failing = false;
        let mut refusals = 0;
        loop {
            let patience = match (&listing, failing) {
                (Some(_), _) => LIST_STALL,
                (None, true) => MENDED,
                // A watch of which nothing changes is silent.
                (None, false) => Duration::MAX,
            };
            let next = match timeout(patience, stream.next()).await {
                Ok(next) => next,
                Err(_) => {
                    let kind = self.resource.kind;
                    let (event, anew) = match listing {
                        Some(_) => {
                            let reason = format!("nothing came of the list for {LIST_STALL:?}");
                            (Event::Failing { kind, reason }, true)
                        }
                        None => (Event::Works(kind), false),
                    };
                    if self.events.send(event).await.is_err() {
                        return Ended::Done;
                    }
                    if anew {
                        return Ended::Anew(Lists::Paged);
                    }
                    failing = false;
                    refusals = 0;
                    continue;
                }
            };
            let event = match next {
                // kube's watchers do not end.
                None => return Ended::Anew(lists),
                Some(Err(error)) => {
                    if lists == Lists::Streamed && refuses_streams(&error) {
                        return Ended::Anew(Lists::Paged);
                    }
                    if is_gone(&error) {
                        tracing::debug!(resource = self.resource.plural, %error, "listing again");
                        pace.gone().await;
                        match is_start(&error) {
                            true => return Ended::Anew(lists),
                            // The watcher lists again by itself.
                            false => continue,
                        }
                    }
                    failing = true;
                    refusals += 1;
                    if !self.failed(&error).await {
                        return Ended::Done;
                    }
                    let pause = match self.resource.optional && is_forbidden(&error) {
                        true => PERMISSION_RETRY,
                        false => pace.next(),
                    };
                    sleep(pause).await;
                    if listing.is_none() && refusals >= MAX_RESUMES && is_answer(&error) {
                        return Ended::Anew(lists);
                    }
                    continue;
                }
                Some(Ok(event)) => event,
            };
            let event = match event {
                watcher::Event::Init => {
                    listing = Some(HashSet::new());
                    continue;
                }
                watcher::Event::InitApply(object) => {
                    let Some(seen) = read(self.resource, self.version, object) else {
                        continue;
                    };
                    if let Some(present) = &mut listing {
                        present.insert(seen.reference.clone());
                    }
                    Event::Applied(seen)
                }
                watcher::Event::InitDone => {
                    failing = false;
                    refusals = 0;
                    pace.listed();
                    Event::Listed {
                        kind: self.resource.kind,
                        present: listing.take().unwrap_or_default(),
                    }
                }
                watcher::Event::Apply(object) => match read(self.resource, self.version, object) {
                    Some(seen) => Event::Applied(seen),
                    None => continue,
                },
                watcher::Event::Delete(object) => {
                    match reference(self.resource, &object.metadata) {
                        Some(reference) => Event::Deleted(reference),
                        None => continue,
                    }
                }
            };
            if listing.is_none() && std::mem::take(&mut failing) {
                refusals = 0;
                let works = Event::Works(self.resource.kind);
                if self.events.send(works).await.is_err() {
                    return Ended::Done;
                }
            }
            if self.events.send(event).await.is_err() {
                return Ended::Done;
            }
        }
    }

    /// Reports a failure; false if nobody listens any more.
    async fn failed(&self, error: &watcher::Error) -> bool {
        let resource = self.resource.qualified();
        let (verb, cause) = cause(error);
        if status(error).is_some_and(Status::is_not_found) {
            self.rediscover.notify_one();
        }
        let reason = match cause {
            Some(cause) => explain(verb, &resource, cause),
            None => format!("cannot {verb} {resource}: {error}"),
        };
        let kind = self.resource.kind;
        let event = match self.resource.optional && is_forbidden(error) {
            true => Event::Unpermitted { kind, reason },
            false => Event::Failing { kind, reason },
        };
        self.events.send(event).await.is_ok()
    }
}

fn from_metadata(
    event: watcher::Event<PartialObjectMeta<DynamicObject>>,
) -> watcher::Event<DynamicObject> {
    let full = |partial: PartialObjectMeta<DynamicObject>| DynamicObject {
        types: None,
        metadata: partial.metadata,
        data: serde_json::Value::Null,
    };
    match event {
        watcher::Event::Apply(object) => watcher::Event::Apply(full(object)),
        watcher::Event::Delete(object) => watcher::Event::Delete(full(object)),
        watcher::Event::Init => watcher::Event::Init,
        watcher::Event::InitApply(object) => watcher::Event::InitApply(full(object)),
        watcher::Event::InitDone => watcher::Event::InitDone,
    }
}

/// The verb that failed and, where there is one, the client's error.
fn cause(error: &watcher::Error) -> (&'static str, Option<&kube::Error>) {
    match error {
        watcher::Error::InitialListFailed(error) => ("list", Some(error)),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            ("watch", Some(error))
        }
        watcher::Error::WatchError(_) => ("watch", None),
        watcher::Error::NoResourceVersion => ("list", None),
    }
}

fn status(error: &watcher::Error) -> Option<&Status> {
    match error {
        watcher::Error::WatchError(status) => Some(status),
        error => match cause(error).1 {
            Some(kube::Error::Api(status)) => Some(status),
            _ => None,
        },
    }
}

/// The API server answered; it is not that it could not be reached.
fn is_answer(error: &watcher::Error) -> bool {
    status(error).is_some()
}

/// The request itself was answered so, not a stream that had begun.
fn is_start(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(_))
}

fn is_forbidden(error: &watcher::Error) -> bool {
    status(error).is_some_and(|status| status.code == 403)
}

/// Our place in the history is not there any more; no fault of anybody.
fn is_gone(error: &watcher::Error) -> bool {
    status(error).is_some_and(|status| {
        status.code == 410 || matches!(status.reason.as_str(), "Expired" | "Gone")
    })
}

/// `sendInitialEvents` is refused as invalid where the feature is off, and as a bad request
/// by what only pretends to be an API server.
fn refuses_streams(error: &watcher::Error) -> bool {
    is_start(error) && status(error).is_some_and(|status| matches!(status.code, 400 | 422))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, reason: &str) -> kube::Error {
        kube::Error::Api(Status::failure("no", reason).with_code(code).boxed())
    }

    #[test]
    fn failures_are_told_apart() {
        let start = |code, reason| watcher::Error::WatchStartFailed(answer(code, reason));
        let event = |code, reason: &str| {
            watcher::Error::WatchError(Status::failure("no", reason).with_code(code).boxed())
        };
        assert!(refuses_streams(&start(422, "Invalid")));
        assert!(!refuses_streams(&start(403, "Forbidden")));
        assert!(!refuses_streams(&event(422, "Invalid")));
        assert!(is_gone(&start(410, "Gone")) && is_gone(&event(410, "Expired")));
        assert!(!is_gone(&start(504, "Timeout")));
        assert!(is_answer(&start(504, "Timeout")));
        let broken = watcher::Error::WatchFailed(kube::Error::LinesCodecMaxLineLengthExceeded);
        assert!(!is_answer(&broken));
    }
}
