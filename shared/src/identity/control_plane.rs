//! How nodes dial the control plane: TLS 1.3 verified against a [`TrustBundle`] that
//! may change while we run, and a bearer token that is read anew for every call.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use super::tls::control_plane_client_config;
use super::{TrustBundle, TrustBundleError};

/// Name resolution, TCP and TLS together may take this long.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// The port of the control plane where an address names none.
const DEFAULT_PORT: u16 = 15012;

/// Where the control plane is and how to know that it is the right one.
#[derive(Debug, Clone)]
pub struct ControlPlaneEndpoint {
    uri: Uri,
    connector: Connector,
}

impl ControlPlaneEndpoint {
    /// An endpoint at `address`, `https://host[:port]`, whose certificate must lead to
    /// `trust` and be for the host, or for `server_name` where that is given.
    ///
    /// # Errors
    /// [`ControlPlaneError::Address`] when the address is not such a URL, or a name is
    /// not a DNS name or IP address. Plain `http` is refused: a token would travel in
    /// the clear.
    pub fn new(
        address: &str,
        trust: Arc<TrustBundle>,
        server_name: Option<&str>,
    ) -> Result<Self, ControlPlaneError> {
        let invalid = |reason: String| ControlPlaneError::Address {
            address: address.into(),
            reason,
        };
        let uri: Uri = address
            .parse()
            .map_err(|e: http::uri::InvalidUri| invalid(e.to_string()))?;
        if uri.scheme_str() != Some("https") {
            return Err(invalid("the scheme must be https".into()));
        }
        let host = uri.host().ok_or_else(|| invalid("it has no host".into()))?;
        // The brackets of an IPv6 literal belong to the URL, not to the name.
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = server_name.unwrap_or(host).to_owned();
        let server_name = ServerName::try_from(name)
            .map_err(|_| invalid("its host is neither a DNS name nor an IP address".into()))?;
        let connector = Connector {
            host: host.into(),
            port: uri.port_u16().unwrap_or(DEFAULT_PORT),
            server_name,
            trust,
        };
        Ok(Self { uri, connector })
    }

    /// A gRPC channel that connects on first use and again after every loss, each time
    /// with the roots of that moment.
    pub fn channel(&self) -> Channel {
        Endpoint::from(self.uri.clone())
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .connect_with_connector_lazy(self.connector.clone())
    }

    /// The address as it was configured.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }
}

/// Opens TLS connections to one control-plane address, for tonic and hyper.
#[derive(Debug, Clone)]
pub struct Connector {
    host: Arc<str>,
    port: u16,
    server_name: ServerName<'static>,
    trust: Arc<TrustBundle>,
}

impl Connector {
    /// Connects, within ten seconds.
    ///
    /// # Errors
    /// [`ControlPlaneError`] that says which step failed.
    pub async fn connect(&self) -> Result<TlsStream<TcpStream>, ControlPlaneError> {
        let connected = tokio::time::timeout(CONNECT_DEADLINE, self.connect_unbounded());
        connected
            .await
            .unwrap_or_else(|_| Err(self.failed("connect", "timed out")))
    }

    async fn connect_unbounded(&self) -> Result<TlsStream<TcpStream>, ControlPlaneError> {
        let config = control_plane_client_config(self.trust.roots()?)
            .map_err(|e| self.failed("configure TLS", e))?;
        // Resolves and tries every address.
        let tcp = TcpStream::connect((&*self.host, self.port))
            .await
            .map_err(|e| self.failed("connect", e))?;
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(300))
            .with_interval(Duration::from_secs(75))
            .with_retries(9);
        SockRef::from(&tcp)
            .set_tcp_keepalive(&keepalive)
            .and_then(|()| tcp.set_nodelay(true))
            .map_err(|e| self.failed("set socket options", e))?;
        TlsConnector::from(Arc::new(config))
            .connect(self.server_name.clone(), tcp)
            .await
            .map_err(|e| self.failed("TLS handshake", e))
    }

    fn failed(&self, step: &'static str, why: impl std::fmt::Display) -> ControlPlaneError {
        ControlPlaneError::Connect {
            host: self.host.clone(),
            port: self.port,
            step,
            reason: why.to_string(),
        }
    }
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = ControlPlaneError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect().await.map(TokioIo::new) })
    }
}

/// Where the bearer token comes from. Read for every call: kubelet rotates the file.
#[derive(Clone)]
pub enum TokenSource {
    /// A file with a JWT, for example a projected service-account token.
    File(PathBuf),
    /// The token itself.
    Literal(Arc<str>),
}

impl TokenSource {
    /// The value of the `authorization` header.
    ///
    /// # Errors
    /// [`TokenUnreadable`] when the file cannot be read or holds no token.
    pub fn authorization(
        &self,
    ) -> Result<tonic::metadata::MetadataValue<tonic::metadata::Ascii>, TokenUnreadable> {
        let unreadable = |reason: String| TokenUnreadable {
            source_name: format!("{self:?}"),
            reason,
        };
        let read;
        let token = match self {
            Self::File(path) => {
                read = std::fs::read_to_string(path).map_err(|e| unreadable(e.to_string()))?;
                read.trim()
            }
            Self::Literal(token) => token.trim(),
        };
        if token.is_empty() {
            return Err(unreadable("it is empty".into()));
        }
        let mut value: tonic::metadata::MetadataValue<_> = format!("Bearer {token}")
            .parse()
            .map_err(|_| unreadable("it has characters that a header may not have".into()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// Names the source, never the token.
impl std::fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "token file {}", path.display()),
            Self::Literal(_) => f.write_str("literal token"),
        }
    }
}

/// The token cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{source_name} is unusable: {reason}")]
pub struct TokenUnreadable {
    source_name: String,
    reason: String,
}

/// Why there is no connection to the control plane.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ControlPlaneError {
    /// The configured address is unusable; a retry does not help.
    #[error("invalid control-plane address {address:?}: {reason}")]
    Address {
        /// As configured.
        address: String,
        /// What is wrong.
        reason: String,
    },
    /// There are no roots to verify it with.
    #[error(transparent)]
    Trust(#[from] TrustBundleError),
    /// It does not answer or is not the one it should be.
    #[error("control plane {host}:{port}: {step}: {reason}")]
    Connect {
        /// Host of the address.
        host: Arc<str>,
        /// Port of the address.
        port: u16,
        /// What was being done.
        step: &'static str,
        /// What went wrong.
        reason: String,
    },
}
