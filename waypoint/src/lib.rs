//! The waypoint: the L7 half of the mesh, behind HBONE.
//!
//! Modules stand in the order in which a request meets them. [`route`] and [`balance`] are
//! pure: no sockets, and time and randomness are arguments.

pub mod admin;
pub mod authentication;
pub mod balance;
pub mod external_authorization;
pub mod proxy;
pub mod route;
pub mod state;
pub mod telemetry;
