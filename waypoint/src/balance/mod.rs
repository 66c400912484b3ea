//! Which endpoint a request goes to, and whether it may go anywhere now: pure.
//!
//! A [`TrafficPolicy`] says how ([`TrafficSettings`], defaults as Istio's). Each service
//! port and subset has one [`Balancer`], shared by all workers: [`Balancer::pick`] gives a
//! [`Picked`], which counts the request as active until it is dropped and takes the
//! [`Outcome`]. [`Limits`] are its circuit breakers. Time and randomness are arguments.
//!
//! A pick, in the order of the files: [`hash_key`](HashKey) what of the request counts;
//! `balancer` loads the `table`, in which `locality` has put the near endpoints first;
//! `group` chooses among equals, by `turns` or `hash` where asked to; `outlier` takes out
//! what fails.

#![forbid(unsafe_code)]

mod balancer;
mod convert;
mod endpoint;
mod error;
mod group;
mod hash;
mod hash_key;
mod limits;
mod locality;
mod outcome;
mod outlier;
mod settings;
mod table;
#[cfg(test)]
mod tests;
mod turns;
mod update;

pub use balancer::{Balancer, EndpointStatus, Picked};
pub use convert::{Problem, Selection, TrafficPolicy};
pub use endpoint::Endpoint;
pub use error::{PickError, Resource};
pub use hash_key::Hashed;
pub use limits::{DEFAULT_MAX_PENDING, LimitStatus, Limits, Permit};
pub use locality::Origin;
pub use outcome::{Outcome, RequestResult};
pub use outlier::{EjectionCause, EjectionChange, EjectionEvent, EjectionStatus, MAX_EVENTS};
pub use settings::{
    Algorithm, ClientTls, ConnectionPool, Distribution, HashCookie, HashKey, LoadBalancer,
    LocalityPattern, LocalityPolicy, OutlierDetection, RetryBudget, SlowStart, SubsetMembers,
    TlsMode, TrafficSettings, UpstreamProtocol,
};
pub use table::PickRequest;
pub use update::Update;
