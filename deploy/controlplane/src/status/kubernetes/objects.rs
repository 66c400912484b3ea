//! Writes conditions, addresses, parents and ancestors, on the replica that leads.
//!
//! Each write reads the object first, so that other controllers' entries and the times of
//! our own survive, and is made only if something differs. Whoever begins to lead looks at
//! every object once, and again from time to time: that repairs what others damaged, and
//! takes away what a predecessor left.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::merge::{Change, merge};
use super::resources::Resources;
use super::{Shared, rfc3339_now};
use crate::kubernetes::apply::{Failure, Pace, RequestError, backoff, request};
use crate::kubernetes::{STATUS_MANAGER, explain};
use crate::model::{Kind, ObjectRef};

/// Objects that are written about at the same time.
const CONCURRENCY: usize = 8;
/// Requests a second, and at once after a pause.
const RATE: u32 = 100;
const BURST: u32 = 200;
/// How often a write is tried again at once because the object had changed meanwhile.
const MAX_CONFLICTS: u32 = 5;
/// Objects in one answer to a list.
const PAGE: u32 = 200;
/// How often every object is looked at.
const RESYNC: Duration = Duration::from_secs(600);
/// A kind that came since the last look is looked for after so long.
const REDISCOVER: Duration = Duration::from_secs(10);
/// What is refused is tried again that late: only a person can change that.
const REFUSED: Duration = Duration::from_secs(60);
/// Of failures of one kind one is told in so long.
const COMPLAIN: Duration = Duration::from_secs(60);

/// Writes while `leading` says so; ends when nobody can say so any more.
pub(super) async fn run(client: Client, shared: Arc<Shared>, mut leading: watch::Receiver<bool>) {
    loop {
        // Without somebody who could take it back, it does not count.
        if leading.wait_for(|leads| *leads).await.is_err() || leading.has_changed().is_err() {
            return;
        }
        shared.metrics.leads.set(1);
        // Some annotations are the leader's to remove.
        shared.written.notify_one();
        let mut stopped = leading.clone();
        let lead = Lead::new(client.clone(), shared.clone());
        tokio::select! {
            never = lead.run() => match never {},
            _ = stopped.wait_for(|leading| !*leading) => {}
        }
        shared.metrics.leads.set(0);
        shared.metrics.objects_queued.set(0);
        let mut state = shared.state.lock();
        state.leading = false;
        state.objects = Default::default();
    }
}

/// One term as the leader.
struct Lead {
    client: Client,
    shared: Arc<Shared>,
    pace: Pace,
    resources: Resources,
    complained: BTreeMap<Kind, Instant>,
}

impl Lead {
    fn new(client: Client, shared: Arc<Shared>) -> Self {
        Self {
            client,
            shared,
            pace: Pace::new(RATE, BURST),
            resources: Resources::default(),
            complained: BTreeMap::new(),
        }
    }

    async fn run(mut self) -> std::convert::Infallible {
        while !self.shared.state.lock().filled {
            self.shared.objects_changed.notified().await;
        }
        // From here on changes are noted, and what was before is looked at.
        self.shared.state.lock().leading = true;
        let mut resync = Instant::now();
        loop {
            if Instant::now() >= resync {
                resync = Instant::now() + self.resync().await;
            }
            self.write_until(resync).await;
        }
    }

    /// Writes what there is to write until then, or until a kind turns up that is not known.
    async fn write_until(&mut self, end: Instant) {
        let shared = self.shared.clone();
        let mut running = FuturesUnordered::new();
        let mut unknown = false;
        let mut end = end;
        loop {
            let mut due = None;
            while running.len() < CONCURRENCY && Instant::now() < end {
                match shared.next_object() {
                    Ok(object) => match self.resources.get(object.kind) {
                        Some(resource) => {
                            let write = Write {
                                client: &self.client,
                                shared: &shared,
                                pace: &self.pace,
                                resource,
                            };
                            running.push(write.run(object));
                        }
                        None => {
                            unknown = true;
                            let mut state = shared.state.lock();
                            state
                                .objects
                                .failed(&object, Some(REDISCOVER), Instant::now());
                        }
                    },
                    Err(next) => {
                        due = next;
                        break;
                    }
                }
            }
            if unknown {
                end = end.min(Instant::now() + REDISCOVER);
            }
            if running.is_empty() && Instant::now() >= end {
                break;
            }
            let wake = due.map_or(end, |due| due.min(end)).max(Instant::now());
            tokio::select! {
                Some((object, result)) = running.next() => {
                    finish(&shared, &mut self.complained, &object, result);
                }
                () = shared.objects_changed.notified(), if running.len() < CONCURRENCY => {}
                () = sleep_until(wake), if running.is_empty() || due.is_some_and(|due| due < end) => {}
            }
        }
        drop(running);
        if unknown {
            self.discover().await;
        }
    }

    async fn discover(&mut self) -> bool {
        match Resources::discover(&self.client).await {
            Ok(found) => self.resources = found,
            Err(error) => {
                tracing::warn!("which kinds have a status is not known: {error}");
                return false;
            }
        }
        true
    }

    /// Looks at every object, and notes those that do not say what they should. Says when to
    /// do so again.
    async fn resync(&mut self) -> Duration {
        if !self.discover().await {
            return backoff(6);
        }
        let mut complete = true;
        let all: Vec<_> = self
            .resources
            .iter()
            .map(|(kind, of)| (kind, of.clone()))
            .collect();
        for (kind, resource) in all {
            if let Err(error) = self.look_at(kind, &resource).await {
                complete = false;
                complain(&mut self.complained, "list", kind, &error);
            }
        }
        match complete {
            true => RESYNC.mul_f64(rand::random_range(0.9..1.1)),
            false => REFUSED,
        }
    }

    async fn look_at(&self, kind: Kind, resource: &ApiResource) -> Result<(), RequestError> {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), resource);
        let mut params = ListParams::default().limit(PAGE);
        loop {
            self.pace.wait().await;
            let page = request(api.list(&params)).await?;
            let now = rfc3339_now();
            for object in page.items {
                let reference = ObjectRef {
                    kind,
                    namespace: object
                        .metadata
                        .namespace
                        .as_deref()
                        .unwrap_or_default()
                        .into(),
                    name: object.metadata.name.as_deref().unwrap_or_default().into(),
                };
                if self.changes(&reference, object, &now).is_some() {
                    self.shared.state.lock().objects.add(reference);
                }
            }
            match page.metadata.continue_ {
                Some(next) if !next.is_empty() => params = params.continue_token(&next),
                _ => return Ok(()),
            }
        }
    }

    fn changes(&self, reference: &ObjectRef, object: DynamicObject, now: &str) -> Option<Change> {
        change(&self.shared, reference, &to_value(object)?, now)
    }
}

/// What has to be written about an object as it is now.
fn change(shared: &Shared, reference: &ObjectRef, object: &Value, now: &str) -> Option<Change> {
    let wanted = shared.wanted(reference);
    if let Some(wanted) = &wanted
        && object["metadata"]["uid"] != *wanted.uid
    {
        // Another object of the same name: what is to be told of it comes with it.
        return None;
    }
    merge(reference.kind, object, wanted.as_deref(), now)
}

fn to_value(object: DynamicObject) -> Option<Value> {
    serde_json::to_value(object).ok()
}

/// Writing about one object.
struct Write<'a> {
    client: &'a Client,
    shared: &'a Shared,
    pace: &'a Pace,
    resource: &'a ApiResource,
}

impl Write<'_> {
    async fn run(self, object: ObjectRef) -> (ObjectRef, Result<(), RequestError>) {
        let result = self.write(&object).await;
        (object, result)
    }

    async fn write(&self, reference: &ObjectRef) -> Result<(), RequestError> {
        let client = self.client.clone();
        let api: Api<DynamicObject> = match &*reference.namespace {
            "" => Api::all_with(client, self.resource),
            namespace => Api::namespaced_with(client, namespace, self.resource),
        };
        let mut conflicts = 0;
        loop {
            self.pace.wait().await;
            let Some(object) = request(api.get_opt(&reference.name)).await? else {
                return Ok(());
            };
            let Some(object) = to_value(object) else {
                return Ok(());
            };
            let Some(change) = change(self.shared, reference, &object, &rfc3339_now()) else {
                return Ok(());
            };
            self.pace.wait().await;
            match self.send(&api, reference, object, change).await {
                Ok(()) => return Ok(()),
                Err(error) if error.failure() == Failure::Gone => return Ok(()),
                Err(error) if error.failure() == Failure::Conflict && conflicts < MAX_CONFLICTS => {
                    conflicts += 1;
                    sleep(backoff(conflicts) / 10).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn send(
        &self,
        api: &Api<DynamicObject>,
        reference: &ObjectRef,
        mut object: Value,
        change: Change,
    ) -> Result<(), RequestError> {
        match change {
            Change::Apply(status) => {
                let patch = json!({
                    "apiVersion": self.resource.api_version,
                    "kind": self.resource.kind,
                    // An object that was made anew is another.
                    "metadata": {"uid": object["metadata"]["uid"]},
                    "status": status,
                });
                let params = PatchParams::apply(STATUS_MANAGER).force();
                let patch = Patch::Apply(patch);
                request(api.patch_status(&reference.name, &params, &patch)).await?;
            }
            Change::Replace(status) => {
                object["status"] = status;
                // With its resourceVersion: this version is replaced and no other.
                let object: DynamicObject =
                    serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
                let params = PostParams {
                    field_manager: Some(STATUS_MANAGER.into()),
                    ..PostParams::default()
                };
                request(api.replace_status(&reference.name, &params, &object)).await?;
            }
        }
        self.shared.metrics.written.inc(reference.kind.as_str());
        tracing::debug!(object = %reference, "status written");
        Ok(())
    }
}

fn finish(
    shared: &Shared,
    complained: &mut BTreeMap<Kind, Instant>,
    object: &ObjectRef,
    result: Result<(), RequestError>,
) {
    let mut state = shared.state.lock();
    let Err(error) = result else {
        state.objects.done(object);
        return;
    };
    let pause = match error.failure() {
        Failure::Refused => Some(REFUSED),
        Failure::Later(pause) => pause,
        Failure::Conflict | Failure::Gone => None,
    };
    state.objects.failed(object, pause, Instant::now());
    drop(state);
    shared.metrics.failed.inc(object.kind.as_str());
    complain(complained, "update", object.kind, &error);
    tracing::debug!(%object, "status: {error}");
}

fn complain(told: &mut BTreeMap<Kind, Instant>, verb: &str, kind: Kind, error: &RequestError) {
    let now = Instant::now();
    if told.get(&kind).is_some_and(|last| now < *last + COMPLAIN) {
        return;
    }
    told.insert(kind, now);
    let what = format!("the status of {kind}");
    let reason = match error {
        RequestError::Api(error) => explain(verb, &what, error),
        error => error.to_string(),
    };
    tracing::warn!("{reason}; it is tried again");
}
