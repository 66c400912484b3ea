//! Behaviours of the control plane from manifests to resources.
#![allow(clippy::unwrap_used)]

mod analyze;
mod authorization;
mod control_plane;
mod harness;
mod incremental;
mod peer_authentication;
mod reload;
mod routes;
mod scale;
mod waypoints;
mod workloads;
