//! What consumer routes make of requests.
//!
//! A route of another namespace than its service's (Gateway API GAMMA) is not written by the
//! service's owner but by its callers. It holds for them alone, and it is as if they themselves
//! had sent what it makes of their requests: another path, other headers, another port. So the
//! service's policies, which have judged a request as it came, judge it once more as it goes on,
//! at the service and port where it goes; and what this waypoint vouches for (who calls, tokens
//! and what they say, what a provider has added) is put back.
//!
//! A provider of external authorization is not asked a second time: where it would have to be,
//! the request is denied.

use std::net::SocketAddr;
use std::sync::Arc;

use adit_shared::model::ServiceName;
use adit_shared::policy::http::{HttpFields, normalize};
use http::header::HOST;
use http::{HeaderMap, HeaderName, Uri, request};

use super::authorize::{Asked, authorize};
use super::destination::Target;
use super::exchange::Exchange;
use super::headers::CLIENT_CERTIFICATE;
use super::reply::Reply;
use super::request::normal_path;
use super::steps;
use crate::route;
use crate::state::{PortView, View};

/// Whether a route of `namespace` is a consumer's for what was dialled.
pub fn is_consumer(namespace: &str, dialled: &Target) -> bool {
    match dialled {
        Target::Service(port) => *port.service.service().key.namespace != *namespace,
        Target::Workload { .. } => false,
    }
}

/// The port of a service at which what goes to `backend` is judged.
pub fn judged_at(
    view: &View,
    dialled: &Target,
    backend: Option<&route::Target>,
) -> Option<Arc<PortView>> {
    match (backend, dialled) {
        (Some(to), _) => view.service(&to.service)?.port(to.port).cloned(),
        (None, Target::Service(port)) => Some(port.clone()),
        (None, Target::Workload { .. }) => None,
    }
}

/// Where something is judged once more, to be found again when the configuration changes.
pub type Place = (ServiceName, u16);

/// The place of a port.
pub fn place(port: &PortView) -> Place {
    (port.service.service().key.clone(), port.port)
}

/// Whether that is where `dialled` leads anyway.
pub fn is_same(port: &PortView, dialled: &Target) -> bool {
    matches!(dialled, Target::Service(own) if place(own) == place(port))
}

/// Judges a request that a consumer's rule sends to `backend`; `came`: path and query before its
/// filters.
///
/// # Errors
/// It is denied, or there is no such backend.
pub fn judge(
    exchange: &mut Exchange,
    view: &View,
    dialled: &Target,
    backend: Option<&route::Target>,
    came: &Uri,
    head: &mut request::Parts,
) -> Result<(), Reply> {
    if let Some(original) = &exchange.original {
        let tokens = dialled.authentication().header_names();
        let vouched = exchange.vouched.iter().chain(tokens);
        for name in vouched.chain([&CLIENT_CERTIFICATE]) {
            put_back(name, original, &mut head.headers);
        }
    }
    let port = judged_at(view, dialled, backend).ok_or(Reply::INVALID_BACKEND)?;
    let same = is_same(&port, dialled);
    let untouched = exchange
        .original
        .as_ref()
        .is_none_or(|original| *original == head.headers);
    if same && untouched && head.uri == *came {
        return Ok(());
    }
    normal_path(view, head)?;
    let denied = permits(exchange, view, &port, same, head);
    if let Err(policy) = denied {
        exchange.policy = policy;
        return Err(Reply::DENIED);
    }
    exchange.consumer = Some(Box::new(place(&port)));
    Ok(())
}

/// Whether the policies of `port` let pass what is sent there. `same`: it is what was dialled,
/// so that its rules have verified the token.
///
/// # Errors
/// Which policy denies.
pub fn permits(
    exchange: &Exchange,
    view: &View,
    port: &PortView,
    same: bool,
    head: &request::Parts,
) -> Result<(), Option<Arc<str>>> {
    let policies = &port.policies;
    if policies.is_empty() {
        return Ok(());
    }
    let mesh = view.mesh();
    let path = normalize(head.uri.path(), mesh.path_normalization).map_err(|_| None)?;
    let caller = &exchange.downstream.caller;
    let dialled = exchange.downstream.destination.dialled();
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    let asked = Asked {
        caller,
        destination: SocketAddr::new(dialled.unwrap_or(caller.peer).ip(), port.port),
        server_name: None,
        mesh,
    };
    let request = asked.request(Some(HttpFields {
        method: head.method.as_str(),
        path: &path,
        query: head.uri.query(),
        host: host.unwrap_or_default(),
        headers: &head.headers,
        claims: exchange.claims.as_deref().filter(|_| same),
    }));
    let judged = authorize(policies, &request, &mesh.trust);
    exchange.note("consumerRouteAuthorization", || {
        steps::authorization(&judged)
    });
    judged.map_err(|denied| denied.policy)?;
    let checks = policies.custom(&request, &mesh.trust);
    match checks.iter().find(|check| !check.dry_run) {
        Some(check) => Err(Some(check.policy.clone())),
        None => Ok(()),
    }
}

/// Makes all lines of a header what they were.
fn put_back(name: &HeaderName, original: &HeaderMap, headers: &mut HeaderMap) {
    if original.get_all(name) == headers.get_all(name) {
        return;
    }
    headers.remove(name);
    for value in original.get_all(name) {
        headers.append(name, value.clone());
    }
}
