//! What a client speaks, by its first bytes.

/// As many bytes decide any case: the preface of HTTP/2.
pub const ENOUGH: usize = 24;
/// RFC 9113 3.4.
pub const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
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
    let common = bytes.len().min(HTTP2_PREFACE.len());
    if bytes[..common] == HTTP2_PREFACE[..common] {
        return (common == HTTP2_PREFACE.len()).then_some(Spoken::Http2);
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
