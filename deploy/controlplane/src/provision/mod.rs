//! Runs the waypoints: what is generated for Gateways of class `istio-waypoint`.
//!
//! For each such Gateway a ServiceAccount, a Deployment and a Service are kept as they
//! should be, and an autoscaler and a disruption budget where an overlay asks for them
//! (`generate`, `overlay`; `parameters` finds the overlays). They belong to their Gateway by owner reference, so that the
//! API server removes them with it. `controller` watches Gateways and what was generated, and
//! `reconcile` applies it again whenever something differs; what is there already and belongs
//! to somebody else is left alone, and the Gateway's conditions say so. `class` sees to the
//! GatewayClass, and that the Gateway API is there at all.
//!
//! One replica does all that: the one that leads. Addresses and readiness of a Gateway are
//! compiled from what is observed of its Service and pods, like those of one that was
//! deployed by hand.

mod class;
mod controller;
mod gateway;
mod generate;
mod overlay;
mod parameters;
mod reconcile;
mod settings;

pub use class::{GatewayApi, MINIMUM as MINIMUM_GATEWAY_API};
pub use controller::Provisioner;
pub use gateway::{NotProvisioned, WaypointGateway};
pub use generate::{Generated, MANAGED, MESH_CONTROLLER, generate};
pub use overlay::{Overlay, OverlayError, merge};
pub use settings::{PodDefaults, WaypointSettings};
