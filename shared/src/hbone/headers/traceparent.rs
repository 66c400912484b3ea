//! `traceparent` (W3C Trace Context 3.2): `00-<trace id>-<parent id>-<flags>`.

use http::HeaderValue;
use http::header::HeaderMap;

use super::{HeaderError, TRACEPARENT, excerpt, single};

/// Version 00 has exactly this many bytes; later versions may append.
const LEN: usize = 55;
const MAX_LEN: usize = 256;

/// The trace that a connection belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Traceparent {
    /// Not all zero.
    pub trace_id: [u8; 16],
    /// Not all zero.
    pub parent_id: [u8; 8],
    /// Bit 0: sampled. ztunnel always writes 00.
    pub flags: u8,
}

/// Why a `traceparent` is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceparentError {
    /// Wrong length or separators.
    #[error("\"{0}\" is not version-trace-parent-flags")]
    Form(String),
    /// Something is not lower-case hexadecimal.
    #[error("\"{0}\" is not lower-case hexadecimal")]
    Hex(String),
    /// Version ff.
    #[error("version ff is forbidden")]
    Version,
    /// The trace id or the parent id is zero.
    #[error("an id is zero")]
    Zero,
}

impl Traceparent {
    /// A fresh trace, not sampled.
    pub fn random() -> Self {
        use rand::Rng as _;
        let mut random = rand::rng();
        loop {
            let fresh = Self {
                trace_id: random.random(),
                parent_id: random.random(),
                flags: 0,
            };
            if fresh.trace_id != [0; 16] && fresh.parent_id != [0; 8] {
                return fresh;
            }
        }
    }

    /// The header value in version 00.
    pub fn to_header(self) -> HeaderValue {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut text = [b'-'; LEN];
        text[..2].copy_from_slice(b"00");
        let mut put = |at: usize, bytes: &[u8]| {
            for (i, byte) in bytes.iter().enumerate() {
                text[at + 2 * i] = HEX[usize::from(byte >> 4)];
                text[at + 2 * i + 1] = HEX[usize::from(byte & 15)];
            }
        };
        put(3, &self.trace_id);
        put(36, &self.parent_id);
        put(53, &[self.flags]);
        HeaderValue::from_bytes(&text)
            // Hexadecimal digits and hyphens.
            .unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    pub(super) fn from_headers(headers: &HeaderMap) -> Result<Option<Self>, HeaderError> {
        let Some(value) = single(headers, &TRACEPARENT)? else {
            return Ok(None);
        };
        Ok(Some(Self::parse(value)?))
    }

    /// Reads the value of a `traceparent` header. Of versions after 00 it reads the part that
    /// version 00 has, as the specification asks.
    ///
    /// # Errors
    /// When a receiver has to ignore it (W3C Trace Context 3.2.2).
    pub fn parse(header: &[u8]) -> Result<Self, TraceparentError> {
        let form = || TraceparentError::Form(excerpt(header));
        if header.len() < LEN || header.len() > MAX_LEN {
            return Err(form());
        }
        if [2, 35, 52].iter().any(|at| header[*at] != b'-') {
            return Err(form());
        }
        let hex = || TraceparentError::Hex(excerpt(header));
        let version = parse_hex::<1>(&header[..2]).ok_or_else(hex)?;
        match version {
            [0xff] => return Err(TraceparentError::Version),
            [0] if header.len() != LEN => return Err(form()),
            _ if header.get(LEN).is_some_and(|b| *b != b'-') => return Err(form()),
            _ => {}
        }
        let trace_id = parse_hex(&header[3..35]).ok_or_else(hex)?;
        let parent_id = parse_hex(&header[36..52]).ok_or_else(hex)?;
        let [flags] = parse_hex(&header[53..LEN]).ok_or_else(hex)?;
        if trace_id == [0; 16] || parent_id == [0; 8] {
            return Err(TraceparentError::Zero);
        }
        Ok(Self {
            trace_id,
            parent_id,
            flags,
        })
    }
}

fn parse_hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    let (pairs, rest) = text.as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}
