//! The client: asks for types, keeps what it got, and comes back after every loss.
//!
//! [`state`] decides what to say; [`driver`] connects (by [`transport`]), says it, waits and
//! tries again. Whoever wants the resources implements [`Handler`].

mod driver;
pub mod handlers;
pub mod node;
mod state;
mod transport;

use bytes::Bytes;

pub use driver::{Client, ClientConfig, ClientStatus, Subscriber};
pub use node::{NodeMetadata, NodeType};
pub use state::{Applied, DeltaState, ResponseError, Subscription};
pub use transport::{ConnectError, TransportConfig};

/// A resource as it came from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Unique among the resources of its type.
    pub name: String,
    /// The server's version of it; opaque.
    pub version: String,
    /// Other names under which it may be asked for.
    pub aliases: Vec<String>,
    /// The encoded message.
    pub body: Bytes,
}

/// A resource that could not be used, and why. The server is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Its name.
    pub name: String,
    /// What is wrong with it, for a human; names the field.
    pub reason: String,
}

/// Takes the resources of one type.
pub trait Handler: Send + Sync {
    /// Applies one response: first `updates` in their order, then `removed` (names which
    /// the server no longer has; some may never have been sent). Resources that cannot be
    /// used are returned, the others stay applied.
    ///
    /// It is called on the client's task and must not block for long; the acknowledgement
    /// goes out when it returns, so when it returns the resources must be in force.
    fn apply(&self, updates: Vec<Resource>, removed: Vec<String>) -> Vec<Rejected>;
}

/// Why a connection ended, in the words of Istio's metric `istio_xds_connection_terminations`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Termination {
    /// No connection came about.
    ConnectionError,
    /// The server or the network ended it with an error.
    Error,
    /// The client ended it to connect anew.
    Reconnect,
    /// The server ended it in good order, as it does from time to time.
    Complete,
}

impl Termination {
    /// The value of the metric's label `reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

/// Is told what happens on the connection, for metrics. All methods do nothing by default.
pub trait Observer: Send + Sync {
    /// A connection, or the attempt at one, is over.
    fn connection_terminated(&self, reason: Termination) {
        let _ = reason;
    }

    /// A response of `bytes` (encoded) came.
    fn message(&self, type_url: &str, bytes: usize) {
        let _ = (type_url, bytes);
    }

    /// So many resources of a response were rejected.
    fn rejected(&self, type_url: &str, resources: usize) {
        let _ = (type_url, resources);
    }
}

/// Nobody listens.
impl Observer for () {}
