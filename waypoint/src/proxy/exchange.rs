//! The record of one request, from its head to the last byte of its response. Whoever holds it
//! last ends it, and ending it is what telemetry is told.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use adit_shared::model::Workload;
use adit_shared::policy::http::Claims;
use adit_shared::telemetry::ServiceLabels;
use http::header::HOST;
use http::{HeaderMap, HeaderName, Method, Uri, Version};
use serde_json::{Value, json};

use super::body::{BodyError, MessageCounter, RequestProgress};
use super::consumer::Place;
use super::destination::Target;
use super::http::Downstream;
use super::http2::Before;
use super::pick::Picked;
use super::reply::Reply;
use super::routing::Routed;
use crate::balance;
use crate::external_authorization::HeaderChange;
use crate::state::{PortView, View};
use crate::telemetry::{
    Candidate, Followed, Peer, Protocol, RequestEvent, RequestTelemetry, ResponseFlags,
    TelemetrySettings, TraceContext, Traffic,
};

/// One request.
pub struct Exchange {
    /// On whose connection.
    pub downstream: Rc<Downstream>,
    /// When its head was read.
    pub started: Instant,
    /// What the client spoke.
    pub version: Version,
    /// The content type says gRPC.
    pub grpc: bool,
    /// Method.
    pub method: Method,
    /// Path and query, as the client sent them.
    pub uri: Uri,
    /// The client's headers, as they are sent on.
    pub headers: HeaderMap,
    /// The same before a route's filters changed them; `None`: none did.
    pub original: Option<HeaderMap>,
    /// Path and query as they are sent on, where a route has changed them.
    pub sent_uri: Option<Uri>,
    /// Headers that a provider of external authorization has set.
    pub vouched: Vec<HeaderName>,
    /// Where it was judged once more, after a consumer's route.
    pub consumer: Option<Box<Place>>,
    /// What goes before its response, where its client speaks HTTP/2.
    pub before: Option<Before>,
    /// Its body.
    pub request: Rc<RequestProgress>,
    /// What is measured and logged of it; `None`: its destination is not known.
    pub telemetry: Option<Arc<TelemetrySettings>>,
    /// Its trace.
    pub trace: TraceContext,
    /// Status of the answer; 0: none yet.
    pub status: u16,
    /// Headers of the answer, where somebody wants to log them.
    pub response_headers: HeaderMap,
    /// gRPC status, once it is known.
    pub grpc_status: Option<u32>,
    /// Why it failed.
    pub flags: ResponseFlags,
    /// One word for what became of it.
    pub details: &'static str,
    /// What the end user's token says.
    pub claims: Option<Arc<Claims>>,
    /// The policy that denied it.
    pub policy: Option<Arc<str>>,
    /// The rule that decided, as `namespace/route.rule`.
    pub route: Arc<str>,
    /// Where it was sent, as telemetry names it.
    pub cluster: Arc<str>,
    /// When it was sent to the endpoint that answered.
    pub sent: Option<Instant>,
    /// Until the head of that answer.
    pub upstream_time: Option<Duration>,
    /// The service that was addressed.
    pub service: Option<Arc<ServiceLabels>>,
    /// The endpoint.
    pub endpoint: Option<Peer>,
    /// Counts it as active there.
    pub held: Option<balance::Picked>,
    /// The workload that it is.
    pub workload: Option<Arc<Workload>>,
    /// The version of the view in which policies were asked last.
    pub judged: Cell<u64>,
    /// The port in that view.
    pub judged_by: RefCell<Option<Arc<PortView>>>,
    /// The endpoint's address.
    pub upstream_host: Option<SocketAddr>,
    /// Our address towards it.
    pub upstream_local: Option<SocketAddr>,
    /// What is known of a failure towards it.
    pub upstream_failure: Option<String>,
    /// Tries beyond the first.
    pub retries: u32,
    /// What the rule that decided does to the response.
    pub routed: Option<Routed>,
    /// What external authorization does to it.
    pub response_changes: Vec<HeaderChange>,
    /// Somebody watches what becomes of it.
    followed: Option<Box<Followed>>,
    response_bytes: u64,
    response_messages: u64,
    counter: Option<MessageCounter>,
    ended: bool,
}

const NO_TRACE: TraceContext = TraceContext {
    trace_id: [0; 16],
    span_id: [0; 8],
    parent_id: None,
    sampled: false,
};

thread_local! {
    /// The name of the route where none decides, as Envoy has it.
    static NO_ROUTE: Arc<str> = Arc::from("default");
}

impl Exchange {
    /// A request whose head has been read.
    pub fn new(
        downstream: Rc<Downstream>,
        head: &http::request::Parts,
        grpc: bool,
        request: Rc<RequestProgress>,
    ) -> Box<Self> {
        downstream.begin();
        let followed = match downstream.worker.shared.requests.following().is_wanted() {
            true => follow(&downstream, head),
            false => None,
        };
        Box::new(Self {
            followed,
            downstream,
            started: Instant::now(),
            version: head.version,
            grpc,
            method: head.method.clone(),
            uri: head.uri.clone(),
            headers: HeaderMap::new(),
            original: None,
            sent_uri: None,
            vouched: Vec::new(),
            consumer: None,
            before: None,
            request,
            telemetry: None,
            trace: NO_TRACE,
            status: 0,
            response_headers: HeaderMap::new(),
            grpc_status: None,
            flags: ResponseFlags::NONE,
            details: "via_upstream",
            claims: None,
            policy: None,
            route: NO_ROUTE.with(Clone::clone),
            cluster: Arc::default(),
            sent: None,
            upstream_time: None,
            service: None,
            endpoint: None,
            held: None,
            workload: None,
            judged: Cell::new(0),
            judged_by: RefCell::new(None),
            upstream_host: None,
            upstream_local: None,
            upstream_failure: None,
            retries: 0,
            routed: None,
            response_changes: Vec::new(),
            response_bytes: 0,
            response_messages: 0,
            counter: grpc.then(MessageCounter::default),
            ended: false,
        })
    }

    /// Tells whoever follows the request what a stage has decided.
    pub fn note(&self, stage: &'static str, decided: impl FnOnce() -> Value) {
        if let Some(followed) = &self.followed {
            followed.step(stage, decided());
        }
    }

    /// It is for this destination.
    pub fn addressed(&mut self, target: &Target) {
        self.telemetry = Some(target.telemetry().clone());
        if let Target::Service(port) = target {
            self.service = Some(port.labels.clone());
        }
    }

    /// The policies of this view have allowed it.
    pub fn allowed(&self, view: &View, target: &Target) {
        self.judged.set(view.version());
        if let Target::Service(port) = target {
            self.judged_by.replace(Some(port.clone()));
        }
    }

    /// It is sent to this endpoint.
    pub fn send_to(&mut self, picked: Picked) {
        let Picked { reach, held } = picked;
        self.workload = Some(reach.workload);
        self.endpoint = Some(reach.peer);
        self.upstream_host = Some(reach.endpoint.address);
        self.held = held;
        self.sent = Some(Instant::now());
    }

    /// It is answered by us.
    pub fn answer(&mut self, reply: &Reply) {
        self.status = if self.grpc {
            200
        } else {
            reply.status.as_u16()
        };
        self.flags |= reply.flags;
        self.details = reply.reason;
        if self.grpc {
            self.grpc_status = Some(u32::from(reply.grpc_code()));
        }
    }

    /// Whether somebody reads the headers of responses.
    pub fn wants_response_headers(&self) -> bool {
        let telemetry = self.telemetry.as_ref();
        telemetry.is_some_and(|telemetry| telemetry.reads_response_headers())
    }

    /// Bytes of the response went by.
    pub fn see_response(&mut self, data: &[u8]) {
        self.response_bytes += data.len() as u64;
        if let Some(counter) = &mut self.counter {
            self.response_messages += counter.count(data);
        }
    }

    /// Bytes went by of which nothing is known, towards the client.
    pub fn count_response(&mut self, bytes: u64) {
        self.response_bytes += bytes;
    }

    /// The response's trailers went by.
    pub fn see_trailers(&mut self, trailers: &HeaderMap) {
        if self.grpc {
            self.see_grpc_status(trailers);
        }
    }

    /// Reads the gRPC status of headers or trailers.
    pub fn see_grpc_status(&mut self, headers: &HeaderMap) {
        if let Some(status) = grpc_status(headers) {
            self.grpc_status = Some(status);
        }
    }

    /// The response was sent.
    pub fn finish(mut self: Box<Self>) {
        self.end();
    }

    /// The response could not be sent to its end.
    pub fn fail_body(mut self: Box<Self>, error: &BodyError) {
        let (flags, details) = match error {
            BodyError::Timeout => (ResponseFlags::UPSTREAM_TIMEOUT, "response_timeout"),
            BodyError::Denied => (ResponseFlags::NONE, Reply::DENIED.reason),
            _ => (
                ResponseFlags::UPSTREAM_TERMINATION,
                "upstream_closed_during_response",
            ),
        };
        self.flags |= flags;
        self.details = details;
        self.end();
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.held = None;
        self.note("end", || {
            json!({
                "status": self.status,
                "grpcStatus": self.grpc_status,
                "flags": self.flags.to_string(),
                "details": self.details,
                "failure": self.upstream_failure,
                "policy": self.policy.as_deref(),
                "retries": self.retries,
                "requestBytes": self.request.bytes.get(),
                "responseBytes": self.response_bytes,
            })
        });
        self.followed = None;
        self.downstream.end();
        self.downstream.worker.ended(self);
    }

    /// Has it measured and logged.
    pub fn record(&self, telemetry: &RequestTelemetry, default: &Arc<TelemetrySettings>) {
        let duration = self.started.elapsed();
        let host = self.headers.get(HOST);
        let path = self.uri.path_and_query();
        let event = RequestEvent {
            started: SystemTime::now() - duration,
            duration,
            upstream_time: self.upstream_time,
            protocol: match (self.version, self.grpc) {
                (Version::HTTP_2, true) => Protocol::Grpc,
                (Version::HTTP_2, false) => Protocol::Http2,
                (Version::HTTP_10, _) => Protocol::Http10,
                _ => Protocol::Http11,
            },
            method: &self.method,
            authority: host.and_then(|host| host.to_str().ok()).unwrap_or_default(),
            path: path.map_or("", |path| path.as_str()),
            request_headers: &self.headers,
            response_headers: &self.response_headers,
            status: self.status,
            grpc_status: self.grpc_status,
            flags: self.flags,
            details: self.details,
            upstream_failure: self.upstream_failure.as_deref().unwrap_or_default(),
            traffic: Traffic {
                request_bytes: self.request.bytes.get(),
                response_bytes: self.response_bytes,
                request_messages: self.request.messages.get(),
                response_messages: self.response_messages,
            },
            source: &self.downstream.caller.labels,
            destination: self.endpoint.as_ref(),
            service: self.service.as_ref(),
            route_name: &self.route,
            upstream_cluster: &self.cluster,
            upstream_host: self.upstream_host,
            upstream_local: self.upstream_local,
            downstream_local: self.downstream.destination.dialled(),
            downstream_remote: Some(self.downstream.client),
            retries: self.retries,
            policy: self.policy.as_deref(),
            trace: &self.trace,
        };
        telemetry.record(&event, self.telemetry.as_ref().unwrap_or(default));
    }
}

/// Follows a request, if it is the one that somebody waits for.
#[cold]
fn follow(downstream: &Downstream, head: &http::request::Parts) -> Option<Box<Followed>> {
    let source = downstream.caller.identity.to_string();
    let candidate = Candidate {
        method: head.method.as_str(),
        path: head.uri.path(),
        authority: head.uri.authority().map(|authority| authority.as_str()),
        headers: &head.headers,
        source: &source,
    };
    let requests = &downstream.worker.shared.requests;
    let followed = requests.following().begin(&candidate)?;
    followed.step(
        "received",
        json!({
            "method": head.method.as_str(),
            "path": head.uri.path(),
            "version": format!("{:?}", head.version),
            "source": source,
            "sourceAddress": downstream.client,
            "dialled": downstream.destination.dialled(),
        }),
    );
    Some(followed)
}

/// The gRPC status in headers or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.ended {
            // Neither finished nor failed: the client went away.
            self.flags |= ResponseFlags::DOWNSTREAM_TERMINATION;
            self.details = "downstream_remote_disconnect";
            self.end();
        }
    }
}
