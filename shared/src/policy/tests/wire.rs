//! Short ways to write what comes over the wire.

use crate::proto::security::{self as proto, string_match::MatchType};

/// `text`, `text*`, `*text` or `*`, as the control plane sends it.
pub(super) fn pattern(text: &str) -> proto::StringMatch {
    let match_type = if text == "*" {
        MatchType::Presence(())
    } else if let Some(suffix) = text.strip_prefix('*') {
        MatchType::Suffix(suffix.into())
    } else if let Some(prefix) = text.strip_suffix('*') {
        MatchType::Prefix(prefix.into())
    } else {
        MatchType::Exact(text.into())
    };
    proto::StringMatch {
        match_type: Some(match_type),
    }
}

pub(super) fn patterns(texts: &[&str]) -> Vec<proto::StringMatch> {
    texts.iter().map(|text| pattern(text)).collect()
}

pub(super) fn block(text: &str) -> proto::Address {
    let block: ipnet::IpNet = text
        .parse()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(Into::into))
        .expect("a block");
    proto::Address {
        address: match block.addr() {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        },
        length: block.prefix_len().into(),
    }
}

pub(super) fn blocks(texts: &[&str]) -> Vec<proto::Address> {
    texts.iter().map(|text| block(text)).collect()
}

pub(super) fn account(namespace: &str, service_account: &str) -> proto::ServiceAccountMatch {
    proto::ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: service_account.into(),
    }
}

/// A rule: one clause for each match.
pub(super) fn group(matches: impl IntoIterator<Item = proto::Match>) -> proto::Group {
    let clauses = matches
        .into_iter()
        .map(|one| proto::Rules { matches: vec![one] });
    proto::Group {
        rules: clauses.collect(),
    }
}

pub(super) fn namespaces(texts: &[&str]) -> proto::Match {
    proto::Match {
        namespaces: patterns(texts),
        ..Default::default()
    }
}

pub(super) fn principals(texts: &[&str]) -> proto::Match {
    proto::Match {
        principals: patterns(texts),
        ..Default::default()
    }
}

pub(super) fn not_principals(texts: &[&str]) -> proto::Match {
    proto::Match {
        not_principals: patterns(texts),
        ..Default::default()
    }
}

pub(super) fn ports(ports: &[u32]) -> proto::Match {
    proto::Match {
        destination_ports: ports.to_vec(),
        ..Default::default()
    }
}

/// A policy of namespace `srv` for all of it.
pub(super) fn policy(
    name: &str,
    action: proto::Action,
    groups: impl IntoIterator<Item = proto::Group>,
) -> proto::Authorization {
    proto::Authorization {
        name: name.into(),
        namespace: "srv".into(),
        scope: proto::Scope::Namespace.into(),
        action: action.into(),
        groups: groups.into_iter().collect(),
        ..Default::default()
    }
}

pub(super) fn allow(groups: impl IntoIterator<Item = proto::Group>) -> proto::Authorization {
    policy("allow", proto::Action::Allow, groups)
}

pub(super) fn deny(groups: impl IntoIterator<Item = proto::Group>) -> proto::Authorization {
    policy("deny", proto::Action::Deny, groups)
}
