//! Whether a request or a connection may pass: the policies of its destination, and those of
//! its endpoint.

use std::net::SocketAddr;

use adit_shared::policy::http::{HttpFields, HttpPolicySet, HttpRequest, remote_address};
use adit_shared::policy::{DryRunOutcome, Permitted, PolicyKey, TrustDomains, Verdict};
use http::HeaderMap;
use tracing::info;

use super::tunnel::Caller;
use crate::state::Mesh;

/// A request that was denied.
#[derive(Debug)]
pub struct Denied {
    /// The policy that decided; `None`: no ALLOW policy matched.
    pub policy: Option<PolicyKey>,
    /// Why, for people.
    pub error: String,
}

/// Who asks, and for what address.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// Who.
    pub caller: &'a Caller,
    /// What was dialled, or the endpoint's address where its own policies are asked.
    pub destination: SocketAddr,
    /// The server that a ClientHello names.
    pub server_name: Option<&'a str>,
    /// What holds for the whole mesh.
    pub mesh: &'a Mesh,
}

impl<'a> Asked<'a> {
    /// What policies are asked.
    pub fn request(&self, http: Option<HttpFields<'a>>) -> HttpRequest<'a> {
        let peer = self.caller.peer.ip();
        let headers: Option<&HeaderMap> = http.as_ref().map(|http| http.headers);
        HttpRequest {
            source_identity: Some(&self.caller.identity),
            source_ip: peer,
            remote_ip: headers.map_or(peer, |headers| {
                remote_address(peer, headers, self.mesh.trusted_proxies)
            }),
            destination_ip: self.destination.ip(),
            destination_port: self.destination.port(),
            sni: self.server_name,
            http,
        }
    }
}

/// Asks the policies about a connection that is not HTTP, or not known to be.
///
/// Providers of external authorization judge requests, and there is none to show to them: a
/// CUSTOM policy that may be meant denies, as DENY does. Otherwise a client that says nothing for
/// a moment, on a port that does not declare its protocol, would get around it.
///
/// # Errors
/// Which one denies and why.
pub fn authorize_connection(
    policies: &HttpPolicySet,
    request: &HttpRequest<'_>,
    trust: &TrustDomains,
) -> Result<Option<Permitted>, Denied> {
    let permitted = authorize(policies, request, trust)?;
    let checks = policies.custom(request, trust);
    match checks.iter().find(|check| !check.dry_run) {
        None => Ok(permitted),
        Some(check) => Err(Denied {
            policy: Some(check.policy.clone()),
            error: format!(
                "policy {} asks provider {:?}, which judges HTTP requests only",
                check.policy, check.provider
            ),
        }),
    }
}

/// Asks the policies; `None`: there are none.
///
/// # Errors
/// Which one denies and why.
pub fn authorize(
    policies: &HttpPolicySet,
    request: &HttpRequest<'_>,
    trust: &TrustDomains,
) -> Result<Option<Permitted>, Denied> {
    if policies.is_empty() {
        return Ok(None);
    }
    let evaluation = policies.evaluate_deny_allow(request, trust);
    for dry in &evaluation.dry_run {
        let outcome = match dry.outcome {
            DryRunOutcome::WouldDeny => "would deny",
            DryRunOutcome::WouldAllow => "would allow",
        };
        info!(
            target: "access", policy = %dry.policy, source = %request.source_ip,
            destination = %request.destination_ip, "dry-run policy {outcome}"
        );
    }
    for audit in &evaluation.audit {
        info!(
            target: "audit", policy = %audit.policy, rule = audit.rule,
            source = %request.source_ip, destination = %request.destination_ip,
            path = request.http.map_or("", |http| http.path.as_str()), "audited"
        );
    }
    match evaluation.verdict {
        Verdict::Permitted(permitted) => Ok(Some(permitted)),
        Verdict::Denied(denied) => Err(Denied {
            error: denied.to_string(),
            policy: denied.policy,
        }),
    }
}
