//! A mesh of network namespaces on one Linux machine, from ordinary Kubernetes
//! manifests: the README's first command, the harness of `integration/` and of the
//! benchmarks, and a laptop's mesh.
//!
//! Every virtual node is a network namespace with a bridge; every pod is a network
//! namespace behind a veth; a fabric namespace joins the nodes. Nothing is created
//! in the machine's own network namespace, so meshes of different names live side
//! by side and use the same addresses. [`Mesh::up`] is the way in.
//!
//! - `manifest`: what the user wrote, and the pods that follow from it (pure).
//! - `address`, `cluster`, `hosts`, `vip`, `token`: what a cluster would hand out:
//!   addresses, object status, names, service addresses, credentials (pure).
//! - `system`: namespaces, links, cgroups, sandboxes, clean-up: all that touches the
//!   kernel.
//! - `supervisor`: follows the manifests, runs pods, probes, `aditd`, ztunnels and
//!   waypoints.
//! - `overlay`, `objects`: what was applied to a running mesh, and what its control
//!   plane sees.
//! - `control`, `mesh`, `state`: the handle for tests, the same over a socket for
//!   other processes, and the file that both describe the mesh with.

pub mod address;
mod cluster;
mod config;
mod control;
mod error;
mod hosts;
pub mod kubelet;
pub mod manifest;
mod mesh;
mod objects;
mod overlay;
mod state;
mod supervisor;
mod system;
pub mod token;
mod vip;

pub use config::{DataPlane, MeshConfig};
pub use control::{ApplyOutcome, Request, Running};
pub use error::LocalError;
pub use mesh::{Mesh, Output, Place};
pub use objects::{FalseCondition, read_manifests};
pub use overlay::{Applied, Labels};
pub use state::{ComponentStatus, ContainerStatus, MeshStatus, NodeStatus, PodStatus, ProcessId};
pub use system::http::{HttpAnswer, http_request, request as http_request_in};
pub use system::teardown::{down, sweep};
