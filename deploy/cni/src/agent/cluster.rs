//! What the agent knows of the cluster: Namespaces and its node's Pods, watched; and the
//! API server itself for what the watch has not brought yet.
//!
//! While the API server is away the last state is used: a wrong "no" puts a pod outside the
//! mesh only until ztunnel hears of it from the control plane.

use std::collections::BTreeMap;
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
use tokio::time::timeout;
use tracing::warn;

use super::decide::is_same;
use crate::protocol::{API_DEADLINE, Sandbox};

/// Objects of one page of a list.
const PAGE: u32 = 500;

/// The cluster as far as the agent looks at it.
#[derive(Clone)]
pub(super) struct Cluster {
    client: Client,
    pods: Store<Pod>,
    namespaces: Store<PartialObjectMeta<Namespace>>,
    /// Each has been listed once.
    synced: Arc<[AtomicBool; 2]>,
}

/// An answer about an object.
pub(super) enum Found<T> {
    Yes(T),
    No,
    /// The API server did not say.
    Unknown(String),
}

/// Whether a DaemonSet is meant to be there.
pub(super) enum Presence {
    Stays,
    /// It is deleted, or our rights are: the mesh is being removed.
    Leaving,
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

    /// Whether a DaemonSet is there to stay.
    pub(super) async fn daemon_set(&self, namespace: &str, name: &str) -> Presence {
        let api = Api::<DaemonSet>::namespaced(self.client.clone(), namespace);
        match api.get_metadata_opt(name).await {
            Ok(None) => Presence::Leaving,
            Ok(Some(found)) if found.metadata.deletion_timestamp.is_some() => Presence::Leaving,
            Ok(Some(_)) => Presence::Stays,
            // Our account or its rights went before us.
            Err(kube::Error::Api(status)) if matches!(status.code, 401 | 403) => Presence::Leaving,
            Err(error) => Presence::Unknown(error.to_string()),
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
