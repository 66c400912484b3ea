//! The certificate service: which caller gets a certificate for which identity, and for how
//! long.

mod current;
mod directory;
mod issuer;
mod ttl;

pub use current::CurrentCa;
pub use directory::PodDirectory;
pub use issuer::{CertificateIssuer, Refusal};
pub use ttl::{DurationError, TtlPolicy, parse_duration};
