//! From the wire form to [`Route`]. It never fails: what cannot be understood becomes a rule, a
//! backend or a filter that answers 500 and says why, and a [`super::Problem`].
//!
//! A condition of a match that cannot be understood counts as holding, so that the requests it
//! was meant for cannot slip to another rule; a bad regular expression for paths still narrows
//! by what is certain of its beginning.

use std::sync::Arc;
use std::time::Duration;

use adit_shared::model::ServiceName;
use adit_shared::proto::waypoint as proto;
use http::Method;
use http::header::HeaderName;

use super::backend::{Backend, Backends, Target};
use super::claims;
use super::filter::is_host;
use super::matching::{
    ClaimMatch, HeaderMatch, HeaderSource, NamePattern, PathMatch, QueryMatch, RequestMatch,
};
use super::problem::Problems;
use super::retry::RetryPolicy;
use super::rule::{L4Rule, Parent, Route, RouteId, RouteKind, Rule, Timeouts};
use super::session::SessionPersistence;
use super::text::{TextMatch, compile_regex, literal_prefix};

impl Route {
    /// Understands a route as far as it goes; [`Route::problems`] lists the rest.
    pub fn from_proto(route: &proto::Route) -> Self {
        let mut problems = Problems::default();
        let object = route.object.clone().unwrap_or_default();
        if object.name.is_empty() || object.namespace.is_empty() {
            problems.within("object", |problems| problems.add("has no name"));
        }
        let id = Arc::new(RouteId {
            namespace: object.namespace.into(),
            name: object.name.into(),
            kind: object.kind.into(),
        });
        let parents = read_parents(&route.parents, &mut problems);
        let mut http = Vec::new();
        let mut l4 = Vec::new();
        let kind = match &route.kind {
            Some(proto::route::Kind::Http(rules)) => {
                for (index, rule) in rules.rules.iter().enumerate() {
                    let read = |problems: &mut Problems| read_http(&id, index, rule, problems);
                    http.push(problems.within(format_args!("http.rules[{index}]"), read));
                }
                RouteKind::Http
            }
            Some(proto::route::Kind::Grpc(rules)) => {
                for (index, rule) in rules.rules.iter().enumerate() {
                    let read = |problems: &mut Problems| read_grpc(&id, index, rule, problems);
                    http.push(problems.within(format_args!("grpc.rules[{index}]"), read));
                }
                RouteKind::Grpc
            }
            Some(proto::route::Kind::Tcp(rules)) => {
                l4 = problems.within("tcp", |problems| read_l4(&id, rules, problems));
                RouteKind::Tcp
            }
            Some(proto::route::Kind::Tls(rules)) => {
                l4 = problems.within("tls", |problems| read_l4(&id, rules, problems));
                RouteKind::Tls
            }
            None => {
                let reason = problems.within("kind", |problems| problems.add("not known"));
                // What it was meant for by the name of its kind fails.
                match &*id.kind {
                    "TCPRoute" => {
                        l4 = vec![invalid_l4(&id, reason)];
                        RouteKind::Tcp
                    }
                    "TLSRoute" => {
                        l4 = vec![invalid_l4(&id, reason)];
                        RouteKind::Tls
                    }
                    kind => {
                        http = vec![invalid_http(&id, reason)];
                        match kind {
                            "GRPCRoute" => RouteKind::Grpc,
                            _ => RouteKind::Http,
                        }
                    }
                }
            }
        };
        let mut hostnames = Vec::new();
        // Requests follow the service that was dialled (Gateway API GAMMA). Of a connection that
        // stays closed there is but the name in its ClientHello.
        if kind == RouteKind::Tls {
            for (index, hostname) in route.hostnames.iter().enumerate() {
                problems.within(
                    format_args!("hostnames[{index}]"),
                    |problems| match read_hostname(hostname) {
                        Some(hostname) => hostnames.push(hostname),
                        None => drop(problems.add("is no host name")),
                    },
                );
            }
            if hostnames.is_empty() && !route.hostnames.is_empty() {
                // Whatever it was meant for fails.
                let reason = problems.add("none of the host names can be understood");
                l4 = vec![invalid_l4(&id, reason)];
            }
        }
        Self {
            id,
            created: object.created,
            kind,
            parents,
            hostnames: hostnames.into(),
            http: http.into_iter().map(Arc::new).collect(),
            l4: l4.into_iter().map(Arc::new).collect(),
            problems: problems.into_found().into(),
        }
    }
}

/// Not `None`: what the control plane says cannot work, with its reason.
pub(super) fn told_invalid(reason: &str, problems: &mut Problems) -> Option<Arc<str>> {
    (!reason.is_empty()).then(|| problems.name(reason))
}

fn read_parents(parents: &[proto::RouteParent], problems: &mut Problems) -> Box<[Parent]> {
    let mut read = Vec::new();
    for (index, parent) in parents.iter().enumerate() {
        if !parent.rejected.is_empty() {
            continue;
        }
        problems.within(format_args!("parents[{index}]"), |problems| {
            let Some(service) = parent.service.as_ref().filter(|s| !s.hostname.is_empty()) else {
                problems.add("names no service");
                return;
            };
            let Ok(port) = u16::try_from(parent.port) else {
                problems.within("port", |problems| problems.add("is no port"));
                return;
            };
            read.push(Parent {
                service: service_name(service),
                port: (port != 0).then_some(port),
            });
        });
    }
    read.into()
}

/// A host name, or `*.` and one, without the star.
fn read_hostname(hostname: &str) -> Option<Box<str>> {
    let hostname = hostname.to_ascii_lowercase();
    let (key, name) = match hostname.strip_prefix('*') {
        Some(suffix) => (suffix, suffix.strip_prefix('.')?),
        None => (&*hostname, &*hostname),
    };
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.');
    (!name.is_empty() && !name.starts_with('.') && name.bytes().all(legal)).then(|| key.into())
}

pub(super) fn service_name(service: &proto::ServiceRef) -> ServiceName {
    ServiceName {
        namespace: service.namespace.as_str().into(),
        hostname: service.hostname.as_str().into(),
    }
}

fn name(name: &str) -> Option<Box<str>> {
    (!name.is_empty()).then(|| name.into())
}

fn invalid_http(id: &Arc<RouteId>, reason: Arc<str>) -> Rule {
    let everything = PathMatch::Prefix("".into());
    Rule {
        route: Arc::clone(id),
        label: Rule::make_label(id, 0, ""),
        index: 0,
        name: None,
        matches: Box::new([RequestMatch::everything(everything)]),
        filters: Default::default(),
        backends: Backends::default(),
        timeouts: Timeouts::default(),
        retry: None,
        session: None,
        invalid: Some(reason),
    }
}

fn invalid_l4(id: &Arc<RouteId>, reason: Arc<str>) -> L4Rule {
    L4Rule {
        route: Arc::clone(id),
        index: 0,
        name: None,
        backends: Backends::default(),
        invalid: Some(reason),
    }
}

fn read_http(
    id: &Arc<RouteId>,
    index: usize,
    rule: &proto::HttpRule,
    problems: &mut Problems,
) -> Rule {
    let mut invalid = told_invalid(&rule.invalid, problems);
    let mut matches = Vec::with_capacity(rule.matches.len());
    for (index, of) in rule.matches.iter().enumerate() {
        let read = |problems: &mut Problems| read_http_match(of, problems);
        matches.push(problems.within(format_args!("matches[{index}]"), read));
    }
    if matches.is_empty() {
        matches.push(RequestMatch::everything(PathMatch::Prefix("".into())));
    }
    let mut time = |field: &str, value: &Option<prost_types::Duration>| match problems
        .within(field, |problems| read_duration(value.as_ref(), problems))
    {
        Ok(value) => value.filter(|value| !value.is_zero()),
        Err(reason) => {
            invalid.get_or_insert(reason);
            None
        }
    };
    let timeouts = Timeouts {
        request: time("request_timeout", &rule.request_timeout),
        backend_request: time("backend_request_timeout", &rule.backend_request_timeout),
    };
    let mut session = None;
    if let Some(persistence) = &rule.session_persistence {
        let read = |problems: &mut Problems| SessionPersistence::read(persistence, problems);
        match problems.within("session_persistence", read) {
            Ok(read) => session = Some(read),
            Err(reason) => {
                invalid.get_or_insert(reason);
            }
        }
    }
    let mut retry = None;
    if let Some(policy) = &rule.retry {
        let read = |problems: &mut Problems| RetryPolicy::read(policy, problems);
        match problems.within("retry", read) {
            Ok(read) => retry = Some(read),
            Err(reason) => {
                invalid.get_or_insert(reason);
            }
        }
    }
    Rule {
        route: Arc::clone(id),
        label: Rule::make_label(id, index, &rule.name),
        index,
        name: name(&rule.name),
        matches: matches.into(),
        filters: super::filter::read(&rule.filters, problems),
        backends: read_backends(&rule.backends, problems),
        timeouts,
        retry,
        session,
        invalid,
    }
}

fn read_grpc(
    id: &Arc<RouteId>,
    index: usize,
    rule: &proto::GrpcRule,
    problems: &mut Problems,
) -> Rule {
    let mut invalid = told_invalid(&rule.invalid, problems);
    let mut matches = Vec::with_capacity(rule.matches.len());
    for (index, of) in rule.matches.iter().enumerate() {
        let read = |problems: &mut Problems| read_grpc_match(of, problems);
        matches.push(problems.within(format_args!("matches[{index}]"), read));
    }
    if matches.is_empty() {
        matches.push(RequestMatch::everything(PathMatch::Grpc {
            service: None,
            method: None,
        }));
    }
    let mut session = None;
    if let Some(persistence) = &rule.session_persistence {
        let read = |problems: &mut Problems| SessionPersistence::read(persistence, problems);
        match problems.within("session_persistence", read) {
            Ok(read) => session = Some(read),
            Err(reason) => {
                invalid.get_or_insert(reason);
            }
        }
    }
    Rule {
        route: Arc::clone(id),
        label: Rule::make_label(id, index, &rule.name),
        index,
        name: name(&rule.name),
        matches: matches.into(),
        filters: super::filter::read(&rule.filters, problems),
        backends: read_backends(&rule.backends, problems),
        timeouts: Timeouts::default(),
        retry: None,
        session,
        invalid,
    }
}

fn read_l4(id: &Arc<RouteId>, rules: &proto::L4Rules, problems: &mut Problems) -> Vec<L4Rule> {
    let mut read = Vec::with_capacity(rules.rules.len());
    for (index, rule) in rules.rules.iter().enumerate() {
        let rule = problems.within(format_args!("rules[{index}]"), |problems| L4Rule {
            route: Arc::clone(id),
            index,
            name: name(&rule.name),
            invalid: told_invalid(&rule.invalid, problems),
            backends: read_backends(&rule.backends, problems),
        });
        read.push(rule);
    }
    if read.is_empty() {
        let reason = problems.within("rules", |problems| problems.add("there is none"));
        read.push(invalid_l4(id, reason));
    }
    read
}

fn read_http_match(of: &proto::HttpMatch, problems: &mut Problems) -> RequestMatch {
    use proto::http_match::Path;
    let mut invalid = None;
    let path = match &of.path {
        None => PathMatch::Prefix("".into()),
        Some(Path::Exact(path)) => {
            let path = problems.within("exact", |p| read_path(path, p, &mut invalid));
            PathMatch::Exact(path.into())
        }
        Some(Path::Prefix(path)) => {
            let path = problems.within("prefix", |p| read_path(path, p, &mut invalid));
            PathMatch::Prefix(path.strip_suffix('/').unwrap_or(&path).into())
        }
        Some(Path::PathRegex(pattern)) => {
            let length = pattern.chars().count();
            let literal = literal_prefix(pattern).into();
            match compile_regex(pattern) {
                Ok(regex) => PathMatch::Regex {
                    regex,
                    length,
                    literal,
                },
                Err(reason) => {
                    invalid = Some(problems.within("path_regex", |p| p.add(reason)));
                    PathMatch::InvalidRegex { length, literal }
                }
            }
        }
    };
    let method = match of.method.as_str() {
        "" => None,
        method => match Method::from_bytes(method.as_bytes()) {
            Ok(method) => Some(method),
            Err(_) => {
                invalid = Some(problems.within("method", |p| p.add("is no method")));
                None
            }
        },
    };
    let (headers, mut claims) = read_headers(&of.headers, problems, &mut invalid);
    let mut query: Vec<QueryMatch> = Vec::with_capacity(of.query_params.len());
    for (index, param) in of.query_params.iter().enumerate() {
        // HTTPRouteMatch.queryParams: of equal names only the first counts.
        if query
            .iter()
            .any(|q| *q.name == *param.name && q.invert == param.invert)
        {
            continue;
        }
        let test = problems.within(format_args!("query_params[{index}]"), |problems| {
            if param.name.is_empty() {
                invalid = Some(problems.add("has no name"));
                return TextMatch::Invalid;
            }
            read_text(param.value.as_ref(), problems, &mut invalid)
        });
        query.push(QueryMatch {
            name: param.name.as_str().into(),
            test,
            invert: param.invert,
        });
    }
    for (index, claim) in of.claims.iter().enumerate() {
        let read = |problems: &mut Problems| read_claim(claim, problems, &mut invalid);
        claims.push(problems.within(format_args!("claims[{index}]"), read));
    }
    RequestMatch {
        path,
        method,
        headers: headers.into(),
        query: query.into(),
        claims: claims.into(),
        invalid,
    }
}

/// A path that begins with a slash, whatever was written.
fn read_path(path: &str, problems: &mut Problems, invalid: &mut Option<Arc<str>>) -> String {
    if path.starts_with('/') {
        return path.to_owned();
    }
    *invalid = Some(problems.add("does not begin with a slash"));
    format!("/{path}")
}

fn read_grpc_match(of: &proto::GrpcMatch, problems: &mut Problems) -> RequestMatch {
    let mut invalid = None;
    let mut pattern = |field: &str, text: &str| {
        if text.is_empty() {
            return None;
        }
        if !of.regex {
            return Some(NamePattern::Exact(text.into()));
        }
        let length = text.chars().count();
        Some(match compile_regex(text) {
            Ok(regex) => NamePattern::Regex { regex, length },
            Err(reason) => {
                invalid = Some(problems.within(field, |problems| problems.add(reason)));
                NamePattern::Invalid { length }
            }
        })
    };
    let path = PathMatch::Grpc {
        service: pattern("service", &of.service),
        method: pattern("method", &of.method),
    };
    let (headers, claims) = read_headers(&of.headers, problems, &mut invalid);
    RequestMatch {
        headers: headers.into(),
        claims: claims.into(),
        invalid,
        ..RequestMatch::everything(path)
    }
}

/// Header matches, and those that name claims in Istio's way.
fn read_headers(
    matches: &[proto::NameMatch],
    problems: &mut Problems,
    invalid: &mut Option<Arc<str>>,
) -> (Vec<HeaderMatch>, Vec<ClaimMatch>) {
    let mut headers: Vec<HeaderMatch> = Vec::with_capacity(matches.len());
    let mut claims = Vec::new();
    for (index, header) in matches.iter().enumerate() {
        problems.within(format_args!("headers[{index}]"), |problems| {
            if header.name.starts_with("@request.auth.claims") {
                claims.push(read_claim(header, problems, invalid));
                return;
            }
            let source = if is_host(&header.name) {
                HeaderSource::Authority
            } else if let Ok(name) = header.name.parse::<HeaderName>() {
                HeaderSource::Header(name)
            } else {
                let reason = problems.within("name", |p| p.add("is no header name"));
                *invalid = Some(reason);
                HeaderSource::Invalid
            };
            // HTTPRouteMatch.headers: of equal names only the first counts.
            let same = |h: &HeaderMatch| h.source == source && h.invert == header.invert;
            if headers.iter().any(same) {
                return;
            }
            headers.push(HeaderMatch {
                test: read_text(header.value.as_ref(), problems, invalid),
                source,
                invert: header.invert,
            });
        });
    }
    (headers, claims)
}

fn read_claim(
    claim: &proto::NameMatch,
    problems: &mut Problems,
    invalid: &mut Option<Arc<str>>,
) -> ClaimMatch {
    let path = claims::parse_path(&claim.name).unwrap_or_else(|| {
        *invalid = Some(problems.within("name", |problems| problems.add("is no claim")));
        Box::default()
    });
    ClaimMatch {
        path,
        test: read_text(claim.value.as_ref(), problems, invalid),
        invert: claim.invert,
    }
}

pub(super) fn read_text(
    value: Option<&proto::StringMatch>,
    problems: &mut Problems,
    invalid: &mut Option<Arc<str>>,
) -> TextMatch {
    use proto::string_match::Kind;
    problems.within("value", |problems| {
        let reason = match value.and_then(|value| value.kind.as_ref()) {
            Some(Kind::Exact(text)) => return TextMatch::Exact(text.as_str().into()),
            Some(Kind::Prefix(text)) => return TextMatch::Prefix(text.as_str().into()),
            Some(Kind::Suffix(text)) => return TextMatch::Suffix(text.as_str().into()),
            Some(Kind::Present(true)) => return TextMatch::Present,
            Some(Kind::Present(false)) => "present: false is not known; invert is".to_owned(),
            Some(Kind::Regex(pattern)) => match compile_regex(pattern) {
                Ok(regex) => return TextMatch::Regex(regex),
                Err(reason) => reason,
            },
            None => "is absent".to_owned(),
        };
        *invalid = Some(problems.add(reason));
        TextMatch::Invalid
    })
}

fn read_backends(backends: &[proto::Backend], problems: &mut Problems) -> Backends {
    let mut read = Vec::with_capacity(backends.len());
    for (index, backend) in backends.iter().enumerate() {
        let one = |problems: &mut Problems| {
            let filters = super::filter::read(&backend.filters, problems);
            let target = read_target(backend, problems)?;
            if let Some(reason) = &filters.invalid {
                return Err(Arc::clone(reason));
            }
            if filters.answers() {
                // HTTPBackendRef.filters: for what is forwarded. The choice of a backend comes
                // after the moment for answering.
                let reason = "a backend's filters can only change requests and responses";
                return Err(problems.within("filters", |problems| problems.add(reason)));
            }
            Ok(Backend::new(target, filters))
        };
        let one = problems.within(format_args!("backends[{index}]"), one);
        read.push((backend.weight, one));
    }
    Backends::new(read)
}

pub(super) fn read_target(
    backend: &proto::Backend,
    problems: &mut Problems,
) -> Result<Target, Arc<str>> {
    use proto::backend::To;
    let to = match &backend.to {
        Some(To::Service(to)) => to,
        Some(To::Invalid(reason)) => return Err(problems.name(reason)),
        None => return Err(problems.add("names nothing")),
    };
    let service = to.service.as_ref().filter(|s| !s.hostname.is_empty());
    let Some(service) = service else {
        return Err(problems.add("names no service"));
    };
    let port = u16::try_from(to.port).ok().filter(|port| *port != 0);
    let Some(port) = port else {
        return Err(problems.within("service.port", |problems| problems.add("is no port")));
    };
    Ok(Target {
        service: service_name(service),
        port,
        subset: (!to.subset.is_empty()).then(|| to.subset.as_str().into()),
    })
}

/// A span of time that is not negative.
pub(super) fn read_duration(
    value: Option<&prost_types::Duration>,
    problems: &mut Problems,
) -> Result<Option<Duration>, Arc<str>> {
    let Some(value) = value else { return Ok(None) };
    match adit_shared::proto::duration(value) {
        Some(duration) => Ok(Some(duration)),
        None => Err(problems.add("is no span of time")),
    }
}
