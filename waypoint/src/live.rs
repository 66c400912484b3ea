//! What is open at this moment (`/connections`): clients' tunnels and what they carry, and the
//! connections to endpoints. Each worker has its own tables; entering one is an insertion into
//! a slab, and bytes are counted where they pass anyway.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use adit_shared::identity::SpiffeId;
use adit_shared::telemetry::ConnectionCounters;
use serde::Serialize;
use slab::Slab;
use tokio::time::Instant;

use crate::proxy::upstream::{Endpoint, HttpVersion, Way};

/// Bytes that have passed a stream.
#[derive(Debug, Default)]
pub struct Moved {
    received: Cell<u64>,
    sent: Cell<u64>,
}

impl Moved {
    /// So many came from the other side.
    pub fn receive(&self, bytes: usize) {
        self.received.set(self.received.get() + bytes as u64);
    }

    /// So many went there.
    pub fn send(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }

    /// Received and sent.
    pub fn totals(&self) -> (u64, u64) {
        (self.received.get(), self.sent.get())
    }
}

/// Things that are there until their guards are dropped.
#[derive(Debug)]
pub struct Table<T>(Rc<RefCell<Slab<T>>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(Rc::default())
    }
}

impl<T> Table<T> {
    /// Enters one.
    pub fn enter(&self, value: T) -> Entered<T> {
        let key = self.0.borrow_mut().insert(value);
        Entered {
            table: self.0.clone(),
            key,
        }
    }

    /// All of them as somebody wants to see them.
    fn views<V>(&self, view: impl Fn(&T) -> V) -> Vec<V> {
        self.0
            .borrow()
            .iter()
            .map(|(_, value)| view(value))
            .collect()
    }
}

/// Keeps its thing in a table.
#[derive(Debug)]
pub struct Entered<T> {
    table: Rc<RefCell<Slab<T>>>,
    key: usize,
}

impl<T> Drop for Entered<T> {
    fn drop(&mut self) {
        let gone = self.table.borrow_mut().try_remove(self.key);
        drop(gone);
    }
}

/// An HBONE connection of a client.
#[derive(Debug)]
pub struct ClientTunnel {
    /// Its address.
    pub peer: SocketAddr,
    /// Who it is.
    pub identity: SpiffeId,
    /// Streams that it has opened so far.
    pub streams: Rc<Cell<u64>>,
    /// Since when.
    pub since: Instant,
}

/// A connection that carries HTTP to an endpoint.
#[derive(Debug)]
pub struct ToEndpoint {
    /// Where to, and for whom.
    pub endpoint: Arc<Endpoint>,
    /// What it speaks.
    pub version: HttpVersion,
    /// Its bytes.
    pub moved: Rc<Moved>,
    /// Since when.
    pub since: Instant,
}

/// What a worker has open.
#[derive(Debug, Default)]
pub struct Live {
    /// HBONE connections of clients.
    pub tunnels: Table<ClientTunnel>,
    /// Connections through the waypoint that are no HTTP.
    pub tcp: Table<Arc<ConnectionCounters>>,
    /// HTTP connections to endpoints, idle ones too.
    pub endpoints: Table<ToEndpoint>,
}

/// What one worker has open, to be shown.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listing {
    /// HBONE connections of clients.
    pub tunnels: Vec<TunnelView>,
    /// What clients have open inside of them.
    pub downstream: Vec<DownstreamView>,
    /// Connections to endpoints that carry HTTP.
    pub upstream: Vec<UpstreamView>,
    /// HBONE connections to endpoints' nodes.
    pub upstream_tunnels: Vec<UpstreamTunnelView>,
}

/// An HBONE connection of a client.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelView {
    /// The client's address.
    pub src: SocketAddr,
    /// Who it is.
    pub identity: String,
    /// Streams that it has opened so far.
    pub streams: u64,
    /// Age in seconds.
    pub age: f64,
}

/// A connection of a client's app.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DownstreamView {
    /// The app's address.
    pub src: SocketAddr,
    /// Who it is.
    pub identity: Option<String>,
    /// What was dialled, or where it went.
    pub dst: String,
    /// `HTTP/1`, `HTTP/2` or `TCP`.
    pub protocol: &'static str,
    /// Requests under way.
    pub active: usize,
    /// From the app.
    pub received: u64,
    /// To the app.
    pub sent: u64,
    /// Age in seconds.
    pub age: f64,
}

/// An HTTP connection to an endpoint.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UpstreamView {
    /// The endpoint's address.
    pub dst: SocketAddr,
    /// Which workload it is.
    pub workload: String,
    /// Who it is, where that is proved.
    pub identity: Option<String>,
    /// Whose requests it carries, where those of different callers are kept apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
    /// `HTTP/1` or `HTTP/2`.
    pub protocol: &'static str,
    /// `HBONE`, `TLS` or `TCP`.
    pub way: &'static str,
    /// From the endpoint; not counted without a tunnel.
    pub received: Option<u64>,
    /// To it.
    pub sent: u64,
    /// Age in seconds.
    pub age: f64,
}

/// An HBONE connection to an endpoint's node.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UpstreamTunnelView {
    /// Its address.
    pub dst: SocketAddr,
    /// Which workload answers there.
    pub workload: String,
    /// Who it is.
    pub identity: String,
    /// Streams that are open.
    pub streams: usize,
    /// Streams that it has carried.
    pub carried: u64,
}

/// Seconds since then.
pub fn age(since: Instant, now: Instant) -> f64 {
    now.saturating_duration_since(since).as_secs_f64()
}

impl Live {
    /// Clients' tunnels.
    pub fn tunnel_views(&self, now: Instant) -> Vec<TunnelView> {
        self.tunnels.views(|of| TunnelView {
            src: of.peer,
            identity: of.identity.to_string(),
            streams: of.streams.get(),
            age: age(of.since, now),
        })
    }

    /// What passes that is no HTTP.
    pub fn tcp_views(&self) -> Vec<DownstreamView> {
        self.tcp.views(|of| {
            let (info, totals) = (of.info(), of.totals());
            let principal = info.labels.source.principal.as_ref();
            DownstreamView {
                src: info.source_address,
                identity: principal.map(ToString::to_string),
                dst: info.destination_address.to_string(),
                protocol: "TCP",
                active: 1,
                received: totals.request_bytes,
                sent: totals.response_bytes,
                age: totals.duration.as_secs_f64(),
            }
        })
    }

    /// Connections to endpoints.
    pub fn upstream_views(&self, now: Instant) -> Vec<UpstreamView> {
        self.endpoints.views(|of| {
            let (received, sent) = of.moved.totals();
            let endpoint = &of.endpoint;
            let (way, identity) = match &endpoint.way {
                Way::Hbone { identities, .. } => ("HBONE", Some(identities.workload())),
                Way::Plain => ("TCP", None),
                Way::Tls(_) => ("TLS", None),
            };
            UpstreamView {
                dst: endpoint.address,
                workload: endpoint.uid.to_string(),
                identity: identity.map(ToString::to_string),
                caller: endpoint.caller().map(|caller| caller.identity.to_string()),
                protocol: match of.version {
                    HttpVersion::Http1 => "HTTP/1",
                    HttpVersion::Http2 => "HTTP/2",
                },
                received: (way == "HBONE").then_some(received),
                way,
                sent,
                age: age(of.since, now),
            }
        })
    }
}
