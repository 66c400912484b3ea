//! The name of the server in a ClientHello (SNI, RFC 6066 3), of TLS that is not ours to open:
//! looked at, and left where it is.

use std::future::poll_fn;
use std::io::{self, Read as _};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::server::Acceptor;
use tokio::time::timeout;

use super::io::Io;

/// How long a client may take for its ClientHello.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Bytes that a ClientHello may have, with what its records add. With several post-quantum key
/// shares it has about 5 KiB.
const MAX_SIZE: usize = 32 << 10;
/// As much as is given to the parser at once.
const PIECE: u64 = 4096;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// What the client sends first is something else.
    #[error("no ClientHello: {0}")]
    Malformed(#[source] rustls::Error),
    /// It is longer than any that is sent.
    #[error("the ClientHello is longer than {MAX_SIZE} bytes")]
    TooLong,
    /// The client ended before it was complete.
    #[error("the connection ended before the ClientHello did")]
    Ended,
    /// It is not there in time.
    #[error("no ClientHello within {DEADLINE:?}")]
    Late,
    /// The stream failed.
    #[error(transparent)]
    Stream(#[from] io::Error),
}

/// Waits for the ClientHello, in however many pieces it comes, and says which server it names,
/// in small letters. It stays unread.
///
/// # Errors
/// [`HelloError`].
pub async fn server_name(io: &mut Io) -> Result<Option<Box<str>>, HelloError> {
    let mut hello = Hello::default();
    let reading = poll_fn(|cx| hello.poll(io, cx));
    timeout(DEADLINE, reading)
        .await
        .unwrap_or(Err(HelloError::Late))
}

/// What has been looked at.
#[derive(Default)]
struct Hello {
    acceptor: Acceptor,
    seen: usize,
}

impl Hello {
    fn poll(
        &mut self,
        io: &mut Io,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Box<str>>, HelloError>> {
        loop {
            let bytes = io.peeked();
            if let Some(name) = self.look(&bytes[self.seen..])? {
                return Poll::Ready(Ok(name));
            }
            let before = bytes.len();
            self.seen = before;
            if before > MAX_SIZE {
                return Poll::Ready(Err(HelloError::TooLong));
            }
            if ready!(io.poll_peek(cx))?.len() == before {
                return Poll::Ready(Err(HelloError::Ended));
            }
        }
    }

    /// Takes more of it; `None`: it is not complete.
    fn look(&mut self, mut more: &[u8]) -> Result<Option<Option<Box<str>>>, HelloError> {
        while !more.is_empty() {
            let mut part = more.take(PIECE);
            self.acceptor.read_tls(&mut part)?;
            // What is left of the limit was not read.
            let taken = (PIECE - part.limit()) as usize;
            match self.acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted
                        .client_hello()
                        .server_name()
                        .map(str::to_ascii_lowercase);
                    return Ok(Some(name.map(Into::into)));
                }
                Ok(None) if taken == 0 => return Err(HelloError::TooLong),
                Ok(None) => {}
                // The alert that goes with it is not sent: whom it is for speaks with somebody
                // else.
                Err((error, _)) => return Err(HelloError::Malformed(error)),
            }
            more = &more[taken..];
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    fn hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("written");
        bytes
    }

    /// One handshake message in records of `size` bytes (RFC 8446 5.1).
    fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in hello[5..].chunks(size) {
            bytes.extend_from_slice(&[0x16, 3, 1]);
            bytes.extend_from_slice(&(part.len() as u16).to_be_bytes());
            bytes.extend_from_slice(part);
        }
        bytes
    }

    #[test]
    fn the_name_is_found_however_the_hello_is_cut() {
        let named = hello("Web.Shop.example");
        let address = hello("10.0.0.1");
        for size in [1, 7, 100, 16_000] {
            for records in [16_000, 50] {
                for (whole, expected) in [(&named, Some("web.shop.example")), (&address, None)] {
                    let whole = in_records(whole, records);
                    let mut looking = Hello::default();
                    let mut found = None;
                    for part in whole.chunks(size) {
                        assert!(found.is_none(), "found before its end");
                        found = looking.look(part).expect("a ClientHello");
                    }
                    let found = found.expect("complete");
                    assert_eq!(found.as_deref(), expected, "{size} {records}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_hello_is_said_to_be_none() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"\x16\x03\x01\x00\x05\x02\0\0\x01\0",
            &[0; 64],
        ] {
            let found = Hello::default().look(bytes);
            assert!(matches!(found, Err(HelloError::Malformed(_))), "{found:?}");
        }
    }
}
