//! From the wire to [`HttpPolicy`]. One field that is not understood makes the whole
//! policy deny: dropping it would change what the rest means, and for a `not_` field would
//! open what it was to close.

use std::fmt::Display;
use std::sync::Arc;

use ::http::header::{HOST, HeaderName};
use ipnet::IpNet;

use super::fields::{
    Condition, HostSet, MethodSet, Operation, Pair, RequestPrincipalSet, Rule, Set, Source,
};
use super::path::{PathSet, PathValue};
use super::types::{HttpAction, HttpPolicy, HttpTarget};
use crate::policy::PolicyError;
use crate::policy::matching::{
    AddressSet, Pattern, PortSet, PrincipalSet, ServiceAccountSet, StringSet,
};
use crate::proto::waypoint as proto;

/// As Istio's own validation; bounds what one object can cost.
const MAX_RULES: usize = 512;
/// Targets that a user names. Workloads are not among them: a selector picks as many as
/// there are.
const MAX_TARGETS: usize = 16;

impl HttpPolicy {
    /// The policy that the xDS resource `AuthorizationPolicy/namespace/name` carries.
    /// Always a policy: what cannot be converted denies whatever it targets and has
    /// [`HttpPolicy::problems`], to be reported (and refused to the control plane) by the
    /// caller. An unknown action is taken for DENY, an unknown target for the policy's
    /// namespace.
    pub fn from_resource(name: &str, wire: &proto::AuthorizationPolicy) -> Self {
        let key = name.strip_prefix("AuthorizationPolicy/").unwrap_or(name);
        let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
        let mut reader = Reader {
            policy: key,
            namespace,
            opens: false,
            problems: Vec::new(),
        };
        if namespace.is_empty() {
            reader.problem("resource", format!("{name:?} is not kind/namespace/name"));
        }
        if let Some(object) = &wire.object {
            let own = format!("{}/{}", object.namespace, object.name);
            if own != key {
                reader.problem("object", format!("the resource {name:?} holds {own:?}"));
            }
        } else {
            reader.problem("object", "is missing");
        }
        let action = reader.action(wire);
        reader.opens = action == HttpAction::Allow;
        let targets = reader.targets(&wire.targets);
        let rules = reader.rules(&wire.rules, action);
        let reason = match reader.problems.first() {
            _ if !wire.invalid.is_empty() => Some(Arc::from(wire.invalid.as_str())),
            Some(problem) => Some(problem.to_string().into()),
            None => None,
        };
        Self {
            key: key.into(),
            action,
            dry_run: wire.dry_run,
            provider: wire.provider.as_str().into(),
            targets,
            rules,
            problems: reader.problems,
            invalid: reason,
        }
    }
}

struct Reader<'a> {
    policy: &'a str,
    namespace: &'a str,
    /// That a rule matches makes the request more likely to be permitted.
    opens: bool,
    problems: Vec<PolicyError>,
}

impl Reader<'_> {
    fn problem(&mut self, field: impl Display, reason: impl Into<String>) {
        self.problems.push(PolicyError {
            policy: self.policy.to_owned(),
            field: field.to_string(),
            reason: reason.into(),
        });
    }

    fn action(&mut self, wire: &proto::AuthorizationPolicy) -> HttpAction {
        use proto::authorization_policy::Action;
        let action = match Action::try_from(wire.action) {
            Ok(Action::Allow) => HttpAction::Allow,
            Ok(Action::Deny) => HttpAction::Deny,
            Ok(Action::Audit) => HttpAction::Audit,
            Ok(Action::Custom) => HttpAction::Custom,
            Err(_) => {
                self.problem("action", format!("unknown value {}", wire.action));
                HttpAction::Deny
            }
        };
        if action == HttpAction::Custom {
            if wire.provider.is_empty() {
                self.problem("provider", "CUSTOM needs a provider");
            }
            if wire.rules.is_empty() {
                self.problem("rules", "CUSTOM needs rules");
            }
        }
        action
    }

    fn targets(&mut self, wire: &[proto::Target]) -> Vec<HttpTarget> {
        if wire.is_empty() {
            return vec![HttpTarget::Everything];
        }
        let is_workload =
            |of: &&proto::Target| matches!(of.kind, Some(proto::target::Kind::Workload(_)));
        if wire.iter().filter(|of| !is_workload(of)).count() > MAX_TARGETS {
            self.problem("targets", format!("more than {MAX_TARGETS}"));
        }
        let mut targets = Vec::with_capacity(wire.len());
        for (at, target) in wire.iter().enumerate() {
            targets.push(HttpTarget::try_from(target).unwrap_or_else(|error| {
                self.problem(format_args!("targets[{at}]"), error.to_string());
                HttpTarget::Namespace(self.namespace.into())
            }));
        }
        targets.sort_unstable();
        targets.dedup();
        targets
    }

    fn rules(&mut self, wire: &[proto::AuthorizationRule], action: HttpAction) -> Vec<Rule> {
        if wire.len() > MAX_RULES {
            self.problem("rules", format!("more than {MAX_RULES}"));
        }
        let rules = wire.iter().take(MAX_RULES).enumerate();
        rules
            .map(|(at, rule)| self.rule(&format!("rules[{at}]"), rule, action))
            .collect()
    }

    fn rule(&mut self, at: &str, wire: &proto::AuthorizationRule, action: HttpAction) -> Rule {
        let mut rule = Rule::default();
        for (i, source) in wire.from.iter().enumerate() {
            let at = format!("{at}.from[{i}]");
            if *source == proto::Source::default() {
                self.problem(&at, "is empty");
            }
            let source = self.source(&at, source);
            let identity = source.principals.is_set()
                || source.namespaces.is_set()
                || source.service_accounts.is_set()
                || source.trust_domains.is_set()
                || source.request_principals.is_set();
            if action == HttpAction::Custom && identity {
                self.problem(&at, "identities cannot be used with CUSTOM");
            }
            rule.from.push(source);
        }
        for (i, operation) in wire.to.iter().enumerate() {
            let at = format!("{at}.to[{i}]");
            if *operation == proto::Operation::default() {
                self.problem(&at, "is empty");
            }
            let operation = self.operation(&at, operation);
            rule.to.push(operation);
        }
        for (i, condition) in wire.when.iter().enumerate() {
            let at = format!("{at}.when[{i}]");
            if condition.values.is_empty() && condition.not_values.is_empty() {
                self.problem(&at, "has neither values nor not_values");
            }
            let key = condition.key.as_str();
            let identity = key.starts_with("request.auth.")
                || (key.starts_with("source.") && key != "source.ip");
            if action == HttpAction::Custom && identity {
                self.problem(&at, format!("{key} cannot be used with CUSTOM"));
            }
            rule.when.extend(self.condition(&at, condition));
        }
        rule
    }

    fn source(&mut self, at: &str, wire: &proto::Source) -> Source {
        let proto::Source {
            principals,
            not_principals,
            request_principals,
            not_request_principals,
            namespaces,
            not_namespaces,
            ip_blocks,
            not_ip_blocks,
            remote_ip_blocks,
            not_remote_ip_blocks,
            service_accounts,
            not_service_accounts,
            trust_domains,
            not_trust_domains,
        } = wire;
        Source {
            principals: self.pair(
                at,
                "principals",
                principals,
                not_principals,
                pattern,
                |v, _| PrincipalSet::new(v),
            ),
            request_principals: self.pair(
                at,
                "request_principals",
                request_principals,
                not_request_principals,
                pattern,
                |v, _| RequestPrincipalSet::new(v),
            ),
            namespaces: self.strings(at, "namespaces", namespaces, not_namespaces),
            trust_domains: self.strings(at, "trust_domains", trust_domains, not_trust_domains),
            ip_blocks: self.blocks(at, "ip_blocks", ip_blocks, not_ip_blocks),
            remote_ip_blocks: self.blocks(
                at,
                "remote_ip_blocks",
                remote_ip_blocks,
                not_remote_ip_blocks,
            ),
            service_accounts: self.accounts(
                at,
                "service_accounts",
                service_accounts,
                not_service_accounts,
            ),
        }
    }

    fn operation(&mut self, at: &str, wire: &proto::Operation) -> Operation {
        let proto::Operation {
            hosts,
            not_hosts,
            ports,
            not_ports,
            methods,
            not_methods,
            paths,
            not_paths,
        } = wire;
        Operation {
            hosts: self.pair(at, "hosts", hosts, not_hosts, pattern, |v, _| {
                HostSet::new(v)
            }),
            ports: self.pair(
                at,
                "ports",
                ports,
                not_ports,
                |port| valid_port(u64::from(*port)),
                |v, _| PortSet::new(v),
            ),
            methods: self.pair(at, "methods", methods, not_methods, pattern, MethodSet::new),
            paths: self.pair(
                at,
                "paths",
                paths,
                not_paths,
                |text| PathValue::parse(text),
                PathSet::new,
            ),
        }
    }

    fn condition(&mut self, at: &str, wire: &proto::Condition) -> Option<Condition> {
        let (key, values, not) = (wire.key.as_str(), &wire.values, &wire.not_values);
        Some(match key {
            "source.ip" => Condition::SourceIp(self.blocks(at, "values", values, not)),
            "remote.ip" => Condition::RemoteIp(self.blocks(at, "values", values, not)),
            "destination.ip" => Condition::DestinationIp(self.blocks(at, "values", values, not)),
            "destination.port" => Condition::DestinationPort(self.pair(
                at,
                "values",
                values,
                not,
                |text| match text.parse() {
                    Ok(port) => valid_port(port),
                    Err(_) => Err(format!("{text:?} is not a port")),
                },
                |v, _| PortSet::new(v),
            )),
            "source.namespace" => {
                Condition::SourceNamespace(self.strings(at, "values", values, not))
            }
            "source.trustDomain" => {
                Condition::SourceTrustDomain(self.strings(at, "values", values, not))
            }
            "source.serviceAccount" => {
                Condition::SourceServiceAccount(self.accounts(at, "values", values, not))
            }
            "source.principal" => {
                Condition::SourcePrincipal(self.pair(at, "values", values, not, pattern, |v, _| {
                    PrincipalSet::new(v)
                }))
            }
            "request.auth.principal" => Condition::RequestPrincipal(self.pair(
                at,
                "values",
                values,
                not,
                pattern,
                |v, _| RequestPrincipalSet::new(v),
            )),
            "request.auth.audiences" => {
                Condition::Audiences(self.strings(at, "values", values, not))
            }
            "request.auth.presenter" => {
                Condition::Presenter(self.strings(at, "values", values, not))
            }
            "connection.sni" => {
                Condition::Sni(
                    self.pair(at, "values", values, not, pattern, |v, _| HostSet::new(v)),
                )
            }
            _ => return self.bracketed_condition(at, key, values, not),
        })
    }

    fn bracketed_condition(
        &mut self,
        at: &str,
        key: &str,
        values: &[String],
        not: &[String],
    ) -> Option<Condition> {
        let names = if let Some(rest) = key.strip_prefix("request.headers") {
            brackets(rest).filter(|names| names.len() == 1)
        } else if let Some(rest) = key.strip_prefix("request.auth.claims") {
            if let Some(path) = brackets(rest) {
                let path = path.into_iter().map(Box::from).collect();
                let values = self.strings(at, "values", values, not);
                return Some(Condition::Claim(path, values));
            }
            None
        } else {
            None
        };
        let Some(name) = names.map(|names| names[0].to_ascii_lowercase()) else {
            self.problem(format_args!("{at}.key"), format!("unknown key {key:?}"));
            return None;
        };
        Some(match name.as_str() {
            ":authority" => {
                Condition::Host(
                    self.pair(at, "values", values, not, pattern, |v, _| HostSet::new(v)),
                )
            }
            ":method" => {
                Condition::Method(self.pair(at, "values", values, not, pattern, MethodSet::new))
            }
            ":path" => Condition::PathAndQuery(self.strings(at, "values", values, not)),
            name => match HeaderName::from_bytes(name.as_bytes()) {
                Ok(HOST) => {
                    Condition::Host(
                        self.pair(at, "values", values, not, pattern, |v, _| HostSet::new(v)),
                    )
                }
                Ok(header) => Condition::Header(header, self.strings(at, "values", values, not)),
                Err(_) => {
                    let reason = format!("{name:?} is not the name of a header");
                    self.problem(format_args!("{at}.key"), reason);
                    return None;
                }
            },
        })
    }

    /// A field and its `not` form. `opens` for `make`: a hit makes it more likely that the
    /// request is permitted.
    fn pair<W, V, S: Set>(
        &mut self,
        at: &str,
        field: &str,
        yes: &[W],
        no: &[W],
        value: impl Fn(&W) -> Result<V, String>,
        make: impl Fn(Vec<V>, bool) -> S,
    ) -> Pair<S> {
        let mut read = |field: &str, list: &[W]| {
            let mut values = Vec::with_capacity(list.len());
            for (i, one) in list.iter().enumerate() {
                match value(one) {
                    Ok(value) => values.push(value),
                    Err(reason) => self.problem(format_args!("{at}.{field}[{i}]"), reason),
                }
            }
            values
        };
        let (yes, no) = (read(field, yes), read(&format!("not_{field}"), no));
        Pair {
            yes: make(yes, self.opens),
            no: make(no, !self.opens),
        }
    }

    fn strings(&mut self, at: &str, field: &str, yes: &[String], no: &[String]) -> Pair<StringSet> {
        self.pair(at, field, yes, no, pattern, |v, _| StringSet::new(v))
    }

    fn blocks(&mut self, at: &str, field: &str, yes: &[String], no: &[String]) -> Pair<AddressSet> {
        self.pair(at, field, yes, no, block, |v, _| AddressSet::new(v))
    }

    fn accounts(
        &mut self,
        at: &str,
        field: &str,
        yes: &[String],
        no: &[String],
    ) -> Pair<ServiceAccountSet> {
        let namespace = self.namespace.to_owned();
        let account = |text: &String| {
            let (namespace, name) = text.split_once('/').unwrap_or((&namespace, text));
            if namespace.is_empty() || name.is_empty() || name.contains('/') || text.contains('*') {
                return Err(format!(
                    "{text:?} is not namespace/name of a service account"
                ));
            }
            Ok((namespace.into(), name.into()))
        };
        self.pair(at, field, yes, no, account, |v, _| {
            ServiceAccountSet::new(v)
        })
    }
}

#[expect(
    clippy::ptr_arg,
    reason = "a function over the elements of a Vec<String>"
)]
fn pattern(text: &String) -> Result<Pattern, String> {
    Pattern::parse(text)
}

fn valid_port(port: u64) -> Result<u16, String> {
    match u16::try_from(port) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{port} is not a port: 1 to 65535")),
    }
}

/// An address or a block. IPv4-mapped IPv6 is IPv4, because requests are compared so.
fn block(text: &String) -> Result<IpNet, String> {
    let wrong = || format!("{text:?} is neither an address nor a block of addresses");
    let block: IpNet = match text.parse() {
        Ok(block) => block,
        Err(_) => IpNet::from(text.parse::<std::net::IpAddr>().map_err(|_| wrong())?),
    };
    let block = block.trunc();
    let IpNet::V6(v6) = block else {
        return Ok(block);
    };
    match (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(96)) {
        (Some(v4), Some(bits)) => IpNet::new(v4.into(), bits).map_err(|_| wrong()),
        _ => Ok(block),
    }
}

/// `[a][b]` as its names.
fn brackets(text: &str) -> Option<Vec<&str>> {
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    let names: Vec<&str> = inner.split("][").collect();
    let bad = |name: &&str| name.is_empty() || name.contains(['[', ']']);
    (!names.iter().any(bad)).then_some(names)
}
