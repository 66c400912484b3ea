//! What the agent knows of the cluster: Namespaces and its node's Pods, watched; and the
//! API server itself for what the watch has not brought yet.
//!
//! While the API server is away the last state is used: a wrong "no" puts a pod outside the
//! mesh only until ztunnel hears of it from the control plane.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::Api;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{self, Event};
use kube::{Client, Config};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::decide::is_same;
use crate::protocol::{API_DEADLINE, Sandbox};

/// Objects of one page of a list.
const PAGE: u32 = 500;
/// Rights that are missing for so long are gone with the mesh: an upgrade that replaces them
/// has them back by then.
const FORBIDDEN_WAIT: Duration = Duration::from_secs(2);
const FORBIDDEN_LOOK: Duration = Duration::from_millis(250);
/// How often it is tried whether DaemonSets may be looked at, until they may.
const LEARN_INTERVAL: Duration = Duration::from_secs(10);

/// The cluster as far as the agent looks at it.
#[derive(Clone)]
pub(super) struct Cluster {
    client: Client,
    pods: Store<Pod>,
    namespaces: Store<PartialObjectMeta<Namespace>>,
    /// Each has been listed once.
    synced: Arc<[AtomicBool; 2]>,
    /// DaemonSets that we could look at once.
    allowed: Arc<Mutex<BTreeSet<String>>>,
}

/// An answer about an object.
pub(super) enum Found<T> {
    Yes(T),
    No,
    /// The API server did not say.
    Unknown(String),
}

/// Whether a DaemonSet is meant to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Presence {
    Stays,
    /// It is deleted, or our rights are, for good: the mesh is being removed.
    Leaving,
    /// We may not look, which can mean anything.
    Forbidden(String),
    Unknown(String),
}

impl Cluster {
    /// Begins to watch.
    pub(super) async fn start(node: &str) -> anyhow::Result<Self> {
        let mut config = Config::infer().await.context("find the Kubernetes API")?;
        config.connect_timeout = Some(API_DEADLINE);
        config.write_timeout = Some(API_DEADLINE);
        // Longer than a watch lives: bookmarks come each minute.
        config.read_timeout = Some(Duration::from_secs(330));
        let client = Client::try_from(config).context("find the Kubernetes API")?;
        let synced = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);

        let (pods, mut writer) = reflector::store();
        let settings = watcher::Config::default()
            .fields(&format!("spec.nodeName={node}"))
            .page_size(PAGE);
        let mut events = watcher::watcher(Api::<Pod>::all(client.clone()), settings)
            .default_backoff()
            .boxed();
        let done = synced.clone();
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => {
                        let event = event.modify(forget_what_is_not_needed);
                        writer.apply_watcher_event(&event);
                        if matches!(event, Event::InitDone) {
                            done[0].store(true, Ordering::Release);
                        }
                    }
                    Err(error) => warn!("pods of this node: {error}"),
                }
            }
        });

        let (namespaces, mut writer) = reflector::store();
        let settings = watcher::Config::default().page_size(PAGE);
        let all = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
        let mut events = watcher::watcher(all, settings).default_backoff().boxed();
        let done = synced.clone();
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => {
                        let event = event.modify(|namespace: &mut PartialObjectMeta<Namespace>| {
                            namespace.metadata.managed_fields = None;
                            namespace.metadata.annotations = None;
                        });
                        writer.apply_watcher_event(&event);
                        if matches!(event, Event::InitDone) {
                            done[1].store(true, Ordering::Release);
                        }
                    }
                    Err(error) => warn!("namespaces: {error}"),
                }
            }
        });
        Ok(Self {
            client,
            pods,
            namespaces,
            synced,
            allowed: Arc::default(),
        })
    }

    /// Whether everything has been read once.
    pub(super) fn is_synced(&self) -> bool {
        self.synced.iter().all(|done| done.load(Ordering::Acquire))
    }

    /// The pod that a sandbox is made for.
    pub(super) async fn pod(&self, sandbox: &Sandbox) -> Found<Arc<Pod>> {
        let key = ObjectRef::new(&sandbox.name).within(&sandbox.namespace);
        if let Some(pod) = self.pods.get(&key)
            && is_same(&pod, sandbox)
        {
            return Found::Yes(pod);
        }
        // The kubelet hears of a pod when we do: it may be faster.
        let api = Api::<Pod>::namespaced(self.client.clone(), &sandbox.namespace);
        match timeout(API_DEADLINE, api.get_opt(&sandbox.name)).await {
            Ok(Ok(Some(pod))) if is_same(&pod, sandbox) => Found::Yes(Arc::new(pod)),
            Ok(Ok(_)) => Found::No,
            Ok(Err(error)) => Found::Unknown(error.to_string()),
            Err(_) => Found::Unknown(format!("no answer within {API_DEADLINE:?}")),
        }
    }

    /// The labels of a namespace.
    pub(super) async fn namespace_labels(&self, name: &str) -> Found<BTreeMap<String, String>> {
        let labels = |found: Option<&BTreeMap<String, String>>| found.cloned().unwrap_or_default();
        if let Some(found) = self.namespaces.get(&ObjectRef::new(name)) {
            return Found::Yes(labels(found.metadata.labels.as_ref()));
        }
        let api = Api::<Namespace>::all(self.client.clone());
        match timeout(API_DEADLINE, api.get_metadata_opt(name)).await {
            Ok(Ok(Some(found))) => Found::Yes(labels(found.metadata.labels.as_ref())),
            Ok(Ok(None)) => Found::No,
            Ok(Err(error)) => Found::Unknown(error.to_string()),
            Err(_) => Found::Unknown(format!("no answer within {API_DEADLINE:?}")),
        }
    }

    /// Whether a DaemonSet is there to stay. Takes [`FORBIDDEN_WAIT`] if rights are missing.
    pub(super) async fn daemon_set(&self, namespace: &str, name: &str) -> Presence {
        // Who never had the right to look has not lost it.
        let had_rights = self.allowed.lock().contains(name);
        lasting(|| self.look(namespace, name), had_rights).await
    }

    /// Looks at DaemonSets until each could be seen once: what is forbidden later has been
    /// taken away.
    pub(super) async fn learn(self, namespace: String, names: [String; 2]) {
        loop {
            for name in &names {
                if !self.allowed.lock().contains(name) {
                    self.look(&namespace, name).await;
                }
            }
            if names.iter().all(|name| self.allowed.lock().contains(name)) {
                return;
            }
            sleep(LEARN_INTERVAL).await;
        }
    }

    async fn look(&self, namespace: &str, name: &str) -> Presence {
        let api = Api::<DaemonSet>::namespaced(self.client.clone(), namespace);
        let found = match timeout(API_DEADLINE, api.get_metadata_opt(name)).await {
            Ok(Ok(found)) => found,
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                return Presence::Forbidden(status.message);
            }
            Ok(Err(error)) => return Presence::Unknown(error.to_string()),
            Err(_) => return Presence::Unknown(format!("no answer within {API_DEADLINE:?}")),
        };
        self.allowed.lock().insert(name.to_owned());
        match found {
            Some(found) if found.metadata.deletion_timestamp.is_none() => Presence::Stays,
            _ => Presence::Leaving,
        }
    }
}

/// What `look` says, unless it is forbidden: a mesh that is removed takes our account and its
/// rights along, but an upgrade may take them away for a moment. Only what stays forbidden
/// means that the mesh leaves.
async fn lasting<F>(look: impl Fn() -> F, had_rights: bool) -> Presence
where
    F: Future<Output = Presence>,
{
    let until = Instant::now() + FORBIDDEN_WAIT;
    loop {
        match look().await {
            Presence::Forbidden(_) if had_rights && Instant::now() < until => {
                sleep(FORBIDDEN_LOOK).await;
            }
            Presence::Forbidden(_) if had_rights => return Presence::Leaving,
            other => return other,
        }
    }
}

/// Containers, volumes and conditions are most of a pod.
fn forget_what_is_not_needed(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    if let Some(spec) = &mut pod.spec {
        *spec = k8s_openapi::api::core::v1::PodSpec {
            host_network: spec.host_network,
            service_account_name: spec.service_account_name.take(),
            node_name: spec.node_name.take(),
            ..Default::default()
        };
    }
    if let Some(status) = &mut pod.status {
        *status = k8s_openapi::api::core::v1::PodStatus {
            phase: status.phase.take(),
            ..Default::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    use adit_shared::telemetry::http as status_http;
    use http::StatusCode;

    use super::*;

    /// Answers in this order; the last one again and again.
    async fn lasting_of(answers: &[Presence], had_rights: bool) -> (Presence, Duration) {
        let answers = RefCell::new(VecDeque::from(answers.to_vec()));
        let look = || {
            let mut answers = answers.borrow_mut();
            std::future::ready(match answers.len() {
                1 => answers[0].clone(),
                _ => answers.pop_front().expect("not empty"),
            })
        };
        let started = Instant::now();
        let found = lasting(look, had_rights).await;
        (found, started.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn rights_that_are_missing_for_a_moment_do_not_remove_the_mesh() {
        use Presence::{Forbidden, Leaving, Stays, Unknown};
        let forbidden = Forbidden("no".into());
        let away = Unknown("away".into());
        for (answers, had_rights, expected, waits) in [
            (vec![Stays], true, Stays, false),
            // Told by the API server itself.
            (vec![Leaving], true, Leaving, false),
            (vec![Leaving], false, Leaving, false),
            (vec![forbidden.clone()], true, Leaving, true),
            (vec![forbidden.clone(), Stays], true, Stays, false),
            (
                vec![forbidden.clone(), forbidden.clone(), Leaving],
                true,
                Leaving,
                false,
            ),
            (vec![forbidden.clone(), away.clone()], true, away, false),
            // Never allowed: an account that was set up wrongly.
            (vec![forbidden.clone()], false, forbidden, false),
        ] {
            let (found, took) = lasting_of(&answers, had_rights).await;
            assert_eq!(found, expected, "{answers:?}");
            assert_eq!(took >= FORBIDDEN_WAIT, waits, "{answers:?} {took:?}");
        }
    }

    /// An API server that has one DaemonSet, and one that is being deleted; `status` is its
    /// answer to all others.
    async fn cluster(status: Arc<Mutex<StatusCode>>) -> Cluster {
        let listener = status_http::listen(([127, 0, 0, 1], 0).into()).await;
        let listener = listener.expect("bound");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(status_http::serve(listener, move |request| {
            let path = request.uri().path();
            let kind = r#""apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata""#;
            let name = path.rsplit('/').next().unwrap_or_default();
            let (status, body) = match name {
                "there" => (
                    StatusCode::OK,
                    format!(r#"{{{kind}, "metadata": {{"name": "there"}}}}"#),
                ),
                "deleted" => (
                    StatusCode::OK,
                    format!(
                        r#"{{{kind}, "metadata": {{"deletionTimestamp": "2026-01-01T00:00:00Z"}}}}"#
                    ),
                ),
                _ => {
                    let status = *status.lock();
                    let code = status.as_u16();
                    let reason = match status {
                        StatusCode::NOT_FOUND => "NotFound",
                        _ => "Other",
                    };
                    let body = format!(
                        r#"{{"apiVersion": "v1", "kind": "Status", "status": "Failure", "message": "no", "reason": "{reason}", "code": {code}}}"#
                    );
                    (status, body)
                }
            };
            let mut response = status_http::text(status, body);
            let json = http::HeaderValue::from_static("application/json");
            response
                .headers_mut()
                .insert(http::header::CONTENT_TYPE, json);
            std::future::ready(response)
        }));
        let uri = format!("http://{address}").parse().expect("a URI");
        Cluster {
            client: Client::try_from(Config::new(uri)).expect("a client"),
            pods: reflector::store().0,
            namespaces: reflector::store().0,
            synced: Arc::default(),
            allowed: Arc::default(),
        }
    }

    #[tokio::test]
    async fn answers_of_the_api_server_are_told_apart() {
        let status = Arc::new(Mutex::new(StatusCode::NOT_FOUND));
        let cluster = cluster(status.clone()).await;
        assert_eq!(cluster.daemon_set("mesh", "there").await, Presence::Stays);
        assert_eq!(
            cluster.daemon_set("mesh", "deleted").await,
            Presence::Leaving
        );
        assert_eq!(cluster.daemon_set("mesh", "gone").await, Presence::Leaving);
        for code in [StatusCode::FORBIDDEN, StatusCode::UNAUTHORIZED] {
            *status.lock() = code;
            let never_allowed = cluster.daemon_set("mesh", "other").await;
            assert_eq!(never_allowed, Presence::Forbidden("no".into()));
        }
        let allowed: Vec<String> = cluster.allowed.lock().iter().cloned().collect();
        assert_eq!(allowed, ["deleted", "gone", "there"]);
        assert_eq!(cluster.daemon_set("mesh", "gone").await, Presence::Leaving);
        *status.lock() = StatusCode::INTERNAL_SERVER_ERROR;
        let broken = cluster.daemon_set("mesh", "gone").await;
        assert!(matches!(broken, Presence::Unknown(_)), "{broken:?}");
    }
}
