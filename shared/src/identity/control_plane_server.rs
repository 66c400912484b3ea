//! The TLS side of a control-plane server: accepts and shakes hands beside each other,
//! so that one slow client holds up no other, with a deadline and a bound.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// For a client to finish its handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Handshakes at the same time; further clients wait in the listener's backlog.
const MAX_HANDSHAKES: usize = 256;
/// Pause after an accept that failed for lack of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts on `listener` with the configuration that `config` holds at that moment, for
/// `tonic`'s `serve_with_incoming`. Ends when the stream is dropped.
pub fn control_plane_incoming(
    listener: TcpListener,
    config: Arc<ArcSwap<ServerConfig>>,
) -> ReceiverStream<io::Result<ControlPlaneStream>> {
    let (accepted, stream) = mpsc::channel(16);
    tokio::spawn(accept_all(listener, config, accepted));
    ReceiverStream::new(stream)
}

async fn accept_all(
    listener: TcpListener,
    config: Arc<ArcSwap<ServerConfig>>,
    accepted: mpsc::Sender<io::Result<ControlPlaneStream>>,
) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let connection = tokio::select! {
            connection = listener.accept() => connection,
            () = accepted.closed() => return,
        };
        let (tcp, peer) = match connection {
            Ok(connection) => connection,
            Err(error) => {
                // EMFILE and its like pass; so does a client that left early.
                tracing::warn!(%error, "cannot accept a control-plane connection; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(config.load_full());
        let accepted = accepted.clone();
        tokio::spawn(async move {
            let handshake = tokio::time::timeout(HANDSHAKE_DEADLINE, handshake(acceptor, tcp));
            match handshake.await {
                Ok(Ok(stream)) => {
                    drop(slot);
                    let stream = ControlPlaneStream { stream, peer };
                    // The server has gone: so may the connection.
                    let _ = accepted.send(Ok(stream)).await;
                }
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "TLS handshake timed out"),
            }
        });
    }
}

async fn handshake(acceptor: TlsAcceptor, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    tcp.set_nodelay(true)?;
    acceptor.accept(tcp).await
}

/// A TLS connection of a client, with its address.
#[derive(Debug)]
pub struct ControlPlaneStream {
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
}

/// The client's address, in the extensions of a request.
#[derive(Debug, Clone, Copy)]
pub struct ControlPlanePeer(pub SocketAddr);

impl Connected for ControlPlaneStream {
    type ConnectInfo = ControlPlanePeer;

    fn connect_info(&self) -> ControlPlanePeer {
        ControlPlanePeer(self.peer)
    }
}

impl AsyncRead for ControlPlaneStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for ControlPlaneStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
