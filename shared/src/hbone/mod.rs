//! HBONE: one TCP connection of an app as one CONNECT stream of an HTTP/2 connection over
//! mutual TLS, client and server.
//!
//! * [`record`]: the TLS stream; [`buffer`]: the recycling buffers of a worker.
//! * [`headers`]: what a CONNECT request says.
//! * [`client`], [`server`]: the two ends of a connection; [`pool`]: a worker's connections
//!   to other workloads.
//! * [`tunnel`]: one stream: read a chunk, write a chunk, half-close, reset.
//!
//! HTTP/2 framing is the h2 crate's. Nothing outside of this module names it, so that it can
//! be replaced.

pub mod buffer;
pub mod client;
pub mod headers;
mod keepalive;
pub mod pool;
pub mod record;
pub mod server;
mod settings;
pub mod tunnel;

pub use client::{Connection, OpenError};
pub use headers::{Authority, Baggage, ConnectRequest, Forwarded, Traceparent};
pub use pool::{Pool, PoolOptions};
pub use settings::Settings;
pub use tunnel::{ResetReason, Tunnel, TunnelError, TunnelReader, TunnelWriter};
