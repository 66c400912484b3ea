//! The record of one request, from its head to the last byte of its response. Whoever holds it
//! last ends it, and ending it is what telemetry is told.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_shared::model::Workload;
use http::{HeaderMap, Method, Uri, Version};

use super::body::{BodyError, MessageCounter, RequestProgress};
use super::flags::ResponseFlags;
use super::http::Downstream;
use super::reply::Reply;

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
    /// Its body.
    pub request: Rc<RequestProgress>,
    /// Status of the answer; 0: none yet.
    pub status: u16,
    /// gRPC status, once it is known.
    pub grpc_status: Option<u32>,
    /// Why it failed.
    pub flags: ResponseFlags,
    /// One word for what became of it.
    pub details: &'static str,
    /// When it was sent to the endpoint that answered.
    pub sent: Option<Instant>,
    /// Until the head of that answer.
    pub upstream_time: Option<Duration>,
    /// The endpoint.
    pub endpoint: Option<Arc<Workload>>,
    /// Its address.
    pub upstream_host: Option<SocketAddr>,
    /// Our address towards it.
    pub upstream_local: Option<SocketAddr>,
    /// What is known of a failure towards it.
    pub upstream_failure: Option<String>,
    /// Tries beyond the first.
    pub retries: u32,
    response_bytes: u64,
    response_messages: u64,
    counter: Option<MessageCounter>,
    ended: bool,
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
        Box::new(Self {
            downstream,
            started: Instant::now(),
            version: head.version,
            grpc,
            method: head.method.clone(),
            uri: head.uri.clone(),
            headers: HeaderMap::new(),
            request,
            status: 0,
            grpc_status: None,
            flags: ResponseFlags::NONE,
            details: "via_upstream",
            sent: None,
            upstream_time: None,
            endpoint: None,
            upstream_host: None,
            upstream_local: None,
            upstream_failure: None,
            retries: 0,
            response_bytes: 0,
            response_messages: 0,
            counter: grpc.then(MessageCounter::default),
            ended: false,
        })
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
        let status = headers.get("grpc-status").and_then(|v| v.to_str().ok());
        if let Some(status) = status.and_then(|text| text.parse().ok()) {
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
            _ => (
                ResponseFlags::UPSTREAM_TERMINATION,
                "upstream_closed_during_response",
            ),
        };
        self.flags |= flags;
        self.details = details;
        self.end();
    }

    /// Bytes of the response's body so far.
    pub fn response_bytes(&self) -> u64 {
        self.response_bytes
    }

    /// gRPC messages of the response so far.
    pub fn response_messages(&self) -> u64 {
        self.response_messages
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.downstream.end();
        self.downstream.worker.ended(self);
    }
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
