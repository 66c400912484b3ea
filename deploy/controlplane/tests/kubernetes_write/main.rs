//! What is written to a real API server: the election, status, annotations, waypoints.
//!
//! `ADIT_TEST_KUBECONFIG` names the kubeconfig of a cluster with the Gateway API's CRDs and
//! without a mesh; it needs no nodes. Without it these tests do nothing. Each works in a
//! namespace of its own.

mod cluster;
mod leader;
mod provision;
mod status;
