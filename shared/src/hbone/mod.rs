//! HBONE: CONNECT over HTTP/2 over mutual TLS, client and server.
//!
//! One HTTP/2 stream carries one app connection. In the order in which a connection meets them:
//!
//! * [`record`]: TLS, with buffers from [`buffer`].
//! * [`settings`]: what both sides announce and how long they wait.
//! * [`client`]: a connection to a peer, on which streams are opened; [`pool`] shares such
//!   connections between app connections.
//! * [`server`]: the other side: accepts streams and hands them to a handler.
//! * [`headers`]: what a CONNECT request and its response say.
//! * [`tunnel`]: the stream once it is open. This is the narrow interface behind which HTTP/2
//!   framing lives: nothing outside of this folder names the `h2` crate.

pub mod buffer;
pub mod client;
pub mod error;
pub mod headers;
mod keepalive;
pub mod pool;
pub mod record;
pub mod send_queue;
pub mod server;
mod settings;
pub mod tunnel;
mod windows;

pub use client::{Connection, ConnectionWatch, ResponseInfo};
pub use error::{ConnectionError, OpenError, ResetReason, Retry, TunnelError};
pub use headers::{
    Authority, Baggage, BaggageFields, ConnectRequest, Forwarded, HeaderError, Traceparent,
};
pub use pool::{CheckoutError, Pool, PoolSettings};
pub use server::{Incoming, Responder, serve};
pub use settings::Settings;
pub use tunnel::Tunnel;
