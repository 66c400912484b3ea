//! TLS towards endpoints that are not in the mesh (BackendTLSPolicy, DestinationRule `tls`).

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, SignatureScheme,
};
use webpki::{EndEntityCert, KeyUsage};

use super::HttpVersion;
use crate::balance::{ClientTls, TlsMode};

/// The provider of these connections.
static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));
/// The platform's roots, read once.
static SYSTEM_ROOTS: LazyLock<Vec<CertificateDer<'static>>> =
    LazyLock::new(|| rustls_native_certs::load_native_certs().certs);

/// What servers are shown that want to know who asks.
#[derive(Clone)]
pub struct ClientIdentity(Arc<CertifiedKey>);

impl ClientIdentity {
    /// From a chain of certificates and the key of the first.
    ///
    /// # Errors
    /// What is wrong with them; the key is not in it.
    pub fn from_pem(chain: &str, key: &str) -> Result<Self, String> {
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("certificate_chain: {error}"))?;
        if chain.is_empty() {
            return Err("certificate_chain: holds no certificate".into());
        }
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|_| "private_key: is no private key")?;
        let certified = CertifiedKey::from_der(chain, key, &PROVIDER)
            .map_err(|error| format!("certificate and key: {error}"))?;
        Ok(Self(Arc::new(certified)))
    }
}

impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientIdentity(..)")
    }
}

/// By the certificates: with another one, connections are others.
impl PartialEq for ClientIdentity {
    fn eq(&self, other: &Self) -> bool {
        self.0.cert == other.0.cert
    }
}

impl Eq for ClientIdentity {}

/// How TLS is begun towards an endpoint. Made when the configuration changes.
#[derive(Debug, Clone)]
pub struct Originate {
    settings: ClientTls,
    /// The name that is asked for and verified.
    name: Arc<str>,
    client: Option<ClientIdentity>,
    ready: Result<Ready, Arc<str>>,
}

#[derive(Debug, Clone)]
struct Ready {
    name: ServerName<'static>,
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    opaque: Arc<ClientConfig>,
}

impl PartialEq for Originate {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings && self.name == other.name && self.client == other.client
    }
}

impl Eq for Originate {}

impl Hash for Originate {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
        self.settings.ca_certificates.hash(state);
    }
}

impl Originate {
    /// What `settings` ask for; `None`: no TLS. `hostname` is whose certificate is expected
    /// where they do not say; `client` what is in the secret that they name.
    pub fn of(
        settings: Option<&ClientTls>,
        hostname: &str,
        client: Option<&ClientIdentity>,
    ) -> Option<Self> {
        let settings = settings?;
        let wanted = match settings.mode {
            TlsMode::Simple | TlsMode::Mutual => true,
            // The tunnel already encrypts.
            TlsMode::Disable | TlsMode::IstioMutual => settings.invalid.is_some(),
        };
        if !wanted {
            return None;
        }
        let name: Arc<str> = match &*settings.sni {
            "" => hostname.into(),
            _ => settings.sni.clone(),
        };
        let client = client.filter(|_| settings.mode == TlsMode::Mutual);
        let ready = Ready::new(settings, &name, client).map_err(Arc::from);
        Some(Self {
            settings: settings.clone(),
            name,
            client: client.cloned(),
            ready,
        })
    }

    /// The configuration for a connection that carries `version`, or opaque bytes.
    ///
    /// # Errors
    /// Why there is none: the settings are invalid.
    pub fn config(
        &self,
        version: Option<HttpVersion>,
    ) -> Result<(Arc<ClientConfig>, ServerName<'static>), Arc<str>> {
        let ready = self.ready.as_ref().map_err(Arc::clone)?;
        let config = match version {
            Some(HttpVersion::Http1) => &ready.http1,
            Some(HttpVersion::Http2) => &ready.http2,
            None => &ready.opaque,
        };
        Ok((config.clone(), ready.name.clone()))
    }
}

impl Ready {
    fn new(
        settings: &ClientTls,
        name: &str,
        client: Option<&ClientIdentity>,
    ) -> Result<Self, String> {
        if let Some(reason) = &settings.invalid {
            return Err(reason.to_string());
        }
        if settings.mode == TlsMode::Mutual && client.is_none() {
            let secret = &settings.client_secret;
            return Err(format!(
                "mode MUTUAL: there is no client certificate {secret:?}"
            ));
        }
        let server_name = ServerName::try_from(name.to_owned()).map_err(|e| e.to_string())?;
        let mut roots = Vec::new();
        if !settings.ca_certificates.is_empty() {
            for certificate in CertificateDer::pem_slice_iter(settings.ca_certificates.as_bytes()) {
                roots.push(certificate.map_err(|e| format!("ca_certificates: {e}"))?);
            }
        }
        if settings.system_roots || (roots.is_empty() && !settings.insecure_skip_verify) {
            roots.extend_from_slice(&SYSTEM_ROOTS);
        }
        if roots.is_empty() && !settings.insecure_skip_verify {
            return Err("there are no certificates to verify with".into());
        }
        let anchors = roots.iter().map(|root| {
            let anchor = webpki::anchor_from_trusted_cert(root);
            anchor
                .map(|anchor| anchor.to_owned())
                .map_err(|e| e.to_string())
        });
        let names = match settings.subject_alt_names.is_empty() {
            true => vec![name.to_owned()],
            false => settings
                .subject_alt_names
                .iter()
                .map(ToString::to_string)
                .collect(),
        };
        let verifier = Arc::new(Verifier {
            anchors: anchors.collect::<Result<_, _>>()?,
            names,
            any: settings.insecure_skip_verify,
        });
        let config = |alpn: &[&[u8]]| -> Result<Arc<ClientConfig>, String> {
            let builder = ClientConfig::builder_with_provider(PROVIDER.clone())
                .with_safe_default_protocol_versions()
                .map_err(|e| e.to_string())?
                .dangerous()
                .with_custom_certificate_verifier(verifier.clone());
            let mut config = match client {
                None => builder.with_no_client_auth(),
                Some(ClientIdentity(certified)) => {
                    let shown = SingleCertAndKey::from(certified.clone());
                    builder.with_client_cert_resolver(Arc::new(shown))
                }
            };
            config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
            Ok(Arc::new(config))
        };
        Ok(Self {
            name: server_name,
            http1: config(&[b"http/1.1"])?,
            http2: config(&[b"h2"])?,
            opaque: config(&[])?,
        })
    }
}

/// Verifies the chain, and one of the names that are accepted.
#[derive(Debug)]
struct Verifier {
    anchors: Vec<TrustAnchor<'static>>,
    /// DNS names, addresses or URIs.
    names: Vec<String>,
    any: bool,
}

fn refused(error: webpki::Error) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

impl Verifier {
    fn has_name(&self, certificate: &EndEntityCert<'_>) -> bool {
        self.names.iter().any(|name| {
            if name.contains("://") {
                let mut uris = certificate.valid_uri_names();
                return uris.any(|uri| uri == name);
            }
            ServerName::try_from(name.as_str())
                .is_ok_and(|name| certificate.verify_is_valid_for_subject_name(&name).is_ok())
        })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.any {
            return Ok(ServerCertVerified::assertion());
        }
        let certificate = EndEntityCert::try_from(end_entity).map_err(refused)?;
        certificate
            .verify_for_usage(
                PROVIDER.signature_verification_algorithms.all,
                &self.anchors,
                intermediates,
                now,
                KeyUsage::server_auth(),
                None,
                None,
            )
            .map_err(refused)?;
        if !self.has_name(&certificate) {
            return Err(CertificateError::NotValidForName.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // Not compiled in.
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &PROVIDER.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER
            .signature_verification_algorithms
            .supported_schemes()
    }
}
