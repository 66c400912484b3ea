//! Towards endpoints: connections to them, over HBONE, TLS or plain TCP, and one request on
//! one of them.
//!
//! What trips it: a connection that the endpoint has closed while it lay in the pool. hyper
//! tells whether anything of a request was sent; if nothing was, the request goes to the next
//! connection; if something was, only a request that may be sent twice does.

mod connect;
mod pool;
mod tls;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::hbone::{Pool, PoolSettings};
use adit_shared::identity::SpiffeId;
use adit_shared::model::route::{ExpectedIdentities, HBONE_PORT};
use adit_shared::model::{ServiceEntry, TunnelProtocol, Workload, WorkloadUid};
use http::{Request, Response};

pub use connect::{ConnectError, Connected, open_tcp};
pub use pool::{Lease, Upgraded, Upstreams};
pub use tls::{ClientIdentity, Originate};

use super::body::RequestBody;
use super::incoming::Incoming;
use super::interim::Follower;
use super::reply::Reply;
use super::tunnel::Caller;
use crate::balance::Limits;
use crate::config::Config;
use crate::worker::Worker;

/// Tunnels are shared by everything that goes to one workload's address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// The workload that answers.
    pub peer: WorkloadUid,
    /// Where it answers.
    pub address: SocketAddr,
    /// Who may answer there.
    pub identities: ExpectedIdentities,
}

/// A worker's tunnels.
pub type TunnelPool = Pool<TunnelKey, ConnectError>;

/// A pool as the configuration wants it.
pub fn new_tunnel_pool(config: &Config) -> TunnelPool {
    Pool::new(PoolSettings {
        max_streams: config.pool_max_streams,
        unused_release: config.pool_unused_release,
        ..PoolSettings::default()
    })
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Which workload.
    pub uid: WorkloadUid,
    /// The app's address and port.
    pub address: SocketAddr,
    /// How it is reached.
    pub way: Way,
    /// Its node's policies depend on who calls: connections are not shared by callers.
    callers_matter: bool,
    /// For whom its connections are.
    caller: Option<Origin>,
}

/// For whom a connection is made, as the endpoint's node is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// The caller's address; without a port for what carries several connections of it.
    pub address: SocketAddr,
    /// Who it is.
    pub identity: SpiffeId,
}

/// How an endpoint is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Way {
    /// Through its node's tunnel.
    Hbone {
        /// Where the tunnel ends.
        gateway: SocketAddr,
        /// Who may answer.
        identities: ExpectedIdentities,
    },
    /// Without encryption.
    Plain,
    /// Over TLS that begins here.
    Tls(Arc<Originate>),
}

impl Endpoint {
    /// The same endpoint as `caller` uses it.
    pub fn of_caller(self: &Arc<Self>, caller: &Caller) -> Arc<Self> {
        if !self.callers_matter {
            return self.clone();
        }
        Arc::new(Self {
            caller: Some(Origin {
                address: SocketAddr::new(caller.peer.ip().to_canonical(), 0),
                identity: caller.identity.clone(),
            }),
            ..(**self).clone()
        })
    }

    /// For whom its connections are, where those of different callers are kept apart.
    pub fn caller(&self) -> Option<&Origin> {
        self.caller.as_ref()
    }

    /// `workload` at `port`, as it says that it can be reached.
    pub fn new(
        workload: &Workload,
        port: u16,
        service: Option<&ServiceEntry>,
        originate: Option<&Arc<Originate>>,
    ) -> Option<Self> {
        let ip = *workload.addresses.first()?;
        let address = SocketAddr::new(ip, port);
        Some(Self::at(workload, address, service, originate))
    }

    /// `workload` at `address`, which is its own.
    pub fn at(
        workload: &Workload,
        address: SocketAddr,
        service: Option<&ServiceEntry>,
        originate: Option<&Arc<Originate>>,
    ) -> Self {
        Self {
            uid: workload.uid.clone(),
            address,
            way: match (originate, workload.tunnel_protocol) {
                // A TLS server stays one behind its node's tunnel; the tunnel is not used then,
                // for who asks for TLS names the server that it has to be.
                (Some(originate), _) => Way::Tls(originate.clone()),
                (None, TunnelProtocol::None) => Way::Plain,
                (None, TunnelProtocol::Hbone) => Way::Hbone {
                    gateway: SocketAddr::new(address.ip(), HBONE_PORT),
                    identities: ExpectedIdentities::new(workload, service),
                },
            },
            callers_matter: workload.callers_matter
                && workload.tunnel_protocol == TunnelProtocol::Hbone
                && originate.is_none(),
            caller: None,
        }
    }
}

/// Which version of HTTP an endpoint is spoken to in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HttpVersion {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
}

/// What an endpoint answered.
pub struct Answer {
    /// Head and body.
    pub response: Response<Incoming>,
    /// The connection, which is given back when the body has been read.
    pub lease: Lease,
    /// Our address on it.
    pub local: Option<SocketAddr>,
    /// How long it took to have the connection, which is not the endpoint's own time.
    pub connecting: Duration,
}

/// How an attempt failed.
pub struct SendError {
    /// What it is, for the answer and the log.
    pub reply: Reply,
    /// What it was, for people.
    pub error: String,
    /// How far the request came.
    pub reached: Reached,
    /// The request, if nothing of it has been used up.
    pub request: Option<Box<Request<RequestBody>>>,
}

/// How far a request came that was not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// There was no connection.
    NotConnected,
    /// There was, but the endpoint has not looked at it: nothing was sent, or it said so
    /// (REFUSED_STREAM, GOAWAY beyond the stream).
    NotProcessed,
    /// It may have been acted upon; but its connection had lain idle and ended without a word,
    /// which most likely is all that was in the way.
    Stale,
    /// It may have been acted upon.
    Sent,
}

/// How a connection is made where one is needed.
#[derive(Clone)]
pub struct Connecting {
    /// How long a TCP connect may take.
    pub deadline: Duration,
    /// Bounds their number; `None`: a workload that was dialled itself.
    pub limits: Option<Arc<Limits>>,
    /// Requests that a connection of HTTP/1 carries; `None`: any number.
    pub max_requests: Option<u32>,
}

impl Default for Connecting {
    fn default() -> Self {
        Self {
            deadline: connect::CONNECT_DEADLINE,
            limits: None,
            max_requests: None,
        }
    }
}

/// Sends a request to an endpoint, on a pooled connection or on a new one. What comes before the
/// response goes to `follower`.
///
/// # Errors
/// [`SendError`].
pub async fn send(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    version: HttpVersion,
    request: Request<RequestBody>,
    connecting: &Connecting,
    follower: Follower,
) -> Result<Answer, SendError> {
    let follower = &follower;
    match version {
        HttpVersion::Http1 => {
            pool::send_http1(worker, endpoint, request, connecting, follower).await
        }
        HttpVersion::Http2 => {
            pool::send_http2(worker, endpoint, request, connecting, follower).await
        }
    }
}
