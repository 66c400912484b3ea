//! Parses the values inside the rules of an AuthorizationPolicy.

use std::net::IpAddr;

use ipnet::IpNet;

use super::authorization::{
    AccountMatch, Condition, MAX_SERVICE_ACCOUNTS, Operation, PolicyAction, Rule, Source,
    StringMatch, Values,
};
use super::authorization_raw as raw;
use super::field::{At, FieldError};
use super::meta::{self, Meta};

/// Parses one rule; whatever is wrong with it goes to `errors`.
pub(super) fn rule(
    raw: &raw::Rule,
    action: PolicyAction,
    meta: &Meta,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Rule {
    let mut rule = Rule::default();
    let list = at.key("from");
    for (index, from) in raw.from.iter().enumerate() {
        let at = list.index(index);
        let at = at.key("source");
        let parsed = from
            .source
            .as_ref()
            .map(|raw| source(raw, meta, at, errors));
        match parsed {
            Some(source) if source != Source::default() => {
                if action == PolicyAction::Custom {
                    custom_source(&source, at, errors);
                }
                rule.from.push(source);
            }
            // A source whose values were all wrong has been reported already.
            Some(_)
                if errors
                    .iter()
                    .any(|error| error.path.0.starts_with(&at.path().0)) => {}
            _ => errors.push(at.error("is empty: state at least one field, or leave `from` out")),
        }
    }
    let list = at.key("to");
    for (index, to) in raw.to.iter().enumerate() {
        let at = list.index(index);
        let at = at.key("operation");
        let parsed = to.operation.as_ref().map(|raw| operation(raw, at, errors));
        match parsed {
            Some(operation) if operation != Operation::default() => rule.to.push(operation),
            Some(_)
                if errors
                    .iter()
                    .any(|error| error.path.0.starts_with(&at.path().0)) => {}
            _ => errors.push(at.error("is empty: state at least one field, or leave `to` out")),
        }
    }
    let list = at.key("when");
    for (index, when) in raw.when.iter().enumerate() {
        rule.when
            .extend(condition(when, action, meta, list.index(index), errors));
    }
    rule
}

/// An external authorizer runs before the mesh knows these (Istio
/// `AuthorizationPolicy`, action CUSTOM).
fn custom_source(source: &Source, at: At<'_>, errors: &mut Vec<FieldError>) {
    for (key, used) in [
        ("principals", !source.principals.is_empty()),
        ("namespaces", !source.namespaces.is_empty()),
        ("serviceAccounts", !source.service_accounts.is_empty()),
        ("trustDomains", !source.trust_domains.is_empty()),
        ("requestPrincipals", !source.request_principals.is_empty()),
    ] {
        if used {
            errors.push(at.key(key).error("cannot be used with action CUSTOM"));
        }
    }
}

fn source(raw: &raw::Source, meta: &Meta, at: At<'_>, errors: &mut Vec<FieldError>) -> Source {
    let source = Source {
        principals: pair(
            (&raw.principals, "principals"),
            (&raw.not_principals, "notPrincipals"),
            at,
            errors,
            string_match,
        ),
        namespaces: pair(
            (&raw.namespaces, "namespaces"),
            (&raw.not_namespaces, "notNamespaces"),
            at,
            errors,
            string_match,
        ),
        service_accounts: pair(
            (&raw.service_accounts, "serviceAccounts"),
            (&raw.not_service_accounts, "notServiceAccounts"),
            at,
            errors,
            |text| account(text, meta),
        ),
        trust_domains: pair(
            (&raw.trust_domains, "trustDomains"),
            (&raw.not_trust_domains, "notTrustDomains"),
            at,
            errors,
            string_match,
        ),
        ip_blocks: pair(
            (&raw.ip_blocks, "ipBlocks"),
            (&raw.not_ip_blocks, "notIpBlocks"),
            at,
            errors,
            ip_block,
        ),
        remote_ip_blocks: pair(
            (&raw.remote_ip_blocks, "remoteIpBlocks"),
            (&raw.not_remote_ip_blocks, "notRemoteIpBlocks"),
            at,
            errors,
            ip_block,
        ),
        request_principals: pair(
            (&raw.request_principals, "requestPrincipals"),
            (&raw.not_request_principals, "notRequestPrincipals"),
            at,
            errors,
            text,
        ),
    };
    for (key, list) in [
        ("serviceAccounts", &raw.service_accounts),
        ("notServiceAccounts", &raw.not_service_accounts),
    ] {
        if list.len() > MAX_SERVICE_ACCOUNTS {
            errors.push(at.key(key).error(format!(
                "lists {} accounts; at most {MAX_SERVICE_ACCOUNTS}",
                list.len()
            )));
        }
    }
    let accounts = !raw.service_accounts.is_empty() || !raw.not_service_accounts.is_empty();
    let others = [
        &raw.principals,
        &raw.not_principals,
        &raw.namespaces,
        &raw.not_namespaces,
    ];
    if accounts && others.iter().any(|list| !list.is_empty()) {
        errors.push(
            at.key("serviceAccounts")
                .error("cannot stand beside principals or namespaces in one source"),
        );
    }
    source
}

fn operation(raw: &raw::Operation, at: At<'_>, errors: &mut Vec<FieldError>) -> Operation {
    Operation {
        ports: pair(
            (&raw.ports, "ports"),
            (&raw.not_ports, "notPorts"),
            at,
            errors,
            port,
        ),
        hosts: pair(
            (&raw.hosts, "hosts"),
            (&raw.not_hosts, "notHosts"),
            at,
            errors,
            text,
        ),
        methods: pair(
            (&raw.methods, "methods"),
            (&raw.not_methods, "notMethods"),
            at,
            errors,
            text,
        ),
        paths: pair(
            (&raw.paths, "paths"),
            (&raw.not_paths, "notPaths"),
            at,
            errors,
            path,
        ),
    }
}

fn condition(
    raw: &raw::When,
    action: PolicyAction,
    meta: &Meta,
    at: At<'_>,
    errors: &mut Vec<FieldError>,
) -> Option<Condition> {
    if raw.values.is_empty() && raw.not_values.is_empty() {
        errors.push(at.error("needs `values` or `notValues`"));
        return None;
    }
    let any = (raw.values.as_slice(), "values");
    let none = (raw.not_values.as_slice(), "notValues");
    let forbidden = action == PolicyAction::Custom
        && (raw.key.starts_with("request.auth.")
            || matches!(
                raw.key.as_str(),
                "source.namespace"
                    | "source.principal"
                    | "source.serviceAccount"
                    | "source.trustDomain"
            ));
    if forbidden {
        errors.push(at.key("key").error("cannot be used with action CUSTOM"));
    }
    Some(match raw.key.as_str() {
        "source.ip" => Condition::SourceIp(pair(any, none, at, errors, ip_block)),
        "remote.ip" => Condition::RemoteIp(pair(any, none, at, errors, ip_block)),
        "destination.ip" => Condition::DestinationIp(pair(any, none, at, errors, ip_block)),
        "destination.port" => Condition::DestinationPort(pair(any, none, at, errors, port)),
        "source.namespace" => Condition::SourceNamespace(pair(any, none, at, errors, string_match)),
        "source.principal" => Condition::SourcePrincipal(pair(any, none, at, errors, string_match)),
        "source.trustDomain" => {
            Condition::SourceTrustDomain(pair(any, none, at, errors, string_match))
        }
        "source.serviceAccount" => {
            Condition::SourceServiceAccount(pair(any, none, at, errors, |text| account(text, meta)))
        }
        key if is_l7_key(key) => Condition::L7 {
            key: key.into(),
            values: pair(any, none, at, errors, text),
        },
        "" => {
            errors.push(at.key("key").error("is required"));
            return None;
        }
        key => {
            errors.push(at.key("key").error(format!("unknown attribute {key:?}")));
            return None;
        }
    })
}

/// Istio "Authorization Policy Conditions".
fn is_l7_key(key: &str) -> bool {
    let bracketed = |prefix: &str| {
        key.strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|name| !name.is_empty() && !name.starts_with(']'))
    };
    matches!(
        key,
        "request.auth.principal"
            | "request.auth.audiences"
            | "request.auth.presenter"
            | "connection.sni"
    ) || bracketed("request.headers[")
        || bracketed("request.auth.claims[")
        || key.starts_with("experimental.envoy.filters.")
}

fn pair<T>(
    (any, any_key): (&[String], &str),
    (none, none_key): (&[String], &str),
    at: At<'_>,
    errors: &mut Vec<FieldError>,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Values<T> {
    let mut list = |texts: &[String], key: &str| {
        let at = at.key(key);
        let mut parsed = Vec::with_capacity(texts.len());
        for (index, text) in texts.iter().enumerate() {
            match parse(text) {
                Ok(value) => parsed.push(value),
                Err(reason) => errors.push(at.index(index).error(reason)),
            }
        }
        parsed
    };
    Values {
        any: list(any, any_key),
        none: list(none, none_key),
    }
}

fn text(text: &str) -> Result<String, String> {
    if text.is_empty() {
        Err("is empty".into())
    } else {
        Ok(text.into())
    }
}

fn string_match(text: &str) -> Result<StringMatch, String> {
    let parsed = match (text.strip_prefix('*'), text.strip_suffix('*')) {
        (Some(""), _) => return Ok(StringMatch::Presence),
        (Some(suffix), _) => StringMatch::Suffix(suffix.into()),
        (None, Some(prefix)) => StringMatch::Prefix(prefix.into()),
        (None, None) => StringMatch::Exact(text.into()),
    };
    match &parsed {
        StringMatch::Exact(part) | StringMatch::Prefix(part) | StringMatch::Suffix(part)
            if part.is_empty() =>
        {
            Err("is empty".into())
        }
        StringMatch::Exact(part) | StringMatch::Prefix(part) | StringMatch::Suffix(part)
            if part.contains('*') =>
        {
            Err(format!(
                "{text:?}: a '*' may stand at the start or at the end, once"
            ))
        }
        _ => Ok(parsed),
    }
}

/// `<namespace>/<name>`, or `<name>` in the policy's own namespace.
fn account(text: &str, meta: &Meta) -> Result<AccountMatch, String> {
    let (namespace, name) = text.split_once('/').unwrap_or((&meta.namespace, text));
    for part in [namespace, name] {
        meta::check_name(part).map_err(|_| {
            format!("{text:?} is not <namespace>/<service account>; wildcards are not supported")
        })?;
    }
    Ok(AccountMatch {
        namespace: namespace.into(),
        name: name.into(),
    })
}

fn ip_block(text: &str) -> Result<IpNet, String> {
    let block = match text.parse::<IpAddr>() {
        Ok(ip) => Ok(IpNet::from(ip)),
        Err(_) => text.parse::<IpNet>(),
    };
    block.map_err(|_| format!("{text:?} is neither an IP address nor a CIDR block"))
}

fn port(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(port) if port != 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err(format!("{text:?} is not a port: 1 to 65535")),
    }
}

/// A path, with a wildcard at its start or end, or with the templates `{*}` (one
/// segment) and `{**}` (the rest; once, as the last operator).
fn path(path: &str) -> Result<String, String> {
    let path = text(path)?;
    if !path.contains(['{', '}']) {
        return Ok(path);
    }
    let mut rest_seen = false;
    for segment in path.split('/') {
        let operator = matches!(segment, "{*}" | "{**}");
        if operator && rest_seen {
            return Err(format!("{path:?}: {{**}} must be the last operator"));
        }
        rest_seen |= segment == "{**}";
        if !operator && segment.contains(['{', '}', '*']) {
            return Err(format!(
                "{path:?}: a template has whole segments {{*}} or {{**}}, and no other wildcard"
            ));
        }
    }
    Ok(path)
}
