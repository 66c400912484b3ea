//! The chained CNI plugin, and the node agent that installs it and decides for it.
//!
//! * [`plugin`]: what a container runtime runs for every sandbox. It knows the CNI
//!   specification, and asks the agent everything else.
//! * [`agent`]: the process of the node. It knows Namespaces and its node's Pods, decides
//!   by `adit_shared::model::enrolment`, and has ztunnel enrol the pod before its
//!   containers start.
//! * [`install`]: brings the plugin into the node's CNI configuration, keeps it there, and
//!   takes it out again.
//! * [`protocol`]: what plugin and agent say to each other.
#![forbid(unsafe_code)]

pub mod agent;
pub mod install;
pub mod plugin;
pub mod protocol;
