//! `aditd`, the control plane: reads Kubernetes objects, compiles them into what the node
//! proxies need, serves that, and issues certificates.

pub mod auth;
pub mod ca;
pub mod serve;
