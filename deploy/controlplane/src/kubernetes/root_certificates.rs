//! Hands the roots of the mesh to every namespace: ConfigMap `istio-ca-root-cert`, which
//! node proxies and gateways mount to know their control plane by.
//!
//! Every replica does this. What they write is the same, so the second writes nothing: a
//! ConfigMap that is as it should be is left alone. Namespaces that are being deleted get
//! none.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, ObjectMeta, Patch, PatchParams};
use kube::core::metadata::PartialObjectMeta;
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, DefaultBackoff};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{FIELD_MANAGER, Kubernetes, explain};
use crate::ca::CurrentCa;

/// The ConfigMap's name, as in Istio.
pub const ROOT_CONFIG_MAP: &str = "istio-ca-root-cert";
/// The key of the roots in it.
pub const ROOT_KEY: &str = "root-cert.pem";
/// Istio's mark of ConfigMaps of the mesh.
const LABEL: (&str, &str) = ("istio.io/config", "true");

/// Writes at a time.
const CONCURRENT: usize = 16;
/// For one answer.
const DEADLINE: Duration = Duration::from_secs(15);
/// Before a write that failed is tried again; doubled up to the longest.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Keeps the ConfigMaps. Dropping it ends that.
#[derive(Debug)]
pub struct RootCertificates {
    task: JoinHandle<()>,
}

impl RootCertificates {
    /// Starts to hand out the roots of `ca` and of whatever follows it.
    ///
    /// Must be called within a tokio runtime.
    pub fn start(kubernetes: Kubernetes, ca: CurrentCa) -> Self {
        Self {
            task: tokio::spawn(run(kubernetes.client, ca)),
        }
    }

    /// Returns when nothing is kept any more, which comes about by a defect only.
    pub async fn ended(&mut self) {
        if let Err(error) = (&mut self.task).await {
            tracing::error!(%error, "root certificates are not handed out any more");
        }
    }
}

impl Drop for RootCertificates {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(client: kube::Client, mut ca: CurrentCa) {
    let mut namespaces = changes(Api::all(client.clone()));
    let mut maps = maps(Api::<ConfigMap>::all(client.clone()));
    let mut ledger = Ledger::new(ca.get().root_pem());
    let mut writes: JoinSet<(String, Result<(), Failure>)> = JoinSet::new();
    loop {
        while writes.len() < CONCURRENT {
            let Some(namespace) = ledger.next(Instant::now()) else {
                break;
            };
            writes.spawn(write(client.clone(), namespace, ledger.roots.clone()));
        }
        let retry = ledger.next_retry().filter(|_| writes.len() < CONCURRENT);
        let wait = async {
            match retry {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(event) = namespaces.next() => ledger.namespace(event),
            Some(event) = maps.next() => ledger.map(event),
            () = ca.changed() => ledger.set_roots(ca.get().root_pem()),
            Some(written) = writes.join_next(), if !writes.is_empty() => match written {
                Ok((namespace, result)) => ledger.written(&namespace, result, Instant::now()),
                Err(error) => {
                    tracing::error!(%error, "writing {ROOT_CONFIG_MAP} ended by a defect");
                    return;
                }
            },
            () = wait => {}
        }
    }
}

/// What a watch says, free of the form in which it says it.
enum Change<T> {
    Start,
    Is(String, T),
    Gone(String),
    Complete,
}

/// Namespaces, and whether each is being deleted.
fn changes(api: Api<PartialObjectMeta<Namespace>>) -> BoxStream<'static, Change<bool>> {
    let stream = watcher::watcher(api, watcher::Config::default());
    retrying(
        stream,
        "namespaces",
        |object: PartialObjectMeta<Namespace>| {
            let deleting = object.metadata.deletion_timestamp.is_some();
            Some((object.metadata.name?, deleting))
        },
    )
}

/// Our ConfigMaps: their namespace, and the roots in them if all else is right.
fn maps(api: Api<ConfigMap>) -> BoxStream<'static, Change<Option<String>>> {
    let config = watcher::Config::default().fields(&format!("metadata.name={ROOT_CONFIG_MAP}"));
    retrying(
        watcher::watcher(api, config),
        "configmaps",
        |map: ConfigMap| {
            let labels = map.metadata.labels.unwrap_or_default();
            let labelled = labels.get(LABEL.0).is_some_and(|value| value == LABEL.1);
            let roots = map.data.and_then(|mut data| data.remove(ROOT_KEY));
            Some((map.metadata.namespace?, roots.filter(|_| labelled)))
        },
    )
}

fn retrying<K: Send + 'static, T: Send + 'static>(
    stream: impl futures_util::Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
    resource: &'static str,
    read: fn(K) -> Option<(String, T)>,
) -> BoxStream<'static, Change<T>> {
    let state = (stream.boxed(), DefaultBackoff::default(), String::new());
    futures_util::stream::unfold(
        state,
        move |(mut stream, mut backoff, mut told)| async move {
            loop {
                let change = match stream.next().await? {
                    Ok(watcher::Event::Init) => Change::Start,
                    Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                        match read(object) {
                            Some((name, value)) => Change::Is(name, value),
                            None => continue,
                        }
                    }
                    Ok(watcher::Event::Delete(object)) => match read(object) {
                        Some((name, _)) => Change::Gone(name),
                        None => continue,
                    },
                    Ok(watcher::Event::InitDone) => {
                        backoff.reset();
                        told.clear();
                        Change::Complete
                    }
                    Err(error) => {
                        let complaint = match &error {
                            watcher::Error::InitialListFailed(error) => {
                                explain("list", resource, error)
                            }
                            watcher::Error::WatchStartFailed(error) => {
                                explain("watch", resource, error)
                            }
                            error => error.to_string(),
                        };
                        if complaint != told {
                            tracing::warn!("{ROOT_CONFIG_MAP}: {complaint}");
                            told = complaint;
                        }
                        sleep(backoff.next().unwrap_or(LONGEST_RETRY)).await;
                        continue;
                    }
                };
                return Some((change, (stream, backoff, told)));
            }
        },
    )
    .boxed()
}

/// Why a ConfigMap was not written.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Failure {
    /// The namespace is gone or going: there is nothing to do any more.
    NoNamespace,
    /// Anything else.
    Other(String),
}

async fn write(
    client: kube::Client,
    namespace: String,
    roots: Arc<str>,
) -> (String, Result<(), Failure>) {
    let api: Api<ConfigMap> = Api::namespaced(client, &namespace);
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(ROOT_CONFIG_MAP.to_owned()),
            namespace: Some(namespace.clone()),
            labels: Some([(LABEL.0.to_owned(), LABEL.1.to_owned())].into()),
            ..ObjectMeta::default()
        },
        data: Some([(ROOT_KEY.to_owned(), roots.to_string())].into()),
        ..ConfigMap::default()
    };
    // Whoever else writes the roots of this mesh is wrong.
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let patch = Patch::Apply(&map);
    let request = api.patch(ROOT_CONFIG_MAP, &params, &patch);
    let result = match timeout(DEADLINE, request).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(failure(&error)),
        Err(_) => Err(Failure::Other(format!("no answer within {DEADLINE:?}"))),
    };
    (namespace, result)
}

fn failure(error: &kube::Error) -> Failure {
    if let kube::Error::Api(status) = error {
        let terminating = status.details.as_ref().is_some_and(|details| {
            details
                .causes
                .iter()
                .any(|cause| cause.reason == "NamespaceTerminating")
        });
        if terminating || status.code == 404 {
            return Failure::NoNamespace;
        }
    }
    Failure::Other(explain("patch", "configmaps", error))
}

/// Which namespaces have what. No I/O.
struct Ledger {
    roots: Arc<str>,
    /// Active namespaces, and what is to be done about each.
    namespaces: BTreeMap<String, Task>,
    /// Roots by namespace, where the ConfigMap is as it should be but for them. Most have
    /// the same text, which is kept once.
    maps: HashMap<String, Option<Arc<str>>>,
    namespaces_complete: bool,
    maps_complete: bool,
    /// What a relist has named so far.
    relisted: Option<Vec<String>>,
    maps_relisted: Option<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Task {
    Done,
    /// To be written, not before this time; so many attempts have failed.
    Due(Option<Instant>, u32),
    /// Being written; and it has to be looked at again afterwards.
    Writing(bool, u32),
}

impl Ledger {
    fn new(roots: String) -> Self {
        Self {
            roots: roots.into(),
            namespaces: BTreeMap::new(),
            maps: HashMap::new(),
            namespaces_complete: false,
            maps_complete: false,
            relisted: None,
            maps_relisted: None,
        }
    }

    fn set_roots(&mut self, roots: String) {
        self.roots = roots.into();
        for namespace in self.namespaces.keys().cloned().collect::<Vec<_>>() {
            self.look(&namespace);
        }
    }

    fn namespace(&mut self, change: Change<bool>) {
        match change {
            Change::Start => self.relisted = Some(Vec::new()),
            Change::Is(name, deleting) => {
                if let Some(listed) = &mut self.relisted {
                    listed.push(name.clone());
                }
                if deleting {
                    self.namespaces.remove(&name);
                } else {
                    self.namespaces.entry(name.clone()).or_insert(Task::Done);
                    self.look(&name);
                }
            }
            Change::Gone(name) => {
                self.namespaces.remove(&name);
            }
            Change::Complete => {
                if let Some(listed) = self.relisted.take() {
                    let listed: std::collections::HashSet<_> = listed.into_iter().collect();
                    self.namespaces.retain(|name, _| listed.contains(name));
                }
                self.namespaces_complete = true;
            }
        }
    }

    fn map(&mut self, change: Change<Option<String>>) {
        match change {
            Change::Start => self.maps_relisted = Some(Vec::new()),
            Change::Is(namespace, roots) => {
                if let Some(listed) = &mut self.maps_relisted {
                    listed.push(namespace.clone());
                }
                let roots = roots.map(|roots| match *roots == *self.roots {
                    true => self.roots.clone(),
                    false => roots.into(),
                });
                self.maps.insert(namespace.clone(), roots);
                self.look(&namespace);
            }
            Change::Gone(namespace) => {
                self.maps.remove(&namespace);
                self.look(&namespace);
            }
            Change::Complete => {
                if let Some(listed) = self.maps_relisted.take() {
                    let listed: std::collections::HashSet<_> = listed.into_iter().collect();
                    self.maps.retain(|namespace, _| listed.contains(namespace));
                }
                self.maps_complete = true;
                for namespace in self.namespaces.keys().cloned().collect::<Vec<_>>() {
                    self.look(&namespace);
                }
            }
        }
    }

    /// Finds out whether something is to be done in a namespace.
    fn look(&mut self, namespace: &str) {
        // Before all ConfigMaps are known each would be written for nothing.
        if !self.maps_complete {
            return;
        }
        let right = self
            .maps
            .get(namespace)
            .is_some_and(|roots| roots.as_deref() == Some(&*self.roots));
        let Some(task) = self.namespaces.get_mut(namespace) else {
            return;
        };
        *task = match (&*task, right) {
            (Task::Writing(_, failed), _) => Task::Writing(true, *failed),
            (_, true) => Task::Done,
            (Task::Due(at, failed), false) => Task::Due(*at, *failed),
            (Task::Done, false) => Task::Due(None, 0),
        };
    }

    /// A namespace to write to now; it counts as being written.
    fn next(&mut self, now: Instant) -> Option<String> {
        let due = |task: &Task| matches!(task, Task::Due(at, _) if at.is_none_or(|at| at <= now));
        let (namespace, task) = self.namespaces.iter_mut().find(|(_, task)| due(task))?;
        if let Task::Due(_, failed) = *task {
            *task = Task::Writing(false, failed);
        }
        Some(namespace.clone())
    }

    fn next_retry(&self) -> Option<Instant> {
        self.namespaces
            .values()
            .filter_map(|task| match task {
                Task::Due(at, _) => *at,
                _ => None,
            })
            .min()
    }

    fn written(&mut self, namespace: &str, result: Result<(), Failure>, now: Instant) {
        let Some(task) = self.namespaces.get_mut(namespace) else {
            return;
        };
        let Task::Writing(again, failed) = *task else {
            return;
        };
        match result {
            // The watch tells what it has become.
            Ok(()) => {
                *task = Task::Done;
                if again {
                    self.look(namespace);
                }
            }
            Err(Failure::NoNamespace) => {
                self.namespaces.remove(namespace);
            }
            Err(Failure::Other(reason)) => {
                if failed == 0 {
                    tracing::warn!(namespace, "{ROOT_CONFIG_MAP}: {reason}");
                }
                let wait = RETRY
                    .saturating_mul(1 << failed.min(10))
                    .min(LONGEST_RETRY)
                    .mul_f64(rand::random_range(0.5..=1.0));
                *task = Task::Due(Some(now + wait), failed.saturating_add(1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(namespaces: &[&str], maps: &[(&str, &str)]) -> Ledger {
        let mut ledger = Ledger::new("A".into());
        ledger.namespace(Change::Start);
        for name in namespaces {
            ledger.namespace(Change::Is((*name).into(), false));
        }
        ledger.namespace(Change::Complete);
        assert_eq!(
            ledger.next(Instant::now()),
            None,
            "nothing is known of maps"
        );
        ledger.map(Change::Start);
        for (name, roots) in maps {
            ledger.map(Change::Is((*name).into(), Some((*roots).into())));
        }
        ledger.map(Change::Complete);
        ledger
    }

    fn due(ledger: &mut Ledger) -> Vec<String> {
        let now = Instant::now();
        std::iter::from_fn(|| ledger.next(now)).collect()
    }

    #[test]
    fn what_is_right_is_left_alone() {
        let mut ledger = ledger(&["a", "b", "c"], &[("a", "A"), ("b", "old"), ("gone", "A")]);
        assert_eq!(due(&mut ledger), ["b", "c"]);
        let now = Instant::now();
        for name in ["b", "c"] {
            ledger.written(name, Ok(()), now);
            ledger.map(Change::Is(name.into(), Some("A".into())));
        }
        assert!(due(&mut ledger).is_empty());
        // Somebody else changes one, deletes one, takes the label from one.
        ledger.map(Change::Is("a".into(), Some("B".into())));
        ledger.map(Change::Gone("b".into()));
        ledger.map(Change::Is("c".into(), None));
        assert_eq!(due(&mut ledger), ["a", "b", "c"]);
    }

    #[test]
    fn new_roots_go_everywhere() {
        let mut ledger = ledger(&["a", "b"], &[("a", "A"), ("b", "A")]);
        assert!(due(&mut ledger).is_empty());
        ledger.set_roots("AB".into());
        assert_eq!(due(&mut ledger), ["a", "b"]);
        // While they are written there are others.
        ledger.set_roots("B".into());
        assert!(due(&mut ledger).is_empty());
        ledger.written("a", Ok(()), Instant::now());
        ledger.map(Change::Is("a".into(), Some("AB".into())));
        assert_eq!(due(&mut ledger), ["a"]);
    }

    #[test]
    fn namespaces_that_end_get_none() {
        let mut ledger = ledger(&["a", "b", "c"], &[]);
        ledger.namespace(Change::Is("a".into(), true));
        ledger.namespace(Change::Gone("b".into()));
        assert_eq!(due(&mut ledger), ["c"]);
        ledger.written("c", Err(Failure::NoNamespace), Instant::now());
        assert!(due(&mut ledger).is_empty());
        ledger.namespace(Change::Start);
        ledger.namespace(Change::Is("d".into(), false));
        ledger.namespace(Change::Complete);
        assert_eq!(due(&mut ledger), ["d"]);
    }

    #[test]
    fn a_failure_is_tried_again_later() {
        let mut ledger = ledger(&["a"], &[]);
        assert_eq!(due(&mut ledger), ["a"]);
        let now = Instant::now();
        ledger.written("a", Err(Failure::Other("no".into())), now);
        assert_eq!(ledger.next(now), None);
        let at = ledger.next_retry().expect("a retry");
        assert!(at > now && at <= now + RETRY);
        assert_eq!(ledger.next(at).as_deref(), Some("a"));
        ledger.written("a", Err(Failure::Other("no".into())), at);
        let next = ledger.next_retry().expect("a retry");
        assert!(next - at <= 2 * RETRY && next - at >= RETRY);
    }
}
