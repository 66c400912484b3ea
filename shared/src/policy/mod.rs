//! Authorization: the model of a policy and its evaluation. Pure: values in, a
//! verdict out; no clock, no I/O, no async.
//!
//! A policy arrives as [`crate::proto::security::Authorization`] and becomes a
//! [`Policy`] once, with everything sorted and parsed that evaluation needs. What
//! cannot be converted is still a [`Policy`], one that fails closed for whatever it
//! covers and says why ([`Policy::invalid`]). A [`PolicySet`] is what applies to one
//! workload; [`PolicySet::evaluate`] is the only source of a [`Permitted`].

#![forbid(unsafe_code)]

mod convert;
mod evaluate;
pub mod http;
mod matching;
#[cfg(test)]
mod tests;
mod types;

pub use convert::PolicyError;
pub use evaluate::{
    Connection, Denied, DenyReason, DryRun, DryRunOutcome, Evaluation, Origin, Permitted,
    PolicySet, ServedBy, TrustDomains, Verdict,
};
pub use matching::{AddressSet, PortSet, PrincipalSet, ServiceAccountSet, StringSet};
pub use types::{Action, Clause, Group, Match, Policy, PolicyKey, Scope};
