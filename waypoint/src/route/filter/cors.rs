//! CORS: Gateway API HTTPCORSFilter.

use http::StatusCode;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderValue, ORIGIN,
    VARY,
};

use super::super::text::TextMatch;
use super::{Answer, AnswerReason};

/// HTTPCORSFilter.
#[derive(Debug, Clone)]
pub(in crate::route) struct Cors {
    pub(in crate::route) origins: Vec<Origin>,
    pub(in crate::route) origin_matches: Vec<TextMatch>,
    pub(in crate::route) credentials: bool,
    pub(in crate::route) methods: Option<Allowed>,
    pub(in crate::route) headers: Option<Allowed>,
    pub(in crate::route) expose: Option<Allowed>,
    pub(in crate::route) max_age: Option<HeaderValue>,
}

/// An entry of `allowOrigins`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::route) enum Origin {
    /// `*`
    Any,
    /// `scheme://host:port`; the host is what stands before and after its `*`.
    Pattern {
        scheme: Box<str>,
        before: Box<str>,
        after: Option<Box<str>>,
        port: Option<u16>,
    },
}

/// Methods or headers that a script may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::route) enum Allowed {
    /// `*`
    Any,
    List(HeaderValue),
}

/// What a response may tell the browser that sent the request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CorsGrant(Option<HeaderValue>);

impl Cors {
    /// The answer to a preflight; `None`: the request is none (Fetch 3.2.2).
    ///
    /// From an origin that is not allowed it is answered all the same, without saying what is.
    pub(super) fn preflight(&self, request: &HeaderMap) -> Option<Answer> {
        let method = request.get(ACCESS_CONTROL_REQUEST_METHOD)?;
        request.get(ORIGIN)?;
        let mut answer = Answer::new(StatusCode::NO_CONTENT, AnswerReason::CorsPreflight);
        let headers = &mut answer.headers;
        let grant = self.grant(request);
        if grant.0.is_none() {
            self.vary(headers);
            return Some(answer);
        }
        self.allow(&grant, headers);
        let echo = |allowed: &Option<Allowed>, asked: Option<&HeaderValue>| match allowed {
            None => None,
            Some(Allowed::List(list)) => Some(list.clone()),
            // With credentials `*` would be a name like any other (Fetch 3.2.3).
            Some(Allowed::Any) if self.credentials => asked.cloned(),
            Some(Allowed::Any) => Some(HeaderValue::from_static("*")),
        };
        if let Some(methods) = echo(&self.methods, Some(method)) {
            headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        let asked = request.get(ACCESS_CONTROL_REQUEST_HEADERS);
        if let Some(allowed) = echo(&self.headers, asked) {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, allowed);
        }
        if let Some(max_age) = &self.max_age {
            headers.insert(ACCESS_CONTROL_MAX_AGE, max_age.clone());
        }
        Some(answer)
    }

    pub(super) fn grant(&self, request: &HeaderMap) -> CorsGrant {
        let mut lines = request.get_all(ORIGIN).iter();
        let (Some(origin), None) = (lines.next(), lines.next()) else {
            return CorsGrant(None);
        };
        if !self.allows(origin) {
            return CorsGrant(None);
        }
        CorsGrant(Some(match self.is_open() {
            true => HeaderValue::from_static("*"),
            false => origin.clone(),
        }))
    }

    /// The response of a backend. One from an allowed origin says what this filter says and not
    /// what the backend does; from another one it stays as it is.
    pub(super) fn apply(&self, grant: &CorsGrant, response: &mut HeaderMap) {
        if grant.0.is_none() {
            return;
        }
        self.allow(grant, response);
        match &self.expose {
            Some(Allowed::List(list)) => {
                response.insert(ACCESS_CONTROL_EXPOSE_HEADERS, list.clone());
            }
            Some(Allowed::Any) if !self.credentials => {
                let any = HeaderValue::from_static("*");
                response.insert(ACCESS_CONTROL_EXPOSE_HEADERS, any);
            }
            Some(Allowed::Any) | None => {}
        }
    }

    fn allow(&self, grant: &CorsGrant, headers: &mut HeaderMap) {
        let Some(origin) = &grant.0 else { return };
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        if self.credentials {
            let yes = HeaderValue::from_static("true");
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, yes);
        } else {
            headers.remove(ACCESS_CONTROL_ALLOW_CREDENTIALS);
        }
        self.vary(headers);
    }

    /// The answer depends on the origin: caches have to know (Fetch 3.2.5).
    fn vary(&self, headers: &mut HeaderMap) {
        if !self.is_open() {
            headers.append(VARY, HeaderValue::from_static("Origin"));
        }
    }

    /// Every origin gets the same answer.
    fn is_open(&self) -> bool {
        !self.credentials && self.origins.contains(&Origin::Any)
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        let text = origin.to_str().ok();
        self.origins.iter().any(|allowed| allowed.matches(text))
            || self
                .origin_matches
                .iter()
                .any(|test| test.matches(origin.as_bytes()))
    }
}

impl Origin {
    /// `None`: neither `*` nor `scheme://host` with an optional port and at most one `*`.
    pub(in crate::route) fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        let (scheme, host, port) = split(text)?;
        let (before, after) = match host.split_once('*') {
            Some((_, after)) if after.contains('*') => return None,
            Some((before, after)) => (before, Some(after.to_ascii_lowercase().into())),
            None => (host, None),
        };
        Some(Self::Pattern {
            scheme: scheme.to_ascii_lowercase().into(),
            before: before.to_ascii_lowercase().into(),
            after,
            port,
        })
    }

    fn matches(&self, origin: Option<&str>) -> bool {
        let Self::Pattern {
            scheme,
            before,
            after,
            port,
        } = self
        else {
            return true;
        };
        let Some((origin_scheme, host, origin_port)) = origin.and_then(split) else {
            return false;
        };
        let host_matches = match after {
            None => host.eq_ignore_ascii_case(before),
            Some(after) => {
                host.len() > before.len() + after.len()
                    && starts_with(host, before)
                    && ends_with(host, after)
            }
        };
        origin_scheme.eq_ignore_ascii_case(scheme) && origin_port == *port && host_matches
    }
}

/// Scheme, host and port of an origin; the port that the scheme implies where there is none.
fn split(origin: &str) -> Option<(&str, &str, Option<u16>)> {
    let (scheme, rest) = origin.split_once("://")?;
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port.parse().ok()?)),
        _ => (rest, None),
    };
    let implied = || {
        if scheme.eq_ignore_ascii_case("http") {
            Some(80)
        } else {
            scheme.eq_ignore_ascii_case("https").then_some(443)
        }
    };
    let valid = !scheme.is_empty()
        && !host.is_empty()
        && !host.contains(|c: char| matches!(c, '/' | '?' | '#' | '@') || c.is_whitespace());
    valid.then(|| (scheme, host, port.or_else(implied)))
}

fn starts_with(text: &str, lower: &str) -> bool {
    let start = text.as_bytes().get(..lower.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(lower.as_bytes()))
}

fn ends_with(text: &str, lower: &str) -> bool {
    let from = text.len().checked_sub(lower.len());
    let end = from.and_then(|from| text.as_bytes().get(from..));
    end.is_some_and(|end| end.eq_ignore_ascii_case(lower.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// HTTPCORSFilter.allowOrigins: greedy to the left, ports as implied by the scheme.
    #[test]
    fn origins() {
        for (allowed, origin, expected) in [
            ("https://www.foo.com", "https://www.foo.com", true),
            ("https://www.foo.com", "HTTPS://WWW.foo.com", true),
            ("https://www.foo.com", "http://www.foo.com", false),
            ("https://www.foo.com", "https://www.foo.com:443", true),
            ("https://www.foo.com", "https://www.foo.com:8443", false),
            ("https://www.foo.com:8443", "https://www.foo.com:8443", true),
            ("http://www.foo.com:80", "http://www.foo.com", true),
            ("https://*.bar.com", "https://www.bar.com", true),
            ("https://*.bar.com", "https://a.b.bar.com", true),
            ("https://*.bar.com", "https://bar.com", false),
            ("https://*.bar.com", "https://xbar.com", false),
            ("https://*.bar.com", "https://www.bar.com.evil.org", false),
            ("https://*", "https://anything.org", true),
            ("https://*", "http://anything.org", false),
            ("https://*", "https://a.org:8443", false),
            ("https://a*z.org", "https://a.b.z.org", true),
            ("https://a*a.org", "https://a.org", false),
            ("*", "null", true),
            ("https://www.foo.com", "null", false),
            ("https://*", "https://user@x", false),
            ("https://*", "https://x/y", false),
        ] {
            let pattern = Origin::parse(allowed).expect(allowed);
            assert_eq!(
                pattern.matches(Some(origin)),
                expected,
                "{allowed} {origin}"
            );
        }
        for bad in [
            "",
            "foo.com",
            "https://",
            "https://*.*.com",
            "https://a:b",
            "://a",
            "**",
        ] {
            assert_eq!(Origin::parse(bad), None, "{bad}");
        }
    }

    fn cors(origins: &[&str], credentials: bool, lists: Option<&'static str>) -> Cors {
        let allowed = || {
            lists.map(|list| match list {
                "*" => Allowed::Any,
                list => Allowed::List(HeaderValue::from_static(list)),
            })
        };
        Cors {
            origins: origins
                .iter()
                .map(|o| Origin::parse(o).expect("origin"))
                .collect(),
            origin_matches: Vec::new(),
            credentials,
            methods: allowed(),
            headers: allowed(),
            expose: allowed(),
            max_age: Some(HeaderValue::from_static("3600")),
        }
    }

    fn request(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            let name = http::HeaderName::from_static(name);
            (name, HeaderValue::from_static(value))
        });
        pairs.collect()
    }

    fn get<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
        headers.get(name).map(|value| value.to_str().expect("text"))
    }

    const ASKED: [(&str, &str); 3] = [
        ("origin", "https://www.foo.com"),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "x-one, x-two"),
    ];

    #[test]
    fn preflight_without_credentials() {
        let filter = cors(&["*"], false, Some("*"));
        let answer = filter.preflight(&request(&ASKED)).expect("preflight");
        assert_eq!(answer.status, 204);
        assert_eq!(
            get(&answer.headers, "access-control-allow-origin"),
            Some("*")
        );
        assert_eq!(
            get(&answer.headers, "access-control-allow-methods"),
            Some("*")
        );
        assert_eq!(
            get(&answer.headers, "access-control-allow-headers"),
            Some("*")
        );
        assert_eq!(get(&answer.headers, "access-control-max-age"), Some("3600"));
        assert_eq!(
            get(&answer.headers, "access-control-allow-credentials"),
            None
        );
        assert_eq!(get(&answer.headers, "vary"), None);
    }

    #[test]
    fn with_credentials_no_wildcard_is_told() {
        let filter = cors(&["*"], true, Some("*"));
        let answer = filter.preflight(&request(&ASKED)).expect("preflight");
        let headers = &answer.headers;
        assert_eq!(
            get(headers, "access-control-allow-origin"),
            Some("https://www.foo.com")
        );
        assert_eq!(get(headers, "access-control-allow-methods"), Some("PUT"));
        assert_eq!(
            get(headers, "access-control-allow-headers"),
            Some("x-one, x-two")
        );
        assert_eq!(
            get(headers, "access-control-allow-credentials"),
            Some("true")
        );
        assert_eq!(get(headers, "vary"), Some("Origin"));
        // Nothing asked, nothing told.
        let answer = filter.preflight(&request(&ASKED[..2])).expect("preflight");
        assert_eq!(get(&answer.headers, "access-control-allow-headers"), None);

        let mut response = request(&[("access-control-allow-origin", "backend")]);
        let grant = filter.grant(&request(&ASKED));
        filter.apply(&grant, &mut response);
        assert_eq!(
            get(&response, "access-control-allow-origin"),
            Some("https://www.foo.com")
        );
        assert_eq!(get(&response, "access-control-expose-headers"), None);
    }

    #[test]
    fn lists_are_told_as_configured() {
        let filter = cors(&["https://www.foo.com"], false, Some("A,B"));
        let answer = filter.preflight(&request(&ASKED)).expect("preflight");
        assert_eq!(
            get(&answer.headers, "access-control-allow-methods"),
            Some("A,B")
        );
        assert_eq!(
            get(&answer.headers, "access-control-allow-headers"),
            Some("A,B")
        );
        let mut response = HeaderMap::new();
        filter.apply(&filter.grant(&request(&ASKED)), &mut response);
        assert_eq!(get(&response, "access-control-expose-headers"), Some("A,B"));
        let unset = cors(&["https://www.foo.com"], false, None);
        let answer = unset.preflight(&request(&ASKED)).expect("preflight");
        assert_eq!(get(&answer.headers, "access-control-allow-methods"), None);
    }

    #[test]
    fn other_origins_learn_nothing() {
        let filter = cors(&["https://other.org"], true, Some("*"));
        let answer = filter.preflight(&request(&ASKED)).expect("preflight");
        assert_eq!(answer.status, 204);
        assert_eq!(get(&answer.headers, "vary"), Some("Origin"));
        assert_eq!(answer.headers.len(), 1);
        let mut response = HeaderMap::new();
        filter.apply(&filter.grant(&request(&ASKED)), &mut response);
        assert!(response.is_empty());
        // Two origins are none.
        let two = request(&[("origin", "https://other.org"), ("vary", "x")]);
        let mut two = two;
        two.append(ORIGIN, HeaderValue::from_static("https://evil.org"));
        assert_eq!(filter.grant(&two), CorsGrant(None));
    }

    #[test]
    fn what_is_no_preflight() {
        let filter = cors(&["*"], false, None);
        assert!(filter.preflight(&request(&ASKED[..1])).is_none());
        assert!(filter.preflight(&request(&ASKED[1..])).is_none());
    }
}
