//! Behaviours of the control plane from manifests to resources.
#![allow(clippy::unwrap_used)]

mod analyze;
mod authorization;
mod control_plane;
mod harness;
mod incremental;
mod mesh_settings;
mod peer_authentication;
mod reload;
mod routes;
mod scale;
mod waypoint_policies;
mod waypoints;
mod workloads;
