//! Certificates for those who are not the waypoint under test.

use std::path::Path;
use std::time::{Duration, SystemTime};

use adit_shared::identity::{
    CertificateRequest, LocalCa, SpiffeId, TrustDomain, WorkloadCertificate,
};
use anyhow::Context;

const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// A certificate of a service account of namespace `bench`, with its key as PEM.
pub(super) struct Credential {
    pub(super) certificate: WorkloadCertificate,
    pub(super) chain_pem: String,
    pub(super) key_pem: String,
}

impl Credential {
    /// Signed by the authority in `ca`.
    pub(super) fn issue(ca: &Path, account: &str) -> anyhow::Result<Self> {
        let ca = LocalCa::load(ca).context("the bench's authority")?;
        let identity = SpiffeId::new(TrustDomain::default(), "bench", account)?;
        let request = CertificateRequest::new(&identity)?;
        let signed = ca.sign(request.csr_pem(), &identity, LIFETIME)?;
        let key = request.into_key();
        let key_pem = rcgen::KeyPair::try_from(&key)?.serialize_pem();
        let certificate = WorkloadCertificate::new(&identity, signed, key, SystemTime::now())?;
        Ok(Self {
            chain_pem: certificate.facts().pem.clone(),
            key_pem,
            certificate,
        })
    }
}
