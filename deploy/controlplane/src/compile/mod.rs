//! Objects to the resources that node proxies are sent.
//!
//! Everything in Kubernetes that matters to a workload lives in its namespace, except
//! the root namespace's policies, the nodes and the mesh's settings. So a namespace is
//! the unit: [`namespace`] is a pure function of its objects and of what it shares with
//! all others, and the [`Compiler`] calls it again only where one of the two changed.

mod admission;
mod authorization;
mod compiler;
mod enrolment;
pub mod l7;
mod mesh;
mod namespace;
mod peer_authentication;
mod redirection;
mod selectors;
mod services;
#[cfg(test)]
pub(crate) mod testing;
mod wire;
mod workloads;

pub use authorization::{Conversion, convert as convert_authorization_policy};
pub use compiler::{Compiler, compile};
pub use enrolment::{DATAPLANE_MODE, Decision, Reason, decide};
pub use mesh::MeshConfig;
pub use namespace::{Compiled, Shared, namespace};
pub use peer_authentication::{STATIC_STRICT, converted_name};
pub use redirection::{
    Captured, Desired, PodReport, PodUid, Redirection, RedirectionTracker, Redirections,
    WITHDRAW_DELAY, desired,
};
pub use services::TRAFFIC_DISTRIBUTION;

pub(crate) use enrolment::go_bool;
