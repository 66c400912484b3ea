//! RequestHeaderModifier and ResponseHeaderModifier.

use http::header::{COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, SET_COOKIE};
use http::request;
use http::uri::Authority;

use super::rewrite::set_authority;

/// HTTPHeaderFilter. Removed first, then set, then added.
#[derive(Debug, Clone, Default)]
pub(in crate::route) struct HeaderModifier {
    pub(in crate::route) remove: Vec<HeaderName>,
    pub(in crate::route) set: Vec<(HeaderName, HeaderValue)>,
    pub(in crate::route) add: Vec<(HeaderName, HeaderValue)>,
    /// `set` of `host`: HTTP/2 carries it in the URL.
    pub(in crate::route) host: Option<Authority>,
}

impl HeaderModifier {
    pub(super) fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            add(headers, name, value);
        }
    }

    pub(super) fn apply_request(&self, request: &mut request::Parts) {
        self.apply(&mut request.headers);
        if let Some(host) = &self.host {
            // Cannot fail: the URL stays as it was but for a valid authority.
            let _ = set_authority(request, host);
        }
    }
}

/// "It appends to any existing values": on the same line, as the specification's example has it,
/// so that one line comes out. `Set-Cookie` cannot be joined (RFC 9110 5.3), and `Cookie` is
/// joined in its own way (RFC 6265 5.4).
fn add(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    let separator: &[u8] = match *name {
        SET_COOKIE => {
            headers.append(name.clone(), value.clone());
            return;
        }
        COOKIE => b"; ",
        _ => b",",
    };
    let lines = headers.get_all(name);
    let Some(before) = lines.iter().next_back().filter(|line| !line.is_empty()) else {
        headers.append(name.clone(), value.clone());
        return;
    };
    let mut joined = Vec::with_capacity(before.len() + separator.len() + value.len());
    joined.extend_from_slice(before.as_bytes());
    joined.extend_from_slice(separator);
    joined.extend_from_slice(value.as_bytes());
    // Both parts and the separator are valid values.
    let Ok(mut joined) = HeaderValue::from_bytes(&joined) else {
        return;
    };
    joined.set_sensitive(before.is_sensitive() || value.is_sensitive());
    match headers.entry(name.clone()) {
        http::header::Entry::Occupied(mut entry) => {
            if let Some(last) = entry.iter_mut().next_back() {
                *last = joined;
            }
        }
        http::header::Entry::Vacant(entry) => {
            entry.insert(joined);
        }
    }
}

/// Headers that frame a message or belong to one connection: changing them would let what the
/// next hop reads differ from what was sent here.
pub(in crate::route) fn is_framing(name: &HeaderName) -> bool {
    const FRAMING: [&str; 8] = [
        "connection",
        "content-length",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    FRAMING.contains(&name.as_str())
}

/// Whether the name is a request's host.
pub(in crate::route) fn is_host(name: &str) -> bool {
    name.eq_ignore_ascii_case(HOST.as_str()) || name.eq_ignore_ascii_case(":authority")
}
