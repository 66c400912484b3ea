//! What a client speaks on a port that does not say: looked at in the first bytes. A client
//! that says nothing for a moment waits for its server to speak first, and so is no HTTP
//! client (SMTP, MySQL, FTP).

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::timeout;

use super::http::HEADER_DEADLINE;
use super::io::Io;

/// How long a client may be silent before it counts as waiting for the server.
pub const SILENCE: Duration = Duration::from_millis(200);
/// As many bytes decide any case: the preface of HTTP/2.
const ENOUGH: usize = 24;
/// RFC 9113 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest method that is believed to be one.
const MAX_METHOD: usize = 20;

/// What the first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoken {
    /// HTTP/1.
    Http1,
    /// HTTP/2, without TLS.
    Http2,
    /// A ClientHello.
    Tls,
    /// Something else, or nothing.
    Other,
}

/// Judges the first bytes; `None`: more are needed.
pub fn judge(bytes: &[u8]) -> Option<Spoken> {
    if bytes.is_empty() {
        return None;
    }
    let common = bytes.len().min(PREFACE.len());
    if bytes[..common] == PREFACE[..common] {
        return (common == PREFACE.len()).then_some(Spoken::Http2);
    }
    // A handshake record of TLS 1.0 or later (RFC 8446 5.1).
    if bytes[0] == 0x16 {
        return match bytes.get(1) {
            None => None,
            Some(3) => Some(Spoken::Tls),
            Some(_) => Some(Spoken::Other),
        };
    }
    // RFC 9112 3: method SP request-target. Before the request line there may be CRLF (2.2).
    let line = bytes.trim_ascii_start();
    let method = line.iter().position(|b| !is_method(*b));
    match method {
        None if line.len() > MAX_METHOD => Some(Spoken::Other),
        None => None,
        Some(at) if at == 0 || at > MAX_METHOD || line[at] != b' ' => Some(Spoken::Other),
        Some(at) => match line.get(at + 1) {
            None => None,
            // origin-form, asterisk-form, absolute-form; authority-form of CONNECT.
            Some(b'/' | b'*' | b'h' | b'H') => Some(Spoken::Http1),
            Some(_) if &line[..at] == b"CONNECT" => Some(Spoken::Http1),
            Some(_) => Some(Spoken::Other),
        },
    }
}

fn is_method(byte: u8) -> bool {
    byte.is_ascii_uppercase() || matches!(byte, b'-' | b'_')
}

/// Looks at what comes first, which stays unread.
///
/// # Errors
/// Those of the stream.
pub async fn sniff(io: &mut Io) -> io::Result<Spoken> {
    let looking = poll_fn(|cx| poll_judge(io, cx));
    match timeout(SILENCE, looking).await {
        Ok(judged) => judged,
        Err(_) => Ok(judge(io.peeked()).unwrap_or(Spoken::Other)),
    }
}

/// Waits for the first bytes of what is declared to be HTTP and says which version it is.
///
/// # Errors
/// Those of the stream; at its end without a byte, `UnexpectedEof`.
pub async fn http_version(io: &mut Io, deadline: Duration) -> io::Result<Spoken> {
    let first = poll_fn(|cx| {
        if !io.peeked().is_empty() {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(match ready!(io.poll_peek(cx)) {
            Ok([]) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        })
    });
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    timeout(deadline, first).await.map_err(late)??;
    let looking = poll_fn(|cx| {
        loop {
            let seen = io.peeked().len();
            let common = seen.min(PREFACE.len());
            if seen > 0 && (common == PREFACE.len() || io.peeked()[..common] != PREFACE[..common]) {
                let http2 = io.peeked()[..common] == *PREFACE;
                return Poll::Ready(Ok(if http2 { Spoken::Http2 } else { Spoken::Http1 }));
            }
            match io.poll_peek(cx) {
                Poll::Ready(Ok(bytes)) if bytes.len() == seen => {
                    return Poll::Ready(Ok(Spoken::Http1));
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    // Whoever has begun HTTP/2's preface has nothing to wait for.
    timeout(HEADER_DEADLINE, looking).await.map_err(late)?
}

fn poll_judge(io: &mut Io, cx: &mut Context<'_>) -> Poll<io::Result<Spoken>> {
    loop {
        let seen = io.peeked().len();
        if let Some(spoken) = judge(io.peeked()) {
            return Poll::Ready(Ok(spoken));
        }
        if seen > ENOUGH {
            return Poll::Ready(Ok(Spoken::Other));
        }
        match io.poll_peek(cx) {
            Poll::Ready(Ok(bytes)) if bytes.len() == seen => {
                return Poll::Ready(Ok(Spoken::Other));
            }
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell_the_protocol() {
        for (bytes, spoken) in [
            (&b""[..], None),
            (b"G", None),
            (b"GET", None),
            (b"GET ", None),
            (b"GET /", Some(Spoken::Http1)),
            (b"\r\nGET /", Some(Spoken::Http1)),
            (b"OPTIONS *", Some(Spoken::Http1)),
            (b"CONNECT a:1", Some(Spoken::Http1)),
            (b"GET http://a/", Some(Spoken::Http1)),
            (b"M-SEARCH *", Some(Spoken::Http1)),
            (b"PRI", None),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Some(Spoken::Http2)),
            (b"PRINT me", Some(Spoken::Other)),
            (b"\x16", None),
            (b"\x16\x03\x01", Some(Spoken::Tls)),
            (b"\x16\x07", Some(Spoken::Other)),
            (b"SSH-2.0-x", Some(Spoken::Other)),
            (b"EHLO mail", Some(Spoken::Other)),
            (b"get /", Some(Spoken::Other)),
            (b"\0\0\0", Some(Spoken::Other)),
            (b"AAAAAAAAAAAAAAAAAAAAAAAAAA", Some(Spoken::Other)),
        ] {
            assert_eq!(
                judge(bytes),
                spoken,
                "{:?}",
                bytes.escape_ascii().to_string()
            );
        }
    }
}
