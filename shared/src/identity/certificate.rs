//! A workload's certificate: checked when it arrives, then immutable, with the TLS
//! configurations that every connection under it shares.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

use super::authority::certificate_pem;
use super::tls::{self, MeshVerifier};
use super::{SignedChain, SpiffeId, TrustDomain};

/// The certificate of one workload identity, its key, and the TLS configurations built
/// from both.
///
/// A renewal is a new value: connections that were made under the old one go on.
pub struct WorkloadCertificate {
    id: CertificateId,
    identity: SpiffeId,
    facts: CertificateFacts,
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    not_before: SystemTime,
    not_after: SystemTime,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// Tells a certificate of this process from every other, one of the same identity included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CertificateId(u64);

impl CertificateId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// What an X.509 certificate says of itself, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Serial number in hexadecimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// The certificate.
    pub pem: String,
}

impl CertificateFacts {
    /// Reads `certificate`.
    ///
    /// # Errors
    /// [`CertificateInvalid::Unreadable`] when it is not X.509.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<Self, CertificateInvalid> {
        let unreadable = |e: String| CertificateInvalid::Unreadable(e);
        let (_, x509) =
            X509Certificate::from_der(certificate).map_err(|e| unreadable(e.to_string()))?;
        let serial = x509.raw_serial().iter().map(|b| format!("{b:02x}"));
        Ok(Self {
            serial: serial.collect(),
            not_before: system_time(x509.validity().not_before),
            not_after: system_time(x509.validity().not_after),
            pem: certificate_pem(certificate),
        })
    }
}

fn system_time(time: ASN1Time) -> SystemTime {
    // Before 1970 is as good as 1970: long expired or long valid.
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    UNIX_EPOCH + Duration::from_secs(seconds)
}

impl WorkloadCertificate {
    /// Joins `signed` with the key that it was requested for and builds the TLS
    /// configurations.
    ///
    /// # Errors
    /// [`CertificateInvalid`] when the leaf does not carry exactly `identity`, has
    /// another key, is not valid at `now`, may not be used by both clients and servers,
    /// or does not lead to the returned roots.
    pub fn new(
        identity: &SpiffeId,
        signed: SignedChain,
        key: PrivatePkcs8KeyDer<'static>,
        now: SystemTime,
    ) -> Result<Self, CertificateInvalid> {
        let SignedChain { chain, roots } = signed;
        let (leaf, intermediates) = chain.split_first().ok_or(CertificateInvalid::NoLeaf)?;
        let facts = CertificateFacts::read(leaf)?;
        let end_entity = EndEntityCert::try_from(leaf)
            .map_err(|e| CertificateInvalid::Unreadable(e.to_string()))?;
        let certified = leaf_identity(&end_entity)?;
        if certified != *identity {
            return Err(CertificateInvalid::Identity {
                requested: identity.clone(),
                certified,
            });
        }

        let verifier = Arc::new(mesh_verifier(&roots, identity.trust_domain())?);
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = UnixTime::since_unix_epoch(now);
        for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
            verifier
                .verify(leaf, intermediates, now, usage)
                .map_err(CertificateInvalid::Chain)?;
        }

        let key = Arc::new(
            CertifiedKey::from_der(chain.clone(), key.into(), tls::provider())
                .map_err(CertificateInvalid::Key)?,
        );
        let client = tls::workload_client_config(key.clone(), verifier.clone())
            .map_err(CertificateInvalid::Key)?;
        let server = tls::workload_server_config(key, verifier).map_err(CertificateInvalid::Key)?;
        Ok(Self {
            id: CertificateId::next(),
            identity: identity.clone(),
            not_before: facts.not_before,
            not_after: facts.not_after,
            facts,
            chain,
            roots,
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// Which one it is: a renewal has another.
    pub fn id(&self) -> CertificateId {
        self.id
    }

    /// Whose certificate it is.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The configuration for dialling peers: TLS 1.3, `h2`, no SNI, no resumption.
    pub fn client_config(&self) -> &Arc<ClientConfig> {
        &self.client
    }

    /// The configuration for accepting peers, who must have a certificate.
    pub fn server_config(&self) -> &Arc<ServerConfig> {
        &self.server
    }

    /// The leaf, then intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The roots that peers are verified against.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Serial number, validity and PEM of the leaf.
    pub fn facts(&self) -> &CertificateFacts {
        &self.facts
    }

    /// Start of validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether `now` is within the validity.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        (self.not_before..=self.not_after).contains(&now)
    }
}

impl std::fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("serial", &self.facts.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn mesh_verifier(
    roots: &[CertificateDer<'static>],
    trust_domain: &TrustDomain,
) -> Result<MeshVerifier, CertificateInvalid> {
    let anchors = roots
        .iter()
        .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| CertificateInvalid::Root(e.to_string()))?;
    if anchors.is_empty() {
        return Err(CertificateInvalid::Root("there is none".into()));
    }
    Ok(MeshVerifier::new(anchors, trust_domain.clone()))
}

/// The SPIFFE id of the peer whose chain a handshake verified.
///
/// # Errors
/// [`PeerIdentityError`] when there is no certificate or its leaf does not carry exactly
/// one URI that is a SPIFFE id of the mesh's form.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerIdentityError> {
    let leaf = chain.first().ok_or(PeerIdentityError::NoCertificate)?;
    let leaf =
        EndEntityCert::try_from(leaf).map_err(|e| PeerIdentityError::Unreadable(e.to_string()))?;
    leaf_identity(&leaf)
}

/// When the validity of the peer's certificate ends: of the leaf, which an authority does not let outlive
/// those above it.
///
/// # Errors
/// [`PeerIdentityError`] when there is no certificate, or none that can be read.
pub fn peer_not_after(chain: &[CertificateDer<'_>]) -> Result<SystemTime, PeerIdentityError> {
    let leaf = chain.first().ok_or(PeerIdentityError::NoCertificate)?;
    let (_, leaf) = X509Certificate::from_der(leaf)
        .map_err(|e| PeerIdentityError::Unreadable(e.to_string()))?;
    Ok(system_time(leaf.validity().not_after))
}

/// The SPIFFE id in the URI SAN of `leaf`. More than one URI is refused: which of them
/// policies were to look at would be a matter of chance (SPIFFE X509-SVID 2).
pub(super) fn leaf_identity(leaf: &EndEntityCert<'_>) -> Result<SpiffeId, PeerIdentityError> {
    let mut uris = leaf.valid_uri_names();
    let uri = uris.next().ok_or(PeerIdentityError::NoUri)?;
    if uris.next().is_some() {
        return Err(PeerIdentityError::SeveralUris);
    }
    uri.parse().map_err(PeerIdentityError::NotSpiffe)
}

/// Why a verified chain names no peer of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdentityError {
    /// The peer sent no certificate.
    #[error("the peer has no certificate")]
    NoCertificate,
    /// The leaf is not X.509.
    #[error("the peer's certificate is unreadable: {0}")]
    Unreadable(String),
    /// The leaf has no URI among its alternative names.
    #[error("the peer's certificate carries no SPIFFE id")]
    NoUri,
    /// The leaf has more than one URI, which SPIFFE forbids.
    #[error("the peer's certificate carries several URIs")]
    SeveralUris,
    /// The URI is not a SPIFFE id of the mesh.
    #[error("the peer's certificate: {0}")]
    NotSpiffe(#[source] super::SpiffeIdError),
    /// The peer is of another trust domain.
    #[error("the peer {peer} is not of our trust domain {expected}")]
    TrustDomain {
        /// Who it says it is.
        peer: SpiffeId,
        /// Ours.
        expected: TrustDomain,
    },
}

/// Why a certificate from the authority cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CertificateInvalid {
    /// The chain is empty.
    #[error("the chain has no leaf")]
    NoLeaf,
    /// A certificate is not X.509.
    #[error("unreadable certificate: {0}")]
    Unreadable(String),
    /// The leaf's SPIFFE id is missing or ambiguous.
    #[error(transparent)]
    NoIdentity(#[from] PeerIdentityError),
    /// The leaf is somebody else's.
    #[error("asked for {requested}, got a certificate of {certified}")]
    Identity {
        /// What was asked for.
        requested: SpiffeId,
        /// What the leaf says.
        certified: SpiffeId,
    },
    /// No usable root.
    #[error("unusable root certificate: {0}")]
    Root(String),
    /// The chain does not lead to the roots, is not valid now, or may not be used for TLS.
    #[error("the chain does not verify: {0}")]
    Chain(#[source] rustls::Error),
    /// The private key is not that of the leaf.
    #[error("the certificate does not fit its key: {0}")]
    Key(#[source] rustls::Error),
}

#[cfg(test)]
mod tests;
