//! An API server that is small enough to be understood: objects in a map, and pods whose
//! ports answer HTTP behind `portforward`. It speaks the protocol as Kubernetes does, so that
//! what is tested is what goes over the wire.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

/// What a port of a pod answers, by method and path with query. `None`: nobody listens.
type Port = Option<BTreeMap<String, String>>;

#[derive(Default)]
struct State {
    /// By path: `/api/v1/namespaces/shop/pods/web`.
    objects: BTreeMap<String, Value>,
    /// By `namespace/pod:port`.
    ports: BTreeMap<String, Port>,
    /// Ports that close the next connection without a word.
    closing: BTreeSet<String>,
    /// Requests for which there is no right: method and a part of the path.
    forbidden: Vec<(Method, String)>,
    /// Whether the Gateway API is there.
    gateway_api: bool,
    version: u64,
    log: Vec<String>,
    /// Bodies of PATCH, with query and content type.
    patches: Vec<(String, String, Value)>,
}

/// A running server; it ends with the value.
pub struct Fake {
    state: Arc<Mutex<State>>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    served: Option<thread::JoinHandle<()>>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(served) = self.served.take() {
            let _ = served.join();
        }
    }
}

impl Fake {
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State {
            gateway_api: true,
            ..State::default()
        }));
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let shared = state.clone();
        let served = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                tokio::select! {
                    () = serve(listener, shared) => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            state,
            address: told.recv().unwrap(),
            stop: Some(stop),
            served: Some(served),
        }
    }

    /// A kubeconfig with two contexts: `fake`, whose namespace is shop, and `away`, where
    /// nobody listens.
    pub fn kubeconfig(&self) -> NamedTempFile {
        let cluster = |name: &str, server: &str| json!({"name": name, "cluster": {"server": format!("http://{server}")}});
        let context = |name: &str, namespace: &str| json!({"name": name, "context": {"cluster": name, "user": "u", "namespace": namespace}});
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [cluster("fake", &self.address.to_string()), cluster("away", "127.0.0.1:1")],
            "contexts": [context("fake", "shop"), context("away", "default")],
            "users": [{"name": "u", "user": {"token": "secret"}}],
        });
        let mut file = NamedTempFile::new().unwrap();
        write!(file, "{config}").unwrap();
        file
    }

    pub fn put(&self, object: Value) {
        let mut state = self.state.lock().unwrap();
        let path = path_of(&object);
        state.put(&path, object);
    }

    pub fn get(&self, path: &str) -> Option<Value> {
        self.state.lock().unwrap().objects.get(path).cloned()
    }

    pub fn answer(&self, pod: &str, port: u16, request: &str, body: &str) {
        let mut state = self.state.lock().unwrap();
        let port = state.ports.entry(format!("{pod}:{port}")).or_default();
        let answers = port.get_or_insert_default();
        answers.insert(request.to_owned(), body.to_owned());
    }

    pub fn nobody_listens(&self, pod: &str, port: u16) {
        let mut state = self.state.lock().unwrap();
        state.ports.insert(format!("{pod}:{port}"), None);
    }

    pub fn closes_once(&self, pod: &str, port: u16) {
        let mut state = self.state.lock().unwrap();
        state.closing.insert(format!("{pod}:{port}"));
    }

    pub fn forbid(&self, method: Method, path: &str) {
        let mut state = self.state.lock().unwrap();
        state.forbidden.push((method, path.to_owned()));
    }

    pub fn without_gateway_api(&self) {
        self.state.lock().unwrap().gateway_api = false;
    }

    pub fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    pub fn patches(&self) -> Vec<(String, String, Value)> {
        self.state.lock().unwrap().patches.clone()
    }
}

/// Kinds: group, version, kind, plural, namespaced, short name.
const KINDS: [(&str, &str, &str, &str, bool, &str); 10] = [
    ("", "v1", "Namespace", "namespaces", false, "ns"),
    ("", "v1", "Node", "nodes", false, "no"),
    ("", "v1", "Pod", "pods", true, "po"),
    ("", "v1", "Service", "services", true, "svc"),
    ("", "v1", "ConfigMap", "configmaps", true, "cm"),
    ("apps", "v1", "Deployment", "deployments", true, "deploy"),
    ("apps", "v1", "DaemonSet", "daemonsets", true, "ds"),
    (GATEWAY, "v1", "GatewayClass", "gatewayclasses", false, "gc"),
    (GATEWAY, "v1", "Gateway", "gateways", true, "gtw"),
    (
        "security.istio.io",
        "v1",
        "AuthorizationPolicy",
        "authorizationpolicies",
        true,
        "ap",
    ),
];
const GATEWAY: &str = "gateway.networking.k8s.io";

fn path_of(object: &Value) -> String {
    let kind = object["kind"].as_str().unwrap();
    let version = object["apiVersion"].as_str().unwrap();
    let (group, _, _, plural, namespaced, _) = KINDS.iter().find(|known| known.2 == kind).unwrap();
    let root = if group.is_empty() { "api" } else { "apis" };
    let metadata = &object["metadata"];
    let name = metadata["name"].as_str().unwrap();
    match namespaced {
        true => {
            let namespace = metadata["namespace"].as_str().unwrap_or("default");
            format!("/{root}/{version}/namespaces/{namespace}/{plural}/{name}")
        }
        false => format!("/{root}/{version}/{plural}/{name}"),
    }
}

fn discovery(core: bool, gateway_api: bool) -> Value {
    let mut groups: BTreeMap<(&str, &str), Vec<Value>> = BTreeMap::new();
    for (group, version, kind, plural, namespaced, short) in KINDS {
        if group.is_empty() != core || (group == GATEWAY && !gateway_api) {
            continue;
        }
        let scope = if namespaced { "Namespaced" } else { "Cluster" };
        groups.entry((group, version)).or_default().push(json!({
            "resource": plural, "scope": scope, "singularResource": kind.to_lowercase(),
            "responseKind": {"group": group, "version": version, "kind": kind},
            "shortNames": [short], "verbs": ["get", "list", "patch", "delete"],
        }));
    }
    let items: Vec<Value> = groups
        .into_iter()
        .map(|((group, version), resources)| {
            json!({"metadata": {"name": group},
                "versions": [{"version": version, "resources": resources}]})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {}, "items": items})
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let state = state.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let state = state.clone();
                async move { Ok::<_, Infallible>(respond(&state, request).await) }
            });
            let connection = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            let _ = connection.await;
        });
    }
}

async fn respond(state: &Arc<Mutex<State>>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.headers().get(header::AUTHORIZATION)
        != Some(&HeaderValue::from_static("Bearer secret"))
    {
        return status(StatusCode::UNAUTHORIZED, "Unauthorized");
    }
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let method = request.method().clone();
    {
        let mut state = state.lock().unwrap();
        state.log.push(format!("{method} {path}?{query}"));
        let mut forbidden = state.forbidden.iter();
        if forbidden.any(|(of, part)| *of == method && path.contains(part)) {
            let message = format!("x is forbidden: User \"u\" cannot {method} {path}");
            return status(StatusCode::FORBIDDEN, &message);
        }
    }
    if path.ends_with("/portforward") {
        return forward(state, request, &path, &query);
    }
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.map_or_else(String::new, |k| k.to_str().unwrap().to_owned());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut state = state.lock().unwrap();
    match (method, path.as_str()) {
        (Method::GET, "/version") => {
            let version = "v1.33.1";
            answer(
                &json!({"gitVersion": version, "major": "1", "minor": "33", "buildDate": "",
                "compiler": "", "gitCommit": "", "gitTreeState": "", "goVersion": "", "platform": ""}),
            )
        }
        (Method::GET, "/api") => answer(&discovery(true, false)),
        (Method::GET, "/apis") => answer(&discovery(false, state.gateway_api)),
        (Method::GET, path) => state.read(path, &query),
        (Method::PATCH, path) => {
            let patch: Value = serde_json::from_slice(&body).unwrap();
            state.patches.push((query, kind.clone(), patch.clone()));
            state.patch(path, &kind, patch)
        }
        (Method::POST, path) if path.ends_with("selfsubjectaccessreviews") => {
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            let plural = review["spec"]["resourceAttributes"]["resource"].clone();
            let mut forbidden = state.forbidden.iter();
            let denied = forbidden.any(|(of, part)| *of == Method::POST && plural == part.as_str());
            review["status"] = json!({"allowed": !denied});
            answer(&review)
        }
        (Method::DELETE, path) => match state.objects.remove(path) {
            Some(_) => answer(&json!({"kind": "Status", "apiVersion": "v1", "status": "Success"})),
            None => status(StatusCode::NOT_FOUND, "not found"),
        },
        _ => status(StatusCode::METHOD_NOT_ALLOWED, "no"),
    }
}

impl State {
    fn put(&mut self, path: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.objects.insert(path.to_owned(), object);
    }

    fn read(&self, path: &str, query: &str) -> Response<Full<Bytes>> {
        if let Some(object) = self.objects.get(path) {
            return answer(object);
        }
        let plural = path.rsplit('/').next().unwrap_or_default();
        let Some(known) = KINDS.iter().find(|known| known.3 == plural) else {
            return status(StatusCode::NOT_FOUND, &format!("{path} not found"));
        };
        let parameters: BTreeMap<&str, &str> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let wanted = parameters.get("labelSelector").copied().unwrap_or_default();
        let wanted = wanted.replace("%3D", "=").replace("%2F", "/");
        let prefix = path.trim_end_matches(plural);
        let all = self.objects.iter().filter(|(of, object)| {
            let labels = &object["metadata"]["labels"];
            object["kind"] == known.2
                && of.starts_with(prefix)
                && wanted
                    .split(',')
                    .filter(|pair| !pair.is_empty())
                    .all(|pair| {
                        let (key, value) = pair.split_once('=').unwrap();
                        labels[key] == value
                    })
        });
        // Two a page, however many are asked for: a client has to be content with it.
        let skip: usize = parameters
            .get("continue")
            .map_or(0, |token| token.parse().unwrap());
        let mut rest = all.skip(skip);
        let items: Vec<Value> = rest
            .by_ref()
            .take(2)
            .map(|(_, object)| {
                let mut object = object.clone();
                object.as_object_mut().unwrap().remove("kind");
                object.as_object_mut().unwrap().remove("apiVersion");
                object
            })
            .collect();
        let next = rest.next().map(|_| (skip + 2).to_string());
        answer(
            &json!({"kind": format!("{}List", known.2), "apiVersion": "v1",
            "metadata": {"resourceVersion": "1", "continue": next}, "items": items}),
        )
    }

    /// Good enough for objects with one manager.
    fn patch(&mut self, path: &str, kind: &str, patch: Value) -> Response<Full<Bytes>> {
        let before = self.objects.get(path).cloned();
        let apply = kind == "application/apply-patch+yaml";
        let Some(mut object) = before.clone().or(apply.then(|| json!({}))) else {
            return status(StatusCode::NOT_FOUND, "not found");
        };
        merge(&mut object, &patch);
        if before.as_ref() == Some(&object) {
            return answer(&object);
        }
        self.put(path, object);
        answer(&self.objects[path])
    }
}

/// RFC 7386.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    let map = into.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

fn answer(value: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn status(code: StatusCode, message: &str) -> Response<Full<Bytes>> {
    // As Kubernetes says it: `NotFound`, `Forbidden`.
    let reason = code.canonical_reason().unwrap_or_default();
    let mut response = answer(&json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason.replace(' ', ""), "code": code.as_u16(),
    }));
    *response.status_mut() = code;
    response
}

/// Answers the upgrade, and serves the port over the WebSocket.
fn forward(
    state: &Arc<Mutex<State>>,
    mut request: Request<Incoming>,
    path: &str,
    query: &str,
) -> Response<Full<Bytes>> {
    let parts: Vec<&str> = path.split('/').collect();
    let ["", "api", "v1", "namespaces", namespace, "pods", pod, _] = parts.as_slice() else {
        return status(StatusCode::NOT_FOUND, "no such path");
    };
    let port = query
        .trim_start_matches('&')
        .strip_prefix("ports=")
        .unwrap();
    let port: u16 = port.parse().unwrap();
    let name = format!("{namespace}/{pod}:{port}");
    let mut known = state.lock().unwrap();
    let closes = known.closing.remove(&name);
    let Some(answers) = known.ports.get(&name).cloned() else {
        return status(StatusCode::NOT_FOUND, "pod not found");
    };
    drop(known);
    let key = request.headers()[header::SEC_WEBSOCKET_KEY].clone();
    let upgrade = hyper::upgrade::on(&mut request);
    if closes {
        tokio::spawn(async { drop(upgrade.await) });
    } else {
        tokio::spawn(serve_port(upgrade, port, answers));
    }
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let accept = derive_accept_key(key.as_bytes());
    for (name, value) in [
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "websocket"),
        (header::SEC_WEBSOCKET_PROTOCOL, "v4.channel.k8s.io"),
        (header::SEC_WEBSOCKET_ACCEPT, accept.as_str()),
    ] {
        let value = HeaderValue::from_str(value).unwrap();
        response.headers_mut().insert(name, value);
    }
    response
}

/// Channel 0 is data, channel 1 errors; each begins with the port.
async fn serve_port(upgrade: OnUpgrade, port: u16, answers: Port) {
    let Ok(upgraded) = upgrade.await else { return };
    let mut socket =
        WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
    let [low, high] = port.to_le_bytes();
    for channel in [0, 1] {
        let begin = Message::binary(vec![channel, low, high]);
        if socket.send(begin).await.is_err() {
            return;
        }
    }
    let Some(answers) = answers else {
        let reason = format!("\u{1}dial tcp4 127.0.0.1:{port}: connect: connection refused");
        let _ = socket.send(Message::binary(reason.into_bytes())).await;
        let _ = socket.close(None).await;
        // A request that is not read would be answered by a reset, which overtakes the reason.
        while let Some(Ok(_)) = socket.next().await {}
        return;
    };
    let mut received = Vec::new();
    while let Some(Ok(message)) = socket.next().await {
        let Message::Binary(data) = message else {
            continue;
        };
        received.extend_from_slice(&data[1..]);
        let text = String::from_utf8_lossy(&received).into_owned();
        let Some((head, _)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        received.clear();
        assert!(head.contains(&format!("host: localhost:{port}")), "{head}");
        let line = head.lines().next().unwrap();
        let (code, body) = match answers.get(line.trim_end_matches(" HTTP/1.1")) {
            Some(body) => ("200 OK", body.as_str()),
            None => ("404 Not Found", "no such page"),
        };
        let text = format!(
            "HTTP/1.1 {code}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        for piece in text.as_bytes().chunks(1000) {
            let framed = [&[0], piece].concat();
            if socket.send(Message::binary(framed)).await.is_err() {
                return;
            }
        }
    }
}
