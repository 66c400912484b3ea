//! The connection to the control plane: TLS, or plain TCP to a loopback address.
//!
//! The roots are asked for at every connect, so that a rotated root needs no restart.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use crate::identity::{TrustBundle, TrustBundleError, control_plane_client_config};

/// TCP keepalive, as Istio's ztunnel sets it towards istiod.
const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(300);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(75);
const TCP_KEEPALIVE_PROBES: u32 = 9;
const HTTP2_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const HTTP2_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A first push to a large mesh is tens of megabytes.
const WINDOW: u32 = 4 << 20;

/// Where the control plane is and how it is trusted.
#[derive(Debug, Clone)]
pub struct TransportConfig {
    /// `https://host:port`, or `http://` of a loopback address.
    pub address: Uri,
    /// The roots that may have signed the server's certificate. Needed for `https`.
    pub trust: Option<Arc<TrustBundle>>,
    /// The name that the server's certificate must have, if not the host of `address`.
    pub server_name: Option<String>,
    /// Allows `http://` to other than loopback addresses. The token then goes over the
    /// network in the clear.
    pub allow_plaintext: bool,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address cannot be used.
    #[error("control plane address {0}: {1}")]
    Address(Uri, &'static str),
    /// The server's name is not one.
    #[error("control plane name {0:?}: {1}")]
    ServerName(String, InvalidDnsNameError),
    /// There are no roots.
    #[error(transparent)]
    Trust(#[from] TrustBundleError),
    /// The roots are of no use to TLS.
    #[error("TLS towards the control plane: {0}")]
    Tls(#[from] rustls::Error),
    /// No connection, or no TLS.
    #[error("{0}")]
    Transport(#[from] tonic::transport::Error),
}

impl TransportConfig {
    /// Checks what can be checked without connecting.
    ///
    /// # Errors
    /// [`ConnectError::Address`], [`ConnectError::ServerName`].
    pub fn validate(&self) -> Result<(), ConnectError> {
        let wrong = |reason| Err(ConnectError::Address(self.address.clone(), reason));
        match self.address.scheme_str() {
            Some("https") if self.trust.is_none() => wrong("https needs root certificates"),
            Some("https") => self.server_name().map(|_| ()),
            Some("http") if !(self.allow_plaintext || self.is_loopback()) => {
                wrong("plain http is only for loopback addresses, unless it is allowed explicitly")
            }
            Some("http") if self.address.host().is_some() => Ok(()),
            _ => wrong("must be https://host:port, or http://host:port"),
        }
    }

    /// Connects, within five seconds.
    ///
    /// # Errors
    /// [`ConnectError`]; all are worth another attempt, because files and servers change.
    pub async fn connect(&self) -> Result<Channel, ConnectError> {
        self.validate()?;
        let tls = match (self.address.scheme_str(), &self.trust) {
            (Some("https"), Some(trust)) => {
                let config = control_plane_client_config(trust.roots()?)?;
                Some((TlsConnector::from(Arc::new(config)), self.server_name()?))
            }
            _ => None,
        };
        let endpoint = Endpoint::from(self.address.clone())
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(HTTP2_KEEPALIVE_INTERVAL)
            .keep_alive_timeout(HTTP2_KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        Ok(endpoint.connect_with_connector(Connector { tls }).await?)
    }

    fn is_loopback(&self) -> bool {
        let host = self.address.host().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost"
            || bare
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    }

    fn server_name(&self) -> Result<ServerName<'static>, ConnectError> {
        let host = self.address.host().unwrap_or_default();
        let name = self
            .server_name
            .as_deref()
            .unwrap_or_else(|| host.trim_start_matches('[').trim_end_matches(']'));
        ServerName::try_from(name.to_owned())
            .map_err(|error| ConnectError::ServerName(name.to_owned(), error))
    }
}

/// Dials for tonic. tonic's own TLS is not used: it would pull in a second set of options, and
/// reads its roots once.
#[derive(Clone)]
struct Connector {
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<Connection>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let tls = self.tls.clone();
        Box::pin(async move { Ok(TokioIo::new(dial(&uri, tls).await?)) })
    }
}

async fn dial(
    uri: &Uri,
    tls: Option<(TlsConnector, ServerName<'static>)>,
) -> io::Result<Connection> {
    let host = uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = uri
        .port_u16()
        .unwrap_or(if tls.is_some() { 443 } else { 80 });
    let tcp = TcpStream::connect((host, port)).await?;
    tcp.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(TCP_KEEPALIVE_IDLE)
        .with_interval(TCP_KEEPALIVE_INTERVAL)
        .with_retries(TCP_KEEPALIVE_PROBES);
    socket2::SockRef::from(&tcp).set_tcp_keepalive(&keepalive)?;
    Ok(match tls {
        None => Connection::Plain(tcp),
        Some((connector, name)) => Connection::Tls(Box::new(connector.connect(name, tcp).await?)),
    })
}

enum Connection {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_only() {
        let root = Some(Arc::new(TrustBundle::from_file("root.pem")));
        for (address, trust, allow_plaintext, legal) in [
            (
                "https://istiod.istio-system.svc:15012",
                root.clone(),
                false,
                true,
            ),
            ("https://[fd00::1]:15012", root.clone(), false, true),
            ("https://istiod:15012", None, false, false),
            ("http://127.0.0.1:15010", None, false, true),
            ("http://[::1]:15010", None, false, true),
            ("http://localhost:15010", None, false, true),
            ("http://10.0.0.1:15010", None, false, false),
            ("http://localhost.example.com:15010", None, false, false),
            ("http://10.0.0.1:15010", None, true, true),
            ("istiod:15012", root.clone(), true, false),
            ("ftp://istiod:15012", root.clone(), true, false),
        ] {
            let config = TransportConfig {
                address: address.parse().expect("a URI"),
                trust,
                server_name: None,
                allow_plaintext,
            };
            assert_eq!(config.validate().is_ok(), legal, "{address}");
        }
    }
}
