//! Who a workload is: SPIFFE ids, the certificates that prove them, and the TLS
//! configurations built from those.
//!
//! A certificate's life, in the order of the files: [`request`](CertificateRequest)
//! makes a key and a CSR, a [`CertificateAuthority`] signs it ([`CaClient`] over the
//! network, [`LocalCa`] in memory), [`WorkloadCertificate`] checks what came back and
//! builds the TLS configurations once, [`CertificateCache`] keeps and renews it.

mod authority;
mod ca_client;
mod cache;
mod certificate;
mod control_plane;
mod control_plane_server;
mod derived;
mod dump;
mod local_ca;
mod queue;
mod request;
mod spiffe;
mod tls;
mod trust_bundle;

pub use authority::{CertificateAuthority, SignError, SignedChain};
pub use ca_client::{CaClient, CaClientOptions};
pub use cache::{
    CacheOptions, CertificateCache, CertificateError, CertificateState, CertificateStatus,
};
pub use certificate::{
    CertificateFacts, CertificateId, CertificateInvalid, PeerIdentityError, WorkloadCertificate,
    peer_identity, peer_not_after,
};
pub use control_plane::{
    Connector, ControlPlaneEndpoint, ControlPlaneError, TokenSource, TokenUnreadable,
};
pub use control_plane_server::{ControlPlanePeer, ControlPlaneStream, control_plane_incoming};
pub use derived::DerivedSecret;
pub use dump::dump_certificates;
pub use local_ca::{CaFiles, LocalCa, LocalCaError, ServingCertificate};
pub use queue::{Priority, next_renewal};
pub use request::{CertificateRequest, RequestError};
pub use spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
pub use tls::{ControlPlaneIdentity, control_plane_client_config, control_plane_server_config};
pub use trust_bundle::{TrustBundle, TrustBundleError};
