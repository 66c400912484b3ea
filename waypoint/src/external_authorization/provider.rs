//! A provider of MeshConfig, or the filter of a rule, read.

use adit_shared::proto::waypoint as proto;
use http::{HeaderName, HeaderValue, StatusCode};

use crate::route::{AuthProtocol, ExternalAuth};

/// What holds for both kinds of provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The request passes when the service cannot be asked.
    pub fail_open: bool,
    /// The answer otherwise.
    pub status_on_error: StatusCode,
    /// Headers that the service changes may lead to another route.
    pub clear_route_cache: bool,
    /// Bytes of the body that the service sees; 0: none.
    pub body_limit: usize,
    /// A longer body is cut; otherwise it is refused with 413.
    pub partial_body: bool,
    /// The body is sent as bytes, not as text.
    pub body_as_bytes: bool,
}

/// The larger of the bounds for bodies is this, whatever the provider says.
const MAX_BODY: usize = 16 << 20;

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Grpc(GrpcSettings),
    Http(HttpSettings),
}

#[derive(Debug, Clone, Default)]
pub(super) struct GrpcSettings {
    /// Headers that go along; empty: all.
    pub(super) include: Vec<Matcher>,
}

#[derive(Debug, Clone)]
pub(super) struct HttpSettings {
    pub(super) path_prefix: String,
    pub(super) include: Vec<Matcher>,
    pub(super) additional: Vec<(HeaderName, HeaderValue)>,
    pub(super) upstream_on_allow: Vec<Matcher>,
    pub(super) downstream_on_allow: Vec<Matcher>,
    pub(super) downstream_on_deny: Vec<Matcher>,
}

/// A pattern for header names: exact, `prefix*`, `*suffix`, `*`. Case does not matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Matcher {
    /// Every name.
    Any,
    /// Every name but those that say something of the body that they come with.
    NotOfBody,
    /// This name.
    Exact(String),
    /// Names that begin so.
    Prefix(String),
    /// Names that end so.
    Suffix(String),
}

impl Matcher {
    /// Reads a pattern.
    pub fn parse(pattern: &str) -> Self {
        let pattern = pattern.to_ascii_lowercase();
        if pattern == "*" {
            return Self::Any;
        }
        if let Some(prefix) = pattern.strip_suffix('*') {
            return Self::Prefix(prefix.to_owned());
        }
        match pattern.strip_prefix('*') {
            Some(suffix) => Self::Suffix(suffix.to_owned()),
            None => Self::Exact(pattern),
        }
    }

    /// Whether it means `name`.
    pub fn matches(&self, name: &HeaderName) -> bool {
        let name = name.as_str();
        match self {
            Self::Any => true,
            Self::NotOfBody => !name.starts_with("content-"),
            Self::Exact(of) => name == of,
            Self::Prefix(of) => name.starts_with(of.as_str()),
            Self::Suffix(of) => name.ends_with(of.as_str()),
        }
    }
}

/// A provider that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProviderError {
    /// It is of another kind.
    #[error("provider {0:?} is not one for external authorization")]
    Kind(String),
    /// The user's mistake, as the control plane words it.
    #[error("provider {0:?}: {1}")]
    Invalid(String, String),
}

pub(super) fn read(
    provider: &proto::Provider,
) -> Result<(Settings, Kind, proto::ProviderService), ProviderError> {
    use proto::provider::Kind as Of;
    let invalid = |what: String| ProviderError::Invalid(provider.name.clone(), what);
    let (common, kind) = match &provider.kind {
        Some(Of::ExtAuthzGrpc(of)) => (&of.common, Kind::Grpc(GrpcSettings::default())),
        Some(Of::ExtAuthzHttp(of)) => {
            let matchers = |of: &[String]| of.iter().map(|p| Matcher::parse(p)).collect();
            let mut additional = Vec::new();
            for header in &of.include_additional_headers {
                let name = HeaderName::try_from(&header.name);
                let value = HeaderValue::try_from(&header.value);
                let (Ok(name), Ok(value)) = (name, value) else {
                    let what = format!("includeAdditionalHeadersInCheck[{}]", header.name);
                    return Err(invalid(what));
                };
                additional.push((name, value));
            }
            if !of.path_prefix.is_empty() && !of.path_prefix.starts_with('/') {
                return Err(invalid("pathPrefix does not begin with /".into()));
            }
            let http = HttpSettings {
                path_prefix: of.path_prefix.trim_end_matches('/').to_owned(),
                include: matchers(&of.include_request_headers),
                additional,
                upstream_on_allow: matchers(&of.headers_to_upstream_on_allow),
                downstream_on_allow: matchers(&of.headers_to_downstream_on_allow),
                downstream_on_deny: matchers(&of.headers_to_downstream_on_deny),
            };
            (&of.common, Kind::Http(http))
        }
        Some(Of::Invalid(what)) => return Err(invalid(what.clone())),
        _ => return Err(ProviderError::Kind(provider.name.clone())),
    };
    let Some(common) = common else {
        return Err(invalid("service is missing".into()));
    };
    let service = common.service.clone().unwrap_or_default();
    if service.hostname.is_empty() || !(1..=65_535).contains(&service.port) {
        return Err(invalid("service or port is missing".into()));
    }
    let status_on_error = match common.status_on_error {
        0 => StatusCode::FORBIDDEN,
        code => u16::try_from(code)
            .ok()
            .and_then(|code| StatusCode::from_u16(code).ok())
            .ok_or_else(|| invalid(format!("statusOnError {code} is no status")))?,
    };
    let settings = Settings {
        fail_open: common.fail_open,
        status_on_error,
        clear_route_cache: common.clear_route_cache,
        body_limit: (common.body_max_bytes as usize).min(MAX_BODY),
        partial_body: common.body_allow_partial,
        body_as_bytes: common.body_pack_as_bytes,
    };
    Ok((settings, kind, service))
}

pub(super) fn of_rule(auth: &ExternalAuth) -> (Settings, Kind) {
    let exact = |names: &[HeaderName]| {
        let names = names.iter();
        names.map(|name| Matcher::Exact(name.to_string())).collect()
    };
    let kind = match &auth.protocol {
        AuthProtocol::Grpc { allowed } => Kind::Grpc(GrpcSettings {
            include: exact(allowed),
        }),
        AuthProtocol::Http {
            path_prefix,
            allowed,
            response,
        } => Kind::Http(HttpSettings {
            path_prefix: path_prefix.to_string(),
            include: exact(allowed),
            additional: Vec::new(),
            upstream_on_allow: match response.is_empty() {
                // HTTPAuthConfig.allowedResponseHeaders: all. The request has a body of its own.
                true => vec![Matcher::NotOfBody],
                false => exact(response),
            },
            downstream_on_allow: Vec::new(),
            downstream_on_deny: Vec::new(),
        }),
    };
    let settings = Settings {
        fail_open: false,
        status_on_error: StatusCode::FORBIDDEN,
        clear_route_cache: false,
        body_limit: auth.body_limit.min(MAX_BODY),
        // HTTPExternalAuthFilter.forwardBody: longer ones "must be rejected".
        partial_body: false,
        body_as_bytes: false,
    };
    (settings, kind)
}
