//! Capturing the traffic of pods with eBPF: "mark and steer".
//!
//! This is the only crate that knows about BPF. A [`Redirector`] attaches hooks of `connect` and `bind` to its
//! node's cgroup and, for each enrolled pod, a `sk_lookup` program to the pod's network namespace:
//!
//! * Outbound: the hook marks the app's socket with [`MARK_OUT`]; a rule and a route of the pod loop the
//!   connection over lo with its destination intact; `sk_lookup` hands it to ztunnel's transparent listener,
//!   whose accepted socket has the destination as its local address (`getsockname`).
//! * Inbound: `sk_lookup` hands port [`HBONE_PORT`] to the HBONE listener and every other to the plaintext
//!   one. What ztunnel opens towards the app ([`socket::upstream_socket`]) is bound to lo and passes.
//! * Ports: connections that ztunnel holds open in the pod take none from the app, which a hook of `bind`
//!   sees to.
//! * Fail closed: without a listener an outbound connect is refused at once, and an inbound one is reset.
//!
//! No address is rewritten and nothing is kept per connection. `bpf/` holds the programs, `routing` the
//! rules and routes; [`SteeringWatch`] and [`Redirector::reconcile`] put back what others removed. A pod's own `NET_ADMIN` is
//! not a boundary: it can remove its rules, exactly as it could flush iptables.

mod abi;
mod bpf;
mod capabilities;
mod foreign;
mod links;
mod netns;
mod pins;
mod programs;
mod redirector;
mod routing;
pub mod socket;
mod sysctl;
mod watch;

pub use capabilities::{Capability, capabilities};
pub use foreign::{ForeignProgram, foreign_programs};
pub use netns::{NetnsFd, in_netns, visit_netns};
pub use pins::{NodeConfig, cgroup2_mount};
pub use programs::LoadError;
pub use redirector::{
    Error, Listeners, PodRedirection, PodState, PodStatus, ReconcileReport, Redirector,
};
pub use routing::RoutingError;
pub use sysctl::SysctlError;
pub use watch::{Repairs, SteeringChanges, SteeringWatch};

/// `SO_MARK` of an app's socket whose connection is captured (the connect hook sets it), and of ztunnel's end
/// of that connection ([`socket::Direction::Outbound`]).
pub const MARK_OUT: u32 = 0x2ad1_7c01;
/// `SO_MARK` of ztunnel's connections to the app, which carry the client's address.
pub const MARK_UP: u32 = 0x2ad1_7c02;
/// `SO_MARK` of every other socket of ztunnel. No rule matches it, and the hooks leave it alone.
pub const MARK_OWN: u32 = 0x2ad1_7c03;

/// The routing table, in the pod's network namespace, that loops marked connections over lo.
pub const ROUTE_TABLE: u32 = 0xad17;
/// Preference of the rule for [`MARK_OUT`]: before everything but the local table.
pub const RULE_PREFERENCE_OUT: u32 = 5;
/// Preference of the rule for [`MARK_UP`].
pub const RULE_PREFERENCE_UP: u32 = 6;

/// The port on which other nodes reach a pod's HBONE listener.
pub const HBONE_PORT: u16 = 15008;
