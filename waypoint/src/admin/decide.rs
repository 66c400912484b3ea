//! What would become of a request: the same code that decides about real ones, asked with
//! made-up values, and what it says in words (`adit why`).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Instant;

use adit_shared::hbone::Authority;
use adit_shared::identity::SpiffeId;
use adit_shared::policy::http::{
    HttpFields, HttpPolicySet, HttpRequest, NormalizedPath, normalize, remote_address,
};
use adit_shared::policy::{DenyReason, DryRunOutcome, Verdict};
use http::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Uri};
use serde_json::{Value, json};

use crate::proxy::consumer::{is_consumer, judged_at};
use crate::proxy::destination::{Target, resolve};
use crate::proxy::headers::is_grpc;
use crate::route::{
    self, AuthProtocol, Backends, ExternalAuth, Filters, Lookup, MatchedPath, NoClaims, PortRoutes,
    RequestView, Rule,
};
use crate::state::{Backend, Protocol, Reach, View};

/// The request in question.
pub struct Question {
    /// Who asks.
    source: SpiffeId,
    source_address: SocketAddr,
    /// What is dialled.
    authority: Authority,
    destination: SocketAddr,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    /// What a ClientHello names, where TLS is passed through; in small letters.
    server_name: Option<String>,
}

/// What is judged, on its way.
struct Asked<'a> {
    path: &'a NormalizedPath<'a>,
    query: Option<&'a str>,
    headers: &'a HeaderMap,
    destination: SocketAddr,
    /// It is not HTTP: nothing of it can be seen.
    opaque: bool,
}

impl Question {
    /// Reads a query: `source` (SPIFFE id), `sourceAddress`, `destination` (address and
    /// port), `method`, `path`, `headers` (a line for each), `serverName`.
    ///
    /// # Errors
    /// What is missing or wrong.
    pub fn read(query: &HashMap<String, String>) -> Result<Self, String> {
        let get = |name: &str| {
            let value = query.get(name).filter(|value| !value.is_empty());
            value.ok_or_else(|| format!("{name} is required"))
        };
        let or = |name: &str, default: &str| query.get(name).map_or(default.into(), String::clone);
        let wrong = |name: &str, error: &dyn std::fmt::Display| format!("{name}: {error}");
        let destination: SocketAddr = get("destination")?
            .parse()
            .map_err(|e: std::net::AddrParseError| wrong("destination", &e))?;
        let mut headers = HeaderMap::new();
        for line in or("headers", "").lines() {
            let (name, value) = line
                .split_once(':')
                .ok_or_else(|| format!("headers: {line:?} has no colon"))?;
            let name: HeaderName = name.trim().parse().map_err(|e| wrong("headers", &e))?;
            let value: HeaderValue = value.trim().parse().map_err(|e| wrong("headers", &e))?;
            headers.append(name, value);
        }
        Ok(Self {
            source: get("source")?.parse().map_err(|e| wrong("source", &e))?,
            source_address: SocketAddr::new(
                or("sourceAddress", "0.0.0.0")
                    .parse()
                    .map_err(|e: std::net::AddrParseError| wrong("sourceAddress", &e))?,
                0,
            ),
            authority: Authority::Address(destination),
            destination,
            method: or("method", "GET")
                .parse()
                .map_err(|e| wrong("method", &e))?,
            uri: or("path", "/").parse().map_err(|e| wrong("path", &e))?,
            headers,
            server_name: query
                .get("serverName")
                .filter(|name| !name.is_empty())
                .map(|name| name.to_ascii_lowercase()),
        })
    }

    /// Asks the view.
    pub fn answer(&self, view: &View) -> Value {
        let namespace = self.source.namespace();
        let destination = match resolve(view, &self.authority, namespace) {
            Ok(destination) => destination,
            Err(error) => {
                return json!({ "refused": error.to_string(), "status": error.status().as_u16() });
            }
        };
        let Some(target) = destination.target(view) else {
            return json!({ "refused": "it has just gone", "status": 503 });
        };
        let mode = view.mesh().path_normalization;
        let path = match normalize(self.uri.path(), mode) {
            Ok(path) => path,
            Err(error) => return json!({ "refused": error.to_string(), "status": 400 }),
        };
        // HTTP/1.0 may leave it out; who was dialled is meant then.
        let mut headers = self.headers.clone();
        if !headers.contains_key(HOST)
            && let Ok(host) = HeaderValue::try_from(destination.host())
        {
            headers.insert(HOST, host);
        }
        let opaque = matches!(target.protocol(), Protocol::Tcp | Protocol::Tls);
        let asked = Asked {
            path: &path,
            query: self.uri.query(),
            headers: &headers,
            destination: self.destination,
            opaque,
        };
        let mut answer = json!({
            "path": path.as_str(),
            "authorization": self.authorize(view, target.policies(), &asked),
        });
        match &target {
            Target::Service(port) => {
                let key = &port.service.service().key;
                answer["service"] = json!({
                    "namespace": &*key.namespace, "hostname": &*key.hostname,
                    "port": port.port, "protocol": super::protocol(port.protocol),
                });
                let own = self.judged_endpoints(view, &port.backend, &asked);
                match port.routes.for_port(port.port, namespace) {
                    PortRoutes::None => answer["endpoints"] = own,
                    PortRoutes::Http(table) => {
                        let request = RequestView {
                            method: &self.method,
                            authority: host(&headers),
                            path: path.as_str(),
                            query: self.uri.query(),
                            headers: &headers,
                            claims: &NoClaims,
                            is_grpc: is_grpc(&headers),
                        };
                        answer["route"] = match table.find(&request) {
                            Lookup::NoMatch => json!({ "noMatch": true, "status": 404 }),
                            Lookup::Matched(matched) => {
                                let rule = matched.rule;
                                let sent = |backend: Option<&route::Backend>| {
                                    self.sent(view, &target, rule, matched.path, backend, &asked)
                                };
                                json!({
                                    "kind": &*rule.route().kind,
                                    "namespace": &*rule.route().namespace,
                                    "name": &*rule.route().name,
                                    "rule": rule.index(),
                                    "ruleName": rule.name(),
                                    "match": matched.alternative(),
                                    "invalid": matched
                                        .invalid()
                                        .or(rule.filters().invalid())
                                        .map(|reason| &**reason),
                                    "asks": rule.filters().external_auth().map(|auth| asks(auth)),
                                    "backends": backends(rule.backends(), sent),
                                    "retries": rule.retry().is_some(),
                                    "timeout": rule.timeouts().request.map(|t| format!("{t:?}")),
                                })
                            }
                        };
                    }
                    PortRoutes::Tcp(table) | PortRoutes::Tls(table) => {
                        // A request of HTTP names no server by TLS.
                        let name = self.server_name.as_deref().filter(|_| opaque);
                        answer["route"] = match table.find(name) {
                            None => json!({ "noMatch": true, "status": 404 }),
                            Some(rule) => {
                                let consumer = is_consumer(&rule.route().namespace, &target);
                                let to = |backend: &route::Backend| {
                                    let to = Some(backend.target());
                                    self.leads(view, &target, to, consumer, &asked)
                                };
                                json!({
                                    "kind": &*rule.route().kind,
                                    "namespace": &*rule.route().namespace,
                                    "name": &*rule.route().name,
                                    "rule": rule.index(),
                                    "ruleName": rule.name(),
                                    "backends": rule.backends().valid().map(to).collect::<Vec<_>>(),
                                })
                            }
                        };
                    }
                }
            }
            Target::Workload { reach, .. } => {
                answer["workload"] = (&*reach.workload.uid).into();
                answer["endpoints"] = json!([{
                    "workload": &*reach.workload.uid, "address": reach.endpoint.address,
                    "authorization": self.own_policies(view, reach, &asked),
                }]);
            }
        }
        answer
    }

    /// A backend, or what was dialled where the rule names none, with the request as it gets
    /// there, after the rule's filters.
    fn sent(
        &self,
        view: &View,
        dialled: &Target,
        rule: &Rule,
        matched: MatchedPath,
        backend: Option<&route::Backend>,
        asked: &Asked<'_>,
    ) -> Value {
        let to = backend.map(route::Backend::target);
        let (mut head, ()) = Request::new(()).into_parts();
        head.method = self.method.clone();
        head.headers = asked.headers.clone();
        let text = match asked.query {
            Some(query) => format!("{}?{query}", asked.path.as_str()),
            None => asked.path.as_str().to_owned(),
        };
        head.uri = text.parse().unwrap_or_default();
        let nothing = Filters::default();
        let filters = backend.map_or(&nothing, route::Backend::filters);
        let mode = view.mesh().path_normalization;
        let changed = rule.filters().apply_request(&mut head, matched, filters);
        let path = changed
            .map_err(|error| error.to_string())
            .and_then(|()| normalize(head.uri.path(), mode).map_err(|error| error.to_string()));
        let path = match path {
            Ok(path) => path,
            Err(error) => return json!({ "invalid": error }),
        };
        let sent = Asked {
            path: &path,
            query: head.uri.query(),
            headers: &head.headers,
            ..*asked
        };
        let consumer = is_consumer(&rule.route().namespace, dialled);
        self.leads(view, dialled, to, consumer, &sent)
    }

    /// Where a backend leads.
    fn leads(
        &self,
        view: &View,
        dialled: &Target,
        to: Option<&route::Target>,
        consumer: bool,
        asked: &Asked<'_>,
    ) -> Value {
        let Some(port) = judged_at(view, dialled, to) else {
            let to = to.map(|to| to.service.to_string());
            return json!({ "invalid": "it is not known", "service": to });
        };
        let key = &port.service.service().key;
        let subset = to.and_then(|to| to.subset.as_deref()).unwrap_or_default();
        let backend = port.subset(subset);
        let mut answer = json!({
            "service": &*key.hostname,
            "namespace": &*key.namespace,
            "port": port.port,
            "endpoints": backend.map(|backend| self.judged_endpoints(view, backend, asked)),
        });
        if consumer {
            let there = Asked {
                destination: SocketAddr::new(asked.destination.ip(), port.port),
                ..*asked
            };
            answer["authorization"] = self.authorize(view, &port.policies, &there);
        }
        answer
    }

    /// Endpoints, how they are, and what their own policies say.
    fn judged_endpoints(&self, view: &View, backend: &Backend, asked: &Asked<'_>) -> Value {
        let mut all = endpoints(backend);
        for endpoint in all.as_array_mut().into_iter().flatten() {
            let uid = endpoint["workload"].as_str();
            let reach = uid.and_then(|uid| backend.reach(uid));
            let judged = reach.map(|reach| self.own_policies(view, &reach, asked));
            endpoint["authorization"] = judged.into();
        }
        all
    }

    /// The policies of an endpoint itself; null where there are none.
    fn own_policies(&self, view: &View, reach: &Reach, asked: &Asked<'_>) -> Value {
        let Some(policies) = &reach.policies else {
            return Value::Null;
        };
        let there = Asked {
            destination: reach.endpoint.address,
            ..*asked
        };
        self.authorize(view, policies, &there)
    }

    fn authorize(&self, view: &View, policies: &HttpPolicySet, asked: &Asked<'_>) -> Value {
        let peer = self.source_address.ip();
        let headers = asked.headers;
        let trusted = view.mesh().trusted_proxies;
        let request = HttpRequest {
            source_identity: Some(&self.source),
            source_ip: peer,
            remote_ip: match asked.opaque {
                true => peer,
                false => remote_address(peer, headers, trusted),
            },
            destination_ip: asked.destination.ip(),
            destination_port: asked.destination.port(),
            sni: self.server_name.as_deref().filter(|_| asked.opaque),
            http: (!asked.opaque).then(|| HttpFields {
                method: self.method.as_str(),
                path: asked.path,
                query: asked.query,
                host: host(headers),
                headers,
                claims: None,
            }),
        };
        let opaque = asked.opaque;
        let trust = &view.mesh().trust;
        let custom = policies.custom(&request, trust);
        let refused = custom.iter().find(|check| opaque && !check.dry_run);
        let asked: Vec<Value> = custom
            .iter()
            .map(|check| json!({ "provider": check.provider, "policy": check.policy.to_string() }))
            .collect();
        let evaluation = policies.evaluate_deny_allow(&request, trust);
        let dry: Vec<Value> = evaluation
            .dry_run
            .iter()
            .map(|dry| {
                let outcome = match dry.outcome {
                    DryRunOutcome::WouldDeny => "would deny",
                    DryRunOutcome::WouldAllow => "would allow",
                };
                json!({ "policy": dry.policy.to_string(), "outcome": outcome })
            })
            .collect();
        let mut answer = match &evaluation.verdict {
            Verdict::Permitted(permitted) => json!({
                "allowed": true,
                "policies": !policies.is_empty(),
                "policy": permitted.policy().map(ToString::to_string),
                "rule": permitted.rule(),
            }),
            Verdict::Denied(denied) => json!({
                "allowed": false,
                "policies": true,
                "policy": denied.policy.as_ref().map(ToString::to_string),
                "rule": match denied.reason {
                    DenyReason::Matched(rule) => Some(rule),
                    _ => None,
                },
                "reason": denied.to_string(),
            }),
        };
        if let Some(check) = refused
            && answer["allowed"] == true
        {
            answer["allowed"] = false.into();
            answer["policy"] = check.policy.to_string().into();
            answer["reason"] = "its provider judges HTTP requests only".into();
        } else if !asked.is_empty() {
            answer["asked"] = asked.into();
        }
        if !dry.is_empty() {
            answer["dryRun"] = dry.into();
        }
        answer
    }
}

fn host(headers: &HeaderMap) -> &str {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    host.unwrap_or_default()
}

/// Whom a rule has asked about requests.
fn asks(auth: &ExternalAuth) -> Value {
    json!({
        "service": &*auth.target.service.hostname,
        "namespace": &*auth.target.service.namespace,
        "port": auth.target.port,
        "protocol": match &auth.protocol {
            AuthProtocol::Http { .. } => "HTTP",
            AuthProtocol::Grpc { .. } => "GRPC",
        },
    })
}

/// A rule's backends; without any it means what was dialled.
fn backends(backends: &Backends, sent: impl Fn(Option<&route::Backend>) -> Value) -> Value {
    if backends.is_empty() {
        return json!([sent(None)]);
    }
    backends
        .valid()
        .map(|backend| sent(Some(backend)))
        .collect()
}

/// Endpoints and how they are.
pub(super) fn endpoints(backend: &Backend) -> Value {
    let status = backend.balancer.endpoints(Instant::now());
    status
        .iter()
        .map(|status| {
            let reach = backend.reach(&status.endpoint.uid);
            let locality = reach.as_ref().map(|reach| {
                let locality = &reach.workload.locality;
                let parts = [&locality.region, &locality.zone, &locality.subzone];
                let parts: Vec<&str> = parts.iter().map(|part| &***part).collect();
                parts.join("/").trim_end_matches('/').to_owned()
            });
            json!({
                "workload": &*status.endpoint.uid,
                "address": reach.map(|reach| reach.endpoint.address),
                "locality": locality,
                "status": match (status.ready, status.ejected) {
                    (_, true) => "EJECTED",
                    (false, _) => "UNHEALTHY",
                    (true, false) => "HEALTHY",
                },
                "active": status.active,
                "requests": status.requests,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_says_what_is_missing() {
        let read = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            let query = pairs
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect();
            Question::read(&query).map(|_| ()).err()
        };
        let source = ("source", "spiffe://cluster.local/ns/shop/sa/client");
        let destination = ("destination", "10.96.1.1:80");
        assert_eq!(read(&[source, destination]), None);
        assert_eq!(read(&[source]).as_deref(), Some("destination is required"));
        let wrong = read(&[source, destination, ("headers", "x")]);
        assert_eq!(wrong.as_deref(), Some("headers: \"x\" has no colon"));
        let wrong = read(&[("source", "nobody"), destination]);
        assert!(wrong.is_some_and(|text| text.starts_with("source: ")));
    }
}
