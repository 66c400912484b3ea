//! RequestRedirect.

use http::header::{HOST, HeaderValue, LOCATION};
use http::request;
use http::{StatusCode, Uri};

use super::super::matching::MatchedPath;
use super::rewrite::PathModifier;
use super::{Answer, AnswerReason, Listener};

/// HTTPRequestRedirectFilter.
#[derive(Debug, Clone)]
pub(in crate::route) struct Redirect {
    /// `http` or `https`.
    pub(in crate::route) scheme: Option<Box<str>>,
    pub(in crate::route) hostname: Option<Box<str>>,
    pub(in crate::route) port: Option<u16>,
    pub(in crate::route) path: Option<PathModifier>,
    pub(in crate::route) status: StatusCode,
}

impl Redirect {
    pub(super) fn answer(
        &self,
        request: &request::Parts,
        matched: MatchedPath,
        listener: Listener,
    ) -> Answer {
        let location = HeaderValue::try_from(self.location(request, matched, listener));
        let Ok(location) = location else {
            // The parts of the URL are the request's and the configuration's, checked both.
            let reason = AnswerReason::Invalid("the redirect has no valid location".into());
            return Answer::new(StatusCode::INTERNAL_SERVER_ERROR, reason);
        };
        let mut answer = Answer::new(self.status, AnswerReason::Redirect);
        answer.headers.insert(LOCATION, location);
        answer
    }

    fn location(
        &self,
        request: &request::Parts,
        matched: MatchedPath,
        listener: Listener,
    ) -> String {
        let request_scheme = if listener.tls { "https" } else { "http" };
        let scheme = self.scheme.as_deref().unwrap_or(request_scheme);
        let host = self.hostname.as_deref().unwrap_or_else(|| host_of(request));
        let well_known = match scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        };
        // HTTPRequestRedirectFilter.port: the scheme's own where a scheme is given, otherwise
        // the listener's.
        let port = match (self.port, &self.scheme) {
            (Some(port), _) => port,
            (None, Some(_)) => well_known.unwrap_or(listener.port),
            (None, None) => listener.port,
        };
        let path = request.uri.path();
        let path = match &self.path {
            Some(modifier) => modifier.apply(path, matched),
            None => path.into(),
        };
        let mut location = format!("{scheme}://{host}");
        // "SHOULD NOT add the port number" that the scheme implies.
        if Some(port) != well_known {
            location.push(':');
            location.push_str(itoa::Buffer::new().format(port));
        }
        location.push_str(&path);
        if let Some(query) = request.uri.query() {
            location.push('?');
            location.push_str(query);
        }
        location
    }
}

/// The host that the request names, without port.
fn host_of(request: &request::Parts) -> &str {
    let header = || {
        let host = request.headers.get(HOST)?.to_str().ok()?;
        Some(without_port(host))
    };
    authority(&request.uri).or_else(header).unwrap_or_default()
}

fn authority(uri: &Uri) -> Option<&str> {
    uri.authority().map(|authority| authority.host())
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        // Not inside an IPv6 address.
        Some((name, port)) if !port.ends_with(']') => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HTTP: Listener = Listener {
        tls: false,
        port: 80,
    };
    const HTTP_8080: Listener = Listener {
        tls: false,
        port: 8080,
    };
    const HTTPS: Listener = Listener {
        tls: true,
        port: 443,
    };

    fn redirect(scheme: Option<&str>, port: Option<u16>) -> Redirect {
        Redirect {
            scheme: scheme.map(Into::into),
            hostname: None,
            port,
            path: None,
            status: StatusCode::FOUND,
        }
    }

    fn location(redirect: &Redirect, listener: Listener, uri: &str, host: &str) -> String {
        let request = http::Request::builder().uri(uri).header(HOST, host);
        let (parts, ()) = request.body(()).expect("request").into_parts();
        let answer = redirect.answer(&parts, MatchedPath::Prefix(0), listener);
        assert_eq!(answer.status, redirect.status);
        let location = answer.headers[LOCATION].to_str().expect("text");
        location.to_owned()
    }

    /// HTTPRequestRedirectFilter.port; HTTPRouteRedirectPortAndScheme.
    #[test]
    fn ports() {
        for (listener, scheme, port, expected) in [
            (HTTP, None, None, "http://example.org/a"),
            (HTTP, None, Some(80), "http://example.org/a"),
            (HTTP, None, Some(8080), "http://example.org:8080/a"),
            (HTTP, Some("https"), None, "https://example.org/a"),
            (HTTP, Some("https"), Some(443), "https://example.org/a"),
            (
                HTTP,
                Some("https"),
                Some(8443),
                "https://example.org:8443/a",
            ),
            (HTTP, Some("http"), None, "http://example.org/a"),
            (HTTP_8080, None, None, "http://example.org:8080/a"),
            (HTTP_8080, None, Some(80), "http://example.org/a"),
            (HTTP_8080, Some("http"), None, "http://example.org/a"),
            (HTTP_8080, Some("https"), None, "https://example.org/a"),
            (
                HTTP_8080,
                Some("https"),
                Some(8080),
                "https://example.org:8080/a",
            ),
            (HTTPS, None, None, "https://example.org/a"),
            (HTTPS, None, Some(443), "https://example.org/a"),
            (HTTPS, None, Some(8443), "https://example.org:8443/a"),
            (HTTPS, Some("http"), None, "http://example.org/a"),
            (HTTPS, Some("http"), Some(8080), "http://example.org:8080/a"),
        ] {
            let location = location(&redirect(scheme, port), listener, "/a", "example.org");
            assert_eq!(location, expected, "{listener:?} {scheme:?} {port:?}");
        }
    }

    #[test]
    fn hosts_paths_and_queries() {
        let plain = redirect(None, None);
        assert_eq!(
            location(&plain, HTTP, "/a?q=1", "echo:8080"),
            "http://echo/a?q=1"
        );
        assert_eq!(location(&plain, HTTP, "/a", "[::1]:8080"), "http://[::1]/a");
        assert_eq!(location(&plain, HTTP, "/a", "[::1]"), "http://[::1]/a");
        assert_eq!(location(&plain, HTTP, "http://h2:80/a", "x"), "http://h2/a");
        let mut full = redirect(None, None);
        full.hostname = Some("example.com".into());
        full.path = Some(PathModifier::Full("/full".into()));
        full.status = StatusCode::PERMANENT_REDIRECT;
        assert_eq!(
            location(&full, HTTP, "/a?q", "echo"),
            "http://example.com/full?q"
        );
    }
}
