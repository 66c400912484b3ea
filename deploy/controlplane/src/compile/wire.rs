//! Small conversions to the wire.

use std::net::IpAddr;

use adit_shared::proto::security;
use ipnet::IpNet;

use crate::model::StringMatch;

pub(super) fn ip_bytes(ip: &IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

pub(super) fn block(block: &IpNet) -> security::Address {
    security::Address {
        address: ip_bytes(&block.network()),
        length: block.prefix_len().into(),
    }
}

pub(super) fn string_match(text: &StringMatch) -> security::StringMatch {
    use security::string_match::MatchType;
    security::StringMatch {
        match_type: Some(match text {
            StringMatch::Exact(text) => MatchType::Exact(text.clone()),
            StringMatch::Prefix(text) => MatchType::Prefix(text.clone()),
            StringMatch::Suffix(text) => MatchType::Suffix(text.clone()),
            StringMatch::Presence => MatchType::Presence(()),
        }),
    }
}
