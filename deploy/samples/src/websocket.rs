//! WebSocket (RFC 6455): an echo server behind any path, a client, and the frames of
//! both. Any other protocol of an `Upgrade` is taken as raw bytes, which come back.

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::answer::{Body, Server, full};

/// Longest frame.
const MAX_FRAME: u64 = 1 << 20;
/// RFC 6455 1.3.
const MAGIC: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

pub(crate) const TEXT: u8 = 0x1;
pub(crate) const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;
const FIN: u8 = 0x80;

/// A frame, unmasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    /// With the FIN bit.
    head: u8,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    pub(crate) fn new(opcode: u8, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            head: FIN | opcode,
            payload: payload.into(),
        }
    }

    pub(crate) fn opcode(&self) -> u8 {
        self.head & 0xf
    }

    /// Reads the next frame; `None` at the end of the stream.
    pub(crate) async fn read<R: AsyncRead + Unpin>(from: &mut R) -> std::io::Result<Option<Self>> {
        let mut head = [0; 2];
        if from.read(&mut head[..1]).await? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut head[1..]).await?;
        let length = match head[1] & 0x7f {
            126 => u64::from(from.read_u16().await?),
            127 => from.read_u64().await?,
            short => u64::from(short),
        };
        if length > MAX_FRAME {
            return Err(std::io::Error::other("a frame is too long"));
        }
        let mut mask = [0; 4];
        if head[1] & 0x80 != 0 {
            from.read_exact(&mut mask).await?;
        }
        // Bounded above.
        let mut payload = vec![0; length as usize];
        from.read_exact(&mut payload).await?;
        apply(mask, &mut payload);
        Ok(Some(Self {
            head: head[0],
            payload,
        }))
    }

    /// Writes the frame; a client masks (RFC 6455 5.1).
    pub(crate) async fn write<W: AsyncWrite + Unpin>(
        &self,
        to: &mut W,
        mask: Option<[u8; 4]>,
    ) -> std::io::Result<()> {
        let bit = if mask.is_some() { 0x80 } else { 0 };
        let mut bytes = vec![self.head];
        match self.payload.len() {
            short @ 0..=125 => bytes.push(bit | short as u8),
            long @ 126..=0xffff => {
                bytes.push(bit | 126);
                bytes.extend_from_slice(&(long as u16).to_be_bytes());
            }
            huge => {
                bytes.push(bit | 127);
                bytes.extend_from_slice(&(huge as u64).to_be_bytes());
            }
        }
        bytes.extend_from_slice(&mask.unwrap_or_default()[..if mask.is_some() { 4 } else { 0 }]);
        let begin = bytes.len();
        bytes.extend_from_slice(&self.payload);
        apply(mask.unwrap_or_default(), &mut bytes[begin..]);
        to.write_all(&bytes).await?;
        to.flush().await
    }
}

fn apply(mask: [u8; 4], payload: &mut [u8]) {
    for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// `Sec-WebSocket-Accept` for a key.
pub(crate) fn accept(key: &str) -> String {
    let text = format!("{key}{MAGIC}");
    STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes()))
}

/// Whether another protocol is asked for. HTTP/2 comes with prior knowledge only.
pub(crate) fn is_upgrade(headers: &HeaderMap) -> bool {
    let protocol = headers.get(header::UPGRADE);
    protocol.is_some_and(|protocol| !protocol.as_bytes().eq_ignore_ascii_case(b"h2c"))
}

/// Takes a request with `Upgrade`.
pub(crate) fn upgrade(server: &Server, request: Request<Incoming>) -> Response<Body> {
    let protocol = request.headers()[header::UPGRADE].clone();
    let websocket = protocol.as_bytes().eq_ignore_ascii_case(b"websocket");
    let key = request.headers().get(header::SEC_WEBSOCKET_KEY);
    let accepted = key.and_then(|key| key.to_str().ok()).map(accept);
    let accepted = accepted.and_then(|text| HeaderValue::from_str(&text).ok());
    if websocket && accepted.is_none() {
        let text = Bytes::from_static(b"Sec-WebSocket-Key is missing\n");
        return server.respond(StatusCode::BAD_REQUEST, full(text));
    }
    tokio::task::spawn_local(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else {
            return;
        };
        let mut io = TokioIo::new(upgraded);
        // A client that goes away is no news.
        let _ = match websocket {
            true => echo(&mut io).await,
            false => echo_bytes(&mut io).await,
        };
    });
    let mut response = server.respond(StatusCode::SWITCHING_PROTOCOLS, full(Bytes::new()));
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol);
    if let Some(accepted) = accepted.filter(|_| websocket) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accepted);
    }
    response
}

async fn echo<S: AsyncRead + AsyncWrite + Unpin>(io: &mut S) -> std::io::Result<()> {
    while let Some(frame) = Frame::read(io).await? {
        let answer = match frame.opcode() {
            PING => Frame::new(PONG, frame.payload),
            PONG => continue,
            _ => frame,
        };
        answer.write(io, None).await?;
        if answer.opcode() == CLOSE {
            break;
        }
    }
    io.shutdown().await
}

async fn echo_bytes<S: AsyncRead + AsyncWrite + Unpin>(io: &mut S) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = io.read(&mut buffer).await?;
        if read == 0 {
            return io.shutdown().await;
        }
        io.write_all(&buffer[..read]).await?;
        io.flush().await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_specification() {
        // RFC 6455 1.3.
        assert_eq!(
            accept("dGhlIHNhbXBsZSBub25jZQ=="),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
    }

    #[tokio::test]
    async fn frames_of_every_length_come_back() -> std::io::Result<()> {
        for length in [0, 1, 125, 126, 65_535, 65_536] {
            for mask in [None, Some([1, 2, 3, 4])] {
                let frame = Frame::new(TEXT, vec![b'x'; length]);
                let mut bytes = Vec::new();
                frame.write(&mut bytes, mask).await?;
                let read = Frame::read(&mut bytes.as_slice()).await?;
                assert_eq!(read, Some(frame), "{length} {mask:?}");
            }
        }
        assert_eq!(Frame::read(&mut &b""[..]).await?, None);
        assert!(
            Frame::read(&mut &b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff"[..])
                .await
                .is_err()
        );
        Ok(())
    }
}
