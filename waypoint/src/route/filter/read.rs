//! Filters from the wire form.

use std::sync::Arc;

use adit_shared::proto::waypoint as proto;
use http::StatusCode;
use http::header::{HeaderName, HeaderValue};
use http::uri::Authority;

use super::super::convert::{read_duration, read_target, read_text};
use super::super::problem::Problems;
use super::{
    Abort, Allowed, AuthProtocol, Cors, DirectResponse, ExternalAuth, Fault, Filters,
    HeaderModifier, Mirror, Origin, PathModifier, Redirect, Rewrite, is_framing, is_host,
};

/// A million: everything.
const ALL: u32 = 1_000_000;

/// Why a filter cannot work.
type Invalid = Arc<str>;

pub(in crate::route) fn read(filters: &[proto::Filter], problems: &mut Problems) -> Filters {
    let mut read = Filters::default();
    for (index, filter) in filters.iter().enumerate() {
        let one = |problems: &mut Problems| read_one(filter, &mut read, problems);
        if let Err(reason) = problems.within(format_args!("filters[{index}]"), one) {
            read.invalid.get_or_insert(reason);
        }
    }
    let answers = [read.redirect.is_some(), read.direct_response.is_some()];
    if answers.iter().filter(|is| **is).count() + usize::from(read.rewrite.is_some()) > 1 {
        // HTTPRequestRedirectFilter: not "on the same Route rule as a HTTPURLRewrite filter".
        let reason = problems.within("filters", |problems| {
            problems.add("redirect, rewrite and direct response exclude each other")
        });
        read.invalid.get_or_insert(reason);
    }
    read
}

fn read_one(
    filter: &proto::Filter,
    read: &mut Filters,
    problems: &mut Problems,
) -> Result<(), Invalid> {
    use proto::filter::Kind;
    let Some(kind) = &filter.kind else {
        return Err(problems.add("not known"));
    };
    match kind {
        Kind::RequestHeaders(modifier) => {
            let modifier = read_modifier(modifier, true, problems)?;
            read.request_headers.push(modifier);
        }
        Kind::ResponseHeaders(modifier) => {
            let modifier = read_modifier(modifier, false, problems)?;
            read.response_headers.push(modifier);
        }
        Kind::Redirect(redirect) => {
            let redirect = read_redirect(redirect, problems)?;
            once(&mut read.redirect, redirect, problems)?;
        }
        Kind::Rewrite(rewrite) => {
            let rewrite = Rewrite {
                host: read_hostname(&rewrite.hostname, problems)?,
                path: read_path(rewrite.path.as_ref(), problems)?,
            };
            once(&mut read.rewrite, rewrite, problems)?;
        }
        Kind::Mirror(mirror) => {
            let backend = mirror.backend.clone().unwrap_or_default();
            // HTTPRequestMirrorFilter: an invalid backend "must be dropped"; the requests
            // themselves are not concerned.
            if let Ok(target) = read_target(&backend, problems) {
                read.mirrors.push(Mirror {
                    target,
                    per_million: mirror.per_million.min(ALL),
                });
            }
        }
        Kind::Cors(cors) => {
            let cors = read_cors(cors, problems)?;
            once(&mut read.cors, cors, problems)?;
        }
        Kind::Fault(fault) => {
            let fault = read_fault(fault, problems)?;
            once(&mut read.fault, fault, problems)?;
        }
        Kind::DirectResponse(direct) => {
            let direct = DirectResponse {
                status: read_status(direct.status, problems)?,
                body: direct.body.clone().into(),
            };
            once(&mut read.direct_response, direct, problems)?;
        }
        Kind::ExternalAuth(auth) => {
            let auth = Arc::new(read_external_auth(auth, problems)?);
            once(&mut read.external_auth, auth, problems)?;
        }
        Kind::Invalid(reason) => return Err(problems.name(reason)),
    }
    Ok(())
}

/// Gateway API: filters of this type can be used once in a rule.
fn once<T>(slot: &mut Option<T>, value: T, problems: &mut Problems) -> Result<(), Invalid> {
    match slot {
        None => {
            *slot = Some(value);
            Ok(())
        }
        Some(_) => Err(problems.add("there is another filter of this type")),
    }
}

/// An invalid service is nobody who could let anything pass, unlike that of a mirror.
fn read_external_auth(
    auth: &proto::ExternalAuth,
    problems: &mut Problems,
) -> Result<ExternalAuth, Invalid> {
    use proto::external_auth::Protocol;
    let backend = auth.backend.clone().unwrap_or_default();
    let target = problems.within("backend", |problems| read_target(&backend, problems))?;
    let mut names = |field: &str, names: &[String]| {
        problems.within(field, |problems| {
            let parse = |name: &String| {
                let parsed = name.parse::<HeaderName>();
                parsed.map_err(|_| problems.add(format!("{name:?} is no header name")))
            };
            names.iter().map(parse).collect::<Result<Box<[_]>, _>>()
        })
    };
    let protocol = match &auth.protocol {
        Some(Protocol::Http(http)) => {
            let allowed = names("allowed_headers", &http.allowed_headers)?;
            let response = names("allowed_response_headers", &http.allowed_response_headers)?;
            let prefix = &http.path_prefix;
            if !prefix.is_empty() && (!prefix.starts_with('/') || prefix.contains(['?', '#'])) {
                return Err(problems.within("path_prefix", |problems| problems.add("is no path")));
            }
            AuthProtocol::Http {
                path_prefix: prefix.trim_end_matches('/').into(),
                allowed,
                response,
            }
        }
        Some(Protocol::Grpc(grpc)) => AuthProtocol::Grpc {
            allowed: names("allowed_headers", &grpc.allowed_headers)?,
        },
        None => {
            return Err(problems.within("protocol", |problems| problems.add("not known")));
        }
    };
    Ok(ExternalAuth {
        target,
        body_limit: auth.body_max_bytes as usize,
        protocol,
    })
}

fn read_modifier(
    modifier: &proto::HeaderModifier,
    of_request: bool,
    problems: &mut Problems,
) -> Result<HeaderModifier, Invalid> {
    let mut read = HeaderModifier::default();
    for name in &modifier.remove {
        let name = problems.within("remove", |problems| read_header_name(name, problems))?;
        read.remove.push(name);
    }
    for header in &modifier.set {
        problems.within("set", |problems| {
            if of_request && is_host(&header.name) {
                read.host = read_hostname(&header.value, problems)?;
                return Ok::<(), Invalid>(());
            }
            let pair = read_header(header, problems)?;
            push_first(&mut read.set, pair);
            Ok(())
        })?;
    }
    for header in &modifier.add {
        let pair = problems.within("add", |problems| read_header(header, problems))?;
        push_first(&mut read.add, pair);
    }
    Ok(read)
}

/// HTTPHeader.name: of equal names only the first counts.
fn push_first(pairs: &mut Vec<(HeaderName, HeaderValue)>, pair: (HeaderName, HeaderValue)) {
    if !pairs.iter().any(|(name, _)| *name == pair.0) {
        pairs.push(pair);
    }
}

fn read_header(
    header: &proto::Header,
    problems: &mut Problems,
) -> Result<(HeaderName, HeaderValue), Invalid> {
    let name = read_header_name(&header.name, problems)?;
    let value = HeaderValue::from_str(&header.value)
        .map_err(|_| problems.add("is no value of a header"))?;
    Ok((name, value))
}

fn read_header_name(name: &str, problems: &mut Problems) -> Result<HeaderName, Invalid> {
    let parsed: HeaderName = name
        .parse()
        .map_err(|_| problems.add("is no header name"))?;
    if is_framing(&parsed) || is_host(name) {
        return Err(problems.add(format!("{parsed} cannot be changed")));
    }
    Ok(parsed)
}

fn read_hostname(host: &str, problems: &mut Problems) -> Result<Option<Authority>, Invalid> {
    if host.is_empty() {
        return Ok(None);
    }
    let authority: Result<Authority, _> = host.parse();
    match authority {
        Ok(authority) if !host.contains('@') => Ok(Some(authority)),
        _ => Err(problems.within("hostname", |problems| problems.add("is no host name"))),
    }
}

fn read_path(
    path: Option<&proto::PathModifier>,
    problems: &mut Problems,
) -> Result<Option<PathModifier>, Invalid> {
    use proto::path_modifier::Kind;
    let Some(path) = path else { return Ok(None) };
    problems.within("path", |problems| {
        let (Some(Kind::Full(text)) | Some(Kind::Prefix(text))) = &path.kind else {
            return Err(problems.add("not known"));
        };
        let valid = text.parse::<http::uri::PathAndQuery>().is_ok();
        let empty_prefix = text.is_empty() && matches!(path.kind, Some(Kind::Prefix(_)));
        let is_path = text.starts_with('/') && valid && !text.contains(['?', '#']);
        if !is_path && !empty_prefix {
            return Err(problems.add("is no path"));
        }
        Ok(Some(match &path.kind {
            Some(Kind::Prefix(_)) => {
                PathModifier::Prefix(text.strip_suffix('/').unwrap_or(text).into())
            }
            _ => PathModifier::Full(text.as_str().into()),
        }))
    })
}

fn read_redirect(redirect: &proto::Redirect, problems: &mut Problems) -> Result<Redirect, Invalid> {
    let scheme = match redirect.scheme.as_str() {
        "" => None,
        scheme @ ("http" | "https") => Some(scheme.into()),
        _ => return Err(problems.within("scheme", |problems| problems.add("not known"))),
    };
    let hostname = read_hostname(&redirect.hostname, problems)?;
    let port = u16::try_from(redirect.port)
        .map_err(|_| problems.within("port", |problems| problems.add("is no port")))?;
    let status = match redirect.status {
        0 => StatusCode::FOUND,
        301 | 302 | 303 | 307 | 308 => read_status(redirect.status, problems)?,
        _ => return Err(problems.within("status", |problems| problems.add("redirects nowhere"))),
    };
    Ok(Redirect {
        scheme,
        hostname: hostname.map(|host| host.as_str().into()),
        port: (port != 0).then_some(port),
        path: read_path(redirect.path.as_ref(), problems)?,
        status,
    })
}

fn read_cors(cors: &proto::Cors, problems: &mut Problems) -> Result<Cors, Invalid> {
    let mut origins = Vec::with_capacity(cors.allow_origins.len());
    for origin in &cors.allow_origins {
        let parsed = Origin::parse(origin).ok_or_else(|| {
            problems.within("allow_origins", |problems| {
                problems.add(format!("{origin:?} is no origin"))
            })
        })?;
        origins.push(parsed);
    }
    let mut invalid = None;
    let mut origin_matches = Vec::with_capacity(cors.allow_origin_matches.len());
    for (index, of) in cors.allow_origin_matches.iter().enumerate() {
        let read = |problems: &mut Problems| read_text(Some(of), problems, &mut invalid);
        origin_matches.push(problems.within(format_args!("allow_origin_matches[{index}]"), read));
    }
    if let Some(reason) = invalid {
        return Err(reason);
    }
    let mut allowed = |field: &str, names: &[String]| {
        if names.is_empty() {
            return Ok(None);
        }
        if names.iter().any(|name| name == "*") {
            return Ok(Some(Allowed::Any));
        }
        // Methods are tokens as header names are.
        if let Some(bad) = names
            .iter()
            .find(|name| name.parse::<HeaderName>().is_err())
        {
            let reason = format!("{bad:?} is no name");
            return Err(problems.within(field, |problems| problems.add(reason)));
        }
        let list = HeaderValue::from_str(&names.join(","));
        match list {
            Ok(list) => Ok(Some(Allowed::List(list))),
            Err(_) => Err(problems.within(field, |problems| problems.add("is no list"))),
        }
    };
    Ok(Cors {
        origins,
        origin_matches,
        credentials: cors.allow_credentials,
        methods: allowed("allow_methods", &cors.allow_methods)?,
        headers: allowed("allow_headers", &cors.allow_headers)?,
        expose: allowed("expose_headers", &cors.expose_headers)?,
        max_age: (cors.max_age != 0).then(|| HeaderValue::from(cors.max_age)),
    })
}

fn read_fault(fault: &proto::Fault, problems: &mut Problems) -> Result<Fault, Invalid> {
    let delay = problems.within("delay", |p| read_duration(fault.delay.as_ref(), p))?;
    let abort = match (fault.abort_grpc, fault.abort_status) {
        (true, _) => Some(Abort::Grpc(fault.abort_grpc_status)),
        (false, 0) => None,
        (false, status) => Some(Abort::Http(read_status(status, problems)?)),
    };
    Ok(Fault {
        delay: delay.unwrap_or_default(),
        delay_per_million: fault.delay_per_million.min(ALL),
        abort,
        abort_per_million: fault.abort_per_million.min(ALL),
    })
}

/// A final status: an informational one would leave the caller waiting.
fn read_status(status: u32, problems: &mut Problems) -> Result<StatusCode, Invalid> {
    let code = u16::try_from(status)
        .ok()
        .filter(|code| (200..600).contains(code));
    code.and_then(|code| StatusCode::from_u16(code).ok())
        .ok_or_else(|| problems.within("status", |problems| problems.add("is no final status")))
}
