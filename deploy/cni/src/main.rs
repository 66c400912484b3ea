//! `adit-cni`: plugin when a container runtime calls it, node agent otherwise.
#![forbid(unsafe_code)]

fn main() {}
