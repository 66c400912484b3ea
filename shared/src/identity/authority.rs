//! What signs certificates, seen from the one who asks.

use std::time::Duration;

use futures_util::future::BoxFuture;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::SpiffeId;

/// A certificate authority: turns a CSR into a chain for an identity.
///
/// Implementations verify nothing on behalf of the caller; the caller checks what
/// comes back ([`super::WorkloadCertificate::new`]).
pub trait CertificateAuthority: Send + Sync + 'static {
    /// Asks for a certificate for `identity` over the key in `csr_pem`, valid for
    /// `ttl` or less.
    fn sign<'a>(
        &'a self,
        identity: &'a SpiffeId,
        csr_pem: &'a str,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<SignedChain, SignError>>;
}

/// What an authority answers with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedChain {
    /// Leaf first, then the intermediates that lead to a root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots that peers are to be verified against.
    pub roots: Vec<CertificateDer<'static>>,
}

/// A response may hold no more certificates than this: a chain of ten and room for
/// roots of several trust domains.
const MAX_CERTIFICATES: usize = 256;

impl SignedChain {
    /// Reads the `cert_chain` of Istio's certificate service: leaf, intermediates, and
    /// last an element that holds all roots.
    ///
    /// # Errors
    /// [`SignError::Malformed`] when it is not PEM, has fewer than two elements, or the
    /// number of certificates is unreasonable.
    pub fn from_pem_parts(parts: &[String]) -> Result<Self, SignError> {
        let malformed = |what: String| SignError::Malformed(what);
        let [rest @ .., roots] = parts else {
            return Err(malformed("the chain is empty".into()));
        };
        let read = |pem: &str| {
            CertificateDer::pem_slice_iter(pem.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| malformed(format!("not PEM: {e}")))
        };
        let roots = read(roots)?;
        let mut chain = Vec::with_capacity(rest.len());
        for part in rest {
            chain.extend(read(part)?);
        }
        if chain.is_empty() || roots.is_empty() {
            return Err(malformed("it needs a leaf and at least one root".into()));
        }
        if chain.len() + roots.len() > MAX_CERTIFICATES {
            return Err(malformed(format!(
                "more than {MAX_CERTIFICATES} certificates"
            )));
        }
        Ok(Self { chain, roots })
    }

    /// Writes the `cert_chain` of Istio's certificate service.
    pub fn to_pem_parts(&self) -> Vec<String> {
        let roots = self
            .roots
            .iter()
            .map(|root| certificate_pem(root))
            .collect();
        let chain = self.chain.iter().map(|c| certificate_pem(c));
        chain.chain(std::iter::once(roots)).collect()
    }
}

/// Encodes one certificate as PEM with 64 characters a line (RFC 7468).
pub(super) fn certificate_pem(der: &[u8]) -> String {
    pem_block("CERTIFICATE", der)
}

/// Encodes `der` as a PEM block of the given label.
pub(super) fn pem_block(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

/// Why there is no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SignError {
    /// The authority cannot be reached now; a later try may succeed.
    #[error("certificate authority unreachable: {0}")]
    Unreachable(String),
    /// The authority was reached and said no.
    #[error("certificate authority refused: {0}")]
    Refused(String),
    /// The answer is not a certificate chain.
    #[error("certificate authority sent a malformed answer: {0}")]
    Malformed(String),
}
