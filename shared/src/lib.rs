//! The one crate that both proxies and the control plane share: identity, policy,
//! the model of workloads and services, the HBONE wire, xDS, telemetry, and the
//! socket plumbing below them.

pub mod environment;
pub mod hbone;
pub mod identity;
pub mod model;
pub mod net;
pub mod policy;
pub mod process;
pub mod proto;
pub mod telemetry;
pub mod xds;
