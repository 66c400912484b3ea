//! Answers that the waypoint gives itself: a status, a reason in `x-adit-reason`, and for gRPC
//! a status in trailers (a trailers-only response), as Envoy answers.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};

use super::body::ResponseBody;
use super::headers::REASON;
use crate::telemetry::ResponseFlags;

/// An answer of our own, by its cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: StatusCode,
    /// Envoy's flags for the cause.
    pub flags: ResponseFlags,
    /// One word for the cause, for `x-adit-reason` and the log.
    pub reason: &'static str,
    /// The gRPC status, where it is not the one that the HTTP status stands for.
    pub grpc: Option<u8>,
    /// What a person reads.
    pub text: &'static str,
}

impl Reply {
    /// An answer with the reason as its text.
    pub const fn new(status: StatusCode, flags: ResponseFlags, reason: &'static str) -> Self {
        Self {
            status,
            flags,
            reason,
            grpc: None,
            text: reason,
        }
    }

    /// The request breaks HTTP.
    pub const fn bad_request(reason: &'static str) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
            reason,
        )
    }

    /// What was dialled is not known any more.
    pub const GONE: Self = Self::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::NO_CLUSTER,
        "destination_unknown",
    );
    /// No endpoint may be used.
    pub const NO_HEALTHY_ENDPOINTS: Self = Self {
        text: "no healthy upstream",
        ..Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            ResponseFlags::NO_HEALTHY_UPSTREAM,
            "no_healthy_endpoints",
        )
    };
    /// The route's backend is invalid or unknown (Gateway API: 500).
    pub const INVALID_BACKEND: Self = Self::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        ResponseFlags::NO_CLUSTER,
        "invalid_backend",
    );
    /// The route that matches cannot be understood (Gateway API: 500).
    pub const INVALID_ROUTE: Self = Self {
        reason: "invalid_route",
        ..Self::INVALID_BACKEND
    };
    /// The backend has no such subset.
    pub const UNKNOWN_SUBSET: Self = Self {
        status: StatusCode::SERVICE_UNAVAILABLE,
        reason: "unknown_subset",
        ..Self::INVALID_BACKEND
    };
    /// No route matches (Gateway API: 404, UNIMPLEMENTED).
    pub const NO_ROUTE: Self = Self {
        grpc: Some(12),
        ..Self::new(StatusCode::NOT_FOUND, ResponseFlags::NO_ROUTE, "no_route")
    };
    /// A policy denies.
    pub const DENIED: Self = Self {
        text: "RBAC: access denied",
        ..Self::new(StatusCode::FORBIDDEN, ResponseFlags::NONE, "rbac_denied")
    };
    /// The route's time for the request is over.
    pub const REQUEST_TIMEOUT: Self = Self {
        grpc: Some(4),
        text: "upstream request timeout",
        ..Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            ResponseFlags::UPSTREAM_TIMEOUT,
            "request_timeout",
        )
    };
    /// The client has stopped in the middle of its request.
    pub const BODY_TIMEOUT: Self = Self::new(
        StatusCode::REQUEST_TIMEOUT,
        ResponseFlags::STREAM_IDLE_TIMEOUT,
        "request_body_timeout",
    );
    /// The last try's time is over.
    pub const PER_TRY_TIMEOUT: Self = Self {
        reason: "per_try_timeout",
        ..Self::REQUEST_TIMEOUT
    };
    /// A token is no good.
    pub const UNAUTHENTICATED: Self = Self::new(
        StatusCode::UNAUTHORIZED,
        ResponseFlags::NONE,
        "jwt_authn_access_denied",
    );
    /// The endpoint could not be connected to.
    pub const CONNECT_FAILED: Self = Self::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
        "upstream_connect_failure",
    );
    /// The endpoint refused the connection.
    pub const CONNECT_REFUSED: Self = Self {
        reason: "upstream_connect_refused",
        ..Self::CONNECT_FAILED
    };
    /// The endpoint did not accept in time.
    pub const CONNECT_TIMEOUT: Self = Self {
        reason: "upstream_connect_timeout",
        ..Self::CONNECT_FAILED
    };
    /// TLS towards the endpoint failed, or it is not who it should be.
    pub const TLS_FAILED: Self = Self {
        reason: "upstream_tls_failure",
        ..Self::CONNECT_FAILED
    };
    /// The endpoint ended the connection before it answered.
    pub const UPSTREAM_CLOSED: Self = Self::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::UPSTREAM_TERMINATION,
        "upstream_closed",
    );
    /// The endpoint reset the request.
    pub const UPSTREAM_RESET: Self = Self::new(
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::UPSTREAM_RESET,
        "upstream_reset",
    );
    /// The endpoint's answer is no HTTP.
    pub const UPSTREAM_PROTOCOL: Self = Self::new(
        StatusCode::BAD_GATEWAY,
        ResponseFlags::UPSTREAM_PROTOCOL_ERROR,
        "upstream_protocol_error",
    );
    /// The client's body ended early or broke the protocol.
    pub const BODY_FAILED: Self = Self::bad_request("request_body_failed");

    /// The response, in gRPC's form where the request was gRPC.
    pub fn response(&self, grpc: bool) -> Response<ResponseBody> {
        let reason = HeaderValue::from_static(self.reason);
        if grpc {
            let code = self.grpc.unwrap_or_else(|| grpc_status(self.status));
            let mut response = Response::new(ResponseBody::empty());
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(u16::from(code)));
            headers.insert("grpc-message", HeaderValue::from_static(self.text));
            headers.insert(REASON, reason);
            return response;
        }
        let mut response =
            Response::new(ResponseBody::full(Bytes::from_static(self.text.as_bytes())));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        headers.insert(REASON, reason);
        response
    }

    /// The response as HTTP/1 has it, for a connection that ends with it.
    pub fn head_and_body(&self) -> Bytes {
        let Self {
            status,
            reason,
            text,
            ..
        } = self;
        let length = text.len();
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\n\
             connection: close\r\n{REASON}: {reason}\r\n\r\n{text}"
        )
        .into()
    }

    /// The gRPC status that a gRPC client sees.
    pub fn grpc_code(&self) -> u8 {
        self.grpc.unwrap_or_else(|| grpc_status(self.status))
    }
}

/// gRPC's status for an HTTP status (grpc/doc/http-grpc-status-mapping.md).
pub fn grpc_status(status: StatusCode) -> u8 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}
