//! `aditd`, the control plane: reads Kubernetes objects, compiles them into what the node
//! proxies need, serves that, and issues certificates.

pub mod analyze;
pub mod auth;
pub mod ca;
pub mod compile;
pub mod driver;
pub mod kubernetes;
pub mod model;
pub mod provision;
mod quota;
pub mod serve;
pub mod source;
pub mod status;
pub mod webhook;
