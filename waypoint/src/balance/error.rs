//! Why no endpoint could be had.

use std::fmt;
use std::sync::Arc;

/// Why a request got no endpoint, or no place among the requests that are allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PickError {
    /// The service has no endpoints at all.
    #[error("the service has no endpoints")]
    NoEndpoints,
    /// It has, but of all of them only names are known, and names are not looked up here.
    #[error("the service's endpoints have names and no addresses")]
    NoAddresses,
    /// It has, but none is ready.
    #[error("no endpoint is ready")]
    NoHealthyEndpoints,
    /// All that are ready are ejected.
    #[error("every endpoint is ejected by outlier detection")]
    AllEjected,
    /// None of the service's endpoints belongs to the subset.
    #[error("the subset has no endpoints")]
    SubsetEmpty,
    /// The traffic policy has no subset of that name.
    #[error("there is no subset {0:?}")]
    UnknownSubset(Arc<str>),
    /// Locality is strict and no ready endpoint is near enough.
    #[error("no ready endpoint is as near as the service demands")]
    NoLocalEndpoints,
    /// A circuit breaker is open.
    #[error("limit of {0} reached")]
    Overflow(Resource),
    /// The traffic policy cannot be understood.
    #[error("invalid traffic policy: {0}")]
    InvalidPolicy(Arc<str>),
}

/// What a circuit breaker bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resource {
    /// Open connections.
    Connections,
    /// Requests that wait for a connection.
    Pending,
    /// Requests in flight.
    Requests,
    /// Retries in flight, by number.
    Retries,
    /// Retries in flight, as a share of the requests.
    RetryBudget,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connections => "connections",
            Self::Pending => "pending requests",
            Self::Requests => "requests",
            Self::Retries => "retries",
            Self::RetryBudget => "the retry budget",
        })
    }
}

impl PickError {
    /// The word for headers and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoEndpoints => "no_endpoints",
            Self::NoAddresses => "endpoints_without_address",
            Self::NoHealthyEndpoints => "no_healthy_endpoints",
            Self::AllEjected => "all_ejected",
            Self::SubsetEmpty => "subset_empty",
            Self::UnknownSubset(_) => "unknown_subset",
            Self::NoLocalEndpoints => "no_local_endpoints",
            Self::Overflow(Resource::Connections) => "connection_limit",
            Self::Overflow(Resource::Pending) => "pending_limit",
            Self::Overflow(Resource::Requests) => "request_limit",
            Self::Overflow(Resource::Retries) => "retry_limit",
            Self::Overflow(Resource::RetryBudget) => "retry_budget",
            Self::InvalidPolicy(_) => "invalid_traffic_policy",
        }
    }

    /// Envoy's response flag (`%RESPONSE_FLAGS%`): `UH` no healthy upstream, `UO`
    /// upstream overflow, `NC` no cluster, `URX` retry limit exceeded.
    pub fn response_flag(&self) -> &'static str {
        match self {
            Self::NoEndpoints
            | Self::NoAddresses
            | Self::NoHealthyEndpoints
            | Self::AllEjected
            | Self::SubsetEmpty
            | Self::NoLocalEndpoints => "UH",
            Self::Overflow(Resource::Retries | Resource::RetryBudget) => "URX",
            Self::Overflow(_) => "UO",
            Self::UnknownSubset(_) | Self::InvalidPolicy(_) => "NC",
        }
    }

    /// The status of the answer: 503, and 500 where the configuration is at fault.
    pub fn status(&self) -> http::StatusCode {
        match self {
            Self::InvalidPolicy(_) => http::StatusCode::INTERNAL_SERVER_ERROR,
            _ => http::StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}
