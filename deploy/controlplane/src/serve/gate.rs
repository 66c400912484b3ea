//! The gate before every service: who calls?

use std::net::SocketAddr;
use std::sync::Arc;

use http::{Extensions, HeaderMap};
use tonic::Status;
use tracing::warn;

use super::metrics::Metrics;
use crate::auth::{AuthError, Authenticator, Caller, bearer_token};

/// Where a request came from; put into its extensions by the listener.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Authenticates callers, and says no without saying why.
#[derive(Clone)]
pub(super) struct Gate {
    authenticator: Arc<dyn Authenticator>,
    metrics: Arc<Metrics>,
}

impl Gate {
    pub(super) fn new(authenticator: Arc<dyn Authenticator>, metrics: Arc<Metrics>) -> Self {
        Self {
            authenticator,
            metrics,
        }
    }

    /// Admits a request to `service`, or not, by its headers alone: nothing of what a stranger
    /// sends beyond them is read. [`caller`] finds the caller later.
    pub(super) async fn admit<B>(
        &self,
        service: &'static str,
        request: &mut http::Request<B>,
    ) -> Result<(), Status> {
        let caller = self
            .authenticate(service, request.headers(), request.extensions())
            .await?;
        request.extensions_mut().insert(caller);
        Ok(())
    }

    async fn authenticate(
        &self,
        service: &'static str,
        headers: &HeaderMap,
        extensions: &Extensions,
    ) -> Result<Caller, Status> {
        let peer = extensions.get::<Peer>().map(|peer| peer.0);
        let address = peer.map(|peer| peer.ip().to_canonical());
        let verified = match bearer_token(headers) {
            Ok(token) => self.authenticator.authenticate(token, address).await,
            Err(error) => Err(error),
        };
        verified.map_err(|error| {
            let peer = peer.map(|peer| peer.to_string());
            warn!(service, peer, %error, "caller refused");
            let (reason, status) = match &error {
                AuthError::Missing => ("missing", unauthenticated()),
                AuthError::TooLong => ("too_long", unauthenticated()),
                AuthError::Invalid(_) => ("invalid", unauthenticated()),
                AuthError::Claim(_) => ("claim", unauthenticated()),
                AuthError::Unavailable(_) => (
                    "unavailable",
                    Status::unavailable("tokens cannot be verified now"),
                ),
            };
            self.metrics.authentication_failures.inc(reason);
            status
        })
    }
}

/// The caller of a request that was admitted.
pub(super) fn caller(extensions: &Extensions) -> Result<Caller, Status> {
    extensions.get().cloned().ok_or_else(unauthenticated)
}

/// What a caller is told, whatever is wrong with its token.
pub(super) fn unauthenticated() -> Status {
    Status::unauthenticated("authentication failure")
}
