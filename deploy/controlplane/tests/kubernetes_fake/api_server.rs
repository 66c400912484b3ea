//! A small API server over HTTP on loopback: lists in pages, watches, history that can be
//! cut off, discovery, TokenReviews; and it can be out of order.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Events = mpsc::UnboundedSender<Result<Frame<Bytes>, Infallible>>;

/// A running server. Dropping it ends it.
pub struct ApiServer {
    state: Arc<Mutex<State>>,
    url: String,
    _task: JoinSet<()>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By the path of the list: objects by `namespace/name`.
    objects: HashMap<String, BTreeMap<String, Value>>,
    /// By the path of the list: (version, event).
    history: HashMap<String, Vec<(u64, Value)>>,
    /// Watches from before this version are told that it is gone.
    oldest: u64,
    watches: Vec<(String, Events)>,
    groups: BTreeMap<String, Vec<(String, Vec<String>)>>,
    /// Status code for everything whose path contains the text.
    refuse: Vec<(String, u16)>,
    review: Value,
    requests: Vec<String>,
    /// The pause before an answer to a TokenReview.
    review_delay: Duration,
    streams: bool,
}

impl ApiServer {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(Mutex::new(State {
            version: 10,
            ..State::default()
        }));
        let mut task = JoinSet::new();
        task.spawn(accept(listener, state.clone()));
        Self {
            state,
            url,
            _task: task,
        }
    }

    pub fn client(&self) -> kube::Client {
        let config = kube::Config::new(self.url.parse().expect("a URL"));
        // Retries inside the client would hide what the source does.
        let config = {
            let mut config = config;
            config.default_retry = false;
            config
        };
        kube::Client::try_from(config).expect("a client")
    }

    /// Creates or changes an object of the list at `path`, for example `/api/v1/pods`.
    pub fn put(&self, path: &str, mut object: Value) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let name = key(&object);
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = format!("uid-{name}").replace('/', ".").into();
        }
        let list = state.objects.entry(path.to_owned()).or_default();
        let kind = match list.insert(name, object.clone()) {
            None => "ADDED",
            Some(_) => "MODIFIED",
        };
        state.event(path, json!({"type": kind, "object": object}));
    }

    pub fn delete(&self, path: &str, name: &str) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version;
        let list = state.objects.entry(path.to_owned()).or_default();
        if let Some(mut object) = list.remove(name) {
            object["metadata"]["resourceVersion"] = version.to_string().into();
            state.event(path, json!({"type": "DELETED", "object": object}));
        }
    }

    /// What discovery says of a group: versions and the plurals in each.
    pub fn serve_group(&self, group: &str, versions: &[(&str, &[&str])]) {
        let versions = versions
            .iter()
            .map(|(version, plurals)| {
                let plurals = plurals.iter().map(|plural| (*plural).to_owned()).collect();
                ((*version).to_owned(), plurals)
            })
            .collect();
        self.state.lock().groups.insert(group.to_owned(), versions);
    }

    /// Answers with `code` whatever has `part` in its path.
    pub fn refuse(&self, part: &str, code: u16) {
        self.state.lock().refuse.push((part.to_owned(), code));
    }

    /// Answers as usual again.
    pub fn recover(&self) {
        self.state.lock().refuse.clear();
    }

    /// Ends all watches.
    pub fn cut_watches(&self) {
        self.state.lock().watches.clear();
    }

    /// Forgets all history: who was watching has to list again.
    pub fn forget_history(&self) {
        let mut state = self.state.lock();
        state.oldest = state.version;
        state.history.clear();
    }

    /// Answers `sendInitialEvents`.
    pub fn stream_lists(&self) {
        self.state.lock().streams = true;
    }

    pub fn answer_reviews(&self, status: Value, delay: Duration) {
        let mut state = self.state.lock();
        state.review = status;
        state.review_delay = delay;
    }

    /// The requests so far whose path and query contain the text.
    pub fn requests(&self, part: &str) -> Vec<String> {
        let state = self.state.lock();
        let with = state.requests.iter().filter(|line| line.contains(part));
        with.cloned().collect()
    }
}

fn key(object: &Value) -> String {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default();
    match text("namespace") {
        "" => text("name").to_owned(),
        namespace => format!("{namespace}/{}", text("name")),
    }
}

impl State {
    fn event(&mut self, path: &str, event: Value) {
        let version = self.version;
        let line = line(&event);
        self.watches.retain(|(watched, events)| {
            watched != path || events.send(Ok(Frame::data(line.clone()))).is_ok()
        });
        let history = self.history.entry(path.to_owned()).or_default();
        history.push((version, event));
    }

    fn list(&self, path: &str, query: &HashMap<String, String>) -> Value {
        let empty = BTreeMap::new();
        let all = self.objects.get(path).unwrap_or(&empty);
        let start: usize = query
            .get("continue")
            .and_then(|text| text.parse().ok())
            .unwrap_or_default();
        let limit = query
            .get("limit")
            .and_then(|text| text.parse().ok())
            .unwrap_or(usize::MAX);
        let items: Vec<_> = all.values().skip(start).take(limit).collect();
        let end = start + items.len();
        let next = match end < all.len() {
            true => end.to_string(),
            false => String::new(),
        };
        json!({
            "apiVersion": "v1", "kind": "List",
            "metadata": {"resourceVersion": self.version.to_string(), "continue": next},
            "items": items,
        })
    }

    fn watch(&mut self, path: &str, query: &HashMap<String, String>) -> Response<Body> {
        let (events, stream) = mpsc::unbounded_channel();
        let send = |event: &Value| drop(events.send(Ok(Frame::data(line(event)))));
        if query.contains_key("sendInitialEvents") {
            if !self.streams {
                return failure(422, "Invalid", "sendInitialEvents is forbidden");
            }
            for object in self
                .objects
                .get(path)
                .into_iter()
                .flat_map(BTreeMap::values)
            {
                send(&json!({"type": "ADDED", "object": object}));
            }
            send(&json!({"type": "BOOKMARK", "object": {
                "apiVersion": "v1", "kind": "X", "metadata": {
                    "resourceVersion": self.version.to_string(),
                    "annotations": {"k8s.io/initial-events-end": "true"}}}}));
        } else {
            let from: u64 = query
                .get("resourceVersion")
                .and_then(|text| text.parse().ok())
                .unwrap_or_default();
            if from < self.oldest {
                send(&json!({"type": "ERROR", "object": status(410, "Expired", "too old")}));
                return stream_of(stream);
            }
            for (version, event) in self.history.get(path).into_iter().flatten() {
                if *version > from {
                    send(event);
                }
            }
        }
        self.watches.push((path.to_owned(), events));
        stream_of(stream)
    }
}

fn stream_of(events: mpsc::UnboundedReceiver<Result<Frame<Bytes>, Infallible>>) -> Response<Body> {
    let frames = futures_util::stream::unfold(events, |mut events| async move {
        Some((events.recv().await?, events))
    });
    Response::new(StreamBody::new(frames).boxed_unsync())
}

fn line(event: &Value) -> Bytes {
    Bytes::from(format!("{event}\n"))
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Status", "status": "Failure",
        "code": code, "reason": reason, "message": message})
}

fn json_of(code: u16, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(code).expect("a status code");
    response
}

fn failure(code: u16, reason: &str, message: &str) -> Response<Body> {
    json_of(code, &status(code, reason, message))
}

async fn accept(listener: TcpListener, state: Arc<Mutex<State>>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            return;
        };
        let state = state.clone();
        connections.spawn(async move {
            let service = service_fn(|request| {
                let state = state.clone();
                async move { Ok::<_, Infallible>(answer(&state, request).await) }
            });
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(tcp), service)
                .await;
        });
    }
}

async fn answer(state: &Mutex<State>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let query: HashMap<String, String> = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let review = {
        let mut state = state.lock();
        state.requests.push(request.uri().to_string());
        let refused = state.refuse.iter().find(|(part, _)| path.contains(part));
        if let Some((_, code)) = refused {
            let reason = match code {
                403 => "Forbidden",
                404 => "NotFound",
                _ => "ServiceUnavailable",
            };
            return failure(*code, reason, &format!("{path} is refused"));
        }
        if path == "/apis" {
            return json_of(200, &groups(&state.groups));
        }
        if let Some(version) = path.strip_prefix("/apis/")
            && let Some((group, version)) = version.split_once('/')
            && !version.contains('/')
        {
            return resources(&state.groups, group, version);
        }
        if !path.ends_with("/tokenreviews") {
            return match query.get("watch").map(String::as_str) {
                Some("true") => state.watch(&path, &query),
                _ => json_of(200, &state.list(&path, &query)),
            };
        }
        (state.review.clone(), state.review_delay)
    };
    let (status, delay) = review;
    tokio::time::sleep(delay).await;
    json_of(
        201,
        &json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "metadata": {}, "spec": {}, "status": status}),
    )
}

fn groups(groups: &BTreeMap<String, Vec<(String, Vec<String>)>>) -> Value {
    let groups: Vec<_> = groups
        .iter()
        .map(|(name, versions)| {
            let versions: Vec<_> = versions
                .iter()
                .map(|(version, _)| {
                    json!({"groupVersion": format!("{name}/{version}"), "version": version})
                })
                .collect();
            json!({"name": name, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

fn resources(
    groups: &BTreeMap<String, Vec<(String, Vec<String>)>>,
    group: &str,
    version: &str,
) -> Response<Body> {
    let found = groups
        .get(group)
        .into_iter()
        .flatten()
        .find(|(name, _)| name == version);
    let Some((_, plurals)) = found else {
        return failure(404, "NotFound", "no such group");
    };
    let resources: Vec<_> = plurals
        .iter()
        .map(|plural| {
            json!({"name": plural, "singularName": "", "namespaced": true, "kind": "X",
                "verbs": ["get", "list", "watch"]})
        })
        .collect();
    json_of(
        200,
        &json!({"kind": "APIResourceList", "apiVersion": "v1",
            "groupVersion": format!("{group}/{version}"), "resources": resources}),
    )
}
