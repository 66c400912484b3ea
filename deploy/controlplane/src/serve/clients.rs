//! Who is connected and how far along: what `adit proxy-status` and operators look at.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use adit_shared::proto::xds::Node;
use adit_shared::xds::client::node::metadata_string;
use adit_shared::xds::server::TypeStatus;
use parking_lot::Mutex;
use serde::Serialize;

use crate::auth::Caller;

/// The clients that are connected.
#[derive(Clone, Default)]
pub(super) struct Clients(Arc<Mutex<Registry>>);

#[derive(Default)]
struct Registry {
    last: u64,
    clients: BTreeMap<u64, Client>,
}

struct Client {
    caller: Caller,
    peer: String,
    id: String,
    version: String,
    since: SystemTime,
    types: Vec<TypeStatus>,
}

/// One connected client, for as long as this lives.
pub(super) struct Registration {
    clients: Clients,
    key: u64,
}

/// One client as JSON.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct ClientReport {
    /// `pod.namespace`, as Istio names proxies.
    pub proxy: String,
    /// The node id that it sent.
    pub id: String,
    /// The version that it says it is of; empty if it says none.
    pub version: String,
    /// The Kubernetes node.
    pub node: String,
    /// Namespace and name of its service account.
    pub service_account: String,
    /// Where it connects from.
    pub address: String,
    /// Seconds since 1970.
    pub connected_since: u64,
    /// By type.
    pub types: Vec<TypeReport>,
}

/// How one type of a client is doing.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct TypeReport {
    /// The type URL.
    pub type_url: String,
    /// `SYNCED`, `STALE` (a response is outstanding or waits), or `ERROR` (the last one was
    /// rejected in part).
    pub status: &'static str,
    /// The snapshot last sent.
    pub sent: Option<String>,
    /// The snapshot last acknowledged.
    pub acknowledged: Option<String>,
    /// Changes that wait to be sent.
    pub pending: usize,
    /// Responses sent on this stream.
    pub responses: u64,
    /// How many of them were rejected in part.
    pub rejections: u64,
    /// What the client said about the last, if it rejected it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Clients {
    pub(super) fn register(&self, caller: &Caller, peer: &str, node: &Node) -> Registration {
        let mut registry = self.0.lock();
        registry.last += 1;
        let key = registry.last;
        // What a client says of itself is shown to people: bounded.
        let id = node.id.chars().take(512).collect();
        let version = metadata_string(node, "ISTIO_VERSION").unwrap_or_default();
        let version = version.chars().take(64).collect();
        registry.clients.insert(
            key,
            Client {
                caller: caller.clone(),
                peer: peer.to_owned(),
                id,
                version,
                since: SystemTime::now(),
                types: vec![],
            },
        );
        Registration {
            clients: self.clone(),
            key,
        }
    }

    pub(super) fn report(&self) -> Vec<ClientReport> {
        self.0.lock().clients.values().map(Client::report).collect()
    }
}

impl Registration {
    pub(super) fn update(&self, types: Vec<TypeStatus>) {
        if let Some(client) = self.clients.0.lock().clients.get_mut(&self.key) {
            client.types = types;
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.clients.0.lock().clients.remove(&self.key);
    }
}

impl Client {
    fn report(&self) -> ClientReport {
        let Caller {
            namespace,
            service_account,
            pod_name,
            node,
            ..
        } = &self.caller;
        ClientReport {
            proxy: format!("{pod_name}.{namespace}"),
            id: self.id.clone(),
            version: self.version.clone(),
            node: node.clone(),
            service_account: format!("{namespace}/{service_account}"),
            address: self.peer.clone(),
            connected_since: self
                .since
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            types: self.types.iter().map(type_report).collect(),
        }
    }
}

fn type_report(status: &TypeStatus) -> TypeReport {
    let word = if status.last_error.is_some() {
        "ERROR"
    } else if status.outstanding || status.pending > 0 {
        "STALE"
    } else {
        "SYNCED"
    };
    TypeReport {
        type_url: status.type_url.clone(),
        status: word,
        sent: status.sent.clone(),
        acknowledged: status.acknowledged.clone(),
        pending: status.pending,
        responses: status.responses,
        rejections: status.rejections,
        error: status.last_error.clone(),
    }
}
