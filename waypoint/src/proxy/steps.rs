//! What the stages of a request tell of themselves to whoever follows it
//! (`telemetry::Following`). Only made when somebody does.

use std::time::Duration;

use adit_shared::model::WorkloadUid;
use adit_shared::policy::Permitted;
use serde_json::{Value, json};

use super::authorize::Denied;
use super::destination::Target;
use super::exchange::Exchange;
use super::reply::Reply;
use super::routing::Routing;
use super::upstream::{Answer, Reached, SendError, Way};
use crate::route::RetryPolicy;
use crate::state::{Reach, View};

/// What the connection leads to.
pub fn destination(view: &View, target: Option<&Target>) -> Value {
    let version = view.version();
    match target {
        None => json!({ "configuration": version, "error": Reply::GONE.reason }),
        Some(Target::Service(port)) => json!({
            "configuration": version,
            "service": port.service.service().key.to_string(),
            "port": port.port,
            "protocol": format!("{:?}", port.protocol),
            "policies": !port.policies.is_empty(),
        }),
        Some(target @ Target::Workload { reach, .. }) => json!({
            "configuration": version,
            "workload": &*reach.workload.uid,
            "protocol": format!("{:?}", target.protocol()),
        }),
    }
}

/// What policies have decided.
pub fn authorization(judged: &Result<Option<Permitted>, Denied>) -> Value {
    match judged {
        Ok(None) => json!({ "result": "permitted", "reason": "no policy applies" }),
        Ok(Some(permitted)) => json!({
            "result": "permitted",
            "policy": permitted.policy().map(|policy| policy.to_string()),
            "rule": permitted.rule(),
        }),
        Err(denied) => json!({
            "result": "denied",
            "policy": denied.policy.as_deref(),
            "reason": denied.error,
        }),
    }
}

/// What providers of external authorization have decided.
pub fn external(exchange: &Exchange, allowed: bool) -> Value {
    json!({
        "result": if allowed { "allowed" } else { "denied" },
        "policy": exchange.policy.as_deref(),
    })
}

/// The rule and what it makes of the request.
pub fn route(exchange: &Exchange, decided: &Result<Routing, Reply>) -> Value {
    let rule = &*exchange.route;
    match decided {
        Ok(Routing::Forward(decided)) => json!({
            "rule": rule,
            "cluster": &*decided.choice.cluster(),
            "protocol": format!("{:?}", decided.protocol),
            "requestTimeoutMs": millis(decided.timeouts.request),
            "backendTimeoutMs": millis(decided.timeouts.backend_request),
            "delayMs": millis(decided.delay),
            "mirrors": decided.mirrors.len(),
        }),
        Ok(Routing::Ask(asking)) => {
            let auth = asking.routed.rule.filters().external_auth();
            json!({
                "rule": rule,
                "asks": auth.map(|auth| format!("{}:{}", auth.target.service, auth.target.port)),
            })
        }
        Ok(Routing::Answer { delay, answer }) => json!({
            "rule": rule,
            "answer": answer.status.as_u16(),
            "reason": format!("{:?}", answer.reason),
            "delayMs": millis(*delay),
        }),
        Err(reply) => json!({
            "rule": rule,
            "answer": reply.status.as_u16(),
            "reason": reply.reason,
            "failure": exchange.upstream_failure,
        }),
    }
}

/// The endpoint that was picked.
pub fn endpoint(reach: &Reach, tried: &[WorkloadUid]) -> Value {
    let endpoint = &reach.endpoint;
    json!({
        "workload": &*endpoint.uid,
        "address": endpoint.address,
        "way": match &endpoint.way {
            Way::Hbone { .. } => "HBONE",
            Way::Plain => "TCP",
            Way::Tls(_) => "TLS",
        },
        "identity": match &endpoint.way {
            Way::Hbone { identities, .. } => Some(identities.workload().to_string()),
            Way::Plain | Way::Tls(_) => None,
        },
        "tried": tried.iter().map(|uid| &**uid).collect::<Vec<_>>(),
    })
}

/// How one try has ended.
pub fn attempt(number: u32, outcome: &Result<Answer, SendError>) -> Value {
    match outcome {
        Ok(answer) => json!({
            "number": number,
            "status": answer.response.status().as_u16(),
        }),
        Err(error) => json!({
            "number": number,
            "error": error.error,
            "reason": error.reply.reason,
            "reached": match error.reached {
                Reached::NotConnected => "not connected",
                Reached::NotProcessed => "not processed",
                Reached::Stale => "stale connection",
                Reached::Sent => "sent",
            },
        }),
    }
}

/// Whether there is another try.
pub fn retry(again: Option<Duration>, granted: bool, policy: &RetryPolicy) -> Value {
    json!({
        "again": granted,
        "pauseMs": millis(again),
        "refusedByBudget": (again.is_some() && !granted).then_some(true),
        "attempts": policy.attempts,
    })
}

fn millis(time: Option<Duration>) -> Option<f64> {
    time.map(|time| time.as_secs_f64() * 1000.0)
}
