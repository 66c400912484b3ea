//! Rules, sources, operations and conditions, and what it takes for each to hold.

use std::cmp::Ordering;

use ::http::header::{HeaderMap, HeaderName, HeaderValue};

use super::claims::Claims;
use super::path::PathSet;
use super::request::{HttpFields, HttpRequest};
use crate::identity::SpiffeId;
use crate::policy::TrustDomains;
use crate::policy::matching::{
    AddressSet, Pattern, PortSet, PrincipalSet, ServiceAccountSet, StringSet,
};

/// How many of the ways in which a request can be read have to match: all for what
/// allows, one for what denies, asks or reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Readings {
    All,
    Any,
}

impl Readings {
    fn opposite(self) -> Self {
        match self {
            Self::All => Self::Any,
            Self::Any => Self::All,
        }
    }
}

/// A request and what was found out about it once.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) request: HttpRequest<'a>,
    pub(super) trust: &'a TrustDomains,
    /// Where methods may stand that an application takes instead of the request's.
    overrides: Option<&'a HeaderMap>,
}

static OVERRIDES: [HeaderName; 3] = [
    HeaderName::from_static("x-http-method-override"),
    HeaderName::from_static("x-http-method"),
    HeaderName::from_static("x-method-override"),
];

impl<'a> Facts<'a> {
    /// `methods`: whether a rule asks for the method. Frameworks that know override
    /// headers obey them on POST.
    pub(super) fn new(request: &HttpRequest<'a>, trust: &'a TrustDomains, methods: bool) -> Self {
        let overrides = match &request.http {
            Some(http) if methods && http.method == "POST" => Some(http.headers),
            _ => None,
        };
        Self {
            request: request.canonical(),
            trust,
            overrides,
        }
    }

    fn identity(&self, test: impl FnOnce(&SpiffeId) -> bool) -> bool {
        self.request.source_identity.is_some_and(test)
    }

    fn method(&self, http: &HttpFields<'_>, set: &MethodSet, readings: Readings) -> bool {
        // All lines of them: which one an application takes is not known.
        let overrides = self.overrides.into_iter().flat_map(|headers| {
            let lines = OVERRIDES.iter().flat_map(|name| headers.get_all(name));
            lines.map(HeaderValue::as_bytes)
        });
        let mut all = std::iter::once(http.method.as_bytes()).chain(overrides);
        match readings {
            Readings::All => all.all(|method| set.contains(method)),
            Readings::Any => all.any(|method| set.contains(method)),
        }
    }
}

pub(super) trait Set {
    fn is_empty(&self) -> bool;
}

macro_rules! sets {
    ($($set:ty),*) => {
        $(impl Set for $set {
            fn is_empty(&self) -> bool {
                <$set>::is_empty(self)
            }
        })*
    };
}
sets!(
    StringSet,
    PrincipalSet,
    ServiceAccountSet,
    AddressSet,
    PortSet
);

/// A field and its `not` form. A value that is not there is in neither.
#[derive(Debug, Default)]
pub(super) struct Pair<T> {
    pub(super) yes: T,
    pub(super) no: T,
}

impl<T: Set> Pair<T> {
    pub(super) fn is_set(&self) -> bool {
        !self.yes.is_empty() || !self.no.is_empty()
    }

    fn holds(&self, hit: impl Fn(&T) -> bool) -> bool {
        (self.yes.is_empty() || hit(&self.yes)) && (self.no.is_empty() || !hit(&self.no))
    }

    /// For what has several readings: that none is listed in `no` is the opposite of one
    /// being so.
    fn holds_readings(&self, readings: Readings, hit: impl Fn(&T, Readings) -> bool) -> bool {
        (self.yes.is_empty() || hit(&self.yes, readings))
            && (self.no.is_empty() || !hit(&self.no, readings.opposite()))
    }
}

/// One rule: a source, an operation and every condition.
#[derive(Debug, Default)]
pub(super) struct Rule {
    /// ORed; none: any.
    pub(super) from: Vec<Source>,
    /// ORed; none: any.
    pub(super) to: Vec<Operation>,
    /// ANDed.
    pub(super) when: Vec<Condition>,
}

/// Who. ANDed.
#[derive(Debug, Default)]
pub(super) struct Source {
    pub(super) principals: Pair<PrincipalSet>,
    pub(super) namespaces: Pair<StringSet>,
    pub(super) service_accounts: Pair<ServiceAccountSet>,
    pub(super) trust_domains: Pair<StringSet>,
    pub(super) ip_blocks: Pair<AddressSet>,
    pub(super) remote_ip_blocks: Pair<AddressSet>,
    pub(super) request_principals: Pair<RequestPrincipalSet>,
}

/// What. ANDed.
#[derive(Debug, Default)]
pub(super) struct Operation {
    pub(super) ports: Pair<PortSet>,
    pub(super) methods: Pair<MethodSet>,
    pub(super) paths: Pair<PathSet>,
    pub(super) hosts: Pair<HostSet>,
}

/// One `when`.
#[derive(Debug)]
pub(super) enum Condition {
    Header(HeaderName, Pair<StringSet>),
    Host(Pair<HostSet>),
    Method(Pair<MethodSet>),
    PathAndQuery(Pair<StringSet>),
    SourceIp(Pair<AddressSet>),
    RemoteIp(Pair<AddressSet>),
    SourceNamespace(Pair<StringSet>),
    SourceServiceAccount(Pair<ServiceAccountSet>),
    SourceTrustDomain(Pair<StringSet>),
    SourcePrincipal(Pair<PrincipalSet>),
    RequestPrincipal(Pair<RequestPrincipalSet>),
    Audiences(Pair<StringSet>),
    Presenter(Pair<StringSet>),
    Claim(Vec<Box<str>>, Pair<StringSet>),
    DestinationIp(Pair<AddressSet>),
    DestinationPort(Pair<PortSet>),
    Sni(Pair<HostSet>),
}

impl Rule {
    pub(super) fn matches(&self, facts: &Facts<'_>, readings: Readings) -> bool {
        // What only HTTP has cannot be seen here: an ALLOW that asks for it cannot match,
        // anything else leaves the question out and so matches more.
        if facts.request.http.is_none() && readings == Readings::All && self.is_http_only() {
            return false;
        }
        (self.from.is_empty() || self.from.iter().any(|from| from.holds(facts)))
            && (self.to.is_empty() || self.to.iter().any(|to| to.holds(facts, readings)))
            && self.when.iter().all(|when| when.holds(facts, readings))
    }

    /// Whether a field is asked for that only HTTP has.
    pub(super) fn is_http_only(&self) -> bool {
        self.from
            .iter()
            .any(|from| from.request_principals.is_set())
            || self
                .to
                .iter()
                .any(|to| to.methods.is_set() || to.paths.is_set() || to.hosts.is_set())
            || self.when.iter().any(Condition::is_http_only)
    }

    /// Whether the method is asked for.
    pub(super) fn asks_method(&self) -> bool {
        self.to.iter().any(|to| to.methods.is_set())
            || self
                .when
                .iter()
                .any(|when| matches!(when, Condition::Method(_)))
    }
}

impl Source {
    fn holds(&self, facts: &Facts<'_>) -> bool {
        let request = &facts.request;
        self.principals
            .holds(|set| facts.identity(|id| set.contains(id, facts.trust)))
            && self
                .namespaces
                .holds(|set| facts.identity(|id| set.contains(id.namespace())))
            && self
                .service_accounts
                .holds(|set| facts.identity(|id| set.contains(id)))
            && self.trust_domains.holds(|set| {
                facts.identity(|id| set.contains_trust_domain(id.trust_domain(), facts.trust))
            })
            && self.ip_blocks.holds(|set| set.contains(request.source_ip))
            && self
                .remote_ip_blocks
                .holds(|set| set.contains(request.remote_ip))
            && request.http.is_none_or(|http| {
                self.request_principals
                    .holds(|set| set.contains(http.claims))
            })
    }
}

impl Operation {
    fn holds(&self, facts: &Facts<'_>, readings: Readings) -> bool {
        let request = &facts.request;
        self.ports
            .holds(|set| set.contains(request.destination_port))
            && request.http.is_none_or(|http| {
                self.methods
                    .holds_readings(readings, |set, readings| facts.method(&http, set, readings))
                    && self
                        .paths
                        .holds_readings(readings, |set, readings| set.contains(http.path, readings))
                    && self.hosts.holds(|set| set.contains(http.host))
            })
    }
}

impl Condition {
    fn holds(&self, facts: &Facts<'_>, readings: Readings) -> bool {
        let request = &facts.request;
        let http = |test: &dyn Fn(&HttpFields<'_>) -> bool| request.http.as_ref().is_none_or(test);
        let claims = |set: &StringSet, test: &dyn Fn(&Claims, &StringSet) -> bool| {
            let claims = request.http.and_then(|http| http.claims);
            claims.is_some_and(|claims| test(claims, set))
        };
        match self {
            // Each line of a repeated header is compared on its own (Envoy).
            Self::Header(name, pair) => http(&|http| {
                pair.holds(|set| {
                    http.headers.get_all(name).iter().any(|line| {
                        let line = line.as_bytes();
                        set.contains_bytes(line) || (line.is_empty() && set.has_presence())
                    })
                })
            }),
            Self::Host(pair) => http(&|http| pair.holds(|set| set.contains(http.host))),
            Self::Method(pair) => http(&|http| {
                pair.holds_readings(readings, |set, readings| facts.method(http, set, readings))
            }),
            Self::PathAndQuery(pair) => http(&|http| {
                pair.holds_readings(readings, |set, readings| {
                    contains_path_and_query(set, http, readings)
                })
            }),
            Self::SourceIp(pair) => pair.holds(|set| set.contains(request.source_ip)),
            Self::RemoteIp(pair) => pair.holds(|set| set.contains(request.remote_ip)),
            Self::SourceNamespace(pair) => {
                pair.holds(|set| facts.identity(|id| set.contains(id.namespace())))
            }
            Self::SourceServiceAccount(pair) => {
                pair.holds(|set| facts.identity(|id| set.contains(id)))
            }
            Self::SourceTrustDomain(pair) => pair.holds(|set| {
                facts.identity(|id| set.contains_trust_domain(id.trust_domain(), facts.trust))
            }),
            Self::SourcePrincipal(pair) => {
                pair.holds(|set| facts.identity(|id| set.contains(id, facts.trust)))
            }
            Self::RequestPrincipal(pair) => {
                http(&|http| pair.holds(|set| set.contains(http.claims)))
            }
            Self::Audiences(pair) => http(&|_| {
                pair.holds(|set| claims(set, &|c, set| c.any_audience(|text| set.contains(text))))
            }),
            Self::Presenter(pair) => http(&|_| {
                pair.holds(|set| {
                    claims(set, &|c, set| {
                        c.presenter().is_some_and(|text| set.contains(text))
                    })
                })
            }),
            Self::Claim(path, pair) => http(&|_| {
                pair.holds(|set| {
                    claims(set, &|c, set| c.any_value(path, |text| set.contains(text)))
                })
            }),
            Self::DestinationIp(pair) => pair.holds(|set| set.contains(request.destination_ip)),
            Self::DestinationPort(pair) => pair.holds(|set| set.contains(request.destination_port)),
            Self::Sni(pair) => pair.holds(|set| request.sni.is_some_and(|sni| set.contains(sni))),
        }
    }

    fn is_http_only(&self) -> bool {
        matches!(
            self,
            Self::Header(..)
                | Self::Host(_)
                | Self::Method(_)
                | Self::PathAndQuery(_)
                | Self::RequestPrincipal(_)
                | Self::Audiences(_)
                | Self::Presenter(_)
                | Self::Claim(..)
        )
    }
}

/// `request.headers[:path]` has the query. Rare enough to put the text together.
fn contains_path_and_query(set: &StringSet, http: &HttpFields<'_>, readings: Readings) -> bool {
    let with_query = |path: &[u8]| {
        let Some(query) = http.query else {
            return set.contains_bytes(path);
        };
        let mut text = Vec::with_capacity(path.len() + 1 + query.len());
        text.extend_from_slice(path);
        text.push(b'?');
        text.extend_from_slice(query.as_bytes());
        set.contains_bytes(&text)
    };
    let sent = || with_query(http.path.as_str().as_bytes());
    match (http.path.other_reading(), readings) {
        (None, _) => sent(),
        (Some(other), Readings::All) => sent() && with_query(other),
        (Some(other), Readings::Any) => sent() || with_query(other),
    }
}

/// Methods. They are case-sensitive (RFC 9110 9.1), but not for every server: a set whose
/// hits close is compared without regard to case.
#[derive(Debug, Default)]
pub(super) struct MethodSet {
    set: StringSet,
    folded: bool,
}

impl MethodSet {
    /// `opens`: that a method is in the set makes it more likely to be permitted.
    pub(super) fn new(patterns: Vec<Pattern>, opens: bool) -> Self {
        let upper = |text: &str| text.to_ascii_uppercase().into_boxed_str();
        let patterns = if opens {
            patterns
        } else {
            patterns
                .into_iter()
                .map(|pattern| pattern.map(upper))
                .collect()
        };
        Self {
            set: StringSet::new(patterns),
            folded: !opens,
        }
    }

    fn contains(&self, method: &[u8]) -> bool {
        if !self.folded || !method.iter().any(u8::is_ascii_lowercase) {
            return self.set.contains_bytes(method);
        }
        self.set.contains_bytes(&method.to_ascii_uppercase())
    }
}

impl Set for MethodSet {
    fn is_empty(&self) -> bool {
        self.set.is_empty()
    }
}

/// Host names, compared without regard to letter case or a trailing dot. A value without
/// a port stands for the name at any port.
#[derive(Debug, Default)]
pub(super) struct HostSet {
    exact: Vec<(Box<str>, Option<Box<str>>)>,
    other: Vec<HostPattern>,
}

#[derive(Debug)]
enum HostPattern {
    Presence,
    /// Start of the name; or the whole name, and the start of the port.
    Prefix(Box<str>, Option<Box<str>>),
    /// End of the name, and the port if one is said.
    Suffix(Box<str>, Option<Box<str>>),
}

impl HostSet {
    pub(super) fn new(patterns: Vec<Pattern>) -> Self {
        let mut set = Self::default();
        for pattern in patterns {
            match pattern.map(|text| text.to_ascii_lowercase().into()) {
                Pattern::Presence => set.other.push(HostPattern::Presence),
                Pattern::Exact(text) => {
                    let (name, port) = split_host(&text);
                    set.exact.push((name.into(), port.map(Box::from)));
                }
                Pattern::Prefix(text) => set.other.push(match text.rsplit_once(':') {
                    Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => {
                        let name = name.strip_suffix('.').unwrap_or(name);
                        HostPattern::Prefix(name.into(), Some(port.into()))
                    }
                    _ => HostPattern::Prefix(text, None),
                }),
                Pattern::Suffix(text) => {
                    let (name, port) = split_host(&text);
                    let (name, port) = (name.into(), port.map(Box::from));
                    set.other.push(HostPattern::Suffix(name, port));
                }
            }
        }
        set.exact.sort_unstable();
        set.exact.dedup();
        set
    }

    fn contains(&self, host: &str) -> bool {
        let (name, port) = split_host(host);
        let start = self
            .exact
            .partition_point(|(exact, _)| compare_folded(exact, name) == Ordering::Less);
        self.exact[start..]
            .iter()
            .take_while(|(exact, _)| exact.eq_ignore_ascii_case(name))
            .any(|(_, wanted)| wanted.as_deref().is_none_or(|wanted| port == Some(wanted)))
            || self.other.iter().any(|pattern| pattern.matches(name, port))
    }
}

impl Set for HostSet {
    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.other.is_empty()
    }
}

impl HostPattern {
    fn matches(&self, name: &str, port: Option<&str>) -> bool {
        let (own, text) = (name.as_bytes(), |text: &'_ str| text.len());
        match self {
            Self::Presence => !name.is_empty(),
            Self::Prefix(prefix, None) => own
                .get(..text(prefix))
                .is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes())),
            Self::Prefix(whole, Some(start)) => {
                name.eq_ignore_ascii_case(whole)
                    && port.is_some_and(|port| port.starts_with(&**start))
            }
            Self::Suffix(suffix, wanted) => {
                let start = own.len().checked_sub(text(suffix));
                start.is_some_and(|start| own[start..].eq_ignore_ascii_case(suffix.as_bytes()))
                    && wanted.as_deref().is_none_or(|wanted| port == Some(wanted))
            }
        }
    }
}

/// Name without a trailing dot, and port without leading zeros.
fn split_host(host: &str) -> (&str, Option<&str>) {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
            let digits = port.trim_start_matches('0');
            (name, (!digits.is_empty()).then_some(digits))
        }
        _ => (host, None),
    };
    (name.strip_suffix('.').unwrap_or(name), port)
}

fn compare_folded(lower: &str, other: &str) -> Ordering {
    let other = other.bytes().map(|byte| byte.to_ascii_lowercase());
    lower.bytes().cmp(other)
}

/// Request principals `issuer/subject`. An issuer may have slashes, so that a value is
/// parted at its last one and the parts are compared by themselves: a subject with a slash
/// is never taken for another issuer's.
#[derive(Debug, Default)]
pub(super) struct RequestPrincipalSet {
    exact: Vec<(Box<str>, Box<str>)>,
    other: Vec<RequestPrincipal>,
}

#[derive(Debug)]
enum RequestPrincipal {
    Presence,
    /// `issuer/subj*`.
    SubjectPrefix(Box<str>, Box<str>),
    /// `iss*`.
    IssuerPrefix(Box<str>),
    /// `*suer/subject`.
    IssuerSuffix(Box<str>, Box<str>),
    /// `*ject`.
    SubjectSuffix(Box<str>),
    /// Without a slash: no principal.
    Unmatchable,
}

impl RequestPrincipalSet {
    pub(super) fn new(patterns: Vec<Pattern>) -> Self {
        let mut set = Self::default();
        for pattern in patterns {
            let split = |text: &str| {
                text.rsplit_once('/')
                    .map(|(issuer, subject)| (issuer.into(), subject.into()))
            };
            set.other.push(match pattern {
                Pattern::Presence => RequestPrincipal::Presence,
                Pattern::Exact(text) => match split(&text) {
                    Some(both) => {
                        set.exact.push(both);
                        continue;
                    }
                    None => RequestPrincipal::Unmatchable,
                },
                Pattern::Prefix(text) => match split(&text) {
                    Some((issuer, subject)) => RequestPrincipal::SubjectPrefix(issuer, subject),
                    None => RequestPrincipal::IssuerPrefix(text),
                },
                Pattern::Suffix(text) => match split(&text) {
                    Some((issuer, subject)) => RequestPrincipal::IssuerSuffix(issuer, subject),
                    None => RequestPrincipal::SubjectSuffix(text),
                },
            });
        }
        set.exact.sort_unstable();
        set.exact.dedup();
        set
    }

    fn contains(&self, claims: Option<&Claims>) -> bool {
        let Some((issuer, subject)) = claims.and_then(Claims::principal) else {
            return false;
        };
        self.exact
            .binary_search_by(|(i, s)| (&**i, &**s).cmp(&(issuer, subject)))
            .is_ok()
            || self.other.iter().any(|pattern| match pattern {
                RequestPrincipal::Presence => true,
                RequestPrincipal::SubjectPrefix(i, s) => {
                    **i == *issuer && subject.starts_with(&**s)
                }
                RequestPrincipal::IssuerPrefix(i) => issuer.starts_with(&**i),
                RequestPrincipal::IssuerSuffix(i, s) => issuer.ends_with(&**i) && **s == *subject,
                RequestPrincipal::SubjectSuffix(s) => subject.ends_with(&**s),
                RequestPrincipal::Unmatchable => false,
            })
    }
}

impl Set for RequestPrincipalSet {
    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.other.is_empty()
    }
}
