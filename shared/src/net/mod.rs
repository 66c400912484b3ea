//! Sockets: options, the copy loop, accepting, draining. What enters network namespaces is `adit_ebpf`.

pub mod accept;
pub mod copy;
pub mod drain;
pub mod first_bytes;
pub mod handoff;
pub mod socket;
