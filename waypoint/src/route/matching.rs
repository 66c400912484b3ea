//! One match of a rule: whether it holds for a request, and how it ranks among others.

use std::cmp::Reverse;
use std::sync::Arc;

use http::Method;
use http::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use regex::bytes::Regex;

use super::claims::Claims;
use super::query;
use super::rule::RouteId;
use super::text::TextMatch;

/// What matching sees of a request.
#[derive(Clone, Copy)]
pub struct RequestView<'a> {
    /// The method.
    pub method: &'a Method,
    /// `:authority` or Host, as sent. Read only by matches on the header `host`.
    pub authority: &'a str,
    /// The path, normalised, without query.
    pub path: &'a str,
    /// What stands behind `?`.
    pub query: Option<&'a str>,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The verified JWT's claims.
    pub claims: &'a dyn Claims,
    /// The content type is `application/grpc...`: says how a request that nothing matches has
    /// to be answered ([`super::Lookup::NoMatch`]).
    pub is_grpc: bool,
}

/// What a match says about the path, for filters that replace the matched prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatchedPath {
    /// The whole path was matched, by text or by pattern.
    Whole,
    /// So many bytes from the beginning; the rest begins with `/` or is empty.
    Prefix(usize),
}

/// `HTTPRouteMatch` or `GRPCRouteMatch`: all conditions hold.
#[derive(Debug, Clone)]
pub(super) struct RequestMatch {
    pub(super) path: PathMatch,
    pub(super) method: Option<Method>,
    pub(super) headers: Box<[HeaderMatch]>,
    pub(super) query: Box<[QueryMatch]>,
    pub(super) claims: Box<[ClaimMatch]>,
    /// A condition could not be understood: what the others let through is answered with 500.
    pub(super) invalid: Option<Arc<str>>,
}

#[derive(Debug, Clone)]
pub(super) enum PathMatch {
    /// Whole segments; without a slash at the end, so empty for everything.
    Prefix(Box<str>),
    Exact(Box<str>),
    Regex {
        regex: Regex,
        /// Characters of the pattern as written.
        length: usize,
        /// What every match begins with.
        literal: Box<str>,
    },
    /// A pattern that could not be understood; `literal` as above.
    InvalidRegex {
        length: usize,
        literal: Box<str>,
    },
    /// `/service/method`.
    Grpc {
        service: Option<NamePattern>,
        method: Option<NamePattern>,
    },
}

/// A gRPC service or method.
#[derive(Debug, Clone)]
pub(super) enum NamePattern {
    Exact(Box<str>),
    Regex { regex: Regex, length: usize },
    Invalid { length: usize },
}

#[derive(Debug, Clone)]
pub(super) struct HeaderMatch {
    pub(super) source: HeaderSource,
    pub(super) test: TextMatch,
    pub(super) invert: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum HeaderSource {
    Header(HeaderName),
    /// `host` or `:authority`: HTTP/2 has no Host header.
    Authority,
    /// The name could not be understood.
    Invalid,
}

#[derive(Debug, Clone)]
pub(super) struct QueryMatch {
    pub(super) name: Box<str>,
    pub(super) test: TextMatch,
    pub(super) invert: bool,
}

#[derive(Debug, Clone)]
pub(super) struct ClaimMatch {
    /// Empty: could not be understood.
    pub(super) path: Box<[Box<str>]>,
    pub(super) test: TextMatch,
    pub(super) invert: bool,
}

impl RequestMatch {
    /// `matches` that is absent: everything.
    pub(super) fn everything(path: PathMatch) -> Self {
        Self {
            path,
            method: None,
            headers: Box::new([]),
            query: Box::new([]),
            claims: Box::new([]),
            invalid: None,
        }
    }

    pub(super) fn matches(&self, request: &RequestView<'_>) -> bool {
        self.method.as_ref().is_none_or(|m| m == request.method)
            && self.path.matches(request.path)
            && self.headers.iter().all(|header| header.matches(request))
            && self.query.iter().all(|param| param.matches(request.query))
            && self
                .claims
                .iter()
                .all(|claim| claim.matches(request.claims))
    }
}

impl PathMatch {
    pub(super) fn matches(&self, path: &str) -> bool {
        match self {
            Self::Prefix(prefix) => is_prefix(prefix, path),
            Self::Exact(exact) => **exact == *path,
            Self::Regex { regex, .. } => regex.is_match(path.as_bytes()),
            Self::InvalidRegex { literal, .. } => path.starts_with(&**literal),
            Self::Grpc {
                service: None,
                method: None,
            } => true,
            Self::Grpc { service, method } => grpc_names(path).is_some_and(|(s, m)| {
                service.as_ref().is_none_or(|pattern| pattern.matches(s))
                    && method.as_ref().is_none_or(|pattern| pattern.matches(m))
            }),
        }
    }

    /// What matched of a path for which [`Self::matches`].
    pub(super) fn matched(&self) -> MatchedPath {
        match self {
            Self::Prefix(prefix) => MatchedPath::Prefix(prefix.len()),
            _ => MatchedPath::Whole,
        }
    }
}

/// Gateway API PathPrefix: split by `/`, element by element, case matters, a trailing slash of
/// the prefix is ignored. `prefix` has none any more.
fn is_prefix(prefix: &str, path: &str) -> bool {
    match path.strip_prefix(prefix) {
        Some(rest) => prefix.is_empty() || rest.is_empty() || rest.starts_with('/'),
        None => false,
    }
}

/// Service and method of a gRPC path.
pub(super) fn grpc_names(path: &str) -> Option<(&str, &str)> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    (!method.contains('/')).then_some((service, method))
}

impl NamePattern {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *name,
            Self::Regex { regex, .. } => regex.is_match(name.as_bytes()),
            Self::Invalid { .. } => true,
        }
    }
}

impl HeaderMatch {
    fn matches(&self, request: &RequestView<'_>) -> bool {
        let holds = match &self.source {
            HeaderSource::Invalid => return true,
            HeaderSource::Authority => {
                let authority = authority(request);
                !authority.is_empty() && self.test.matches(authority)
            }
            HeaderSource::Header(name) => lines_match(request.headers, name, &self.test),
        };
        // What is not understood holds, inverted or not.
        holds != self.invert || matches!(self.test, TextMatch::Invalid)
    }
}

/// What matches on the header `host` see.
pub(super) fn authority<'a>(request: &RequestView<'a>) -> &'a [u8] {
    if !request.authority.is_empty() {
        return request.authority.as_bytes();
    }
    request.headers.get(HOST).map_or(b"", HeaderValue::as_bytes)
}

/// A header on several lines has one value, the lines joined by commas (RFC 9110 5.3).
fn lines_match(headers: &HeaderMap, name: &HeaderName, test: &TextMatch) -> bool {
    let mut lines = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let (Some(first), second) = (lines.next(), lines.next()) else {
        return false;
    };
    let Some(second) = second else {
        return test.matches(first);
    };
    let lines = [first, second].into_iter().chain(lines);
    match test {
        TextMatch::Present | TextMatch::Invalid => true,
        TextMatch::Exact(text) => joined(lines).eq(text.bytes()),
        TextMatch::Prefix(text) => {
            let mut bytes = joined(lines);
            text.bytes().all(|byte| bytes.next() == Some(byte))
        }
        // Rare enough for memory of its own.
        test => test.matches(&joined(lines).collect::<Vec<u8>>()),
    }
}

fn joined<'a>(lines: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = u8> {
    let commas = lines.enumerate().flat_map(|(index, line)| {
        let comma = if index == 0 { &b""[..] } else { &b","[..] };
        comma.iter().chain(line)
    });
    commas.copied()
}

impl QueryMatch {
    fn matches(&self, query: Option<&str>) -> bool {
        let value = query.and_then(|query| query::first(query, &self.name));
        let holds = value.is_some_and(|value| query::decoded_matches(value, &self.test));
        holds != self.invert || matches!(self.test, TextMatch::Invalid)
    }
}

impl ClaimMatch {
    fn matches(&self, claims: &dyn Claims) -> bool {
        if self.path.is_empty() || matches!(self.test, TextMatch::Invalid) {
            return true;
        }
        claims.any(&self.path, &mut |value| self.test.matches(value.as_bytes())) != self.invert
    }
}

/// How a match ranks: the greater goes first (Gateway API HTTPRouteRule.matches and
/// GRPCRouteRule.matches). It depends on the configuration alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Summary<'r> {
    path: PathRank,
    method: bool,
    /// Claims count as headers: that is how Istio writes them.
    headers: usize,
    query: usize,
    older: Reverse<i64>,
    name: Reverse<&'r RouteId>,
    rule: Reverse<usize>,
    alternative: Reverse<usize>,
}

/// Where a match comes from, for ties.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing<'r> {
    /// Microseconds since 1970; what is not known is younger than everything that is.
    pub(super) created: i64,
    pub(super) route: &'r RouteId,
    pub(super) rule: usize,
    pub(super) alternative: usize,
}

/// Gateway API leaves the rank of regular expressions open. Here they stand between exact
/// paths and prefixes, as in Envoy Gateway: otherwise a catch-all `/` would hide every one.
/// Among several the longest pattern wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum PathRank {
    Prefix(usize),
    Regex(usize),
    Exact,
    /// "Characters in a matching service", then "in a matching method".
    Grpc(NameRank, NameRank),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum NameRank {
    Any,
    Regex(usize),
    Exact(usize),
}

impl<'r> Summary<'r> {
    pub(super) fn new(of: &RequestMatch, standing: Standing<'r>) -> Self {
        Self {
            path: PathRank::of(&of.path),
            method: of.method.is_some(),
            headers: of.headers.len() + of.claims.len(),
            query: of.query.len(),
            older: Reverse(match standing.created {
                0 => i64::MAX,
                created => created,
            }),
            name: Reverse(standing.route),
            rule: Reverse(standing.rule),
            alternative: Reverse(standing.alternative),
        }
    }
}

impl PathRank {
    fn of(path: &PathMatch) -> Self {
        match path {
            PathMatch::Prefix(prefix) => Self::Prefix(prefix.chars().count()),
            PathMatch::Regex { length, .. } | PathMatch::InvalidRegex { length, .. } => {
                Self::Regex(*length)
            }
            PathMatch::Exact(_) => Self::Exact,
            PathMatch::Grpc { service, method } => Self::Grpc(
                NameRank::of(service.as_ref()),
                NameRank::of(method.as_ref()),
            ),
        }
    }
}

impl NameRank {
    fn of(pattern: Option<&NamePattern>) -> Self {
        match pattern {
            None => Self::Any,
            Some(NamePattern::Exact(text)) => Self::Exact(text.chars().count()),
            Some(NamePattern::Regex { length, .. } | NamePattern::Invalid { length }) => {
                Self::Regex(*length)
            }
        }
    }
}
