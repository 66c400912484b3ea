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
use http::{Method, Uri};
use serde_json::{Value, json};

use crate::proxy::destination::{Target, resolve};
use crate::proxy::headers::is_grpc;
use crate::route::{Backends, Lookup, NoClaims, PortRoutes, RequestView};
use crate::state::{Backend, View};

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
}

impl Question {
    /// Reads a query: `source` (SPIFFE id), `sourceAddress`, `destination` (address and
    /// port), `method`, `path`, `headers` (a line for each).
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
        let mut answer = json!({
            "path": path.as_str(),
            "authorization": self.authorize(view, target.policies(), &path, self.destination),
        });
        match &target {
            Target::Service(port) => {
                let key = &port.service.service().key;
                answer["service"] = json!({
                    "namespace": &*key.namespace, "hostname": &*key.hostname,
                    "port": port.port, "protocol": super::protocol(port.protocol),
                });
                let own = endpoints(&port.backend);
                match port.routes.for_port(port.port, namespace) {
                    PortRoutes::None => answer["endpoints"] = own,
                    PortRoutes::Http(table) => {
                        let request = RequestView {
                            method: &self.method,
                            authority: self.host(),
                            path: path.as_str(),
                            query: self.uri.query(),
                            headers: &self.headers,
                            claims: &NoClaims,
                            is_grpc: is_grpc(&self.headers),
                        };
                        answer["route"] = match table.find(&request) {
                            Lookup::NoMatch => json!({ "noMatch": true, "status": 404 }),
                            Lookup::Matched(matched) => {
                                let rule = matched.rule;
                                json!({
                                    "kind": &*rule.route().kind,
                                    "namespace": &*rule.route().namespace,
                                    "name": &*rule.route().name,
                                    "rule": rule.index(),
                                    "ruleName": rule.name(),
                                    "match": matched.alternative(),
                                    "invalid": matched.invalid().map(|reason| &**reason),
                                    "backends": backends(view, rule.backends()),
                                    "retries": rule.retry().is_some(),
                                    "timeout": rule.timeouts().request.map(|t| format!("{t:?}")),
                                })
                            }
                        };
                    }
                    PortRoutes::Tcp(table) | PortRoutes::Tls(table) => {
                        let rule = table.rule();
                        answer["route"] = json!({
                            "kind": &*rule.route().kind,
                            "namespace": &*rule.route().namespace,
                            "name": &*rule.route().name,
                            "rule": rule.index(),
                            "ruleName": rule.name(),
                        });
                    }
                }
            }
            Target::Workload { reach, .. } => {
                answer["workload"] = (&*reach.workload.uid).into();
                answer["endpoints"] = json!([{
                    "workload": &*reach.workload.uid, "address": reach.endpoint.address,
                }]);
            }
        }
        answer
    }

    fn host(&self) -> &str {
        let host = self.headers.get(HOST).and_then(|host| host.to_str().ok());
        host.unwrap_or_default()
    }

    fn authorize(
        &self,
        view: &View,
        policies: &HttpPolicySet,
        path: &NormalizedPath<'_>,
        destination: SocketAddr,
    ) -> Value {
        let peer = self.source_address.ip();
        let request = HttpRequest {
            source_identity: Some(&self.source),
            source_ip: peer,
            remote_ip: remote_address(peer, &self.headers, 0),
            destination_ip: destination.ip(),
            destination_port: destination.port(),
            sni: None,
            http: Some(HttpFields {
                method: self.method.as_str(),
                path,
                query: self.uri.query(),
                host: self.host(),
                headers: &self.headers,
                claims: None,
            }),
        };
        let trust = &view.mesh().trust;
        let custom = policies.custom(&request, trust);
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
        if !asked.is_empty() {
            answer["asked"] = asked.into();
        }
        if !dry.is_empty() {
            answer["dryRun"] = dry.into();
        }
        answer
    }
}

fn backends(view: &View, backends: &Backends) -> Value {
    let one = |backend: &crate::route::Backend| {
        let target = backend.target();
        let service = view.service(&target.service);
        let port = service.and_then(|service| service.port(target.port));
        json!({
            "service": target.service.hostname.to_string(),
            "namespace": target.service.namespace.to_string(),
            "port": target.port,
            "endpoints": port.map(|port| endpoints(&port.backend)),
        })
    };
    backends.valid().map(one).collect()
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
