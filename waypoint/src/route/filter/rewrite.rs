//! URLRewrite, and the change of a path that it shares with redirects.

use std::borrow::Cow;

use http::header::{HOST, HeaderValue};
use http::request;
use http::uri::{Authority, PathAndQuery, Uri};

use super::super::matching::MatchedPath;

/// HTTPURLRewriteFilter.
#[derive(Debug, Clone, Default)]
pub(in crate::route) struct Rewrite {
    pub(in crate::route) host: Option<Authority>,
    pub(in crate::route) path: Option<PathModifier>,
}

/// HTTPPathModifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::route) enum PathModifier {
    /// Begins with a slash.
    Full(Box<str>),
    /// Begins with a slash or is empty; has none at its end.
    Prefix(Box<str>),
}

/// A request that cannot be rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RewriteError {
    /// the rewritten URL is not valid
    #[error("the rewritten URL is not valid")]
    Url,
}

impl PathModifier {
    /// The path after the change. A prefix is replaced by the table of
    /// HTTPPathModifier.replacePrefixMatch; where the whole path was matched it is the prefix.
    pub(super) fn apply<'a>(&'a self, path: &'a str, matched: MatchedPath) -> Cow<'a, str> {
        match self {
            Self::Full(full) => Cow::Borrowed(full),
            Self::Prefix(replacement) => {
                let rest = match matched {
                    MatchedPath::Prefix(length) => path.get(length..).unwrap_or_default(),
                    MatchedPath::Whole => "",
                };
                match (&**replacement, rest) {
                    ("", "") => Cow::Borrowed("/"),
                    ("", rest) => Cow::Borrowed(rest),
                    (replacement, "") => Cow::Borrowed(replacement),
                    (replacement, rest) => Cow::Owned(format!("{replacement}{rest}")),
                }
            }
        }
    }
}

impl Rewrite {
    /// This rewrite, and what it does not say from `other`.
    pub(super) fn over(&self, other: &Self) -> Self {
        Self {
            host: self.host.as_ref().or(other.host.as_ref()).cloned(),
            path: self.path.as_ref().or(other.path.as_ref()).cloned(),
        }
    }

    pub(super) fn apply(
        &self,
        request: &mut request::Parts,
        matched: MatchedPath,
    ) -> Result<(), RewriteError> {
        if let Some(path) = &self.path
            && request.uri.path().starts_with('/')
        {
            let new = path.apply(request.uri.path(), matched);
            let new = match request.uri.query() {
                Some(query) => Cow::Owned(format!("{new}?{query}")),
                None => new,
            };
            let new: PathAndQuery = new.parse().map_err(|_| RewriteError::Url)?;
            let mut parts = std::mem::take(&mut request.uri).into_parts();
            parts.path_and_query = Some(new);
            request.uri = Uri::from_parts(parts).map_err(|_| RewriteError::Url)?;
        }
        match &self.host {
            Some(host) => set_authority(request, host),
            None => Ok(()),
        }
    }
}

/// Sets the host where the request carries it: in the URL, in the Host header, or in both.
pub(super) fn set_authority(
    request: &mut request::Parts,
    host: &Authority,
) -> Result<(), RewriteError> {
    let in_url = request.uri.authority().is_some();
    if in_url {
        let mut parts = std::mem::take(&mut request.uri).into_parts();
        parts.authority = Some(host.clone());
        request.uri = Uri::from_parts(parts).map_err(|_| RewriteError::Url)?;
    }
    if !in_url || request.headers.contains_key(HOST) {
        let value = HeaderValue::from_str(host.as_str()).map_err(|_| RewriteError::Url)?;
        request.headers.insert(HOST, value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> PathModifier {
        PathModifier::Prefix(text.trim_end_matches('/').into())
    }

    /// The table of HTTPPathModifier.replacePrefixMatch.
    #[test]
    fn replace_prefix_match() {
        for (path, matched, replacement, result) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo/bar", "/", "/xyz", "/xyz/foo/bar"),
        ] {
            let matched = MatchedPath::Prefix(matched.trim_end_matches('/').len());
            let changed = prefix(replacement).apply(path, matched).into_owned();
            assert_eq!(changed, result, "{path} {matched:?} {replacement}");
        }
        assert_eq!(prefix("/x").apply("/a/b", MatchedPath::Whole), "/x");
        assert_eq!(prefix("/x").apply("/a", MatchedPath::Prefix(99)), "/x");
    }

    fn rewritten(uri: &str, host: Option<&str>, rewrite: &Rewrite) -> (String, Option<String>) {
        let mut builder = http::Request::builder().uri(uri);
        if let Some(host) = host {
            builder = builder.header(HOST, host);
        }
        let (mut parts, ()) = builder.body(()).expect("request").into_parts();
        let matched = MatchedPath::Prefix("/foo".len());
        rewrite.apply(&mut parts, matched).expect("rewritten");
        let host = parts.headers.get(HOST);
        let host = host.map(|host| host.to_str().expect("text").to_owned());
        (parts.uri.to_string(), host)
    }

    #[test]
    fn the_host_is_set_where_the_request_has_it() {
        let host = Some("one.example.org".parse().expect("authority"));
        let path = Some(prefix("/xyz"));
        let rewrite = Rewrite { host, path };
        let one = Some("one.example.org".to_owned());
        assert_eq!(
            rewritten("http://echo/foo/a?q=1", None, &rewrite),
            ("http://one.example.org/xyz/a?q=1".to_owned(), None)
        );
        assert_eq!(
            rewritten("/foo?q", Some("echo"), &rewrite),
            ("/xyz?q".to_owned(), one.clone())
        );
        assert_eq!(
            rewritten("http://echo:80/foo", Some("echo"), &rewrite),
            ("http://one.example.org/xyz".to_owned(), one)
        );
        let full = Some(PathModifier::Full("/full/path".into()));
        let rewrite = Rewrite {
            host: None,
            path: full,
        };
        assert_eq!(
            rewritten("/foo?a=b", Some("echo"), &rewrite),
            ("/full/path?a=b".to_owned(), Some("echo".to_owned()))
        );
    }
}
