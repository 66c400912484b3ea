//! Who calls: service-account tokens, and what else a request says about its sender.

mod jwt;
mod token_review;
mod trusted;

use std::net::IpAddr;

use futures_util::future::BoxFuture;
use http::HeaderMap;

pub use jwt::{JwtAuthenticator, KeyError};
pub use token_review::{ReviewOptions, TokenReviewer};
pub use trusted::{TrustedAccounts, TrustedAccountsError};

/// The audience that the tokens of node proxies have, as in Istio.
pub const AUDIENCE: &str = "istio-ca";

/// Longer tokens are not looked at.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// Who a request comes from, as its token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
    /// The pod's name.
    pub pod_name: String,
    /// The pod's uid.
    pub pod_uid: String,
    /// The node that the pod runs on.
    pub node: String,
}

impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            namespace,
            service_account,
            pod_name,
            node,
            ..
        } = self;
        write!(
            f,
            "{namespace}/{service_account} pod {pod_name} node {node}"
        )
    }
}

/// Finds out who a token belongs to. A trait because a Kubernetes API server is asked over
/// the network (TokenReview), while a directory of manifests has a key file.
pub trait Authenticator: Send + Sync {
    /// Verifies a bearer token that `peer` brought, whoever that is: it may have no more than
    /// its share of what verifying costs.
    fn authenticate<'a>(
        &'a self,
        token: &'a str,
        peer: Option<IpAddr>,
    ) -> BoxFuture<'a, Result<Caller, AuthError>>;
}

/// Why a caller is not known. It is logged and counted; the caller is told nothing of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No `authorization` header, or not a bearer token.
    #[error("there is no bearer token")]
    Missing,
    /// Absurdly long.
    #[error("the token is longer than {MAX_TOKEN_BYTES} bytes")]
    TooLong,
    /// Signature, audience, time or form.
    #[error("the token is not valid: {0}")]
    Invalid(String),
    /// It lacks what Kubernetes puts into the tokens of pods.
    #[error("the token has no claim {0}")]
    Claim(&'static str),
    /// The verifier itself is in trouble; a retry can help.
    #[error("tokens cannot be verified now: {0}")]
    Unavailable(String),
}

/// The bearer token of a request.
///
/// # Errors
/// [`AuthError::Missing`], [`AuthError::TooLong`].
pub fn bearer_token(headers: &HeaderMap) -> Result<&str, AuthError> {
    let value = headers
        .get(http::header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .ok_or(AuthError::Missing)?;
    let (scheme, token) = value.split_once(' ').ok_or(AuthError::Missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") || token.trim().is_empty() {
        return Err(AuthError::Missing);
    }
    if token.len() > MAX_TOKEN_BYTES {
        return Err(AuthError::TooLong);
    }
    Ok(token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bearer_token_is_one() {
        let long = format!("Bearer {}", "x".repeat(MAX_TOKEN_BYTES + 1));
        for (value, expected) in [
            (Some("Bearer abc"), Ok("abc")),
            (Some("bearer  abc "), Ok("abc")),
            (None, Err(AuthError::Missing)),
            (Some(""), Err(AuthError::Missing)),
            (Some("Bearer"), Err(AuthError::Missing)),
            (Some("Bearer "), Err(AuthError::Missing)),
            (Some("Basic abc"), Err(AuthError::Missing)),
            (Some(long.as_str()), Err(AuthError::TooLong)),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                let value = value.parse().expect("legal");
                headers.insert(http::header::AUTHORIZATION, value);
            }
            assert_eq!(bearer_token(&headers), expected, "{value:?}");
        }
    }
}
