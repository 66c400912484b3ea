//! Everything that touches the kernel: namespaces, links, cgroups, mounts, processes.

pub(crate) mod cgroup;
pub(crate) mod helper;
pub(crate) mod http;
pub(crate) mod layout;
pub(crate) mod links;
pub(crate) mod netns;
pub(crate) mod process;
pub(crate) mod sandbox;
pub mod teardown;
