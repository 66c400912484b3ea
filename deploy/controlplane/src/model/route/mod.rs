//! Routes: HTTPRoute, GRPCRoute, TCPRoute, TLSRoute (Gateway API v1.7).
//!
//! Each rule is read by itself. One that cannot be read is kept as such, with what it
//! matches as far as that is known, so that whoever compiles it can refuse what it
//! matches: leaving it out would send its requests by another rule.

mod backend;
mod external_auth;
mod filter;
mod grpc;
mod http;
mod l4;
mod matching;
mod options;

use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use backend::BackendRef;
pub use filter::Filter;
pub use grpc::GrpcRule;
pub use http::HttpRule;
pub use l4::L4Rule;

use super::field::{At, FieldError, FieldPath};
use super::meta::Meta;
use super::raw::{Map, nullable};

/// An HTTPRoute.
pub type HttpRoute = Route<HttpRule>;
/// A GRPCRoute.
pub type GrpcRoute = Route<GrpcRule>;
/// A TCPRoute.
pub type TcpRoute = Route<L4Rule>;
/// A TLSRoute.
pub type TlsRoute = Route<L4Rule>;

/// Most parents of a route (CRD).
const MAX_PARENTS: usize = 32;
/// Most rules of a route: what all CRDs allow, and some more.
const MAX_RULES: usize = 128;
/// Most hostnames of a route.
const MAX_HOSTNAMES: usize = 16;

/// A route.
#[derive(Debug, Clone, PartialEq)]
pub struct Route<R> {
    /// Metadata.
    pub meta: Meta,
    /// What it is attached to.
    pub parents: Vec<ParentRef>,
    /// Host names; they mean nothing at services.
    pub hostnames: Vec<String>,
    /// Rules in their order.
    pub rules: Vec<R>,
    /// What is wrong with it.
    pub errors: Vec<FieldError>,
}

/// A `parentRef`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentRef {
    /// API group.
    pub group: Arc<str>,
    /// Kind.
    pub kind: Arc<str>,
    /// Namespace, where it is stated.
    pub namespace: Option<Arc<str>>,
    /// Name.
    pub name: Arc<str>,
    /// Name of a listener, or of a service's port.
    pub section: Option<Arc<str>>,
    /// Port.
    pub port: Option<u16>,
}

/// A rule of some kind of route.
pub trait RouteRule: Sized {
    /// Reads a rule and says what is wrong with it. A rule with errors has to be
    /// [`invalid`](Self::invalidate)d by the caller.
    #[doc(hidden)]
    fn read(value: &Value, at: At<'_>, errors: &mut Vec<FieldError>) -> Self;

    /// Makes what the rule matches fail, for this reason.
    fn invalidate(&mut self, reason: String);

    /// Why what the rule matches fails.
    fn invalid(&self) -> Option<&str>;

    /// Its name; empty: none.
    fn name(&self) -> &str;

    /// The services that it refers to, with where each stands in the rule: of the rule, of
    /// its filters, and of the filters of its backends.
    fn backends(&self) -> Vec<&BackendRef>;
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawParent {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    #[serde(deserialize_with = "nullable")]
    name: String,
    section_name: Option<String>,
    port: Option<i64>,
}

impl<R: RouteRule> Route<R> {
    /// Reads `spec`.
    pub fn parse(meta: Meta, spec: &Value) -> Self {
        let mut errors = Vec::new();
        let at = At::ROOT.key("spec");
        let empty = serde_json::Map::new();
        let fields = spec.as_object().unwrap_or_else(|| {
            errors.push(at.error("is not a mapping"));
            &empty
        });
        for key in fields.keys() {
            let known = ["parentRefs", "hostnames", "rules", "useDefaultGateways"];
            if !known.contains(&key.as_str()) {
                errors.push(at.key(key).error("unknown field"));
            }
        }
        let list = at.key("parentRefs");
        let mut parents = Vec::new();
        for (index, value) in items(fields.get("parentRefs"), list, MAX_PARENTS, &mut errors) {
            parents.extend(read_parent(value, list.index(index), &mut errors));
        }
        let list = at.key("hostnames");
        let mut hostnames = Vec::new();
        for (index, value) in items(fields.get("hostnames"), list, MAX_HOSTNAMES, &mut errors) {
            hostnames.extend(read_at(value, list.index(index), &mut errors));
        }
        let list = at.key("rules");
        let rule_values = items(fields.get("rules"), list, MAX_RULES, &mut errors);
        // Whatever is wrong with the route as a whole is wrong with each rule.
        let of_route = errors.first().map(ToString::to_string);
        let mut rules: Vec<R> = Vec::new();
        for (index, value) in rule_values {
            let before = errors.len();
            let at = list.index(index);
            let mut rule = R::read(value, at, &mut errors);
            if !rule.name().is_empty() && rules.iter().any(|of| of.name() == rule.name()) {
                errors.push(at.key("name").error("is the name of another rule"));
            }
            let own = errors.get(before).map(ToString::to_string);
            if let Some(reason) = own.or_else(|| of_route.clone()) {
                rule.invalidate(reason);
            }
            rules.push(rule);
        }
        if let Some(reason) = of_route.filter(|_| rules.is_empty()) {
            // Nobody knows what it would have matched.
            let mut rule = R::read(&Value::Object(empty.clone()), list, &mut Vec::new());
            rule.invalidate(reason);
            rules.push(rule);
        }
        Self {
            meta,
            parents,
            hostnames,
            rules,
            errors,
        }
    }
}

/// The items of a list, with their positions. What is no list, or too long, is an error.
fn items<'v>(
    value: Option<&'v Value>,
    at: At<'_>,
    max: usize,
    errors: &mut Vec<FieldError>,
) -> impl Iterator<Item = (usize, &'v Value)> + use<'v> {
    let values = match value {
        None | Some(Value::Null) => &[],
        Some(Value::Array(values)) => values.as_slice(),
        Some(_) => {
            errors.push(at.error("is not a list"));
            &[]
        }
    };
    if values.len() > max {
        errors.push(at.error(format!("has more than {max} entries")));
    }
    values.iter().take(max).enumerate()
}

/// Reads a value; says where in it something does not fit.
fn read_at<T: DeserializeOwned>(
    value: &Value,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<T> {
    serde_path_to_error::deserialize(value)
        .map_err(|error| {
            errors.push(FieldError {
                path: FieldPath::from_serde(error.path()).below(&at.path().0),
                message: error.inner().to_string(),
            });
        })
        .ok()
}

fn read_parent(value: &Value, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<ParentRef> {
    let raw: Map<RawParent> = read_at(value, at, errors)?;
    if raw.name.is_empty() {
        errors.push(at.key("name").error("is required"));
        return None;
    }
    let port = raw.port.map(|port| read_port(port, at.key("port"), errors));
    Some(ParentRef {
        group: raw
            .group
            .as_deref()
            .unwrap_or("gateway.networking.k8s.io")
            .into(),
        kind: raw.kind.as_deref().unwrap_or("Gateway").into(),
        namespace: raw.namespace.as_deref().map(Arc::from),
        name: raw.name.as_str().into(),
        section: raw
            .section_name
            .as_deref()
            .filter(|section| !section.is_empty())
            .map(Arc::from),
        port: port.flatten(),
    })
}

fn read_port(port: i64, at: At<'_>, errors: &mut Vec<FieldError>) -> Option<u16> {
    match u16::try_from(port) {
        Ok(port) if port != 0 => Some(port),
        _ => {
            errors.push(at.error(format!("{port} is not a port: 1 to 65535")));
            None
        }
    }
}
