//! CUSTOM policies: the providers that they name are asked before any other policy, with the
//! first bytes of the body where they want them.

use std::sync::Arc;
use std::time::SystemTime;

use adit_shared::policy::http::CustomCheck;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::uri::PathAndQuery;
use http::{HeaderValue, Response, Uri, request};
use tracing::{info, warn};

use super::body::{Replay, RequestBody, ResponseBody};
use super::exchange::Exchange;
use super::headers::REASON;
use super::reply::{Reply, grpc_status};
use crate::external_authorization::{Changes, CheckInput, Decision, Denial};
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
        let limit = provider.settings().body_limit;
        let (prefix, whole) = match limit {
            0 => (Bytes::new(), true),
            limit => prefix_of(body, limit).await,
        };
        let downstream = exchange.downstream.clone();
        let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
        let host = host.unwrap_or_default().to_owned();
        let input = CheckInput {
            request: head,
            host: &host,
            time: SystemTime::now(),
            source: downstream.client,
            source_identity: Some(&downstream.caller.identity),
            destination: downstream
                .destination
                .dialled()
                .unwrap_or(downstream.caller.peer),
            destination_identity: &worker.shared.config.identity,
            body: prefix,
            body_is_whole: whole,
        };
        match (provider.check(&input).await, ask.dry_run) {
            (Decision::Allowed(changes), false) => apply(exchange, head, *changes),
            (Decision::Denied(denial), false) => {
                exchange.policy = Some(ask.policy);
                return Err(denial);
            }
            (Decision::Denied(_), true) => info!(
                target: "access", policy = %ask.policy, source = %downstream.client,
                "dry-run policy would deny"
            ),
            (Decision::Allowed(_), true) => {}
        }
    }
    Ok(())
}

/// The first bytes of a body, which stay in it, and whether they are all.
async fn prefix_of(body: &mut RequestBody, limit: usize) -> (Bytes, bool) {
    let shared = match std::mem::replace(body, RequestBody::Empty) {
        RequestBody::Stream { incoming, progress } => Replay::with_limit(incoming, progress, limit),
        RequestBody::Replay { shared, .. } => shared,
        // There is nothing to be seen of it.
        other => {
            let empty = matches!(other, RequestBody::Empty);
            *body = other;
            return (Bytes::new(), empty);
        }
    };
    let seen = shared.fill(limit).await;
    *body = shared.attempt();
    seen
}

fn apply(exchange: &mut Exchange, head: &mut request::Parts, changes: Changes) {
    if let Some(error) = &changes.failed_open {
        warn!("external authorization failed open: {error}");
    }
    for change in &changes.request {
        change.apply(&mut head.headers);
        exchange.vouched.push(change.name().clone());
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
