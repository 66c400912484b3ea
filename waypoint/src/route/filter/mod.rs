//! What a rule, or one of its backends, does to requests and responses.
//!
//! The order is fixed, whatever the order in the object (Gateway API lets an implementation
//! choose): [`Filters::inspect`] looks at the request as it came and may answer it (CORS
//! preflight, injected fault, redirect, direct response). Where another service has to be asked
//! first ([`Filters::external_auth`]), redirect and direct response wait for it
//! ([`Filters::answer_authorized`]), so that they too are for those who may pass, as in Envoy; a
//! preflight, which has no credentials, does not. [`Filters::apply_request`] changes the request
//! on its way to the backend (headers, then URL) and mirrors get what has been changed;
//! [`Filters::apply_response`] changes the response. A backend's filters come after its rule's,
//! and can only change requests and responses.

mod cors;
mod external_auth;
mod fault;
mod headers;
mod mirror;
mod read;
mod redirect;
mod rewrite;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::HeaderMap;
use http::request;
use http::{Method, StatusCode};

pub use cors::CorsGrant;
pub(super) use cors::{Allowed, Cors, Origin};
pub use external_auth::{AuthProtocol, ExternalAuth};
pub(super) use fault::Abort;
pub use fault::Fault;
pub(super) use headers::{HeaderModifier, is_framing, is_host};
pub use mirror::Mirror;
pub(super) use read::read;
pub(super) use redirect::Redirect;
pub use rewrite::RewriteError;
pub(super) use rewrite::{PathModifier, Rewrite};

use super::matching::MatchedPath;

/// The filters of a rule or of a backend.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    /// A filter could not be understood: every request is answered with 500.
    pub(super) invalid: Option<Arc<str>>,
    pub(super) request_headers: Vec<HeaderModifier>,
    pub(super) response_headers: Vec<HeaderModifier>,
    pub(super) rewrite: Option<Rewrite>,
    pub(super) redirect: Option<Redirect>,
    pub(super) direct_response: Option<DirectResponse>,
    pub(super) cors: Option<Cors>,
    pub(super) fault: Option<Fault>,
    pub(super) external_auth: Option<Arc<ExternalAuth>>,
    pub(super) mirrors: Vec<Mirror>,
}

/// An answer written in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectResponse {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// Where a request came in: what a redirect without scheme or port keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// The scheme is `https`.
    pub tls: bool,
    /// The port that was dialled.
    pub port: u16,
}

/// What [`Filters::inspect`] found.
#[derive(Debug, Default)]
#[must_use]
pub struct Inspection {
    /// Wait so long before anything else (an injected delay).
    pub delay: Option<Duration>,
    /// Then answer so; the request goes nowhere.
    pub answer: Option<Answer>,
    /// To be given to [`Filters::apply_response`] with the backend's response.
    pub cors: CorsGrant,
}

/// An answer of the waypoint itself, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its status; for an answer with [`Answer::grpc_status`] 200.
    pub status: StatusCode,
    /// Its headers, changed by the rule's filters already.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// `grpc-status` of an answer without message.
    pub grpc_status: Option<u32>,
    /// Why.
    pub reason: AnswerReason,
}

/// Why a request is answered without a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerReason {
    /// A filter could not be understood.
    Invalid(Arc<str>),
    /// The browser asked what it may do.
    CorsPreflight,
    /// An injected fault.
    Fault,
    /// RequestRedirect.
    Redirect,
    /// A direct response.
    DirectResponse,
}

impl Answer {
    fn new(status: StatusCode, reason: AnswerReason) -> Self {
        Self {
            status,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            grpc_status: None,
            reason,
        }
    }
}

impl Filters {
    /// Looks at a request before anything is changed. `random` gives uniform numbers.
    pub fn inspect(
        &self,
        request: &request::Parts,
        path: MatchedPath,
        listener: Listener,
        random: impl FnMut() -> u64,
    ) -> Inspection {
        if let Some(reason) = &self.invalid {
            let reason = AnswerReason::Invalid(Arc::clone(reason));
            let answer = Answer::new(StatusCode::INTERNAL_SERVER_ERROR, reason);
            return Inspection {
                answer: Some(answer),
                ..Inspection::default()
            };
        }
        let mut inspection = Inspection::default();
        if let Some(cors) = &self.cors {
            if request.method == Method::OPTIONS
                && let Some(answer) = cors.preflight(&request.headers)
            {
                inspection.answer = Some(answer);
                self.modify_response(&mut inspection);
                return inspection;
            }
            inspection.cors = cors.grant(&request.headers);
        }
        if let Some(fault) = &self.fault {
            let injected = fault.draw(random);
            inspection.delay = injected.delay;
            inspection.answer = injected.answer;
        }
        if inspection.answer.is_none() && self.external_auth.is_none() {
            inspection.answer = self.own_answer(request, path, listener);
        }
        self.modify_response(&mut inspection);
        inspection
    }

    /// Who has to be asked about a request that [`Filters::inspect`] has not answered.
    pub fn external_auth(&self) -> Option<&Arc<ExternalAuth>> {
        self.external_auth.as_ref()
    }

    /// The answer to a request that was let pass by whom [`Filters::external_auth`] names.
    pub fn answer_authorized(
        &self,
        request: &request::Parts,
        path: MatchedPath,
        listener: Listener,
        cors: &CorsGrant,
    ) -> Option<Answer> {
        let mut answer = self.own_answer(request, path, listener)?;
        self.apply_response(cors, &mut answer.headers);
        Some(answer)
    }

    fn own_answer(
        &self,
        request: &request::Parts,
        path: MatchedPath,
        listener: Listener,
    ) -> Option<Answer> {
        if let Some(redirect) = &self.redirect {
            return Some(redirect.answer(request, path, listener));
        }
        let direct = self.direct_response.as_ref()?;
        let mut answer = Answer::new(direct.status, AnswerReason::DirectResponse);
        answer.body = direct.body.clone();
        Some(answer)
    }

    fn modify_response(&self, inspection: &mut Inspection) {
        if let Some(answer) = &mut inspection.answer {
            self.apply_response(&inspection.cors, &mut answer.headers);
        }
    }

    /// Changes a request on its way to the backend. `backend` holds the filters of the chosen
    /// backend: their headers come after the rule's, and their URL rewrite in its place.
    ///
    /// # Errors
    ///
    /// The changed request would have no valid URL; answer 500.
    pub fn apply_request(
        &self,
        request: &mut request::Parts,
        path: MatchedPath,
        backend: &Filters,
    ) -> Result<(), RewriteError> {
        for modifier in self.request_headers.iter().chain(&backend.request_headers) {
            modifier.apply_request(request);
        }
        match (&self.rewrite, &backend.rewrite) {
            (None, None) => Ok(()),
            (Some(rewrite), None) | (None, Some(rewrite)) => rewrite.apply(request, path),
            (Some(rule), Some(backend)) => backend.over(rule).apply(request, path),
        }
    }

    /// Changes a response. `cors` is what [`Filters::inspect`] gave for the request. Call it for
    /// the backend's filters first, then for the rule's.
    pub fn apply_response(&self, cors: &CorsGrant, headers: &mut HeaderMap) {
        if let Some(filter) = &self.cors {
            filter.apply(cors, headers);
        }
        for modifier in &self.response_headers {
            modifier.apply(headers);
        }
    }

    /// Whether a request may be answered here, or has to be seen before it is changed.
    pub(super) fn answers(&self) -> bool {
        self.redirect.is_some()
            || self.direct_response.is_some()
            || self.cors.is_some()
            || self.fault.is_some()
            || self.external_auth.is_some()
    }

    /// Not `None`: every request is answered with 500, for this reason.
    pub fn invalid(&self) -> Option<&Arc<str>> {
        self.invalid.as_ref()
    }

    /// Whether nothing would be changed or answered.
    pub fn is_empty(&self) -> bool {
        self.invalid.is_none()
            && self.request_headers.is_empty()
            && self.response_headers.is_empty()
            && self.rewrite.is_none()
            && self.redirect.is_none()
            && self.direct_response.is_none()
            && self.cors.is_none()
            && self.fault.is_none()
            && self.external_auth.is_none()
            && self.mirrors.is_empty()
    }

    /// Where copies of requests go, each with its own share. Their answers are dropped. A copy
    /// is made of the request as the rule's own filters leave it ([`Filters::apply_request`]
    /// without a backend's).
    pub fn mirrors(&self) -> &[Mirror] {
        &self.mirrors
    }
}

/// One of `per_million`; `random` is uniform over all values.
fn hit(per_million: u32, random: u64) -> bool {
    let drawn = (u128::from(random) * 1_000_000) >> 64;
    drawn < u128::from(per_million)
}
