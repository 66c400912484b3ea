//! ExternalAuth.

use http::HeaderName;

use super::super::backend::Target;

/// HTTPExternalAuthFilter: a service is asked whether a request may pass. Rules that ask the
/// same in the same way have equal values, and may share their connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExternalAuth {
    /// The service.
    pub target: Target,
    /// Bytes of the body that go along, whole; 0: none. Of a longer body nobody is asked.
    pub body_limit: usize,
    /// How it is asked.
    pub protocol: AuthProtocol,
}

/// How a service of [`ExternalAuth`] is asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AuthProtocol {
    /// By a request like the one in question; 200 lets it pass.
    Http {
        /// Before its path; empty or with a slash at the beginning.
        path_prefix: Box<str>,
        /// Headers that go along, beside those that always do.
        allowed: Box<[HeaderName]>,
        /// Headers of the answer that the request gets; empty: all that may be.
        response: Box<[HeaderName]>,
    },
    /// By Envoy's protocol.
    Grpc {
        /// Headers that go along; empty: all.
        allowed: Box<[HeaderName]>,
    },
}
