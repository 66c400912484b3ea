//! The waypoint: the L7 half of the mesh, behind HBONE.
//!
//! * [`config`], [`app`], [`worker`]: how it starts, and the threads that carry requests.
//! * [`state`]: what the control plane says, compiled for the request path.
//! * [`proxy`]: what happens to a tunnel and to a request, in order; it asks
//!   [`authentication`], [`external_authorization`], [`route`] and [`balance`], and tells
//!   [`telemetry`]. `route` and `balance` are pure: no sockets, and time and randomness are
//!   arguments.
//! * [`client`]: services that the waypoint itself asks.
//! * [`admin`]: what it tells operators.

pub mod admin;
pub mod app;
pub mod authentication;
pub mod balance;
pub mod client;
pub mod config;
pub mod external_authorization;
pub mod live;
pub mod proxy;
pub mod route;
pub mod state;
pub mod telemetry;
pub mod worker;
