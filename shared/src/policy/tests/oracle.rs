//! Evaluation said again in the slowest way: over the wire form, with identities as
//! text, addresses as bits, and trust-domain aliases by writing every principal out for
//! every alias.

use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;

use super::wire;
use crate::identity::{SpiffeId, TrustDomain};
use crate::policy::{Connection, Policy, PolicySet, TrustDomains};
use crate::proto::security::{self as proto, string_match::MatchType};

const OWN: [&str; 2] = ["td.one", "old.td"];

#[derive(Debug)]
struct Caller {
    identity: Option<(&'static str, &'static str, &'static str)>,
    ip: IpAddr,
    destination: IpAddr,
    port: u16,
}

fn text_matches(wanted: &proto::StringMatch, value: &str) -> bool {
    match wanted.match_type.as_ref().expect("a type") {
        MatchType::Exact(text) => value == text,
        MatchType::Prefix(text) => value.starts_with(text.as_str()),
        MatchType::Suffix(text) => value.ends_with(text.as_str()),
        MatchType::Presence(_) => true,
    }
}

fn is_own(domain: &str) -> bool {
    OWN.contains(&domain)
}

/// Every way to write the domain of a principal.
fn spellings(domain: &str) -> Vec<String> {
    let tail = domain.strip_prefix('*');
    let own = domain == "cluster.local"
        || tail.map_or(is_own(domain), |tail| {
            OWN.iter().any(|own| own.ends_with(tail))
        })
        || tail == Some("cluster.local");
    if !own {
        return vec![domain.into()];
    }
    let mut all: Vec<String> = OWN.iter().map(ToString::to_string).collect();
    // A tail also stands for foreign domains that have it.
    all.extend(tail.map(|_| domain.to_owned()));
    all
}

fn principal_matches(text: &str, identity: &str) -> bool {
    if text == "*" {
        return true;
    }
    let complete = text.split('/').count() == 5;
    let texts: Vec<String> = match text.split_once('/') {
        Some((domain, rest)) if !domain.starts_with('*') || complete => spellings(domain)
            .into_iter()
            .map(|domain| format!("{domain}/{rest}"))
            .collect(),
        _ => vec![text.into()],
    };
    texts
        .iter()
        .any(|text| text_matches(&wire::pattern(text), identity))
}

fn written(wanted: &proto::StringMatch) -> String {
    match wanted.match_type.as_ref().expect("a type") {
        MatchType::Exact(text) => text.clone(),
        MatchType::Prefix(text) => format!("{text}*"),
        MatchType::Suffix(text) => format!("*{text}"),
        MatchType::Presence(_) => "*".into(),
    }
}

fn bits(ip: IpAddr) -> (u32, u128) {
    match ip.to_canonical() {
        IpAddr::V4(ip) => (32, ip.to_bits().into()),
        IpAddr::V6(ip) => (128, ip.to_bits()),
    }
}

fn block_holds(block: &proto::Address, ip: IpAddr) -> bool {
    let (width, value) = bits(ip);
    let bytes = &block.address;
    let own = bytes
        .iter()
        .fold(0_u128, |all, byte| all << 8 | u128::from(*byte));
    let shift = width - block.length.min(width);
    bytes.len() * 8 == width as usize && (shift == width || own >> shift == value >> shift)
}

fn match_holds(one: &proto::Match, caller: &Caller) -> bool {
    if *one == proto::Match::default() {
        return false;
    }
    let principal = caller
        .identity
        .map(|(td, ns, sa)| format!("{td}/ns/{ns}/sa/{sa}"));
    let namespace = |wanted: &proto::StringMatch| {
        caller
            .identity
            .is_some_and(|(_, ns, _)| text_matches(wanted, ns))
    };
    let principals = |wanted: &proto::StringMatch| {
        principal
            .as_ref()
            .is_some_and(|id| principal_matches(&written(wanted), id))
    };
    let domains = |wanted: &proto::StringMatch| {
        caller.identity.is_some_and(|(td, _, _)| {
            // `cluster.local` is a name for the own domain, never a domain here.
            match wanted.match_type.as_ref().expect("a type") {
                MatchType::Exact(text) => spellings(text).iter().any(|s| s == td),
                _ => text_matches(wanted, td),
            }
        })
    };
    let accounts = |wanted: &proto::ServiceAccountMatch| {
        caller
            .identity
            .is_some_and(|(_, ns, sa)| wanted.namespace == ns && wanted.service_account == sa)
    };
    let source = |block: &proto::Address| block_holds(block, caller.ip);
    let destination = |block: &proto::Address| block_holds(block, caller.destination);
    let port = |port: &u32| *port == u32::from(caller.port);
    fn kind<T>(yes: &[T], no: &[T], hit: impl Fn(&T) -> bool) -> bool {
        (yes.is_empty() || yes.iter().any(&hit)) && !no.iter().any(&hit)
    }
    kind(&one.namespaces, &one.not_namespaces, namespace)
        && kind(&one.principals, &one.not_principals, principals)
        && kind(&one.trust_domains, &one.not_trust_domains, domains)
        && kind(&one.service_accounts, &one.not_service_accounts, accounts)
        && kind(&one.source_ips, &one.not_source_ips, source)
        && kind(&one.destination_ips, &one.not_destination_ips, destination)
        && kind(&one.destination_ports, &one.not_destination_ports, port)
}

fn policy_hits(policy: &proto::Authorization, caller: &Caller) -> bool {
    policy.groups.iter().any(|group| {
        group.rules.iter().all(|clause| {
            clause.matches.is_empty() || clause.matches.iter().any(|one| match_holds(one, caller))
        })
    })
}

fn served(policies: &[proto::Authorization], caller: &Caller) -> bool {
    let enforced = || policies.iter().filter(|policy| !policy.dry_run);
    let deny = |policy: &&proto::Authorization| policy.action == proto::Action::Deny as i32;
    if enforced()
        .filter(deny)
        .any(|policy| policy_hits(policy, caller))
    {
        return false;
    }
    let mut allows = enforced().filter(|policy| !deny(policy)).peekable();
    allows.peek().is_none() || allows.any(|policy| policy_hits(policy, caller))
}

fn some<T: Clone + std::fmt::Debug + 'static>(values: &'static [T]) -> BoxedStrategy<Vec<T>> {
    // Most fields of a match are unset; two values suffice to see OR.
    let one_or_two = proptest::collection::vec(proptest::sample::select(values), 1..3);
    prop_oneof![4 => Just(Vec::new()), 1 => one_or_two].boxed()
}

fn any_match() -> impl Strategy<Value = proto::Match> {
    const NAMESPACES: &[&str] = &["a", "b", "ns", "n*", "*s", "*"];
    const DOMAINS: &[&str] = &[
        "cluster.local",
        "td.one",
        "old.td",
        "far.td",
        "*td",
        "o*",
        "*",
    ];
    const PRINCIPALS: &[&str] = &[
        "cluster.local/ns/a/sa/x",
        "td.one/ns/a/sa/x",
        "old.td/ns/b/sa/x",
        "far.td/ns/a/sa/y",
        "cluster.local/ns/a/*",
        "old.td/*",
        "far.td/ns/n*",
        "o*",
        "td.one*",
        "*/ns/a/sa/x",
        "*.td/ns/a/sa/x",
        "*.one/ns/ns/sa/y",
        "*cluster.local/ns/a/sa/x",
        "*/ns/sa/y",
        "*/sa/x",
        "*x",
        "nonsense",
        "*",
    ];
    const BLOCKS: &[&str] = &[
        "10.0.0.0/8",
        "10.1.0.0/16",
        "10.1.2.3/32",
        "0.0.0.0/0",
        "192.168.0.0/16",
        "::/0",
        "fd00::/8",
        "fd00::1/128",
    ];
    const PORTS: &[u32] = &[80, 443, 8080];
    const ACCOUNTS: &[(&str, &str)] = &[("a", "x"), ("b", "y"), ("ns", "sa")];
    let pair = |values| (some(values), some(values));
    let texts = |(yes, no): (Vec<&str>, Vec<&str>)| (wire::patterns(&yes), wire::patterns(&no));
    let blocks = |(yes, no): (Vec<&str>, Vec<&str>)| (wire::blocks(&yes), wire::blocks(&no));
    let accounts =
        |list: Vec<(&str, &str)>| list.iter().map(|(n, s)| wire::account(n, s)).collect();
    (
        pair(NAMESPACES).prop_map(texts),
        pair(PRINCIPALS).prop_map(texts),
        pair(DOMAINS).prop_map(texts),
        pair(BLOCKS).prop_map(blocks),
        pair(BLOCKS).prop_map(blocks),
        (some(PORTS), some(PORTS)),
        (some(ACCOUNTS), some(ACCOUNTS)).prop_map(move |(yes, no)| (accounts(yes), accounts(no))),
    )
        .prop_map(
            |(namespaces, principals, domains, source, destination, ports, accounts)| {
                proto::Match {
                    namespaces: namespaces.0,
                    not_namespaces: namespaces.1,
                    principals: principals.0,
                    not_principals: principals.1,
                    source_ips: source.0,
                    not_source_ips: source.1,
                    destination_ips: destination.0,
                    not_destination_ips: destination.1,
                    destination_ports: ports.0,
                    not_destination_ports: ports.1,
                    service_accounts: accounts.0,
                    not_service_accounts: accounts.1,
                    trust_domains: domains.0,
                    not_trust_domains: domains.1,
                }
            },
        )
}

fn any_policy() -> impl Strategy<Value = proto::Authorization> {
    use proptest::collection::vec;
    let clause = vec(any_match(), 0..3).prop_map(|matches| proto::Rules { matches });
    let group = vec(clause, 0..3).prop_map(|rules| proto::Group { rules });
    (
        vec(group, 0..3),
        any::<bool>(),
        proptest::bool::weighted(0.2),
    )
        .prop_map(|(groups, deny, dry_run)| proto::Authorization {
            dry_run,
            ..if deny {
                wire::deny(groups)
            } else {
                wire::allow(groups)
            }
        })
}

fn any_caller() -> impl Strategy<Value = Caller> {
    use proptest::option::weighted;
    use proptest::sample::select;
    const IPS: &[&str] = &[
        "10.1.2.3",
        "10.9.9.9",
        "::ffff:10.1.2.3",
        "192.168.1.1",
        "fd00::1",
        "1::1",
    ];
    let ip = || select(IPS).prop_map(|ip| ip.parse().expect("an address"));
    let identity = (
        select(&["td.one", "old.td", "far.td"][..]),
        select(&["a", "b", "ns"][..]),
        select(&["x", "y", "sa"][..]),
    );
    (
        weighted(0.8, identity),
        ip(),
        ip(),
        select(&[80_u16, 8080][..]),
    )
        .prop_map(|(identity, ip, destination, port)| Caller {
            identity,
            ip,
            destination,
            port,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn evaluation_agrees_with_the_oracle(
        policies in proptest::collection::vec(any_policy(), 0..4),
        callers in proptest::collection::vec(any_caller(), 8),
    ) {
        let domain = |text| TrustDomain::new(text).expect("a trust domain");
        let trust = TrustDomains::new(domain(OWN[0]), vec![domain(OWN[1])]);
        let converted: Vec<_> = policies
            .iter()
            .map(|wire| Arc::new(Policy::try_from(wire).expect("convertible")))
            .collect();
        let set = PolicySet::new(Arc::default(), converted.into(), Vec::new(), Vec::new());
        for caller in callers {
            let identity = caller.identity.map(|(td, ns, sa)| {
                SpiffeId::new(domain(td), ns, sa).expect("an id")
            });
            let connection = Connection {
                source_identity: identity.as_ref(),
                source_ip: caller.ip,
                destination_ip: caller.destination,
                destination_port: caller.port,
                origin: None,
            };
            let verdict = set.evaluate(&connection, &trust).verdict;
            prop_assert_eq!(verdict.is_permitted(), served(&policies, &caller), "{:?}", verdict);
        }
    }
}
