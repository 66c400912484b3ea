//! The L7 benchmark: our waypoint beside Envoy, HAProxy and nginx, which do the same routing
//! with the same rules, in one run on one machine.
//!
//! The proxy under test is alone on one core; the load generator, the upstream and the control
//! plane share another. All of it is on loopback, without network namespaces: what is measured
//! is what a proxy costs, and that is the same for all.
//!
//! A waypoint takes HBONE only. What it would cost in plaintext is bounded from above by HBONE
//! with one connection for each client connection ([`contender::Way::InAlone`]): the same
//! number of sockets and system calls as in plaintext, and TLS and HTTP/2 on top.
//!
//! - `spec`: what the processes of the bench tell each other.
//! - `generator`, `upstream`: load and answers, as hidden commands of the program `bench`.
//! - `ground`: addresses, the authority, processes on cores.
//! - `setup`: routes and rules, alike for all.
//! - `peers`, `envoy`, `waypoint`: the proxies.
//! - `contender`: who goes which way, and whether they all do the same.
//! - `scenario`, `run`, `report`: the measurements.

mod contender;
mod envoy;
mod generator;
mod ground;
mod head;
mod identity;
mod peers;
mod report;
mod run;
mod scenario;
mod setup;
mod spec;
mod upstream;
mod waypoint;

pub use generator::run as generate;
pub use report::Report;
pub use run::run;
pub use spec::{LoadSpec, UpstreamSpec};
pub use upstream::run as answer;
