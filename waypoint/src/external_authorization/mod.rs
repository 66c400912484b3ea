//! Asks another service whether a request may pass: AuthorizationPolicies with action CUSTOM,
//! providers `envoyExtAuthzGrpc` and `envoyExtAuthzHttp`; and rules of routes with the filter
//! ExternalAuth.
//!
//! A service that cannot be asked, answers nonsense or fails denies, with `statusOnError` (403
//! without one), unless the provider says `failOpen`, which a rule cannot. What the service may
//! change is bounded: never the host, the path's meaning for policies that were judged before, or
//! headers that carry the connection.

mod grpc;
mod http;
mod provider;

pub use provider::{Matcher, ProviderError, Settings};

use ::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, request};
use adit_shared::identity::SpiffeId;
use adit_shared::proto::waypoint as proto;
use bytes::Bytes;
use std::net::SocketAddr;
use std::time::SystemTime;

use crate::client::{ClientError, Dial, ServiceClient};
use crate::route::ExternalAuth;
use provider::Kind;

/// What is asked about.
#[derive(Debug)]
pub struct CheckInput<'a> {
    /// Method, headers and URI as they are forwarded: the path is normalised.
    pub request: &'a request::Parts,
    /// Host of the request.
    pub host: &'a str,
    /// When it came.
    pub time: SystemTime,
    /// The client.
    pub source: SocketAddr,
    /// Who it is.
    pub source_identity: Option<&'a SpiffeId>,
    /// What it dialled.
    pub destination: SocketAddr,
    /// Who we are.
    pub destination_identity: &'a SpiffeId,
    /// The first bytes of the body, where [`Settings::body_limit`] wants them.
    pub body: Bytes,
    /// Whether `body` is all of it.
    pub body_is_whole: bool,
}

/// What becomes of the request.
#[derive(Debug)]
pub enum Decision {
    /// It passes, with these changes.
    Allowed(Box<Changes>),
    /// It is answered with this.
    Denied(Box<Denial>),
}

/// Changes to a request that passes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Headers of the request.
    pub request: Vec<HeaderChange>,
    /// Headers of the answer.
    pub response: Vec<HeaderChange>,
    /// Query parameters to set; the last one of a name holds.
    pub set_query: Vec<(String, String)>,
    /// Query parameters to take out.
    pub remove_query: Vec<String>,
    /// The route is looked for again, for the headers have changed.
    pub clear_route_cache: bool,
    /// The service could not be asked, and the provider is open.
    pub failed_open: Option<String>,
}

/// One change of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderChange {
    /// In place of what is there.
    Set(HeaderName, HeaderValue),
    /// Beside what is there.
    Append(HeaderName, HeaderValue),
    /// Only where nothing is there.
    SetIfAbsent(HeaderName, HeaderValue),
    /// Only where something is there.
    Replace(HeaderName, HeaderValue),
    /// Gone.
    Remove(HeaderName),
}

/// The answer to a request that does not pass.
#[derive(Debug, PartialEq, Eq)]
pub struct Denial {
    /// Its status.
    pub status: StatusCode,
    /// Headers that the service adds.
    pub headers: Vec<HeaderChange>,
    /// Its body.
    pub body: Bytes,
    /// The service did not decide so: it could not be asked.
    pub error: Option<String>,
}

impl HeaderChange {
    /// Of which header.
    pub fn name(&self) -> &HeaderName {
        match self {
            Self::Set(name, _)
            | Self::Append(name, _)
            | Self::SetIfAbsent(name, _)
            | Self::Replace(name, _)
            | Self::Remove(name) => name,
        }
    }

    /// Makes the change.
    pub fn apply(&self, headers: &mut HeaderMap) {
        match self {
            Self::Set(name, value) => {
                headers.insert(name, value.clone());
            }
            Self::Append(name, value) => {
                headers.append(name, value.clone());
            }
            Self::SetIfAbsent(name, value) => {
                if !headers.contains_key(name) {
                    headers.insert(name, value.clone());
                }
            }
            Self::Replace(name, value) => {
                if headers.contains_key(name) {
                    headers.insert(name, value.clone());
                }
            }
            Self::Remove(name) => {
                headers.remove(name);
            }
        }
    }
}

/// One provider, or the service of a rule, on one worker.
pub struct ExternalAuthorization<D> {
    settings: Settings,
    kind: Kind,
    client: ServiceClient<D>,
}

impl<D: Dial> ExternalAuthorization<D> {
    /// Reads a provider; `dial` reaches its service.
    ///
    /// # Errors
    /// [`ProviderError`]: requests that would ask it are to be denied.
    pub fn new(provider: &proto::Provider, dial: D) -> Result<Self, ProviderError> {
        let (settings, kind, service) = provider::read(provider)?;
        Ok(Self {
            settings,
            kind,
            client: ServiceClient::new(dial, service),
        })
    }

    /// For the filter of a rule; `dial` reaches its service.
    pub fn of_rule(auth: &ExternalAuth, dial: D) -> Self {
        let (settings, kind) = provider::of_rule(auth);
        let service = proto::ProviderService {
            hostname: auth.target.service.hostname.to_string(),
            port: auth.target.port.into(),
            timeout: None,
        };
        Self {
            settings,
            kind,
            client: ServiceClient::new(dial, service),
        }
    }

    /// What the caller has to know before it asks.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Asks.
    pub async fn check(&self, input: &CheckInput<'_>) -> Decision {
        if !input.body_is_whole && !self.settings.partial_body && self.settings.body_limit > 0 {
            // Envoy's answer where a part of the body is not enough.
            return Decision::Denied(Box::new(Denial {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                headers: Vec::new(),
                body: Bytes::new(),
                error: Some(format!(
                    "the body is not within the {} bytes that are asked about",
                    self.settings.body_limit
                )),
            }));
        }
        let asked = match &self.kind {
            Kind::Grpc(of) => grpc::check(&self.client, of, &self.settings, input).await,
            Kind::Http(of) => http::check(&self.client, of, &self.settings, input).await,
        };
        match asked {
            Ok(Decision::Allowed(mut changes)) => {
                changes.clear_route_cache = self.settings.clear_route_cache
                    && !(changes.request.is_empty()
                        && changes.set_query.is_empty()
                        && changes.remove_query.is_empty());
                Decision::Allowed(changes)
            }
            Ok(denied) => denied,
            Err(error) => self.failed(&error),
        }
    }

    /// The service could not be asked.
    fn failed(&self, error: &CheckError) -> Decision {
        let error = format!("{}: {error}", self.client.authority());
        match self.settings.fail_open {
            true => Decision::Allowed(Box::new(Changes {
                failed_open: Some(error),
                ..Changes::default()
            })),
            false => Decision::Denied(Box::new(Denial {
                status: self.settings.status_on_error,
                headers: Vec::new(),
                body: Bytes::new(),
                error: Some(error),
            })),
        }
    }
}

/// Why the service could not be asked.
#[derive(Debug, thiserror::Error)]
enum CheckError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("malformed answer: {0}")]
    Malformed(String),
    #[error("the request cannot be made: {0}")]
    Request(#[from] ::http::Error),
}

/// Headers that belong to the connection or decide where the request goes: no answer of an
/// authorization service may touch them.
fn is_protected(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "host"
            | "connection"
            | "content-length"
            | "transfer-encoding"
            | "te"
            | "trailer"
            | "upgrade"
            | "keep-alive"
            | "proxy-connection"
            | "x-forwarded-client-cert"
    )
}

#[cfg(test)]
mod tests;
