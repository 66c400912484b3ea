//! Keeps what is generated as it should be.
//!
//! Watches bring names of Gateways into a queue: of those that changed, of those whose
//! objects changed, and of those that a ConfigMap or a class concerns; and names of classes,
//! which may ask for what is not there. Each is then looked at as a whole, from what the API server has at that moment. Of everything but the
//! Gateway itself only metadata is watched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::DynamicObject;
use kube::core::PartialObjectMeta;
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, DefaultBackoff, watcher};
use kube::{Api, Client, Resource};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::class::{self, GatewayApi};
use super::generate::{MANAGED, MESH_CONTROLLER};
use super::parameters::DEFAULTS_FOR_CLASS;
use super::reconcile::{ProvisionError, reconcile};
use super::settings::WaypointSettings;
use crate::compile::l7::WAYPOINT_CLASS;
use crate::kubernetes::apply::{Failure, Pace, RequestError};
use crate::kubernetes::queue::Queue;
use crate::kubernetes::{Kubernetes, explain};
use crate::model::{Kind, ObjectRef};
use crate::status::Condition;
use crate::status::kubernetes::Faults;

/// Gateways that are looked at at the same time.
const CONCURRENCY: usize = 4;
/// Requests a second, and at once after a pause.
const RATE: u32 = 40;
const BURST: u32 = 80;
/// How often the Gateway API is looked for while it is not there.
const LOOK: Duration = Duration::from_secs(10);
/// How often it is looked at while it is there, with all Gateways.
const RESYNC: Duration = Duration::from_secs(600);
/// What is refused is tried again that late.
const REFUSED: Duration = Duration::from_secs(30);

/// Namespace and name.
pub(super) type Key = (Arc<str>, Arc<str>);

/// Runs the waypoints, on the replica that leads.
pub struct Provisioner {
    client: Client,
    settings: Arc<WaypointSettings>,
    faults: Faults,
}

impl Provisioner {
    /// A provisioner that has not begun.
    pub fn new(kubernetes: &Kubernetes, settings: WaypointSettings, faults: Faults) -> Self {
        Self {
            client: kubernetes.client.clone(),
            settings: Arc::new(settings),
            faults,
        }
    }

    /// Works while `leading` says so; ends when nobody can say so any more. Dropping it is
    /// a good way to stop it.
    pub async fn run(self, mut leading: watch::Receiver<bool>) {
        loop {
            // Without somebody who could take it back, it does not count.
            if leading.wait_for(|leads| *leads).await.is_err() || leading.has_changed().is_err() {
                return;
            }
            let mut stopped = leading.clone();
            tokio::select! {
                never = self.lead() => match never {},
                _ = stopped.wait_for(|leading| !*leading) => {}
            }
            self.faults.clear();
        }
    }

    async fn lead(&self) -> std::convert::Infallible {
        let mut told = None;
        loop {
            let api = match GatewayApi::look(&self.client).await {
                Ok(api) => api,
                Err(error) => {
                    tracing::warn!("whether the Gateway API is installed is not known: {error}");
                    sleep(LOOK).await;
                    continue;
                }
            };
            self.faults
                .set_findings(api.finding().into_iter().collect());
            let is_news = told.as_ref() != Some(&api);
            if is_news {
                match api {
                    GatewayApi::Present(_) => tracing::info!("{api}"),
                    _ => tracing::warn!("{api}"),
                }
                told = Some(api.clone());
            }
            if api == GatewayApi::Absent {
                sleep(LOOK).await;
                continue;
            }
            let class = ObjectRef {
                kind: Kind::GatewayClass,
                namespace: "".into(),
                name: WAYPOINT_CLASS.into(),
            };
            // What is found about the class later stays beside it.
            if is_news {
                self.faults.set(class, vec![api.condition()]);
            }
            self.term(api).run(Instant::now() + RESYNC).await;
        }
    }

    fn term(&self, api: GatewayApi) -> Term {
        Term(Arc::new(Shared {
            api,
            client: self.client.clone(),
            settings: self.settings.clone(),
            faults: self.faults.clone(),
            pace: Pace::new(RATE, BURST),
            state: Mutex::default(),
            changed: Notify::new(),
        }))
    }
}

/// What the watches and the work share.
pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) settings: Arc<WaypointSettings>,
    api: GatewayApi,
    faults: Faults,
    pub(super) pace: Pace,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    queue: Queue<ObjectRef>,
    /// The Gateways that waypoints are run for, and the classes that name a ConfigMap.
    known: BTreeMap<ObjectRef, Known>,
    /// ConfigMaps that were overlays of a class when they were seen last.
    defaults: BTreeSet<Key>,
    /// The class of waypoints is to be looked at.
    class: bool,
}

/// What a Gateway or a class depends on besides itself.
pub(super) struct Known {
    /// The class, which may be it.
    pub(super) class: Arc<str>,
    /// The ConfigMaps that are named.
    pub(super) parameters: Vec<Key>,
}

impl Shared {
    /// A waypoint is run for a Gateway, or none is.
    pub(super) fn know(&self, object: &ObjectRef, known: Option<Known>) {
        let all = &mut self.state.lock().known;
        match known {
            Some(known) => all.insert(object.clone(), known),
            None => all.remove(object),
        };
    }

    fn add(&self, kind: Kind, (namespace, name): Key) {
        self.state.lock().queue.add(ObjectRef {
            kind,
            namespace,
            name,
        });
        self.changed.notify_one();
    }

    fn add_all(&self, concerns: impl Fn(&Known) -> bool) {
        let mut state = self.state.lock();
        let state = &mut *state;
        for (object, _) in state.known.iter().filter(|(_, known)| concerns(known)) {
            state.queue.add(object.clone());
        }
        self.changed.notify_one();
    }
}

/// Work for some time; then all of it begins anew, which repairs whatever was missed.
struct Term(Arc<Shared>);

impl Term {
    async fn run(self, end: Instant) {
        let shared = &self.0;
        // Ends with this.
        let mut watches = JoinSet::new();
        self.watch(&mut watches);
        shared.state.lock().class = true;
        let mut running = FuturesUnordered::new();
        let mut class_at = Instant::now();
        while Instant::now() < end {
            if Instant::now() >= class_at && std::mem::take(&mut shared.state.lock().class) {
                shared.pace.wait().await;
                if let Err(error) = class::ensure(&shared.client).await {
                    tell("patch", "gatewayclasses.gateway.networking.k8s.io", &error);
                    class_at = Instant::now() + LOOK;
                    shared.state.lock().class = true;
                }
            }
            let mut due = shared.state.lock().class.then_some(class_at);
            while running.len() < CONCURRENCY {
                let mut state = shared.state.lock();
                match state.queue.take(Instant::now()) {
                    Some(object) => running.push(reconcile(shared.clone(), object)),
                    None => {
                        due = due.into_iter().chain(state.queue.next()).min();
                        break;
                    }
                }
            }
            let wake = due.map_or(end, |due| due.min(end));
            tokio::select! {
                Some((object, result)) = running.next() => finish(shared, object, result),
                () = shared.changed.notified(), if running.len() < CONCURRENCY => {}
                () = sleep_until(wake) => {}
            }
        }
        while let Some((object, result)) = running.next().await {
            finish(shared, object, result);
        }
    }

    fn watch(&self, watches: &mut JoinSet<()>) {
        let client = &self.0.client;
        let shared = || self.0.clone();
        let gateways = class::resource("Gateway", "gateways");
        let classes = class::resource("GatewayClass", "gatewayclasses");
        watches.spawn(follow(
            shared(),
            "gateways.gateway.networking.k8s.io",
            Api::<PartialObjectMeta<DynamicObject>>::all_with(client.clone(), &gateways),
            watcher::Config::default(),
            |shared, seen| {
                if let Seen::Object(meta) = seen {
                    shared.add(Kind::Gateway, key_of(meta));
                }
            },
        ));
        watches.spawn(follow(
            shared(),
            "gatewayclasses.gateway.networking.k8s.io",
            Api::<PartialObjectMeta<DynamicObject>>::all_with(client.clone(), &classes),
            watcher::Config::default(),
            |shared, seen| {
                if let Seen::Object(meta) = seen {
                    let key = key_of(meta);
                    shared.add_all(|known| known.class == key.1);
                    shared.add(Kind::GatewayClass, key);
                    if meta.name.as_deref() == Some(WAYPOINT_CLASS) {
                        shared.state.lock().class = true;
                        shared.changed.notify_one();
                    }
                }
            },
        ));
        watches.spawn(follow(
            shared(),
            "configmaps",
            Api::<PartialObjectMeta<ConfigMap>>::all(client.clone()),
            watcher::Config::default(),
            config_map_seen,
        ));
        watches.spawn(owned::<ServiceAccount>(shared(), "serviceaccounts"));
        watches.spawn(owned::<Service>(shared(), "services"));
        watches.spawn(owned::<Deployment>(shared(), "deployments.apps"));
        watches.spawn(owned::<HorizontalPodAutoscaler>(
            shared(),
            "horizontalpodautoscalers.autoscaling",
        ));
        watches.spawn(owned::<PodDisruptionBudget>(
            shared(),
            "poddisruptionbudgets.policy",
        ));
    }
}

/// Follows what was generated, of one kind.
fn owned<K>(shared: Arc<Shared>, what: &'static str) -> impl Future<Output = ()> + Send
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + Send + 'static,
{
    let api = Api::<PartialObjectMeta<K>>::all(shared.client.clone());
    let config = watcher::Config::default().labels(&format!("{MANAGED}={MESH_CONTROLLER}"));
    follow(shared, what, api, config, |shared, seen| match seen {
        Seen::Object(meta) => {
            let owners = meta.owner_references.iter().flatten();
            for owner in owners.filter(|owner| owner.kind == "Gateway") {
                let namespace = meta.namespace.as_deref().unwrap_or_default();
                shared.add(
                    Kind::Gateway,
                    (namespace.into(), owner.name.as_str().into()),
                );
            }
        }
        // What went while nobody looked is not told.
        Seen::All => shared.add_all(|_| true),
    })
}

fn config_map_seen(shared: &Shared, seen: Seen<'_>) {
    let Seen::Object(meta) = seen else {
        return;
    };
    let key = key_of(meta);
    shared.add_all(|known| known.parameters.contains(&key));
    if *key.0 != *shared.settings.root_namespace {
        return;
    }
    let labels = meta.labels.as_ref();
    let is_default = labels.is_some_and(|labels| labels.contains_key(DEFAULTS_FOR_CLASS));
    let was_default = {
        let mut state = shared.state.lock();
        match is_default {
            true => !state.defaults.insert(key),
            false => state.defaults.remove(&key),
        }
    };
    if is_default || was_default {
        shared.add_all(|_| true);
    }
}

/// What a watch tells.
enum Seen<'a> {
    /// An object came, changed or went.
    Object(&'a ObjectMeta),
    /// All that there are have been told.
    All,
}

/// What tells one version of an object from the next, as far as we care.
#[derive(PartialEq, Eq)]
struct Version {
    uid: Option<String>,
    generation: Option<i64>,
    resource_version: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

impl Version {
    fn of(meta: &ObjectMeta) -> Self {
        Self {
            uid: meta.uid.clone(),
            generation: meta.generation,
            // Without a generation every version may differ in what it specifies.
            resource_version: match meta.generation {
                Some(_) => None,
                None => meta.resource_version.clone(),
            },
            labels: meta.labels.clone(),
            annotations: meta.annotations.clone(),
        }
    }
}

async fn follow<K>(
    shared: Arc<Shared>,
    what: &'static str,
    api: Api<PartialObjectMeta<K>>,
    config: watcher::Config,
    seen: impl Fn(&Shared, Seen<'_>) + Send,
) where
    K: Resource + Clone + std::fmt::Debug + Send + 'static,
{
    let mut stream = std::pin::pin!(watcher(api, config));
    let mut versions: BTreeMap<Key, Version> = BTreeMap::new();
    let mut listed = BTreeSet::new();
    let mut backoff = DefaultBackoff::default();
    let mut failing = false;
    // A ConfigMap has no generation and no status: there is nothing to sort out, and many.
    let sorts = what != "configmaps";
    while let Some(event) = stream.next().await {
        match event {
            Ok(watcher::Event::Init) => listed.clear(),
            Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                let key = key_of(&object.metadata);
                let version = Version::of(&object.metadata);
                if sorts {
                    listed.insert(key.clone());
                    if versions.get(&key) == Some(&version) {
                        continue;
                    }
                    versions.insert(key, version);
                }
                seen(&shared, Seen::Object(&object.metadata));
            }
            Ok(watcher::Event::Delete(object)) => {
                versions.remove(&key_of(&object.metadata));
                seen(&shared, Seen::Object(&object.metadata));
            }
            Ok(watcher::Event::InitDone) => {
                versions.retain(|key, _| listed.contains(key));
                backoff.reset();
                failing = false;
                seen(&shared, Seen::All);
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(
                        "{what} cannot be watched, so that waypoints are repaired later: {error}"
                    );
                }
                sleep(backoff.next().unwrap_or(LOOK)).await;
            }
        }
    }
}

fn key_of(meta: &ObjectMeta) -> Key {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    (
        namespace.into(),
        meta.name.as_deref().unwrap_or_default().into(),
    )
}

/// What the Gateway API is stands at the class of waypoints, whatever else does.
fn conditions(
    shared: &Shared,
    object: &ObjectRef,
    error: Option<&ProvisionError>,
) -> Vec<Condition> {
    let mut found = error.map(ProvisionError::conditions).unwrap_or_default();
    if object.kind == Kind::GatewayClass {
        found.retain(|condition| condition.kind == "Accepted");
        if *object.name == *WAYPOINT_CLASS {
            found.push(shared.api.condition());
        }
    }
    found
}

fn finish(shared: &Shared, object: ObjectRef, result: Result<(), ProvisionError>) {
    let now = Instant::now();
    let Err(error) = result else {
        let conditions = conditions(shared, &object, None);
        shared.state.lock().queue.done(&object);
        shared.faults.set(object, conditions);
        return;
    };
    let pause = match &error {
        ProvisionError::Request { error, .. } => match error.failure() {
            Failure::Refused => Some(REFUSED),
            Failure::Later(pause) => pause,
            Failure::Conflict | Failure::Gone => None,
        },
        // Of ConfigMaps we hear, of other people's objects we do not.
        ProvisionError::Parameters(_) | ProvisionError::NotOurs { .. } => Some(REFUSED),
    };
    let failures = shared.state.lock().queue.failed(&object, pause, now);
    if failures == 1 {
        match &error {
            ProvisionError::Request { verb, kind, error } => {
                tracing::warn!("{object}: a request failed");
                tell(verb, kind, error);
            }
            error => tracing::warn!("{object}: {error}"),
        }
    }
    // Of a request that may succeed in a moment nothing is told: what was told stays.
    if !error.conditions().is_empty() {
        let conditions = conditions(shared, &object, Some(&error));
        shared.faults.set(object, conditions);
    }
}

fn tell(verb: &str, what: &str, error: &RequestError) {
    match error {
        RequestError::Api(error) => tracing::warn!("{}", explain(verb, what, error)),
        error => tracing::warn!("cannot {verb} {what}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_differs_in_its_status_alone_is_no_news() {
        let version = |generation: Option<i64>, version: &str, labels: &str| {
            let labels = BTreeMap::from([("a".to_owned(), labels.to_owned())]);
            Version::of(&ObjectMeta {
                generation,
                resource_version: Some(version.into()),
                labels: Some(labels),
                ..ObjectMeta::default()
            })
        };
        assert!(version(Some(1), "1", "x") == version(Some(1), "2", "x"));
        assert!(version(Some(1), "1", "x") != version(Some(2), "1", "x"));
        assert!(version(Some(1), "1", "x") != version(Some(1), "1", "y"));
        assert!(version(None, "1", "x") != version(None, "2", "x"));
    }
}
