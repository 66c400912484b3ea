//! One small document over HTTP: the only requests that a waypoint makes of its own accord.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures_util::future;
use http::header::{ACCEPT, CONNECTION, HOST, LOCATION, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;

/// A key set is a few KiB.
const MAX_BODY: usize = 1024 * 1024;
/// As many as issuers move their documents by.
const MAX_REDIRECTS: usize = 3;
/// All issuers together, so that a start with many of them is no burst.
const MAX_CONCURRENT: usize = 32;

/// Addresses of a host and port that the mesh knows, asked before the system's resolver.
pub type Resolve = dyn Fn(&str, u16) -> Option<Vec<SocketAddr>> + Send + Sync;

/// Fetches documents of issuers. Clones share everything.
#[derive(Clone)]
pub struct Fetcher {
    shared: Arc<Shared>,
}

struct Shared {
    resolve: Option<Box<Resolve>>,
    roots: Option<Vec<CertificateDer<'static>>>,
    tls: OnceLock<Result<Arc<ClientConfig>, String>>,
    permits: Semaphore,
}

/// Why a document could not be had. All but [`FetchError::Uri`] may pass.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Neither `http` nor `https`, or without a host.
    #[error("{0:?} is not an http or https address")]
    Uri(String),
    /// DNS or TCP or TLS.
    #[error("cannot connect to {0}: {1}")]
    Connect(String, #[source] io::Error),
    /// No platform roots.
    #[error("cannot check certificates: {0}")]
    Roots(String),
    /// HTTP.
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    /// Another status than 200.
    #[error("the answer is {0}")]
    Status(StatusCode),
    /// The body is larger than 1 MiB, or broke off.
    #[error("the answer cannot be read: {0}")]
    Body(String),
    /// More than three redirects, or one from https to http.
    #[error("redirected too often, or to where it is less safe")]
    Redirect,
    /// Nothing in time.
    #[error("no answer in time")]
    Timeout,
    /// The document is not what it should be.
    #[error("{0}")]
    Document(String),
}

impl Fetcher {
    /// One that trusts the platform's roots for https.
    pub fn new(resolve: Option<Box<Resolve>>) -> Self {
        Self::with(resolve, None)
    }

    /// One that trusts `roots` instead.
    pub fn with_roots(resolve: Option<Box<Resolve>>, roots: Vec<CertificateDer<'static>>) -> Self {
        Self::with(resolve, Some(roots))
    }

    fn with(resolve: Option<Box<Resolve>>, roots: Option<Vec<CertificateDer<'static>>>) -> Self {
        Self {
            shared: Arc::new(Shared {
                resolve,
                roots,
                tls: OnceLock::new(),
                permits: Semaphore::new(MAX_CONCURRENT),
            }),
        }
    }

    /// The document at `uri`. The caller bounds the time.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn get(&self, uri: &Uri) -> Result<Bytes, FetchError> {
        let _permit = self.shared.permits.acquire().await;
        let mut uri = uri.clone();
        for _ in 0..=MAX_REDIRECTS {
            let target = Target::of(&uri)?;
            let tls = target.tls;
            let response = self.exchange(&target, &uri).await?;
            let (parts, body) = response.into_parts();
            if parts.status == StatusCode::OK {
                return Ok(body);
            }
            if !parts.status.is_redirection() {
                return Err(FetchError::Status(parts.status));
            }
            let next = parts
                .headers
                .get(LOCATION)
                .and_then(|next| next.to_str().ok());
            let next: Option<Uri> = next.and_then(|next| next.parse().ok());
            uri = match next {
                Some(next) if next.scheme().is_some() => next,
                // RFC 9110 10.2.2: relative to where we are.
                Some(next) if next.path().starts_with('/') => {
                    let mut parts = uri.into_parts();
                    parts.path_and_query = next.into_parts().path_and_query;
                    Uri::from_parts(parts).map_err(|_| FetchError::Redirect)?
                }
                _ => return Err(FetchError::Redirect),
            };
            if tls && uri.scheme_str() != Some("https") {
                return Err(FetchError::Redirect);
            }
        }
        Err(FetchError::Redirect)
    }

    async fn exchange(
        &self,
        target: &Target<'_>,
        uri: &Uri,
    ) -> Result<http::Response<Bytes>, FetchError> {
        let failed = |error| FetchError::Connect(target.authority.to_owned(), error);
        let stream = self.connect(target).await.map_err(failed)?;
        if !target.tls {
            return request(stream, target, uri).await;
        }
        let config = self.shared.tls.get_or_init(|| self.shared.tls_config());
        let config = config.clone().map_err(FetchError::Roots)?;
        let name = ServerName::try_from(target.host.to_owned())
            .map_err(|_| FetchError::Uri(uri.to_string()))?;
        let connecting = TlsConnector::from(config).connect(name, stream);
        request(connecting.await.map_err(failed)?, target, uri).await
    }

    async fn connect(&self, target: &Target<'_>) -> io::Result<TcpStream> {
        let resolve = self.shared.resolve.as_ref();
        let known = resolve.and_then(|resolve| resolve(target.host, target.port));
        let addresses = match known {
            Some(addresses) => addresses,
            None => tokio::net::lookup_host((target.host, target.port))
                .await?
                .collect(),
        };
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

impl Shared {
    fn tls_config(&self) -> Result<Arc<ClientConfig>, String> {
        let mut roots = RootCertStore::empty();
        match &self.roots {
            Some(own) => {
                roots.add_parsable_certificates(own.iter().cloned());
            }
            None => {
                let loaded = rustls_native_certs::load_native_certs();
                if loaded.certs.is_empty() {
                    let reason = loaded.errors.first().map(ToString::to_string);
                    return Err(reason.unwrap_or_else(|| "no platform roots".to_owned()));
                }
                roots.add_parsable_certificates(loaded.certs);
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::new(config))
    }
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetcher").finish_non_exhaustive()
    }
}

struct Target<'a> {
    tls: bool,
    authority: &'a str,
    host: &'a str,
    port: u16,
}

impl<'a> Target<'a> {
    fn of(uri: &'a Uri) -> Result<Self, FetchError> {
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(FetchError::Uri(uri.to_string())),
        };
        let authority = uri.authority();
        let authority = authority.ok_or_else(|| FetchError::Uri(uri.to_string()))?;
        let host = authority.host();
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        if host.is_empty() || authority.as_str().contains('@') {
            return Err(FetchError::Uri(uri.to_string()));
        }
        Ok(Self {
            tls,
            authority: authority.as_str(),
            host,
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
        })
    }
}

/// Whether `text` is an address that [`Fetcher::get`] takes.
pub(super) fn parse_uri(text: &str) -> Result<Uri, FetchError> {
    let uri: Uri = text.parse().map_err(|_| FetchError::Uri(text.to_owned()))?;
    Target::of(&uri)?;
    Ok(uri)
}

async fn request(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    target: &Target<'_>,
    uri: &Uri,
) -> Result<http::Response<Bytes>, FetchError> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(HOST, target.authority)
        .header(ACCEPT, "application/json")
        .header(USER_AGENT, "adit-waypoint")
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|_| FetchError::Uri(uri.to_string()))?;
    let exchange = async move {
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await;
        let body = body.map_err(|error| {
            FetchError::Body(if error.is::<LengthLimitError>() {
                format!("it is larger than {MAX_BODY} bytes")
            } else {
                error.to_string()
            })
        })?;
        Ok(http::Response::from_parts(parts, body.to_bytes()))
    };
    // What is wrong with the connection shows in the exchange.
    future::join(exchange, connection).await.0
}
