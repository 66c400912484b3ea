//! The harness of the whole-mesh tests, the demo and the benchmark: a mesh of its own, on
//! this machine, from YAML that the caller writes; and what happened on it, as values.
//!
//! Nothing is simulated: nodes and pods are network namespaces, the programs are the ones
//! that are shipped. A [`TestMesh`] removes itself when it is dropped, also by a panic; what
//! a killed test left behind is removed by the next one.

pub mod call;
pub mod mesh;
pub mod observe;
pub mod wire;

pub use call::{Call, Stream, StreamEvent};
pub use mesh::{MeshBuilder, Pod, SAMPLE_MESH, TestMesh, pod};
pub use observe::{AccessLine, Metrics};
pub use wire::Packets;
