//! The source: paging, streams, history that is gone, outages, kinds that come and go, and
//! objects that go wrong.

use std::time::Duration;

use adit_controlplane::kubernetes::Kubernetes;
use adit_controlplane::source::{KubernetesOptions, KubernetesSource, SourceState};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;

use super::api_server::ApiServer;

const PATIENCE: Duration = Duration::from_secs(30);
const PODS: &str = "/api/v1/pods";
const GATEWAY: &str = "gateway.networking.k8s.io";
const SECURITY: &str = "security.istio.io";

struct Following {
    _source: KubernetesSource,
    state: watch::Receiver<SourceState>,
}

impl Following {
    fn start(server: &ApiServer) -> Self {
        let kubernetes = Kubernetes {
            client: server.client(),
            namespace: "istio-system".into(),
            identity: "aditd-0".into(),
        };
        let source = KubernetesSource::start(
            kubernetes,
            KubernetesOptions {
                discovery: Duration::from_millis(200),
                absence: Duration::from_millis(500),
                ..KubernetesOptions::default()
            },
        );
        let state = source.subscribe();
        Self {
            _source: source,
            state,
        }
    }

    async fn until(&mut self, what: &str, done: impl Fn(&SourceState) -> bool) -> SourceState {
        let mut state = self.state.clone();
        let found = timeout(PATIENCE, state.wait_for(|state| done(state))).await;
        match found {
            Ok(found) => found.expect("still followed").clone(),
            Err(_) => panic!("{what}: {:?}", self.state.borrow()),
        }
    }

    async fn synced(&mut self) -> SourceState {
        self.until("synced", |state| state.synced).await
    }
}

fn pod(name: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"phase": "Running", "podIP": address},
    })
}

fn pods(state: &SourceState) -> Vec<&str> {
    let of = state.objects.namespaces.get("shop");
    of.into_iter()
        .flat_map(|of| of.pods.keys())
        .map(|name| &**name)
        .collect()
}

fn has(state: &SourceState, name: &str) -> bool {
    pods(state).contains(&name)
}

#[tokio::test]
async fn a_long_list_comes_in_pages() {
    let server = ApiServer::start().await;
    for index in 0..1203 {
        server.put(PODS, pod(&format!("p{index}"), "10.0.0.1"));
    }
    let mut following = Following::start(&server);
    let state = following.synced().await;
    assert_eq!(pods(&state).len(), 1203);
    let pages = server.requests("/api/v1/pods?&limit=500");
    assert_eq!(pages.len(), 3, "{pages:?}");
    server.put(PODS, pod("new", "10.0.0.2"));
    following
        .until("a new pod", |state| has(state, "new"))
        .await;
}

#[tokio::test]
async fn a_list_may_be_a_stream() {
    let server = ApiServer::start().await;
    server.stream_lists();
    server.put(PODS, pod("a", "10.0.0.1"));
    let mut following = Following::start(&server);
    let state = following.synced().await;
    assert_eq!(pods(&state), ["a"]);
    let pages = server.requests("/pods?&limit=");
    assert!(pages.is_empty(), "{pages:?}");
    server.put(PODS, pod("b", "10.0.0.2"));
    server.delete(PODS, "shop/a");
    following
        .until("the changes", |state| pods(state) == ["b"])
        .await;
}

/// Nothing that is there all the time is missing for a moment.
#[tokio::test]
async fn history_that_is_gone_takes_nothing_away() {
    let server = ApiServer::start().await;
    for name in ["stays", "goes"] {
        server.put(PODS, pod(name, "10.0.0.1"));
    }
    let mut following = Following::start(&server);
    following.synced().await;
    let mut every = following.state.clone();
    let watcher = tokio::spawn(async move {
        while every.changed().await.is_ok() {
            assert!(has(&every.borrow_and_update(), "stays"));
        }
    });
    for round in 0..3 {
        // All of it happens while nobody watches.
        server.refuse("/pods", 503);
        server.cut_watches();
        server.put(PODS, pod(&format!("new-{round}"), "10.0.0.3"));
        server.delete(PODS, "shop/goes");
        server.forget_history();
        server.recover();
        let name = format!("new-{round}");
        following
            .until("the relist", |state| {
                has(state, &name) && !has(state, "goes")
            })
            .await;
    }
    assert!(!watcher.is_finished(), "something was missing");
    watcher.abort();
}

#[tokio::test]
async fn an_outage_changes_nothing_and_ends() {
    let server = ApiServer::start().await;
    server.put(PODS, pod("a", "10.0.0.1"));
    let mut following = Following::start(&server);
    following.synced().await;
    server.refuse("/", 503);
    server.cut_watches();
    let state = following
        .until("a finding", |state| !state.findings.is_empty())
        .await;
    assert!(state.synced && has(&state, "a"));
    server.put(PODS, pod("b", "10.0.0.2"));
    server.recover();
    let state = following
        .until("the end of it", |state| {
            has(state, "b") && state.findings.is_empty()
        })
        .await;
    assert!(has(&state, "a"));
}

#[tokio::test]
async fn a_missing_permission_is_named() {
    let server = ApiServer::start().await;
    server.refuse("/pods", 403);
    server.refuse("/secrets", 403);
    let mut following = Following::start(&server);
    let state = following
        .until("findings", |state| state.findings.len() == 2)
        .await;
    assert!(!state.synced);
    let texts: Vec<_> = state.findings.iter().map(ToString::to_string).collect();
    assert!(texts[0].contains("no permission to"), "{texts:?}");
    assert!(texts[0].contains("pods"), "{texts:?}");
    assert!(texts[1].starts_with("Info"), "{texts:?}");
    // Of the two only one is needed.
    server.recover();
    server.refuse("/secrets", 403);
    let state = following.synced().await;
    assert_eq!(state.findings.len(), 1, "{:?}", state.findings);
}

fn route(name: &str) -> Value {
    json!({
        "apiVersion": format!("{GATEWAY}/v1"), "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"parentRefs": [{"kind": "Service", "group": "", "name": "s"}]},
    })
}

fn routes(state: &SourceState) -> usize {
    let of = state.objects.namespaces.get("shop");
    of.map_or(0, |of| of.http_routes.len())
}

#[tokio::test]
async fn custom_resources_come_and_go() {
    let server = ApiServer::start().await;
    let mut following = Following::start(&server);
    let state = following.synced().await;
    assert!(state.findings.is_empty(), "absence is no error");

    let old = format!("/apis/{GATEWAY}/v1beta1/httproutes");
    server.put(&old, route("a"));
    server.serve_group(GATEWAY, &[("v1beta1", &["httproutes"])]);
    following
        .until("the old version", |state| routes(state) == 1)
        .await;

    // A newer version holds the same objects.
    let new = format!("/apis/{GATEWAY}/v1/httproutes");
    server.put(&new, route("a"));
    server.put(&new, route("b"));
    server.serve_group(
        GATEWAY,
        &[("v1", &["httproutes"]), ("v1beta1", &["httproutes"])],
    );
    following
        .until("the new version", |state| routes(state) == 2)
        .await;

    // An API server that starts lacks them for a moment.
    server.serve_group(GATEWAY, &[]);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(routes(&following.state.borrow()), 2);
    server.serve_group(GATEWAY, &[("v1", &["httproutes"])]);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(routes(&following.state.borrow()), 2);

    server.serve_group(GATEWAY, &[]);
    following.until("none", |state| routes(state) == 0).await;
}

fn policy(ports: &[&str], uid: &str) -> Value {
    json!({
        "apiVersion": format!("{SECURITY}/v1"), "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "shop", "uid": uid},
        "spec": {"rules": [{"to": [{"operation": {"ports": ports}}]}]},
    })
}

#[tokio::test]
async fn the_last_good_version_stays_in_force() {
    let server = ApiServer::start().await;
    let path = format!("/apis/{SECURITY}/v1/authorizationpolicies");
    server.serve_group(SECURITY, &[("v1", &["authorizationpolicies"])]);
    server.put(&path, policy(&["80"], "1"));
    let mut following = Following::start(&server);
    let good = following.synced().await;
    let of = |state: &SourceState| {
        let of = state.objects.namespaces.get("shop");
        of.and_then(|of| of.authorization_policies.get("p").cloned())
    };
    let good = of(&good).expect("there");

    server.put(&path, policy(&["eighty"], "1"));
    let state = following
        .until("a finding", |state| !state.findings.is_empty())
        .await;
    assert_eq!(of(&state).as_ref(), Some(&good));
    let text = state.findings[0].to_string();
    assert!(text.contains("AuthorizationPolicy shop/p"), "{text}");
    assert!(
        text.contains("spec.rules[0].to[0].operation.ports[0]"),
        "{text}"
    );
    assert!(text.contains("the last good version stays"), "{text}");

    // Another object of the same name: nothing of the old one holds.
    server.delete(&path, "shop/p");
    server.put(&path, policy(&["ninety"], "2"));
    let state = following
        .until("it fails closed", |state| {
            state
                .findings
                .iter()
                .any(|finding| finding.message.contains("fails closed"))
        })
        .await;
    assert_ne!(of(&state).as_ref(), Some(&good));

    server.put(&path, policy(&["90"], "2"));
    let state = following
        .until("mended", |state| state.findings.is_empty())
        .await;
    assert!(of(&state).is_some());
}
