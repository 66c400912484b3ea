//! The stream: a socket, the two halves of the record layer, and buffers only while bytes are
//! in them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CipherSuite, ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::error::{RecordError, TlsError};
use super::handshake::{self, Established, Peer};
use super::read::Receiving;
use super::schedule::KeySchedule;
use super::write::Sending;
use crate::hbone::buffer::BufferPool;

/// A TLS 1.3 stream over a socket.
///
/// * Reading ends with `Ok(0)` after close_notify only. A socket that ends without it yields
///   [`RecordError::Truncated`]. What fails is final for both directions.
/// * [`AsyncBufRead`] gives the opened records without a copy.
/// * Writing takes up to 1 MiB per call, accepts nothing more while sealed bytes wait for the
///   socket, and needs a flush at the end like every buffered writer.
/// * `poll_shutdown` sends close_notify and then shuts down the socket for writing; reading
///   goes on (RFC 8446 6.1).
///
/// It borrows from the worker's [`BufferPool`], so it stays on its thread. Dropping it closes
/// the socket without close_notify.
pub struct TlsStream<IO = TcpStream> {
    pub(super) io: IO,
    pub(super) pool: BufferPool,
    pub(super) schedule: KeySchedule,
    pub(super) rx: Receiving,
    pub(super) tx: Sending,
    /// Set once, then final.
    pub(super) failed: Option<RecordError>,
    peer: Box<Peer>,
}

/// There is one per connection, and pools of them.
const _: () = assert!(size_of::<TlsStream>() <= 384);

impl<IO: AsyncRead + AsyncWrite + Unpin> TlsStream<IO> {
    /// The client's side of a handshake. `config` must have `enable_secret_extraction` set.
    pub async fn connect(
        mut io: IO,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        handshake_timeout: Duration,
    ) -> Result<Self, TlsError> {
        let handshake = handshake::connect(&mut io, config, name);
        let established = timeout(handshake_timeout, handshake)
            .await
            .map_err(|_| TlsError::Timeout)??;
        Ok(Self::new(io, established))
    }

    /// The server's side of a handshake. `config` must have `enable_secret_extraction` set.
    pub async fn accept(
        mut io: IO,
        config: Arc<ServerConfig>,
        handshake_timeout: Duration,
    ) -> Result<Self, TlsError> {
        let handshake = handshake::accept(&mut io, config);
        let established = timeout(handshake_timeout, handshake)
            .await
            .map_err(|_| TlsError::Timeout)??;
        Ok(Self::new(io, established))
    }
}

impl<IO> TlsStream<IO> {
    fn new(io: IO, established: Established) -> Self {
        Self {
            io,
            pool: BufferPool::local(),
            schedule: established.schedule,
            rx: Receiving::new(established.opener, established.early),
            tx: Sending::new(established.sealer),
            failed: None,
            peer: Box::new(established.peer),
        }
    }

    /// The peer's certificate chain, leaf first; empty if it showed none, or after
    /// [`Self::take_peer_certificates`].
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.peer.certificates
    }

    /// Takes the peer's certificate chain out of the stream: a long-lived stream need not hold
    /// it once the identity is known.
    pub fn take_peer_certificates(&mut self) -> Vec<CertificateDer<'static>> {
        std::mem::take(&mut self.peer.certificates)
    }

    /// The application protocol that was agreed (RFC 7301).
    pub fn alpn(&self) -> Option<&[u8]> {
        self.peer.alpn.as_deref()
    }

    /// The cipher suite that was agreed.
    pub fn cipher_suite(&self) -> CipherSuite {
        self.peer.suite
    }

    /// The socket.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }

    /// Bytes that lie in buffers of this stream now; zero when it is idle.
    pub fn memory(&self) -> usize {
        self.rx.memory() + self.tx.memory()
    }

    /// Lowers the number of records per sending key from
    /// [`AES_GCM_RECORD_LIMIT`](super::AES_GCM_RECORD_LIMIT). It is at least two: one for data
    /// and one for the KeyUpdate.
    pub fn limit_records_per_key(&mut self, records: u64) {
        self.tx.sealer.lower_limit(records.max(2));
    }
}

impl<IO> fmt::Debug for TlsStream<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream")
            .field("suite", &self.peer.suite)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
