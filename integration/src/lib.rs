//! The harness of the whole-mesh tests, the demo and the benchmark: a mesh of its own, on
//! this machine, from YAML that the caller writes; and what happened on it, as values.
//!
//! Nothing is simulated: nodes and pods are network namespaces, the programs are the ones
//! that are shipped. A [`TestMesh`] removes itself when it is dropped, also by a panic; what
//! a killed test left behind is removed by the next one.

pub mod app;
pub mod ask;
pub mod bench;
pub mod call;
pub mod e2e;
pub mod hbone;
pub mod manifest;
pub mod mesh;
pub mod observe;
pub mod socket;
pub mod waypoint;
pub mod wire;

pub use app::{Asked, HttpApp};
pub use ask::{Answer, SharedMesh};
pub use call::{Call, Caller, Stream, StreamEvent};
pub use hbone::{Credential, RawHbone};
pub use manifest::Manifest;
pub use mesh::{MeshBuilder, Pod, SAMPLE_MESH, TestMesh, pod};
pub use observe::{AccessLine, Metrics};
pub use socket::Outcome;
pub use waypoint::{Counted, SAMPLE_TOKEN, reviews_mesh, sample_waypoint};
pub use wire::Packets;
