//! Where a token stands in a request, and taking it out of there.

use std::borrow::Cow;

use http::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Uri, request};
use percent_encoding::percent_decode_str;

/// A place where tokens are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Location {
    /// `Authorization: Bearer`; the word in any letter case (RFC 9110 11.1).
    Bearer,
    /// A header and what stands before the token in it.
    Header(HeaderName, Box<str>),
    /// A query parameter.
    Parameter(Box<str>),
    /// A cookie.
    Cookie(Box<str>),
}

impl Location {
    /// Where Istio looks unless a rule names places.
    pub(super) fn defaults() -> Vec<Self> {
        vec![Self::Bearer, Self::Parameter("access_token".into())]
    }

    /// The header that it is, or is in.
    pub(super) fn header(&self) -> Option<&HeaderName> {
        match self {
            Self::Bearer => Some(&AUTHORIZATION),
            Self::Header(name, _) => Some(name),
            Self::Parameter(_) => None,
            Self::Cookie(_) => Some(&COOKIE),
        }
    }

    /// Every token at this place.
    pub(super) fn tokens(&self, parts: &request::Parts) -> Vec<String> {
        match self {
            Self::Bearer => header(&parts.headers, &AUTHORIZATION, bearer),
            Self::Header(name, prefix) => header(&parts.headers, name, |text| {
                let token = text.strip_prefix(&**prefix)?.trim();
                (!token.is_empty()).then_some(token)
            }),
            Self::Parameter(name) => parameters(&parts.uri)
                .filter(|(own, _)| *own == **name)
                .map(|(_, value)| decoded(value).into_owned())
                .filter(|value| !value.is_empty())
                .collect(),
            Self::Cookie(name) => cookies(&parts.headers)
                .filter(|(own, value)| *own == name.as_bytes() && !value.is_empty())
                .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
                .collect(),
        }
    }

    /// Takes away what stands at this place, so that nobody behind sees it.
    pub(super) fn remove(&self, parts: &mut request::Parts) {
        match self {
            Self::Bearer => {
                parts.headers.remove(AUTHORIZATION);
            }
            Self::Header(name, _) => {
                parts.headers.remove(name);
            }
            Self::Parameter(name) => remove_parameter(&mut parts.uri, name),
            Self::Cookie(name) => remove_cookie(&mut parts.headers, name),
        }
    }
}

/// Bytes that are no text stay in the token, which is then no good: they must not hide it.
fn header(
    headers: &HeaderMap,
    name: &HeaderName,
    token: impl Fn(&str) -> Option<&str>,
) -> Vec<String> {
    let lines = headers.get_all(name).iter();
    lines
        .filter_map(|line| {
            let text = String::from_utf8_lossy(line.as_bytes());
            token(text.trim()).map(str::to_owned)
        })
        .collect()
}

fn bearer(text: &str) -> Option<&str> {
    let (scheme, token) = text.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

fn decoded(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

/// Names decoded, values as they stand.
fn parameters(uri: &Uri) -> impl Iterator<Item = (Cow<'_, str>, &str)> {
    let pairs = uri.query().unwrap_or_default().split('&');
    pairs.map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(name), value)
    })
}

fn remove_parameter(uri: &mut Uri, name: &str) {
    let Some(query) = uri.query() else { return };
    let named = |pair: &&str| {
        let own = pair.split_once('=').map_or(*pair, |(own, _)| own);
        decoded(own) == name
    };
    if !query.split('&').any(|pair| named(&pair)) {
        return;
    }
    let rest: Vec<&str> = query.split('&').filter(|pair| !named(pair)).collect();
    let target = match rest.as_slice() {
        [] => uri.path().to_owned(),
        rest => format!("{}?{}", uri.path(), rest.join("&")),
    };
    let mut parts = std::mem::take(uri).into_parts();
    // Pieces of a path and query are one again; failing that, nothing is left to leak.
    parts.path_and_query =
        Some(PathAndQuery::try_from(target).unwrap_or_else(|_| PathAndQuery::from_static("/")));
    *uri = Uri::from_parts(parts).unwrap_or_default();
}

/// Names and values, as bytes, of every cookie in every line.
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    let lines = headers.get_all(COOKIE).iter();
    lines
        .flat_map(|line| line.as_bytes().split(|byte| *byte == b';'))
        .filter_map(cookie)
}

fn cookie(pair: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = pair.iter().position(|byte| *byte == b'=')?;
    let value = pair[at + 1..].trim_ascii();
    let bare = value
        .strip_prefix(b"\"")
        .and_then(|v| v.strip_suffix(b"\""));
    Some((pair[..at].trim_ascii(), bare.unwrap_or(value)))
}

fn remove_cookie(headers: &mut HeaderMap, name: &str) {
    let lines: Vec<HeaderValue> = headers.get_all(COOKIE).iter().cloned().collect();
    headers.remove(COOKIE);
    for line in lines {
        let pairs = line.as_bytes().split(|byte| *byte == b';');
        let rest: Vec<&[u8]> = pairs
            .map(<[u8]>::trim_ascii)
            .filter(|pair| cookie(pair).is_none_or(|(own, _)| own != name.as_bytes()))
            .collect();
        // Pieces of a header value make one again.
        if let Ok(value) = HeaderValue::from_bytes(&rest.join(&b"; "[..]))
            && !value.is_empty()
        {
            headers.append(COOKIE, value);
        }
    }
}
