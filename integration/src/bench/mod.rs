//! The benchmark: a client pod and a server pod on two nodes, once in a mesh and once in
//! none, under the same loads in turn; what it costs the proxies, from `/proc`.
//!
//! - `ground`: the two meshes.
//! - `load`: the load generators, run in the client pod.
//! - `usage`: CPU time and memory of the proxies, and of whoever else uses the machine.
//! - `run`: the measurements, in rounds.
//! - `l7`: the waypoint beside its peers.
//! - `scale`: the control plane in a large cluster.
//! - `report`: medians, limits, a table and JSON.

mod ground;
pub mod l7;
mod load;
mod report;
mod run;
pub mod scale;
mod usage;

pub use report::Report;
pub use run::{Options, run};
