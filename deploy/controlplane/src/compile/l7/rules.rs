//! Rules in the waypoint's form.

use adit_shared::proto::waypoint as wire;
use adit_shared::proto::waypoint::route::Kind;

use super::backends::Resolver;
use crate::model::{GrpcRule, HttpRule, L4Rule, Meta, Route};

/// Which rule of which route it is.
#[derive(Debug, Clone, Copy)]
struct RuleAt<'a> {
    route: &'a Meta,
    index: usize,
}

pub(super) fn grpc(route: &Route<GrpcRule>, resolver: &Resolver<'_, '_>) -> Kind {
    Kind::Grpc(wire::GrpcRules {
        rules: all(route, |rule, at| grpc_rule(rule, at, resolver)),
    })
}

pub(super) fn http(route: &Route<HttpRule>, resolver: &Resolver<'_, '_>) -> Kind {
    Kind::Http(wire::HttpRules {
        rules: all(route, |rule, at| http_rule(rule, at, resolver)),
    })
}

pub(super) fn tls(route: &Route<L4Rule>, resolver: &Resolver<'_, '_>) -> Kind {
    Kind::Tls(l4(route, resolver))
}

pub(super) fn tcp(route: &Route<L4Rule>, resolver: &Resolver<'_, '_>) -> Kind {
    Kind::Tcp(l4(route, resolver))
}

fn l4(route: &Route<L4Rule>, resolver: &Resolver<'_, '_>) -> wire::L4Rules {
    wire::L4Rules {
        rules: all(route, |rule, _| l4_rule(rule, resolver)),
    }
}

fn all<R, W>(route: &Route<R>, convert: impl Fn(&R, RuleAt<'_>) -> W) -> Vec<W> {
    let rules = route.rules.iter().enumerate();
    let route = &route.meta;
    rules
        .map(|(index, rule)| convert(rule, RuleAt { route, index }))
        .collect()
}

fn http_rule(rule: &HttpRule, at: RuleAt<'_>, resolver: &Resolver<'_, '_>) -> wire::HttpRule {
    let backends = rule.backends.iter();
    wire::HttpRule {
        name: rule.name.clone(),
        matches: rule.matches.clone(),
        filters: resolver.filters(&rule.filters),
        backends: backends
            .map(|(backend, filters)| resolver.backend(backend, filters))
            .collect(),
        request_timeout: rule.request_timeout,
        backend_request_timeout: rule.backend_request_timeout,
        retry: rule.retry.clone(),
        session_persistence: rule.session.as_ref().map(|session| named(session, at)),
        invalid: rule.invalid.clone().unwrap_or_default(),
    }
}

fn grpc_rule(rule: &GrpcRule, at: RuleAt<'_>, resolver: &Resolver<'_, '_>) -> wire::GrpcRule {
    let backends = rule.backends.iter();
    wire::GrpcRule {
        name: rule.name.clone(),
        matches: rule.matches.clone(),
        filters: resolver.filters(&rule.filters),
        backends: backends
            .map(|(backend, filters)| resolver.backend(backend, filters))
            .collect(),
        session_persistence: rule.session.as_ref().map(|session| named(session, at)),
        invalid: rule.invalid.clone().unwrap_or_default(),
    }
}

fn l4_rule(rule: &L4Rule, resolver: &Resolver<'_, '_>) -> wire::L4Rule {
    let backends = rule.backends.iter();
    wire::L4Rule {
        name: rule.name.clone(),
        backends: backends
            .map(|backend| resolver.backend(backend, &[]))
            .collect(),
        invalid: rule.invalid.clone().unwrap_or_default(),
    }
}

/// A cookie without a name gets one of its own (Gateway API `cookie.name`): one that stays
/// the same for as long as the rule is where it is.
fn named(session: &wire::SessionPersistence, at: RuleAt<'_>) -> wire::SessionPersistence {
    let mut session = session.clone();
    if session.name.is_empty() {
        let Meta {
            namespace, name, ..
        } = at.route;
        let text = format!("{namespace}/{name}/{}", at.index);
        session.name = format!("adit-session-{:016x}", fnv_1a(text.as_bytes()));
    }
    session
}

fn fnv_1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
