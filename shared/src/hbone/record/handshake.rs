//! Drives a rustls handshake over a socket, and stops at exactly the right byte.
//!
//! rustls is shown one record at a time. It would otherwise go on into the records behind the
//! handshake, decrypt them, and leave us with sequence numbers and half-read messages of its
//! making.

use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{
    CipherSuite, ClientConfig, CommonState, Error, ExtractedSecrets, ProtocolVersion, ServerConfig,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::error::{RecordError, TlsError};
use super::open::Opener;
use super::schedule::KeySchedule;
use super::seal::Sealer;
use super::{APPLICATION_DATA, CHANGE_CIPHER_SPEC, HEADER_LEN};

/// Bytes of handshake that may be pending: the largest message that rustls puts together
/// (64 KiB), spread over records with their overhead.
const MAX_INCOMING: usize = 96 << 10;
/// The largest payload that rustls lets pass in any version of TLS.
const MAX_LEGACY_PAYLOAD: usize = (16 << 10) + 2048;
/// A ClientHello or a server's flight with a P-256 chain fits.
const READ_STEP: usize = 4 << 10;

/// What a handshake yields.
pub(super) struct Established {
    pub(super) opener: Opener,
    pub(super) sealer: Sealer,
    pub(super) schedule: KeySchedule,
    pub(super) peer: Peer,
    /// Bytes behind the handshake that were read along with it.
    pub(super) early: Vec<u8>,
}

/// What was agreed with the peer.
pub(super) struct Peer {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) alpn: Option<Box<[u8]>>,
    pub(super) suite: CipherSuite,
}

pub(super) async fn connect<IO: AsyncRead + AsyncWrite + Unpin>(
    io: &mut IO,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<Established, TlsError> {
    establish(io, UnbufferedClientConnection::new(config, name)?).await
}

pub(super) async fn accept<IO: AsyncRead + AsyncWrite + Unpin>(
    io: &mut IO,
    config: Arc<ServerConfig>,
) -> Result<Established, TlsError> {
    establish(io, UnbufferedServerConnection::new(config)?).await
}

async fn establish<IO, S>(io: &mut IO, mut side: S) -> Result<Established, TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    S: Side,
{
    let early = drive(io, &mut side).await?;
    let common = side.common();
    if common.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
        return Err(TlsError::NotTls13);
    }
    let peer = Peer {
        certificates: common
            .peer_certificates()
            .map(|chain| chain.to_vec())
            .unwrap_or_default(),
        alpn: common.alpn_protocol().map(Into::into),
        suite: common
            .negotiated_cipher_suite()
            .ok_or(TlsError::UnsupportedSuite)?
            .suite(),
    };
    let (secrets, schedule) = side.into_keys()?;
    let unsupported = |_: RecordError| TlsError::UnsupportedSuite;
    Ok(Established {
        opener: Opener::new(secrets.rx.1, secrets.rx.0).map_err(unsupported)?,
        sealer: Sealer::new(secrets.tx.1, secrets.tx.0).map_err(unsupported)?,
        schedule,
        peer,
        early,
    })
}

/// What to do once rustls has let go of the buffers.
enum Next {
    /// Ask rustls again.
    Again,
    /// Send what was encoded.
    Send,
    /// Show rustls one more record.
    Feed,
    /// Traffic may be sent; whether it may also be received is to be asked.
    Traffic,
}

/// Runs the handshake; returns the bytes that were read beyond it.
async fn drive<IO, S>(io: &mut IO, side: &mut S) -> Result<Vec<u8>, TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    S: Side,
{
    let mut incoming = Vec::with_capacity(READ_STEP);
    // The prefix of `incoming` that rustls may see; it ends between two records.
    let mut shown = 0;
    let mut outgoing = Vec::new();
    loop {
        let UnbufferedStatus { discard, state } = side.process(&mut incoming[..shown]);
        let next = match state {
            Ok(ConnectionState::EncodeTlsData(encoder)) => {
                encode(encoder, &mut outgoing).map(|()| Next::Again)
            }
            Ok(ConnectionState::TransmitTlsData(transmit)) => {
                transmit.done();
                Ok(Next::Send)
            }
            Ok(ConnectionState::BlockedHandshake) => Ok(Next::Feed),
            Ok(ConnectionState::WriteTraffic(_)) => Ok(Next::Traffic),
            Ok(ConnectionState::ReadEarlyData(_)) => return Err(TlsError::EarlyData),
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                return Err(TlsError::Closed);
            }
            // Application data is never shown to rustls.
            Ok(_) => Err(Error::General("unexpected handshake state".into())),
            Err(error) => Err(error),
        };
        incoming.drain(..discard);
        shown -= discard;
        match next {
            Ok(Next::Again) => {}
            Ok(Next::Send) => {
                io.write_all(&outgoing).await?;
                io.flush().await?;
                outgoing.clear();
            }
            Ok(Next::Traffic) if !side.common().is_handshaking() => {
                // What is not shown was never looked at.
                incoming.drain(..shown);
                return Ok(incoming);
            }
            // A server may be ready to send before it has heard the client's Finished.
            Ok(Next::Feed | Next::Traffic) => {
                shown = feed(io, &mut incoming, shown).await?;
            }
            Err(error) => {
                send_alert(io, side, &mut incoming[..shown], outgoing).await;
                return Err(error.into());
            }
        }
    }
}

/// Reads until one more record is there; returns the end of it.
async fn feed<IO: AsyncRead + Unpin>(
    io: &mut IO,
    incoming: &mut Vec<u8>,
    shown: usize,
) -> Result<usize, TlsError> {
    loop {
        if let Some(&[kind, major, _, high, low]) = incoming[shown..].first_chunk::<HEADER_LEN>() {
            let len = usize::from(u16::from_be_bytes([high, low]));
            // rustls refuses such a header by itself: let it do so at once, and not when as
            // many bytes have come as a stranger's "length" announces.
            let senseless = !(CHANGE_CIPHER_SPEC..=APPLICATION_DATA).contains(&kind)
                || major != 3
                || len > MAX_LEGACY_PAYLOAD;
            if senseless {
                return Ok(incoming.len());
            }
            let end = shown + HEADER_LEN + len;
            if end <= incoming.len() {
                return Ok(end);
            }
        }
        if incoming.len() >= MAX_INCOMING {
            return Err(TlsError::TooLarge {
                limit: MAX_INCOMING,
            });
        }
        if incoming.len() == incoming.capacity() {
            incoming.reserve(READ_STEP);
        }
        if io.read_buf(incoming).await? == 0 {
            return Err(TlsError::Closed);
        }
    }
}

fn encode<Data>(mut encoder: EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    let start = outgoing.len();
    let needed = match encoder.encode(&mut []) {
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        Ok(_) => return Ok(()),
        Err(EncodeError::AlreadyEncoded) => return Err(encode_failed()),
    };
    outgoing.resize(start + needed, 0);
    let written = encoder
        .encode(&mut outgoing[start..])
        .map_err(|_| encode_failed())?;
    outgoing.truncate(start + written);
    Ok(())
}

fn encode_failed() -> Error {
    Error::General("a handshake record could not be encoded".into())
}

/// Sends what rustls still wants to say after an error, above all the alert. Best effort: the
/// error itself is what counts.
async fn send_alert<IO, S>(io: &mut IO, side: &mut S, shown: &mut [u8], mut outgoing: Vec<u8>)
where
    IO: AsyncWrite + Unpin,
    S: Side,
{
    // While something waits to be sent, rustls hands it out and looks at nothing else. One call
    // more would look at the offending bytes again, which it is not made for.
    while side.common().wants_write() {
        match side.process(shown).state {
            Ok(ConnectionState::EncodeTlsData(encoder)) => {
                if encode(encoder, &mut outgoing).is_err() {
                    break;
                }
            }
            _ => break,
        }
    }
    if io.write_all(&outgoing).await.is_ok() {
        let _ = io.shutdown().await;
    }
}

/// Client or server, as far as the handshake differs.
trait Side {
    type Data;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn common(&self) -> &CommonState;

    fn into_keys(self) -> Result<(ExtractedSecrets, KeySchedule), Error>;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, KeySchedule), Error> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, KeySchedule::Client(Box::new(kernel))))
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, KeySchedule), Error> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, KeySchedule::Server(Box::new(kernel))))
    }
}
