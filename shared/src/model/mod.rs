//! What a proxy knows of the mesh: workloads, services and their endpoints, and the
//! policies that apply to them.
//!
//! A [`Store`] takes [`Update`]s and keeps a [`Snapshot`], which is persistent: cloning
//! it copies a few pointers, and the clone never changes. [`SharedModel`] publishes
//! snapshots to the workers. [`route::outbound`] and [`inbound`] are the two decisions
//! that are made over a snapshot; both are pure.

#![forbid(unsafe_code)]

mod address;
mod balance;
mod convert;
pub mod enrolment;
pub mod inbound;
mod intern;
pub mod route;
mod shared;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;
mod types;

pub use convert::{ResourceError, address_from_resource};
pub use shared::SharedModel;
pub use snapshot::{ServiceEntry, Snapshot};
pub use store::{Store, Update};
pub use types::*;
