//! Tables that cite the specification, and properties against oracles that share no code.

mod attach;
mod convert;
mod filters;
mod fuzz;
mod matching;
mod mesh;
mod oracle;
mod retry;
mod session;
mod speed;

use std::sync::Arc;

use adit_shared::model::ServiceName;
use adit_shared::proto::waypoint as proto;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, request};

use super::*;

/// A request with what a view of it borrows.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) method: Method,
    pub(super) authority: String,
    pub(super) path: String,
    pub(super) query: Option<String>,
    pub(super) headers: HeaderMap,
    pub(super) claims: serde_json::Value,
}

pub(super) fn get(target: &str) -> Sent {
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query.to_owned())),
        None => (target, None),
    };
    Sent {
        method: Method::GET,
        authority: "echo".to_owned(),
        path: path.to_owned(),
        query,
        headers: HeaderMap::new(),
        claims: serde_json::Value::Null,
    }
}

impl Sent {
    pub(super) fn method(mut self, method: &str) -> Self {
        self.method = method.parse().expect("method");
        self
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        let name: HeaderName = name.parse().expect("name");
        self.headers
            .append(name, HeaderValue::from_str(value).expect("value"));
        self
    }

    pub(super) fn view(&self) -> RequestView<'_> {
        RequestView {
            method: &self.method,
            authority: &self.authority,
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
            claims: &self.claims,
            is_grpc: false,
        }
    }

    pub(super) fn parts(&self) -> request::Parts {
        let mut uri = self.path.clone();
        if let Some(query) = &self.query {
            uri.push('?');
            uri.push_str(query);
        }
        let request = http::Request::builder().method(&self.method).uri(uri);
        let (mut parts, ()) = request.body(()).expect("request").into_parts();
        parts.headers = self.headers.clone();
        let host = HeaderValue::from_str(&self.authority).expect("host");
        parts.headers.insert("host", host);
        parts
    }
}

pub(super) fn service(namespace: &str, name: &str) -> ServiceName {
    ServiceName {
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
    }
}

pub(super) fn echo() -> ServiceName {
    service("mesh", "echo")
}

pub(super) fn exact(value: &str) -> Option<proto::StringMatch> {
    Some(text(proto::string_match::Kind::Exact(value.into())))
}

pub(super) fn text(kind: proto::string_match::Kind) -> proto::StringMatch {
    proto::StringMatch { kind: Some(kind) }
}

pub(super) fn named(name: &str, value: &str) -> proto::NameMatch {
    proto::NameMatch {
        name: name.into(),
        value: exact(value),
        invert: false,
    }
}

/// A path as a test writes it: `=/exact`, `~regex`, otherwise a prefix; empty: none.
pub(super) fn path(path: &str) -> proto::HttpMatch {
    use proto::http_match::Path;
    let path = match path.split_at_checked(1) {
        None => None,
        Some(("=", exact)) => Some(Path::Exact(exact.into())),
        Some(("~", regex)) => Some(Path::PathRegex(regex.into())),
        Some(_) => Some(Path::Prefix(path.into())),
    };
    proto::HttpMatch {
        path,
        ..Default::default()
    }
}

pub(super) fn with_headers(of: proto::HttpMatch, headers: &[(&str, &str)]) -> proto::HttpMatch {
    proto::HttpMatch {
        headers: headers.iter().map(|(n, v)| named(n, v)).collect(),
        ..of
    }
}

pub(super) fn with_query(of: proto::HttpMatch, params: &[(&str, &str)]) -> proto::HttpMatch {
    proto::HttpMatch {
        query_params: params.iter().map(|(n, v)| named(n, v)).collect(),
        ..of
    }
}

pub(super) fn with_method(of: proto::HttpMatch, method: &str) -> proto::HttpMatch {
    proto::HttpMatch {
        method: method.into(),
        ..of
    }
}

pub(super) fn backend(name: &str, weight: u32) -> proto::Backend {
    let service = service("mesh", name);
    proto::Backend {
        weight,
        to: Some(proto::backend::To::Service(proto::BackendService {
            service: Some(reference(&service)),
            port: 8080,
            subset: String::new(),
        })),
        filters: Vec::new(),
    }
}

pub(super) fn reference(service: &ServiceName) -> proto::ServiceRef {
    proto::ServiceRef {
        namespace: service.namespace.to_string(),
        hostname: service.hostname.to_string(),
    }
}

/// A rule named `name` to the backend of the same name.
pub(super) fn rule(name: &str, matches: Vec<proto::HttpMatch>) -> proto::HttpRule {
    proto::HttpRule {
        name: name.into(),
        matches,
        backends: vec![backend(name, 1)],
        ..Default::default()
    }
}

pub(super) fn object(kind: &str, namespace: &str, name: &str) -> Option<proto::ObjectRef> {
    Some(proto::ObjectRef {
        kind: kind.into(),
        namespace: namespace.into(),
        name: name.into(),
        created: 1,
    })
}

pub(super) fn parent(service: &ServiceName, port: u32) -> proto::RouteParent {
    proto::RouteParent {
        service: Some(reference(service)),
        port,
        rejected: String::new(),
    }
}

/// An HTTPRoute of the namespace `mesh` on the service `echo`.
pub(super) fn http_route(name: &str, rules: Vec<proto::HttpRule>) -> proto::Route {
    proto::Route {
        object: object("HTTPRoute", "mesh", name),
        parents: vec![parent(&echo(), 0)],
        hostnames: Vec::new(),
        kind: Some(proto::route::Kind::Http(proto::HttpRules { rules })),
    }
}

pub(super) fn grpc_route(name: &str, rules: Vec<proto::GrpcRule>) -> proto::Route {
    proto::Route {
        object: object("GRPCRoute", "mesh", name),
        parents: vec![parent(&echo(), 0)],
        hostnames: Vec::new(),
        kind: Some(proto::route::Kind::Grpc(proto::GrpcRules { rules })),
    }
}

pub(super) fn filter(kind: proto::filter::Kind) -> proto::Filter {
    proto::Filter { kind: Some(kind) }
}

pub(super) fn header_modifier(
    set: &[(&str, &str)],
    add: &[(&str, &str)],
    remove: &[&str],
) -> proto::HeaderModifier {
    let headers = |pairs: &[(&str, &str)]| {
        let header = |(name, value): &(&str, &str)| proto::Header {
            name: (*name).into(),
            value: (*value).into(),
        };
        pairs.iter().map(header).collect()
    };
    proto::HeaderModifier {
        set: headers(set),
        add: headers(add),
        remove: remove.iter().map(|name| (*name).into()).collect(),
    }
}

/// Understood without problems.
pub(super) fn understood(route: &proto::Route) -> Arc<Route> {
    let route = Route::from_proto(route);
    assert!(route.problems().is_empty(), "{:?}", route.problems());
    Arc::new(route)
}

pub(super) fn table(routes: &[proto::Route]) -> HttpTable {
    let routes: Vec<_> = routes.iter().map(understood).collect();
    HttpTable::new(routes.iter().map(|route| &**route))
}

/// Name of the rule that a request takes.
pub(super) fn takes(table: &HttpTable, sent: &Sent) -> Option<String> {
    match table.find(&sent.view()) {
        Lookup::Matched(matched) => Some(matched.rule.name().unwrap_or_default().to_owned()),
        Lookup::NoMatch => None,
    }
}
