//! The L7 half of authorization: what a waypoint decides over a request. Pure.
//!
//! A policy arrives as [`crate::proto::waypoint::AuthorizationPolicy`] and becomes an
//! [`HttpPolicy`] once; what cannot be understood is still a policy, one that denies what
//! it targets and says why. [`HttpPolicies`] holds them by target, so that a request only
//! meets those that are meant for it; [`HttpPolicySet`] is what applies to one
//! destination, and evaluating it yields the same [`Permitted`](super::Permitted) that
//! opens the way at L4.
//!
//! What can be read in more than one way is judged by every reading: an ALLOW must hold
//! for all of them, a DENY needs one. Paths ([`NormalizedPath`]), methods (override
//! headers) and hosts (letter case, port, trailing dot) are such.

mod chain;
mod claims;
mod convert;
mod evaluate;
mod fields;
mod normalize;
mod path;
mod request;
mod store;
#[cfg(test)]
mod tests;
mod types;

pub use claims::Claims;
pub use evaluate::{AuditMatch, CustomCheck, HttpEvaluation, HttpPolicySet};
pub use normalize::{NormalizedPath, PathNormalization, Rejected, normalize};
pub use request::{HostRejected, HttpFields, HttpRequest, remote_address, request_host};
pub use store::{HttpPolicies, HttpUpdate};
pub use types::{HttpAction, HttpPolicy, HttpTarget, UnknownTarget};
