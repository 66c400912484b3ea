//! A new key and the request to certify it.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::pki_types::PrivatePkcs8KeyDer;

use super::SpiffeId;

/// A freshly made P-256 key and the certificate signing request for it.
///
/// The request has an empty subject and one critical extension, the SPIFFE URI, as
/// Istio's ztunnel sends it. Every request has a key of its own: a renewal never
/// certifies an old key again.
pub struct CertificateRequest {
    identity: SpiffeId,
    csr_pem: String,
    key: PrivatePkcs8KeyDer<'static>,
}

impl CertificateRequest {
    /// Makes a key and a request for `identity`.
    ///
    /// # Errors
    /// [`RequestError`] when the system has no randomness to give.
    pub fn new(identity: &SpiffeId) -> Result<Self, RequestError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        // An empty subject makes the SAN critical (RFC 5280 4.1.2.6).
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let csr_pem = params.serialize_request(&key)?.pem()?;
        Ok(Self {
            identity: identity.clone(),
            csr_pem,
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
        })
    }

    /// Whom the certificate is for.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The request as PEM.
    pub fn csr_pem(&self) -> &str {
        &self.csr_pem
    }

    /// Gives up the private key, to be joined with the certificate.
    pub fn into_key(self) -> PrivatePkcs8KeyDer<'static> {
        self.key
    }
}

impl std::fmt::Debug for CertificateRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateRequest")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// No key or request could be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a certificate request: {0}")]
pub struct RequestError(#[from] rcgen::Error);

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::prelude::*;

    #[test]
    fn carries_a_critical_uri_and_nothing_else() {
        let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart"
            .parse()
            .expect("legal");
        let request = CertificateRequest::new(&identity).expect("request");
        let (_, pem) = x509_parser::pem::parse_x509_pem(request.csr_pem().as_bytes()).expect("PEM");
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).expect("CSR");
        csr.verify_signature().expect("proves possession");
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0);
        let extensions: Vec<_> = info
            .attributes()
            .iter()
            .filter_map(|a| match a.parsed_attribute() {
                ParsedCriAttribute::ExtensionRequest(e) => Some(&e.extensions),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(extensions.len(), 1);
        assert!(extensions[0].critical);
        let ParsedExtension::SubjectAlternativeName(san) = extensions[0].parsed_extension() else {
            panic!("not a SAN: {extensions:?}");
        };
        assert_eq!(san.general_names, [GeneralName::URI(&identity.to_string())]);
    }

    #[test]
    fn every_request_has_its_own_key() {
        let identity: SpiffeId = "spiffe://td/ns/a/sa/b".parse().expect("legal");
        let key = || {
            let request = CertificateRequest::new(&identity).expect("request");
            request.into_key().secret_pkcs8_der().to_vec()
        };
        assert_ne!(key(), key());
    }
}
