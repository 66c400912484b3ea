//! Delta ADS: how configuration travels from the control plane to a proxy.
//!
//! * [`resources`]: a named, versioned set of resources that is cheap to snapshot and to
//!   compare with an older snapshot of itself; what a server serves.
//! * [`server`]: the state machine of one connection at the server.
//! * [`response`]: what it sends, encoded piece by piece.
//! * [`client`]: the state machine of a client, and the task that keeps it connected.
//!
//! Both state machines are functions from messages to messages: no clock, no sockets.
//! The protocol is Envoy's incremental xDS; what Istio's ztunnel and istiod do beyond
//! or below its text is followed, and said where.

pub mod client;
pub mod resources;
pub mod response;
pub mod server;

pub use client::{Client, ClientConfig, ClientStatus, Handler, Rejected, Resource, Subscriber};
pub use resources::{Change, ResourceSet, VersionedResource};
pub use server::{ResourceSource, ServerState};
