//! The path of a request, made unambiguous before anything looks at it.
//!
//! [`normalize`] is the only source of a [`NormalizedPath`]; routes and policies read it
//! and the request goes upstream with it, so that what was judged is what is served.
//! Modes are those of Istio's `pathNormalization`; Envoy's counterparts are
//! `normalize_path`, `merge_slashes` and `path_with_escaped_slashes_action`.
//!
//! Stricter than Envoy: a path that servers are known to disagree about in a way that no
//! rule can express (NUL, a broken escape, an overlong UTF-8 sequence) is refused, and
//! what stays ambiguous after normalisation has a second reading that policies judge too.

use std::borrow::Cow;

/// How far paths are normalised (MeshConfig `pathNormalization.normalization`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum PathNormalization {
    /// As it came.
    None,
    /// RFC 3986 6.2.2: dot segments removed, unreserved characters unescaped; and `\` is
    /// `/`. Istio's default.
    #[default]
    Base,
    /// And runs of slashes are one.
    MergeSlashes,
    /// And `%2f` and `%5c` are slashes.
    DecodeAndMergeSlashes,
}

/// Why a path is refused with 400.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Rejected {
    /// Neither starts with `/` nor is `*` (RFC 9112 3.2).
    #[error("the path does not start with a slash")]
    NotAbsolute,
    /// `?` or `#`: not a path alone. A fragment is never sent (RFC 9110 7.1).
    #[error("the path holds a query or a fragment")]
    NotOnlyPath,
    /// `%` without two hexadecimal digits.
    #[error("the path has a broken percent escape")]
    BrokenEscape,
    /// A control character, plain or escaped; NUL ends the path for some servers.
    #[error("the path has a control character")]
    ControlCharacter,
    /// An overlong UTF-8 sequence, which some decoders take for `/` or `.` (RFC 3629 10).
    #[error("the path has an overlong UTF-8 sequence")]
    OverlongUtf8,
}

/// A path after [`normalize`]: what is matched, and what is sent upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NormalizedPath<'a> {
    path: Cow<'a, str>,
    /// What the most generous server would make of it, where that differs.
    other_reading: Option<Box<[u8]>>,
}

impl NormalizedPath<'_> {
    /// The path to match and to send.
    pub fn as_str(&self) -> &str {
        &self.path
    }

    /// Whether it has to be written into the request because it is not what came.
    pub fn is_changed(&self) -> bool {
        matches!(self.path, Cow::Owned(_))
    }

    /// The path as a server reads it that decodes every escape, drops parameters (`;x`),
    /// takes `\` for `/` and merges slashes; `None` where that changes nothing, or under
    /// [`PathNormalization::None`].
    pub fn other_reading(&self) -> Option<&[u8]> {
        self.other_reading.as_deref()
    }

    /// The same, owned.
    pub fn into_owned(self) -> NormalizedPath<'static> {
        NormalizedPath {
            path: Cow::Owned(self.path.into_owned()),
            other_reading: self.other_reading,
        }
    }
}

impl AsRef<str> for NormalizedPath<'_> {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

/// Normalises the path component of a request target, without its query. Allocates only
/// when something changes or is ambiguous.
///
/// # Errors
/// [`Rejected`]: the request is to be answered with 400.
pub fn normalize(raw: &str, mode: PathNormalization) -> Result<NormalizedPath<'_>, Rejected> {
    let plain = |path| NormalizedPath {
        path,
        other_reading: None,
    };
    match raw.as_bytes() {
        [] => return Ok(plain(Cow::Borrowed("/"))),
        // OPTIONS * (RFC 9112 3.2.4).
        [b'*'] => return Ok(plain(Cow::Borrowed(raw))),
        [b'/', ..] => {}
        [b'\\', ..] if mode != PathNormalization::None => {}
        _ => return Err(Rejected::NotAbsolute),
    }
    let seen = Seen::scan(raw.as_bytes());
    if seen.delimiter {
        return Err(Rejected::NotOnlyPath);
    }
    if mode == PathNormalization::None {
        return Ok(plain(Cow::Borrowed(raw)));
    }
    if seen.control {
        return Err(Rejected::ControlCharacter);
    }
    let merge = mode >= PathNormalization::MergeSlashes;
    let mut path = Cow::Borrowed(raw);
    if seen.escape || seen.backslash {
        check_escapes(raw.as_bytes())?;
        let decoded = decode_safe(raw, mode == PathNormalization::DecodeAndMergeSlashes);
        if decoded != raw {
            path = Cow::Owned(decoded);
        }
    }
    if has_dot_segment(path.as_bytes()) {
        path = Cow::Owned(without_dot_segments(&path));
    }
    if merge && path.contains("//") {
        path = Cow::Owned(merged(&path));
    }
    let other_reading = is_ambiguous(path.as_bytes())
        .then(|| generous(path.as_bytes(), true))
        .filter(|other| **other != *path.as_bytes())
        .map(Vec::into_boxed_slice);
    Ok(NormalizedPath {
        path,
        other_reading,
    })
}

impl PartialOrd for PathNormalization {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for PathNormalization {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (*self as u8).cmp(&(*other as u8))
    }
}

/// What one look over a path has found.
#[derive(Default)]
struct Seen {
    escape: bool,
    backslash: bool,
    control: bool,
    delimiter: bool,
}

impl Seen {
    fn scan(path: &[u8]) -> Self {
        let mut seen = Self::default();
        for byte in path {
            match byte {
                b'%' => seen.escape = true,
                b'\\' => seen.backslash = true,
                b'?' | b'#' => seen.delimiter = true,
                0..=0x1f | 0x7f => seen.control = true,
                _ => {}
            }
        }
        seen
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|d| u8::try_from(d).ok())
}

/// The byte that the escape at the start of `rest` stands for.
fn escaped(rest: &[u8]) -> Option<u8> {
    match rest {
        [b'%', high, low, ..] => Some(hex(*high)? << 4 | hex(*low)?),
        _ => None,
    }
}

/// Every byte of `path` with escapes decoded once; a broken escape stands for itself.
fn decoded(path: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = path.get(at..).filter(|rest| !rest.is_empty())?;
        let (byte, length) = match escaped(rest) {
            Some(byte) => (byte, 3),
            None => (rest[0], 1),
        };
        at += length;
        Some(byte)
    })
}

fn check_escapes(path: &[u8]) -> Result<(), Rejected> {
    let broken = |(at, byte): (usize, &u8)| *byte == b'%' && escaped(&path[at..]).is_none();
    if path.iter().enumerate().any(broken) {
        return Err(Rejected::BrokenEscape);
    }
    let mut previous = 0;
    for byte in decoded(path) {
        if byte < 0x20 || byte == 0x7f {
            return Err(Rejected::ControlCharacter);
        }
        let overlong = match previous {
            0xc0 | 0xc1 => (0x80..=0xbf).contains(&byte),
            0xe0 => (0x80..=0x9f).contains(&byte),
            0xf0 => (0x80..=0x8f).contains(&byte),
            _ => false,
        };
        if overlong {
            return Err(Rejected::OverlongUtf8);
        }
        previous = byte;
    }
    Ok(())
}

/// Unescapes what means the same unescaped (RFC 3986 6.2.2.2), and `\`.
fn decode_safe(path: &str, slashes: bool) -> String {
    let bytes = path.as_bytes();
    let mut out = String::with_capacity(path.len());
    let mut kept = 0;
    let mut at = 0;
    while at < bytes.len() {
        let (replacement, length) = match bytes[at] {
            b'\\' => (Some('/'), 1),
            b'%' => match escaped(&bytes[at..]) {
                Some(b'/' | b'\\') if slashes => (Some('/'), 3),
                Some(byte)
                    if byte.is_ascii_alphanumeric()
                        || matches!(byte, b'-' | b'.' | b'_' | b'~') =>
                {
                    (Some(char::from(byte)), 3)
                }
                _ => (None, 1),
            },
            _ => (None, 1),
        };
        if let Some(replacement) = replacement {
            out.push_str(&path[kept..at]);
            out.push(replacement);
            kept = at + length;
        }
        at += length;
    }
    out.push_str(&path[kept..]);
    out
}

fn has_dot_segment(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/')
        .any(|segment| matches!(segment, b"." | b".."))
}

/// RFC 3986 5.2.4. An empty segment counts as one, so that only merging removes it.
fn without_dot_segments(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." => {}
            ".." => out.truncate(out.rfind('/').unwrap_or(0)),
            segment => {
                out.push('/');
                out.push_str(segment);
                continue;
            }
        }
        if last {
            out.push('/');
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    out
}

fn merged(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !out.ends_with('/') {
            out.push(character);
        }
    }
    out
}

fn is_ambiguous(path: &[u8]) -> bool {
    path.iter().any(|byte| matches!(byte, b'%' | b';')) || path.windows(2).any(|two| two == b"//")
}

/// The path as the most generous server reads it. With `parameters` also without them.
pub(super) fn generous(path: &[u8], parameters: bool) -> Vec<u8> {
    let text: Vec<u8> = decoded(path)
        .map(|byte| if byte == b'\\' { b'/' } else { byte })
        .collect();
    let mut out = Vec::with_capacity(text.len());
    let mut segments = text.split(|byte| *byte == b'/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        let end = segment.iter().position(|byte| *byte == b';' && parameters);
        let plain = &segment[..end.unwrap_or(segment.len())];
        match plain {
            b"" | b"." => {}
            b".." => {
                let parent = out.iter().rposition(|byte| *byte == b'/');
                out.truncate(parent.unwrap_or(0));
            }
            plain => {
                out.push(b'/');
                out.extend_from_slice(plain);
                continue;
            }
        }
        if last {
            out.push(b'/');
        }
    }
    if out.is_empty() {
        out.push(b'/');
    }
    out
}

/// Like [`generous`] for a piece of a path that a policy names: nothing is resolved that
/// its surroundings could change.
pub(super) fn generous_piece(piece: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(piece.len());
    for byte in decoded(piece.as_bytes()) {
        let byte = if byte == b'\\' { b'/' } else { byte };
        if byte != b'/' || out.last() != Some(&b'/') {
            out.push(byte);
        }
    }
    out
}
