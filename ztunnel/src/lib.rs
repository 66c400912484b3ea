//! The node tunnel: gives the pods of its node identity, mutual TLS and L4 policy without
//! touching them.
//!
//! * [`config`], [`process`], [`app`]: how it starts and ends.
//! * [`control`]: what the control plane says; [`enrolment`]: which pods are captured;
//!   [`discovery`]: where they are.
//! * [`worker`]: the threads that carry connections; [`proxy`]: what happens to one;
//!   [`connections`]: those that are open.
//! * [`admin`], [`dump`]: what it tells operators; [`waypoints`]: those that fail.

pub mod admin;
pub mod app;
pub mod config;
pub mod connections;
pub mod control;
pub mod discovery;
pub mod dump;
pub mod enrolment;
pub mod listeners;
pub mod pod;
pub mod process;
pub mod proxy;
pub mod waypoints;
pub mod worker;
