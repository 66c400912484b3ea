//! rustls configurations. Those of a workload are built once for each certificate;
//! the peer's chain, usage, validity and trust domain are verified here, and whether
//! it is one of the *expected* identities after the handshake ([`super::peer_identity`]).

use std::sync::{Arc, LazyLock};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    CertificateError as TlsCertificateError, ClientConfig, DigitallySignedStruct,
    DistinguishedName, Error, OtherError, RootCertStore, ServerConfig, SignatureScheme,
};
use webpki::{EndEntityCert, KeyUsage};

use super::TrustDomain;
use super::certificate::{PeerIdentityError, leaf_identity};

/// HTTP/2 over TLS (RFC 9113 3.2).
const ALPN_H2: &[u8] = b"h2";

/// The one provider of the mesh: AES-128-GCM before AES-256-GCM, no others. 128 bits
/// are as strong as the P-256 and X25519 around them and cost a quarter less.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ],
        ..aws_lc_rs::default_provider()
    })
});

/// The crypto provider of every TLS configuration here.
pub(super) fn provider() -> &'static Arc<CryptoProvider> {
    &PROVIDER
}

/// The configuration of a workload that dials HBONE.
pub(super) fn workload_client_config(
    key: Arc<CertifiedKey>,
    verifier: Arc<MeshVerifier>,
) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.enable_sni = false;
    // A resumed session would skip the certificate check, and with it renewal and
    // revocation.
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = true;
    Ok(config)
}

/// The configuration of a workload that is dialled over HBONE.
pub(super) fn workload_server_config(
    key: Arc<CertifiedKey>,
    verifier: Arc<MeshVerifier>,
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.enable_secret_extraction = true;
    Ok(config)
}

/// Verifies the certificate of the other end of a tunnel, in either role.
#[derive(Debug)]
pub(super) struct MeshVerifier {
    anchors: Vec<TrustAnchor<'static>>,
    trust_domain: TrustDomain,
}

impl MeshVerifier {
    pub(super) fn new(anchors: Vec<TrustAnchor<'static>>, trust_domain: TrustDomain) -> Self {
        Self {
            anchors,
            trust_domain,
        }
    }

    /// Chain, validity and key usage by webpki; then one SPIFFE URI of our trust domain.
    pub(super) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), Error> {
        let end_entity = EndEntityCert::try_from(leaf).map_err(chain_error)?;
        end_entity
            .verify_for_usage(
                provider().signature_verification_algorithms.all,
                &self.anchors,
                intermediates,
                now,
                usage,
                None,
                None,
            )
            .map_err(chain_error)?;
        let identity = leaf_identity(&end_entity).map_err(identity_error)?;
        if *identity.trust_domain() != self.trust_domain {
            return Err(identity_error(PeerIdentityError::TrustDomain {
                peer: identity,
                expected: self.trust_domain.clone(),
            }));
        }
        Ok(())
    }
}

/// How the peer shows that it has its key: the same in both roles, which rustls has a trait for each.
macro_rules! handshake_signatures {
    () => {
        /// TLS 1.2 is not compiled in; a signature of it is refused all the same.
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::PeerIncompatible(
                rustls::PeerIncompatible::Tls12NotOffered,
            ))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            rustls::crypto::verify_tls13_signature(
                message,
                certificate,
                signature,
                &provider().signature_verification_algorithms,
            )
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            provider()
                .signature_verification_algorithms
                .supported_schemes()
        }
    };
}

fn identity_error(error: PeerIdentityError) -> Error {
    TlsCertificateError::Other(OtherError(Arc::new(error))).into()
}

/// Translates webpki's errors so that the peer gets the alert that fits.
fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    match error {
        E::BadDer | E::TrailingData(_) => TlsCertificateError::BadEncoding,
        E::CertNotValidYet { time, not_before } => {
            TlsCertificateError::NotValidYetContext { time, not_before }
        }
        E::CertExpired { time, not_after } => {
            TlsCertificateError::ExpiredContext { time, not_after }
        }
        E::UnknownIssuer => TlsCertificateError::UnknownIssuer,
        E::CertRevoked => TlsCertificateError::Revoked,
        E::InvalidSignatureForPublicKey => TlsCertificateError::BadSignature,
        E::RequiredEkuNotFoundContext(_) => TlsCertificateError::InvalidPurpose,
        other => TlsCertificateError::Other(OtherError(Arc::new(other))),
    }
    .into()
}

impl ServerCertVerifier for MeshVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // The mesh names peers by URI; the DNS or IP name that was dialled says nothing.
        self.verify(end_entity, intermediates, now, KeyUsage::server_auth())?;
        Ok(ServerCertVerified::assertion())
    }

    handshake_signatures!();
}

impl ClientCertVerifier for MeshVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Clients have one certificate; a list would only make the handshake larger.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    handshake_signatures!();
}

/// The configuration for dialling the control plane: the server's DNS or IP name is
/// verified against `roots`, the client authenticates by token.
///
/// # Errors
/// When `roots` is empty.
pub fn control_plane_client_config(roots: Arc<RootCertStore>) -> Result<ClientConfig, Error> {
    let verifier =
        rustls::client::WebPkiServerVerifier::builder_with_provider(roots, provider().clone())
            .build()
            .map_err(|e| Error::General(e.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(config)
}

/// A certificate chain, leaf first, and its key, for a server of the control plane.
#[derive(Debug)]
pub struct ControlPlaneIdentity {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's private key.
    pub key: PrivateKeyDer<'static>,
}

/// The configuration of a server of the control plane: TLS 1.3, `h2`, clients
/// authenticate by token.
///
/// # Errors
/// When the key is unusable or does not belong to the leaf.
pub fn control_plane_server_config(identity: ControlPlaneIdentity) -> Result<ServerConfig, Error> {
    let ControlPlaneIdentity { chain, key } = identity;
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(config)
}
