//! What a proxy knows of the mesh: workloads, services and their endpoints.

mod types;

pub use types::*;
