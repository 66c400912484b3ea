//! Sockets: the accept loop, the copy loop, draining.

pub mod accept;
pub mod copy;
pub mod drain;
mod splice;
