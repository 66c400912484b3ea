//! From the wire to [`Policy`]. One field that is not understood makes the whole
//! policy invalid: dropping it would change what the rest means, and for a `not_`
//! field would open what it was to close.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use super::matching::{AddressSet, Pattern, PortSet, PrincipalSet, ServiceAccountSet, StringSet};
use super::types::{Action, Clause, Group, Match, Policy, Scope};
use crate::proto::security as proto;

/// Why an `Authorization` is not a policy. Not retryable: the configuration is at
/// fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("authorization policy {policy}: {field}: {reason}")]
pub struct PolicyError {
    /// `namespace/name` of the policy.
    pub policy: String,
    /// Path of the field in the wire message, such as
    /// `groups[0].rules[1].matches[0].source_ips[2]`.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl TryFrom<&proto::Authorization> for Policy {
    type Error = PolicyError;

    fn try_from(authorization: &proto::Authorization) -> Result<Self, PolicyError> {
        let key = format!("{}/{}", authorization.namespace, authorization.name);
        convert(&key, authorization).map_err(|invalid| PolicyError {
            policy: key,
            field: invalid.field,
            reason: invalid.reason,
        })
    }
}

impl Policy {
    /// The policy that the xDS resource `name` carries. Always a policy: what cannot
    /// be converted fails closed for whatever it covers and has [`Policy::invalid`]
    /// set, to be reported (and refused to the control plane) by the caller.
    ///
    /// `name` is the key under which workloads list it. An unknown scope is taken for
    /// the policy's namespace, an unknown action for DENY.
    pub fn from_resource(name: &str, authorization: &proto::Authorization) -> Self {
        match convert(name, authorization) {
            Ok(policy) => policy,
            Err(Invalid { field, reason }) => {
                let error = PolicyError {
                    policy: name.into(),
                    field,
                    reason,
                };
                let mut policy = Self::unreadable(name, "");
                policy.scope = scope(authorization.scope).unwrap_or(Scope::Namespace);
                policy.action = action(authorization.action).unwrap_or(Action::Deny);
                policy.dry_run = authorization.dry_run;
                if !authorization.namespace.is_empty() {
                    policy.namespace = authorization.namespace.as_str().into();
                }
                policy.close(error.to_string().into());
                policy
            }
        }
    }
}

struct Invalid {
    field: String,
    reason: String,
}

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Invalid {
    Invalid {
        field: field.into(),
        reason: reason.into(),
    }
}

fn convert(key: &str, wire: &proto::Authorization) -> Result<Policy, Invalid> {
    if wire.name.is_empty() {
        return Err(invalid("name", "is empty"));
    }
    if wire.namespace.is_empty() {
        return Err(invalid("namespace", "is empty"));
    }
    if key.split_once('/') != Some((&wire.namespace, &wire.name)) {
        let own = format!("{}/{}", wire.namespace, wire.name);
        return Err(invalid(
            "name",
            format!("the resource is named {key:?} but holds policy {own:?}"),
        ));
    }
    let reason = wire.invalid_reason.as_str();
    Ok(Policy {
        key: key.into(),
        namespace: wire.namespace.as_str().into(),
        scope: scope(wire.scope)?,
        action: action(wire.action)?,
        dry_run: wire.dry_run,
        groups: convert_groups("groups", &wire.groups)?,
        waypoint_groups: match wire.has_waypoint_groups {
            true => Some(convert_groups("waypoint_groups", &wire.waypoint_groups)?),
            false => None,
        },
        invalid: (!reason.is_empty()).then(|| Arc::from(reason)),
    })
}

fn convert_groups(field: &str, wire: &[proto::Group]) -> Result<Vec<Group>, Invalid> {
    let mut groups = Vec::with_capacity(wire.len());
    for (g, group) in wire.iter().enumerate() {
        let mut clauses = Vec::with_capacity(group.rules.len());
        for (r, rules) in group.rules.iter().enumerate() {
            let mut matches = Vec::with_capacity(rules.matches.len());
            for (m, wire) in rules.matches.iter().enumerate() {
                let converted = convert_match(wire).map_err(|invalid| Invalid {
                    field: format!("{field}[{g}].rules[{r}].matches[{m}].{}", invalid.field),
                    ..invalid
                })?;
                matches.push(converted);
            }
            clauses.push(Clause { matches });
        }
        groups.push(Group { clauses });
    }
    Ok(groups)
}

fn scope(wire: i32) -> Result<Scope, Invalid> {
    match proto::Scope::try_from(wire) {
        Ok(proto::Scope::Global) => Ok(Scope::Global),
        Ok(proto::Scope::Namespace) => Ok(Scope::Namespace),
        Ok(proto::Scope::WorkloadSelector) => Ok(Scope::WorkloadSelector),
        Err(_) => Err(invalid("scope", format!("unknown value {wire}"))),
    }
}

fn action(wire: i32) -> Result<Action, Invalid> {
    match proto::Action::try_from(wire) {
        Ok(proto::Action::Allow) => Ok(Action::Allow),
        Ok(proto::Action::Deny) => Ok(Action::Deny),
        Err(_) => Err(invalid("action", format!("unknown value {wire}"))),
    }
}

fn convert_match(wire: &proto::Match) -> Result<Match, Invalid> {
    let strings = |field, list: &[_]| each(field, list, pattern).map(StringSet::new);
    let principals = |field, list: &[_]| each(field, list, pattern).map(PrincipalSet::new);
    let addresses = |field, list: &[_]| each(field, list, block).map(AddressSet::new);
    let ports = |field, list: &[_]| each(field, list, port).map(PortSet::new);
    let accounts = |field, list: &[_]| each(field, list, account).map(ServiceAccountSet::new);
    Ok(Match {
        namespaces: strings("namespaces", &wire.namespaces)?,
        not_namespaces: strings("not_namespaces", &wire.not_namespaces)?,
        principals: principals("principals", &wire.principals)?,
        not_principals: principals("not_principals", &wire.not_principals)?,
        source_ips: addresses("source_ips", &wire.source_ips)?,
        not_source_ips: addresses("not_source_ips", &wire.not_source_ips)?,
        destination_ips: addresses("destination_ips", &wire.destination_ips)?,
        not_destination_ips: addresses("not_destination_ips", &wire.not_destination_ips)?,
        destination_ports: ports("destination_ports", &wire.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &wire.not_destination_ports)?,
        service_accounts: accounts("service_accounts", &wire.service_accounts)?,
        not_service_accounts: accounts("not_service_accounts", &wire.not_service_accounts)?,
        trust_domains: strings("trust_domains", &wire.trust_domains)?,
        not_trust_domains: strings("not_trust_domains", &wire.not_trust_domains)?,
    })
}

fn each<T, U>(
    field: &str,
    list: &[T],
    convert: impl Fn(&T) -> Result<U, String>,
) -> Result<Vec<U>, Invalid> {
    list.iter()
        .enumerate()
        .map(|(i, value)| convert(value).map_err(|reason| invalid(format!("{field}[{i}]"), reason)))
        .collect()
}

fn pattern(wire: &proto::StringMatch) -> Result<Pattern, String> {
    use proto::string_match::MatchType;
    let text = |text: &str| match text {
        "" => Err("the text is empty".to_owned()),
        text => Ok(text.into()),
    };
    match &wire.match_type {
        Some(MatchType::Exact(exact)) => text(exact).map(Pattern::Exact),
        Some(MatchType::Prefix(prefix)) => text(prefix).map(Pattern::Prefix),
        Some(MatchType::Suffix(suffix)) => text(suffix).map(Pattern::Suffix),
        Some(MatchType::Presence(_)) => Ok(Pattern::Presence),
        None => Err("the match has no type".to_owned()),
    }
}

fn account(wire: &proto::ServiceAccountMatch) -> Result<(Box<str>, Box<str>), String> {
    if wire.namespace.is_empty() {
        return Err("the namespace is empty".to_owned());
    }
    if wire.service_account.is_empty() {
        return Err("the service account is empty".to_owned());
    }
    Ok((
        wire.namespace.as_str().into(),
        wire.service_account.as_str().into(),
    ))
}

fn port(wire: &u32) -> Result<u16, String> {
    match u16::try_from(*wire) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{wire} is not a port: 1 to 65535")),
    }
}

/// A block of addresses. One of IPv4-mapped IPv6 addresses is that of the IPv4
/// addresses, because connections are compared in that form.
fn block(wire: &proto::Address) -> Result<IpNet, String> {
    let address: IpAddr = match wire.address.as_slice() {
        &[a, b, c, d] => [a, b, c, d].into(),
        bytes => match <[u8; 16]>::try_from(bytes) {
            Ok(bytes) => bytes.into(),
            Err(_) => {
                return Err(format!(
                    "an address has 4 or 16 bytes, this one {}",
                    bytes.len()
                ));
            }
        },
    };
    let length = wire.length;
    let wrong = || format!("prefix length {length} is too long for {address}");
    let bits = u8::try_from(length).map_err(|_| wrong())?;
    let block = IpNet::new(address, bits).map_err(|_| wrong())?.trunc();
    let IpAddr::V6(v6) = address else {
        return Ok(block);
    };
    match (v6.to_ipv4_mapped(), bits.checked_sub(96)) {
        (Some(v4), Some(bits)) => Ok(IpNet::new(v4.into(), bits).map_err(|_| wrong())?.trunc()),
        (Some(_), None) if block.addr() != IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Err(format!(
            "prefix length {length} of an IPv4-mapped address is less than 96"
        )),
        _ => Ok(block),
    }
}
