//! An HBONE client that does whatever a test wants, also what no proxy of ours would do: any
//! certificate, any request, or none.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::identity::{CaFiles, CertificateRequest, LocalCa, SpiffeId, TrustDomain};
use anyhow::Context;
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{Method, Request, StatusCode};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::mesh::TestMesh;

const LIMIT: Duration = Duration::from_secs(15);

/// Which certificate a client shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential<'a> {
    /// Signed by the mesh's own authority for `trust-domain/ns/NAMESPACE/sa/ACCOUNT`.
    Mesh(&'a str),
    /// The same, valid until an hour ago.
    Expired(&'a str),
    /// The same, of an authority that the mesh does not know.
    Foreign(&'a str),
    /// Signed by the mesh's own authority, without a SPIFFE id.
    Anonymous,
    /// No certificate.
    None,
}

impl TestMesh {
    /// The TLS configuration of a client with this credential, which believes any server.
    ///
    /// # Errors
    /// The mesh's authority cannot be read.
    pub fn hbone_tls(&self, credential: Credential<'_>) -> anyhow::Result<Arc<ClientConfig>> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = Arc::new(AnyServer(provider.clone()));
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match self.chain(credential)? {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => builder.with_client_auth_cert(chain, PrivateKeyDer::from(key))?,
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }

    #[allow(clippy::type_complexity)]
    fn chain(
        &self,
        credential: Credential<'_>,
    ) -> anyhow::Result<Option<(Vec<CertificateDer<'static>>, PrivatePkcs8KeyDer<'static>)>> {
        let directory = self.file("ca");
        let id =
            |text: &str| -> anyhow::Result<SpiffeId> { Ok(format!("spiffe://{text}").parse()?) };
        let signed_by = |ca: &LocalCa, text: &str| -> anyhow::Result<_> {
            let request = CertificateRequest::new(&id(text)?)?;
            let signed = ca.sign(
                request.csr_pem(),
                request.identity(),
                Duration::from_secs(3600),
            )?;
            Ok(Some((signed.chain, request.into_key())))
        };
        match credential {
            Credential::None => Ok(None),
            Credential::Mesh(text) => signed_by(&LocalCa::load(&directory)?, text),
            Credential::Foreign(text) => {
                signed_by(&LocalCa::generate(&TrustDomain::default())?, text)
            }
            Credential::Expired(text) => self.sign_by_hand(Some(&id(text)?.to_string()), true),
            Credential::Anonymous => self.sign_by_hand(None, false),
        }
    }

    #[allow(clippy::type_complexity)]
    fn sign_by_hand(
        &self,
        uri: Option<&str>,
        expired: bool,
    ) -> anyhow::Result<Option<(Vec<CertificateDer<'static>>, PrivatePkcs8KeyDer<'static>)>> {
        use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
        let files = CaFiles::read(&self.file("ca"))?;
        let issuer = Issuer::from_ca_cert_pem(&files.certificate, KeyPair::from_pem(&files.key)?)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        if let Some(uri) = uri {
            params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        }
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(if expired { 2021 } else { 2099 }, 1, 1);
        let leaf = params.signed_by(&key, &issuer)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok(Some((vec![leaf.der().clone()], key)))
    }
}

/// TLS over a connected socket. A server refuses a client's certificate after the client has
/// finished its handshake (RFC 8446 2): a refusal shows at the first read.
///
/// # Errors
/// The handshake's.
pub async fn tls(
    stream: std::net::TcpStream,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let address = stream.peer_addr()?.ip();
    stream.set_nonblocking(true)?;
    let stream = TcpStream::from_std(stream)?;
    let name = ServerName::IpAddress(address.into());
    timeout(LIMIT, TlsConnector::from(config).connect(name, stream))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// An HTTP/2 connection to an HBONE port.
pub struct RawHbone {
    /// For requests of any form.
    pub requests: SendRequest<Bytes>,
    driver: tokio::task::JoinHandle<Result<(), h2::Error>>,
}

/// An accepted CONNECT.
pub struct RawTunnel {
    /// Towards the app.
    pub send: SendStream<Bytes>,
    /// From the app.
    pub receive: RecvStream,
}

impl RawHbone {
    /// TLS and HTTP/2 over a connected socket.
    ///
    /// # Errors
    /// A handshake failed.
    pub async fn open(
        stream: std::net::TcpStream,
        config: Arc<ClientConfig>,
    ) -> anyhow::Result<Self> {
        let tls = tls(stream, config).await.context("TLS")?;
        let (requests, connection) = timeout(LIMIT, h2::client::handshake(tls))
            .await
            .context("HTTP/2")??;
        let driver = tokio::spawn(connection);
        let requests = timeout(LIMIT, requests.ready()).await.context("ready")??;
        Ok(Self { requests, driver })
    }

    /// Sends a request whose stream stays open.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send(
        &mut self,
        request: Request<()>,
    ) -> anyhow::Result<(ResponseFuture, SendStream<Bytes>)> {
        let mut requests = timeout(LIMIT, self.requests.clone().ready())
            .await
            .context("ready")??;
        Ok(requests.send_request(request, false)?)
    }

    /// CONNECT; the status that it is answered with, and the tunnel if that is 200.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn connect(
        &mut self,
        authority: &str,
    ) -> anyhow::Result<(StatusCode, Option<RawTunnel>)> {
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(authority)
            .body(())?;
        let (response, send) = self.send(request).await?;
        let response = timeout(LIMIT, response).await.context("no answer")??;
        let status = response.status();
        let tunnel = (status == StatusCode::OK).then(|| RawTunnel {
            send,
            receive: response.into_body(),
        });
        Ok((status, tunnel))
    }

    /// Waits for the connection's end; `true` if it came.
    pub async fn ended(&mut self, limit: Duration) -> bool {
        timeout(limit, &mut self.driver).await.is_ok()
    }
}

impl Drop for RawHbone {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// A client that is tried against servers does not care who they are.
#[derive(Debug)]
struct AnyServer(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
