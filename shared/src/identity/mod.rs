//! Who a workload is: SPIFFE ids, the certificates that prove them, and the TLS
//! configurations built from those.

mod spiffe;

pub use spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
