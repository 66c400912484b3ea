//! The certificate service: which caller gets a certificate for which identity, and for how
//! long.

mod cluster;
mod current;
mod directory;
mod issuer;
mod rotation;
mod secret;
mod ttl;

pub use cluster::{ClusterCa, ClusterCaError};
pub use current::CurrentCa;
pub use directory::PodDirectory;
pub use issuer::{CertificateIssuer, Refusal};
pub use rotation::RotationTimes;
pub use secret::{OWN_SECRET, PLUGGED_SECRET, PREVIOUS_SECRET};
pub use ttl::{DurationError, TtlPolicy, parse_duration};
