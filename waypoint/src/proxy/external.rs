//! CUSTOM policies: the providers that they name are asked before any other policy, with the
//! first bytes of the body where they want them. And rules of routes with the filter
//! ExternalAuth: their service is asked once, when all policies have let the request pass.

use std::sync::Arc;
use std::time::SystemTime;

use adit_shared::policy::http::CustomCheck;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::uri::PathAndQuery;
use http::{HeaderValue, Response, Uri, request};
use tokio::time::timeout_at;
use tracing::{info, warn};

use super::body::{Replay, RequestBody, ResponseBody};
use super::dial::Dialer;
use super::exchange::Exchange;
use super::forward::Refused;
use super::headers::REASON;
use super::reply::{Reply, grpc_status};
use super::routing::Asking;
use crate::external_authorization::{Changes, CheckInput, Decision, Denial, ExternalAuthorization};
use crate::telemetry::ResponseFlags;

/// A provider that has to be asked.
pub struct Ask {
    provider: String,
    policy: Arc<str>,
    dry_run: bool,
}

impl Ask {
    /// Whom.
    pub fn provider(&self) -> String {
        self.provider.clone()
    }
}

impl From<&CustomCheck<'_>> for Ask {
    fn from(check: &CustomCheck<'_>) -> Self {
        Self {
            provider: check.provider.to_owned(),
            policy: check.policy.clone(),
            dry_run: check.dry_run,
        }
    }
}

/// Asks all of them. `Err`: the request is answered so.
///
/// # Errors
/// The denial of the first that denies.
pub async fn check(
    exchange: &mut Exchange,
    head: &mut request::Parts,
    body: &mut RequestBody,
    asks: Vec<Ask>,
) -> Result<(), Box<Denial>> {
    let worker = exchange.downstream.worker.clone();
    for ask in asks {
        let Some(provider) = worker.external(&ask.provider) else {
            if ask.dry_run {
                continue;
            }
            warn!(policy = %ask.policy, "provider {:?} is not there or not usable", ask.provider);
            exchange.policy = Some(ask.policy);
            return Err(Box::new(Denial {
                status: Reply::DENIED.status,
                headers: Vec::new(),
                body: Bytes::new(),
                error: Some(format!("provider {:?} is not usable", ask.provider)),
            }));
        };
        let decision = decide(exchange, head, body, &provider).await;
        match (decision, ask.dry_run) {
            (Decision::Allowed(changes), false) => {
                let set = changes.request.iter().map(|change| change.name().clone());
                exchange.vouched.extend(set);
                apply(exchange, head, *changes);
            }
            (Decision::Denied(denial), false) => {
                exchange.policy = Some(ask.policy);
                return Err(denial);
            }
            (Decision::Denied(_), true) => info!(
                target: "access", policy = %ask.policy, source = %exchange.downstream.client,
                "dry-run policy would deny"
            ),
            (Decision::Allowed(_), true) => {}
        }
    }
    Ok(())
}

/// Asks the service of a rule's filter. What it changes is the rule's doing, not this
/// waypoint's word: where a consumer wrote the rule, it is judged like the rest of it.
///
/// # Errors
/// What the request is answered with.
pub async fn check_rule(
    exchange: &mut Exchange,
    head: &mut request::Parts,
    body: &mut RequestBody,
    asking: &Asking,
) -> Result<(), Refused> {
    let Some(auth) = asking.routed.rule.filters().external_auth() else {
        return Ok(());
    };
    let asked = exchange.downstream.worker.external_auth(auth);
    // The time that the request may take is running.
    let whole = asking.routed.rule.timeouts().request;
    let deciding = decide(exchange, head, body, &asked);
    let decision = match whole {
        None => deciding.await,
        Some(time) => {
            let end = exchange.started + time;
            let decided = timeout_at(end.into(), deciding).await;
            decided.map_err(|_| Reply::REQUEST_TIMEOUT)?
        }
    };
    match decision {
        Decision::Allowed(changes) => {
            apply(exchange, head, *changes);
            Ok(())
        }
        Decision::Denied(denial) => Err(Refused::Denied(denial)),
    }
}

/// Asks about a request as it is now.
async fn decide(
    exchange: &Exchange,
    head: &request::Parts,
    body: &mut RequestBody,
    provider: &ExternalAuthorization<Dialer>,
) -> Decision {
    let settings = provider.settings();
    let (prefix, whole) = match settings.body_limit {
        0 => (Bytes::new(), true),
        limit => prefix_of(body, limit, settings.partial_body).await,
    };
    let downstream = &exchange.downstream;
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    provider
        .check(&CheckInput {
            request: head,
            host: host.unwrap_or_default(),
            time: SystemTime::now(),
            source: downstream.client,
            source_identity: Some(&downstream.caller.identity),
            destination: downstream
                .destination
                .dialled()
                .unwrap_or(downstream.caller.peer),
            destination_identity: &downstream.worker.shared.config.identity,
            body: prefix,
            body_is_whole: whole,
        })
        .await
}

/// The first bytes of a body, which stay in it, and whether they are all. Where a part is not
/// enough, one byte more is waited for: a body that is exactly so long may end without notice.
async fn prefix_of(body: &mut RequestBody, limit: usize, partial: bool) -> (Bytes, bool) {
    let want = match partial {
        true => limit,
        false => limit.saturating_add(1),
    };
    let shared = match std::mem::replace(body, RequestBody::Empty) {
        RequestBody::Stream { incoming, progress } => Replay::with_limit(incoming, progress, want),
        RequestBody::Replay { shared, .. } => shared,
        // There is nothing to be seen of it.
        other => {
            let empty = matches!(other, RequestBody::Empty);
            *body = other;
            return (Bytes::new(), empty);
        }
    };
    let (mut seen, whole) = shared.fill(want).await;
    *body = shared.attempt();
    let within = seen.len() <= limit;
    seen.truncate(limit);
    (seen, whole && within)
}

fn apply(exchange: &mut Exchange, head: &mut request::Parts, changes: Changes) {
    if let Some(error) = &changes.failed_open {
        warn!("external authorization failed open: {error}");
    }
    for change in &changes.request {
        change.apply(&mut head.headers);
    }
    exchange.response_changes.extend(changes.response);
    if !changes.set_query.is_empty() || !changes.remove_query.is_empty() {
        let named = |name: &str| {
            changes.remove_query.iter().any(|gone| gone == name)
                || changes.set_query.iter().any(|(set, _)| set == name)
        };
        let old = head.uri.query().unwrap_or_default().split('&');
        let mut pairs: Vec<String> = old
            .filter(|pair| !pair.is_empty())
            .filter(|pair| !named(pair.split('=').next().unwrap_or_default()))
            .map(str::to_owned)
            .collect();
        let new = changes.set_query.iter();
        pairs.extend(new.map(|(name, value)| format!("{name}={value}")));
        let path = head.uri.path();
        let text = match pairs.is_empty() {
            true => path.to_owned(),
            false => format!("{path}?{}", pairs.join("&")),
        };
        // What cannot stand in a URL is not put there.
        if let Ok(changed) = PathAndQuery::try_from(text) {
            head.uri = Uri::from(changed);
        }
    }
}

/// The answer to a request that a provider denies.
pub fn respond(exchange: &mut Exchange, denial: Denial) -> Response<ResponseBody> {
    let Denial {
        status,
        headers: changes,
        body,
        error,
    } = denial;
    let word = match &error {
        None => "ext_authz_denied",
        Some(_) => "ext_authz_error",
    };
    exchange.flags |= ResponseFlags::UNAUTHORIZED_EXTERNAL;
    exchange.details = word;
    exchange.upstream_failure = error;
    let mut response = Response::new(match body.is_empty() || exchange.grpc {
        true => ResponseBody::empty(),
        false => ResponseBody::full(body),
    });
    let headers = response.headers_mut();
    for change in &changes {
        change.apply(headers);
    }
    headers.insert(REASON, HeaderValue::from_static(word));
    if exchange.grpc {
        let code = grpc_status(status);
        exchange.status = 200;
        exchange.grpc_status = Some(u32::from(code));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from(u16::from(code)));
    } else {
        exchange.status = status.as_u16();
        *response.status_mut() = status;
    }
    response
}
