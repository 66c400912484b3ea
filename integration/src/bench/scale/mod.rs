//! The control plane in a large cluster: its memory, and how fast a change of an endpoint
//! reaches every node.
//!
//! The API server is real and has no nodes: pods, services and EndpointSlices are created
//! straight in it. The node proxies are connections that ask for configuration as ztunnel
//! does, with tokens of their own, and look at as little of what they get as will do.
//!
//! - `server`: the API server and `aditd`.
//! - `world`: the objects, and the changes of them.
//! - `wire`: what is read of a response.
//! - `client`: the connections.
//! - `run`: the measurement.
//! - `report`: limits, a table and JSON.

mod client;
mod report;
mod run;
mod server;
mod wire;
mod world;

pub use report::Report;
pub use run::{Options, run};
