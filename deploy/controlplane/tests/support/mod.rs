//! A control plane on loopback with everything that a test wants to turn: keys, tokens, pods,
//! snapshots; and clients of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_controlplane::auth::{Caller, JwtAuthenticator, TrustedAccounts};
use adit_controlplane::ca::{CertificateIssuer, PodDirectory, TtlPolicy};
use adit_controlplane::serve::{
    Backends, EnrolmentSink, ResourceSnapshot, ServeConfig, Serving, SnapshotBuilder,
};
use adit_shared::identity::{ControlPlaneEndpoint, LocalCa, TokenSource, TrustBundle, TrustDomain};
use adit_shared::proto::enrolment::PodEnrolment;
use adit_shared::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, ENROLMENT_TYPE};
use adit_shared::xds::client::{
    ClientConfig, NodeMetadata, Observer, Subscription, Termination, TransportConfig,
};
use adit_shared::xds::{Client, ClientStatus, Handler, Rejected, Resource, Subscriber};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Generous: a loaded machine must not fail a test.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Pods `shop/cart` on n1 and `shop/pay` on n2; accounts that start with `waypoint` are
/// those of Gateways.
pub struct Pods;

impl PodDirectory for Pods {
    fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        matches!(
            (node, namespace, service_account),
            ("n1", "shop", "cart") | ("n2", "shop", "pay")
        )
    }

    fn gateway_of(&self, caller: &Caller) -> Option<String> {
        let account = &caller.service_account;
        account.starts_with("waypoint").then(|| account.clone())
    }
}

#[derive(Default)]
pub struct Reports(Mutex<BTreeMap<String, Vec<PodEnrolment>>>);

impl EnrolmentSink for Reports {
    fn report(&self, node: &str, pods: Vec<PodEnrolment>) {
        self.0.lock().insert(node.to_owned(), pods);
    }
}

impl Reports {
    pub fn of(&self, node: &str) -> Option<Vec<PodEnrolment>> {
        self.0.lock().get(node).cloned()
    }
}

pub struct Mesh {
    pub dir: TempDir,
    key: rcgen::KeyPair,
    ca: Arc<LocalCa>,
    snapshots: watch::Sender<Arc<ResourceSnapshot>>,
    pub reports: Arc<Reports>,
    config: ServeConfig,
    serving: Option<Serving>,
    address: SocketAddr,
}

impl Mesh {
    /// Serves an empty configuration.
    pub async fn start() -> Self {
        Self::start_with(|_| {}, SnapshotBuilder::new().build()).await
    }

    pub async fn start_with(
        change: impl FnOnce(&mut ServeConfig),
        snapshot: ResourceSnapshot,
    ) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let key = rcgen::KeyPair::generate().expect("a key");
        std::fs::write(dir.path().join("token.pem"), key.public_key_pem()).expect("written");
        let ca = LocalCa::load_or_generate(dir.path(), &TrustDomain::default()).expect("a CA");
        let mut config = ServeConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            monitoring: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
            ..ServeConfig::default()
        };
        change(&mut config);
        let (snapshots, _) = watch::channel(Arc::new(snapshot));
        let mut mesh = Self {
            dir,
            key,
            ca: Arc::new(ca),
            snapshots,
            reports: Arc::default(),
            config,
            serving: None,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
        };
        mesh.serve().await;
        mesh
    }

    /// Serves, at the address that was served at before.
    pub async fn serve(&mut self) {
        let token_key = self.dir.path().join("token.pem");
        let authenticator = JwtAuthenticator::from_file(&token_key, None).expect("a key");
        let issuer = CertificateIssuer::new(
            self.ca.clone(),
            Arc::new(Pods),
            TrustDomain::default(),
            TrustedAccounts::default(),
            TtlPolicy {
                default: Duration::from_secs(3600),
                max: Duration::from_secs(7200),
            },
        );
        let backends = Backends {
            snapshots: self.snapshots.subscribe(),
            authenticator: Arc::new(authenticator),
            issuer: Arc::new(issuer),
            reports: self.reports.clone(),
        };
        let serving = Serving::start(self.config.clone(), backends)
            .await
            .expect("started");
        self.address = serving.address();
        self.config.listen = self.address;
        self.serving = Some(serving);
    }

    pub fn serving(&self) -> &Serving {
        self.serving.as_ref().expect("serves")
    }

    pub fn serving_mut(&mut self) -> &mut Serving {
        self.serving.as_mut().expect("serves")
    }

    /// Nothing is published any more.
    pub fn end_snapshots(&mut self) {
        let last = self.snapshots.borrow().clone();
        self.snapshots = watch::channel(last).0;
    }

    pub async fn stop(&mut self) -> bool {
        self.serving.take().expect("serves").stop().await
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.address.port())
    }

    pub fn trust(&self) -> Arc<TrustBundle> {
        Arc::new(TrustBundle::from_file(
            self.dir.path().join("root-cert.pem"),
        ))
    }

    pub fn endpoint(&self) -> ControlPlaneEndpoint {
        ControlPlaneEndpoint::new(&self.url(), self.trust(), None).expect("legal")
    }

    /// Edits what is served.
    pub fn publish(&self, edit: impl FnOnce(&mut SnapshotBuilder)) {
        let mut builder = self.snapshots.borrow().edit();
        edit(&mut builder);
        self.snapshots.send_replace(Arc::new(builder.build()));
    }

    /// Claims of a pod's token.
    pub fn claims(&self, namespace: &str, account: &str, node: &str) -> Value {
        claims(namespace, account, node)
    }

    pub fn sign(&self, claims: &Value) -> String {
        sign(&self.key, claims)
    }

    /// The token of a node's proxy.
    pub fn node_token(&self, node: &str) -> TokenSource {
        let claims = self.claims("istio-system", "ztunnel", node);
        TokenSource::Literal(self.sign(&claims).into())
    }

    pub fn client_config(&self, node: &str) -> ClientConfig {
        ClientConfig {
            transport: TransportConfig {
                address: self.url().parse().expect("a URI"),
                trust: Some(self.trust()),
                server_name: Some("istiod.istio-system.svc".to_owned()),
                allow_plaintext: false,
            },
            token: Some(self.node_token(node)),
            headers: vec![],
            node: NodeMetadata {
                pod_name: format!("ztunnel-{node}"),
                namespace: "istio-system".into(),
                service_account: "ztunnel".into(),
                node_name: node.into(),
                ..NodeMetadata::default()
            },
        }
    }

    /// A pod that says it is one of Gateway `gateway`.
    pub fn waypoint_config(&self, namespace: &str, account: &str, gateway: &str) -> ClientConfig {
        let claims = self.claims(namespace, account, "n1");
        let mut config = self.client_config("n1");
        config.token = Some(TokenSource::Literal(self.sign(&claims).into()));
        config.node = NodeMetadata {
            pod_name: format!("{account}-n1"),
            namespace: namespace.into(),
            service_account: account.into(),
            node_name: "n1".into(),
            extra: [("GATEWAY_NAME".to_owned(), gateway.into())].into(),
            ..NodeMetadata::default()
        };
        config
    }

    /// A page of the monitoring port.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let address = self.serving().monitoring_address().expect("configured");
        page(address, path).await
    }
}

/// Claims of a pod's token.
pub fn claims(namespace: &str, account: &str, node: &str) -> Value {
    json!({
        "aud": ["istio-ca"],
        "exp": jsonwebtoken::get_current_timestamp() + 600,
        "kubernetes.io": {
            "namespace": namespace,
            "serviceaccount": {"name": account, "uid": "sa"},
            "pod": {"name": format!("{account}-{node}"), "uid": "pod"},
            "node": {"name": node, "uid": "node"},
        },
    })
}

pub fn sign(key: &rcgen::KeyPair, claims: &Value) -> String {
    let key = EncodingKey::from_ec_pem(key.serialize_pem().as_bytes()).expect("PEM");
    jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &key).expect("signed")
}

/// Status and body of a page.
pub async fn page(address: SocketAddr, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut tcp = tokio::net::TcpStream::connect(address).await.expect("open");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.expect("answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("HTTP");
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    (status.expect("a status"), body.to_owned())
}

/// What a proxy holds, by type and name, and the order in which messages came.
#[derive(Default)]
pub struct Held {
    resources: Mutex<BTreeMap<(String, String), Vec<u8>>>,
    /// One entry a message: `Address +a -b`.
    messages: Mutex<Vec<String>>,
    terminations: Mutex<Vec<Termination>>,
}

/// Rejects resources whose name starts with `bad`.
struct Keeper(&'static str, Arc<Held>);

impl Handler for Keeper {
    fn apply(&self, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected> {
        let Self(url, held) = self;
        let kind = url.rsplit('.').next().unwrap_or_default();
        let mut message = vec![kind.to_owned()];
        let mut rejected = vec![];
        let mut resources = held.resources.lock();
        for resource in updates {
            message.push(format!("+{}", resource.name));
            if resource.name.starts_with("bad") {
                rejected.push(Rejected {
                    name: resource.name,
                    reason: "is bad".into(),
                });
            } else {
                let key = ((*url).to_owned(), resource.name);
                resources.insert(key, resource.body.to_vec());
            }
        }
        for name in removed {
            message.push(format!("-{name}"));
            resources.remove(&((*url).to_owned(), name));
        }
        held.messages.lock().push(message.join(" "));
        rejected
    }
}

struct Witness(Arc<Held>);

impl Observer for Witness {
    fn connection_terminated(&self, reason: Termination) {
        self.0.terminations.lock().push(reason);
    }
}

/// An xDS client that runs until dropped.
pub struct Proxy {
    pub held: Arc<Held>,
    pub subscriber: Subscriber,
    stop: CancellationToken,
}

impl Proxy {
    pub fn start(config: ClientConfig) -> Self {
        Self::start_with(config, &[AUTHORIZATION_TYPE, ADDRESS_TYPE, ENROLMENT_TYPE])
    }

    pub fn start_with(config: ClientConfig, types: &[&'static str]) -> Self {
        let held = Arc::<Held>::default();
        let types = types
            .iter()
            .map(|&url| {
                let keeper: Arc<dyn Handler> = Arc::new(Keeper(url, held.clone()));
                (url, Subscription::Wildcard, keeper)
            })
            .collect();
        let observer = Arc::new(Witness(held.clone()));
        let (client, subscriber) = Client::new(config, types, observer).expect("legal");
        let stop = CancellationToken::new();
        tokio::spawn(client.run(stop.clone().cancelled_owned()));
        Self {
            held,
            subscriber,
            stop,
        }
    }

    pub async fn wait(&self, what: &str, condition: impl FnMut(&ClientStatus) -> bool) {
        let mut status = self.subscriber.status();
        let waited = tokio::time::timeout(PATIENCE, status.wait_for(condition)).await;
        match waited {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => panic!("the client has ended before {what}"),
            Err(_) => panic!("not {what}: {:?}", self.subscriber.status().borrow()),
        }
    }

    pub async fn ready(&self) {
        self.wait("ready", |status| status.ready && status.connected)
            .await;
    }

    /// Names that are held of a type.
    pub fn names(&self, url: &str) -> Vec<String> {
        let resources = self.held.resources.lock();
        resources
            .keys()
            .filter(|(kind, _)| kind == url)
            .map(|(_, name)| name.clone())
            .collect()
    }

    /// The encoded resource, if it is held.
    pub fn body(&self, url: &str, name: &str) -> Option<Vec<u8>> {
        let key = (url.to_owned(), name.to_owned());
        self.held.resources.lock().get(&key).cloned()
    }

    pub fn messages(&self) -> Vec<String> {
        self.held.messages.lock().clone()
    }

    pub fn terminations(&self) -> Vec<Termination> {
        self.held.terminations.lock().clone()
    }

    pub async fn holds(&self, url: &str, names: &[&str]) {
        eventually(&format!("{url} {names:?}"), || self.names(url) == names).await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Waits for a condition that cannot be waited for otherwise.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = tokio::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
