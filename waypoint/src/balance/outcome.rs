//! How a request to an endpoint went, as far as balancing is concerned.

use std::time::Duration;

/// How a request to an endpoint went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What became of it.
    pub result: RequestResult,
    /// Time to the response's head, or to the failure; `None`: not to be taken into
    /// account.
    pub latency: Option<Duration>,
}

/// What became of a request to an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestResult {
    /// An answer with this HTTP status; for gRPC see [`RequestResult::from_grpc`].
    Status(u16),
    /// No connection: refused, TLS failed, the tunnel was not opened.
    ConnectFailed,
    /// The connection or stream was reset before the answer.
    Reset,
    /// No answer in time.
    Timeout,
}

impl RequestResult {
    /// What a `grpc-status` counts as (Envoy's `grpcToHttpStatus`).
    pub fn from_grpc(status: u32) -> Self {
        Self::Status(match status {
            0 => 200,
            // CANCELLED
            1 => 499,
            // INVALID_ARGUMENT, FAILED_PRECONDITION, OUT_OF_RANGE
            3 | 9 | 11 => 400,
            // DEADLINE_EXCEEDED
            4 => 504,
            // NOT_FOUND
            5 => 404,
            // ALREADY_EXISTS, ABORTED
            6 | 10 => 409,
            // PERMISSION_DENIED
            7 => 403,
            // RESOURCE_EXHAUSTED
            8 => 429,
            // UNIMPLEMENTED
            12 => 501,
            // UNAVAILABLE
            14 => 503,
            // UNAUTHENTICATED
            16 => 401,
            // UNKNOWN, INTERNAL, DATA_LOSS and what is not assigned
            _ => 500,
        })
    }
}

impl Outcome {
    /// The outcome with its latency.
    pub fn new(result: RequestResult, latency: Duration) -> Self {
        Self {
            result,
            latency: Some(latency),
        }
    }

    /// There was no answer.
    pub(super) fn is_unanswered(self) -> bool {
        !matches!(self.result, RequestResult::Status(_))
    }

    /// There was one, and it was no server error.
    pub(super) fn is_success(self) -> bool {
        matches!(self.result, RequestResult::Status(status) if !(500..600).contains(&status))
    }

    /// 502, 503 or 504, or what a gateway would make one of.
    pub(super) fn is_gateway_error(self) -> bool {
        match self.result {
            RequestResult::Status(status) => matches!(status, 502..=504),
            _ => true,
        }
    }
}
