//! Sockets: options, network namespaces, the copy loop, accepting, draining.

pub mod accept;
pub mod copy;
pub mod drain;
pub mod netns;
pub mod socket;
